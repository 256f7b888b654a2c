//! Cutting mapped RAM: the first cut of a shared view, and every later one.
//!
//! First: the file is sealed against new writers and the view is moved aside, page tables and all, while a private view takes its
//! place; nothing is copied and the cost does not grow with RAM. Later: the private pages are found in the page
//! tables and copied into a new layer; the commit lays it over them. Live: the layer was made ahead by [`precopy`](super::precopy), and the
//! private pages stay. So they do where they are so scattered that laying them would exceed the limit on mappings: such a cut is a live
//! one whose only round is the last. Elsewhere: as the first or a later one but for the last step, which is in
//! [`relocate`](super::relocate).
//!
//! No clean page is copied here for the sake of fewer mappings, but for one between two dirty ones: clean pages are sealed already, and
//! [`merge`](super::merge) copies them when nobody waits.
//!
//! Everything that can fail happens before the commit, but for laying extents: one that cannot be laid leaves its pages
//! private, which shows the same bytes and only costs memory.

use std::mem::replace;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLockWriteGuard;

use super::image::{Parts, is_hole};
use super::layer::{Layer, LayerBuilder, host_pages, seal_error};
use super::merge;
use super::precopy::{Begun, NoCut, Onward, PauseBound, Precopy};
use super::relocate::Elsewhere;
use super::{Mapped, MappedImage, OwnFile, State, View};
use crate::backing::{Cut, Deferred};
use crate::error::SpaceError;
use crate::page::{ByteSize, PageCount, PageRange, PageSet};
use crate::sys::error::SysError;
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
    /// What a live cut that was asked for as a plain one has to undo: dropped when the space is free again.
    pub(super) _attempt: Option<Box<Precopy<'a>>>,
}

pub(super) enum Step {
    /// The view was moved aside.
    First { aside: Option<MovedAside>, layer: Arc<Layer> },
    /// A layer was made of the private pages, which are listed, and waits to be laid over them.
    Later(PageSet),
    /// A layer was made ahead, and stays beside the private pages it was copied from.
    Live(Arc<Layer>),
    /// The image is mapped at other addresses too.
    Elsewhere(Elsewhere),
    /// Committed.
    Done,
}

/// What became of sealing a space where it is.
pub(super) enum Seal {
    /// Its own file is the layer.
    First(MappedImage, Arc<Layer>),
    /// A layer was made of the written pages.
    Later(MappedImage, PageSet),
}

impl<'a> MappedCut<'a> {
    pub(super) fn begin(space: &'a Mapped) -> Result<Self, SpaceError> {
        let mut state = space.exclusive()?;
        let mut written = state.written_by_guest()?;
        if state.is_scattered(&written) {
            drop(state);
            if let Some(cut) = Self::keeping(space)? {
                return Ok(cut);
            }
            // The space was free for a moment: others may have written.
            state = space.exclusive()?;
            written = state.written_by_guest()?;
        }
        match seal(&mut state, written)? {
            Seal::Later(sealed, written) => Ok(Self { state, sealed, step: Step::Later(written), _attempt: None }),
            Seal::First(sealed, layer) => {
                let aside = match state.mapping.move_aside(&layer.file) {
                    Ok(aside) => Some(aside),
                    Err(error) => return Err(state.note(error)),
                };
                state.view = View::Private;
                Ok(Self { state, sealed, step: Step::First { aside, layer }, _attempt: None })
            }
        }
    }

    /// A cut that leaves the private pages where they are, protected so that they can be told from those written next; `None` where the
    /// kernel has no such protection, or somebody else uses it.
    fn keeping(space: &'a Mapped) -> Result<Option<Self>, SpaceError> {
        let mut attempt = match space.precopy(Onward::Here) {
            Ok(Begun::Watching(attempt)) => Box::new(attempt),
            Ok(Begun::Unwatched { why, .. }) => {
                tracing::debug!(error = %why, "scattered pages are copied again by the next fork");
                return Ok(None);
            }
            Ok(Begun::NothingToCopy) => return Ok(None),
            Err(error) => return Err(error),
        };
        match attempt.cut(PauseBound::None) {
            Ok(mut live) => {
                live.cut._attempt = Some(attempt);
                Ok(Some(live.cut))
            }
            Err(NoCut::Space(error)) => Err(error),
            Err(NoCut::TooLong(..)) => Err(SysError::Misuse("a cut without a bound met one").into()),
        }
    }

