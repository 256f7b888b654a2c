//! Cutting mapped RAM: the first cut of a shared view, and every later one.
//!
//! First: the file is sealed against new writers and the view is moved aside, page tables and all, while a private view takes its
//! place; nothing is copied and the cost does not grow with RAM. Later: the private pages are found in the page
//! tables and copied into a new layer; the commit lays it over them. Where they are so scattered that the mappings would exceed
//! their limit, small gaps of clean pages are copied along. Live: the layer was made ahead by [`precopy`](super::precopy), and the
//! private pages stay. Elsewhere: as the first or a later one but for the last step, which is in [`relocate`](super::relocate).
//!
//! Everything that can fail happens before the commit, but for laying extents: one that cannot be laid leaves its pages
//! private, which shows the same bytes and only costs memory.

use std::collections::HashMap;
use std::mem::replace;
use std::sync::Arc;

use parking_lot::RwLockWriteGuard;

use super::image::layer_runs;
use super::layer::{Content, Layer, LayerBuilder, Spot, seal_error};
use super::relocate::Elsewhere;
use super::{MappedImage, OwnFile, State, View};
use crate::backing::{Cut, Deferred};
use crate::error::SpaceError;
use crate::overlay::{Index, PageState};
use crate::page::{ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet};
use crate::sys::freeze::{MovedAside, Restored};
use crate::sys::memfd::{FinalSeal, SealFailed};

/// Bytes of clean pages between two dirty runs that are copied along rather than mapped apart: a mapping costs every clone about as
/// much time as copying this costs once.
const CHEAP_GAP: ByteSize = ByteSize::kib(4);

/// A cut of mapped RAM; holds the space until it is committed or dropped.
pub struct MappedCut<'a> {
    pub(super) state: RwLockWriteGuard<'a, State>,
    pub(super) sealed: MappedImage,
    pub(super) step: Step,
}

pub(super) enum Step {
    /// The view was moved aside.
    First { aside: Option<MovedAside>, layer: Arc<Layer> },
    /// A layer was made of the private pages, and waits to be laid over them.
    Later,
    /// A layer was made ahead, and stays beside the private pages it was copied from.
    Live(Arc<Layer>),
    /// The image is mapped at other addresses too.
    Elsewhere(Elsewhere),
    /// Committed.
    Done,
}

impl<'a> MappedCut<'a> {
    pub(super) fn begin(mut state: RwLockWriteGuard<'a, State>) -> Result<Self, SpaceError> {
        let (sealed, own) = seal(&mut state)?;
        let Some(layer) = own else { return Ok(Self { state, sealed, step: Step::Later }) };
        let aside = match state.mapping.move_aside(&layer.file) {
            Ok(aside) => Some(aside),
            Err(error) => return Err(state.note(error)),
        };
        state.view = View::Private;
        Ok(Self { state, sealed, step: Step::First { aside, layer } })
    }

    /// A cut whose layer, sealed, was made ahead by a pre-copy, which undoes what it did if this is dropped.
    pub(super) fn live(state: RwLockWriteGuard<'a, State>, sealed: MappedImage, layer: Arc<Layer>) -> Self {
        Self { state, sealed, step: Step::Live(layer) }
    }
}

/// Makes the image of this instant, and with it, at the first cut, the layer that the space's own file becomes, sealed against new
/// writers. The space's content, addresses and write protection stay what they are.
pub(super) fn seal(state: &mut State) -> Result<(MappedImage, Option<Arc<Layer>>), SpaceError> {
    if matches!(state.view, View::Shared(_)) {
        // Refused before the file is sealed, which cannot be undone.
        state.origin.check_depth()?;
        let layer = seal_own_file(state)?;
        let spot = Spot { layer: layer.clone(), content: Content::Data };
        let index = Index::uniform(state.geometry().pages(), &PageState::Data(spot));
        return Ok((state.origin.child(index)?, Some(layer)));
    }
    let written = state.written_pages()?;
    let mut index = state.next_index();
    if !written.is_empty() {
        copy_written(state, &written, &mut index)?;
    }
    Ok((state.origin.child(index)?, None))
}

/// Seals the file of a space that was never cut; a cut that was undone has done so already.
fn seal_own_file(state: &mut State) -> Result<Arc<Layer>, SpaceError> {
    match replace(&mut state.view, View::Private) {
        View::Shared(OwnFile::Writable(file)) => match file.seal_future_write() {
            Ok(sealed) => {
                let layer = Layer::new(state.origin.tree(), sealed);
                state.view = View::Shared(OwnFile::Sealed(layer.clone()));
                Ok(layer)
            }
            Err(SealFailed { memfd, error }) => {
                state.view = View::Shared(OwnFile::Writable(memfd));
                Err(seal_error(error))
            }
        },
        View::Shared(OwnFile::Sealed(layer)) => {
            state.view = View::Shared(OwnFile::Sealed(layer.clone()));
            Ok(layer)
        }
        View::Private => unreachable!("asked only for a shared view"),
    }
}

