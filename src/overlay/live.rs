//! The table of a clone's own pages since its last cut: written by any number of threads, read by any number more.
//!
//! Each slot is set once and then stays until somebody with exclusive access takes it, so readers need no lock and
//! a racing first write has one winner; the loser gets its page back and writes into the winner's. Tables are made
//! where first needed: an idle clone has none. A presence bitmap comes before the slots: most reads of a clone are of pages that
//! it does not own, and learn so from a few cached bytes. Exclusive operations (`&mut self`) are for the owner's cut, reset and discard.
//!
//! Must not know what a page is, nor the index below it: [`Live::install`] is told what to put there.

use std::sync::atomic::{AtomicU64, Ordering};

use super::index::{LEAF_PAGES, LEAF_SHIFT, MID_LEAVES, MID_PAGES, MID_SHIFT};
use crate::page::{PageCount, PageIndex, PageRange};
use crate::sync::OnceLock;

struct LiveLeaf<P> {
    pages: [OnceLock<P>; LEAF_PAGES],
}

struct LiveMid<P> {
    /// A word for each leaf, bit `i` for its page `i`. Set after the slot was set, and before the writer who came upon it goes on: whoever wrote
    /// a page finds it.
    present: [AtomicU64; MID_LEAVES],
    leaves: [OnceLock<Box<LiveLeaf<P>>>; MID_LEAVES],
}

impl<P> LiveMid<P> {
    fn new() -> Self {
        Self { present: [const { AtomicU64::new(0) }; MID_LEAVES], leaves: [const { OnceLock::new() }; MID_LEAVES] }
    }
}

type Mids<P> = Box<[OnceLock<Box<LiveMid<P>>>]>;

/// A clone's own pages. Empty tables cost nothing.
pub(crate) struct Live<P> {
    mids: OnceLock<Mids<P>>,
    space: PageCount,
    count: AtomicU64,
    table_bytes: AtomicU64,
}

impl<P> Live<P> {
    /// No pages yet. Allocates nothing.
    pub(crate) fn new(space: PageCount) -> Self {
        Self { mids: OnceLock::new(), space, count: AtomicU64::new(0), table_bytes: AtomicU64::new(0) }
    }

    /// How many pages are in it. O(1).
    pub(crate) fn count(&self) -> PageCount {
        PageCount::new(self.count.load(Ordering::Relaxed))
    }

    /// Bytes of its tables. O(1).
    pub(crate) fn table_bytes(&self) -> u64 {
        self.table_bytes.load(Ordering::Relaxed)
    }

    /// The page, if this clone has its own.
    #[inline(always)]
    pub(crate) fn get(&self, page: PageIndex) -> Option<&P> {
        let page = page.get();
        let mid = self.mids.get()?.get((page >> (LEAF_SHIFT + MID_SHIFT)) as usize)?.get()?;
        let at = (page >> LEAF_SHIFT) as usize % MID_LEAVES;
        // Relaxed: the slot itself is acquired below, and a bit that is not seen yet is a write that has not returned yet.
        if mid.present[at].load(Ordering::Relaxed) >> (page as usize % LEAF_PAGES) & 1 == 0 {
            return None;
        }
        mid.leaves[at].get()?.pages[page as usize % LEAF_PAGES].get()
    }

