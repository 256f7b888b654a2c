//! Durable disks: overlays and layers as files that survive SIGKILL and power cuts.
//!
//! A [`DiskDir`] is a directory of them. A [`Durable`] is the live side of one disk, a [`Backing`](crate::backing::Backing) like any other: put it under
//! a [`Disk`](crate::disk::Disk), and fork it with its VM, whatever RAM lies on. What it promises:
//!
//! - **A flush that returned `Ok` is durable**, and so is everything that was flushed before. After a crash each sector that was written since the
//!   last flush reads as it was then or as it was written later; nothing else has changed.
//! - **After a sync that failed nothing is claimed durable** until the disk is opened again: writes, flushes and cuts say
//!   [`StoreError::SyncFailed`](crate::StoreError::SyncFailed).
//! - **Depth costs nothing**: one merged index leads to the layer that has a page.
//! - **Nobody writes a parent**: a layer is frozen on disk before anything over it is durable, and a second writer of a disk is refused.
//!
//! What is not flushed when a disk is dropped may be lost, as with the power.
//!
//! The formats, and what each cut-off write leaves behind: `docs/formats/`. This module must not know of sectors, guests or forks.
//!
//! ```
//! use offshoot::{Limits, Tree, backing::Backing, disk::{Access, Disk}, page::*, store::DiskDir};
//! # let path = std::env::temp_dir().join(format!("offshoot-store-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&path)?;
//! let dir = DiskDir::open(&path, &Tree::default())?;
//! let durable = dir.create(Geometry::new(ByteSize::gib(64), PageSize::KIB_4)?, None)?;
//! let id = durable.id();
//! let disk = Disk::over(durable, SectorCount::new(128 << 20), Access::ReadWrite)?;
//! disk.write(Lba::new(100), &[7; 512])?;
//! disk.flush()?;
//! drop(disk);
//!
//! // After a crash, in another process:
//! let again = dir.open_disk(id, None)?;
//! let mut sector = [0; 512];
//! again.read(Lba::new(100).byte_offset().unwrap(), &mut sector)?;
//! assert_eq!(sector, [7; 512]);
//! # std::fs::remove_dir_all(&path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod access;
mod clean;
#[cfg(feature = "store")]
mod clones;
mod copy;
mod directory;
mod durable;
mod file;
mod flush;
mod head;
mod id;
mod image;
#[cfg(all(test, shuttle))]
mod interleavings;
mod job;
mod layer;
mod made;
mod map;
mod medium;
mod overlay;
mod presence;
mod ranges;
mod record;
mod restack;
mod saved;
mod sealed;

#[cfg(feature = "store")]
pub use clones::{
    CloneError, CloneInfo, CloneName, CloneStore, Health, Kind, Problem, Repaired, SavedInfo, SpaceUsed, StoreOptions,
};
#[cfg(feature = "store")]
pub(crate) use clones::{NewSaved, StoreTag};
pub use directory::DiskDir;
pub use durable::{Durable, DurableCut};
pub use id::{DiskId, LayerId, SavedId};
pub use image::{DurableImage, LayerInfo};
pub use job::{Cancel, Job, Progress};
pub use medium::{Folder, Medium, Sharing, open_folder};
pub use saved::{Manifest, SavedAccess, SavedDisk, SavedRegion};
pub use sealed::Verified;
