//! Copying back to the origin: what it leaves, what it takes, what it refuses, and that a second view is never that of another origin.

use rustix::io::Errno;

use super::*;
use crate::backing::{Cut, Sealed};
use crate::page::{GeometryError, PageIndex, PageSize};
use crate::sys::fault::plan;
use crate::{Limits, Tree};

const PAGES: u64 = 256;

fn range(start: u64, end: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(PageIndex::new).collect()
}

fn cut(space: &Mapped) -> MappedImage {
    space.cut().unwrap().commit().0
}

fn content(space: &Mapped) -> Vec<u8> {
    let mut all = vec![0; space.geometry().len().get() as usize];
    space.read(ByteOffset::ZERO, &mut all).unwrap();
    all
}

fn put(space: &Mapped, page: u64, byte: u8) {
    // In the middle, where only a comparison of the whole page finds it.
    space.write(ByteOffset::new(page * 4096 + 2345), &[byte]).unwrap();
}

/// Cut twice, so that its origin lies on two layers, in three pieces.
fn parent(limits: Limits, page: PageSize) -> Mapped {
    let geometry = Geometry::new(PageSize::KIB_4.size_of(PageCount::new(PAGES)), page).unwrap();
    let parent = Mapped::create(&Tree::new(limits), geometry, None).unwrap();
    (0..PAGES).step_by(2).for_each(|page| put(&parent, page, page as u8 | 1));
    cut(&parent);
    (40..60).for_each(|page| put(&parent, page, 200));
    cut(&parent);
    parent
}

fn clone() -> Mapped {
    parent(Limits::default(), PageSize::KIB_4).origin().spawn().unwrap()
}

#[test]
fn it_leaves_what_a_reset_leaves_and_keeps_the_pages() {
    let clone = clone();
    let before = content(&clone);
    for round in 0..3 {
        let written = [0, 1, 41, 42, 43, 100, 255];
        written.into_iter().for_each(|page| put(&clone, page, 77 + round));
        clone.zero(range(50, 54)).unwrap();
        let dirty = clone.dirty().unwrap();
        // Pages that were not written are only compared.
        let listed = dirty.union(&set(110..120));
        assert_eq!(clone.reset_copying(&listed).unwrap(), listed.count());
        assert!(content(&clone) == before);
        clone.validate().unwrap();
        assert_eq!(clone.dirty().unwrap(), dirty);
        assert_eq!(clone.usage().unwrap().private, dirty.count());
    }
    assert_eq!(clone.origin().tree().usage().clone_mappings, 3);
    // Its own and those for three pages zeroed in the middle of a layer, and the second view's.
    assert_eq!(clone.kernel_mappings(), 5 + 3);
    assert_eq!(clone.reset().unwrap().get(), 7 + 4);
    assert!(content(&clone) == before && clone.dirty().unwrap().is_empty());
    assert!(clone.usage().unwrap().private.is_zero());
    let tree = clone.origin().tree().clone();
    drop(clone);
    assert_eq!(tree.usage().clone_mappings, 0);
}

#[test]
fn what_is_left_out_stays_and_what_lies_outside_is_refused() {
    let clone = clone();
    let before = content(&clone);
    put(&clone, 5, 9);
    put(&clone, 6, 9);
    let outside = clone.reset_copying(&set([5, PAGES]));
    assert!(matches!(outside, Err(SpaceError::Geometry(GeometryError::OutOfRange { .. }))), "{outside:?}");
    assert_eq!(content(&clone)[5 * 4096 + 2345], 9);
    clone.reset_copying(&set([5])).unwrap();
    assert_eq!((content(&clone)[5 * 4096 + 2345], content(&clone)[6 * 4096 + 2345]), (0, 9));
    clone.reset_copying(&set([])).unwrap();
    clone.reset_copying(&set([6])).unwrap();
    assert!(content(&clone) == before);
}

#[test]
fn a_space_that_was_never_cut_goes_back_too() {
    let geometry = Geometry::new(ByteSize::kib(64), PageSize::KIB_4).unwrap();
    let space = Mapped::create(&Tree::default(), geometry, None).unwrap();
    put(&space, 3, 1);
    space.reset_copying(&set([3])).unwrap();
    assert!(content(&space).iter().all(|byte| *byte == 0));
}

#[test]
fn parts_of_larger_pages_that_nobody_wrote_stay_shared() {
    let parent = parent(Limits::default(), PageSize::new(ByteSize::kib(64)).unwrap());
    let clone = parent.origin().spawn().unwrap();
    let before = content(&clone);
    put(&clone, 18, 7);
    put(&clone, 250, 7);
    assert_eq!(clone.reset_copying(&set([1, 2, 15])).unwrap().get(), 3);
    assert!(content(&clone) == before);
    let state = clone.shared().unwrap();
    let pagemap = state.origin.family().pagemap().unwrap();
    let private = pagemap.scan(&state.mapping, state.mapping.geometry().all(), ScanMethod::Best).unwrap();
    assert_eq!(private, set([18, 250]));
}

