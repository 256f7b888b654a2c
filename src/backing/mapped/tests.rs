//! What broke once: the budget on mappings, discards, and counts of pages larger than the kernel's.

use super::*;
use crate::backing::{Cut, Sealed};
use crate::page::{PageIndex, PageSize};
use crate::{Limits, Tree};

fn space(limits: Limits, pages: u64, page: ByteSize) -> Mapped {
    let size = PageSize::new(page).unwrap();
    let geometry = Geometry::new(size.size_of(PageCount::new(pages)), size).unwrap();
    Mapped::create(&Tree::new(limits), geometry, None).unwrap()
}

fn narrow() -> Limits {
    Limits { mappings_per_vm: 16, ..Limits::default() }
}

fn page(page: u64) -> ByteOffset {
    ByteOffset::new(page * 4096)
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
}

fn cut(space: &Mapped) -> MappedImage {
    space.cut().unwrap().commit().0
}

fn private(space: &Mapped) -> u64 {
    space.usage().unwrap().private.get()
}

#[test]
fn a_balloon_that_grows_page_by_page_takes_no_memory() {
    let space = space(narrow(), 4096, ByteSize::kib(4));
    (0..100).for_each(|at| space.write(page(at), &[1]).unwrap());
    cut(&space);
    (0..100).for_each(|at| space.zero(range(at, at + 1)).unwrap());
    assert_eq!((private(&space), space.kernel_mappings()), (0, 2));
    (0..40).for_each(|at| space.zero(range(200 + at * 3, 201 + at * 3)).unwrap());
    // What swallows the pieces needs no room for them.
    space.zero(range(0, 4096)).unwrap();
    assert_eq!((private(&space), space.kernel_mappings()), (0, 1));
}
