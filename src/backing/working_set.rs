//! Which pages a VM touched, and having those mapped before the next clone touches them.
//!
//! A clone is born with empty page tables, so it pays a page fault for the first touch of each page: its *fault debt*. Most clones of one
//! fork point touch the same pages first. Owns the set and the order; how a backing maps ahead is its own business.

use std::sync::Arc;

use crate::page::{PageCount, PageSet};

/// Pages of RAM that a VM touched: of those that it wrote, all; of those that it only read, as many as its backing can tell.
///
/// ```
/// use offshoot::{WorkingSet, page::*};
/// let pages = |from, to| PageSet::from(PageRange::from_bounds(PageIndex::new(from), PageIndex::new(to)));
/// let one = WorkingSet::new(pages(0, 10), pages(4, 6));
/// let other = WorkingSet::new(pages(20, 30), pages(8, 9));
/// let both = one.merge(&other);
/// assert_eq!((both.written().count().get(), both.read().count().get()), (3, 17));
/// ```
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct WorkingSet {
    read: PageSet,
    written: PageSet,
}

impl WorkingSet {
    /// A set of pages read and pages written. A page in both counts as written.
    pub fn new(read: PageSet, written: PageSet) -> Self {
        Self { read: read.difference(&written), written }
    }

    /// Pages that were read and not written.
    pub fn read(&self) -> &PageSet {
        &self.read
    }

    /// Pages that were written.
    pub fn written(&self) -> &PageSet {
        &self.written
    }

    /// How many pages. O(runs).
    pub fn count(&self) -> PageCount {
        self.read.count().saturating_add(self.written.count())
    }

    /// What either touched; written if either wrote it. O(runs of both).
    #[must_use]
    pub fn merge(&self, other: &Self) -> Self {
        Self::new(self.read.union(&other.read), self.written.union(&other.written))
    }

    /// The same pages as if they had only been read: prefaulting them makes no private copies.
    #[must_use]
    pub fn as_read(&self) -> Self {
        Self { read: self.read.union(&self.written), written: PageSet::new() }
    }
}

/// Pages to map ahead in a new clone's RAM, before anybody can run it. Off unless [`CloneSpec::prefault`](crate::CloneSpec) has one.
///
/// Done by the spawn itself, which takes as much longer: see the figures `prefault`. Pages that were written come first, as
/// private copies; then those read, as page-table entries of shared pages; each in ascending order, in extents of at most 4 MiB. Content
/// never changes.
///
/// A page that is prefaulted for writing is private from then on, and nobody can tell it from one written with the bytes it had.
/// So it counts as written: in [`Vm::dirty`](crate::Vm::dirty) and [`Vm::usage`](crate::Vm::usage); the next fork copies it; a reset drops it,
/// and what is touched after a reset faults again. [`WorkingSet::as_read`] avoids all that and saves less.
///
/// Only the mapped backing faults; the heap has nothing to map ahead, and does nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prefault {
    /// Which pages.
    pub set: Arc<WorkingSet>,
    /// The most pages. What is over it is left out, and [`Prefaulted::left_out`] says how many.
    pub limit: PageCount,
}

impl Prefault {
    /// 256 MiB in pages of 4 KiB.
    pub const DEFAULT_LIMIT: PageCount = PageCount::new(1 << 16);

    /// These pages, up to the default limit.
    pub fn new(set: impl Into<Arc<WorkingSet>>) -> Self {
        Self { set: set.into(), limit: Self::DEFAULT_LIMIT }
    }

    /// How many private copies it makes.
    pub(crate) fn copies(&self) -> PageCount {
        self.set.written.count().min(self.limit)
    }
}

/// What became of a [`Prefault`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Prefaulted {
    /// Pages made private.
    pub written: PageCount,
    /// Shared pages mapped.
    pub read: PageCount,
    /// Pages left to fault: over the limit, or all of them where the backing or the kernel (before Linux 5.14) cannot map ahead.
    pub left_out: PageCount,
}
