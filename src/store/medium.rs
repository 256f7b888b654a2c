//! What a durable file and a directory of them are to this module: two small traits, and the real thing.
//!
//! All state on disk goes through here and nothing else, so that tests can record every call, rebuild each state that a power cut
//! could leave behind ([`testing::crash`](crate::testing::crash)), and fail any call. Must not know what is in a file.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::page::{ByteOffset, ByteSize};
use crate::sys::disk_file::{self, DiskDirectory, DiskFile};

/// One file, shared by all threads.
///
/// # Contract
/// What was written is durable once a later [`sync`](Medium::sync) returned `Ok`, and anything may be left of it before that, sector
/// by sector of 512 bytes. After a failed sync nothing is known of what was written before it.
pub trait Medium: Send + Sync + fmt::Debug {
    /// Its length.
    ///
    /// # Errors
    /// What the system says, as everywhere below.
    fn len(&self) -> io::Result<ByteSize>;

    /// Whether it is empty.
    ///
    /// # Errors
    /// As [`Medium::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == ByteSize::ZERO)
    }

    /// Fills `buf` from `at`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `at`.
    ///
    /// # Errors
    /// A part may have been written.
    fn write_at(&self, at: ByteOffset, data: &[u8]) -> io::Result<()>;

    /// Makes all that was written, punched or set durable.
    ///
    /// # Errors
    /// Nothing is then known of what was written before.
    fn sync(&self) -> io::Result<()>;

    /// Gives the space of a range back. It reads as zeroes from then on.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where there are no holes.
    fn punch(&self, at: ByteOffset, len: ByteSize) -> io::Result<()>;

    /// Makes it this long; what is new reads as zeroes.
    ///
    /// # Errors
    /// As above.
    fn set_len(&self, len: ByteSize) -> io::Result<()>;

    /// The space that it takes.
    ///
    /// # Errors
    /// As above.
    fn allocated(&self) -> io::Result<ByteSize>;

    /// Has later reads of the first `len` bytes come from the medium rather than from a cache, as far as can be.
    ///
    /// # Errors
    /// As above.
    fn forget_cached(&self, len: ByteSize) -> io::Result<()>;

    /// Lets others hold it open for reading, who was alone with it until now.
    ///
    /// # Errors
    /// As above.
    fn share(&self) -> io::Result<()>;
}

/// Who else may hold a file open. Files are locked for as long as they are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Nobody: the holder may write.
    Alone,
    /// Others that share it too: nobody writes.
    Readers,
}

/// A directory of files, flat: names are given by this module, and have no separators.
pub trait Folder: Send + Sync + fmt::Debug {
    /// A new file of no bytes, held alone.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>>;

    /// A file that is there.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`]; [`io::ErrorKind::WouldBlock`] where somebody holds it who does not share.
    fn open(&self, name: &str, sharing: Sharing) -> io::Result<Arc<dyn Medium>>;

    /// Gives a file another name, in one step; a file that had it is gone.
    ///
    /// # Errors
    /// As above.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Takes a name away.
    ///
    /// # Errors
    /// As above.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// All names.
    ///
    /// # Errors
    /// As above.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Makes creations, renames and removals durable.
    ///
    /// # Errors
    /// As above.
    fn sync(&self) -> io::Result<()>;
}

/// How much a directory is worth to its owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lifetime {
    /// What is in it outlives the process and the power.
    Kept,
    /// It goes with its last user: nothing in it needs to survive anything, so nothing is synced.
    Scratch,
}

/// A directory of the file system.
#[derive(Debug)]
pub(super) struct SystemFolder {
    directory: DiskDirectory,
    lifetime: Lifetime,
}

impl SystemFolder {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { directory: DiskDirectory::open(path)?, lifetime: Lifetime::Kept })
    }

    /// A new directory of the system's for temporary files, which goes when this is dropped.
    pub(super) fn scratch(name: &str) -> io::Result<Self> {
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        match DiskDirectory::open(&path) {
            Ok(directory) => Ok(Self { directory, lifetime: Lifetime::Scratch }),
            Err(error) => {
                // Nothing is in it yet; if it cannot be removed either, the first error is the one to tell.
                std::fs::remove_dir(&path).ok();
                Err(error)
            }
        }
    }

    fn file(&self, file: DiskFile) -> Arc<dyn Medium> {
        Arc::new(SystemFile { file, lifetime: self.lifetime })
    }
}

/// A directory of the file system, as what this module lies on: to put something in between.
///
/// # Errors
/// What the system says.
pub fn open_folder(path: impl AsRef<Path>) -> io::Result<Arc<dyn Folder>> {
    Ok(Arc::new(SystemFolder::open(path.as_ref())?))
}

impl Drop for SystemFolder {
    fn drop(&mut self) {
        if self.lifetime == Lifetime::Scratch
            && let Err(error) = std::fs::remove_dir_all(self.directory.path())
        {
            tracing::warn!(%error, path = %self.directory.path().display(), "a scratch directory was left behind");
        }
    }
}

impl Folder for SystemFolder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        Ok(self.file(self.directory.create(name, disk_file::Lock::Exclusive)?))
    }

    fn open(&self, name: &str, sharing: Sharing) -> io::Result<Arc<dyn Medium>> {
        let lock = match sharing {
            Sharing::Alone => disk_file::Lock::Exclusive,
            Sharing::Readers => disk_file::Lock::Shared,
        };
        Ok(self.file(self.directory.open_file(name, lock)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.directory.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.directory.remove(name)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.directory.names()
    }

    fn sync(&self) -> io::Result<()> {
        if self.lifetime == Lifetime::Scratch { Ok(()) } else { self.directory.sync() }
    }
}

/// A file of the file system.
#[derive(Debug)]
struct SystemFile {
    file: DiskFile,
    lifetime: Lifetime,
}

impl Medium for SystemFile {
    fn len(&self) -> io::Result<ByteSize> {
        Ok(ByteSize::new(self.file.len()?))
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at.get(), buf)
    }

    fn write_at(&self, at: ByteOffset, data: &[u8]) -> io::Result<()> {
        self.file.write_at(at.get(), data)
    }

    fn sync(&self) -> io::Result<()> {
        if self.lifetime == Lifetime::Scratch { Ok(()) } else { self.file.sync() }
    }

    fn punch(&self, at: ByteOffset, len: ByteSize) -> io::Result<()> {
        self.file.punch(at.get(), len.get())
    }

    fn set_len(&self, len: ByteSize) -> io::Result<()> {
        self.file.set_len(len.get())
    }

    fn allocated(&self) -> io::Result<ByteSize> {
        Ok(ByteSize::new(self.file.allocated()?))
    }

    fn forget_cached(&self, len: ByteSize) -> io::Result<()> {
        if self.lifetime == Lifetime::Scratch { Ok(()) } else { self.file.forget_cached(len.get()) }
    }

    fn share(&self) -> io::Result<()> {
        self.file.share()
    }
}
