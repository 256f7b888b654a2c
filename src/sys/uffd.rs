//! Asynchronous write protection: the kernel notes by itself which protected pages were written, and nobody waits.
//!
//! Owns a userfaultfd that is registered over a private mapping with `UFFD_FEATURE_WP_ASYNC`: a write to a protected page clears
//! the page's protection inside the kernel (0.5 µs) and goes on; no event is sent, no handler exists, and a descriptor that is
//! closed hangs nobody. Protecting pages and finding the written ones is [`written`](super::written)'s business. It
//! must not know what pages are watched for.
//!
//! The descriptor is opened with `UFFD_USER_MODE_ONLY`, which needs no privilege whatever `vm.unprivileged_userfaultfd` says. The
//! restriction is on faults that are *handled*, and in this mode none are: writes by the kernel (read(2) into guest memory, KVM)
//! clear the protection like any other.
//!
//! What it cannot see: writes through pages that are pinned (vhost, VFIO, `O_DIRECT`, io_uring's fixed buffers). They take no fault.
//!
//! Facts are from uapi/linux/userfaultfd.h and userfaultfd(2).
#![allow(unsafe_code)] // A system call that changes how faults in a range are taken, and ioctls over pointers.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;

use super::error::{SysError, checked_errno};
use super::fault::Call;
use super::mapping::Mapping;
use crate::page::PageRange;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Register>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);

const GROUP: u8 = 0xAA;
const UFFDIO_API: Opcode = opcode::read_write::<Api>(GROUP, 0x3F);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(GROUP, 0x06);

const API: u64 = 0xAA;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const USER_MODE_ONLY: u32 = 1;

/// Why there is no write protection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UffdError {
    /// A kernel before 6.7, or built without userfaultfd.
    #[error("asynchronous write protection needs Linux 6.7 with CONFIG_USERFAULTFD")]
    Unsupported,
    /// A seccomp filter or a security module refuses.
    #[error("userfaultfd(2) is not permitted: allow it in the seccomp profile or security policy")]
    NotPermitted,
    /// Part of the range is registered with a userfaultfd of somebody else's.
    #[error("the memory is registered with another userfaultfd")]
    Taken,
    /// Anything else.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// A userfaultfd for asynchronous write protection. Closing it lifts all protection and registration, which takes some 10 ms per GiB
/// that has page tables; after the mapping is gone it is free.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// A descriptor that watches nothing yet. About 3 µs.
    ///
    /// # Errors
    /// [`UffdError`], but for `Taken`.
    pub(crate) fn open() -> Result<Self, UffdError> {
        let flags =
            UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        let fd = checked_errno(Call::Userfaultfd, || {
            // SAFETY: a descriptor that no range is registered with changes nothing; `register` says what changes then.
            unsafe { rustix::mm::userfaultfd(flags) }
        });
        let fd = fd.map_err(|errno| match errno {
            // EINVAL: a kernel before 5.11 does not know the flag.
            Errno::NOSYS | Errno::INVAL => UffdError::Unsupported,
            Errno::PERM | Errno::ACCESS => UffdError::NotPermitted,
            errno => SysError::new(Call::Userfaultfd, errno).into(),
        })?;
        let mut api = Api { api: API, features: FEATURE_WP_ASYNC, ioctls: 0 };
        let agreed = checked_errno(Call::UffdApi, || {
            // SAFETY: this opcode takes a `struct uffdio_api`, which lives during the call.
            unsafe { rustix::ioctl::ioctl(&fd, Updater::<UFFDIO_API, Api>::new(&mut api)) }
        });
        match agreed {
            Ok(()) => Ok(Self { fd }),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTTY) => Err(UffdError::Unsupported),
            Err(errno) => Err(SysError::new(Call::UffdApi, errno).into()),
        }
    }

    /// Watches all of a private mapping; what is watched already stays as it is, so that it may be repeated after part was mapped
    /// anew. Protects nothing. About 0.5 µs for each kernel mapping.
    ///
    /// # Errors
    /// [`UffdError`]. Some kernel mappings may be watched.
    pub(crate) fn register(&self, mapping: &Mapping) -> Result<(), UffdError> {
        if mapping.is_shared() {
            return Err(SysError::Misuse("only a private view is watched for writes").into());
        }
        let mut register =
            Register { range: range_of(mapping, mapping.geometry().all())?, mode: REGISTER_MODE_WP, ioctls: 0 };
        let made = checked_errno(Call::UffdRegister, || {
            // SAFETY: this opcode takes a `struct uffdio_register`, which lives during the call. The range is owned by
            // `mapping`; in asynchronous mode faults in it are served by the kernel as before, so no access can block.
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<UFFDIO_REGISTER, Register>::new(&mut register)) }
        });
        made.map_err(|errno| match errno {
            Errno::BUSY => UffdError::Taken,
            // EINVAL: a kernel that cannot protect mappings of this kind.
            Errno::INVAL | Errno::NOSYS => UffdError::Unsupported,
            errno => SysError::new(Call::UffdRegister, errno).into(),
        })
    }

    /// Lifts the protection of pages: they count as written from now on. About 1 µs a call and 0.1 µs a page.
    ///
    /// # Errors
    /// [`SysError::Range`]; `ENOENT` where part of the range is not registered. Part may have been lifted.
    pub(crate) fn unprotect(&self, mapping: &Mapping, pages: PageRange) -> Result<(), SysError> {
        if pages.is_empty() {
            return Ok(());
        }
        let mut lift = WriteProtect { range: range_of(mapping, pages)?, mode: 0 };
        let made = checked_errno(Call::UffdWriteProtect, || {
            // SAFETY: this opcode takes a `struct uffdio_writeprotect`, which lives during the call; the range is owned
            // by `mapping`, and lifting protection changes no content.
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<UFFDIO_WRITEPROTECT, WriteProtect>::new(&mut lift)) }
        });
        made.map_err(|errno| SysError::new(Call::UffdWriteProtect, errno))
    }
}

