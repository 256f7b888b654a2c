//! Reset in place: a private view shows its files again, as on the day it was mapped.
//!
//! Owns the choice of how private pages are dropped. Measured on 1 GiB with 64 private pages (contiguous / one per
//! 2 MiB; µs), for a clone that has read nothing else, and for one that has read all of it:
//!
//! | way | fresh | all read |
//! |---|---|---|
//! | list from the caller, one vectored call | 5 / 12 | 6 / 12 |
//! | list from the caller, one call a run | 5 / 76 | 6 / 91 |
//! | scan, one vectored call | 9 / 53 | 2,100 / 2,100 |
//! | one call over everything | 7 / 23 | 13,200 / 13,700 |
//!
//! So: never by the region, which costs 50 ns for every page that is present, shared or not, and drops the page tables
//! that the next run needs (the next 64 writes took 100 µs instead of 60). With a list where the caller has one; else
//! by a scan, 0.6–4 µs per page table of 2 MiB that exists. It must not know what else a reset restores.
#![allow(unsafe_code)] // Hands address ranges to the kernel to be dropped.

use rustix::io::Errno;
use rustix::mm::Advice;

use super::error::{SysError, checked_errno};
use super::fault::Call;
use super::iovec::{MAX_VECTORS, RawIoVec, discard_vectored};
use super::mapping::Mapping;
use super::pagemap::{Pagemap, ScanMethod};
use crate::page::{PageCount, PageRange};

/// What a reset dropped.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct ResetReport {
    /// Pages dropped; from a caller's list, pages named, whether they were private or not.
    pub(crate) pages: PageCount,
    /// In how many runs.
    pub(crate) runs: u64,
}

impl Mapping {
    /// Drops every private page, found by a scan. 9 µs for 64 contiguous pages in a clone that touched little else;
    /// see the module's head for what raises it.
    ///
    /// # Errors
    /// [`SysError::Misuse`] on a shared view; those of [`Pagemap::scan`] and madvise(2). Some pages may have been
    /// dropped: asking again is safe.
    pub(crate) fn reset_private(&self, pagemap: &Pagemap) -> Result<ResetReport, SysError> {
        let mut batch = Batch::new(self)?;
        pagemap.for_each_run(self, self.geometry.all(), ScanMethod::Best, |run| batch.push(run))?;
        batch.finish()
    }

    /// Drops the private pages among `dirty`, and no others: what the caller does not name stays. 5–12 µs for 64
    /// pages, whatever else the clone touched.
    ///
    /// # Errors
    /// As [`reset_private`](Self::reset_private), and [`SysError::Range`].
    pub(crate) fn reset_pages(&self, dirty: impl IntoIterator<Item = PageRange>) -> Result<ResetReport, SysError> {
        let mut batch = Batch::new(self)?;
        dirty.into_iter().try_for_each(|run| batch.push(run))?;
        batch.finish()
    }
}

/// Runs that wait to be dropped together.
struct Batch<'a> {
    mapping: &'a Mapping,
    vectors: [RawIoVec; VECTORS],
    held: usize,
    report: ResetReport,
}

/// Runs per call: 4 KiB of stack.
const VECTORS: usize = 256;
const _: () = assert!(VECTORS <= MAX_VECTORS);

impl<'a> Batch<'a> {
    fn new(mapping: &'a Mapping) -> Result<Self, SysError> {
        if mapping.is_shared() {
            return Err(SysError::Misuse("a shared view has no private pages to reset"));
        }
        Ok(Self { mapping, vectors: [RawIoVec::EMPTY; VECTORS], held: 0, report: ResetReport::default() })
    }

    fn push(&mut self, run: PageRange) -> Result<(), SysError> {
        let (base, len) = self.mapping.span(run)?;
        if len == 0 {
            return Ok(());
        }
        if self.held == VECTORS {
            self.flush()?;
        }
        self.vectors[self.held] = RawIoVec::new(base, len);
        self.held += 1;
        self.report.pages = self.report.pages.saturating_add(run.count());
        self.report.runs += 1;
        Ok(())
    }

    fn finish(mut self) -> Result<ResetReport, SysError> {
        self.flush()?;
        Ok(self.report)
    }