/// Copies pages into a new layer and names it in `index`, within the limit on mappings.
fn copy_written(state: &State, written: &PageSet, index: &mut Index<Spot>) -> Result<(), SpaceError> {
    let geometry = state.geometry();
    let (pages, _) = pages_to_copy(index, geometry, written, state.origin.tree().limits().mappings_per_vm)?;
    let mut builder = LayerBuilder::new(state.origin.tree(), geometry)?;
    for run in pages.runs() {
        for (piece, below) in index.runs(run) {
            // Known to be zeroes. Looking would make the kernel allocate the page.
            let hole = matches!(below, PageState::Data(Spot { content: Content::Hole, .. }));
            if !hole {
                builder.copy_from(&state.mapping, piece)?;
                continue;
            }
            for page in piece.iter() {
                let page_alone = PageRange::one(page);
                if written.contains(page) {
                    builder.copy_from(&state.mapping, page_alone)?;
                } else {
                    builder.leave_out(page_alone);
                }
            }
        }
    }
    builder.finish()?.name_in(index);
    Ok(())
}

/// The pages that a new layer over `index` is to hold so that a clone stays within the limit on mappings: `pages` with small gaps
/// closed, or else whichever is less of them with larger gaps closed, and of those with all that lies on smaller layers. With it, the
/// mappings that a clone will need.
pub(super) fn pages_to_copy(
    index: &Index<Spot>,
    geometry: Geometry,
    pages: &PageSet,
    limit: u64,
) -> Result<(PageSet, u64), SpaceError> {
    let all = geometry.all();
    let near = pages.closing_gaps(PageCount::new(CHEAP_GAP.get() >> geometry.page_size().shift()));
    let needed = mappings_with(index, all, &near);
    if needed <= limit {
        return Ok((near, needed));
    }
    let in_pieces = pages.union(&on_smaller_layers(index, all));
    let ways = [near, in_pieces].map(|pages| closed_to_fit(index, all, pages, limit));
    let least = ways.into_iter().flatten().min_by_key(|(pages, _)| pages.count());
    least.ok_or(SpaceError::MappingLimit { needed, limit, name: "Limits::mappings_per_vm" })
}

/// The set with gaps closed until a clone fits the limit, and the mappings that it then needs; `None` if it never does.
fn closed_to_fit(index: &Index<Spot>, all: PageRange, mut pages: PageSet, limit: u64) -> Option<(PageSet, u64)> {
    let mut gap = PageCount::new(1);
    loop {
        let needed = mappings_with(index, all, &pages);
        if needed <= limit {
            return Some((pages, needed));
        }
        if pages.runs().len() <= 1 {
            return None;
        }
        pages = pages.closing_gaps(gap);
        gap = gap.saturating_add(gap);
    }
}

/// Every page that does not lie on the layer which most pages lie on.
fn on_smaller_layers(shown: &Index<Spot>, all: PageRange) -> PageSet {
    let runs = layer_runs(shown, all);
    let mut sizes: HashMap<*const Layer, u64> = HashMap::new();
    for (run, layer) in &runs {
        *sizes.entry(Arc::as_ptr(layer)).or_default() += run.count().get();
    }
    let largest = sizes.into_iter().max_by_key(|(_, pages)| *pages).map(|(layer, _)| layer);
    let mut smaller = PageSet::new();
    for (run, layer) in runs {
        if Some(Arc::as_ptr(&layer)) != largest {
            smaller.push(run);
        }
    }
    smaller
}

/// Kernel mappings of a clone of `shown` with `over` laid on it: runs of one layer.
fn mappings_with(shown: &Index<Spot>, all: PageRange, over: &PageSet) -> u64 {
    let mut count = over.runs().len() as u64;
    // A run below counts once for every piece of it that stays in sight.
    let mut above = over.runs().peekable();
    for (run, _) in layer_runs(shown, all) {
        let mut at = run.start();
        loop {
            while above.peek().is_some_and(|over| over.end() <= at) {
                above.next();
            }
            match above.peek() {
                Some(over) if over.start() < run.end() => {
                    count += u64::from(at < over.start());
                    at = over.end();
                    if at >= run.end() {
                        break;
                    }
                }
                _ => {
                    count += u64::from(at < run.end());
                    break;
                }
            }
        }
    }
    count
}

/// The old view, to be unmapped when nobody waits, and the layer whose last seal can be set only then.
pub(super) struct OldView<V> {
    view: Option<V>,
    layer: Option<Arc<Layer>>,
}

impl<V> OldView<V> {
    pub(super) fn new(view: V, layer: Option<Arc<Layer>>) -> Self {
        Self { view: Some(view), layer }
    }
}

