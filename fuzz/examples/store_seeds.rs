//! Writes the seeds of `layer_file` and `overlay_map`, and the golden files of `tests/golden`: small files in the layout of `docs/formats/`, made by
//! hand so that a change of the code is held against the documents and not against itself.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example store_seeds`.

use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;
const DISK: [u8; 16] = id(1);
const OVERLAY: [u8; 16] = id(2);
const LAYER: [u8; 16] = id(3);

const fn id(last: u8) -> [u8; 16] {
    [0x3e, 0x5b, 0x7f, 0x10, 0x65, 0xa4, 0x4c, 0x3e, 0x9d, 0x52, 0x6f, 0x2a, 0x8c, 0x0b, 0x1d, last]
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn record(magic: &[u8; 8], generation: u64, id: [u8; 16], fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    put(&mut block, 0, magic);
    put(&mut block, 8, &1u32.to_le_bytes());
    put(&mut block, 16, &generation.to_le_bytes());
    put(&mut block, 48, &id);
    fields.iter().for_each(|(at, bytes)| put(&mut block, *at, bytes));
    let crc = crc32fast::hash(&block);
    put(&mut block, 12, &crc.to_le_bytes());
    block
}

/// A block of the map whose first sector names these pages.
fn map_block(generation: u64, data: u64, zero: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    for (at, sector) in block.chunks_mut(512).enumerate() {
        put(sector, 0, b"OMAP");
        put(sector, 8, &generation.to_le_bytes());
        put(sector, 24, &OVERLAY[..8]);
        if at == 0 {
            put(sector, 32, &data.to_le_bytes());
            put(sector, 272, &zero.to_le_bytes());
        }
        let mut summed = vec![at as u8];
        summed.extend(&sector[8..]);
        let crc = crc32fast::hash(&summed);
        put(sector, 4, &crc.to_le_bytes());
    }
    block
}

fn table(magic: &[u8; 4], fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    put(&mut block, 0, magic);
    put(&mut block, 16, &LAYER[..8]);
    fields.iter().for_each(|(at, bytes)| put(&mut block, *at, bytes));
    let crc = crc32fast::hash(&block[8..]);
    put(&mut block, 4, &crc.to_le_bytes());
    block
}

fn fnv(bytes: &[u8]) -> [u8; 16] {
    let step = |hash: u128, byte: &u8| (hash ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, step).to_le_bytes()
}

/// A layer of a disk of four pages: pages 0 and 1 are data.
fn layer() -> Vec<u8> {
    let (pages, shift, no_base) = (4u64.to_le_bytes(), 12u32.to_le_bytes(), u64::MAX.to_le_bytes());
    let mut file = record(b"OFFSLYR\0", 0, LAYER, &[(80, &pages), (88, &shift), (96, &no_base)]);
    let data = [vec![0x11; BLOCK], vec![0x22; BLOCK]];
    let checks: Vec<u8> = data.iter().flat_map(|page| crc32fast::hash(page).to_le_bytes()).collect();
    data.iter().for_each(|page| file.extend(page));
    file.extend(table(b"OCRC", &[(24, &checks)]));
    let mut extent = [0; 16];
    put(&mut extent, 8, &2u32.to_le_bytes());
    put(&mut extent, 12, &1u32.to_le_bytes());
    file.extend(table(b"OIDX", &[(32, &extent)]));
    let content = fnv(&[&extent[..], &checks].concat());
    let len = (file.len() + BLOCK) as u64;
    let (data_pages, extents) = (2u64.to_le_bytes(), 1u64.to_le_bytes());
    let fields: [(usize, &[u8]); 4] = [(64, &data_pages), (72, &extents), (80, &content), (96, &len.to_le_bytes())];
    file.extend(record(b"OFFSEND\0", 0, LAYER, &fields));
    file
}

/// Two records and the map of an overlay over that layer: page 1 is zero, page 2 data; the second slot is the newer.
fn overlay_start(parent: [u8; 16], slots: [Vec<u8>; 2]) -> Vec<u8> {
    let (pages, shift, no_base) = (4u64.to_le_bytes(), 12u32.to_le_bytes(), u64::MAX.to_le_bytes());
    let data_at = (1u64 << 20).to_le_bytes();
    let fields: [(usize, &[u8]); 6] =
        [(64, &parent), (80, &DISK), (96, &pages), (104, &shift), (120, &no_base), (128, &data_at)];
    let record = record(b"OFFSOVL\0", 1, OVERLAY, &fields);
    [record.clone(), record].into_iter().chain(slots).flatten().collect()
}

fn head() -> Vec<u8> {
    let (pages, shift, no_base) = (4u64.to_le_bytes(), 12u32.to_le_bytes(), u64::MAX.to_le_bytes());
    let record = record(b"OFFSDSK\0", 1, DISK, &[(64, &OVERLAY), (80, &pages), (88, &shift), (96, &no_base)]);
    [record.clone(), record].concat()
}

fn write(dir: &Path, files: &[(&str, Vec<u8>)]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    files.iter().try_for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes))
}

