//! The presence map on disk: which pages of an overlay are data, zero, or absent, in blocks with two slots each.
//!
//! A block covers [`BLOCK_PAGES`] pages and is 4 KiB: eight sectors, each with a header, a checksum and two bits a page. A new version of a
//! block goes to the slot that does not hold the last durable one; a block counts as written when all its sectors are there, of one
//! generation. So a torn write leaves the old version standing, and is told from a sector that rotted: a torn slot consists of sectors that
//! are each whole or were never written.
//!
//! ```text
//! sector   0  4  magic "OMAP"     8  8  generation        32 240  bit n: page n of this sector is data
//!          4  4  CRC-32          16  8  block            272 240  bit n: it is zero
//!                                24  8  first half of the layer's id
//! ```
//!
//! Pure: bytes in, bits out.

use super::record::BLOCK;
use crate::page::{PageIndex, PageRange, is_zero};

const SECTOR: usize = 512;
const SECTORS: usize = BLOCK / SECTOR;
const HEADER: usize = 32;
const SECTOR_WORDS: usize = 30;
const MAGIC: [u8; 4] = *b"OMAP";
/// 64-bit words of one kind of bit in a block.
pub(super) const WORDS: usize = SECTORS * SECTOR_WORDS;
/// Pages that a block covers: 60 MiB of the disk.
pub(super) const BLOCK_PAGES: u64 = (WORDS * 64) as u64;

/// The pages of one block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct MapBlock {
    pub(super) data: [u64; WORDS],
    pub(super) zero: [u64; WORDS],
}

impl MapBlock {
    pub(super) const ABSENT: Self = Self { data: [0; WORDS], zero: [0; WORDS] };

    /// Marks `range`, counted from the start of the block, as zero.
    pub(super) fn set_zero(&mut self, range: PageRange) {
        for page in range.iter() {
            self.zero[page.get() as usize / 64] |= 1 << (page.get() % 64);
        }
    }

    /// The runs of set bits among `words`, counted from the start of the block.
    pub(super) fn runs(words: &[u64; WORDS]) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for (at, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            let mut bit = 0;
            while bit < 64 && word >> bit != 0 {
                bit += (word >> bit).trailing_zeros();
                let ones = (word >> bit).trailing_ones();
                let start = at as u64 * 64 + u64::from(bit);
                let end = start + u64::from(ones);
                match runs.last_mut() {
                    Some(last) if last.end().get() == start => {
                        *last = PageRange::from_bounds(last.start(), PageIndex::new(end));
                    }
                    _ => runs.push(PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))),
                }
                bit += ones;
            }
        }
        runs
    }

    /// As a slot of the file.
    pub(super) fn encode(&self, place: Place, generation: u64) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        for (at, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            sector[..4].copy_from_slice(&MAGIC);
            sector[8..16].copy_from_slice(&generation.to_le_bytes());
            sector[16..24].copy_from_slice(&place.block.to_le_bytes());
            sector[24..32].copy_from_slice(&place.tag.to_le_bytes());
            let words = at * SECTOR_WORDS..(at + 1) * SECTOR_WORDS;
            let bits = self.data[words.clone()].iter().chain(&self.zero[words]);
            for (word, bytes) in bits.zip(sector[HEADER..].chunks_exact_mut(8)) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            let crc = sector_crc(sector, at);
            sector[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        bytes
    }
}

/// Where a block belongs: written into it, so that a block which ended up elsewhere is found out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) block: u64,
    pub(super) tag: u64,
}

/// The place of a sector within its block is under the checksum too.
fn sector_crc(sector: &[u8], at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[at as u8]);
    hasher.update(&sector[8..]);
    hasher.finalize()
}

/// What a slot holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Slot {
    /// Nothing was ever written there.
    Empty,
    /// A whole block.
    Whole(Box<MapBlock>, u64),
    /// A write to it was cut off. Nobody was told that it was durable.
    Torn,
    /// A sector that nobody wrote.
    Rotten,
}

impl Slot {
    pub(super) fn decode(bytes: &[u8; BLOCK], place: Place) -> Self {
        let mut block = Box::new(MapBlock::ABSENT);
        let mut generations = [None; SECTORS];
        for (at, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            if is_zero(sector) {
                continue;
            }
            let word = |at: usize| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&sector[at..at + 8]);
                u64::from_le_bytes(bytes)
            };
            let mut crc = [0; 4];
            crc.copy_from_slice(&sector[4..8]);
            let whole = sector[..4] == MAGIC && u32::from_le_bytes(crc) == sector_crc(sector, at);
            if !whole || (word(16), word(24)) != (place.block, place.tag) {
                return Self::Rotten;
            }
            generations[at] = Some(word(8));
            for n in 0..SECTOR_WORDS {
                let (data, zero) = (word(HEADER + n * 8), word(HEADER + (SECTOR_WORDS + n) * 8));
                if data & zero != 0 {
                    return Self::Rotten;
                }
                block.data[at * SECTOR_WORDS + n] = data;
                block.zero[at * SECTOR_WORDS + n] = zero;
            }
        }
        match generations[0] {
            None if generations.iter().all(Option::is_none) => Self::Empty,
            Some(generation) if generations.iter().all(|other| *other == Some(generation)) => {
                Self::Whole(block, generation)
            }
            _ => Self::Torn,
        }
    }
}

