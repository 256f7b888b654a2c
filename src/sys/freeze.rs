//! The freeze: a guest's shared view gives way to a private view of the same file at the same address.
//!
//! Owns the two ways of doing and undoing it. Unmapping a resident view costs 13 to 48 ms per GiB, most of it page
//! tables, so it must not happen inside the pause. The view is moved instead:
//!
//! ```text
//!   address   A (the guest's)                 S (spare, A and S equal modulo 1 GiB)
//!   before    shared view, page tables        reserved, nothing there
//!   step 1    shared view, no page tables     shared view, page tables     mremap(MAYMOVE|FIXED|DONTUNMAP)
//!   step 2    private view of the sealed file shared view, page tables     mmap(MAP_PRIVATE|MAP_FIXED)
//!   later     private view                    nothing                      munmap, by a thread that nobody awaits
//! ```
//!
//! At no moment is A unmapped, so nothing else can land there. It must not know why a view is frozen, nor resume or
//! pause anybody: **the guest must be stopped and its I/O drained from before step 1 until after step 2**, or its
//! writes go to a file that is being sealed.
#![allow(unsafe_code)] // mremap moves memory between addresses.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags};

use super::error::{SysError, checked_errno};
use super::fault::Call;
use super::mapping::{Mapping, View};
use super::memfd::{FileId, SealedMemfd};
use super::reservation::{GIB, Reservation};

/// How a freeze was done.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FreezeMethod {
    /// The old view was moved, page tables and all, and waits to be unmapped or restored. Tens of µs at any size.
    MovedAside,
    /// The old view was unmapped inside the call: 13 to 48 ms per resident GiB. Linux before 5.13 cannot do better.
    RemappedInPlace,
}

/// What [`MovedAside::restore`] came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Restored {
    /// The old shared view is back, page tables and all. Writes go to the file again.
    Shared,
    /// There was no old view to put back (it was remapped in place): the private view stays, which shows the
    /// same bytes and can be written; the file stays sealed and belongs to this mapping alone.
    KeptPrivate,
}

/// The old view could not be put back.
#[derive(Debug, thiserror::Error)]
#[error("putting the old view back: {error}")]
pub(crate) struct RestoreFailed {
    /// The old view, intact unless `error` is [`SysError::RollbackFailed`].
    pub(crate) aside: MovedAside,
    /// What went wrong.
    pub(crate) error: SysError,
}

/// The view of before a freeze. Restore it if a later step of the fork fails; otherwise drop it on a thread that
/// nobody waits for (13 to 48 ms per resident GiB), and then finish the file's seal.
#[derive(Debug)]
pub(crate) struct MovedAside {
    /// `None`: there is nothing to put back, or to unmap.
    view: Option<Reservation>,
    home: usize,
    file: FileId,
}

impl Mapping {
    /// Makes room for [`move_aside`](Self::move_aside) ahead of time, outside the pause. Costs a kernel mapping and no
    /// memory; about 3 µs. Does nothing if there is room.
    ///
    /// # Errors
    /// [`SysError::OutOfMappings`], [`SysError::OutOfMemory`].
    pub(crate) fn prepare_spare(&mut self) -> Result<(), SysError> {
        if self.spare.is_none() {
            let residue = self.range.base().addr().get() % GIB;
            self.spare = Some(Reservation::congruent(self.range.len(), residue)?);
        }
        Ok(())
    }

