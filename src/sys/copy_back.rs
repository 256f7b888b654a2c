//! Reset by copying: private pages get back the bytes of the files below, and stay private.
//!
//! Owns the second, read-only view of those files, and the copy. Dropping a private page costs an MMU notifier call for each run once a
//! machine is attached, and the next write a fault, which under KVM is two; copying 4 KiB costs 0.1 µs and neither. It must not know which
//! pages are to be copied, nor what shows the right bytes.
#![allow(unsafe_code)] // Changes a protection, and copies between addresses.

use rustix::mm::MprotectFlags;

use super::error::{SysError, checked_errno};
use super::fault::Call;
use super::mapping::Mapping;
use super::volatile;
use crate::page::PageRange;

/// A view to copy from, which nobody writes.
#[derive(Debug)]
pub(crate) struct Originals(Mapping);

impl Originals {
    /// Takes writing away from a private view that nobody uses yet. 1 µs.
    ///
    /// # Errors
    /// [`SysError::Misuse`] on a shared view, and those of mprotect(2). The view is gone then.
    pub(crate) fn of(mapping: Mapping) -> Result<Self, SysError> {
        if mapping.is_shared() {
            return Err(SysError::Misuse("pages are copied back from private views of sealed files"));
        }
        let (base, len) = mapping.span(mapping.geometry().all())?;
        checked_errno(Call::Mprotect, || {
            // SAFETY: the mapping owns this range, and whoever has it mapped only reads through it from here on.
            unsafe { rustix::mm::mprotect(base.cast(), len, MprotectFlags::READ) }
        })
        .map_err(|errno| SysError::new(Call::Mprotect, errno))?;
        Ok(Self(mapping))
    }

    /// As of any mapping.
    pub(crate) fn kernel_mappings(&self) -> u64 {
        self.0.kernel_mappings()
    }

    /// What it shows.
    pub(crate) fn view(&self) -> &Mapping {
        &self.0
    }
}

impl Mapping {
    /// Makes `range` hold what `from` shows there. A page that does already is not written: it stays shared, if it was. Any other is
    /// private afterwards. Some 0.1 µs a page that is private, a fault more for one that is not.
    ///
    /// # Errors
    /// [`SysError::Range`] outside either, [`SysError::Misuse`] on a shared view: nothing was written.
    pub(crate) fn copy_back(&self, from: &Originals, range: PageRange) -> Result<(), SysError> {
        if self.is_shared() {
            return Err(SysError::Misuse("a shared view has no private pages to copy back to"));
        }
        let ((dst, len), (src, _)) = (self.span(range)?, from.0.span(range)?);
        const PAGE: usize = 4096;
        for at in (0..len).step_by(PAGE) {
            // SAFETY: both spans were checked and are whole pages, `dst` is writable and another mapping than `src`. Page by page, so that
            // pages that hold the right bytes are left alone.
            unsafe { volatile::restore(src.add(at), dst.add(at), PAGE) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteOffset, ByteSize, PageIndex};
    use crate::sys::fault::plan;
    use crate::sys::mapping::{PAGE, Placement};
    use crate::sys::memfd::{Memfd, SealedMemfd};
    use crate::sys::pagemap::{Pagemap, ScanMethod};
    use rustix::io::Errno;

    fn marked(len: ByteSize, mark: u8) -> SealedMemfd {
        let file = Memfd::create("offshoot-test", len).unwrap();
        for at in (0..len.get()).step_by(4096) {
            file.write_at(ByteOffset::new(at + 4000), &[mark]).unwrap();
        }
        file.seal_all().unwrap()
    }

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    #[test]
    fn pages_get_their_bytes_back_and_stay_private() {
        let len = ByteSize::mib(1);
        let (base, layer) = (marked(len, 1), marked(len, 2));
        let map = || Mapping::map_layers(&base, &[(pages(10, 20), &layer)], len, Placement::Anywhere).unwrap();
        let (mapping, originals) = (map(), Originals::of(map()).unwrap());
        assert_eq!(originals.kernel_mappings(), 3);
        for page in 5..15 {
            mapping.store(ByteOffset::new(page * 4096 + 8 * page), 0xDD_u8).unwrap();
        }
        mapping.copy_back(&originals, pages(0, 12)).unwrap();
        let (mut own, mut want) = (vec![0; 12 * 4096], vec![0; 12 * 4096]);
        mapping.read(ByteOffset::ZERO, &mut own).unwrap();
        map().read(ByteOffset::ZERO, &mut want).unwrap();
        assert!(own == want);
        assert_eq!(mapping.load::<u8>(ByteOffset::new(12 * 4096 + 96)).unwrap(), 0xDD, "what was not named stays");
        let private = Pagemap::open().unwrap().scan(&mapping, mapping.geometry().all(), ScanMethod::Best).unwrap();
        assert_eq!(private.runs().collect::<Vec<_>>(), [pages(5, 15)], "equal pages stay shared");
        assert!(matches!(mapping.copy_back(&originals, pages(255, 257)), Err(SysError::Range(_))));
    }

    #[test]
    fn what_cannot_be_copied_from_or_to_is_refused() {
        let len = ByteSize::kib(64);
        let file = Memfd::create("offshoot-test", len).unwrap();
        let shared = Mapping::map_shared(&file, len).unwrap();
        let private = || Mapping::map_private(&marked(len, 1), len, Placement::Anywhere).unwrap();
        let originals = Originals::of(private()).unwrap();
        assert!(matches!(shared.copy_back(&originals, pages(0, 1)), Err(SysError::Misuse(_))));
        assert!(matches!(Originals::of(shared), Err(SysError::Misuse(_))));
        let refused = private();
        let guard = plan::arm(1, Errno::NOMEM);
        assert!(Originals::of(refused).is_err());
        drop(guard);
        assert_eq!(PAGE.bytes().get(), 4096);
    }
}
