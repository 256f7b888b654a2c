//! Memory files: what a RAM layer is stored in, first writable, then sealed.
//!
//! Owns the descriptor, its length and its seals. A [`Memfd`] can be written; sealing consumes it, and a
//! [`SealedMemfd`] has no method that writes, so no code path can change a sealed layer. Pages are position-addressed:
//! page `n` lives at byte `n * 4096`. It must not know what a layer is, nor who shares it.
//!
//! Facts about seals are from fcntl(2) and memfd_create(2).
#![allow(unsafe_code)] // pwritev and preadv take guest memory by address: a slice of it must never exist.

use std::io::IoSliceMut;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use super::error::{SysError, checked, checked_errno};
use super::fault::Call;
use super::iovec::RawIoVec;
use super::mapping::{Mapping, PAGE};
use crate::page::{ByteOffset, ByteSize, Geometry, PageRange, PageSet};

/// Which file this is, within the life of the process: two are equal only if they are the same memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

/// A memory file in either state: what may be asked of it, sealed or not.
#[derive(Debug)]
pub(crate) struct File {
    fd: OwnedFd,
    id: FileId,
    geometry: Geometry,
}

impl File {
    /// Length in bytes.
    pub(crate) fn len(&self) -> ByteSize {
        self.geometry.len()
    }

    /// Its identity.
    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// Fills `buf` from byte `at`. Holes read as zeroes and stay holes.
    ///
    /// # Errors
    /// [`SysError::Range`] past the end; otherwise those of pread(2).
    pub(crate) fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SysError> {
        self.geometry.check(at, ByteSize::new(buf.len() as u64))?;
        let (mut at, mut rest) = (at.get(), buf);
        while !rest.is_empty() {
            let n = checked(Call::Pread, || rustix::io::preadv(&self.fd, &mut [IoSliceMut::new(rest)], at))?;
            if n == 0 {
                // Seals against shrinking are on from birth, so the end cannot come early.
                return Err(SysError::Other { call: Call::Pread, errno: Errno::IO });
            }
            at += n as u64;
            rest = &mut rest[n..];
        }
        Ok(())
    }

    /// Memory (or swap) that the kernel holds for it. A hole that somebody read through a mapping counts as well, and so this grows when a clone
    /// *reads* one: the kernel has no shared zero page for memory files.
    ///
    /// # Errors
    /// Only if fstat(2) fails.
    pub(crate) fn allocated(&self) -> Result<ByteSize, SysError> {
        let stat = checked(Call::Fstat, || rustix::fs::fstat(&self.fd))?;
        Ok(ByteSize::new((stat.st_blocks as u64).saturating_mul(512)))
    }

    /// The pages of `range` that the kernel holds anything for; the others are holes and read as zeroes. Two calls for each run.
    ///
    /// # Errors
    /// [`SysError::Range`] past the end; otherwise those of lseek(2).
    pub(crate) fn data_in(&self, range: PageRange) -> Result<PageSet, SysError> {
        self.geometry.check_pages(range)?;
        let (mut at, end) = (PAGE.start_of(range.start()).get(), PAGE.start_of(range.end()).get());
        let mut set = PageSet::new();
        while at < end {
            // The position of the descriptor is nobody's: all reads and writes name their own.
            let data = match checked_errno(Call::Lseek, || rustix::fs::seek(&self.fd, SeekFrom::Data(at))) {
                // lseek(2): no data from here to the end.
                Err(Errno::NXIO) => break,
                found => found.map_err(|errno| SysError::new(Call::Lseek, errno))?,
            };
            let hole = checked(Call::Lseek, || rustix::fs::seek(&self.fd, SeekFrom::Hole(data)))?;
            let page = |at: u64| PAGE.page_of(ByteOffset::new(at.min(end)));
            set.push(PageRange::from_bounds(page(data), page(hole)));
            if hole <= at {
                return Err(SysError::Other { call: Call::Lseek, errno: Errno::IO });
            }
            at = hole;
        }
        Ok(set)
    }