fn main() -> std::io::Result<()> {
    let fuzz = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let map = [map_block(1, 0b0001, 0), map_block(2, 0b0100, 0b0010)];
    let mut data = vec![0; 4 * BLOCK];
    data[..BLOCK].fill(0xdd);
    data[2 * BLOCK..3 * BLOCK].fill(0x33);
    write(
        &fuzz.join("../tests/golden"),
        &[
            ("v1.disk", head()),
            ("v1.layer", layer()),
            ("v1.overlay.start", overlay_start(LAYER, map.clone())),
            ("v1.overlay.data", data),
        ],
    )?;
    // For the targets: a byte of flags, then patches: where (16 bits), how long (8 bits), the bytes. See `fuzz/src/patched.rs`.
    let patch = |at: usize, bytes: &[u8]| [&(at as u16).to_le_bytes()[..], &[bytes.len() as u8], bytes].concat();
    let seed = |flags: u8, patches: &[Vec<u8>]| [vec![flags], patches.concat()].concat();
    let all = u64::MAX.to_le_bytes();
    write(
        &fuzz.join("corpus/overlay_map"),
        &[
            ("untouched", seed(0, &[])),
            ("first-slot-torn", seed(0, &[patch(2 * BLOCK, &[0; 200])])),
            ("second-slot-rotten", seed(0, &[patch(3 * BLOCK + 40, &[9])])),
            ("past-the-end", seed(1, &[patch(2 * BLOCK + 32, &all)])),
            ("frozen", seed(1, &[patch(108, &[1]), patch(BLOCK + 108, &[1])])),
            ("its-own-parent", seed(1, &[patch(64, &OVERLAY), patch(BLOCK + 64, &OVERLAY)])),
            ("huge", seed(1, &[patch(96, &all), patch(BLOCK + 96, &all)])),
            ("feature", seed(1, &[patch(24, &[1]), patch(BLOCK + 40, &[1])])),
        ],
    )?;
    write(
        &fuzz.join("corpus/layer_file"),
        &[
            ("untouched", seed(0, &[])),
            ("page-flipped", seed(0, &[patch(BLOCK + 77, &[1])])),
            ("count", seed(1, &[patch(4 * BLOCK + 40, &[3])])),
            ("kind", seed(1, &[patch(4 * BLOCK + 44, &[2])])),
            ("start", seed(1, &[patch(4 * BLOCK + 32, &all)])),
            ("data-pages", seed(1, &[patch(5 * BLOCK + 64, &all)])),
            ("extents", seed(1, &[patch(5 * BLOCK + 72, &[200])])),
            ("huge", seed(1, &[patch(80, &all)])),
            ("parent", seed(1, &[patch(64, &LAYER)])),
        ],
    )
}
