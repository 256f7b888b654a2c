//! The live table under every order of steps that shuttle thinks of: `RUSTFLAGS="--cfg shuttle" cargo test --lib shuttle`.
//!
//! The check is written over a trait, so that tables which are wrong can be shown to fail it.

use std::sync::Arc;

use super::Live;
use super::index::{LEAF_PAGES, MID_PAGES};
use crate::page::{PageCount, PageIndex};
use crate::sync::interleavings::explore;

const SCHEDULES: usize = 5_000;

/// A table of slots that are each set once.
trait Table: Send + Sync + 'static {
    fn make() -> Self;
    /// The value there afterwards, and whether this call put it there.
    fn install(&self, page: u64, value: u64) -> (u64, bool);
    fn get(&self, page: u64) -> Option<u64>;
    fn count(&self) -> u64;
}

impl Table for Live<u64> {
    fn make() -> Self {
        Live::new(PageCount::new(2 * MID_PAGES))
    }

    fn install(&self, page: u64, value: u64) -> (u64, bool) {
        match Live::install(self, PageIndex::new(page), value) {
            Ok(own) => (*own, true),
            Err(theirs) => (*theirs, false),
        }
    }

    fn get(&self, page: u64) -> Option<u64> {
        Live::get(self, PageIndex::new(page)).copied()
    }

    fn count(&self) -> u64 {
        Live::count(self).get()
    }
}

/// Looks first and sets later: two first writes both win, and the first one's value is lost.
struct LooksFirst(shuttle::sync::Mutex<std::collections::BTreeMap<u64, u64>>);

impl Table for LooksFirst {
    fn make() -> Self {
        Self(shuttle::sync::Mutex::default())
    }

    fn install(&self, page: u64, value: u64) -> (u64, bool) {
        if let Some(there) = self.get(page) {
            return (there, false);
        }
        self.0.lock().unwrap().insert(page, value);
        (value, true)
    }

    fn get(&self, page: u64) -> Option<u64> {
        self.0.lock().unwrap().get(&page).copied()
    }

    fn count(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }
}

/// Two threads install into the same slots of new tables while a third reads them.
fn first_writes_race<T: Table>() {
    // In one leaf, in another leaf, and under another middle table: every level is made by whoever comes first.
    const PAGES: [u64; 3] = [0, LEAF_PAGES as u64, MID_PAGES];
    let table = Arc::new(T::make());
    let writers: Vec<_> = [1, 2]
        .into_iter()
        .map(|writer| {
            let table = table.clone();
            shuttle::thread::spawn(move || PAGES.map(|page| table.install(page, writer * 100 + page)))
        })
        .collect();
    let reader = {
        let table = table.clone();
        shuttle::thread::spawn(move || {
            for page in PAGES {
                if let Some(first) = table.get(page) {
                    assert_eq!(table.get(page), Some(first), "a slot that was seen set stays as it is");
                }
            }
        })
    };
    let results: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    reader.join().unwrap();
    for (at, page) in PAGES.into_iter().enumerate() {
        let there = table.get(page).expect("it was installed");
        let winners = results.iter().filter(|result| result[at].1).count();
        assert_eq!(winners, 1, "one winner for page {page}");
        assert!(results.iter().all(|result| result[at].0 == there), "all saw the winner's value in page {page}");
    }
    assert_eq!(table.count(), PAGES.len() as u64);
}

#[test]
fn shuttle_one_winner_for_each_slot() {
    explore(SCHEDULES, first_writes_race::<Live<u64>>);
}

#[test]
fn shuttle_a_table_that_looks_first_is_found_out() {
    let found = std::panic::catch_unwind(|| explore(SCHEDULES, first_writes_race::<LooksFirst>));
    assert!(found.is_err(), "a table that loses the winner passed");
}
