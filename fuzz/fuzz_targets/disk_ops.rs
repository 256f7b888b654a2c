//! The disk face: any sector, any count, any buffer, over a base image of any length.
//!
//! Oracle: a flat `Vec<u8>` and the documented rules. A request that is not whole sectors, or not all on the disk, or a write to a
//! read-only disk, fails and changes nothing; every other one succeeds. Discard zeroes whole pages only, the last
//! page counting as whole where the disk ends in it; write-zeroes zeroes every byte asked for. After every request the whole
//! disk is compared, and each page is accounted for once.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use offshoot::Tree;
use offshoot::backing::{AnyPage, Backing, Heap};
use offshoot::disk::{Access, Disk, DiskError};
use offshoot::page::{ByteSize, Geometry, Lba, PageSize, SectorCount};
use offshoot_fuzz::disk_model::{DiskModel, SECTOR};
use offshoot_fuzz::{Base, pattern};

const MOST_OPS: usize = 48;

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    access: Rights,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Blank {
        sectors: u8,
    },
    OverImage {
        len: u16,
        seed: u8,
    },
    /// A space of 64 KiB pages that is longer than the disk, over a base image of its own.
    OverSpace {
        sectors: u8,
        pages: u8,
        len: u16,
        seed: u8,
    },
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Rights {
    ReadWrite,
    /// A few writes must be refused.
    ReadOnly,
}

/// A sector, close to the start, close to the end or anywhere.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Where {
    Start(u8),
    End(i8),
    Any(u64),
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum HowMany {
    Few(u8),
    ToEnd(i8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Op {
    Write { at: Where, sectors: u8, odd: i8, seed: u8 },
    Read { at: Where, sectors: u8, odd: i8 },
    Discard { at: Where, count: HowMany },
    WriteZeroes { at: Where, count: HowMany },
    Flush,
}

fn lba(at: Where, model: &DiskModel) -> u64 {
    match at {
        Where::Start(lba) => u64::from(lba),
        Where::End(delta) => model.sectors().wrapping_add_signed(i64::from(delta)),
        Where::Any(lba) => lba,
    }
}

fn how_many(count: HowMany, lba: u64, model: &DiskModel) -> u64 {
    match count {
        HowMany::Few(count) => u64::from(count),
        HowMany::ToEnd(delta) => model.sectors().wrapping_sub(lba).wrapping_add_signed(i64::from(delta)),
        HowMany::Any(count) => count,
    }
}

/// Buffers that are not whole sectors come up one time in two.
fn buffer_len(sectors: u8, odd: i8) -> usize {
    let odd = if odd < 0 { 0 } else { odd as usize };
    usize::from(sectors % 20) * SECTOR as usize + odd
}

fn build(kind: &Kind, access: Access) -> Option<(Disk, DiskModel)> {
    let tree = Tree::default();
    match *kind {
        Kind::Blank { sectors } => {
            let sectors = sectors % 48;
            let made = Disk::blank(&tree, SectorCount::new(u64::from(sectors)), access);
            if sectors == 0 {
                assert!(matches!(made, Err(DiskError::Empty)));
                return None;
            }
            Some((made.unwrap(), DiskModel::blank(usize::from(sectors))))
        }
        Kind::OverImage { len, seed } => {
            let len = len % (6 * 4096);
            let image = pattern(seed, usize::from(len));
            let made = Disk::over_image(&tree, Base::shared(0, image.clone()), access);
            if len == 0 {
                assert!(matches!(made, Err(DiskError::Empty)));
                return None;
            }
            Some((made.unwrap(), DiskModel::over_image(&image)))
        }
        Kind::OverSpace { sectors, pages, len, seed } => {
            let size = PageSize::new(ByteSize::kib(64)).unwrap();
            let pages = 1 + usize::from(pages % 3);
            let bytes = pages as u64 * size.bytes().get();
            let image = pattern(seed, usize::from(len));
            let geometry = Geometry::new(ByteSize::new(bytes), size).unwrap();
            let base = Base::shared(0, image.clone());
            let space: Heap<AnyPage> = Heap::create(&tree, geometry, Some(base)).unwrap();
            let made = Disk::over(space, SectorCount::new(u64::from(sectors)), access);
            if sectors == 0 || u64::from(sectors) * SECTOR as u64 > bytes {
                assert!(matches!(made, Err(DiskError::Empty | DiskError::Space(_))));
                return None;
            }
            Some((made.unwrap(), DiskModel::over_space(usize::from(sectors), 64 << 10, pages, &image)))
        }
    }
}

/// Holds the outcome of a request against what it should be.
fn check<T>(got: Result<T, DiskError>, whole: bool, on_disk: bool, refused: bool) {
    match got {
        Ok(_) => assert!(whole && on_disk && !refused, "a request was granted that must not be"),
        Err(DiskError::ReadOnly) => assert!(refused),
        Err(DiskError::Misaligned(_)) => assert!(!whole),
        Err(DiskError::OutOfRange { .. }) => assert!(!on_disk),
        Err(other) => panic!("{other}"),
    }
}

fuzz_target!(|input: Input| {
    let access = match input.access {
        Rights::ReadWrite => Access::ReadWrite,
        Rights::ReadOnly => Access::ReadOnly,
    };
    let read_only = access == Access::ReadOnly;
    let Some((disk, mut model)) = build(&input.kind, access) else { return };
    assert_eq!(disk.capacity().get(), model.sectors());
    for op in input.ops.iter().take(MOST_OPS) {
        match *op {
            Op::Write { at, sectors, odd, seed } => {
                let (at, data) = (lba(at, &model), pattern(seed, buffer_len(sectors, odd)));
                let range = model.buffer(at, data.len());
                let whole = data.len().is_multiple_of(SECTOR as usize);
                check(disk.write(Lba::new(at), &data), whole, range.is_some(), read_only);
                if let (Some(range), false) = (range, read_only) {
                    model.bytes[range].copy_from_slice(&data);
                }
            }
            Op::Read { at, sectors, odd } => {
                let (at, mut seen) = (lba(at, &model), vec![0xa5; buffer_len(sectors, odd)]);
                let range = model.buffer(at, seen.len());
                let whole = seen.len().is_multiple_of(SECTOR as usize);
                check(disk.read(Lba::new(at), &mut seen), whole, range.is_some(), false);
                if let Some(range) = range {
                    assert!(seen == model.bytes[range], "read");
                }
            }
            Op::Discard { at, count } => {
                let at = lba(at, &model);
                let count = how_many(count, at, &model);
                let range = model.range(at, count);
                check(disk.discard(Lba::new(at), SectorCount::new(count)), true, range.is_some(), read_only);
                if let (Some(range), false) = (range, read_only) {
                    model.discard(range);
                }
            }
            Op::WriteZeroes { at, count } => {
                let at = lba(at, &model);
                let count = how_many(count, at, &model);
                let range = model.range(at, count);
                check(disk.write_zeroes(Lba::new(at), SectorCount::new(count)), true, range.is_some(), read_only);
                if let (Some(range), false) = (range, read_only) {
                    model.bytes[range].fill(0);
                }
            }
            Op::Flush => disk.flush().unwrap(),
        }
        let mut all = vec![0xa5; model.bytes.len()];
        disk.read(Lba::ZERO, &mut all).unwrap();
        assert!(all == model.bytes, "the disk differs after {op:?}");
        let usage = disk.usage().unwrap();
        let pages = usage.private.get() + usage.shared.get() + usage.zero.get();
        assert_eq!(pages, model.pages, "each page once");
    }
});
