//! A KVM vCPU in 64-bit mode over all of RAM: page tables and special registers.

use kvm_bindings::{kvm_segment, kvm_sregs};
use offshoot::page::ByteSize;

const PAGE: u64 = 4096;
/// Page numbers of the page tables: one of the fourth level, one of the third, and one of the second for each GiB.
const LEVEL_4: u64 = 0x10;
const LEVEL_3: u64 = 0x11;
const LEVEL_2: u64 = 0x12;
/// What they can map below the first MiB.
pub const MOST_RAM: ByteSize = ByteSize::gib(128);
/// Present, writable, accessed: the processor has nothing left to set.
const TABLE: u64 = 0x23;
/// The same, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xe3;

/// Page tables that map all of RAM where it is, by page number.
pub fn page_tables(ram: ByteSize) -> Vec<(u64, Vec<u8>)> {
    let bytes_of = |entries: &mut dyn Iterator<Item = u64>| entries.flat_map(u64::to_le_bytes).collect::<Vec<u8>>();
    let gigabytes = ram.get().div_ceil(1 << 30);
    let mut pages = vec![
        (LEVEL_4, bytes_of(&mut std::iter::once((LEVEL_3 * PAGE) | TABLE))),
        (LEVEL_3, bytes_of(&mut (0..gigabytes).map(|n| ((LEVEL_2 + n) * PAGE) | TABLE))),
    ];
    for n in 0..gigabytes {
        let large = (0..512).map(|at| n << 30 | at << 21 | LARGE_PAGE);
        pages.push((LEVEL_2 + n, bytes_of(&mut large.into_iter())));
    }
    pages
}

/// Turns on 64-bit mode with flat segments over the page tables.
pub fn enter(fresh: kvm_sregs) -> kvm_sregs {
    let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 8, type_: 11, l: 1, ..segment };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..segment };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: 0x8000_0011, // PG, ET, PE
        cr3: LEVEL_4 * PAGE,
        cr4: 1 << 5, // PAE
        efer: 0x500, // LMA, LME
        ..fresh
    }
}
