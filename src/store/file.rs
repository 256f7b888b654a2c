//! A medium with a name: errors that say which file, and the rule that a failed sync is never forgotten.
//!
//! fsync(2) may drop the pages that it could not write, and succeed the next time: so after one failure no sync of this file is
//! believed, nor tried, until it is opened again. Must not know what is in a file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::medium::Medium;
use super::record::BLOCK_LEN;
use crate::error::StoreError;
use crate::page::{ByteOffset, ByteSize};

/// An open file of the store.
#[derive(Debug)]
pub(super) struct NamedFile {
    name: Arc<str>,
    medium: Arc<dyn Medium>,
    sync_failed: AtomicBool,
}

/// What of a file is settled when it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// It will be written: everything.
    All,
    /// It is read. If its records say that it is frozen, and are durable, so is the rest; and others want it in the cache.
    Records,
}

/// Gives an error of the system its meaning.
pub(super) fn error(file: &Arc<str>, call: &'static str, error: io::Error) -> StoreError {
    let file = file.clone();
    match error.kind() {
        io::ErrorKind::NotFound => StoreError::Missing { file },
        io::ErrorKind::AlreadyExists => StoreError::Exists { file },
        io::ErrorKind::WouldBlock => StoreError::InUse { file },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            StoreError::NoSpace { file, call }
        }
        _ => StoreError::Io { file, call, error: Arc::new(error) },
    }
}

impl NamedFile {
    pub(super) fn new(name: Arc<str>, medium: Arc<dyn Medium>) -> Self {
        Self { name, medium, sync_failed: AtomicBool::new(false) }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn told<T>(&self, call: &'static str, result: io::Result<T>) -> Result<T, StoreError> {
        result.map_err(|found| error(&self.name, call, found))
    }

    pub(super) fn damaged(&self, what: &'static str, at: u64) -> StoreError {
        StoreError::Damaged { file: self.name.clone(), what, at: ByteOffset::new(at) }
    }

    pub(super) fn limit(&self, what: &'static str, found: u64, limit: u64) -> StoreError {
        StoreError::Limit { file: self.name.clone(), what, found, limit }
    }

    pub(super) fn chain(&self, what: &'static str) -> StoreError {
        StoreError::Chain { file: self.name.clone(), what }
    }

    pub(super) fn len(&self) -> Result<u64, StoreError> {
        Ok(self.told("length", self.medium.len())?.get())
    }

    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        match self.medium.read_at(ByteOffset::new(at), buf) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.damaged("the file ends here", at)),
            result => self.told("read", result),
        }
    }

    /// Writes, unless a sync has failed.
    pub(super) fn write(&self, at: u64, data: &[u8]) -> Result<(), StoreError> {
        self.check_synced()?;
        self.told("write", self.medium.write_at(ByteOffset::new(at), data))
    }

    pub(super) fn set_len(&self, len: u64) -> Result<(), StoreError> {
        self.told("set length", self.medium.set_len(ByteSize::new(len)))
    }

    /// Fails once a sync has failed.
    pub(super) fn check_synced(&self) -> Result<(), StoreError> {
        match self.sync_failed.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(StoreError::SyncFailed { file: self.name.clone() }),
        }
    }

    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.check_synced()?;
        self.told("sync", self.medium.sync()).inspect_err(|_| self.sync_failed.store(true, Ordering::Release))
    }

    /// Gives space back; `false` where the file system has no holes.
    pub(super) fn punch(&self, at: u64, len: u64) -> Result<bool, StoreError> {
        match self.medium.punch(ByteOffset::new(at), ByteSize::new(len)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => self.told("punch", Err(error)),
        }
    }

    pub(super) fn allocated(&self) -> Result<ByteSize, StoreError> {
        self.told("space", self.medium.allocated())
    }

    /// Makes what earlier holders left behind durable before anything is built on it, and forgets what only memory has: a sync of theirs may
    /// have failed.
    pub(super) fn settle(&self, part: Part) -> Result<(), StoreError> {
        self.sync()?;
        let len = match part {
            Part::All => self.len()?,
            Part::Records => 2 * BLOCK_LEN,
        };
        self.told("drop cache", self.medium.forget_cached(ByteSize::new(len)))
    }

    pub(super) fn share(&self) -> Result<(), StoreError> {
        self.told("lock", self.medium.share())
    }
}
