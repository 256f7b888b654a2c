//! A file that is there whole or not at all: written under another name beside its target, synced, then renamed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::FormatError;

/// Where a writer of a format puts its bytes.
pub(super) trait Output {
    /// Writes all of `bytes` at `at`.
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes the file `len` bytes long; what was not written reads as zeroes.
    fn set_len(&mut self, len: u64) -> io::Result<()>;
}

/// The file while it is written. Dropped before it is finished, it is removed.
pub(super) struct PartFile {
    file: File,
    part: PathBuf,
    target: PathBuf,
    renamed: bool,
}

/// Tells parts of one process apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl PartFile {
    pub(super) fn create(target: &Path) -> Result<Self, FormatError> {
        let Some(name) = target.file_name() else {
            return Err(FormatError::io(target, io::Error::from(io::ErrorKind::InvalidInput)));
        };
        let mut part = std::ffi::OsString::from(".");
        part.push(name);
        // Relaxed: only uniqueness is asked of it.
        part.push(format!(".{}-{}.part", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let part = target.with_file_name(part);
        let file = OpenOptions::new().write(true).create_new(true).open(&part);
        let file = file.map_err(|error| FormatError::io(&part, error))?;
        Ok(Self { file, part, target: target.to_owned(), renamed: false })
    }

    /// Makes it durable under its name. An older file of that name is replaced in one step.
    pub(super) fn finish(mut self) -> Result<(), FormatError> {
        let failed = |error| FormatError::io(&self.target, error);
        self.file.sync_all().map_err(failed)?;
        let parent = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Opened before the rename, so that what is left to fail after it is only the sync.
        let directory = File::open(parent).map_err(failed)?;
        std::fs::rename(&self.part, &self.target).map_err(failed)?;
        self.renamed = true;
        directory.sync_all().map_err(|error| FormatError::io(&self.target, error))
    }
}

impl Output for PartFile {
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing to do about a failure: the error that led here is the one to report.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}
