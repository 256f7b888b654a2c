//! What can go wrong with a clone store. Must not know how anything is kept.

use super::record::{CloneName, Kind};
use crate::error::{SpaceError, StoreError};
use crate::page::ByteSize;
use crate::store::LayerId;

/// What can go wrong with a clone store. After an error everything is as it was, unless the error says otherwise.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloneError {
    /// A file of the store, or a limit.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The catalogue could not be read or written. Where this is the answer to a change, the change may have been made, whole, or not at all.
    #[error("the catalogue: {what}: open the store again, it is then as it was before this call or after it")]
    Catalogue {
        /// What happened.
        what: String,
    },
    /// A newer version wrote the catalogue.
    #[error(
        "the catalogue has version {version}, features {features:#x}, which this version does not know: use a newer one"
    )]
    UnknownCatalogue {
        /// Its version.
        version: u32,
        /// The feature bits that are not known.
        features: u64,
    },
    /// There are disks in the directory and no catalogue.
    #[error("the directory holds `{file}` and no catalogue: restore the catalogue, or use an empty directory")]
    NoCatalogue {
        /// One of the files.
        file: String,
    },
    /// What cannot be a name.
    #[error("a name must have 1 to {limit} bytes and no control characters")]
    Name {
        /// [`CloneName::LIMIT`].
        limit: usize,
    },
    /// The name is taken.
    #[error("`{name}` exists already: pick another name")]
    Exists {
        /// The name.
        name: CloneName,
    },
    /// Nothing has this name.
    #[error("there is no `{name}` in the store")]
    Unknown {
        /// The name.
        name: CloneName,
    },
    /// It is open, in this process or another.
    #[error("`{name}` is open: close it first, or use the call for open disks")]
    Open {
        /// The name.
        name: CloneName,
    },
    /// Not what this can be done to.
    #[error("`{name}` is {kind}, which cannot be {what}: clone it and use the clone")]
    WrongKind {
        /// The name.
        name: CloneName,
        /// What it is.
        kind: Kind,
        /// What was asked for.
        what: &'static str,
    },
    /// Layers that it lies on are not there. It can be listed and deleted.
    #[error("`{name}` is degraded: layers {missing:?} are missing: restore their files, or delete it")]
    Degraded {
        /// The name.
        name: CloneName,
        /// The layers.
        missing: Vec<LayerId>,
    },
    /// A commit into a clone that was written since.
    #[error("`{target}` has changed since `{name}` was cloned from it: rebase `{name}` first")]
    Diverged {
        /// What was to be committed.
        name: CloneName,
        /// Where to.
        target: CloneName,
    },
    /// A disk may only get longer, and lies on images that are no longer than it is.
    #[error("{found} where at least {least} is needed: disks do not shrink, that would let old data come back")]
    Length {
        /// What was asked for.
        found: ByteSize,
        /// What is allowed.
        least: ByteSize,
    },
    /// A disk or image of another directory.
    #[error("the disk does not lie in this store: open it through the store, or fork one that was")]
    OtherStore,
    /// An open disk that was forked from one of the store's and never got a name.
    #[error("the disk has no name in the store: adopt it first")]
    Nameless,
    /// Somebody rewrote or deleted it while a call was working on it.
    #[error("`{name}` was rewritten or deleted meanwhile: try again")]
    Changed {
        /// The name.
        name: CloneName,
    },
}

impl From<StoreError> for CloneError {
    fn from(error: StoreError) -> Self {
        Self::Space(error.into())
    }
}
