//! Disk images in and out: qcow2, VMDK and raw files become bases of disks, and disks become files that other tools read.
//!
//! ```text
//!   file ──ImportedImage::open──▶ ImportedImage (a Source) ──▶ Disk::over_image     read in place
//!                                            └──── fill / into_space ────▶ a disk    copied, zeroes left out
//!   Source, DiskImage ──export / export_delta──▶ .NAME.part ──sync, rename──▶ NAME
//! ```
//!
//! Owns what may be opened ([`ImportPolicy`]), the checks before and around the library that reads the formats (`imago`), and the writers.
//! Must not know of stores, overlays or guests: it reads a [`Source`](crate::image::Source) and writes a [`Backing`](crate::backing::Backing)
//! or a file.
//!
//! # What holds
//! - The caller names the format. Nothing is guessed from the first bytes, which a guest may have written.
//! - A header opens nothing that [`References`] does not allow. The library is given files that are open already.
//! - Hostile files get an error with the [`Rule`] that they broke, never a panic and never memory that their size does not warrant. A
//!   panic within the library is caught at this border, because a parser of other people's files is the one place where a bug of a
//!   dependency would take all clones of a process along; the image reads no more after it. With `panic = "abort"` it still aborts.
//! - Exports are complete or absent: written beside the target, synced, renamed.
//!
//! Rules, errors and what is not supported: `docs/formats/import-export.md`.
//!
//! ```
//! use offshoot::{Tree, disk::{Access, Disk}, page::{Lba, SectorCount}};
//! use offshoot::frontend::formats::{ExportFormat, Format, ImportPolicy, ImportedImage, export, keep_going};
//! use std::sync::Arc;
//! # let dir = std::env::temp_dir().join(format!("offshoot-doc-formats-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir)?;
//! # std::fs::write(dir.join("base.raw"), vec![7; 1 << 20])?;
//! let base = ImportedImage::open(dir.join("base.raw"), Format::Raw, &ImportPolicy::default())?;
//! export(&base, &dir.join("base.qcow2"), &ExportFormat::default(), &mut keep_going)?;
//!
//! let image = ImportedImage::open(dir.join("base.qcow2"), Format::Qcow2, &ImportPolicy::default())?;
//! let disk = Disk::over_image(&Tree::default(), Arc::new(image), Access::ReadWrite)?;
//! let mut sector = [0; 512];
//! disk.read(Lba::new(9), &mut sector)?;
//! assert_eq!(sector, [7; 512]);
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod chain;
mod error;
mod export;
mod image;
mod import;
mod output;
mod policy;
mod qcow2_header;
mod qcow2_writer;
mod vmdk_sparse;
mod vmdk_writer;

pub use error::{FormatError, Rule};
pub use export::{BackingName, ClusterSize, Delta, DiskSource, ExportFormat, export, export_delta};
pub use image::ImportedImage;
pub use policy::{ImportPolicy, References};

use std::fmt;
use std::ops::ControlFlow;

use crate::page::ByteSize;

/// What a file is, as the caller says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
    /// A VMDK: monolithicSparse, or a descriptor with flat and zero extents.
    Vmdk,
}

impl Format {
    /// As QEMU calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2, Self::Vmdk].into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a copy is. Bytes of the virtual disk, holes included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// What is behind.
    pub done: ByteSize,
    /// All of it.
    pub total: ByteSize,
}

/// Called after each piece of at most 2 MiB of data. `Break` ends the copy with [`FormatError::Cancelled`].
pub type Watch<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// A [`Watch`] that lets the copy go on.
pub fn keep_going(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