    /// A descriptor of the same file for another process, closed on exec.
    ///
    /// # Errors
    /// [`SysError::OutOfDescriptors`].
    #[cfg(any(feature = "qemu", feature = "uffd"))]
    pub(crate) fn share(&self) -> Result<OwnedFd, SysError> {
        checked(Call::Dup, || rustix::io::fcntl_dupfd_cloexec(&self.fd, 0))
    }

    fn add_seals(&self, seals: SealFlags) -> Result<(), Errno> {
        checked_errno(Call::AddSeals, || rustix::fs::fcntl_add_seals(&self.fd, seals))
    }
}

/// A writable memory file of fixed length. Closed when dropped; its pages go with the last mapping of it.
#[derive(Debug)]
pub(crate) struct Memfd {
    file: File,
}

/// A memory file that nobody can write through this or any other descriptor, nor map writably shared, any more.
///
/// A shared view that was mapped before the seal can still write, until [`finish_seal`](Self::finish_seal) succeeds:
/// whoever sealed it must have moved that view out of the guest's reach first.
#[derive(Debug)]
pub(crate) struct SealedMemfd {
    file: File,
    write_sealed: AtomicBool,
}

/// Sealing did not work; the file is handed back, writable as before.
#[derive(Debug, thiserror::Error)]
#[error("sealing a memory file: {error}")]
pub(crate) struct SealFailed {
    /// The file, unchanged.
    pub(crate) memfd: Memfd,
    /// What went wrong.
    pub(crate) error: SealError,
}

/// Why a file could not be sealed at once.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    /// `EBUSY`: a writable shared mapping of it exists, or in-flight I/O pins a page of it.
    #[error("a writable shared mapping or pinned pages still exist; unmap the view and drain I/O first")]
    Busy,
    /// Anything else.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// The outcome of the final seal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FinalSeal {
    /// `F_SEAL_WRITE` is on: the kernel itself refuses every write from now on.
    Applied,
    /// A writable shared view of before the seal is still mapped, or in-flight I/O pins a page. Ask again later.
    StillMapped,
}

impl Deref for Memfd {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Memfd {
    /// A new memory file of `len` zero bytes, closed on exec, sealed against change of length. `name` is what
    /// /proc/self/maps shows (at most 249 bytes). No memory is allocated until it is written. About 2 µs.
    ///
    /// # Errors
    /// [`SysError::OutOfDescriptors`], [`SysError::OutOfMemory`], or a `len` that is not a multiple of 4 KiB.
    pub(crate) fn create(name: &str, len: ByteSize) -> Result<Self, SysError> {
        let geometry = Geometry::new(len, PAGE)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // NOEXEC_SEAL is of Linux 6.3; before that the kernel refuses unknown flags with EINVAL.
        let made = match checked_errno(Call::MemfdCreate, || {
            rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        }) {
            Err(Errno::INVAL) => checked_errno(Call::MemfdCreate, || rustix::fs::memfd_create(name, flags)),
            other => other,
        };
        let fd = made.map_err(|errno| SysError::new(Call::MemfdCreate, errno))?;
        checked(Call::Ftruncate, || rustix::fs::ftruncate(&fd, len.get()))?;
        // Nobody may shrink it under a mapping: that would turn a guest's access into SIGBUS.
        checked(Call::AddSeals, || rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK))?;
        let stat = checked(Call::Fstat, || rustix::fs::fstat(&fd))?;
        Ok(Self { file: File { fd, id: FileId { device: stat.st_dev, inode: stat.st_ino }, geometry } })
    }

