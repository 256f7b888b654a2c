//! Which pages of a private view are private: finding broken sharing from the kernel's page tables.
//!
//! Owns the descriptor of /proc/self/pagemap and the two ways of asking it. A page is *private* when it is anonymous,
//! in memory or swapped out: the kernel made it on a first write, and it hides the file's page. It must not know what
//! a dirty page is copied to.
//!
//! Facts are from the kernel's Documentation/admin-guide/mm/pagemap.rst and uapi/linux/fs.h.
#![allow(unsafe_code)] // PAGEMAP_SCAN is an ioctl that writes through pointers.

use std::ffi::c_void;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use super::error::{SysError, checked, checked_errno};
use super::fault::Call;
use super::mapping::Mapping;
#[cfg(any(test, feature = "qemu"))]
use crate::page::PageCount;
use crate::page::{PageIndex, PageRange, PageSet};

/// Which of the kernel's interfaces to ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ScanMethod {
    /// The ioctl, or where the kernel is older than 6.7 the table.
    Best,
    /// `PAGEMAP_SCAN`: skips what has no page tables, answers in runs.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests compare the two ways"))]
    Ioctl,
    /// Eight bytes read per page of the range, present or not: about 10 ms per GiB.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests compare the two ways"))]
    Table,
}

/// `struct page_region`: a run of pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(size_of::<ScanArg>() == 96);

pub(super) const PAGE_IS_FILE: u64 = 1 << 2;
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// The table's bits: file-backed or shared, swapped, present.
const PM_FILE: u64 = 1 << 61;
const PM_SWAP: u64 = 1 << 62;
const PM_PRESENT: u64 = 1 << 63;

/// How many runs one call can answer with: 6 KiB, on the stack. Past 512 (the kernel's own buffer), Linux 6.18 here named the last runs
/// of a call twice.
pub(super) const REGIONS: usize = 256;

/// What is asked of the page tables; see pagemap.rst for how the masks work together.
#[derive(Clone, Copy)]
pub(super) struct Question {
    pub(super) flags: u64,
    pub(super) inverted: u64,
    pub(super) all_of: u64,
    pub(super) any_of: u64,
    pub(super) answer: u64,
}

/// Private: not of a file, and in memory or in swap.
const PRIVATE: Question = Question {
    flags: 0,
    inverted: PAGE_IS_FILE,
    all_of: PAGE_IS_FILE,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    // Nothing to tell runs apart by: the longest runs.
    answer: PAGE_IS_FILE,
};

/// What one call found: runs, each with the categories asked for, up to the address that it came to.
pub(super) struct Found<'a> {
    pub(super) runs: &'a [Region],
    pub(super) up_to: u64,
}

