//! The database that keeps the catalogue, with its panics turned into errors.
//!
//! It checks its file with checksums, and asserts where one that passes says what cannot be. What is damaged must not take a hypervisor down: a panic is
//! caught, the file is let go of, and nothing is asked of the database again. Must not know what is in it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::RwLock;
use redb::{Database, StorageBackend};

use super::error::CloneError;
use crate::page::{ByteOffset, ByteSize};
use crate::store::medium::Medium;

/// Rows are few and small.
const CACHE_BYTES: usize = 4 << 20;

pub(super) fn failed(error: impl std::fmt::Display) -> CloneError {
    CloneError::Catalogue { what: error.to_string() }
}

pub(super) fn damaged(what: &str) -> CloneError {
    CloneError::Catalogue { what: format!("it is damaged: {what}") }
}

/// An open database.
pub(super) struct Guarded {
    /// `None` only while it is dropped.
    database: Option<Database>,
    file: Backend,
}

impl Guarded {
    pub(super) fn open(medium: Arc<dyn Medium>) -> Result<Self, CloneError> {
        let file = Backend(Arc::new(RwLock::new(Some(medium))));
        let open = || {
            Database::builder()
                .set_cache_size(CACHE_BYTES)
                .create_with_file_format_v3(true)
                .create_with_backend(file.clone())
                .map_err(failed)
        };
        let database = file.caught(open)?;
        Ok(Self { database: Some(database), file })
    }

    /// Uses it.
    pub(super) fn with<T>(&self, call: impl FnOnce(&Database) -> Result<T, CloneError>) -> Result<T, CloneError> {
        match &self.database {
            Some(database) if self.file.0.read().is_some() => self.file.caught(|| call(database)),
            _ => Err(damaged("the database gave up on it")),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let Some(database) = self.database.take() else { return };
        if self.file.0.read().is_none() {
            // Nobody knows what state it is in.
            std::mem::forget(database);
        } else if let Err(error) = self.file.caught(|| {
            drop(database);
            Ok(())
        }) {
            tracing::error!(%error, "the catalogue was not closed as it should be");
        }
    }
}

/// A file of the store, as the database wants it, until it is let go of.
#[derive(Clone, Debug)]
struct Backend(Arc<RwLock<Option<Arc<dyn Medium>>>>);

impl Backend {
    fn caught<T>(&self, call: impl FnOnce() -> Result<T, CloneError>) -> Result<T, CloneError> {
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            // Its lock goes with it.
            *self.0.write() = None;
            Err(damaged("the database gave up on it"))
        })
    }

    fn file(&self) -> io::Result<Arc<dyn Medium>> {
        self.0.read().clone().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.file()?.len().map(ByteSize::get)
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let file = self.file()?;
        // Asked for by a file that may claim anything: no more memory than there are bytes.
        if offset.checked_add(len as u64).is_none_or(|end| file.len().is_ok_and(|all| all.get() < end)) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; len];
        file.read_at(ByteOffset::new(offset), &mut bytes)?;
        Ok(bytes)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file()?.set_len(ByteSize::new(len))
    }

    fn sync_data(&self, _eventual: bool) -> io::Result<()> {
        self.file()?.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file()?.write_at(ByteOffset::new(offset), data)
    }
}