    /// Writes all of `buf` at byte `at`.
    ///
    /// # Errors
    /// [`SysError::Range`] past the end, [`SysError::OutOfMemory`]. A part may have been written.
    pub(crate) fn write_at(&self, at: ByteOffset, buf: &[u8]) -> Result<(), SysError> {
        self.file.geometry.check(at, ByteSize::new(buf.len() as u64))?;
        let (mut at, mut rest) = (at.get(), buf);
        while !rest.is_empty() {
            let n = checked(Call::Pwrite, || rustix::io::pwrite(&self.file.fd, rest, at))?;
            if n == 0 {
                return Err(SysError::Other { call: Call::Pwrite, errno: Errno::IO });
            }
            at += n as u64;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// Copies pages of guest memory to the same page numbers of this file, inside the kernel, without a bounce
    /// buffer. Bytes that the guest changes meanwhile may arrive old or new. About 0.5 µs a call and, with memory
    /// that the host has at hand, 0.25 µs a page (1 to 4 µs with memory that the kernel must find and clear first).
    ///
    /// # Errors
    /// [`SysError::Range`] where `range` leaves the mapping or the file, [`SysError::OutOfMemory`]. A part may have
    /// been written.
    pub(crate) fn write_at_from(&self, mapping: &Mapping, range: PageRange) -> Result<(), SysError> {
        self.file.geometry.check_pages(range)?;
        let (ptr, len) = mapping.span(range)?;
        let start = PAGE.start_of(range.start()).get();
        let mut done = 0;
        while done < len {
            let raw = RawIoVec::new(ptr.wrapping_add(done), len - done);
            let n = checked(Call::Pwrite, || {
                // SAFETY: `span` checked that these bytes lie in the mapping, which `mapping` keeps alive.
                let source = unsafe { raw.as_io_slice() };
                rustix::io::pwritev(&self.file.fd, &[source], start + done as u64)
            })?;
            if n == 0 {
                return Err(SysError::Other { call: Call::Pwrite, errno: Errno::IO });
            }
            done += n;
        }
        Ok(())
    }

    /// Gives the memory of these pages back; they read as zeroes afterwards, in every mapping of the file.
    ///
    /// # Errors
    /// [`SysError::Range`], or those of fallocate(2).
    pub(crate) fn punch(&self, range: PageRange) -> Result<(), SysError> {
        self.file.geometry.check_pages(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let (at, len) = (PAGE.start_of(range.start()).get(), PAGE.size_of(range.count()).get());
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        checked(Call::Fallocate, || rustix::fs::fallocate(&self.file.fd, mode, at, len))
    }

    /// Refuses every later write(2), hole punch and writable shared mapping; a shared view mapped before goes on
    /// working. For a file that a guest writes through such a view: freeze the view next, unmap it when nobody waits
    /// for it, then [`SealedMemfd::finish_seal`]. About 0.3 µs.
    ///
    /// # Errors
    /// Hands the file back; [`SysError::Unsupported`] before Linux 5.1.
    pub(crate) fn seal_future_write(self) -> Result<SealedMemfd, SealFailed> {
        match self.file.add_seals(SealFlags::FUTURE_WRITE) {
            Ok(()) => Ok(SealedMemfd { file: self.file, write_sealed: AtomicBool::new(false) }),
            Err(Errno::INVAL) => {
                let why = "F_SEAL_FUTURE_WRITE needs Linux 5.1";
                Err(SealFailed { memfd: self, error: SysError::Unsupported { call: Call::AddSeals, why }.into() })
            }
            Err(errno) => Err(SealFailed { memfd: self, error: SysError::new(Call::AddSeals, errno).into() }),
        }
    }

    /// Seals completely, for a file that was only ever written by calls. With pages pinned by in-flight I/O the kernel
    /// waits some 150 ms for them before it answers.
    ///
    /// # Errors
    /// Hands the file back: [`SealError::Busy`] while a writable shared mapping or a pinned page exists.
    pub(crate) fn seal_all(self) -> Result<SealedMemfd, SealFailed> {
        match self.file.add_seals(SealFlags::WRITE) {
            Ok(()) => Ok(SealedMemfd { file: self.file, write_sealed: AtomicBool::new(true) }),
            Err(Errno::BUSY) => Err(SealFailed { memfd: self, error: SealError::Busy }),
            Err(errno) => Err(SealFailed { memfd: self, error: SysError::new(Call::AddSeals, errno).into() }),
        }
    }
}

impl Deref for SealedMemfd {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl SealedMemfd {
    /// Applies `F_SEAL_WRITE` now that the old shared view ought to be gone. Idempotent, and free once applied.
    ///
    /// # Errors
    /// Those of fcntl(2) other than `EBUSY`, which is [`FinalSeal::StillMapped`].
    pub(crate) fn finish_seal(&self) -> Result<FinalSeal, SysError> {
        if self.is_write_sealed() {
            return Ok(FinalSeal::Applied);
        }
        match self.file.add_seals(SealFlags::WRITE) {
            Ok(()) => {
                self.write_sealed.store(true, Ordering::Release);
                Ok(FinalSeal::Applied)
            }
            Err(Errno::BUSY) => Ok(FinalSeal::StillMapped),
            Err(errno) => Err(SysError::new(Call::AddSeals, errno)),
        }
    }

    /// Whether `F_SEAL_WRITE` is on.
    pub(crate) fn is_write_sealed(&self) -> bool {
        self.write_sealed.load(Ordering::Acquire)
    }

    /// Copies pages of this file over the same page numbers of a mapping, inside the kernel. In a private view the
    /// pages become private, or stay it: a clone that dirties the same pages again and again is reset cheaper this
    /// way (0.3 µs a page) than by dropping them, which costs their next writes a fault each (0.9 µs here).
    ///
    /// # Errors
    /// [`SysError::Range`] where `range` leaves the mapping or the file; [`SysError::Misuse`] for a shared view, which
    /// would write to a file; [`SysError::OutOfMemory`]. A part may have been copied.
    #[cfg(test)]
    pub(crate) fn read_into(&self, mapping: &Mapping, range: PageRange) -> Result<(), SysError> {
        if mapping.is_shared() {
            return Err(SysError::Misuse("a layer is only copied into a private view"));
        }
        self.file.geometry.check_pages(range)?;
        let (ptr, len) = mapping.span(range)?;
        let start = PAGE.start_of(range.start()).get();
        let mut done = 0;
        while done < len {
            let raw = RawIoVec::new(ptr.wrapping_add(done), len - done);
            let n = checked(Call::Pread, || {
                // SAFETY: `span` checked that these bytes lie in the mapping, which `mapping` keeps alive.
                let target = unsafe { raw.as_io_slice_mut() };
                rustix::io::preadv(&self.file.fd, &mut [target], start + done as u64)
            })?;
            if n == 0 {
                return Err(SysError::Other { call: Call::Pread, errno: Errno::IO });
            }
            done += n;
        }
        Ok(())
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.fd.as_fd()
    }
}

impl AsFd for SealedMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageIndex;

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    #[test]
    fn a_file_reads_what_was_written_and_zero_elsewhere() {
        let file = Memfd::create("offshoot-test", ByteSize::kib(64)).unwrap();
        file.write_at(ByteOffset::new(4090), b"across two pages").unwrap();
        let mut buf = [0xAA; 24];
        file.read_at(ByteOffset::new(4086), &mut buf).unwrap();
        assert_eq!(&buf, b"\0\0\0\0across two pages\0\0\0\0");
        assert_eq!(file.allocated().unwrap(), ByteSize::kib(8));
        file.punch(pages(0, 1)).unwrap();
        assert_eq!(file.allocated().unwrap(), ByteSize::kib(4));
        assert!(matches!(file.read_at(ByteOffset::new(65530), &mut buf), Err(SysError::Range(_))));
        assert!(matches!(file.write_at(ByteOffset::new(u64::MAX), b"x"), Err(SysError::Range(_))));
        assert!(matches!(file.punch(pages(15, 17)), Err(SysError::Range(_))));
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        assert!(matches!(Memfd::create("offshoot-test", ByteSize::new(5000)), Err(SysError::Range(_))));
        assert!(matches!(Memfd::create("offshoot-test", ByteSize::ZERO), Err(SysError::Range(_))));
    }

    #[test]
    fn the_length_is_sealed_from_birth() {
        let file = Memfd::create("offshoot-test", ByteSize::kib(8)).unwrap();
        assert_eq!(rustix::fs::ftruncate(&file, 4096), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&file, 1 << 20), Err(Errno::PERM));
    }

    #[test]
    fn a_sealed_file_refuses_writes_and_punches() {
        for seal in [Memfd::seal_future_write, Memfd::seal_all] {
            let file = Memfd::create("offshoot-test", ByteSize::kib(8)).unwrap();
            file.write_at(ByteOffset::ZERO, b"kept").unwrap();
            let sealed = seal(file).unwrap();
            assert_eq!(rustix::io::pwrite(&sealed, b"lost", 0), Err(Errno::PERM));
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            assert_eq!(rustix::fs::fallocate(&sealed, mode, 0, 4096), Err(Errno::PERM));
            assert!(Mapping::map_shared_fd_is_refused(&sealed));
            let mut buf = [0; 4];
            sealed.read_at(ByteOffset::ZERO, &mut buf).unwrap();
            assert_eq!(&buf, b"kept");
            assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
            assert!(sealed.is_write_sealed());
        }
    }

    #[test]
    fn the_final_seal_waits_for_the_shared_view() {
        let file = Memfd::create("offshoot-test", ByteSize::kib(8)).unwrap();
        let view = Mapping::map_shared(&file, ByteSize::kib(8)).unwrap();
        let failed = file.seal_all().unwrap_err();
        assert!(matches!(failed.error, SealError::Busy));
        failed.memfd.write_at(ByteOffset::ZERO, b"still writable").unwrap();
        let sealed = failed.memfd.seal_future_write().unwrap();
        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::StillMapped);
        assert!(!sealed.is_write_sealed());
        drop(view);
        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
    }

    #[test]
    fn pages_go_from_a_mapping_to_the_same_place() {
        let len = ByteSize::kib(64);
        let source = Memfd::create("offshoot-test", len).unwrap();
        let view = Mapping::map_shared(&source, len).unwrap();
        view.write(ByteOffset::new(3 * 4096), &[7; 8192]).unwrap();
        let copy = Memfd::create("offshoot-test", len).unwrap();
        copy.write_at_from(&view, pages(4, 6)).unwrap();
        let mut buf = vec![0xAA; 4 * 4096];
        copy.read_at(ByteOffset::new(3 * 4096), &mut buf).unwrap();
        assert!(buf[..4096].iter().all(|&b| b == 0));
        assert!(buf[4096..8192].iter().all(|&b| b == 7));
        assert!(buf[8192..].iter().all(|&b| b == 0));
        assert!(copy.write_at_from(&view, pages(15, 17)).is_err());
    }

    #[test]
    fn a_layers_pages_go_over_a_clones() {
        let len = ByteSize::kib(64);
        let file = Memfd::create("offshoot-test", len).unwrap();
        file.write_at(ByteOffset::ZERO, &[5; 65536]).unwrap();
        let sealed = file.seal_all().unwrap();
        let clone = Mapping::map_private(&sealed, len, crate::sys::mapping::Placement::Anywhere).unwrap();
        clone.write(ByteOffset::ZERO, &[9; 65536]).unwrap();
        sealed.read_into(&clone, pages(2, 4)).unwrap();
        let mut expected = [9; 16];
        expected[2..4].fill(5);
        assert_eq!(clone.marks(), expected);
        assert!(sealed.read_into(&clone, pages(15, 17)).is_err());
        let other = Memfd::create("offshoot-test", len).unwrap();
        let shared = Mapping::map_shared(&other, len).unwrap();
        assert!(matches!(sealed.read_into(&shared, pages(0, 1)), Err(SysError::Misuse(_))));
    }

    #[test]
    fn creation_that_fails_at_any_call_leaves_nothing() {
        let count = |name: &str| {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
                .filter(|link| link.to_string_lossy().contains(name))
                .count()
        };
        let name = "offshoot-test-creation-leak";
        for n in 1.. {
            let plan = super::super::fault::plan::arm(n, Errno::MFILE);
            let made = Memfd::create(name, ByteSize::kib(8));
            let seen = super::super::fault::plan::calls_seen();
            drop(plan);
            if seen < n {
                assert!(made.is_ok());
                assert_eq!(count(name), 1);
                break;
            }
            assert!(matches!(made, Err(SysError::OutOfDescriptors { .. })));
            assert_eq!(count(name), 0);
        }
    }
}