fn range_of(mapping: &Mapping, pages: PageRange) -> Result<Range, SysError> {
    let (base, len) = mapping.span(pages)?;
    Ok(Range { start: base.addr() as u64, len: len as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteOffset, ByteSize, PageIndex, PageSet};
    use crate::sys::fault::plan;
    use crate::sys::mapping::{PAGE, Placement, Populate};
    use crate::sys::memfd::{Memfd, SealedMemfd};
    use crate::sys::pagemap::{Pagemap, ScanMethod};

    const LEN: ByteSize = ByteSize::mib(8);

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    fn set(pages: &[u64]) -> PageSet {
        pages.iter().copied().map(PageIndex::new).collect()
    }

    fn sealed() -> SealedMemfd {
        let file = Memfd::create("offshoot-test", LEN).unwrap();
        file.write_at(ByteOffset::ZERO, &vec![1; LEN.get() as usize]).unwrap();
        file.seal_all().unwrap()
    }

    fn watched(file: &SealedMemfd) -> (Mapping, Uffd, Pagemap) {
        let mapping = Mapping::map_private(file, LEN, Placement::Anywhere).unwrap();
        let uffd = Uffd::open().unwrap();
        uffd.register(&mapping).unwrap();
        (mapping, uffd, Pagemap::open().unwrap())
    }

    fn touch(mapping: &Mapping, pages: &[u64]) {
        pages.iter().for_each(|&page| mapping.store::<u8>(PAGE.start_of(PageIndex::new(page)), 9).unwrap());
    }

    /// One round: finds, protects, and agrees with the scan that protects nothing.
    fn round(mapping: &Mapping, pagemap: &Pagemap) -> PageSet {
        let written = pagemap.written(mapping, mapping.geometry().all()).unwrap();
        let found = pagemap.protect(mapping, &pagemap.candidates(mapping).unwrap()).unwrap();
        assert_eq!(found, written);
        assert!(pagemap.written(mapping, mapping.geometry().all()).unwrap().is_empty());
        found
    }

    #[test]
    fn rounds_find_what_was_written_since_the_last() {
        let file = sealed();
        let (mapping, _uffd, pagemap) = watched(&file);
        assert_eq!(round(&mapping, &pagemap), set(&[]));
        mapping.populate(pages(0, 1000), Populate::Read).unwrap();
        touch(&mapping, &[1, 2, 3, 700, 2047]);
        assert_eq!(round(&mapping, &pagemap), set(&[1, 2, 3, 700, 2047]));
        assert_eq!(round(&mapping, &pagemap), set(&[]));
        touch(&mapping, &[2, 5, 1500]);
        assert_eq!(round(&mapping, &pagemap), set(&[2, 5, 1500]));
        // Many runs, in page tables full and sparse.
        let many: Vec<_> = (0..2048).step_by(2).collect();
        touch(&mapping, &many);
        assert_eq!(round(&mapping, &pagemap), set(&many));
    }

    #[test]
    fn the_kernels_own_writes_are_seen() {
        let file = sealed();
        let (mapping, _uffd, pagemap) = watched(&file);
        touch(&mapping, &[4, 5]);
        round(&mapping, &pagemap);
        // preadv(2): the kernel writes the pages, in kernel mode.
        file.read_into(&mapping, pages(5, 7)).unwrap();
        assert_eq!(round(&mapping, &pagemap), set(&[5, 6]));
    }

    #[test]
    fn lifted_pages_count_as_written() {
        let file = sealed();
        let (mapping, uffd, pagemap) = watched(&file);
        touch(&mapping, &[4, 5, 6, 9]);
        round(&mapping, &pagemap);
        uffd.unprotect(&mapping, pages(5, 7)).unwrap();
        assert_eq!(round(&mapping, &pagemap), set(&[5, 6]));
        assert!(matches!(uffd.unprotect(&mapping, pages(2047, 2049)), Err(SysError::Range(_))));
        drop(uffd);
        // Closed: nothing is protected.
        let all = mapping.geometry().all();
        assert_eq!(pagemap.written(&mapping, all).unwrap(), set(&[4, 5, 6, 9]));
        assert_eq!(pagemap.scan(&mapping, all, ScanMethod::Best).unwrap(), set(&[4, 5, 6, 9]));
    }

    #[test]
    fn what_is_mapped_anew_must_be_registered_again() {
        let file = sealed();
        let (mut mapping, uffd, pagemap) = watched(&file);
        touch(&mapping, &[4, 5, 6]);
        round(&mapping, &pagemap);
        mapping.overlay_extent(pages(5, 8), &file).unwrap();
        touch(&mapping, &[7]);
        assert_eq!(pagemap.written(&mapping, mapping.geometry().all()).unwrap(), set(&[7]));
        assert!(pagemap.protect(&mapping, &pagemap.candidates(&mapping).unwrap()).is_err());
        uffd.register(&mapping).unwrap();
        assert_eq!(round(&mapping, &pagemap), set(&[7]));
    }

    /// Why a space that drops protected pages must not go on with its tracker.
    #[test]
    fn a_protected_page_that_is_dropped_leaves_a_marker_until_the_end() {
        let file = sealed();
        let (mapping, uffd, pagemap) = watched(&file);
        touch(&mapping, &[4]);
        round(&mapping, &pagemap);
        mapping.discard_private(pages(0, 10)).unwrap();
        assert_eq!(mapping.load::<u8>(PAGE.start_of(PageIndex::new(4))).unwrap(), 1);
        assert_eq!(round(&mapping, &pagemap), set(&[]));
        drop(uffd);
        assert!(pagemap.count(&mapping, mapping.geometry().all(), ScanMethod::Best).unwrap().is_zero());
    }

    #[test]
    fn only_one_may_watch_and_only_private_views() {
        let file = sealed();
        let (mapping, uffd, _) = watched(&file);
        assert!(matches!(Uffd::open().unwrap().register(&mapping), Err(UffdError::Taken)));
        let shared = Memfd::create("offshoot-test", LEN).unwrap();
        let view = Mapping::map_shared(&shared, LEN).unwrap();
        assert!(matches!(uffd.register(&view), Err(UffdError::Sys(SysError::Misuse(_)))));
    }

    #[test]
    fn refusals_have_meanings() {
        let open = |n, errno| {
            let _plan = plan::arm(n, errno);
            Uffd::open()
        };
        for n in [1, 2] {
            assert!(matches!(open(n, Errno::NOSYS), Err(UffdError::Unsupported)));
            assert!(matches!(open(n, Errno::INVAL), Err(UffdError::Unsupported)));
            assert!(open(n, Errno::INTR).is_ok());
        }
        assert!(matches!(open(1, Errno::PERM), Err(UffdError::NotPermitted)));
        let none = UffdError::Sys(SysError::OutOfDescriptors { call: Call::Userfaultfd, errno: Errno::MFILE });
        assert_eq!(open(1, Errno::MFILE).unwrap_err().to_string(), none.to_string());
    }
}