    fn flush(&mut self) -> Result<(), SysError> {
        let vectors = &self.vectors[..std::mem::take(&mut self.held)];
        let mut rest = vectors;
        if vectors.len() > 1 {
            let made = checked_errno(Call::ProcessMadvise, || {
                // SAFETY: `push` checked every vector against the mapping, which owns its range; dropping private
                // pages is a change of contents and no more.
                unsafe { discard_vectored(vectors) }
            });
            // Whole vectors done; one that was cut short is done again, which is harmless.
            match made {
                Ok(mut done) => {
                    while let [first, after @ ..] = rest
                        && done >= first.len()
                    {
                        done -= first.len();
                        rest = after;
                    }
                }
                Err(Errno::NOSYS | Errno::BADF | Errno::INVAL | Errno::PERM | Errno::SRCH) => {}
                Err(errno) => return Err(SysError::new(Call::ProcessMadvise, errno)),
            }
        }
        rest.iter().try_for_each(|vector| {
            checked_errno(Call::Madvise, || {
                // SAFETY: as above.
                unsafe { rustix::mm::madvise(vector.base().cast(), vector.len(), Advice::LinuxDontNeed) }
            })
            .map_err(|errno| SysError::new(Call::Madvise, errno))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteOffset, ByteSize, PageIndex, PageSet};
    use crate::sys::fault::plan;
    use crate::sys::mapping::{PAGE, Placement, Populate};
    use crate::sys::memfd::{Memfd, SealedMemfd};

    fn marked(len: ByteSize, mark: u8) -> SealedMemfd {
        let file = Memfd::create("offshoot-test", len).unwrap();
        for at in (0..len.get()).step_by(4096) {
            file.write_at(ByteOffset::new(at), &[mark]).unwrap();
        }
        file.seal_all().unwrap()
    }

    fn dirty(mapping: &Mapping, pages: impl IntoIterator<Item = u64>) -> PageSet {
        let set: PageSet = pages.into_iter().map(PageIndex::new).collect();
        set.pages().for_each(|page| mapping.store(PAGE.start_of(page), 0xDD_u8).unwrap());
        set
    }

    #[test]
    fn a_reset_shows_the_layers_again() {
        let len = ByteSize::mib(8);
        let (base, layer) = (marked(len, 1), marked(len, 2));
        let extent = PageRange::from_bounds(PageIndex::new(100), PageIndex::new(600));
        let mapping = Mapping::map_layers(&base, &[(extent, &layer)], len, Placement::Anywhere).unwrap();
        let before = mapping.marks();
        let pagemap = Pagemap::open().unwrap();
        for dirtied in [vec![], vec![5], (90..120).collect(), (0..2048).step_by(3).collect(), (0..2048).collect()] {
            let set = dirty(&mapping, dirtied);
            let report = mapping.reset_private(&pagemap).unwrap();
            assert_eq!(report.pages, set.count());
            assert_eq!(mapping.marks(), before);
            assert!(pagemap.count(&mapping, mapping.geometry().all(), ScanMethod::Best).unwrap().is_zero());

            dirty(&mapping, set.pages().map(PageIndex::get));
            let report = mapping.reset_pages(set.runs()).unwrap();
            assert_eq!((report.pages, report.runs), (set.count(), set.runs().len() as u64));
            assert_eq!(mapping.marks(), before);
        }
    }

    #[test]
    fn pages_that_are_not_named_stay() {
        let len = ByteSize::mib(1);
        let mapping = Mapping::map_private(&marked(len, 1), len, Placement::Anywhere).unwrap();
        mapping.populate(mapping.geometry().all(), Populate::Read).unwrap();
        dirty(&mapping, 0..256);
        mapping.reset_pages((0..256).step_by(2).map(|page| PageRange::one(PageIndex::new(page)))).unwrap();
        assert!(mapping.marks().iter().enumerate().all(|(page, &mark)| mark == [1, 0xDD][page % 2]));
        let outside = PageRange::one(PageIndex::new(256));
        assert!(matches!(mapping.reset_pages([outside]), Err(SysError::Range(_))));
    }

    #[test]
    fn a_kernel_without_the_vectored_call_does_the_same() {
        let len = ByteSize::mib(8);
        let mapping = Mapping::map_private(&marked(len, 1), len, Placement::Anywhere).unwrap();
        let before = mapping.marks();
        for errno in [Errno::NOSYS, Errno::BADF, Errno::INVAL, Errno::PERM] {
            let set = dirty(&mapping, (0..512).step_by(2));
            let guard = plan::arm(1, errno);
            mapping.reset_pages(set.runs()).unwrap();
            assert!(plan::calls_seen() > 256, "one call a run");
            drop(guard);
            assert_eq!(mapping.marks(), before);
        }
    }

    #[test]
    fn a_reset_that_fails_anywhere_can_be_repeated() {
        let len = ByteSize::mib(4);
        let mapping = Mapping::map_private(&marked(len, 1), len, Placement::Anywhere).unwrap();
        let before = mapping.marks();
        let pagemap = Pagemap::open().unwrap();
        for n in 1.. {
            dirty(&mapping, (0..1024).step_by(2));
            let guard = plan::arm(n, Errno::NOMEM);
            let reset = mapping.reset_private(&pagemap);
            let seen = plan::calls_seen();
            drop(guard);
            if seen < n {
                assert!(reset.is_ok() && n > 3);
                break;
            }
            assert!(reset.is_err());
            mapping.reset_private(&pagemap).unwrap();
            assert_eq!(mapping.marks(), before);
        }
    }

    #[test]
    fn a_shared_view_is_not_reset() {
        let len = ByteSize::kib(64);
        let file = Memfd::create("offshoot-test", len).unwrap();
        let mapping = Mapping::map_shared(&file, len).unwrap();
        assert!(matches!(mapping.reset_private(&Pagemap::open().unwrap()), Err(SysError::Misuse(_))));
    }
}
