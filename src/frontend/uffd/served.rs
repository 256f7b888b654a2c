//! Which pages of a region have had their bytes: a bit each, that is only ever set.
//!
//! Must not know why: because they were put there, or because the VMM has dropped them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::page::{PageCount, PageIndex, PageRange};

/// A bit for each page. Setting and asking go on at once; who must not act on an answer that has become old holds a lock that orders both.
#[derive(Debug)]
pub(super) struct ServedPages {
    words: Vec<AtomicU64>,
}

impl ServedPages {
    pub(super) fn none(pages: PageCount) -> Self {
        Self { words: (0..pages.get().div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(super) fn contains(&self, page: PageIndex) -> bool {
        // Relaxed: the lock of the caller's orders it.
        self.words[(page.get() / 64) as usize].load(Ordering::Relaxed) >> (page.get() % 64) & 1 == 1
    }

    /// Sets them; says how many were not.
    pub(super) fn insert(&self, pages: PageRange) -> PageCount {
        let (mut at, end, mut new) = (pages.start().get(), pages.end().get(), 0);
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            let old = self.words[(at / 64) as usize].fetch_or(mask, Ordering::Relaxed);
            new += u64::from((mask & !old).count_ones());
            at += count;
        }
        PageCount::new(new)
    }

    /// The run of pages around `page`, within `bounds`, that are not set. Empty where `page` is.
    pub(super) fn fresh_around(&self, page: PageIndex, bounds: PageRange) -> PageRange {
        let fresh = |at: &u64| !self.contains(PageIndex::new(*at));
        let (page, low, high) = (page.get(), bounds.start().get(), bounds.end().get());
        let end = (page..high).take_while(fresh).last().map_or(page, |last| last + 1);
        let start = if end == page { page } else { (low..page).rev().take_while(fresh).last().unwrap_or(page) };
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    #[test]
    fn bits_are_those_of_the_range_and_no_others() {
        for (start, end) in [(0, 0), (0, 1), (63, 65), (5, 200), (64, 128), (0, 200)] {
            let served = ServedPages::none(PageCount::new(200));
            assert_eq!(served.insert(range(start, end)).get(), end - start);
            assert_eq!(served.insert(range(start, end)).get(), 0);
            assert!((0..200).all(|page| served.contains(PageIndex::new(page)) == (start..end).contains(&page)));
        }
    }

    #[test]
    fn a_run_ends_at_what_is_set_and_at_the_bounds() {
        let served = ServedPages::none(PageCount::new(200));
        served.insert(range(70, 71));
        served.insert(range(60, 61));
        assert_eq!(served.fresh_around(PageIndex::new(65), range(0, 200)), range(61, 70));
        assert_eq!(served.fresh_around(PageIndex::new(65), range(64, 68)), range(64, 68));
        assert_eq!(served.fresh_around(PageIndex::new(199), range(100, 200)), range(100, 200));
        assert!(served.fresh_around(PageIndex::new(70), range(0, 200)).is_empty());
    }
}
