//! What the pages of a mapped space are made of: asks the kernel which are private, and what the files behind the others hold.
//!
//! Never reads a page: reading what no file holds would make the kernel allocate it. So does a guest that touches a page which nobody has written: such
//! pages are data from then on, though they are zeroes.

use super::image::is_hole;
use super::layer::{host_pages, space_pages};
use super::{OwnFile, State, View};
use crate::backing::{Allocation, Extent, Sealed};
use crate::error::SpaceError;
use crate::page::{PageRange, PageSet};
use crate::sys::pagemap::ScanMethod;

impl State {
    /// Data, or zeroes that take no room: there is no base image any more once memory is mapped.
    pub(super) fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        self.origin.geometry().check_pages(range)?;
        let mut extents = Vec::new();
        let mut push = |pages: PageRange, state| {
            if !pages.is_empty() {
                extents.push(Extent { pages, state });
            }
        };
        let mut at = range.start();
        for data in self.data_in(range)?.within(range).runs() {
            push(PageRange::from_bounds(at, data.start()), Allocation::Zero);
            push(data, Allocation::Data);
            at = data.end();
        }
        push(PageRange::from_bounds(at, range.end()), Allocation::Zero);
        Ok(extents)
    }

    /// The pages of `range` that may be other than zeroes, and maybe some around it.
    fn data_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        let geometry = self.geometry();
        let host = host_pages(geometry, range);
        let held = match &self.view {
            View::Shared(OwnFile::Writable(file)) => file.data_in(host)?,
            View::Shared(OwnFile::Sealed(layer)) => layer.file.data_in(host)?,
            // Its own file shows through, in part: nothing is known without asking both.
            View::Kept(_) => return Ok(PageSet::from(range)),
            View::Private => {
                let pagemap = self.origin.family().pagemap()?;
                let private = space_pages(geometry, &pagemap.scan(&self.mapping, host, ScanMethod::Best)?);
                // What shows something else than the origin and is not private: zeroes, or nothing that is known here.
                let moved = self.shown.diff_in(self.origin.index(), range);
                let runs = moved.runs().flat_map(|run| self.shown.runs(run));
                let mut other = PageSet::new();
                runs.filter(|(_, state)| !is_hole(*state)).for_each(|(run, _)| other.push(run));
                let as_origin = self.origin.data_in(&PageSet::from(range).difference(&moved))?;
                return Ok(private.union(&other).union(&as_origin));
            }
        };
        Ok(space_pages(geometry, &held))
    }
}

#[cfg(test)]
mod tests {
    use crate::backing::{Allocation, Backing, Cut, Mapped, Sealed, Tree};
    use crate::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageRange, PageSize};

    const PAGES: u64 = 64;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    fn data(space: &Mapped, within: PageRange) -> Vec<u64> {
        let mut at = within.start();
        let mut found = Vec::new();
        for extent in space.allocation(within).expect("inside") {
            assert_eq!(extent.pages.start(), at, "they cover the range");
            at = extent.pages.end();
            if extent.state == Allocation::Data {
                found.extend(extent.pages.iter().map(PageIndex::get));
            }
        }
        assert_eq!(at, within.end());
        found
    }

    fn write(space: &Mapped, page: u64, byte: u8) {
        space.write(ByteOffset::new(page * 4096), &[byte; 4096]).expect("room");
    }

    #[test]
    fn written_pages_are_data_and_zeroed_ones_are_not_in_every_view() {
        let geometry = Geometry::new(ByteSize::new(PAGES * 4096), PageSize::KIB_4).expect("a size");
        let space = Mapped::create(&Tree::default(), geometry, None).expect("room");
        let all = geometry.all();
        assert!(data(&space, all).is_empty());
        write(&space, 3, 1);
        write(&space, 40, 1);
        assert_eq!(data(&space, all), [3, 40]);
        assert_eq!(data(&space, range(4, 41)), [40]);
        space.zero(range(3, 4)).expect("inside");
        assert_eq!(data(&space, all), [40], "a shared view");
        let (first, _) = space.cut().expect("nobody has it").commit();
        assert_eq!(data(&space, all), [40], "a private one");
        write(&space, 7, 2);
        space.zero(range(40, 41)).expect("inside");
        assert_eq!(data(&space, all), [7]);
        let (second, _) = space.cut().expect("nobody has it").commit();
        assert_eq!(data(&space, all), [7]);
        // A first write has the kernel allocate the page in the file below too, of zeroes: it is held for all who show that file.
        let touched = [7, 40, 63];
        for (image, want) in [(&first, 40), (&second, 7)] {
            let clone = image.spawn().expect("room");
            let found = data(&clone, all);
            assert!(found.contains(&want) && found.iter().all(|page| touched.contains(page)), "{found:?}");
            write(&clone, 63, 3);
            let found = data(&clone, all);
            assert!(found.contains(&63) && found.iter().all(|page| touched.contains(page)), "{found:?}");
            clone.reset().expect("nobody has it");
            clone.validate().expect("as it was");
        }
        assert_eq!(data(&space, range(7, 8)), [7]);
        assert!(data(&space, range(8, 8)).is_empty());
        space.allocation(range(60, PAGES + 1)).expect_err("past the end");
    }
}
