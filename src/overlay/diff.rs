//! Which pages two indexes say different things of.
//!
//! Relatives share subtrees, and a shared subtree is skipped whole, so the cost grows with what changed between them and
//! not with the space. Identity is compared, not content: a page written back to what it was differs.

use std::sync::Arc;

use super::index::{Index, LEAF_PAGES, LeafRef, MID_LEAVES, MID_PAGES, Mid, Slot};
use super::{PageRef, PageState};
use crate::page::{PageIndex, PageRange, PageSet};

impl<P: PageRef> Index<P> {
    /// The pages whose state differs between `self` and `other`, which must cover the same number of pages.
    pub(crate) fn diff(&self, other: &Self) -> PageSet {
        self.diff_in(other, PageRange::from_bounds(PageIndex::new(0), PageIndex::new(self.pages().get())))
    }

    /// Those of [`Index::diff`] that lie in `range`; costs by what differs there.
    pub(crate) fn diff_in(&self, other: &Self, range: PageRange) -> PageSet {
        debug_assert_eq!(self.pages(), other.pages(), "only indexes over one space are compared");
        let mut out = PageSet::new();
        if Arc::ptr_eq(&self.root, &other.root) {
            return out;
        }
        let last = range.end().get().min(self.pages().get());
        let mids = (range.start().get() / MID_PAGES) as usize..last.div_ceil(MID_PAGES) as usize;
        for m in mids {
            let start = m as u64 * MID_PAGES;
            let end = (start + MID_PAGES).min(self.pages().get());
            diff_mids(&self.root[m], &other.root[m], start, end, &mut out);
        }
        if range.start().get().is_multiple_of(MID_PAGES) && last.is_multiple_of(MID_PAGES) {
            return out;
        }
        let mut within = PageSet::new();
        out.runs().for_each(|run| within.push(run.intersect(range)));
        within
    }
}

fn push(out: &mut PageSet, start: u64, end: u64) {
    out.push(PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end)));
}

fn diff_mids<P: PageRef>(a: &Slot<P, Mid<P>>, b: &Slot<P, Mid<P>>, start: u64, end: u64, out: &mut PageSet) {
    match (a, b) {
        (Slot::Node(x), Slot::Node(y)) if Arc::ptr_eq(x, y) => {}
        (Slot::Uniform(x), Slot::Uniform(y)) => {
            if !as_ref(x).same(as_ref(y)) {
                push(out, start, end);
            }
        }
        _ => {
            for l in 0..MID_LEAVES {
                let from = start + (l * LEAF_PAGES) as u64;
                if from >= end {
                    break;
                }
                let to = (from + LEAF_PAGES as u64).min(end);
                diff_leaves(leaf_of(a, l), leaf_of(b, l), from, to, out);
            }
        }
    }
}

fn as_ref<P>(state: &PageState<P>) -> PageState<&P> {
    match state {
        PageState::Absent => PageState::Absent,
        PageState::Zero => PageState::Zero,
        PageState::Data(page) => PageState::Data(page),
    }
}

fn leaf_of<P: PageRef>(slot: &Slot<P, Mid<P>>, l: usize) -> LeafRef<'_, P> {
    match slot {
        Slot::Uniform(state) => LeafRef::Uniform(as_ref(state)),
        Slot::Node(mid) => mid.leaf(l),
    }
}

impl<'a, P: PageRef> LeafRef<'a, P> {
    /// Without taking a reference of its own: a diff looks at every page of a leaf in which one has changed.
    fn page(&self, page: u64) -> PageState<&'a P> {
        match *self {
            LeafRef::Uniform(state) => state,
            LeafRef::Node(leaf) => leaf.get(page as usize % LEAF_PAGES),
        }
    }
}

fn diff_leaves<P: PageRef>(a: LeafRef<'_, P>, b: LeafRef<'_, P>, start: u64, end: u64, out: &mut PageSet) {
    match (&a, &b) {
        (LeafRef::Node(x), LeafRef::Node(y)) if Arc::ptr_eq(x, y) => {}
        (LeafRef::Uniform(x), LeafRef::Uniform(y)) => {
            if !x.same(*y) {
                push(out, start, end);
            }
        }
        _ => {
            for page in start..end {
                if !a.page(page).same(b.page(page)) {
                    push(out, page, page + 1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;

    #[test]
    fn finds_what_changed_and_nothing_else() {
        let pages = 3 * MID_PAGES + 5;
        let range = |a, b| PageRange::from_bounds(PageIndex::new(a), PageIndex::new(b));
        let base: Index<Arc<u8>> = Index::uniform(PageCount::new(pages), &PageState::Absent);
        let mut changed = base.clone();
        assert!(base.diff(&changed).is_empty());
        for (a, b) in [(0, 1), (63, 65), (MID_PAGES - 1, MID_PAGES + 70), (pages - 1, pages)] {
            changed.set(range(a, b), &PageState::Zero);
        }
        let want: Vec<_> =
            [(0, 1), (63, 65), (MID_PAGES - 1, MID_PAGES + 70), (pages - 1, pages)].map(|(a, b)| range(a, b)).into();
        assert_eq!(base.diff(&changed).runs().collect::<Vec<_>>(), want);
        assert_eq!(changed.diff(&base).runs().collect::<Vec<_>>(), want);
        for (from, to) in
            [(0, 0), (0, 64), (64, 64), (64, MID_PAGES), (MID_PAGES - 1, MID_PAGES), (1, pages), (pages, pages)]
        {
            let within: Vec<_> =
                want.iter().map(|run| run.intersect(range(from, to))).filter(|r| !r.is_empty()).collect();
            assert_eq!(base.diff_in(&changed, range(from, to)).runs().collect::<Vec<_>>(), within, "{from}..{to}");
        }
        let mut back = changed.clone();
        back.set(range(63, 65), &PageState::Data(Arc::new(1)));
        assert_eq!(changed.diff(&back).runs().collect::<Vec<_>>(), [range(63, 65)]);
    }
}