    /// A cut whose layer, sealed, was made ahead by a pre-copy, which undoes what it did if this is dropped.
    pub(super) fn live(state: RwLockWriteGuard<'a, State>, sealed: MappedImage, layer: Arc<Layer>) -> Self {
        Self { state, sealed, step: Step::Live(layer), _attempt: None }
    }
}

/// Makes the image of this instant, and with it, at the first cut, the layer that the space's own file becomes, sealed against new
/// writers. The space's content, addresses and write protection stay what they are. `written` is what [`State::written_pages`] says.
pub(super) fn seal(state: &mut State, written: PageSet) -> Result<Seal, SpaceError> {
    if matches!(state.view, View::Shared(_)) {
        // Refused before the file is sealed, which cannot be undone.
        state.origin.check_first()?;
        let layer = seal_own_file(state)?;
        return Ok(Seal::First(state.origin.first(layer.clone())?, layer));
    }
    let own = match &state.view {
        View::Kept(layer) => Some(layer.clone()),
        _ => None,
    };
    let sealed = state.origin.child(own, |below| {
        let (index, map) = (state.next_index(), state.with_zeroed(below, &state.zeroed_pages())?);
        let parts = Parts { index, map };
        if written.is_empty() { Ok(parts) } else { copy_written(state, &written, parts) }
    })?;
    Ok(Seal::Later(sealed, written))
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
        View::Private | View::Kept(_) => unreachable!("asked only for a shared view"),
    }
}

/// Copies pages into a new layer, and a clean one between two of them.
fn copy_written(state: &State, written: &PageSet, below: Parts) -> Result<Parts, SpaceError> {
    let (tree, geometry) = (state.origin.tree(), state.geometry());
    let pages = written.closing_gaps(PageCount::new(CHEAP_GAP.get() >> geometry.page_size().shift()));
    let mut builder = LayerBuilder::new(tree, geometry)?;
    let map = below.map.with(&pages, builder.layer().clone());
    // Refused before there is anything copied.
    merge::check(&map, tree.limits())?;
    for run in pages.runs() {
        for (piece, below) in below.index.runs(run) {
            // Known to be zeroes. Looking would make the kernel allocate the page.
            if !is_hole(below) {
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
    let mut index = below.index.clone();
    builder.finish()?.name_in(&mut index, state.origin.family().number());
    // What was copied along is what it was.
    for gap in pages.difference(written).runs() {
        for (run, was) in below.index.runs(gap) {
            index.set(run, &was.cloned());
        }
    }
    Ok(Parts { index, map })
}

/// From one millisecond on, each twice the last: half a second in all.
const SEAL_PAUSES: u32 = 9;

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
        // A process that another thread has just forked has the old view too, until it executes a program: it is waited for.
        for pause in (0..SEAL_PAUSES).map(|doubled| Duration::from_millis(1 << doubled)) {
            match layer.file.finish_seal() {
                Ok(FinalSeal::Applied) => return,
                Ok(FinalSeal::StillMapped) => std::thread::sleep(pause),
                Err(error) => return tracing::warn!(%error, "a layer could not be sealed for good"),
            }
        }
        tracing::warn!("a layer is still mapped writable by somebody: drain pinned I/O before a fork");
    }
}

impl Cut for MappedCut<'_> {
    type Sealed = MappedImage;

    fn commit(mut self) -> (MappedImage, Deferred) {
        let state = &mut *self.state;
        state.table_bytes = 0;
        state.view = View::Private;
        let old = (replace(&mut state.origin, self.sealed.clone()), state.second.take());
        let due = self.sealed.due();
        let deferred = match replace(&mut self.step, Step::Done) {
            Step::First { aside, layer } => {
                state.shown = self.sealed.index().clone();
                Deferred::costly((OldView::new(aside, Some(layer)), old)).named("old view")
            }
            Step::Later(written) => {
                lay(state, &written);
                let lifted = state.cut_committed();
                if lifted.is_some() || due.is_some() {
                    let what = if due.is_some() { "merge of layers" } else { "write protection" };
                    Deferred::costly((lifted, old, due)).named(what)
                } else {
                    Deferred::cheap(old).named("old image")
                }
            }
            Step::Live(layer) => {
                state.live_cut_committed();
                // Only calls wrote the file, so the last seal is due as soon as nobody waits for it.
                let seal = OldView::new((), Some(layer));
                if due.is_some() {
                    Deferred::costly((seal, old, due)).named("merge of layers")
                } else {
                    Deferred::cheap((seal, old)).named("last seal")
                }
            }
            Step::Elsewhere(elsewhere) => elsewhere.commit(&mut self.state, &self.sealed, (old, due)),
            Step::Done => unreachable!("commit takes the cut"),
        };
        (self.sealed.clone(), deferred)
    }
}

