//! Writing a sealed layer, from its first page to its last.
//!
//! Under a temporary name until everything is there and durable; then it gets its own in one step. So a layer of that name is whole.

use std::io;
use std::sync::Arc;

use super::super::file::{self, NamedFile};
use super::super::id::{LayerId, PARTIAL};
use super::super::medium::{Folder, Sharing};
use super::super::overlay::Shape;
use super::super::record::{BLOCK, Record};
use super::copy::Batch;
use super::{
    CHECKS, CHECKS_MAGIC, EXTENTS, Extent, Fingerprint, HEADER_MAGIC, INDEX_MAGIC, Kind, Parts, TRAILER_MAGIC,
    file_name, header, seal_block, tag, trailer,
};
use crate::error::StoreError;
use crate::page::{PageRange, PageSize};

/// Bytes of tables that are written at once.
const BUFFER: usize = 256 << 10;

/// A layer in the making. Holds 4 bytes for each page and 16 for each extent. What is dropped unfinished is removed.
pub(in super::super) struct Writer {
    folder: Arc<dyn Folder>,
    file: NamedFile,
    id: LayerId,
    buffer: Vec<u8>,
    /// Where the buffer goes.
    at: u64,
    extents: Vec<Extent>,
    checks: Vec<u32>,
    renamed: bool,
}

impl Writer {
    pub(in super::super) fn create(
        folder: Arc<dyn Folder>,
        id: LayerId,
        parent: Option<LayerId>,
        shape: Shape,
    ) -> Result<Self, StoreError> {
        let name: Arc<str> = format!("{}.{PARTIAL}", file_name(id)).into();
        let told = |call| {
            let name = &name;
            move |error| file::error(name, call, error)
        };
        let medium = match folder.create(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Left by a crash, unless somebody holds it, who is writing this very layer now.
                drop(folder.open(&name, Sharing::Alone).map_err(told("open"))?);
                folder.remove(&name).map_err(told("remove"))?;
                folder.create(&name).map_err(told("create"))?
            }
            made => made.map_err(told("create"))?,
        };
        let mut record = Record::new(&HEADER_MAGIC, id.bytes());
        record.put(header::PARENT, &parent.map_or([0; 16], LayerId::bytes));
        record.put(header::PAGES, &shape.geometry.pages().get().to_le_bytes());
        record.put(header::PAGE_SHIFT, &PageSize::KIB_4.shift().to_le_bytes());
        record.put(header::BASE_LEN, &shape.base_field().to_le_bytes());
        let file = NamedFile::new(name, medium);
        let mut writer = Self {
            folder,
            file,
            id,
            buffer: Vec::new(),
            at: 0,
            extents: Vec::new(),
            checks: Vec::new(),
            renamed: false,
        };
        writer.push(record.sealed())?;
        Ok(writer)
    }

    /// Whose pages these are.
    pub(in super::super) fn id(&self) -> LayerId {
        self.id
    }

    fn push(&mut self, block: &[u8; BLOCK]) -> Result<(), StoreError> {
        self.buffer.extend_from_slice(block);
        if self.buffer.len() >= BUFFER { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> Result<(), StoreError> {
        self.file.write(self.at, &self.buffer)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// What comes next, in the order of the disk.
    pub(super) fn append(&mut self, batch: &Batch) -> Result<(), StoreError> {
        batch.extents.iter().for_each(|(range, kind)| self.extend(*range, *kind));
        self.checks.extend_from_slice(&batch.checks);
        let data = batch.data();
        if data.is_empty() {
            return Ok(());
        }
        if !self.buffer.is_empty() {
            self.write_out()?;
        }
        self.file.write(self.at, data)?;
        self.at += data.len() as u64;
        Ok(())
    }

    fn extend(&mut self, range: PageRange, kind: Kind) {
        let (mut start, mut left) = (range.start().get(), range.count().get());
        debug_assert!(self.extents.last().is_none_or(|last| last.start + u64::from(last.count) <= start));
        if let Some(last) = self.extents.last_mut()
            && (last.kind, last.start + u64::from(last.count)) == (kind, start)
        {
            let more = left.min(u64::from(u32::MAX - last.count));
            last.count += more as u32;
            (start, left) = (start + more, left - more);
        }
        while left > 0 {
            let count = left.min(u64::from(u32::MAX));
            self.extents.push(Extent { start, count: count as u32, kind });
            (start, left) = (start + count, left - count);
        }
    }

    /// Writes what is left, makes all of it durable, and gives the layer its name.
    pub(in super::super) fn finish(mut self) -> Result<(), StoreError> {
        let parts = Parts { data_pages: self.checks.len() as u64, extents: self.extents.len() as u64 };
        let (checks, extents) = (std::mem::take(&mut self.checks), std::mem::take(&mut self.extents));
        let mut fingerprint = Fingerprint::new();
        extents.iter().for_each(|extent| fingerprint.add(&extent.bytes()));
        checks.iter().for_each(|check| fingerprint.add(&check.to_le_bytes()));
        for (number, checks) in (0..).zip(checks.chunks(CHECKS as usize)) {
            let mut block = [0; BLOCK];
            for (check, bytes) in checks.iter().zip(block[24..].chunks_exact_mut(4)) {
                bytes.copy_from_slice(&check.to_le_bytes());
            }
            seal_block(&mut block, CHECKS_MAGIC, number, tag(self.id));
            self.push(&block)?;
        }
        let mut before = 0u64;
        for (number, extents) in (0..).zip(extents.chunks(EXTENTS as usize)) {
            let mut block = [0; BLOCK];
            block[24..32].copy_from_slice(&before.to_le_bytes());
            for (extent, bytes) in extents.iter().zip(block[32..].chunks_exact_mut(16)) {
                bytes.copy_from_slice(&extent.bytes());
                before += if extent.kind == Kind::Data { u64::from(extent.count) } else { 0 };
            }
            seal_block(&mut block, INDEX_MAGIC, number, tag(self.id));
            self.push(&block)?;
        }
        let mut record = Record::new(&TRAILER_MAGIC, self.id.bytes());
        record.put(trailer::DATA_PAGES, &parts.data_pages.to_le_bytes());
        record.put(trailer::EXTENTS, &parts.extents.to_le_bytes());
        record.put(trailer::CONTENT, &fingerprint.bytes());
        record.put(trailer::FILE_LEN, &parts.file_len().to_le_bytes());
        self.push(record.sealed())?;
        self.write_out()?;
        debug_assert_eq!(self.at, parts.file_len());
        self.file.sync()?;
        let name = file_name(self.id);
        let renamed = self.folder.rename(self.file.name(), &name);
        renamed.map_err(|error| file::error(&name, "rename", error))?;
        self.renamed = true;
        self.folder.sync().map_err(|error| file::error(&name, "sync of its name", error))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.renamed
            && let Err(error) = self.folder.remove(self.file.name())
        {
            tracing::warn!(%error, file = %self.file.name(), "an unfinished layer was left behind");
        }
    }
}
