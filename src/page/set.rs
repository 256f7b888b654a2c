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

    /// How many of its pages lie in `range`. O(log runs), plus the runs in `range`.
    pub fn count_in(&self, range: PageRange) -> PageCount {
        let first = self.runs.partition_point(|run| run.end() <= range.start());
        let meeting = self.runs[first..].iter().take_while(|run| run.start() < range.end());
        PageCount::new(meeting.map(|run| run.intersect(range).count().get()).sum())
    }

    /// The pages in either set. O(runs of both).
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.runs().peekable(), other.runs().peekable());
        let mut out = Self::new();
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start() <= y.start() => a.next(),
                (_, Some(_)) => b.next(),
                (_, None) => a.next(),
            };
            let Some(next) = next else { return out };
            let covered = out.runs.last().map_or(PageIndex::ZERO, |last| last.end());
            out.push(PageRange::from_bounds(next.start().max(covered), next.end()));
        }
    }

    /// The pages that are in this set and not in the other. O(runs of both).
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut cuts = other.runs().peekable();
        for run in self.runs() {
            let mut at = run.start();
            while cuts.next_if(|cut| cut.end() <= at).is_some() {}
            // A cut that reaches past this run may touch the next one too: it is looked at, not taken.
            while let Some(cut) = cuts.peek().filter(|cut| cut.start() < run.end()) {
                out.push(PageRange::from_bounds(at, cut.start()));
                at = cut.end();
                if at >= run.end() {
                    break;
                }
                cuts.next();
            }
            out.push(PageRange::from_bounds(at, run.end()));
        }
        out
    }

    /// The pages in both sets. O(runs of both).
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.difference(&self.difference(other))
    }

    /// The pages of the set that lie in `range`. O(log runs), plus the runs found.
    #[must_use]
    pub fn within(&self, range: PageRange) -> Self {
        let first = self.runs.partition_point(|run| run.end() <= range.start());
        let meeting = self.runs[first..].iter().take_while(|run| run.start() < range.end());
        let mut out = Self::new();
        meeting.for_each(|run| out.push(run.intersect(range)));
        out
    }

    /// The set with every gap of at most `pages` between two of its runs filled in.
    #[must_use]
    pub fn closing_gaps(&self, pages: PageCount) -> Self {
        let mut out = Self::new();
        for run in self.runs() {
            match out.runs.last_mut() {
                Some(last) if run.start().get() - last.end().get() <= pages.get() => {
                    *last = PageRange::from_bounds(last.start(), run.end());
                }
                _ => out.runs.push(run),
            }
        }
        out
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

impl From<PageRange> for PageSet {
    /// The pages of one range.
    fn from(range: PageRange) -> Self {
        let mut set = Self::new();
        set.push(range);
        set
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        pages.iter().copied().map(PageIndex::new).collect()
    }

    #[test]
    fn agrees_with_a_tree_of_numbers() {
        let mut seed = 1u64;
        for _ in 0..300 {
            let mut random = || {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (seed >> 33) % 60
            };
            let a: BTreeSet<u64> = (0..random()).map(|_| random()).collect();
            let b: BTreeSet<u64> = (0..random()).map(|_| random()).collect();
            let both: BTreeSet<u64> = a.union(&b).copied().collect();
            assert_eq!(set(&a).union(&set(&b)), set(&both));
            let only: BTreeSet<u64> = a.difference(&b).copied().collect();
            assert_eq!(set(&a).difference(&set(&b)), set(&only));
            let in_both: BTreeSet<u64> = a.intersection(&b).copied().collect();
            assert_eq!(set(&a).intersection(&set(&b)), set(&in_both));
            let (from, to) = (random(), random());
            let range = PageRange::from_bounds(PageIndex::new(from), PageIndex::new(to));
            let inside = a.iter().filter(|page| range.contains(PageIndex::new(**page))).count() as u64;
            assert_eq!(set(&a).count_in(range).get(), inside);
            let within: BTreeSet<u64> =
                a.iter().copied().filter(|page| range.contains(PageIndex::new(*page))).collect();
            assert_eq!(set(&a).within(range), set(&within));
            let closed = set(&a).closing_gaps(PageCount::new(3));
            let gaps: Vec<_> = closed.runs().collect();
            assert!(gaps.windows(2).all(|pair| pair[1].start().get() - pair[0].end().get() > 3));
            assert!(a.iter().all(|page| closed.contains(PageIndex::new(*page))));
            assert!(closed.count().get() <= a.len() as u64 * 4);
        }
    }
}
