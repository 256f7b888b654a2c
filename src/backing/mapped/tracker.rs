//! Which private pages of a VM were written since its last live fork, and which merely kept their private copy.
//!
//! Owns the write protection of a space and what cut, reset and discard must know of it.
//!
//! **The tracker may be forgotten at any time.** Without it every private page counts as written and is copied again: more work, same
//! bytes. So whatever goes wrong, dropping it is the way out. Whoever gives the space another mapping drops it as well.
//!
//! While a pre-copy is under way (an *attempt*), protected pages are not known to be the origin's, and everybody else goes by what is
//! private. Must not know how pages are copied.

use super::State;
use super::layer::{Version, space_pages};
use super::layer_map::LayerMap;
use crate::error::SpaceError;
use crate::image::Source;
use crate::overlay::{Index, PageState};
use crate::page::{PageRange, PageSet};
use crate::sys::error::SysError;
use crate::sys::uffd::{Uffd, UffdError};

/// What is known of the protections of before the attempt.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// They can be told from those of the attempt.
    Kept,
    /// There was no tracker, or a call failed that may have protected pages unseen.
    Nothing,
}

/// The write protection of a space, from its first live fork on.
pub(super) struct Tracker {
    pub(super) uffd: Uffd,
    /// Zeroed since the origin: what they show is not the origin's.
    zeroed: PageSet,
    /// While a live fork is under way: zeroed since it last looked.
    pub(super) attempt: Option<Vec<PageRange>>,
}

impl Tracker {
    fn idle(&self) -> bool {
        self.attempt.is_none()
    }
}

impl State {
    /// The private pages whose bytes are not the origin's, and maybe others.
    pub(super) fn written_pages(&self) -> Result<PageSet, SpaceError> {
        match &*self.tracker.lock() {
            Some(tracker) if tracker.idle() => {
                let pagemap = self.origin.family().pagemap()?;
                let written = pagemap.written(&self.mapping, self.mapping.geometry().all())?;
                Ok(space_pages(self.geometry(), &written))
            }
            _ => self.private_pages(),
        }
    }

    /// The pages that show something else than the origin's bytes where they are not private, and maybe others.
    pub(super) fn zeroed_pages(&self) -> PageSet {
        match &*self.tracker.lock() {
            Some(tracker) if tracker.idle() => tracker.zeroed.clone(),
            _ => self.origin.index().diff(&self.shown),
        }
    }

    /// The index of the next image, but for the pages that will be in its own layer.
    pub(super) fn next_index(&self) -> Index<Version> {
        match &*self.tracker.lock() {
            Some(tracker) if tracker.idle() => {
                let mut index = self.origin.index().clone();
                tracker.zeroed.runs().for_each(|run| self.name_shown(run, &mut index));
                index
            }
            _ => self.shown.clone(),
        }
    }

    /// As [`next_index`](Self::next_index), of the layers: those of the origin with zeroes over what of these pages shows them.
    pub(super) fn with_zeroed(&self, origin: &LayerMap, zeroed: &PageSet) -> Result<LayerMap, SpaceError> {
        let mut holes = PageSet::new();
        for (run, shown) in zeroed.runs().flat_map(|run| self.shown.runs(run)) {
            if shown == PageState::Data(&Version::ZEROED) {
                holes.push(run);
            }
        }
        if holes.is_empty() {
            return Ok(origin.clone());
        }
        let zero = self.origin.family().zero(self.origin.tree(), self.geometry().len())?;
        Ok(origin.with(&holes, zero.clone()))
    }

    /// What was zeroed since the origin, attempt or no attempt.
    pub(super) fn zeroed_by_tracker(&self) -> PageSet {
        self.tracker.lock().as_ref().map(|tracker| tracker.zeroed.clone()).unwrap_or_default()
    }