impl State {
    /// The pages that a cut has to copy: none of a space whose own file becomes the layer.
    pub(super) fn written_by_guest(&self) -> Result<PageSet, SpaceError> {
        match self.view {
            View::Shared(_) => Ok(PageSet::new()),
            View::Private | View::Kept(_) => self.written_pages(),
        }
    }

    /// Whether layers can be laid over pages without more mappings than this VM may have.
    pub(super) fn can_lay(&self, pages: &PageSet) -> bool {
        self.mapping.kernel_mappings().saturating_add(2 * pages.runs().len() as u64) <= self.budget()
    }

    /// Whether these pages can be laid over neither this VM nor a fresh clone of its origin.
    fn is_scattered(&self, pages: &PageSet) -> bool {
        let clone = self.origin.map().map_or(1, |map| map.mappings());
        !self.can_lay(pages) && clone.saturating_add(2 * pages.runs().len() as u64) > self.budget()
    }

    /// Whether to map everything anew is worth it: the VM is made of many pieces, or has no room for more, and the layers of its origin
    /// were merged meanwhile.
    fn is_in_pieces(&self, moved: &PageSet) -> bool {
        let (held, limits) = (self.mapping.kernel_mappings(), self.origin.tree().limits());
        let crowded = held > limits.merge_over_mappings || !self.can_lay(moved);
        crowded && self.origin.map().is_some_and(|map| map.mappings().saturating_mul(4) < held.saturating_mul(3))
    }

    /// Lays the origin's layers, as they are now, over pages that show the same bytes already. A run that there is no mapping left for, or
    /// that the kernel refuses, stays as it is.
    fn lay_origin(&mut self, pages: &PageSet) {
        let Some(map) = self.origin.map() else { return };
        let (geometry, budget) = (self.geometry(), self.budget());
        for (run, layer) in pages.runs().flat_map(|run| map.runs(run)) {
            if self.mapping.kernel_mappings_with(host_pages(geometry, run)) > budget {
                continue;
            }
            if let Err(error) = self.show(run, layer) {
                tracing::warn!(%error, ?run, "pages of a fork stay private in the parent");
                continue;
            }
            self.shows_origin(run);
        }
    }

    /// Notes that pages show the origin.
    pub(super) fn shows_origin(&mut self, run: PageRange) {
        let origin = self.origin.clone();
        for (run, version) in origin.index().runs(run) {
            self.table_bytes += self.shown.set(run, &version.cloned());
        }
    }
}

/// Shows the origin where the pages that were just copied, or others, are private.
fn lay(state: &mut State, written: &PageSet) {
    let moved = state.shown.diff(state.origin.index());
    let everything = PageSet::from(state.geometry().all());
    let pages = if state.is_in_pieces(&moved) {
        &everything
    } else if state.can_lay(&moved) {
        &moved
    } else {
        // What an earlier fork left private stays so.
        written
    };
    state.lay_origin(pages);
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
            // The old view cannot come back: the private one shows the same bytes over a file that only this space maps.
            Ok(Restored::KeptPrivate) => keep_private(state, &self.sealed, layer),
            Err(failed) => {
                let error = state.note(failed.error);
                tracing::warn!(%error, "an undone cut keeps its private view, which shows the same bytes");
                keep_private(state, &self.sealed, layer);
            }
        }
    }
}

fn keep_private(state: &mut State, undone: &MappedImage, layer: Arc<Layer>) {
    state.view = View::Kept(layer);
    state.shown = undone.index().clone();
}
