//! A space, or an image, and its model side by side: every call goes to both, and every check compares them.
//!
//! Speaks only the public traits, so what it finds is what any embedder would find.

use std::fmt::Display;
use std::sync::Arc;

use super::model::{ByteSource, Flat};
use crate::backing::{Backing, Cut, Sealed, Tree};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet};

/// Says which rule of the contract does not hold, and how that shows.
#[track_caller]
pub(super) fn broken(rule: &str, how: impl Display) -> ! {
    panic!("conformance: {rule}: {how}")
}

/// Unwraps what the contract says cannot fail here.
#[track_caller]
pub(super) fn ok<T>(call: &str, result: Result<T, SpaceError>) -> T {
    result.unwrap_or_else(|error| broken(call, format_args!("must work here, and failed: {error}")))
}

/// The error of a call that must fail.
#[track_caller]
pub(super) fn refused<T>(call: &str, result: Result<T, SpaceError>) -> SpaceError {
    match result {
        Ok(_) => broken(call, "must be refused here, and was done"),
        Err(error) => error,
    }
}

#[track_caller]
pub(super) fn check_geometry_error<T>(call: &str, result: Result<T, SpaceError>) {
    let error = refused(call, result);
    if !matches!(error, SpaceError::Geometry(_)) {
        broken(call, format_args!("out of range must be SpaceError::Geometry, not: {error}"));
    }
}

#[track_caller]
pub(super) fn check_unrelated<T>(call: &str, result: Result<T, SpaceError>) {
    let error = refused(call, result);
    if !matches!(error, SpaceError::Unrelated(_)) {
        broken(call, format_args!("must be SpaceError::Unrelated, not: {error}"));
    }
}

pub(super) fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(first), PageIndex::new(first + count))
}

/// `must` ⊆ `found` ⊆ `may`.
#[track_caller]
fn check_between(rule: &str, must: &PageSet, found: &PageSet, may: &PageSet) {
    if let Some(page) = must.pages().find(|page| !found.contains(*page)) {
        broken(rule, format_args!("{page:?} has other bytes, and is not named"));
    }
    if let Some(page) = found.pages().find(|page| !may.contains(*page)) {
        broken(rule, format_args!("{page:?} is named, and nobody wrote there"));
    }
}

/// With the pages between: a backing may copy clean pages along with written ones around them.
fn hull(set: &PageSet) -> PageSet {
    let mut hull = PageSet::new();
    if let (Some(first), Some(last)) = (set.runs().next(), set.runs().last()) {
        hull.push(PageRange::from_bounds(first.start(), last.end()));
    }
    hull
}

/// A live space and what it must hold.
pub(super) struct Pair<B: Backing> {
    pub(super) space: B,
    pub(super) now: Flat,
    /// What it held at its last cut.
    pub(super) origin: Flat,
}

/// A sealed image and what it must hold.
pub(super) struct ImagePair<B: Backing> {
    pub(super) image: B::Sealed,
    pub(super) flat: Flat,
}

impl<B: Backing> Pair<B> {
    pub(super) fn create(tree: &Tree, geometry: Geometry, base: Option<&[u8]>) -> Self {
        let source = base.map(|bytes| Arc::new(ByteSource::new(bytes.to_vec())) as Arc<dyn Source>);
        let space = ok("create", B::create(tree, geometry, source));
        if space.geometry() != geometry {
            broken("geometry", format_args!("{geometry:?} asked for, {:?} made", space.geometry()));
        }
        let now = Flat::new(geometry, base.unwrap_or(&[]));
        Self { space, origin: now.clone(), now }
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        ok("write", self.space.write(ByteOffset::new(at), data));
        self.now.write(ByteOffset::new(at), data);
    }

    pub(super) fn zero(&mut self, range: PageRange) {
        ok("zero", self.space.zero(range));
        self.now.zero(range);
    }

    pub(super) fn reset(&mut self) {
        let dirty = ok("dirty", self.space.dirty()).count();
        let dropped = ok("reset", self.space.reset());
        if dirty != dropped {
            broken("reset", format_args!("it says {dropped} were dropped, {dirty} were dirty"));
        }
        self.now = self.origin.clone();
    }

    /// Cuts and commits.
    pub(super) fn cut(&mut self) -> ImagePair<B> {
        let before = self.space.origin().depth();
        let (image, deferred) = ok("cut", self.space.cut()).commit();
        drop(deferred);
        if image.depth() != before + 1 {
            broken("depth", format_args!("a cut of a space at depth {before} is at depth {}", image.depth()));
        }
        if !image.same(&self.space.origin()) {
            broken("origin", "after a commit the origin must be the image that was made");
        }
        self.origin = self.now.clone();
        ImagePair { image, flat: self.now.clone() }
    }

    /// Cuts and drops the cut: nothing may have changed.
    pub(super) fn roll_back(&mut self) {
        let origin = self.space.origin();
        let dirty = ok("dirty", self.space.dirty());
        drop(ok("cut", self.space.cut()));
        if !origin.same(&self.space.origin()) {
            broken("rollback", "after a dropped cut the origin must be what it was");
        }
        if dirty != ok("dirty", self.space.dirty()) {
            broken("rollback", "after a dropped cut the dirty pages must be what they were");
        }
        self.check("after a dropped cut");
    }