impl<V> Drop for OldView<V> {
    fn drop(&mut self) {
        drop(self.view.take());
        let Some(layer) = self.layer.take() else { return };
        match layer.file.finish_seal() {
            Ok(FinalSeal::Applied) => {}
            Ok(FinalSeal::StillMapped) => {
                tracing::warn!("a layer is still mapped writable by somebody: drain pinned I/O before a fork");
            }
            Err(error) => tracing::warn!(%error, "a layer could not be sealed for good"),
        }
    }
}

impl Cut for MappedCut<'_> {
    type Sealed = MappedImage;

    fn commit(mut self) -> (MappedImage, Deferred) {
        let state = &mut *self.state;
        state.table_bytes = 0;
        let old = replace(&mut state.origin, self.sealed.clone());
        let deferred = match replace(&mut self.step, Step::Done) {
            Step::First { aside, layer } => {
                state.shown = self.sealed.index().clone();
                Deferred::costly((OldView::new(aside, Some(layer)), old)).named("old view")
            }
            Step::Later => {
                lay(state);
                let lifted = state.cut_committed();
                let lifts = lifted.is_some();
                let deferred = if lifts { Deferred::costly((lifted, old)) } else { Deferred::cheap(old) };
                deferred.named(if lifts { "write protection" } else { "old image" })
            }
            Step::Live(layer) => {
                state.live_cut_committed();
                // Only calls wrote the file, so the last seal is due as soon as nobody waits for it.
                Deferred::cheap((OldView::new((), Some(layer)), old)).named("last seal")
            }
            Step::Elsewhere(elsewhere) => elsewhere.commit(&mut self.state, &self.sealed, old),
            Step::Done => unreachable!("commit takes the cut"),
        };
        (self.sealed.clone(), deferred)
    }
}

/// Lays the origin's layers over all pages that show others. One run of data and holes together is one mapping.
fn lay(state: &mut State) {
    let origin = state.origin.index().clone();
    for moved in state.shown.diff(&origin).runs() {
        for (run, layer) in layer_runs(&origin, moved) {
            if let Err(error) = state.show(run, &Spot { layer, content: Content::Data }) {
                tracing::warn!(%error, ?run, "pages of a fork stay private in the parent");
                continue;
            }
            for (run, spot) in origin.runs(run) {
                if matches!(spot, PageState::Data(Spot { content: Content::Hole, .. })) {
                    state.shown.set(run, &spot.cloned());
                }
            }
        }
    }
    // Everything laid: the index is the image's own, node for node, and not only in content.
    if state.shown.diff(state.origin.index()).is_empty() {
        state.shown = state.origin.index().clone();
    }
    state.table_bytes = 0;
}

impl Drop for MappedCut<'_> {
    fn drop(&mut self) {
        let Step::First { aside: Some(aside), layer } = replace(&mut self.step, Step::Done) else { return };
        let state = &mut *self.state;
        match aside.restore(&mut state.mapping) {
            Ok(Restored::Shared) => state.view = View::Shared(OwnFile::Sealed(layer)),
            Ok(Restored::KeptPrivate) => keep_private(state, layer),
            Err(failed) => {
                let error = state.note(failed.error);
                tracing::warn!(%error, "an undone cut keeps its private view, which shows the same bytes");
                keep_private(state, layer);
            }
        }
    }
}

/// The old view cannot come back: the private one shows the same bytes over a file that only this space maps.
fn keep_private(state: &mut State, layer: Arc<Layer>) {
    let spot = Spot { layer, content: Content::Data };
    let all = PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(state.geometry().pages().get()));
    state.shown.set(all, &PageState::Data(spot));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tree;
    use crate::page::PageSize;
    use crate::sys::memfd::Memfd;

    #[test]
    fn mappings_are_counted_as_a_clone_would_need_them() {
        let geometry = Geometry::new(ByteSize::kib(4 * 100), PageSize::KIB_4).unwrap();
        let tree = Tree::default();
        let layer = || Layer::new(&tree, Memfd::create("t", geometry.len()).unwrap().seal_all().unwrap());
        let spot = |layer: &Arc<Layer>| PageState::Data(Spot { layer: layer.clone(), content: Content::Data });
        let range = |a, b| PageRange::from_bounds(PageIndex::new(a), PageIndex::new(b));
        let (a, b, c) = (layer(), layer(), layer());
        let mut shown = Index::uniform(geometry.pages(), &spot(&a));
        shown.set(range(10, 20), &spot(&b));
        for runs in [
            vec![],
            vec![(0, 100)],
            vec![(5, 6)],
            vec![(5, 25)],
            vec![(10, 20)],
            vec![(0, 1), (12, 14), (18, 30), (99, 100)],
        ] {
            let mut over = PageSet::new();
            let mut with = shown.clone();
            for (start, end) in runs {
                over.push(range(start, end));
                with.set(range(start, end), &spot(&c));
            }
            let want = layer_runs(&with, geometry.all()).len() as u64;
            assert_eq!(mappings_with(&shown, geometry.all(), &over), want, "{over:?}");
        }
    }
}