/// One of a block's two slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    A,
    B,
}

/// A whole version of a block: where it lies, what it says, its generation.
pub(super) type Version = (Side, Box<MapBlock>, u64);

/// The durable version of a block among its two slots: the newest whole one, or `None` where there never was one. A block's first version
/// goes to slot A, so B is empty until A was durable.
///
/// # Errors
/// What is wrong, and in which slot.
pub(super) fn choose(a: Slot, b: Slot) -> Result<Option<Version>, (Side, &'static str)> {
    match (a, b) {
        (Slot::Rotten, _) => Err((Side::A, "a sector of the map does not match its checksum")),
        (_, Slot::Rotten) => Err((Side::B, "a sector of the map does not match its checksum")),
        (Slot::Empty | Slot::Torn, Slot::Empty) => Ok(None),
        (Slot::Whole(block, generation), Slot::Whole(_, other)) if generation > other => {
            Ok(Some((Side::A, block, generation)))
        }
        (Slot::Whole(_, generation), Slot::Whole(_, other)) if generation == other => {
            Err((Side::B, "both versions of this part of the map have one number"))
        }
        (Slot::Empty, _) => Err((Side::A, "this part of the map has a second version and no first one")),
        (_, Slot::Whole(block, generation)) => Ok(Some((Side::B, block, generation))),
        (Slot::Whole(block, generation), _) => Ok(Some((Side::A, block, generation))),
        (Slot::Torn, Slot::Torn) => Err((Side::A, "no version of this part of the map is whole")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dice;

    const PLACE: Place = Place { block: 7, tag: 99 };

    fn random(dice: &mut Dice) -> MapBlock {
        let mut block = MapBlock::ABSENT;
        for at in 0..WORDS {
            block.data[at] = dice.next();
            block.zero[at] = dice.next() & !block.data[at];
        }
        block
    }

    #[test]
    fn a_block_comes_back_and_every_flipped_bit_is_found() {
        let block = random(&mut Dice::new(1));
        let bytes = block.encode(PLACE, 3);
        assert_eq!(Slot::decode(&bytes, PLACE), Slot::Whole(Box::new(block), 3));
        for bit in 0..BLOCK * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Slot::decode(&flipped, PLACE), Slot::Rotten, "bit {bit}");
        }
        for place in [Place { block: 8, ..PLACE }, Place { tag: 98, ..PLACE }] {
            assert_eq!(Slot::decode(&bytes, place), Slot::Rotten);
        }
    }

    /// Every subset of the eight sectors, over an empty slot and over an older version.
    #[test]
    fn a_torn_write_is_no_version() {
        let mut dice = Dice::new(2);
        let (old, new) = (random(&mut dice).encode(PLACE, 1), random(&mut dice).encode(PLACE, 3));
        for before in [[0; BLOCK], old] {
            for written in 1u32..255 {
                let mut torn = before;
                for at in (0..SECTORS).filter(|at| written >> at & 1 == 1) {
                    torn[at * SECTOR..][..SECTOR].copy_from_slice(&new[at * SECTOR..][..SECTOR]);
                }
                assert_eq!(Slot::decode(&torn, PLACE), Slot::Torn);
            }
        }
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let mut dice = Dice::new(3);
        let (one, two) = (random(&mut dice), random(&mut dice));
        let whole = |block: &MapBlock, generation| Slot::Whole(Box::new(block.clone()), generation);
        let side = |found: Result<Option<(Side, _, _)>, _>| found.unwrap().map(|(side, _, _)| side);
        assert_eq!(side(choose(Slot::Empty, Slot::Empty)), None);
        assert_eq!(side(choose(Slot::Torn, Slot::Empty)), None);
        assert_eq!(side(choose(whole(&one, 1), Slot::Empty)), Some(Side::A));
        assert_eq!(side(choose(whole(&one, 1), Slot::Torn)), Some(Side::A));
        assert_eq!(side(choose(whole(&one, 1), whole(&two, 2))), Some(Side::B));
        assert_eq!(side(choose(whole(&one, 3), whole(&two, 2))), Some(Side::A));
        assert_eq!(side(choose(Slot::Torn, whole(&two, 2))), Some(Side::B));
        for (a, b) in [
            (Slot::Rotten, whole(&one, 1)),
            (whole(&one, 1), Slot::Rotten),
            (Slot::Torn, Slot::Torn),
            (Slot::Empty, whole(&one, 2)),
            (Slot::Empty, Slot::Torn),
            (whole(&one, 2), whole(&two, 2)),
        ] {
            assert!(choose(a, b).is_err());
        }
    }

    #[test]
    fn runs_of_bits() {
        let mut block = MapBlock::ABSENT;
        let ranges = [(0, 1), (63, 65), (127, 256), (BLOCK_PAGES - 1, BLOCK_PAGES)]
            .map(|(a, b)| PageRange::from_bounds(PageIndex::new(a), PageIndex::new(b)));
        ranges.iter().for_each(|range| block.set_zero(*range));
        assert_eq!(MapBlock::runs(&block.zero), ranges);
        assert!(MapBlock::runs(&block.data).is_empty());
    }
}
