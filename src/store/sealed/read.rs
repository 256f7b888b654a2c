//! Reading a sealed layer. Every number in it may be a lie: all are checked against the file's length and one another first.

use super::super::file::{self, NamedFile};
use super::super::id::LayerId;
use super::super::medium::{Folder, Sharing};
use super::super::overlay::Shape;
use super::super::record::{BLOCK, BLOCK_LEN, Purpose, Record};
use super::checks::{CheckTable, Checks};
use super::{
    CHECKS, CHECKS_MAGIC, EXTENTS, Fingerprint, HEADER_MAGIC, INDEX_MAGIC, Kind, Parts, TRAILER_MAGIC, file_name,
    header, is_block, tag, trailer,
};
use crate::error::StoreError;
use crate::page::{PageIndex, PageRange};

/// A sealed layer that is open.
#[derive(Debug)]
pub(in super::super) struct SealedFile {
    file: NamedFile,
    pub(super) id: LayerId,
    parent: Option<LayerId>,
    shape: Shape,
    pub(super) parts: Parts,
    content: [u8; 16],
    /// Those that were needed so far.
    checks: CheckTable,
}

/// A page that is not what was written.
enum PageError {
    /// It does not match its checksum: the page of the file.
    Damaged(u64),
    /// It could not be read, or its checksum could not.
    Store(StoreError),
}

impl From<StoreError> for PageError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl SealedFile {
    pub(in super::super) fn open(folder: &dyn Folder, id: LayerId) -> Result<Self, StoreError> {
        let name = file_name(id);
        let medium = folder.open(&name, Sharing::Readers).map_err(|error| file::error(&name, "open", error))?;
        let file = NamedFile::new(name, medium);
        let len = file.len()?;
        if len < 2 * BLOCK_LEN || !len.is_multiple_of(BLOCK_LEN) {
            return Err(file.damaged("it is cut short", len));
        }
        let read = |at, magic, what| {
            let mut bytes = [0; BLOCK];
            file.read(at, &mut bytes)?;
            let record = Record::parse(&bytes, magic).ok_or_else(|| file.damaged(what, at))?;
            record.check_known(file.name(), Purpose::Read)?;
            if record.id() != id.bytes() {
                return Err(file.damaged("it is another layer than its name says", at + 48));
            }
            Ok(record)
        };
        let head = read(0, &HEADER_MAGIC, "its header is not whole")?;
        let tail = read(len - BLOCK_LEN, &TRAILER_MAGIC, "its trailer is not whole")?;
        let (pages, shift) = (head.u64_at(header::PAGES), head.u32_at(header::PAGE_SHIFT));
        let shape = Shape::from_fields(&file, pages, shift, head.u64_at(header::BASE_LEN))?;
        let parts = Parts { data_pages: tail.u64_at(trailer::DATA_PAGES), extents: tail.u64_at(trailer::EXTENTS) };
        // Neither may be over the pages of a disk, so that the sums below cannot overflow.
        if parts.data_pages > pages {
            return Err(file.limit("pages of data", parts.data_pages, pages));
        }
        if parts.extents > pages {
            return Err(file.limit("extents", parts.extents, pages));
        }
        if parts.file_len() != len || tail.u64_at(trailer::FILE_LEN) != len {
            return Err(file.damaged("its length is not what its trailer says", len - BLOCK_LEN));
        }
        let parent = match head.bytes_at::<16>(header::PARENT) {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => None,
            bytes => Some(LayerId::from_bytes(bytes)),
        };
        let content = tail.bytes_at(trailer::CONTENT);
        Ok(Self { file, id, parent, shape, parts, content, checks: CheckTable::new(parts) })
    }

    pub(in super::super) fn file(&self) -> &NamedFile {
        &self.file
    }

    pub(in super::super) fn parent(&self) -> Option<LayerId> {
        self.parent
    }

    pub(in super::super) fn shape(&self) -> Shape {
        self.shape
    }

    pub(in super::super) fn content(&self) -> [u8; 16] {
        self.content
    }

