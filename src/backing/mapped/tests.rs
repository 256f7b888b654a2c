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
fn a_parent_can_be_forked_for_ever() {
    let parent = space(narrow(), 4096, ByteSize::kib(4));
    parent.write(page(0), &[255; 4096]).unwrap();
    let mut model = vec![0u8; 4096];
    model[0] = 255;
    for n in 0..300 {
        let (at, zeroed) = (n * 37 % 4096, (n * 101 + 7) % 4096);
        parent.write(page(at), &[n as u8 | 1]).unwrap();
        parent.zero(range(zeroed, zeroed + 1)).unwrap();
        (model[at as usize], model[zeroed as usize]) = (n as u8 | 1, 0);
        let image = cut(&parent);
        if n % 50 == 49 {
            let clone = image.spawn().unwrap();
            assert!(clone.kernel_mappings() <= 16);
            for (at, want) in model.iter().enumerate() {
                let mut byte = [0];
                clone.read(page(at as u64), &mut byte).unwrap();
                assert_eq!(byte, [*want], "page {at} after {n} forks");
            }
            parent.validate().unwrap();
        }
    }
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

#[test]
fn a_discard_after_an_undone_cut_takes_no_memory() {
    let space = space(Limits::default(), 4096, ByteSize::kib(4));
    space.write(page(5), &[1]).unwrap();
    drop(space.cut().unwrap());
    space.zero(range(0, 4096)).unwrap();
    let mut byte = [9];
    space.read(page(5), &mut byte).unwrap();
    assert_eq!((byte, private(&space)), ([0], 1));
    assert!(space.dirty().unwrap().is_empty());
}

#[test]
fn parts_of_larger_pages_are_counted_as_pages() {
    let space = space(Limits::default(), 8, ByteSize::kib(16));
    [1, 9, 17].into_iter().for_each(|at| space.write(page(at), &[1]).unwrap());
    assert_eq!((private(&space), space.dirty().unwrap().count().get()), (3, 3));
}

#[test]
fn a_listed_page_that_was_zeroed_counts_once() {
    let space = space(Limits::default(), 8, ByteSize::kib(4));
    space.write(page(1), &[1]).unwrap();
    cut(&space);
    space.zero(range(1, 2)).unwrap();
    space.write(page(2), &[1]).unwrap();
    let dirty = space.dirty().unwrap();
    assert_eq!(space.reset_listed(&dirty).unwrap(), dirty.count());
    assert!(space.dirty().unwrap().is_empty());
}