/// A handle on this process's page tables. Belongs to the process that opened it: after fork(2) the child must open
/// its own.
#[derive(Debug)]
pub(crate) struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    /// Opens /proc/self/pagemap; needs no privilege. About 5 µs: do it once.
    ///
    /// # Errors
    /// [`SysError::OutOfDescriptors`], or no /proc.
    pub(crate) fn open() -> Result<Self, SysError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = checked(Call::Open, || rustix::fs::open("/proc/self/pagemap", flags, Mode::empty()))?;
        Ok(Self { fd })
    }

    /// Opens the page tables of another process, which this one must be allowed to trace: its child, or anybody of its user's where
    /// Yama is off.
    ///
    /// # Errors
    /// [`SysError::OutOfDescriptors`], or no such process, or no permission.
    #[cfg(feature = "qemu")]
    pub(crate) fn open_of(process: u32) -> Result<Self, SysError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let path = format!("/proc/{process}/pagemap");
        let fd = checked(Call::Open, || rustix::fs::open(path.as_str(), flags, Mode::empty()))?;
        Ok(Self { fd })
    }

    /// The private pages of `count` pages at address `base` of the process that this was opened for, numbered from `first`.
    ///
    /// # Errors
    /// Those of the ioctl, or of reading the table.
    #[cfg(feature = "qemu")]
    pub(crate) fn scan_at(&self, base: u64, first: PageIndex, count: PageCount) -> Result<PageSet, SysError> {
        let mut set = PageSet::new();
        let span = Span { base, len: count.get() * 4096, first };
        self.scan_span(span, ScanMethod::Best, |run| {
            set.push(run);
            Ok(())
        })?;
        Ok(set)
    }

    /// The private pages within `range`. With the ioctl about 1 µs and what the page tables in `range` cost: some
    /// 3 ms per GiB if every page is mapped, next to nothing where none is. A shared view has none.
    ///
    /// A page that is being migrated counts as what it was. A page of a file that was write-protected and then reclaimed, or dropped by
    /// madvise(2), counts as private: the kernel keeps a marker in its place. See [`written`](Self::written).
    ///
    /// # Errors
    /// [`SysError::Range`]; [`SysError::Unsupported`] for [`ScanMethod::Ioctl`] before Linux 6.7.
    pub(crate) fn scan(&self, mapping: &Mapping, range: PageRange, method: ScanMethod) -> Result<PageSet, SysError> {
        let mut set = PageSet::new();
        self.for_each_run(mapping, range, method, |run| {
            set.push(run);
            Ok(())
        })?;
        Ok(set)
    }

    /// How many pages are private, exactly. Costs what [`scan`](Self::scan) costs, without the set.
    ///
    /// # Errors
    /// As [`scan`](Self::scan).
    #[cfg(test)]
    pub(crate) fn count(&self, mapping: &Mapping, range: PageRange, method: ScanMethod) -> Result<PageCount, SysError> {
        let mut count = PageCount::ZERO;
        self.for_each_run(mapping, range, method, |run| {
            count = count.saturating_add(run.count());
            Ok(())
        })?;
        Ok(count)
    }

    /// Hands every run of private pages within `range` to `each`, in ascending order; runs may touch. `each` may drop
    /// the pages it is given.
    pub(super) fn for_each_run(
        &self,
        mapping: &Mapping,
        range: PageRange,
        method: ScanMethod,
        each: impl FnMut(PageRange) -> Result<(), SysError>,
    ) -> Result<(), SysError> {
        self.scan_span(Span::of(mapping, range)?, method, each)
    }

    fn scan_span(
        &self,
        span: Span,
        method: ScanMethod,
        mut each: impl FnMut(PageRange) -> Result<(), SysError>,
    ) -> Result<(), SysError> {
        if span.len == 0 {
            return Ok(());
        }
        match method {
            ScanMethod::Table => self.read_table(span, &mut each),
            ScanMethod::Ioctl | ScanMethod::Best => match self.ask(span, &mut each)? {
                Asked::Done => Ok(()),
                Asked::Unknown if method == ScanMethod::Best => self.read_table(span, &mut each),
                Asked::Unknown => {
                    Err(SysError::Unsupported { call: Call::PagemapScan, why: "PAGEMAP_SCAN needs Linux 6.7" })
                }
            },
        }
    }

    /// By the ioctl.
    fn ask(&self, span: Span, each: &mut impl FnMut(PageRange) -> Result<(), SysError>) -> Result<Asked, SysError> {
        let mut regions = [Region::default(); REGIONS];
        let mut at = span.base;
        while at < span.end() {
            let found = match self.call(PRIVATE, at, span.end(), &mut regions) {
                Ok(found) => found,
                // ENOTTY: a kernel without the ioctl.
                Err(Errno::NOTTY | Errno::INVAL) if at == span.base => return Ok(Asked::Unknown),
                Err(errno) => return Err(SysError::new(Call::PagemapScan, errno)),
            };
            found.runs.iter().try_for_each(|run| each(span.pages(run.start, run.end)))?;
            at = found.up_to;
        }
        Ok(Asked::Done)
    }

    /// One call: from address `at` towards `end`, until `regions` is full. It always gets further, or fails.
    pub(super) fn call<'r>(
        &self,
        question: Question,
        at: u64,
        end: u64,
        regions: &'r mut [Region; REGIONS],
    ) -> Result<Found<'r>, Errno> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: question.flags,
            start: at,
            end,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: REGIONS as u64,
            category_inverted: question.inverted,
            category_mask: question.all_of,
            category_anyof_mask: question.any_of,
            return_mask: question.answer,
            ..ScanArg::default()
        };
        let found = checked_errno(Call::PagemapScan, || {
            // SAFETY: `arg` names `regions`, which lives and is not otherwise used during the call, and the
            // kernel writes at most `vec_len` of them. Write protection, if asked for, changes no content.
            unsafe { rustix::ioctl::ioctl(&self.fd, Scan(&mut arg)) }
        })?;
        if arg.walk_end <= at {
            return Err(Errno::IO);
        }
        Ok(Found { runs: &regions[..found.min(REGIONS)], up_to: arg.walk_end })
    }

    /// By the table.
    fn read_table(&self, span: Span, each: &mut impl FnMut(PageRange) -> Result<(), SysError>) -> Result<(), SysError> {
        let mut bytes = [0_u8; 8 * 512];
        let mut at = span.base;
        while at < span.base + span.len {
            let pages = ((span.base + span.len - at) / 4096).min(512) as usize;
            let buf = &mut bytes[..8 * pages];
            let mut filled = 0;
            while filled < buf.len() {
                let from = at / 4096 * 8 + filled as u64;
                let n = checked(Call::Pread, || rustix::io::pread(&self.fd, &mut buf[filled..], from))?;
                if n == 0 {
                    return Err(SysError::Other { call: Call::Pread, errno: Errno::IO });
                }
                filled += n;
            }
            let mut run = at..at;
            for entry in buf.chunks_exact(8) {
                let entry = entry.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
                let next = run.end + 4096;
                if entry & (PM_PRESENT | PM_SWAP) != 0 && entry & PM_FILE == 0 {
                    run.end = next;
                    continue;
                }
                if !run.is_empty() {
                    each(span.pages(run.start, run.end))?;
                }
                run = next..next;
            }
            if !run.is_empty() {
                each(span.pages(run.start, run.end))?;
            }
            at += 4096 * pages as u64;
        }
        Ok(())
    }
}