    /// Freezes a shared view: it is moved out of the guest's reach, and a private view of the same file, now sealed,
    /// takes its place. About 40 µs at 1 and at 8 GiB, if [`prepare_spare`](Self::prepare_spare) was called before
    /// (3 µs more otherwise). See the module's head for what must hold around it.
    ///
    /// # Errors
    /// [`SysError::Misuse`] if this is no shared view of that file. [`SysError::OutOfMappings`] and
    /// [`SysError::OutOfMemory`]: the old view is where it was. [`SysError::RollbackFailed`]: it is not.
    pub(crate) fn move_aside(&mut self, sealed: &SealedMemfd) -> Result<MovedAside, SysError> {
        self.check_freezable(sealed)?;
        self.prepare_spare()?;
        let Some(spare) = self.spare.take() else {
            return Err(SysError::Misuse("a spare range that vanished"));
        };
        let len = self.range.len();
        match remap(&self.range, &spare, MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP) {
            Ok(()) => {}
            Err(failed) => {
                let errno = match failed {
                    RemapError::NotTried(errno) => {
                        self.spare = Some(spare);
                        errno
                    }
                    // The kernel unmaps the target before it looks at most of the rest. A hole is ours once more;
                    // otherwise it cannot be told whose the addresses are, and they are left alone.
                    RemapError::Failed(errno) if spare.was_torn(0, len) => {
                        self.spare = Some(spare);
                        errno
                    }
                    RemapError::Failed(errno) => {
                        spare.forget();
                        errno
                    }
                };
                // mremap(2): EINVAL for DONTUNMAP on anything but private anonymous memory, before Linux 5.13.
                return match errno {
                    Errno::INVAL => self.in_place_remap(sealed),
                    errno => Err(SysError::new(Call::Mremap, errno)),
                };
            }
        }
        if let Err(error) = self.range.map_over(0, len, sealed.as_fd(), MapFlags::PRIVATE) {
            return Err(self.put_back(spare, error));
        }
        self.view = View::Private(sealed.id());
        Ok(MovedAside { view: Some(spare), home: self.range.base().addr().get(), file: sealed.id() })
    }

    /// The same by mapping over the old view, which is torn down inside the call: 13 to 48 ms per resident GiB. What
    /// [`move_aside`](Self::move_aside) falls back on, and what benches compare it with.
    ///
    /// # Errors
    /// As [`move_aside`](Self::move_aside).
    pub(crate) fn in_place_remap(&mut self, sealed: &SealedMemfd) -> Result<MovedAside, SysError> {
        self.check_freezable(sealed)?;
        self.range.map_over(0, self.range.len(), sealed.as_fd(), MapFlags::PRIVATE)?;
        self.view = View::Private(sealed.id());
        Ok(MovedAside { view: None, home: self.range.base().addr().get(), file: sealed.id() })
    }

    fn check_freezable(&self, sealed: &SealedMemfd) -> Result<(), SysError> {
        match self.view {
            View::Shared(file) if file == sealed.id() => Ok(()),
            View::Shared(_) => Err(SysError::Misuse("a view can only be frozen over its own file")),
            View::Private(_) => Err(SysError::Misuse("only a shared view can be frozen by moving it aside")),
        }
    }

    /// Undoes step 1 after step 2 failed with `error`, which it returns, or what became of it.
    fn put_back(&mut self, moved: Reservation, error: SysError) -> SysError {
        match remap(&moved, &self.range, MremapFlags::MAYMOVE) {
            Ok(()) => {
                moved.forget();
                match error {
                    // Torn by step 2 and mended just now.
                    SysError::RollbackFailed { call, errno } => SysError::new(call, errno),
                    error => error,
                }
            }
            Err(RemapError::NotTried(errno) | RemapError::Failed(errno)) => {
                // The contents are safe in the file and in the moved view; the guest's addresses are not.
                self.spare = Some(moved);
                SysError::RollbackFailed { call: Call::Mremap, errno }
            }
        }
    }
}

impl MovedAside {
    /// How the freeze was done.
    #[cfg(test)]
    pub(crate) fn method(&self) -> FreezeMethod {
        match self.view {
            Some(_) => FreezeMethod::MovedAside,
            None => FreezeMethod::RemappedInPlace,
        }
    }

    /// Puts the old view back at its address, exactly as it was, in place of the private view and of anything laid
    /// over it since. The guest must not have run meanwhile: what it wrote to the private view is lost. The file keeps
    /// its seals, which do not hinder a view mapped before them. About 40 µs at any size.
    ///
    /// # Errors
    /// [`RestoreFailed`]: [`SysError::Misuse`] for another mapping than the one it came from, otherwise those of
    /// mremap(2).
    pub(crate) fn restore(self, mapping: &mut Mapping) -> Result<Restored, RestoreFailed> {
        let of_this = self.home == mapping.range.base().addr().get()
            && matches!(mapping.view, View::Private(f) if f == self.file);
        if !of_this {
            let error = SysError::Misuse("a view can only be put back where it came from");
            return Err(RestoreFailed { aside: self, error });
        }
        let Self { view, home, file } = self;
        let Some(view) = view else {
            return Ok(Restored::KeptPrivate);
        };
        match remap(&view, &mapping.range, MremapFlags::MAYMOVE) {
            Ok(()) => {
                view.forget();
                mapping.view = View::Shared(file);
                mapping.extents.clear();
                Ok(Restored::Shared)
            }
            Err(failed) => {
                let error = match failed {
                    RemapError::NotTried(errno) => SysError::new(Call::Mremap, errno),
                    RemapError::Failed(errno) if mapping.range.was_torn(0, mapping.range.len()) => {
                        SysError::RollbackFailed { call: Call::Mremap, errno }
                    }
                    RemapError::Failed(errno) => SysError::new(Call::Mremap, errno),
                };
                Err(RestoreFailed { aside: Self { view: Some(view), home, file }, error })
            }
        }
    }
}

