//! The head of a disk: a small file that says which layer holds the disk's latest writes.
//!
//! A fork freezes a disk's overlay and the disk goes on in a new one: the head is what stays, and whoever holds it may write the disk. It is a
//! pair of records, updated in place. Must not know what is in a layer.

use std::sync::Arc;

use super::file::{self, NamedFile, Part};
#[cfg(feature = "store")]
use super::id::PARTIAL;
use super::id::{DISK, DiskId, LayerId};
use super::medium::{Folder, Sharing};
use super::overlay::Shape;
use super::record::{Purpose, Record, RecordPair};
use crate::error::StoreError;
use crate::page::PageSize;

const MAGIC: [u8; 8] = *b"OFFSDSK\0";

mod at {
    pub(super) const TOP: usize = 64;
    pub(super) const PAGES: usize = 80;
    pub(super) const PAGE_SHIFT: usize = 88;
    pub(super) const BASE_LEN: usize = 96;
}

/// An open head.
#[derive(Debug)]
pub(super) struct Head {
    file: NamedFile,
    record: RecordPair,
    shape: Shape,
}

pub(super) fn file_name(id: DiskId) -> Arc<str> {
    format!("{id}.{DISK}").into()
}

impl Head {
    /// A new disk, durable when this returns, but for its name: the caller syncs the folder.
    pub(super) fn create(
        folder: &dyn Folder,
        id: DiskId,
        top: Option<LayerId>,
        shape: Shape,
    ) -> Result<Self, StoreError> {
        Self::create_as(folder, file_name(id), id, top, shape)
    }

    /// A new disk under another name, and then under its own: once that is there, so is what it says. For disks that are known of before they have
    /// a head.
    #[cfg(feature = "store")]
    pub(super) fn create_whole(
        folder: &dyn Folder,
        id: DiskId,
        top: Option<LayerId>,
        shape: Shape,
    ) -> Result<(), StoreError> {
        let name = file_name(id);
        let partial: Arc<str> = format!("{name}.{PARTIAL}").into();
        // One that a crash left behind says nothing.
        match folder.remove(&partial) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(file::error(&partial, "remove", error));
            }
            _ => {}
        }
        let _held = Self::create_as(folder, partial.clone(), id, top, shape)?;
        folder.rename(&partial, &name).map_err(|error| file::error(&name, "rename", error))
    }

    fn create_as(
        folder: &dyn Folder,
        name: Arc<str>,
        id: DiskId,
        top: Option<LayerId>,
        shape: Shape,
    ) -> Result<Self, StoreError> {
        let medium = folder.create(&name).map_err(|error| file::error(&name, "create", error))?;
        let file = NamedFile::new(name, medium);
        let mut record = Record::new(&MAGIC, id.bytes());
        record.put(at::TOP, &top.map_or([0; 16], LayerId::bytes));
        record.put(at::PAGES, &shape.geometry.pages().get().to_le_bytes());
        record.put(at::PAGE_SHIFT, &PageSize::KIB_4.shift().to_le_bytes());
        record.put(at::BASE_LEN, &shape.base_field().to_le_bytes());
        let made = RecordPair::create(&file, record).and_then(|record| file.sync().map(|()| record));
        match made {
            Ok(record) => Ok(Self { file, record, shape }),
            Err(error) => {
                if let Err(left) = folder.remove(file.name()) {
                    tracing::warn!(error = %left, file = %file.name(), "a head that could not be made was left behind");
                }
                Err(error)
            }
        }
    }

    pub(super) fn open(folder: &dyn Folder, id: DiskId, purpose: Purpose) -> Result<Self, StoreError> {
        let name = file_name(id);
        let sharing = if purpose == Purpose::Write { Sharing::Alone } else { Sharing::Readers };
        let medium = folder.open(&name, sharing).map_err(|error| file::error(&name, "open", error))?;
        let file = NamedFile::new(name, medium);
        if purpose == Purpose::Write {
            file.settle(Part::All)?;
        }
        let mut record = RecordPair::load(&file, &MAGIC, purpose)?;
        if record.record().id() != id.bytes() {
            return Err(file.damaged("it is another disk than its name says", 48));
        }
        let fields = record.record();
        let (pages, shift) = (fields.u64_at(at::PAGES), fields.u32_at(at::PAGE_SHIFT));
        let shape = Shape::from_fields(&file, pages, shift, fields.u64_at(at::BASE_LEN))?;
        if purpose == Purpose::Write {
            record.heal(&file)?;
        }
        Ok(Self { file, record, shape })
    }

    pub(super) fn file(&self) -> &NamedFile {
        &self.file
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// The layer that holds the disk's latest writes; `None` where it has none yet.
    pub(super) fn top(&self) -> Option<LayerId> {
        match self.record.record().bytes_at::<16>(at::TOP) {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => None,
            bytes => Some(LayerId::from_bytes(bytes)),
        }
    }

    /// Moves the disk on to another layer, durably. That layer and its name must be durable.
    pub(super) fn advance(&mut self, top: Option<LayerId>) -> Result<(), StoreError> {
        self.record.update(&self.file, |record| record.put(at::TOP, &top.map_or([0; 16], LayerId::bytes)))
    }
}
