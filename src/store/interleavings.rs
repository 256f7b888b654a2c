//! The presence map, and a disk whose layers are merged under it, under every order of steps that shuttle thinks of:
//! `RUSTFLAGS="--cfg shuttle" cargo test --lib shuttle`.
//!
//! The check of the map is written over a trait, so that a table which is wrong can be shown to fail it.

use std::sync::Arc;

use super::map::MapBlock;
use super::presence::Presence;
use super::{DiskDir, Durable, Job};
use crate::Tree;
use crate::backing::{Backing, Cut};
use crate::page::{ByteOffset, Geometry, PageCount, PageIndex, PageRange, PageSize};
use crate::sync::interleavings::explore;
use crate::testing::crash::Recorder;

const SCHEDULES: usize = 2_000;

/// A set of pages with the blocks of the map that are to be written.
trait Table: Send + Sync + 'static {
    fn make() -> Self;
    fn insert(&self, page: u64);
    fn contains(&self, page: u64) -> bool;
    fn take_changed(&self) -> Vec<u64>;
    /// Whether a block as it would be written now names this page.
    fn names(&self, block: u64, page: u64) -> bool;
    fn count(&self) -> u64;
}

impl Table for Presence {
    fn make() -> Self {
        Self::new(PageCount::new(128))
    }

    fn insert(&self, page: u64) {
        Self::insert(self, PageRange::one(PageIndex::new(page)));
    }

    fn contains(&self, page: u64) -> bool {
        Self::contains(self, PageIndex::new(page))
    }

    fn take_changed(&self) -> Vec<u64> {
        Self::take_changed(self)
    }

    fn names(&self, block: u64, page: u64) -> bool {
        MapBlock::runs(&self.block(block)).iter().any(|run| run.contains(PageIndex::new(page)))
    }

    fn count(&self) -> u64 {
        Self::count(self).get()
    }
}

/// Says that a block changed before it has: a flush in between writes the old one, and forgets that there is a new one.
struct TouchesFirst(Presence);

impl Table for TouchesFirst {
    fn make() -> Self {
        Self(Presence::make())
    }

    fn insert(&self, page: u64) {
        let range = PageRange::one(PageIndex::new(page));
        self.0.touch(range);
        crate::sync::step();
        Presence::insert(&self.0, range);
        // What the real one does last is undone, as if it had only done so first.
        self.0.take_changed();
    }

    fn contains(&self, page: u64) -> bool {
        Table::contains(&self.0, page)
    }

    fn take_changed(&self) -> Vec<u64> {
        Table::take_changed(&self.0)
    }

    fn names(&self, block: u64, page: u64) -> bool {
        self.0.names(block, page)
    }

    fn count(&self) -> u64 {
        Table::count(&self.0)
    }
}

/// Two writers of the same and of other pages, and a flusher: what is in the table by the end is in the last version of its block, and is counted once.
fn no_page_is_forgotten<T: Table>() {
    const PAGES: [u64; 2] = [3, 70];
    let table = Arc::new(T::make());
    let written = Arc::new(shuttle::sync::Mutex::new(Vec::new()));
    let writers: Vec<_> = (0..2)
        .map(|_| {
            let table = table.clone();
            shuttle::thread::spawn(move || {
                for page in PAGES {
                    table.insert(page);
                    assert!(table.contains(page), "a writer does not find what it wrote");
                }
            })
        })
        .collect();
    let flush = |table: &T, written: &shuttle::sync::Mutex<Vec<u64>>| {
        for block in table.take_changed() {
            crate::sync::step();
            *written.lock().unwrap() = PAGES.into_iter().filter(|page| table.names(block, *page)).collect();
        }
    };
    let flusher = {
        let (table, written) = (table.clone(), written.clone());
        shuttle::thread::spawn(move || (0..2).for_each(|_| flush(&table, &written)))
    };
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    flusher.join().unwrap();
    flush(&table, &written);
    assert_eq!(*written.lock().unwrap(), PAGES, "a page is in the overlay, and no flush has said so");
    assert_eq!(table.count(), PAGES.len() as u64);
}

#[test]
fn shuttle_the_presence_map_forgets_no_page() {
    explore(SCHEDULES, no_page_is_forgotten::<Presence>);
}

#[test]
fn shuttle_a_map_that_touches_first_is_found_out() {
    let found = std::panic::catch_unwind(|| explore(SCHEDULES, no_page_is_forgotten::<TouchesFirst>));
    assert!(found.is_err(), "a table that forgets a page passed");
}

const PAGE: u64 = PageSize::KIB_4.bytes().get();

fn byte(disk: &Durable, page: u64) -> u8 {
    let mut found = [0];
    disk.read(ByteOffset::new(page * PAGE), &mut found).unwrap();
    found[0]
}

/// A disk of a few layers is flattened while a guest writes, discards, flushes, reads and forks.
fn a_guest_wins() {
    let recorder = Recorder::new();
    let dir = || DiskDir::over(recorder.folder(), &Tree::default());
    let geometry = Geometry::new(PageSize::KIB_4.size_of(PageCount::new(8)), PageSize::KIB_4).unwrap();
    let disk = Arc::new(dir().create(geometry, None).unwrap());
    for page in 0..3 {
        disk.write(ByteOffset::new(page * PAGE), &[page as u8 + 1; 4096]).unwrap();
        drop(disk.cut().unwrap().commit());
    }
    let guest = {
        let disk = disk.clone();
        shuttle::thread::spawn(move || {
            disk.write(ByteOffset::new(PAGE), &[0x11; 512]).unwrap();
            assert_eq!((byte(&disk, 0), byte(&disk, 1)), (1, 0x11));
            disk.zero(PageRange::one(PageIndex::new(2))).unwrap();
            assert_eq!(byte(&disk, 2), 0, "a copied page came up from below");
        })
    };
    let other = {
        let disk = disk.clone();
        shuttle::thread::spawn(move || {
            disk.write(ByteOffset::new(4 * PAGE), &[0x44; 4096]).unwrap();
            drop(disk.cut().unwrap().commit());
            disk.write(ByteOffset::new(5 * PAGE), &[0x55; 4096]).unwrap();
            disk.flush().unwrap();
            assert_eq!((byte(&disk, 0), byte(&disk, 4), byte(&disk, 5)), (1, 0x44, 0x55));
        })
    };
    disk.flatten(&Job::new()).unwrap();
    guest.join().unwrap();
    other.join().unwrap();
    let expected = [1, 0x11, 0, 0, 0x44, 0x55];
    assert_eq!(std::array::from_fn(|page| byte(&disk, page as u64)), expected);
    disk.validate().unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop(disk);
    let again = dir().open_disk(id, None).unwrap();
    assert_eq!(std::array::from_fn(|page| byte(&again, page as u64)), expected);
}

#[test]
fn shuttle_a_guest_wins_over_the_layers_that_are_merged_under_it() {
    explore(SCHEDULES / 10, a_guest_wins);
}