#[test]
fn the_second_view_goes_with_its_origin() {
    let parent = parent(Limits::default(), PageSize::KIB_4);
    let mut before = content(&parent);
    for round in 1..5 {
        put(&parent, 7, 100 + round);
        put(&parent, 45, 100 + round);
        parent.reset_copying(&set([7, 45])).unwrap();
        assert!(content(&parent) == before);
        put(&parent, 7, round);
        // One that is undone changes no origin.
        drop(parent.cut().unwrap());
        parent.validate().unwrap();
        assert!(parent.state.read().second.is_some());
        cut(&parent);
        assert!(parent.state.read().second.is_none());
        before = content(&parent);
        assert_eq!(before[7 * 4096 + 2345], round);
        parent.validate().unwrap();
    }
    let cut = parent.cut_elsewhere(|image| image.map_at(Placement::Anywhere)).unwrap();
    drop(cut.commit());
    assert!(parent.state.read().second.is_none());
    put(&parent, 7, 99);
    parent.reset_copying(&set([7])).unwrap();
    assert!(content(&parent) == before);
    parent.validate().unwrap();
}

#[test]
fn a_merge_leaves_the_second_view_right() {
    let limits = Limits { merge_over_layers: 2, ..Limits::default() };
    let parent = parent(limits, PageSize::KIB_4);
    put(&parent, 90, 3);
    let (image, deferred) = parent.cut().unwrap().commit();
    let clone = image.spawn().unwrap();
    let before = content(&clone);
    put(&clone, 90, 4);
    clone.reset_copying(&set([90])).unwrap();
    let layers = image.layers();
    drop(deferred);
    assert!(image.layers() < layers, "it was merged");
    put(&clone, 90, 5);
    put(&clone, 41, 5);
    clone.reset_copying(&set([41, 90])).unwrap();
    assert!(content(&clone) == before);
    clone.validate().unwrap();
}

#[test]
fn a_failure_at_any_call_changes_nothing() {
    let clone = clone();
    put(&clone, 5, 9);
    put(&clone, 44, 9);
    let (written, dirty) = (content(&clone), clone.dirty().unwrap());
    for n in 1.. {
        let mappings = clone.kernel_mappings();
        let guard = plan::arm(n, Errno::NOMEM);
        let copied = clone.reset_copying(&dirty);
        let seen = plan::calls_seen();
        drop(guard);
        if seen < n {
            copied.unwrap();
            assert!(n > 3, "{n}");
            break;
        }
        assert!(copied.is_err());
        assert!(content(&clone) == written);
        assert_eq!((clone.kernel_mappings(), clone.dirty().unwrap()), (mappings, dirty.clone()));
    }
    assert_eq!(content(&clone)[5 * 4096 + 2345], 0);
    clone.validate().unwrap();
}

#[test]
fn a_second_view_has_to_fit_the_limit_on_mappings() {
    let origin = parent(Limits { mappings_per_vm: 7, ..Limits::default() }, PageSize::KIB_4).origin();
    let clone = origin.spawn().unwrap();
    let before = content(&clone);
    put(&clone, 5, 9);
    clone.zero(range(100, 101)).unwrap();
    let refused = clone.reset_copying(&set([5]));
    assert!(matches!(refused, Err(SpaceError::MappingLimit { needed: 8, limit: 7, .. })), "{refused:?}");
    assert_eq!(content(&clone)[5 * 4096 + 2345], 9);
    clone.reset().unwrap();
    put(&clone, 5, 9);
    clone.reset_copying(&set([5])).unwrap();
    assert!(content(&clone) == before);
    // With it there is no room for one more piece: zeroes are written.
    clone.zero(range(100, 101)).unwrap();
    assert_eq!(clone.kernel_mappings(), 6);
    assert_eq!(content(&clone)[100 * 4096 + 2345], 0);
    clone.validate().unwrap();
    // A reset by mapping everything anew drops it.
    clone.reset().unwrap();
    assert!(content(&clone) == before);
}

#[test]
fn a_live_fork_goes_on_and_takes_what_was_copied_back() {
    let parent = parent(Limits::default(), PageSize::KIB_4);
    let before = content(&parent);
    for round in 0..3 {
        put(&parent, 5, 20 + round);
        put(&parent, 45, 20 + round);
        let Begun::Watching(mut attempt) = parent.precopy(Onward::Here).unwrap() else {
            return crate::testing::skip("this kernel has no asynchronous write protection");
        };
        let found = attempt.look().unwrap();
        attempt.copy(found).unwrap();
        // Under protection: the copies are writes, which the last round finds.
        parent.reset_copying(&set([5, 45])).unwrap();
        let Ok(live) = attempt.cut(PauseBound::None) else { panic!("nobody reset or cut the space") };
        let image = live.cut.commit().0;
        drop(attempt);
        parent.validate().unwrap();
        let clone = image.spawn().unwrap();
        assert!(content(&clone) == before && content(&parent) == before);
        assert!(parent.dirty().unwrap().is_empty(), "the pages are private, and the new origin's");
        // The tracker tells what is written now, and what is copied back.
        put(&parent, 45, 99);
        assert_eq!(parent.dirty().unwrap(), set([45]));
        parent.reset_copying(&set([5, 45])).unwrap();
        assert_eq!(parent.dirty().unwrap(), set([45]));
        assert!(content(&parent) == before);
        parent.validate().unwrap();
        if round == 1 {
            parent.reset().unwrap();
            assert!(content(&parent) == before);
        }
    }
}
