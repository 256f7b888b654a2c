//! Fork points on disk: saved whole (RAM, device state, disks) in a clone store, and brought back, in this process or another, on this machine or another.
//!
//! Owns what of a fork point is kept, and how one is put together again. Must not know how files are laid out or made durable: `store/` does that.

mod load;
mod save;

pub use load::Reading;

use crate::error::SpaceError;
use crate::page::{PageIndex, PageRange, PageSet, PageSize};
use crate::ram::LayoutError;
use crate::store::{CloneError, LayerId, SavedAccess, StoreTag};
use crate::vm::IdentityError;

/// What can go wrong with saving a fork point or bringing one back. The store is as it was before the call, or as after it where the error is that the
/// catalogue could not be written; there is no fork point.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedError {
    /// The store, its files, or its catalogue. Damage is named: the file, and the page.
    #[error(transparent)]
    Store(#[from] CloneError),
    /// RAM or a disk.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// What was saved is no layout of RAM here.
    #[error("the saved VM's RAM: {0}")]
    Layout(#[from] LayoutError),
    /// What was saved is no name of a VM here.
    #[error("the saved VM's name: {0}")]
    Identity(#[from] IdentityError),
}

impl From<crate::error::StoreError> for SavedError {
    fn from(error: crate::error::StoreError) -> Self {
        Self::Store(error.into())
    }
}

/// Where the content of a fork point lies in a store: what a later save of a descendant goes by.
#[derive(Debug)]
pub(super) struct SavedAs {
    store: StoreTag,
    ram: Option<LayerId>,
    disks: Vec<Option<LayerId>>,
}

impl From<crate::disk::Access> for SavedAccess {
    fn from(access: crate::disk::Access) -> Self {
        match access {
            crate::disk::Access::ReadWrite => Self::ReadWrite,
            crate::disk::Access::ReadOnly => Self::ReadOnly,
        }
    }
}

impl From<SavedAccess> for crate::disk::Access {
    fn from(access: SavedAccess) -> Self {
        match access {
            SavedAccess::ReadWrite => Self::ReadWrite,
            SavedAccess::ReadOnly => Self::ReadOnly,
        }
    }
}

/// Pages of one size as pages of 4 KiB.
fn small_pages(pages: &PageSet, size: PageSize) -> PageSet {
    let shift = size.shift() - PageSize::KIB_4.shift();
    let small = |page: PageIndex| PageIndex::new(page.get() << shift);
    let mut set = PageSet::new();
    pages.runs().for_each(|run| set.push(PageRange::from_bounds(small(run.start()), small(run.end()))));
    set
}
