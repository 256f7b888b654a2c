//! Records of one block of 4 KiB with a checksum, and pairs of them that are updated in place.
//!
//! A pair is two copies, at bytes 0 and 4096 of a file. An update writes the older one, syncs, writes the other, syncs: at every
//! instant one copy is whole and durable, and between updates both say the same, so that a copy which rots is not the only one that knew.
//! What is not understood is kept byte for byte. Must not know what is in a record but its prefix.
//!
//! ```text
//!   0  8  magic                        24  8  features that must be understood
//!   8  4  version                      32  8  features without which it may be read only
//!  12  4  CRC-32, this field as zero   40  8  features that may be ignored
//!  16  8  generation                   48 16  id
//! ```

use std::sync::Arc;

use super::file::NamedFile;
use crate::error::StoreError;

pub(super) const BLOCK: usize = 4096;
pub(super) const BLOCK_LEN: u64 = BLOCK as u64;
const VERSION: u32 = 1;
const CRC: std::ops::Range<usize> = 12..16;
const GENERATION: usize = 16;
const MUST_UNDERSTAND: usize = 24;
const READ_ONLY: usize = 32;
const ID: usize = 48;

/// No file is updated so often. It bounds what a file may claim, so that counting on from there cannot overflow.
pub(super) const LAST_GENERATION: u64 = 1 << 62;

/// One record.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Record(Box<[u8; BLOCK]>);

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Record(generation {})", self.generation())
    }
}

/// What a file is opened for: decides which unknown features are in the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    Read,
    Write,
}

impl Record {
    pub(super) fn new(magic: &[u8; 8], id: [u8; 16]) -> Self {
        let mut record = Self(Box::new([0; BLOCK]));
        record.put(0, magic);
        record.put(8, &VERSION.to_le_bytes());
        record.put(ID, &id);
        record
    }

    /// A record as it was read, if it is whole.
    pub(super) fn parse(bytes: &[u8; BLOCK], magic: &[u8; 8]) -> Option<Self> {
        let record = Self(Box::new(*bytes));
        (&record.bytes_at::<8>(0) == magic && record.u32_at(CRC.start) == record.crc()).then_some(record)
    }

    fn crc(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.0[..CRC.start]);
        hasher.update(&[0; 4]);
        hasher.update(&self.0[CRC.end..]);
        hasher.finalize()
    }

    /// Its bytes, with the checksum put right.
    pub(super) fn sealed(&mut self) -> &[u8; BLOCK] {
        let crc = self.crc();
        self.put(CRC.start, &crc.to_le_bytes());
        &self.0
    }

    pub(super) fn bytes_at<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[at..at + N]);
        bytes
    }

    pub(super) fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes_at(at))
    }

    pub(super) fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes_at(at))
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn id(&self) -> [u8; 16] {
        self.bytes_at(ID)
    }

    pub(super) fn generation(&self) -> u64 {
        self.u64_at(GENERATION)
    }

    /// Refuses versions and features that this code does not know. It knows version 1 and none of the features yet.
    pub(super) fn check_known(&self, file: &Arc<str>, purpose: Purpose) -> Result<(), StoreError> {
        let version = self.u32_at(8);
        let (must, read_only) = (self.u64_at(MUST_UNDERSTAND), self.u64_at(READ_ONLY));
        let unknown = |features, what| StoreError::Unknown { file: file.clone(), version, features, what };
        if version != VERSION || must != 0 {
            return Err(unknown(must, "read"));
        }
        if purpose == Purpose::Write && read_only != 0 {
            return Err(unknown(read_only, "write"));
        }
        Ok(())
    }
}

/// The two copies of a record at the start of a file.
#[derive(Debug)]
pub(super) struct RecordPair {
    current: Record,
    /// Which copy is the newest: the other is written first.
    newest: Which,
    /// The other copy is not the same, or not whole.
    differs: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Which {
    First,
    Second,
}

impl Which {
    const fn at(self) -> u64 {
        match self {
            Self::First => 0,
            Self::Second => BLOCK_LEN,
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

impl RecordPair {
    /// Writes both copies of a new record. The caller syncs.
    pub(super) fn create(file: &NamedFile, mut record: Record) -> Result<Self, StoreError> {
        record.put(GENERATION, &1u64.to_le_bytes());
        let bytes = record.sealed();
        file.write(0, bytes)?;
        file.write(BLOCK_LEN, bytes)?;
        Ok(Self { current: record, newest: Which::Second, differs: false })
    }

    /// Reads the newest copy that is whole.
    pub(super) fn load(file: &NamedFile, magic: &[u8; 8], purpose: Purpose) -> Result<Self, StoreError> {
        let read = |copy: Which| {
            let mut bytes = [0; BLOCK];
            file.read(copy.at(), &mut bytes)?;
            Ok::<_, StoreError>(Record::parse(&bytes, magic))
        };
        let (first, second) = (read(Which::First)?, read(Which::Second)?);
        let differs = first != second;
        let (current, newest) = match (first, second) {
            (Some(first), Some(second)) if first.id() != second.id() => {
                return Err(file.damaged("its two records belong to different files", 0));
            }
            (Some(first), Some(second)) if first.generation() > second.generation() => (first, Which::First),
            (_, Some(second)) => (second, Which::Second),
            (Some(first), None) => (first, Which::First),
            (None, None) => return Err(file.damaged("neither of its two records is whole", 0)),
        };
        current.check_known(file.name(), purpose)?;
        if current.generation() > LAST_GENERATION {
            return Err(file.limit("updates", current.generation(), LAST_GENERATION));
        }
        Ok(Self { current, newest, differs })
    }

    pub(super) fn record(&self) -> &Record {
        &self.current
    }

    /// Makes both copies the same, if a crash or rot made them differ.
    pub(super) fn heal(&mut self, file: &NamedFile) -> Result<(), StoreError> {
        if self.differs {
            file.write(self.newest.other().at(), self.current.sealed())?;
            file.sync()?;
            self.differs = false;
        }
        Ok(())
    }

    /// Changes the record, durably. After an error either the old or the new one is found when the file is opened.
    pub(super) fn update(&mut self, file: &NamedFile, edit: impl FnOnce(&mut Record)) -> Result<(), StoreError> {
        self.heal(file)?;
        let mut next = self.current.clone();
        edit(&mut next);
        next.put(GENERATION, &(self.current.generation() + 1).to_le_bytes());
        let first = self.newest.other();
        self.differs = true;
        file.write(first.at(), next.sealed())?;
        // From here on the old copy is the older one, whatever becomes of it.
        file.sync()?;
        (self.current, self.newest) = (next, first);
        self.heal(file)
    }
}
