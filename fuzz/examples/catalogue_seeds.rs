//! Writes the seeds of `catalogue`: see `fuzz/src/store_files.rs` for their form.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example catalogue_seeds`.

use std::path::PathBuf;

fn patch(at: u32, bytes: &[u8]) -> Vec<u8> {
    [&at.to_le_bytes()[..3], &[bytes.len() as u8], bytes].concat()
}

fn row(table: u8, key: u8, bytes: &[u8]) -> Vec<u8> {
    [&[table | key << 2, bytes.len() as u8][..], bytes].concat()
}

fn main() -> std::io::Result<()> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus/catalogue");
    std::fs::create_dir_all(&dir)?;
    let (bytes, rows) = (
        |parts: &[Vec<u8>]| [vec![0], parts.concat()].concat(),
        |parts: &[Vec<u8>]| [vec![1], parts.concat()].concat(),
    );
    // Offsets within the row of a clone: kind 0, disk 1, generation 17, top 33, origin 49, pages 65, the origin's 73.
    let all = [0xff; 8];
    let seeds: [(&str, Vec<u8>); 17] = [
        ("untouched", bytes(&[])),
        ("magic", bytes(&[patch(0, b"bder")])),
        ("header", bytes(&[patch(64, &[0xff; 64])])),
        ("tree", bytes(&[patch(4096, &[0xff; 32]), patch(8192, &[1; 16])])),
        ("larger-than-its-file", bytes(&[patch(0x17, &[0, 0xa3, 0, 0, 0, 0])])),
        ("kind", rows(&[row(0, 0, &[0, 9])])),
        ("another-head", rows(&[row(0, 2, &[&[1][..], &[7; 16]].concat())])),
        ("no-top", rows(&[row(0, 1, &[&[33][..], &[0; 16]].concat())])),
        ("top-of-nobody", rows(&[row(0, 1, &[&[33][..], &[5; 16]].concat())])),
        ("origin-of-nobody", rows(&[row(0, 1, &[&[49][..], &[5; 16]].concat())])),
        ("longest", rows(&[row(0, 0, &[&[65][..], &all, &all].concat())])),
        ("longer", rows(&[row(0, 0, &[65, 0, 0, 0, 0, 1])])),
        ("empty-row", rows(&[row(0, 0, &[])])),
        ("layer-of-its-own", rows(&[row(1, 0, &[&[0][..], &[1; 16]].concat()), row(1, 1, &[9; 40])])),
        ("layer-length", rows(&[row(1, 0, &[&[32][..], &all].concat())])),
        ("removal-elsewhere", rows(&[row(2, 0, b"../../etc/passwd"), row(2, 0, b"x.layer")])),
        ("features", rows(&[row(3, 1, &[1]), row(3, 0, &[2])])),
    ];
    seeds.iter().try_for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes))
}