    pub(super) fn check_read(&self, at: u64, len: u64, when: &str) {
        let mut found = vec![0xa5; len as usize];
        ok("read", self.space.read(ByteOffset::new(at), &mut found));
        let want = self.now.read(ByteOffset::new(at), len);
        if found == want {
            return;
        }
        if let Some(wrong) = found.iter().zip(want).position(|(a, b)| a != b) {
            let (found, want) = (found[wrong], want[wrong]);
            let at = at + wrong as u64;
            broken("read", format_args!("{when}: byte {at:#x} reads as {found:#04x}, must be {want:#04x}"));
        }
    }

    /// Everything: content, dirty pages, counts, and the backing's own check.
    pub(super) fn check(&self, when: &str) {
        self.check_read(0, self.now.geometry().len().get(), when);
        self.check_books(when);
    }

    /// Everything but the content.
    pub(super) fn check_books(&self, when: &str) {
        let dirty = ok("dirty", self.space.dirty());
        let (changed, touched) = (self.now.changed(&self.origin), self.now.touched(&self.origin));
        check_between(&format!("dirty, {when}"), &changed, &dirty, &touched);

        let usage = ok("usage", self.space.usage());
        let total = self.now.geometry().pages();
        let sum = usage.private.get() + usage.shared.get() + usage.zero.get();
        if sum != total.get() {
            broken("usage", format_args!("{when}: private + shared + zero are {sum} of {total}: {usage:?}"));
        }
        let must = changed.pages().filter(|page| !self.now.is_zero(*page)).count() as u64;
        // Before its first cut a space shares with nobody, and may count whatever it holds as its own.
        let may = if usage.depth == 0 { total } else { touched.count() }.get();
        if !(must..=may).contains(&usage.private.get()) {
            broken("usage", format_args!("{when}: {} private, must be from {must} to {may}", usage.private));
        }
        if usage.zero.get() > self.now.zero_pages() {
            let zero = self.now.zero_pages();
            broken("usage", format_args!("{when}: {} counted as zero, only {zero} are", usage.zero));
        }
        if usage.depth != self.space.origin().depth() {
            broken(
                "usage",
                format_args!("{when}: depth {}, its origin's is {}", usage.depth, self.space.origin().depth()),
            );
        }
        if let Err(wrong) = self.space.validate() {
            broken("validate", format_args!("{when}: {wrong}"));
        }
    }
}

impl<B: Backing> ImagePair<B> {
    pub(super) fn spawn(&self) -> Pair<B> {
        let space = ok("spawn", self.image.spawn());
        if !space.origin().same(&self.image) {
            broken("origin", "a spawned space's origin must be the image that it came from");
        }
        Pair { space, now: self.flat.clone(), origin: self.flat.clone() }
    }

    pub(super) fn check(&self, when: &str) {
        let geometry = self.flat.geometry();
        if self.image.geometry() != geometry || Source::len(&self.image) != geometry.len() {
            broken("geometry", format_args!("{when}: the image has another shape than the space"));
        }
        let mut found = vec![0xa5; geometry.len().get() as usize];
        ok("read of an image", Source::read(&self.image, ByteOffset::ZERO, &mut found));
        if let Some(at) = self.flat.first_difference(&found) {
            broken("a sealed image never changes", format_args!("{when}: byte {:#x} is wrong", at.get()));
        }
        if let Err(wrong) = Sealed::validate(&self.image) {
            broken("validate of an image", format_args!("{when}: {wrong}"));
        }
    }

    /// Both ways round, the diff is between what must and what may be named.
    pub(super) fn check_diff(&self, other: &Self, when: &str) {
        let (changed, touched) = (self.flat.changed(&other.flat), hull(&self.flat.touched(&other.flat)));
        for (from, to) in [(self, other), (other, self)] {
            let found = ok("diff", from.image.diff(&to.image));
            check_between(&format!("diff, {when}"), &changed, &found, &touched);
        }
    }

    pub(super) fn flatten(&self) -> Self {
        Self { image: ok("flatten", self.image.flatten()), flat: self.flat.clone() }
    }

    pub(super) fn merge_onto(&self, ancestor: &Self) -> Self {
        let mut flat = self.flat.clone();
        flat.rewrite(&self.flat.touched(&ancestor.flat));
        Self { image: ok("merge_onto", self.image.merge_onto(&ancestor.image)), flat }
    }
}

/// Runs `check` on a tree that must be empty again afterwards.
pub(super) fn on_a_tree(limits: crate::Limits, check: impl FnOnce(&Tree)) {
    let tree = Tree::new(limits);
    check(&tree);
    check_empty(&tree, "when all was dropped");
}

pub(super) fn check_empty(tree: &Tree, when: &str) {
    let left = tree.usage();
    if left != crate::TreeUsage::default() {
        broken("nothing is left", format_args!("{when}: {left:?}"));
    }
}

/// The shape for `count` pages of this size.
pub(super) fn geometry(size: crate::page::PageSize, count: u64) -> Geometry {
    let len: ByteSize = size.size_of(PageCount::new(count));
    Geometry::new(len, size).unwrap_or_else(|error| broken("geometry", error))
}