    /// Turns write protection on for an attempt. Nothing is protected that was not.
    pub(super) fn watch(&self) -> Result<Before, UffdError> {
        let mut slot = self.tracker.lock();
        if let Some(tracker) = &mut *slot {
            if !tracker.idle() {
                return Err(SysError::Misuse("a live fork of this space is under way").into());
            }
            tracker.uffd.register(&self.mapping)?;
            tracker.attempt = Some(tracker.zeroed.runs().collect());
            return Ok(Before::Kept);
        }
        let uffd = Uffd::open()?;
        uffd.register(&self.mapping)?;
        let zeroed = self.origin.index().diff(&self.shown);
        let attempt = Some(zeroed.runs().collect());
        *slot = Some(Tracker { uffd, zeroed, attempt });
        Ok(Before::Nothing)
    }

    pub(super) fn name_shown(&self, run: PageRange, index: &mut Index<Version>) {
        for (run, spot) in self.shown.runs(run) {
            index.set(run, &spot.cloned());
        }
    }

    pub(super) fn note_zeroed(&mut self, range: PageRange) {
        if let Some(tracker) = self.tracker.get_mut() {
            tracker.zeroed = tracker.zeroed.union(&one_run(range));
            tracker.attempt.iter_mut().for_each(|fresh| fresh.push(range));
        }
    }

    /// Before a reset of all or of the pages listed: what it will undo, if that is known without it.
    pub(super) fn begin_reset(&mut self, listed: Option<&PageSet>) -> Result<Option<PageSet>, SpaceError> {
        match (self.tracker.get_mut(), listed) {
            (Some(tracker), Some(listed)) if tracker.idle() => Ok(Some(tracker.zeroed.union(listed))),
            (Some(tracker), None) if tracker.idle() => Ok(Some(self.dirty()?)),
            // Pages of the attempt's that are protected and dropped would leave markers behind. It finds itself gone.
            (slot, _) => {
                *slot = None;
                Ok(None)
            }
        }
    }

    /// Which of the pages that show another layer than the origin's a reset lays: those it undoes, or all, where laying some would take
    /// more mappings than there are.
    pub(super) fn to_lay(&self, all: &PageSet, undone: &PageSet) -> PageSet {
        let some = all.difference(&all.difference(undone));
        if self.can_lay(&some) { some } else { all.clone() }
    }

    pub(super) fn reset_done(&mut self) {
        if let Some(tracker) = self.tracker.get_mut() {
            tracker.zeroed = PageSet::new();
        }
    }

    /// After a plain cut. A live fork that was under way is void: it finds its tracker gone, which is returned.
    pub(super) fn cut_committed(&mut self) -> Option<Tracker> {
        match self.tracker.get_mut() {
            Some(tracker) if tracker.idle() => {
                tracker.zeroed = PageSet::new();
                None
            }
            other => other.take(),
        }
    }

    /// After a live cut.
    pub(super) fn live_cut_committed(&mut self) {
        if let Some(tracker) = self.tracker.get_mut() {
            tracker.zeroed = PageSet::new();
            tracker.attempt = None;
        }
    }

    /// Every page that does not count as changed reads as the origin, whatever shows it.
    pub(super) fn validate_tracker(&self) -> Result<(), String> {
        if self.tracker.lock().as_ref().is_none_or(|tracker| !tracker.idle()) {
            return Ok(());
        }
        let (size, text) = (self.geometry().page_size(), |error: SpaceError| error.to_string());
        let (mut own, mut origin) = (vec![0; size.bytes().get() as usize], vec![0; size.bytes().get() as usize]);
        let kept = self.origin.index().diff(&self.shown).union(&self.private_pages().map_err(text)?);
        for page in kept.difference(&self.dirty().map_err(text)?).pages() {
            self.mapping.read(size.start_of(page), &mut own).map_err(|error| error.to_string())?;
            self.origin.read(size.start_of(page), &mut origin).map_err(text)?;
            if own != origin {
                return Err(format!("page {} counts as unchanged, and differs from the origin", page.get()));
            }
        }
        Ok(())
    }
}

pub(super) fn one_run(range: PageRange) -> PageSet {
    let mut set = PageSet::new();
    set.push(range);
    set
}
