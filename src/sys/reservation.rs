//! Owned address ranges, and ranges known to be free.
//!
//! Owns the right to use addresses: a [`Reservation`] belongs to one holder, who alone may map over it, and is
//! unmapped on drop. A [`Hole`] is the opposite: addresses that nobody owns yet. It must not know what is mapped where.
#![allow(unsafe_code)] // mmap and munmap change the address space that every pointer relies on.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::error::{SysError, checked, checked_errno};
use super::fault::Call;
use super::mapping::checked_len;
use crate::page::ByteSize;

/// What one entry of the third page-table level maps. mremap(2) moves whole tables of this size by swapping one
/// pointer, if source and target lie at the same offset within it.
pub(super) const GIB: usize = 1 << 30;

/// An address range of this process that belongs to the holder alone. Unmapped on drop: about 1.5 µs if untouched,
/// 13 to 48 ms per resident GiB otherwise.
#[derive(Debug)]
pub(super) struct Reservation {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it is an address range; which thread holds it makes no difference to the kernel.
unsafe impl Send for Reservation {}
// SAFETY: all access through `&Reservation` is by atomics or assembly on raw pointers, see `volatile`.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// `len` bytes of inaccessible addresses at `residue` bytes past a multiple of 1 GiB. Costs no memory.
    pub(super) fn congruent(len: usize, residue: usize) -> Result<Self, SysError> {
        debug_assert!(residue < GIB && residue.is_multiple_of(4096) && len.is_multiple_of(4096));
        let wide = len.checked_add(GIB).ok_or(SysError::Misuse("a length beyond the address space"))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let raw = checked(Call::Mmap, || {
            // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), wide, ProtFlags::empty(), flags) }
        })?;
        let whole = Self::adopt(raw.cast(), wide)?;
        let head = residue.wrapping_sub(whole.base.addr().get()) % GIB;
        Ok(whole.trim(head, len))
    }

    /// Maps `len` bytes of a file privately in one call: where the kernel chooses, or into a hole.
    pub(super) fn map_private(fd: BorrowedFd<'_>, len: usize, hole: Option<Hole>) -> Result<Self, SysError> {
        let (at, fixed) = match hole {
            None => (ptr::null_mut(), MapFlags::empty()),
            Some(hole) => (hole.base.as_ptr().cast(), MapFlags::FIXED_NOREPLACE),
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
        let raw = checked(Call::Mmap, || {
            // SAFETY: a new mapping where the kernel chooses, or where it has checked that nothing is mapped.
            unsafe { rustix::mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0) }
        })?;
        let range = Self::adopt(raw.cast(), len)?;
        if !at.is_null() && raw != at {
            // A kernel before 4.17 takes the address for a hint.
            return Err(SysError::Other { call: Call::Mmap, errno: Errno::EXIST });
        }
        Ok(range)
    }

    /// Takes ownership of what a successful mmap returned.
    fn adopt(raw: *mut u8, len: usize) -> Result<Self, SysError> {
        let base = NonNull::new(raw).ok_or(SysError::Misuse("the kernel mapped the null page"))?;
        live::add(1);
        Ok(Self { base, len })
    }

    /// Gives back all but `len` bytes from `head`.
    fn trim(self, head: usize, len: usize) -> Self {
        assert!(head + len <= self.len);
        let tail = self.len - head - len;
        let kept = Self { base: self.at(head), len };
        live::add(1);
        for (from, len) in [(self.base, head), (kept.at_end(), tail)] {
            if len > 0 {
                // SAFETY: these bytes were reserved by `self` and are outside what is kept. Cutting an end off a
                // mapping needs no memory; were it to fail, addresses would be lost, and nothing else.
                let _ = unsafe { rustix::mm::munmap(from.as_ptr().cast(), len) };
            }
        }
        self.forget();
        kept
    }

    /// Lets go of the range without unmapping it.
    pub(super) fn forget(self) {
        live::add(-1);
        std::mem::forget(self);
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address `offset` bytes in; at most one past the end.
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.len);
        // SAFETY: inside the owned range or one past it, so it neither wraps nor is null.
        unsafe { self.base.add(offset) }
    }

    fn at_end(&self) -> NonNull<u8> {
        self.at(self.len)
    }

    /// Maps `file` from byte `offset` over `len` bytes at the same `offset` of this range, in place of what is there.
    pub(super) fn map_over(
        &self,
        offset: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        kind: MapFlags,
    ) -> Result<(), SysError> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        let at = self.at(offset).as_ptr().cast();
        let flags = kind | MapFlags::FIXED | MapFlags::NORESERVE;
        let made = checked_errno(Call::Mmap, || {
            // SAFETY: the target lies inside the owned range (asserted); nobody holds references into it.
            unsafe { rustix::mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset as u64) }
        });
        match made {
            Ok(_) => Ok(()),
            Err(errno) if self.was_torn(offset, len) => Err(SysError::RollbackFailed { call: Call::Mmap, errno }),
            Err(errno) => Err(SysError::new(Call::Mmap, errno)),
        }
    }

    /// After a `MAP_FIXED` that failed: whether the kernel had already unmapped the target. Older kernels do when
    /// memory runs out at the wrong moment. A hole is filled at once, so that nothing foreign lands in the range.
    pub(super) fn was_torn(&self, offset: usize, len: usize) -> bool {
        let at = self.at(offset).as_ptr().cast();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: NOREPLACE makes the kernel refuse (EEXIST) if anything is mapped there.
        match unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) } {
            Ok(raw) if raw == at => true,
            Ok(raw) => {
                // SAFETY: a kernel before 4.17 took the address for a hint; this mapping is nobody else's.
                let _ = unsafe { rustix::mm::munmap(raw, len) };
                false
            }
            Err(_) => false,
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        live::add(-1);
        // SAFETY: the range is owned, and nothing borrowed from it outlives its owner.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%errno, len = self.len, "munmap failed; the address range is leaked");
        }
    }
}

