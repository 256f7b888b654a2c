//! Files of durable disks and the directory that they lie in: positional reads and writes, syncs, holes, locks, names.
//!
//! Every call passes the fault plan and is made again where a signal interrupts it. Errors are plain [`io::Error`]s: what one
//! means for a disk is decided above. It must not know what is in a file. Entirely safe code.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::fault::{Call, check};

/// Passes `call` through the fault plan, makes it, and repeats it while a signal interrupts it.
fn checked<T>(call: Call, mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match check(call).map_err(io::Error::from).and_then(|()| make()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Who else may hold a file open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lock {
    /// Nobody.
    Exclusive,
    /// Others that ask for the same.
    Shared,
}

/// One file of a disk. Closed, and its lock given up, when dropped.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
}

impl DiskFile {
    /// Fills `buf` from byte `at`; past the end is `UnexpectedEof`.
    pub(crate) fn read_at(&self, mut at: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let n = checked(Call::Pread, || self.file.read_at(buf, at))?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += n as u64;
            buf = &mut buf[n..];
        }
        Ok(())
    }

    /// Writes all of `data` at byte `at`. On an error a part of it may have been written.
    pub(crate) fn write_at(&self, mut at: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let n = checked(Call::Pwrite, || self.file.write_at(data, at))?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += n as u64;
            data = &data[n..];
        }
        Ok(())
    }

    /// Makes everything written durable, and the length.
    pub(crate) fn sync(&self) -> io::Result<()> {
        checked(Call::Fdatasync, || self.file.sync_data())
    }

    /// Makes a hole, which reads as zeroes. `Unsupported` where the file system has none.
    #[cfg(target_os = "linux")]
    pub(crate) fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        checked(Call::Fallocate, || Ok(rustix::fs::fallocate(&self.file, flags, at, len)?))
    }

    /// Only Linux has it in this form.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Has later reads of the first `len` bytes come from the medium rather than from memory, as far as the system can be asked to.
    #[cfg(target_os = "linux")]
    pub(crate) fn forget_cached(&self, len: u64) -> io::Result<()> {
        use rustix::fs::{Advice, fadvise};
        checked(Call::Fadvise, || Ok(fadvise(&self.file, 0, std::num::NonZeroU64::new(len), Advice::DontNeed)?))
    }

    /// Other systems cannot be asked.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn forget_cached(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        checked(Call::Ftruncate, || self.file.set_len(len))
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(checked(Call::Fstat, || self.file.metadata())?.len())
    }

    /// Bytes that the file system holds for it.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        let metadata = checked(Call::Fstat, || self.file.metadata())?;
        Ok(std::os::unix::fs::MetadataExt::blocks(&metadata).saturating_mul(512))
    }

    /// Takes or changes the lock; `WouldBlock` where somebody else's is in the way.
    fn lock(&self, lock: Lock) -> io::Result<()> {
        let operation = match lock {
            Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
            Lock::Shared => FlockOperation::NonBlockingLockShared,
        };
        checked(Call::Flock, || Ok(rustix::fs::flock(&self.file, operation)?))
    }

    /// From now on others may hold it open for reading.
    pub(crate) fn share(&self) -> io::Result<()> {
        // flock(2): a change of lock is not atomic. Who takes it between finds a file that is not to be written, and lets go: wait.
        checked(Call::Flock, || Ok(rustix::fs::flock(&self.file, FlockOperation::LockShared)?))
    }
}

/// A directory of disk files. Names are single components without separators.
#[derive(Debug)]
pub(crate) struct DiskDirectory {
    path: PathBuf,
    handle: File,
}

impl DiskDirectory {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let handle = checked(Call::Open, || File::open(path))?;
        if !checked(Call::Fstat, || handle.metadata())?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { path: path.into(), handle })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A new file, locked.
    pub(crate) fn create(&self, name: &str, lock: Lock) -> io::Result<DiskFile> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = DiskFile { file: checked(Call::Open, || options.open(&path))? };
        file.lock(lock)?;
        Ok(file)
    }

    /// A file that is there, locked. Opened for writing only where it is to be held alone.
    pub(crate) fn open_file(&self, name: &str, lock: Lock) -> io::Result<DiskFile> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        // A name may have become a link to something else: it is not followed.
        options.read(true).write(lock == Lock::Exclusive).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        let file = DiskFile { file: checked(Call::Open, || options.open(&path))? };
        if !checked(Call::Fstat, || file.file.metadata())?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        file.lock(lock)?;
        Ok(file)
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        checked(Call::Rename, || std::fs::rename(self.path.join(from), self.path.join(to)))
    }

    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        checked(Call::Unlink, || std::fs::remove_file(self.path.join(name)))
    }

    /// The names in it, in no order. Those that are not text are nobody's here.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let entries = checked(Call::Readdir, || std::fs::read_dir(&self.path))?;
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    /// Makes names created, renamed and removed durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        checked(Call::Fsync, || self.handle.sync_all())
    }
}
