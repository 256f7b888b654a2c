//! The golden files of durable disks with bytes of them changed: what a fuzz target of a file format opens.
//!
//! An input is a byte of flags and then patches: where (16 bits), how many bytes (8 bits), the bytes. With flag 1 the checksums are put right
//! afterwards, so that they do not hide what is behind them.

use offshoot::page::ByteOffset;
use offshoot::store::DiskId;
use offshoot::testing::crash::Recorder;

const BLOCK: usize = 4096;
/// Where the data of the golden overlay starts.
const DATA_AT: ByteOffset = ByteOffset::new(1 << 20);
const DISK: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d01";
const OVERLAY: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d02.overlay";
const LAYER: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d03.layer";

/// Pages of the golden disk.
pub const PAGES: u64 = 4;

/// Which file the patches are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    Overlay,
    Layer,
}

pub fn disk() -> DiskId {
    DiskId::parse(DISK).expect("an id")
}

/// What the golden disk holds.
pub fn content() -> Vec<u8> {
    let mut bytes = vec![0; PAGES as usize * BLOCK];
    bytes[..BLOCK].fill(0x11);
    bytes[2 * BLOCK..3 * BLOCK].fill(0x33);
    bytes
}

/// The files, one of them patched, and whether its checksums were put right.
pub fn folder(target: Target, input: &[u8]) -> (Recorder, bool) {
    let (flags, patches) = input.split_first().map_or((0, input), |(flags, rest)| (*flags, rest));
    let repair = flags & 1 == 1;
    let mut overlay = include_bytes!("../../tests/golden/v1.overlay.start").to_vec();
    let mut layer = include_bytes!("../../tests/golden/v1.layer").to_vec();
    match target {
        Target::Overlay => patch(&mut overlay, patches),
        Target::Layer => patch(&mut layer, patches),
    }
    if repair {
        repair_overlay(&mut overlay);
        repair_layer(&mut layer);
    }
    let data = include_bytes!("../../tests/golden/v1.overlay.data");
    let recorder = Recorder::new();
    recorder.place(&format!("{DISK}.disk"), include_bytes!("../../tests/golden/v1.disk"));
    recorder.place_parts(OVERLAY, &[(ByteOffset::ZERO, &overlay), (DATA_AT, data)]);
    recorder.place(LAYER, &layer);
    (recorder, repair)
}

fn patch(file: &mut [u8], mut patches: &[u8]) {
    while let [low, high, len, rest @ ..] = patches {
        let (bytes, after) = rest.split_at(usize::from(*len).min(rest.len()));
        let at = usize::from(u16::from_le_bytes([*low, *high])) % file.len();
        let here = bytes.len().min(file.len() - at);
        file[at..at + here].copy_from_slice(&bytes[..here]);
        patches = after;
    }
}

fn repair_record(block: &mut [u8]) {
    block[12..16].fill(0);
    let crc = crc32fast::hash(block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
}

fn repair_overlay(file: &mut [u8]) {
    for (at, block) in file.chunks_mut(BLOCK).enumerate() {
        if at < 2 {
            repair_record(block);
            continue;
        }
        for (n, sector) in (0u8..).zip(block.chunks_mut(512)) {
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&[n]);
            hasher.update(&sector[8..]);
            sector[4..8].copy_from_slice(&hasher.finalize().to_le_bytes());
        }
    }
}

fn repair_layer(file: &mut [u8]) {
    let blocks = file.len() / BLOCK;
    for (at, block) in file.chunks_mut(BLOCK).enumerate() {
        if at == 0 || at == blocks - 1 {
            repair_record(block);
        } else if at >= blocks - 3 {
            let crc = crc32fast::hash(&block[8..]);
            block[4..8].copy_from_slice(&crc.to_le_bytes());
        }
    }
}
