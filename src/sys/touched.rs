//! Which pages of a mapping are in the page tables: what was touched since it was mapped.
//!
//! Owns the question that [`pagemap`](super::pagemap)'s ioctl is asked about it. Whether a page was read after it was mapped the
//! tables do not say. It must not know what the pages are wanted for.

use super::error::SysError;
use super::fault::Call;
use super::mapping::Mapping;
use super::pagemap::{
    PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, Pagemap, Question, REGIONS, Region, ScanMethod, Span,
};
use crate::page::{PageRange, PageSet};

/// In the tables or in swap, told apart by whether it is a file's.
const TOUCHED: Question =
    Question { flags: 0, inverted: 0, all_of: 0, any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, answer: PAGE_IS_FILE };

/// Pages that were touched.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Of files, and in the tables.
    pub(crate) read: PageSet,
    /// Private.
    pub(crate) written: PageSet,
}

impl Pagemap {
    /// The pages of `range` that were touched. Costs what [`scan`](Self::scan) costs. Before Linux 6.7 those that were only read are not
    /// known. Of a shared view every page counts as read.
    ///
    /// # Errors
    /// [`SysError::Range`], or those of the ioctl.
    pub(crate) fn touched(&self, mapping: &Mapping, range: PageRange) -> Result<Touched, SysError> {
        let span = Span::of(mapping, range)?;
        let mut touched = Touched::default();
        let mut regions = [Region::default(); REGIONS];
        let mut at = span.base;
        while at < span.end() {
            let found = match self.call(TOUCHED, at, span.end(), &mut regions) {
                Ok(found) => found,
                Err(rustix::io::Errno::NOTTY | rustix::io::Errno::INVAL) if at == span.base => {
                    let written = self.scan(mapping, range, ScanMethod::Best)?;
                    return Ok(Touched { read: PageSet::new(), written });
                }
                Err(errno) => return Err(SysError::new(Call::PagemapScan, errno)),
            };
            for run in found.runs {
                let file = run.categories & PAGE_IS_FILE != 0;
                let set = if file { &mut touched.read } else { &mut touched.written };
                set.push(span.pages(run.start, run.end));
            }
            at = found.up_to;
        }
        Ok(touched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ByteSize, PageIndex};
    use crate::sys::fault::plan;
    use crate::sys::mapping::{PAGE, Placement, Populate};
    use crate::sys::memfd::Memfd;
    use rustix::io::Errno;

    #[test]
    fn what_is_populated_is_touched_and_no_more() {
        let len = ByteSize::mib(8);
        let file = Memfd::create("offshoot-test", len).unwrap().seal_all().unwrap();
        let mapping = Mapping::map_private(&file, len, Placement::Anywhere).unwrap();
        let pagemap = Pagemap::open().unwrap();
        let all = mapping.geometry().all();
        let touched = pagemap.touched(&mapping, all).unwrap();
        assert!(touched.read.is_empty() && touched.written.is_empty());
        let pages = |start, end| PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
        mapping.populate(pages(100, 700), Populate::Read).unwrap();
        mapping.populate(pages(600, 650), Populate::Write).unwrap();
        mapping.store(PAGE.start_of(PageIndex::new(1500)), 1_u8).unwrap();
        let touched = pagemap.touched(&mapping, all).unwrap();
        let written = PageSet::from(pages(600, 650)).union(&PageSet::from(pages(1500, 1501)));
        assert_eq!(touched.written, written);
        assert_eq!(touched.read, PageSet::from(pages(100, 700)).difference(&written));
        assert_eq!(mapping.marks()[600..650], [0; 50]);

        // A kernel without the ioctl tells what was written. Written pages may be known by its absence only.
        let guard = plan::arm(1, Errno::NOTTY);
        let known = pagemap.touched(&mapping, all).unwrap();
        drop(guard);
        assert!(known.read.is_empty());
        assert_eq!(known.written, written);
        for n in [1, 2] {
            let guard = plan::arm(n, Errno::IO);
            let seen = pagemap.touched(&mapping, all).is_err() || plan::calls_seen() < n;
            drop(guard);
            assert!(seen);
        }
    }
}
