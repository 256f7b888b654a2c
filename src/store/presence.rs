//! Which pages a live overlay holds, in memory: a bit a page, in blocks made where something was written, read without a lock.
//!
//! A bit is set after the page's bytes are in the file, and cleared only by those who hold the space alone. Beside the bits it
//! remembers which blocks of the map changed since they were last written, so that a flush costs by what changed. Must not know the file.

use std::sync::atomic::{AtomicU64, Ordering};

use super::map::{BLOCK_PAGES, WORDS};
use crate::page::{PageCount, PageIndex, PageRange};
use crate::sync::{OnceLock, step};

type Words = Box<[AtomicU64; WORDS]>;

/// The table. Costs nothing until something is written, then 16 bytes for each 60 MiB of the disk and 1,920 for each that is touched.
#[derive(Default)]
pub(super) struct Presence {
    blocks: OnceLock<Box<[OnceLock<Words>]>>,
    changed: OnceLock<Box<[AtomicU64]>>,
    count: AtomicU64,
    table_bytes: AtomicU64,
    space: PageCount,
}

impl Presence {
    pub(super) fn new(space: PageCount) -> Self {
        Self { space, ..Self::default() }
    }

    fn block_count(&self) -> usize {
        self.space.get().div_ceil(BLOCK_PAGES) as usize
    }

    /// How many pages are held.
    pub(super) fn count(&self) -> PageCount {
        PageCount::new(self.count.load(Ordering::Relaxed))
    }

    pub(super) fn table_bytes(&self) -> u64 {
        self.table_bytes.load(Ordering::Relaxed)
    }

    /// Whether the overlay holds this page.
    #[inline]
    pub(super) fn contains(&self, page: PageIndex) -> bool {
        let (block, at) = (page.get() / BLOCK_PAGES, (page.get() % BLOCK_PAGES) as usize);
        let words = self.blocks.get().and_then(|blocks| blocks.get(block as usize)?.get());
        // Acquire: who sees the bit sees the page's bytes in the file.
        words.is_some_and(|words| words[at / 64].load(Ordering::Acquire) >> (at % 64) & 1 == 1)
    }

    fn words(&self, block: u64) -> &Words {
        let blocks = self.blocks.get_or_init(|| {
            self.table_bytes.fetch_add((self.block_count() * size_of::<OnceLock<Words>>()) as u64, Ordering::Relaxed);
            (0..self.block_count()).map(|_| OnceLock::new()).collect()
        });
        blocks[block as usize].get_or_init(|| {
            self.table_bytes.fetch_add((WORDS * 8) as u64, Ordering::Relaxed);
            Box::new([const { AtomicU64::new(0) }; WORDS])
        })
    }

