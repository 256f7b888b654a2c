//! Sealed layers: compact, immutable files that describe themselves, with a checksum for every page.
//!
//! See `docs/formats/layer.md`. [`Writer`](write::Writer) makes one under a temporary name; [`SealedFile`] reads it, and checks every page
//! that it hands out. Must not know what reads through to a parent.
//!
//! ```text
//! header | data pages | checksum blocks | index blocks | trailer          all in blocks of 4 KiB
//! ```

mod checks;
mod copy;
mod pages;
mod read;
mod verify;
mod write;

pub(super) use copy::{Run, Zeroes, copy};
pub(super) use read::SealedFile;
pub use verify::Verified;
pub(super) use write::Writer;

use std::sync::Arc;

use super::id::{LAYER, LayerId};
use super::record::{BLOCK, BLOCK_LEN};

pub(super) const HEADER_MAGIC: [u8; 8] = *b"OFFSLYR\0";
const TRAILER_MAGIC: [u8; 8] = *b"OFFSEND\0";
const CHECKS_MAGIC: [u8; 4] = *b"OCRC";
const INDEX_MAGIC: [u8; 4] = *b"OIDX";
/// Checksums in a block of them.
const CHECKS: u64 = (BLOCK as u64 - 24) / 4;
/// Extents in a block of them.
const EXTENTS: u64 = (BLOCK as u64 - 32) / 16;

/// Fields of the header, after the prefix of a record.
mod header {
    pub(super) const PARENT: usize = 64;
    pub(super) const PAGES: usize = 80;
    pub(super) const PAGE_SHIFT: usize = 88;
    pub(super) const BASE_LEN: usize = 96;
}

/// Fields of the trailer.
mod trailer {
    pub(super) const DATA_PAGES: usize = 64;
    pub(super) const EXTENTS: usize = 72;
    pub(super) const CONTENT: usize = 80;
    pub(super) const FILE_LEN: usize = 96;
}

pub(super) fn file_name(id: LayerId) -> Arc<str> {
    format!("{id}.{LAYER}").into()
}

/// Where the parts of a file lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Parts {
    data_pages: u64,
    extents: u64,
}

impl Parts {
    const fn checks_at(self) -> u64 {
        BLOCK_LEN + self.data_pages * BLOCK_LEN
    }

    const fn check_blocks(self) -> u64 {
        self.data_pages.div_ceil(CHECKS)
    }

    const fn index_at(self) -> u64 {
        self.checks_at() + self.check_blocks() * BLOCK_LEN
    }

    const fn index_blocks(self) -> u64 {
        self.extents.div_ceil(EXTENTS)
    }

    const fn trailer_at(self) -> u64 {
        self.index_at() + self.index_blocks() * BLOCK_LEN
    }

    const fn file_len(self) -> u64 {
        self.trailer_at() + BLOCK_LEN
    }
}

/// What an extent says of its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Kind {
    Data = 1,
    Zero = 2,
}

/// Consecutive pages of one kind. Data extents lie in the file in the order of the disk, without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Extent {
    start: u64,
    count: u32,
    kind: Kind,
}

impl Extent {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes
    }
}

/// A block of a table, with the prefix that both tables have: magic, checksum of the rest, number, first half of the layer's id.
fn seal_block(block: &mut [u8; BLOCK], magic: [u8; 4], number: u64, tag: [u8; 8]) {
    block[..4].copy_from_slice(&magic);
    block[8..16].copy_from_slice(&number.to_le_bytes());
    block[16..24].copy_from_slice(&tag);
    let crc = crc32fast::hash(&block[8..]);
    block[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn is_block(block: &[u8; BLOCK], magic: [u8; 4], number: u64, tag: [u8; 8]) -> bool {
    block[..4] == magic
        && block[4..8] == crc32fast::hash(&block[8..]).to_le_bytes()
        && block[8..16] == number.to_le_bytes()
        && block[16..24] == tag
}

fn tag(id: LayerId) -> [u8; 8] {
    let mut tag = [0; 8];
    tag.copy_from_slice(&id.bytes()[..8]);
    tag
}

/// A fingerprint of what a layer says: its extents and the checksums of its pages, whatever its id and its parent (FNV-1a, 128 bits).
///
/// Two layers with different fingerprints differ. Equal ones are very likely equal; whoever must know compares the pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fingerprint(u128);

impl Fingerprint {
    pub(super) const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    }

    pub(super) const fn bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}