/// Why a view was not moved.
enum RemapError {
    /// The fault plan stepped in: no call was made.
    NotTried(Errno),
    /// The kernel refused; the target may have been unmapped.
    Failed(Errno),
}

/// Moves everything mapped at `from` to `to`, in place of what is there. Without `DONTUNMAP`, nothing is mapped at
/// `from` afterwards, and the caller must forget it.
fn remap(from: &Reservation, to: &Reservation, flags: MremapFlags) -> Result<(), RemapError> {
    assert_eq!(from.len(), to.len());
    checked_errno(Call::Mremap, || Ok(())).map_err(RemapError::NotTried)?;
    let (old, new, len) = (from.base().as_ptr().cast(), to.base().as_ptr().cast(), to.len());
    // SAFETY: both ranges are owned and of one length (asserted); nobody holds references into either.
    match unsafe { rustix::mm::mremap_fixed(old, len, len, flags, new) } {
        Ok(_) => Ok(()),
        Err(errno) => Err(RemapError::Failed(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteOffset, ByteSize, PageIndex, PageRange};
    use crate::sys::fault::plan;
    use crate::sys::mapping::{PAGE, Placement};
    use crate::sys::memfd::{FinalSeal, Memfd};
    use crate::sys::reservation::live;

    const PAGES: u64 = 64;

    fn parent() -> (Memfd, Mapping) {
        let len = ByteSize::kib(4 * PAGES);
        let file = Memfd::create("offshoot-test", len).unwrap();
        let mapping = Mapping::map_shared(&file, len).unwrap();
        (0..PAGES).for_each(|page| put(&mapping, page, page as u8 + 1));
        (file, mapping)
    }

    fn put(mapping: &Mapping, page: u64, mark: u8) {
        mapping.store(PAGE.start_of(PageIndex::new(page)), mark).unwrap();
    }

    fn first_marks() -> Vec<u8> {
        (1..=PAGES as u8).collect()
    }

    #[test]
    fn both_sides_of_a_freeze_go_their_own_way() {
        let (file, mut mapping) = parent();
        let base = mapping.base();
        mapping.prepare_spare().unwrap();
        assert_eq!(mapping.kernel_mappings(), 2);
        let sealed = file.seal_future_write().unwrap();
        let aside = mapping.move_aside(&sealed).unwrap();
        assert_eq!(aside.method(), FreezeMethod::MovedAside);
        assert_eq!((mapping.base(), mapping.kernel_mappings(), mapping.lines()), (base, 1, 1));
        assert!(!mapping.is_shared());
        assert_eq!(mapping.marks(), first_marks());

        let clone = Mapping::map_private(&sealed, mapping.len(), Placement::Anywhere).unwrap();
        put(&mapping, 0, 200);
        put(&clone, 1, 201);
        assert_eq!(mapping.marks()[..3], [200, 2, 3]);
        assert_eq!(clone.marks()[..3], [1, 201, 3]);
        let mut stored = [0];
        sealed.read_at(ByteOffset::ZERO, &mut stored).unwrap();
        assert_eq!(stored, [1]);

        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::StillMapped);
        std::thread::spawn(move || drop(aside)).join().unwrap();
        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
        assert_eq!(clone.marks()[..3], [1, 201, 3]);
    }

    #[test]
    fn a_restored_view_writes_to_the_file_again() {
        let before = live::count();
        let (file, mut mapping) = parent();
        let base = mapping.base();
        let sealed = file.seal_future_write().unwrap();
        for round in 0..3 {
            let aside = mapping.move_aside(&sealed).unwrap();
            put(&mapping, 5, 250);
            mapping.overlay_extent(PageRange::one(PageIndex::new(9)), &sealed).unwrap();
            assert_eq!(aside.restore(&mut mapping).unwrap(), Restored::Shared);
            assert_eq!((mapping.base(), mapping.kernel_mappings(), mapping.lines()), (base, 1, 1));
            assert_eq!(mapping.marks()[5], 6, "what was written to the private view is gone");
            put(&mapping, 7, 100 + round);
            let mut stored = [0];
            sealed.read_at(ByteOffset::new(7 * 4096), &mut stored).unwrap();
            assert_eq!(stored, [100 + round]);
            put(&mapping, 7, 8);
        }
        assert_eq!(mapping.marks(), first_marks());
        drop(mapping);
        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
        assert_eq!(live::count(), before);
    }

    #[test]
    fn in_place_shows_the_same_bytes() {
        let (file, mut mapping) = parent();
        let sealed = file.seal_future_write().unwrap();
        let aside = mapping.in_place_remap(&sealed).unwrap();
        assert_eq!(aside.method(), FreezeMethod::RemappedInPlace);
        assert_eq!(mapping.marks(), first_marks());
        assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
        put(&mapping, 0, 77);
        assert_eq!(aside.restore(&mut mapping).unwrap(), Restored::KeptPrivate);
        assert_eq!(mapping.marks()[..2], [77, 2]);
    }

    #[test]
    fn a_kernel_that_cannot_keep_the_old_range_remaps_in_place() {
        let (file, mut mapping) = parent();
        mapping.prepare_spare().unwrap();
        let sealed = file.seal_future_write().unwrap();
        let guard = plan::arm(1, Errno::INVAL);
        let aside = mapping.move_aside(&sealed).unwrap();
        drop(guard);
        assert_eq!(aside.method(), FreezeMethod::RemappedInPlace);
        assert_eq!(mapping.marks(), first_marks());
    }

    #[test]
    fn only_a_files_own_shared_view_is_frozen_and_only_its_own_restored() {
        let (file, mut mapping) = parent();
        let (other_file, mut other) = parent();
        let (sealed, other_sealed) = (file.seal_future_write().unwrap(), other_file.seal_future_write().unwrap());
        assert!(matches!(mapping.move_aside(&other_sealed), Err(SysError::Misuse(_))));
        let aside = mapping.move_aside(&sealed).unwrap();
        assert!(matches!(mapping.move_aside(&sealed), Err(SysError::Misuse(_))));
        let failed = aside.restore(&mut other).unwrap_err();
        assert!(matches!(failed.error, SysError::Misuse(_)));
        assert_eq!(failed.aside.restore(&mut mapping).unwrap(), Restored::Shared);
        assert_eq!((mapping.marks(), other.marks()), (first_marks(), first_marks()));
    }

    #[test]
    fn a_failure_at_any_call_leaves_the_old_view() {
        for errno in [Errno::NOMEM, Errno::AGAIN] {
            for n in 1.. {
                let before = live::count();
                let (file, mut mapping) = parent();
                let sealed = file.seal_future_write().unwrap();
                let guard = plan::arm(n, errno);
                let frozen = mapping.move_aside(&sealed);
                let seen = plan::calls_seen();
                drop(guard);
                if seen < n {
                    assert!(frozen.is_ok() && n > 3);
                    break;
                }
                assert!(!matches!(frozen, Ok(_) | Err(SysError::RollbackFailed { .. })), "{frozen:?}");
                assert!(mapping.is_shared());
                assert_eq!((mapping.marks(), mapping.lines()), (first_marks(), 1));
                put(&mapping, 3, 99);
                let mut stored = [0];
                sealed.read_at(ByteOffset::new(3 * 4096), &mut stored).unwrap();
                assert_eq!(stored, [99], "it writes to the file");
                put(&mapping, 3, 4);
                // And the next try works.
                let aside = mapping.move_aside(&sealed).unwrap();
                assert_eq!(mapping.marks(), first_marks());
                drop((aside, mapping));
                assert_eq!(sealed.finish_seal().unwrap(), FinalSeal::Applied);
                assert_eq!(live::count(), before);
            }
        }
    }

    #[test]
    fn a_failed_restore_can_be_tried_again() {
        let (file, mut mapping) = parent();
        let sealed = file.seal_future_write().unwrap();
        let aside = mapping.move_aside(&sealed).unwrap();
        let guard = plan::arm(1, Errno::NOMEM);
        let failed = aside.restore(&mut mapping).unwrap_err();
        drop(guard);
        assert!(matches!(failed.error, SysError::OutOfMemory { .. }));
        assert!(!mapping.is_shared());
        assert_eq!(failed.aside.restore(&mut mapping).unwrap(), Restored::Shared);
        assert_eq!(mapping.marks(), first_marks());
    }
}