    /// Adds pages, which must lie inside the space. Their bytes are in the file.
    pub(super) fn insert(&self, range: PageRange) {
        for page in range.iter() {
            let at = (page.get() % BLOCK_PAGES) as usize;
            let bit = 1 << (at % 64);
            let old = self.words(page.get() / BLOCK_PAGES)[at / 64].fetch_or(bit, Ordering::Release);
            step();
            if old & bit == 0 {
                self.count.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.touch(range);
    }

    /// Those groups of 64 pages that `range` touches and of which all are held: one word each.
    pub(super) fn full_groups(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let (first, end) = (range.start().get() / 64, range.end().get().div_ceil(64));
        let words_a_block = WORDS as u64;
        (first..end).filter_map(move |group| {
            let words = self.blocks.get()?.get((group / words_a_block) as usize)?.get()?;
            let full = words[(group % words_a_block) as usize].load(Ordering::Relaxed) == u64::MAX;
            full.then(|| PageRange::from_bounds(PageIndex::new(group * 64), PageIndex::new((group + 1) * 64)))
        })
    }

    /// Takes pages out; returns the runs of those that were there. Costs by the blocks that exist.
    pub(super) fn remove(&mut self, range: PageRange) -> Vec<PageRange> {
        let mut removed: Vec<PageRange> = Vec::new();
        let Some(blocks) = self.blocks.get_mut() else { return removed };
        for (block, words) in blocks.iter_mut().enumerate() {
            let Some(words) = words.get_mut() else { continue };
            let start = block as u64 * BLOCK_PAGES;
            let here =
                PageRange::from_bounds(PageIndex::new(start), PageIndex::new(start + BLOCK_PAGES)).intersect(range);
            for page in here.iter() {
                let at = (page.get() - start) as usize;
                let word = words[at / 64].get_mut();
                if *word >> (at % 64) & 1 == 1 {
                    *word &= !(1 << (at % 64));
                    *self.count.get_mut() -= 1;
                    match removed.last_mut() {
                        Some(last) if last.end() == page => {
                            *last = PageRange::from_bounds(last.start(), PageIndex::new(page.get() + 1));
                        }
                        _ => removed.push(PageRange::one(page)),
                    }
                }
            }
        }
        removed.iter().for_each(|run| self.touch(*run));
        removed
    }

    /// The bits of one block.
    pub(super) fn block(&self, block: u64) -> [u64; WORDS] {
        let words = self.blocks.get().and_then(|blocks| blocks.get(block as usize)?.get());
        let load = |at: usize| words.map_or(0, |words: &Words| words[at].load(Ordering::Acquire));
        std::array::from_fn(load)
    }

    /// The blocks that hold a page.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        let blocks = self.blocks.get().map_or(&[][..], |blocks| blocks);
        blocks.iter().enumerate().filter(|(_, words)| words.get().is_some()).map(|(block, _)| block as u64)
    }

    /// Remembers that the map of these pages must be written.
    pub(super) fn touch(&self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        let words = self.block_count().div_ceil(64);
        let changed = self.changed.get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        for block in range.start().get() / BLOCK_PAGES..=(range.end().get() - 1) / BLOCK_PAGES {
            changed[block as usize / 64].fetch_or(1 << (block % 64), Ordering::Release);
        }
    }

    /// The blocks touched since the last call, which are forgotten by it.
    pub(super) fn take_changed(&self) -> Vec<u64> {
        let mut blocks = Vec::new();
        for (at, word) in self.changed.get().map_or(&[][..], |changed| changed).iter().enumerate() {
            // Looked at before it is taken: most words are zero, and a load does not claim the cache line.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            step();
            while bits != 0 {
                blocks.push((at * 64) as u64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
        blocks
    }

    /// Gives blocks back that could not be written.
    pub(super) fn put_back(&self, blocks: &[u64]) {
        for block in blocks {
            self.touch(PageRange::one(PageIndex::new(block * BLOCK_PAGES)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_groups_are_those_of_which_every_page_is_held() {
        let range = |start, end| PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
        let mut presence = Presence::new(PageCount::new(BLOCK_PAGES + 100));
        let full = |presence: &Presence, range| presence.full_groups(range).collect::<Vec<_>>();
        let all = range(0, BLOCK_PAGES + 100);
        assert!(full(&presence, all).is_empty());
        presence.insert(range(1, 128));
        assert_eq!(full(&presence, all), [range(64, 128)]);
        presence.insert(range(0, 1));
        assert_eq!(full(&presence, range(0, 1)), [range(0, 64)]);
        // Across two blocks of the map; the last group of the space is cut short, and never full.
        presence.insert(range(BLOCK_PAGES - 64, BLOCK_PAGES + 100));
        let last = [range(BLOCK_PAGES - 64, BLOCK_PAGES), range(BLOCK_PAGES, BLOCK_PAGES + 64)];
        assert_eq!(full(&presence, range(BLOCK_PAGES - 1, BLOCK_PAGES + 100)), last);
        presence.remove(range(70, 71));
        assert_eq!(full(&presence, range(0, 128)), [range(0, 64)]);
    }
}