/// Whether the kernel knew the question.
enum Asked {
    Done,
    Unknown,
}

/// Part of the address space, and the page number that it starts at.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) base: u64,
    len: u64,
    first: PageIndex,
}

impl Span {
    /// Where `range` of a mapping lies.
    pub(super) fn of(mapping: &Mapping, range: PageRange) -> Result<Self, SysError> {
        let (base, len) = mapping.span(range)?;
        Ok(Self { base: base.addr() as u64, len: len as u64, first: range.start() })
    }

    /// The address after the last.
    pub(super) fn end(self) -> u64 {
        self.base + self.len
    }

    /// Addresses as page numbers.
    pub(super) fn pages(self, start: u64, end: u64) -> PageRange {
        let page =
            |at: u64| PageIndex::new(self.first.get() + (at.clamp(self.base, self.base + self.len) - self.base) / 4096);
        PageRange::from_bounds(page(start), page(end))
    }
}

/// The ioctl, which answers with the number of regions that it filled.
struct Scan<'a>(&'a mut ScanArg);

// SAFETY: the opcode is `_IOWR('f', 16, struct pm_scan_arg)`; the pointer is to one, and the kernel writes to it and
// to the array that it names; the output is the call's own return value.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<ScanArg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        usize::try_from(out).map_err(|_| Errno::RANGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteOffset, ByteSize};
    use crate::sys::mapping::{PAGE, Placement, Populate};
    use crate::sys::memfd::{Memfd, SealedMemfd};

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    fn sealed(len: ByteSize) -> SealedMemfd {
        Memfd::create("offshoot-test", len).unwrap().seal_all().unwrap()
    }

    fn touch(mapping: &Mapping, page: u64) {
        mapping.store::<u8>(PAGE.start_of(PageIndex::new(page)), 1).unwrap();
    }

    /// Both methods agree with each other and with `expected`, as a set and as a count.
    fn check(mapping: &Mapping, range: PageRange, expected: &PageSet) {
        let pagemap = Pagemap::open().unwrap();
        assert_eq!(&pagemap.scan(mapping, range, ScanMethod::Table).unwrap(), expected);
        assert_eq!(&pagemap.scan(mapping, range, ScanMethod::Best).unwrap(), expected);
        match pagemap.scan(mapping, range, ScanMethod::Ioctl) {
            Ok(set) => assert_eq!(&set, expected),
            Err(SysError::Unsupported { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        for method in [ScanMethod::Table, ScanMethod::Best] {
            assert_eq!(pagemap.count(mapping, range, method).unwrap(), expected.count());
        }
    }

    #[test]
    fn only_written_pages_are_private() {
        let len = ByteSize::mib(8);
        let mapping = Mapping::map_private(&sealed(len), len, Placement::Anywhere).unwrap();
        let all = mapping.geometry().all();
        check(&mapping, all, &PageSet::new());
        mapping.populate(pages(0, 600), Populate::Read).unwrap();
        check(&mapping, all, &PageSet::new());
        let written = [0, 1, 2, 511, 512, 700, 1024, 1025, 2047];
        written.iter().for_each(|&page| touch(&mapping, page));
        check(&mapping, all, &written.into_iter().map(PageIndex::new).collect());
        check(&mapping, pages(1, 512), &[1, 2, 511].into_iter().map(PageIndex::new).collect());
        check(&mapping, pages(3, 3), &PageSet::new());
    }

    #[test]
    fn more_runs_than_one_call_holds() {
        let len = ByteSize::mib(8);
        let mapping = Mapping::map_private(&sealed(len), len, Placement::Anywhere).unwrap();
        (0..2048).step_by(2).for_each(|page| touch(&mapping, page));
        check(&mapping, mapping.geometry().all(), &(0..2048).step_by(2).map(PageIndex::new).collect());
    }

    #[test]
    fn runs_cross_kernel_mappings_and_page_tables() {
        let len = ByteSize::mib(8);
        let (base, layer) = (sealed(len), sealed(len));
        let extents = [(pages(100, 120), &layer), (pages(510, 514), &layer)];
        let mapping = Mapping::map_layers(&base, &extents, len, Placement::Anywhere).unwrap();
        (90..130).chain(505..520).for_each(|page| touch(&mapping, page));
        check(&mapping, mapping.geometry().all(), &(90..130).chain(505..520).map(PageIndex::new).collect());
    }

    #[test]
    fn a_shared_view_has_no_private_pages() {
        let len = ByteSize::mib(1);
        let mapping = Mapping::map_shared(&Memfd::create("offshoot-test", len).unwrap(), len).unwrap();
        touch(&mapping, 3);
        check(&mapping, mapping.geometry().all(), &PageSet::new());
    }

    #[test]
    fn ranges_outside_the_mapping_are_refused() {
        let len = ByteSize::mib(1);
        let mapping = Mapping::map_private(&sealed(len), len, Placement::Anywhere).unwrap();
        let pagemap = Pagemap::open().unwrap();
        for method in [ScanMethod::Best, ScanMethod::Table] {
            assert!(matches!(pagemap.scan(&mapping, pages(0, 257), method), Err(SysError::Range(_))));
        }
        assert!(mapping.read(ByteOffset::new(1 << 20), &mut [0]).is_err());
    }

    #[test]
    fn a_failed_call_is_an_error_and_not_an_empty_answer() {
        let len = ByteSize::mib(1);
        let mapping = Mapping::map_private(&sealed(len), len, Placement::Anywhere).unwrap();
        let pagemap = Pagemap::open().unwrap();
        for method in [ScanMethod::Ioctl, ScanMethod::Table] {
            let _plan = crate::sys::fault::plan::arm(1, Errno::IO);
            assert!(matches!(
                pagemap.count(&mapping, mapping.geometry().all(), method),
                Err(SysError::Other { errno: Errno::IO, .. })
            ));
        }
    }
}
