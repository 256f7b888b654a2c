//! One overlay file: positional data behind a presence map, and the order in which a flush writes them.
//!
//! Page `n` lies at `data_at + n * 4096`, whatever was written before, so there is no allocator and nothing that data could be written over.
//! The order of a flush is *data, sync, map, sync*: the map on disk never names a page whose bytes are not there. See
//! `docs/formats/overlay.md`. Must not know what reads through to a parent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::file::{self, NamedFile, Part};
use super::id::{DiskId, LayerId, OVERLAY};
use super::map::{BLOCK_PAGES, MapBlock, Place, Side, Slot, Version, choose};
use super::medium::{Folder, Sharing};
use super::record::{BLOCK, BLOCK_LEN, LAST_GENERATION, Purpose, Record, RecordPair};
use crate::error::{SpaceError, StoreError};
use crate::page::{ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSize, is_zero};
use crate::sync::Mutex;

pub(super) const MAGIC: [u8; 8] = *b"OFFSOVL\0";
const MAP_AT: u64 = 2 * BLOCK_LEN;
/// Data starts at a multiple of this, so that large pages of data are large extents of the file system.
const DATA_ALIGN: u64 = 1 << 20;
/// Blocks of the map that a flush holds in memory at once: 4 MiB.
const BATCH: usize = 1024;

/// Fields of the record, after its prefix.
mod at {
    pub(super) const PARENT: usize = 64;
    pub(super) const DISK: usize = 80;
    pub(super) const PAGES: usize = 96;
    pub(super) const PAGE_SHIFT: usize = 104;
    pub(super) const STATE: usize = 108;
    pub(super) const MARKS: usize = 112;
    pub(super) const BASE_LEN: usize = 120;
    pub(super) const DATA_AT: usize = 128;
}

const LIVE: u32 = 0;
const FROZEN: u32 = 1;
const CORRUPT: u32 = 1;
/// In the field of the base's length: there is no base.
pub(super) const NO_BASE: u64 = u64::MAX;

/// What an overlay was made for; the same in every layer of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub(super) geometry: Geometry,
    /// The length of the base image below the last layer.
    pub(super) base_len: Option<ByteSize>,
}

impl Shape {
    pub(super) fn base_field(self) -> u64 {
        self.base_len.map_or(NO_BASE, ByteSize::get)
    }

    /// From the fields of a file, which may claim anything.
    pub(super) fn from_fields(file: &NamedFile, pages: u64, shift: u32, base_len: u64) -> Result<Self, StoreError> {
        if shift != PageSize::KIB_4.shift() {
            return Err(file.damaged("its pages are not of 4 KiB", 0));
        }
        let most = Geometry::MAX_LEN.get() >> shift;
        if pages == 0 || pages > most {
            return Err(file.limit("pages in a disk", pages, most));
        }
        let Ok(geometry) = Geometry::new(PageSize::KIB_4.size_of(PageCount::new(pages)), PageSize::KIB_4) else {
            return Err(file.limit("pages in a disk", pages, most));
        };
        if base_len != NO_BASE && base_len > geometry.len().get() {
            return Err(file.limit("bytes in the base image", base_len, geometry.len().get()));
        }
        Ok(Self { geometry, base_len: (base_len != NO_BASE).then_some(ByteSize::new(base_len)) })
    }
}

/// An overlay file that is open.
#[derive(Debug)]
pub(super) struct Overlay {
    file: NamedFile,
    id: LayerId,
    shape: Shape,
    data_at: u64,
    meta: Mutex<Meta>,
    /// Something was written since the last sync began.
    unsynced: AtomicBool,
    /// The file system has no holes: discards free nothing, and are not tried again.
    no_holes: AtomicBool,
}

#[derive(Debug)]
struct Meta {
    record: RecordPair,
    /// A bit for each block of the map: set where slot B holds the newest durable version, or where there is none yet.
    newest_is_b: Vec<u64>,
    generation: u64,
}

pub(super) fn file_name(id: LayerId) -> Arc<str> {
    format!("{id}.{OVERLAY}").into()
}

