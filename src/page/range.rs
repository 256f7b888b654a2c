//! A run of consecutive pages within one space.
//!
//! Knows nothing of a space's end: [`Geometry`](super::Geometry) checks ranges against it.

use std::fmt;

use super::{PageCount, PageIndex};

/// Consecutive pages: a first page and a count. May be empty. Never wraps: its end is always representable.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// `count` pages from `start`, or `None` where the end would not be representable.
    #[inline]
    pub const fn new(start: PageIndex, count: PageCount) -> Option<Self> {
        match start.checked_add(count) {
            Some(end) => Some(Self { start: start.get(), end: end.get() }),
            None => None,
        }
    }

    /// The pages from `start` up to and without `end`; empty if `end` comes first.
    #[inline]
    pub const fn from_bounds(start: PageIndex, end: PageIndex) -> Self {
        let end = if end.get() < start.get() { start.get() } else { end.get() };
        Self { start: start.get(), end }
    }

    /// Exactly one page.
    ///
    /// # Panics
    /// If `page` is the largest representable index, which no space holds.
    #[inline]
    pub const fn one(page: PageIndex) -> Self {
        assert!(page.get() != u64::MAX, "no space holds page u64::MAX");
        Self { start: page.get(), end: page.get() + 1 }
    }

    /// The first page.
    #[inline]
    pub const fn start(self) -> PageIndex {
        PageIndex::new(self.start)
    }

    /// The page after the last.
    #[inline]
    pub const fn end(self) -> PageIndex {
        PageIndex::new(self.end)
    }

    /// How many pages.
    #[inline]
    pub const fn count(self) -> PageCount {
        PageCount::new(self.end - self.start)
    }

    /// Whether there is no page in it.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `page` lies in it.
    #[inline]
    pub const fn contains(self, page: PageIndex) -> bool {
        self.start <= page.get() && page.get() < self.end
    }

    /// The pages in both; empty where they do not meet.
    pub const fn intersect(self, other: Self) -> Self {
        let start = if self.start > other.start { self.start } else { other.start };
        let end = if self.end < other.end { self.end } else { other.end };
        Self::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    /// The pages in ascending order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        (self.start..self.end).map(PageIndex::new)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    #[test]
    fn a_range_never_wraps() {
        assert_eq!(PageRange::new(PageIndex::new(u64::MAX), PageCount::new(1)), None);
        assert_eq!(PageRange::new(PageIndex::new(3), PageCount::new(2)), Some(range(3, 5)));
        assert!(range(5, 3).is_empty());
    }

    #[test]
    fn ranges_that_do_not_meet_share_nothing() {
        assert_eq!(range(0, 4).intersect(range(2, 9)), range(2, 4));
        assert!(range(0, 2).intersect(range(2, 4)).is_empty());
        assert_eq!(range(2, 5).iter().map(PageIndex::get).collect::<Vec<_>>(), [2, 3, 4]);
    }
}
