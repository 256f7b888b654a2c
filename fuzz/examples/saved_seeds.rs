//! Writes the seeds of `saved_vm` and `tests/golden/v1.vm`: manifests of saved VMs in the layout of `docs/formats/saved-vm.md`, made by hand so that a
//! change of the code is held against the document and not against itself.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example saved_seeds`.

use std::path::Path;

const BLOCK: usize = 4096;

const fn id(last: u8) -> [u8; 16] {
    [0x3e, 0x5b, 0x7f, 0x10, 0x65, 0xa4, 0x4c, 0x3e, 0x9d, 0x52, 0x6f, 0x2a, 0x8c, 0x0b, 0x1d, last]
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

struct Disk {
    name: &'static str,
    sectors: u64,
    pages: u64,
    access: u32,
    layer: [u8; 16],
}

/// A manifest; nothing in it is checked, so that seeds may be wrong.
fn manifest(shift: u32, parent: &str, ram: [u8; 16], regions: &[(u64, u64)], disks: &[Disk], state: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for (start, len) in regions {
        body.extend(start.to_le_bytes());
        body.extend(len.to_le_bytes());
    }
    for disk in disks {
        body.extend(disk.layer);
        body.extend(disk.sectors.to_le_bytes());
        body.extend(disk.pages.to_le_bytes());
        body.extend(disk.access.to_le_bytes());
        body.extend((disk.name.len() as u32).to_le_bytes());
        body.extend(disk.name.as_bytes());
        while body.len() % 8 != 0 {
            body.push(0);
        }
    }
    let mut head = vec![0; BLOCK];
    put(&mut head, 0, b"OFFSAVM\0");
    put(&mut head, 8, &1u32.to_le_bytes());
    put(&mut head, 48, &id(4));
    put(&mut head, 64, &ram);
    put(&mut head, 80, &shift.to_le_bytes());
    put(&mut head, 84, &(regions.len() as u32).to_le_bytes());
    put(&mut head, 88, &(disks.len() as u32).to_le_bytes());
    put(&mut head, 92, &(parent.len() as u32).to_le_bytes());
    put(&mut head, 96, &(body.len() as u64).to_le_bytes());
    put(&mut head, 104, &crc32fast::hash(&body).to_le_bytes());
    put(&mut head, 108, &crc32fast::hash(state).to_le_bytes());
    put(&mut head, 112, &(state.len() as u64).to_le_bytes());
    put(&mut head, 128, parent.as_bytes());
    let crc = crc32fast::hash(&head);
    put(&mut head, 12, &crc.to_le_bytes());
    [head, body, state.to_vec()].concat()
}

fn golden() -> Vec<u8> {
    let disks = [
        Disk { name: "root", sectors: 31, pages: 4, access: 0, layer: id(3) },
        Disk { name: "cd", sectors: 8, pages: 1, access: 1, layer: [0; 16] },
    ];
    let state: Vec<u8> = (0..100).collect();
    manifest(12, "golden", id(5), &[(0, 0xa0000), (1 << 32, 2 << 20)], &disks, &state)
}

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::write(root.join("../tests/golden/v1.vm"), golden())?;
    let none = [0; 16];
    let twice = || Disk { name: "d", sectors: 8, pages: 1, access: 0, layer: none };
    let seeds = [
        ("golden", golden()),
        ("smallest", manifest(12, "", none, &[(0, 4096)], &[], &[])),
        ("large-pages", manifest(21, "web", id(5), &[(0, 2 << 20), (u64::MAX - (2 << 20) + 1, 2 << 20)], &[], &[1])),
        ("no-ram", manifest(12, "web", none, &[], &[], &[])),
        ("overlap", manifest(12, "web", none, &[(0, 8192), (4096, 4096)], &[], &[])),
        ("past-the-end", manifest(12, "web", none, &[(!0xfff, 8192)], &[], &[])),
        ("too-much-ram", manifest(12, "web", none, &[(0, 1 << 62), (1 << 62, 1 << 62)], &[], &[])),
        ("two-of-one-name", manifest(12, "web", none, &[(0, 4096)], &[twice(), twice()], &[])),
        ("disk-too-long", manifest(12, "web", none, &[(0, 4096)], &[Disk { sectors: 9, ..twice() }], &[])),
        ("odd-page", manifest(77, "web", none, &[(0, 4096)], &[], &[])),
    ];
    let corpus = root.join("corpus/saved_vm");
    std::fs::create_dir_all(&corpus)?;
    seeds.iter().try_for_each(|(name, bytes)| std::fs::write(corpus.join(name), bytes))
}
