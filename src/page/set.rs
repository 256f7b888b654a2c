//! A set of pages, kept as sorted runs: what `diff` and the scans of dirty pages answer with.
//!
//! Runs, not bits: a set over 64 GiB costs what it holds, not what it could hold.

use super::{PageCount, PageIndex, PageRange};

/// A set of pages. Its size in memory grows with its runs, not with the space.
///
/// ```
/// use offshoot::page::{PageIndex, PageRange, PageSet};
/// let mut set = PageSet::default();
/// set.push(PageRange::one(PageIndex::new(4)));
/// set.push(PageRange::one(PageIndex::new(5)));
/// assert_eq!(set.runs().count(), 1);
/// assert!(set.contains(PageIndex::new(5)) && !set.contains(PageIndex::new(6)));
/// ```
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct PageSet {
    runs: Vec<PageRange>,
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// Appends pages at the upper end; joins the run before where they touch. Empty ranges are dropped.
    ///
    /// # Panics
    /// If `range` starts before the end of what is there: callers walk spaces upwards.
    pub fn push(&mut self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        if let Some(last) = self.runs.last_mut() {
            assert!(last.end() <= range.start(), "{range:?} pushed after {last:?}");
            if last.end() == range.start() {
                *last = PageRange::from_bounds(last.start(), range.end());
                return;
            }
        }
        self.runs.push(range);
    }

    /// The runs in ascending order; no two touch.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = PageRange> + '_ {
        self.runs.iter().copied()
    }

    /// The pages in ascending order.
    pub fn pages(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.runs.iter().flat_map(|run| run.iter())
    }

    /// How many pages. O(runs).
    pub fn count(&self) -> PageCount {
        PageCount::new(self.runs.iter().map(|run| run.count().get()).sum())
    }

    /// Whether it holds no page.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether `page` is in it. O(log runs).
    pub fn contains(&self, page: PageIndex) -> bool {
        let after = self.runs.partition_point(|run| run.start() <= page);
        after > 0 && self.runs[after - 1].contains(page)
    }
}

impl FromIterator<PageIndex> for PageSet {
    /// Collects pages in ascending order.
    fn from_iter<I: IntoIterator<Item = PageIndex>>(pages: I) -> Self {
        let mut set = Self::new();
        pages.into_iter().for_each(|page| set.push(PageRange::one(page)));
        set
    }
}