fn slot_at(block: u64, side: Side) -> u64 {
    MAP_AT + (2 * block + u64::from(side == Side::B)) * BLOCK_LEN
}

fn block_count(geometry: Geometry) -> u64 {
    geometry.pages().get().div_ceil(BLOCK_PAGES)
}

/// Where data starts: after the map of a disk of this length.
pub(super) fn data_start(geometry: Geometry) -> u64 {
    (MAP_AT + 2 * block_count(geometry) * BLOCK_LEN).next_multiple_of(DATA_ALIGN)
}

impl Overlay {
    /// A new overlay, held alone. Nothing is synced: until something durable names it, nobody misses it.
    pub(super) fn create(
        folder: &dyn Folder,
        id: LayerId,
        disk: DiskId,
        parent: Option<LayerId>,
        shape: Shape,
    ) -> Result<Self, StoreError> {
        let name = file_name(id);
        let medium = folder.create(&name).map_err(|error| file::error(&name, "create", error))?;
        let file = NamedFile::new(name, medium);
        let made = Self::fill_new(file, id, disk, parent, shape);
        made.map_err(|(error, file)| {
            // The first error is the one to tell; what is left is a file that nothing names.
            if let Err(left) = folder.remove(file.name()) {
                tracing::warn!(error = %left, file = %file.name(), "an overlay that could not be made was left behind");
            }
            error
        })
    }

    fn fill_new(
        file: NamedFile,
        id: LayerId,
        disk: DiskId,
        parent: Option<LayerId>,
        shape: Shape,
    ) -> Result<Self, (StoreError, NamedFile)> {
        let data_at = data_start(shape.geometry);
        let mut record = Record::new(&MAGIC, id.bytes());
        record.put(at::PARENT, &parent.map_or([0; 16], LayerId::bytes));
        record.put(at::DISK, &disk.bytes());
        record.put(at::PAGES, &shape.geometry.pages().get().to_le_bytes());
        record.put(at::PAGE_SHIFT, &PageSize::KIB_4.shift().to_le_bytes());
        record.put(at::STATE, &LIVE.to_le_bytes());
        record.put(at::BASE_LEN, &shape.base_field().to_le_bytes());
        record.put(at::DATA_AT, &data_at.to_le_bytes());
        let made = file.set_len(data_at + shape.geometry.len().get()).and_then(|()| RecordPair::create(&file, record));
        match made {
            Ok(record) => Ok(Self {
                file,
                id,
                shape,
                data_at,
                meta: Mutex::new(Meta::new(record, shape)),
                unsynced: AtomicBool::new(true),
                no_holes: AtomicBool::new(false),
            }),
            Err(error) => Err((error, file)),
        }
    }

