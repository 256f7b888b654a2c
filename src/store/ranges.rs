//! Pages that wait for their space to be given back: a set of ranges that grows and shrinks anywhere.

use std::collections::BTreeMap;

use crate::page::{PageIndex, PageRange};

/// A set of pages as ranges, start to end. No two touch.
#[derive(Clone, Default, Debug)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start().get(), range.end().get());
        // Those that touch it are joined with it.
        while let Some((&at, &to)) = self.0.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            self.0.remove(&at);
            (start, end) = (start.min(at), end.max(to));
        }
        self.0.insert(start, end);
    }

    pub(super) fn remove(&mut self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        let (start, end) = (range.start().get(), range.end().get());
        while let Some((&at, &to)) = self.0.range(..end).next_back().filter(|(_, to)| **to > start) {
            self.0.remove(&at);
            if to > end {
                self.0.insert(end, to);
            }
            if at < start {
                self.0.insert(at, start);
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.0.iter().map(|(start, end)| PageRange::from_bounds(PageIndex::new(*start), PageIndex::new(*end)))
    }

    /// Adds all of another set.
    pub(super) fn absorb(&mut self, other: Self) {
        other.iter().for_each(|range| self.insert(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dice;
    use std::collections::BTreeSet;

    #[test]
    fn agrees_with_a_set_of_pages() {
        let mut dice = Dice::new(1);
        for _ in 0..200 {
            let (mut ranges, mut pages) = (Ranges::default(), BTreeSet::new());
            for _ in 0..dice.below(30) {
                let start = dice.below(50);
                let end = start + dice.below(9);
                let range = PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
                if dice.below(3) == 0 {
                    ranges.remove(range);
                    pages.retain(|page| !(start..end).contains(page));
                } else {
                    ranges.insert(range);
                    pages.extend(start..end);
                }
                let found: Vec<_> = ranges.iter().collect();
                assert_eq!(found.iter().flat_map(|r| r.iter()).map(PageIndex::get).collect::<BTreeSet<_>>(), pages);
                assert!(found.windows(2).all(|pair| pair[0].end() < pair[1].start()), "joined where they touch");
            }
        }
    }
}
