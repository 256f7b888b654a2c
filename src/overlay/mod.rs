//! The copy-on-write core: one index that says where each page's bytes are, and the table of a clone's own pages.
//!
//! Resolution order, for every read of every face: the clone's own page if it has one ([`Live`]), else what the merged
//! [`Index`] names, else the base image below, else zeroes. A page in the index is *absent* (ask below), *data*, or
//! *zero* (hides what is below). The index of a fork point already holds everything its ancestors held, so a look-up
//! costs the same at depth 1 and at depth 1,000; relatives share its nodes.
//!
//! Who owns a private page: the VM whose `Live` table holds it, until the next cut, which hands it over to the
//! sealed image without copying it. From then on it is shared and nobody can write into it: images give out only
//! [`Index::get`], and a page is written only through the `Live` table that it was born in.
//!
//! Pure and portable: no system calls, no unsafe. It must not know what a page's bytes live in (`P`), nor anything of
//! guests, sectors or files.

mod diff;
mod index;
#[cfg(all(test, shuttle))]
mod interleavings;
mod live;

pub(crate) use index::{Index, PageState};
pub(crate) use live::Live;

use std::sync::Arc;

/// Where one page's bytes are: cheap to clone, and comparable by identity (not by content).
pub(crate) trait PageRef: Clone + Send + Sync + 'static {
    /// Whether both name the same bytes in the same place.
    fn same(&self, other: &Self) -> bool;
}

impl<T: Send + Sync + 'static> PageRef for Arc<T> {
    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self, other)
    }
}
