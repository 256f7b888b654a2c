//! Buffers named by address, for system calls that read or write guest memory directly.
//!
//! Owns `struct iovec`, and a vectored call that rustix lacks. A slice of guest memory must never exist, so calls
//! that std and rustix declare over slices get vectors of the same layout instead. It must not know what is copied.
#![allow(unsafe_code)] // Layout casts, and a system call by number.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

use rustix::io::Errno;

use super::raw::syscall5;

/// `struct iovec`: an address and a length.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RawIoVec {
    base: *mut u8,
    len: usize,
}

const _: () = assert!(size_of::<RawIoVec>() == 16);
const _: () = assert!(size_of::<RawIoVec>() == size_of::<IoSlice<'static>>());
const _: () = assert!(align_of::<RawIoVec>() == align_of::<IoSlice<'static>>());
const _: () = assert!(size_of::<RawIoVec>() == size_of::<IoSliceMut<'static>>());
const _: () = assert!(align_of::<RawIoVec>() == align_of::<IoSliceMut<'static>>());

impl RawIoVec {
    pub(super) const EMPTY: Self = Self { base: std::ptr::null_mut(), len: 0 };

    pub(super) const fn new(base: *mut u8, len: usize) -> Self {
        Self { base, len }
    }

    pub(super) const fn base(self) -> *mut u8 {
        self.base
    }

    pub(super) const fn len(self) -> usize {
        self.len
    }

    /// The form in which a vectored write takes it. The result must go to a system call and nowhere else.
    ///
    /// # Safety
    /// The bytes must be mapped for as long as the result lives. They may change meanwhile: the result must not be
    /// dereferenced, which would make a `&[u8]` of them.
    pub(super) unsafe fn as_io_slice<'a>(self) -> IoSlice<'a> {
        let mut slice = MaybeUninit::<IoSlice<'a>>::uninit();
        // SAFETY: std guarantees that `IoSlice` is ABI compatible with `struct iovec` on Unix; the sizes are asserted
        // above. Both hold plain values: no reference to the bytes is made.
        unsafe {
            slice.as_mut_ptr().cast::<Self>().write(self);
            slice.assume_init()
        }
    }

    /// The form in which a vectored read takes it. The result must go to a system call and nowhere else.
    ///
    /// # Safety
    /// As [`as_io_slice`](Self::as_io_slice), and the bytes must be writable.
    #[cfg(test)]
    pub(super) unsafe fn as_io_slice_mut<'a>(self) -> IoSliceMut<'a> {
        let mut slice = MaybeUninit::<IoSliceMut<'a>>::uninit();
        // SAFETY: as in `as_io_slice`; std guarantees the same of `IoSliceMut`.
        unsafe {
            slice.as_mut_ptr().cast::<Self>().write(self);
            slice.assume_init()
        }
    }
}

/// The most vectors that one call takes.
pub(super) const MAX_VECTORS: usize = 1024;

/// `MADV_DONTNEED` on every vector in one call: process_madvise(2) on this process. Returns how many bytes were done,
/// which may be fewer than asked for. Since Linux 6.16 the processors' TLBs are flushed once for all vectors; one
/// madvise(2) each costs 1.2 µs, and 3.3 µs while another thread of the process runs.
///
/// # Errors
/// `EBADF`, `EINVAL`, `EPERM` or `ENOSYS` from a kernel that cannot (before 6.14): use madvise(2).
///
/// # Safety
/// The vectors must lie in ranges that the caller owns, where dropping private pages is sound.
pub(super) unsafe fn discard_vectored(vectors: &[RawIoVec]) -> Result<usize, Errno> {
    const PROCESS_MADVISE: usize = 440; // The same on every architecture.
    const PIDFD_SELF_THREAD_GROUP: isize = -10001; // uapi/linux/pidfd.h
    const MADV_DONTNEED: usize = 4;
    debug_assert!(vectors.len() <= MAX_VECTORS);
    // SAFETY: the call reads `vectors` and writes no memory but what the caller vouches for.
    unsafe {
        syscall5(
            PROCESS_MADVISE,
            [PIDFD_SELF_THREAD_GROUP as usize, vectors.as_ptr().expose_provenance(), vectors.len(), MADV_DONTNEED, 0],
        )
    }
}