    /// Puts `new` in the slot of `page` unless another thread did so first: `Ok` is the page put there, `Err` the
    /// winner's, and `new` is dropped. `page` must lie inside the space.
    pub(crate) fn install(&self, page: PageIndex, new: P) -> Result<&P, &P> {
        let page = page.get();
        let made = |bytes: usize| self.table_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let mids = self.mids.get_or_init(|| {
            let mids = self.space.get().div_ceil(MID_PAGES) as usize;
            made(mids * size_of::<OnceLock<Box<LiveMid<P>>>>());
            (0..mids).map(|_| OnceLock::new()).collect()
        });
        let mid = mids[(page >> (LEAF_SHIFT + MID_SHIFT)) as usize].get_or_init(|| {
            made(size_of::<LiveMid<P>>());
            Box::new(LiveMid::new())
        });
        let (at, within) = ((page >> LEAF_SHIFT) as usize % MID_LEAVES, page as usize % LEAF_PAGES);
        let leaf = mid.leaves[at].get_or_init(|| {
            made(size_of::<LiveLeaf<P>>());
            Box::new(LiveLeaf { pages: [const { OnceLock::new() }; LEAF_PAGES] })
        });
        let slot = &leaf.pages[within];
        let won = slot.set(new).is_ok();
        let there = slot.get().expect("a slot that was set stays set while it is shared");
        // The loser too: the winner may not have come here yet, and the loser's next read must find what it wrote.
        mid.present[at].fetch_or(1 << within, Ordering::Release);
        if won {
            self.count.fetch_add(1, Ordering::Relaxed);
            Ok(there)
        } else {
            Err(there)
        }
    }

    /// Drops the pages of `range`; costs by the tables that exist there.
    pub(crate) fn remove(&mut self, range: PageRange) {
        let mut removed = 0;
        if let Some(mids) = self.mids.get_mut() {
            for (m, mid) in mids.iter_mut().enumerate() {
                let start = m as u64 * MID_PAGES;
                if start >= range.end().get() || start + MID_PAGES <= range.start().get() {
                    continue;
                }
                let Some(mid) = mid.get_mut() else { continue };
                for (l, (leaf, present)) in mid.leaves.iter_mut().zip(&mut mid.present).enumerate() {
                    let start = start + (l * LEAF_PAGES) as u64;
                    let Some(leaf) = leaf.get_mut() else { continue };
                    for (p, slot) in leaf.pages.iter_mut().enumerate() {
                        if range.contains(PageIndex::new(start + p as u64)) && slot.take().is_some() {
                            *present.get_mut() &= !(1 << p);
                            removed += 1;
                        }
                    }
                }
            }
        }
        *self.count.get_mut() -= removed;
    }

    /// The pages in it, ascending; costs by the tables that exist.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageIndex, &P)> + '_ {
        let mids = self.mids.get().into_iter().flat_map(|mids| mids.iter().enumerate());
        mids.filter_map(|(m, mid)| Some((m, mid.get()?)))
            .flat_map(|(m, mid)| mid.leaves.iter().enumerate().filter_map(move |(l, leaf)| Some((m, l, leaf.get()?))))
            .flat_map(|(m, l, leaf)| {
                let start = m as u64 * MID_PAGES + (l * LEAF_PAGES) as u64;
                let pages = leaf.pages.iter().enumerate();
                pages.filter_map(move |(p, slot)| Some((PageIndex::new(start + p as u64), slot.get()?)))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_winner_a_slot_and_an_exact_count() {
        let mut live = Live::new(PageCount::new(2 * MID_PAGES + 1));
        assert_eq!(live.table_bytes(), 0);
        for page in [0, 63, 64, MID_PAGES, 2 * MID_PAGES] {
            assert_eq!(live.install(PageIndex::new(page), page), Ok(&page));
            assert_eq!(live.install(PageIndex::new(page), 99), Err(&page));
        }
        assert_eq!(live.count().get(), 5);
        assert_eq!(live.iter().map(|(page, _)| page.get()).collect::<Vec<_>>(), [0, 63, 64, MID_PAGES, 2 * MID_PAGES]);
        live.remove(PageRange::from_bounds(PageIndex::new(63), PageIndex::new(MID_PAGES + 1)));
        assert_eq!(live.count().get(), 2);
        assert_eq!(live.get(PageIndex::new(64)), None);
        assert_eq!(live.get(PageIndex::new(2 * MID_PAGES)), Some(&(2 * MID_PAGES)));
    }
}