    /// Walks the index, a block at a time: for each extent its pages, and for data the page of the file where they start.
    pub(in super::super) fn extents(
        &self,
        mut each: impl FnMut(PageRange, Option<u64>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut block = [0; BLOCK];
        let (mut next_page, mut next_data, mut left) = (0u64, 0u64, self.parts.extents);
        for number in 0..self.parts.index_blocks() {
            let at = self.parts.index_at() + number * BLOCK_LEN;
            self.file.read(at, &mut block)?;
            let wrong = |what| self.file.damaged(what, at);
            if !is_block(&block, INDEX_MAGIC, number, tag(self.id)) {
                return Err(wrong("a block of the index does not match its checksum"));
            }
            if block[24..32] != next_data.to_le_bytes() {
                return Err(wrong("a block of the index does not follow the one before"));
            }
            let here = left.min(EXTENTS);
            left -= here;
            for (n, bytes) in (0..).zip(block[32..].chunks_exact(16)) {
                if n >= here {
                    if bytes.iter().any(|byte| *byte != 0) {
                        return Err(wrong("there is something after the last extent"));
                    }
                    continue;
                }
                let (start, count, kind) = extent(bytes);
                let end = start.checked_add(u64::from(count)).filter(|_| count > 0 && start >= next_page);
                let Some(end) = end.filter(|end| *end <= self.shape.geometry.pages().get()) else {
                    return Err(wrong("an extent is empty, out of order or past the end of the disk"));
                };
                next_page = end;
                let range = PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
                if kind == Kind::Data as u32 {
                    each(range, Some(next_data))?;
                    next_data += u64::from(count);
                } else if kind == Kind::Zero as u32 {
                    each(range, None)?;
                } else {
                    return Err(wrong("an extent is neither data nor zero"));
                }
                if next_data > self.parts.data_pages {
                    return Err(wrong("the extents have more pages than the layer"));
                }
            }
        }
        if next_data != self.parts.data_pages {
            return Err(self.file.damaged("the extents have fewer pages than the layer", self.parts.index_at()));
        }
        Ok(())
    }

    fn load_checks(&self, number: u64) -> Result<&Checks, StoreError> {
        if let Some(checks) = self.checks.get(number) {
            return Ok(checks);
        }
        let at = self.parts.checks_at() + number * BLOCK_LEN;
        let mut block = [0; BLOCK];
        self.file.read(at, &mut block)?;
        if !is_block(&block, CHECKS_MAGIC, number, tag(self.id)) {
            return Err(self.file.damaged("a block of checksums does not match its own", at));
        }
        let mut checks = Box::new([0; CHECKS as usize]);
        for (check, bytes) in checks.iter_mut().zip(block[24..].chunks_exact(4)) {
            *check = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let used = (self.parts.data_pages - number * CHECKS).min(CHECKS) as usize;
        if checks[used..].iter().any(|check| *check != 0) {
            return Err(self.file.damaged("there is something after the last checksum", at));
        }
        Ok(self.checks.keep(number, checks))
    }

    /// Reads whole pages of the file, and checks each.
    fn read_pages(&self, first: u64, buf: &mut [u8]) -> Result<(), PageError> {
        self.read_unchecked(first, buf)?;
        self.first_damaged(first, buf)?.map_or(Ok(()), |page| Err(PageError::Damaged(page)))
    }

    /// Reads whole pages of the file, which are to be checked.
    pub(super) fn read_unchecked(&self, first: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.file.read(BLOCK_LEN + first * BLOCK_LEN, buf)
    }

    /// The first of these pages of the file that does not match its checksum.
    pub(super) fn first_damaged(&self, first: u64, bytes: &[u8]) -> Result<Option<u64>, StoreError> {
        let (mut page, mut rest) = (first, bytes.as_chunks::<BLOCK>().0);
        while !rest.is_empty() {
            let within = (page % CHECKS) as usize;
            let checks = &self.load_checks(page / CHECKS)?[within..];
            let (here, after) = rest.split_at(rest.len().min(checks.len()));
            let matches = |(bytes, check): (&[u8; BLOCK], &u32)| crc32fast::hash(bytes) == *check;
            if let Some(at) = here.iter().zip(checks).position(|pair| !matches(pair)) {
                return Ok(Some(page + at as u64));
            }
            (page, rest) = (page + here.len() as u64, after);
        }
        Ok(None)
    }

    /// Fills `buf` from byte `at` of the data, where `shift` is what a page of the file is further on than the page of the disk.
    pub(in super::super) fn read(&self, at: u64, shift: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let told = |error| match error {
            PageError::Store(error) => error,
            PageError::Damaged(page) => {
                // The top bit of a shift is not one of its digits; no disk has so many pages.
                let page = PageIndex::new(page.wrapping_sub(shift) & !(1 << 63));
                StoreError::DamagedPage { file: self.file.name().clone(), page }
            }
        };
        let result = self.read_checked(at, buf).map_err(told);
        if result.is_err() {
            // Bytes that are known to be wrong are not left lying about.
            buf.fill(0);
        }
        result
    }

    fn read_checked(&self, at: u64, buf: &mut [u8]) -> Result<(), PageError> {
        let block = BLOCK_LEN as usize;
        let (mut page, within) = (at / BLOCK_LEN, (at % BLOCK_LEN) as usize);
        let mut rest = buf;
        if within != 0 || rest.len() < block {
            let mut whole = [0; BLOCK];
            self.read_pages(page, &mut whole)?;
            let take = rest.len().min(block - within);
            rest[..take].copy_from_slice(&whole[within..within + take]);
            (rest, page) = (&mut rest[take..], page + 1);
        }
        let whole_pages = rest.len() / block * block;
        let (middle, tail) = rest.split_at_mut(whole_pages);
        self.read_pages(page, middle)?;
        if !tail.is_empty() {
            let mut whole = [0; BLOCK];
            self.read_pages(page + (whole_pages / block) as u64, &mut whole)?;
            tail.copy_from_slice(&whole[..tail.len()]);
        }
        Ok(())
    }

    /// The fingerprint as the tables give it.
    pub(super) fn fingerprint(&self) -> Result<Fingerprint, StoreError> {
        let mut fingerprint = Fingerprint::new();
        self.extents(|range, data| {
            let kind = if data.is_some() { Kind::Data } else { Kind::Zero };
            // At most what one extent holds: it was read from 32 bits.
            let count = range.count().get() as u32;
            fingerprint.add(&super::Extent { start: range.start().get(), count, kind }.bytes());
            Ok(())
        })?;
        let mut left = self.parts.data_pages;
        for number in 0..self.parts.check_blocks() {
            let here = left.min(CHECKS);
            left -= here;
            let checks = self.load_checks(number)?;
            checks[..here as usize].iter().for_each(|check| fingerprint.add(&check.to_le_bytes()));
        }
        Ok(fingerprint)
    }
}

fn extent(bytes: &[u8]) -> (u64, u32, u32) {
    let mut words = [0u32; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    (u64::from(words[0]) | u64::from(words[1]) << 32, words[2], words[3])
}