/// How many ranges this thread has made and not dropped, so that tests see leaks.
#[cfg(test)]
pub(super) mod live {
    use std::cell::Cell;
    thread_local!(static LIVE: Cell<i64> = const { Cell::new(0) });

    pub(crate) fn add(n: i64) {
        LIVE.set(LIVE.get() + n);
    }

    pub(crate) fn count() -> i64 {
        LIVE.get()
    }
}

#[cfg(not(test))]
mod live {
    pub(super) const fn add(_: i64) {}
}

/// An address range where nothing is mapped, aligned to 1 GiB. KVM accepts a memory slot over it, and mapping a clone
/// into it later runs no MMU notifier, because there is nothing to invalidate.
///
/// Nothing reserves it: any other mmap of the process, and any other hole, may take it or part of it, which
/// mapping a clone there reports as [`SysError::Other`] with `EEXIST`. A guest must not run over it before the clone is
/// mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hole {
    base: NonNull<u8>,
    len: ByteSize,
}

// SAFETY: a number; it gives no access to memory.
unsafe impl Send for Hole {}
// SAFETY: as above.
unsafe impl Sync for Hole {}

/// Where holes are looked for, in GiB: 16 to 80 TiB, far from where x86-64 and AArch64 with 48-bit addresses put
/// programs, heaps, stacks and mappings.
const MIDDLE: std::ops::Range<usize> = 16 << 10..80 << 10;

/// How many places are tried before the kernel is asked for one.
const TRIES: usize = 16;

impl Hole {
    /// Finds `len` bytes of unused addresses, at random in the middle of the address space. The kernel hands addresses
    /// out from the top down (mmap(2) without a hint), so a hole found its way would be the next mmap's, and the next
    /// hole the same one. About 4 µs.
    ///
    /// # Errors
    /// No such range, no random numbers, or a `len` that is not a multiple of 4 KiB.
    pub(crate) fn pick(len: ByteSize) -> Result<Self, SysError> {
        let bytes = checked_len(len)?;
        let slots = MIDDLE.len().saturating_sub(bytes.div_ceil(GIB));
        for _ in 0..TRIES {
            let mut random = [0; 8];
            super::entropy::fill_random(&mut random).map_err(|error| SysError::Other {
                call: Call::Getrandom,
                errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            })?;
            let Some(slot) = usize::from_ne_bytes(random).checked_rem(slots) else { break };
            if let Some(base) = Self::probe((MIDDLE.start + slot) * GIB, bytes) {
                return Ok(Self { base, len });
            }
        }
        // A crowded or a small address space: what the kernel offers is better than nothing.
        Ok(Self { base: Reservation::congruent(bytes, 0)?.base(), len })
    }

    /// Whether nothing is mapped there, found out by mapping it for a moment.
    fn probe(at: usize, len: usize) -> Option<NonNull<u8>> {
        let at = ptr::with_exposed_provenance_mut(at);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: NOREPLACE makes the kernel refuse if anything is mapped there; what was mapped is unmapped at once.
        let raw = unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) }.ok()?;
        // SAFETY: made above, and nobody else's. A kernel before 4.17 may have put it elsewhere.
        unsafe { rustix::mm::munmap(raw, len) }.ok()?;
        NonNull::new(raw.cast()).filter(|_| raw == at)
    }

    /// Its first address.
    pub(crate) fn base(self) -> NonNull<u8> {
        self.base
    }

    /// Its length.
    pub(crate) fn len(self) -> ByteSize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_free_aligned_and_apart() {
        let len = ByteSize::gib(8);
        let holes: Vec<_> = (0..8).map(|_| Hole::pick(len).unwrap()).collect();
        for (n, hole) in holes.iter().enumerate() {
            assert!(hole.base().addr().get().is_multiple_of(GIB));
            // 1 in 500 that any two of eight overlap; that any two are the same is 1 in 2,000, so only look for all.
            assert!(n == 0 || holes[..n].iter().any(|other| other != hole));
        }
        assert!(Hole::pick(ByteSize::new(5)).is_err());
        assert!(Hole::pick(ByteSize::gib(63 << 10)).is_ok_and(|hole| hole.len() == ByteSize::gib(63 << 10)));
    }

    #[test]
    fn a_reservation_has_the_residue_asked_for() {
        for residue in [0, 4096, 5 << 20, GIB - 4096] {
            let range = Reservation::congruent(3 << 20, residue).unwrap();
            assert_eq!(range.base().addr().get() % GIB, residue);
            assert!(!range.was_torn(0, range.len()));
        }
    }
}