    /// Opens an overlay. For writing it is held alone, and what an earlier holder left unsynced is made durable first.
    pub(super) fn open(folder: &dyn Folder, id: LayerId, purpose: Purpose) -> Result<Self, StoreError> {
        let name = file_name(id);
        let sharing = if purpose == Purpose::Write { Sharing::Alone } else { Sharing::Readers };
        let medium = folder.open(&name, sharing).map_err(|error| file::error(&name, "open", error))?;
        let file = NamedFile::new(name, medium);
        file.settle(if purpose == Purpose::Write { Part::All } else { Part::Records })?;
        let mut record = RecordPair::load(&file, &MAGIC, purpose)?;
        if record.record().id() != id.bytes() {
            return Err(file.damaged("it is another layer than its name says", 48));
        }
        let fields = record.record();
        let (pages, shift) = (fields.u64_at(at::PAGES), fields.u32_at(at::PAGE_SHIFT));
        let shape = Shape::from_fields(&file, pages, shift, fields.u64_at(at::BASE_LEN))?;
        let (data_at, len) = (fields.u64_at(at::DATA_AT), file.len()?);
        if data_at != data_start(shape.geometry) {
            return Err(file.damaged("data does not start where the map ends", at::DATA_AT as u64));
        }
        if len < data_at + shape.geometry.len().get() {
            return Err(file.damaged("the file ends here, within its disk", len));
        }
        if fields.u32_at(at::STATE) > FROZEN {
            return Err(file.damaged("it is neither live nor frozen", at::STATE as u64));
        }
        if purpose == Purpose::Write {
            record.heal(&file)?;
        }
        let meta = Mutex::new(Meta::new(record, shape));
        let (unsynced, no_holes) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { file, id, shape, data_at, meta, unsynced, no_holes })
    }

    pub(super) fn id(&self) -> LayerId {
        self.id
    }

    pub(super) fn file(&self) -> &NamedFile {
        &self.file
    }

    pub(super) fn parent(&self) -> Option<LayerId> {
        match self.meta.lock().record.record().bytes_at::<16>(at::PARENT) {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => None,
            bytes => Some(LayerId::from_bytes(bytes)),
        }
    }

    /// Names another parent, durably, which must be so and have the same content. After an error either may be found when it is opened.
    pub(super) fn lie_on(&self, parent: Option<LayerId>) -> Result<(), StoreError> {
        let mut meta = self.meta.lock();
        let bytes = parent.map_or([0; 16], LayerId::bytes);
        meta.record.update(&self.file, |record| record.put(at::PARENT, &bytes))
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    fn state(&self, field: usize) -> u32 {
        self.meta.lock().record.record().u32_at(field)
    }

    /// Whether it is a parent, or was made fit to be one: nobody writes it again.
    pub(super) fn is_frozen(&self) -> bool {
        self.state(at::STATE) == FROZEN
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.state(at::MARKS) & CORRUPT != 0
    }

    /// Makes it immutable on disk, durably: before the first overlay over it is.
    pub(super) fn freeze(&self) -> Result<(), StoreError> {
        let mut meta = self.meta.lock();
        if meta.record.record().u32_at(at::STATE) == FROZEN {
            return Ok(());
        }
        meta.record.update(&self.file, |record| record.put(at::STATE, &FROZEN.to_le_bytes()))?;
        drop(meta);
        self.file.share()
    }

    /// Marks it as corrupt, durably: it can be opened for reading only.
    pub(super) fn mark_corrupt(&self) -> Result<(), StoreError> {
        let mut meta = self.meta.lock();
        let marks = meta.record.record().u32_at(at::MARKS) | CORRUPT;
        meta.record.update(&self.file, |record| record.put(at::MARKS, &marks.to_le_bytes()))
    }

    /// Fills `buf` from byte `at` of the disk: bytes of pages that the map names.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.file.read(self.data_at + at, buf)
    }

    /// Writes at byte `at` of the disk, which must lie inside it.
    pub(super) fn write(&self, at: u64, data: &[u8]) -> Result<(), StoreError> {
        // Said even where the write fails: a part of it may have been done. And after it: a flush must not take this for synced.
        let result = self.file.write(self.data_at + at, data);
        self.unsynced.store(true, Ordering::Release);
        result
    }

    /// Writes the blocks of the map that `take_changed` names, after all data, durably. Where it fails `put_back` gets them again.
    pub(super) fn flush(
        &self,
        take_changed: impl FnOnce() -> Vec<u64>,
        put_back: impl FnOnce(&[u64]),
        block: impl Fn(u64) -> MapBlock,
    ) -> Result<(), StoreError> {
        let mut meta = self.meta.lock();
        self.file.check_synced()?;
        let unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        let changed = take_changed();
        if !unsynced && changed.is_empty() {
            return Ok(());
        }
        let result = self.write_map(&mut meta, &changed, block);
        if result.is_err() {
            self.unsynced.store(true, Ordering::Release);
            put_back(&changed);
        }
        result
    }

    fn write_map(&self, meta: &mut Meta, changed: &[u64], block: impl Fn(u64) -> MapBlock) -> Result<(), StoreError> {
        let generation = meta.generation + 1;
        for batch in changed.chunks(BATCH) {
            // Read before the sync: all that these blocks name was written before it.
            let blocks: Vec<_> = batch.iter().map(|number| (*number, block(*number))).collect();
            self.file.sync()?;
            for (number, block) in blocks {
                let side = meta.newest(number).other();
                self.file.write(slot_at(number, side), &block.encode(self.place(number), generation))?;
            }
        }
        self.file.sync()?;
        // Only now: until here the old versions are the durable ones, and a failed flush writes the same slots again.
        changed.iter().for_each(|number| meta.flip(*number));
        meta.generation = generation;
        Ok(())
    }

    fn place(&self, block: u64) -> Place {
        let mut tag = [0; 8];
        tag.copy_from_slice(&self.id.bytes()[..8]);
        Place { block, tag: u64::from_le_bytes(tag) }
    }

    /// Reads the map: `each` is given every block that has something in it, or what is wrong with it.
    pub(super) fn load(
        &self,
        mut each: impl FnMut(PageIndex, Result<&MapBlock, StoreError>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut meta = self.meta.lock();
        let blocks = block_count(self.shape.geometry);
        let mut bytes = vec![0; 32 * 2 * BLOCK];
        for first in (0..blocks).step_by(32) {
            let here = (blocks - first).min(32) as usize;
            self.file.read(slot_at(first, Side::A), &mut bytes[..here * 2 * BLOCK])?;
            for (number, slots) in (first..).zip(bytes[..here * 2 * BLOCK].chunks_exact(2 * BLOCK)) {
                // Most of a large disk's map is holes.
                if is_zero(slots) {
                    continue;
                }
                let start = PageIndex::new(number * BLOCK_PAGES);
                match self.choose(number, slots) {
                    Ok(None) => {}
                    Ok(Some((side, block, generation))) => {
                        meta.set_newest(number, side);
                        meta.generation = meta.generation.max(generation);
                        each(start, Ok(&block))?;
                    }
                    Err(error) => each(start, Err(error))?,
                }
            }
        }
        Ok(())
    }

    fn choose(&self, number: u64, slots: &[u8]) -> Result<Option<Version>, StoreError> {
        let slot = |at: usize| {
            let mut bytes = [0; BLOCK];
            bytes.copy_from_slice(&slots[at..at + BLOCK]);
            Slot::decode(&bytes, self.place(number))
        };
        let damaged = |(side, what)| self.file.damaged(what, slot_at(number, side));
        let Some((side, block, generation)) = choose(slot(0), slot(BLOCK)).map_err(damaged)? else { return Ok(None) };
        if generation > LAST_GENERATION {
            return Err(self.file.limit("flushes", generation, LAST_GENERATION));
        }
        let pages = self.shape.geometry.pages().get() - number * BLOCK_PAGES;
        let beyond = |words| MapBlock::runs(words).last().is_some_and(|run| run.end().get() > pages);
        if beyond(&block.data) || beyond(&block.zero) {
            return Err(damaged((side, "the map names pages past the end of the disk")));
        }
        Ok(Some((side, block, generation)))
    }

    /// Gives back the space of pages that the durable map does not name.
    pub(super) fn punch(&self, range: PageRange) -> Result<(), StoreError> {
        if self.no_holes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let size = PageSize::KIB_4;
        let at = self.data_at + size.start_of(range.start()).get();
        if !self.file.punch(at, size.size_of(range.count()).get())? {
            self.no_holes.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Space that the file takes.
    pub(super) fn allocated(&self) -> Result<ByteSize, SpaceError> {
        Ok(self.file.allocated()?)
    }
}

impl Side {
    const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

impl Meta {
    fn new(record: RecordPair, shape: Shape) -> Self {
        let words = block_count(shape.geometry).div_ceil(64) as usize;
        Self { record, newest_is_b: vec![u64::MAX; words], generation: 0 }
    }

    fn newest(&self, block: u64) -> Side {
        if self.newest_is_b[block as usize / 64] >> (block % 64) & 1 == 1 { Side::B } else { Side::A }
    }

    fn set_newest(&mut self, block: u64, side: Side) {
        if self.newest(block) != side {
            self.flip(block);
        }
    }

    fn flip(&mut self, block: u64) {
        self.newest_is_b[block as usize / 64] ^= 1 << (block % 64);
    }
}
