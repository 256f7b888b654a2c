//! Copying a diverged VM's private pages into the next layer while its guest runs.
//!
//! A round protects the pages written since the round before, in the page tables, and then copies them: in this order, so that a
//! page that was written while it was copied is written *since*, and is copied again. The last round, with the guest paused,
//! finds only what the one before left. What it copied names itself in the index of the next image as it goes, so that the pause pays
//! for the last round alone.
//!
//! ```text
//!   page              private, protected           private, not protected      not private
//!   bytes are         the origin's (idle) or       the guest's alone           those of `shown`, which are the
//!                     the new layer's (attempt)                                origin's but for pages zeroed since
//! ```
//!
//! Nothing is laid over the pages at the commit, which would cost 1.6 µs a run inside the pause: they stay private, protected,
//! with the new origin's bytes. The price is memory, at most once a page; a plain fork lays the layers and gives it back.
//!
//! What must never be is a page that is protected without being copied: an attempt that fails lifts its protections, or drops the
//! [tracker](super::tracker).
//!
//! Must not know of guests, policies or pauses: rounds are asked for by `vm::live`.

use std::mem::take;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::image::Parts;
use super::layer::{Content, CutNumber, Layer, Version, copy_run, host_pages, in_batches, space_pages};
use super::merge;
use super::tracker::{Before, Tracker, one_run};
use super::{Mapped, MappedCut, MappedImage, State, View};
use crate::backing::Sealed;
use crate::error::SpaceError;
use crate::overlay::{Index, PageState};
use crate::page::{PageCount, PageRange, PageSet};
use crate::sys::error::SysError;
use crate::sys::memfd::Memfd;
use crate::sys::uffd::UffdError;

/// What a page takes to copy before any was measured: with memory that the host must find and clear first.
const COLD_COPY: Duration = Duration::from_micros(4);

/// What a mapping takes to make.
const MAPPING: Duration = Duration::from_nanos(1500);

/// Rounds of fewer pages say nothing about the rate.
const MEASURABLE: u64 = 32;

/// Where the space goes on after the cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Onward {
    /// Where it is: nothing is mapped anew.
    Here,
    /// At other addresses, where all layers are mapped inside the pause.
    Elsewhere,
}

/// How a live fork begins.
pub(crate) enum Begun<'a> {
    /// Write protection is on.
    Watching(Precopy<'a>),
    /// Never cut: a plain cut copies nothing.
    NothingToCopy,
    /// No write protection here. Copying with the guest paused would take about so long.
    Unwatched {
        /// What is missing.
        why: UffdError,
        /// The estimate.
        pause: Duration,
        /// Pages that there are to copy.
        pages: PageCount,
    },
}

/// What one round came to.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Round {
    /// Pages copied.
    pub(crate) pages: PageCount,
    /// Finding and protecting them.
    pub(crate) scan: Duration,
    /// Copying them.
    pub(crate) copy: Duration,
}

/// A pre-copy under way. Dropping it undoes it.
pub(crate) struct Precopy<'a> {
    space: &'a Mapped,
    origin: MappedImage,
    layer: Arc<Layer>,
    /// Until it is sealed.
    file: Option<Memfd>,
    /// Of the next image, as far as copied.
    index: Index<Version>,
    /// Of the next cut.
    number: CutNumber,
    /// Pages that `index` names in the new layer.
    copied: PageSet,
    onward: Onward,
    /// Mappings that the next image takes, as of the last look while the guest ran.
    mappings: u64,
    pace: Pace,
    attempt: Attempt,
}

/// What a failed attempt has to undo.
struct Attempt {
    tracker: Before,
    /// Pages of the kernel's that it protected.
    protected: PageSet,
}

/// Measured rates.
#[derive(Clone, Copy, Default, Debug)]
struct Pace {
    /// Finding what was written, the last time.
    scan: Duration,
    /// Copying a page, in the slowest round.
    page: Option<Duration>,
}

impl Pace {
    fn note(&mut self, round: Round) {
        if round.pages.get() >= MEASURABLE {
            let page = round.copy / u32::try_from(round.pages.get()).unwrap_or(u32::MAX);
            self.page = Some(self.page.map_or(page, |slowest| slowest.max(page)));
        }
    }

    fn copying(&self, pages: PageCount) -> Duration {
        let page = self.page.unwrap_or(COLD_COPY);
        page.saturating_mul(u32::try_from(pages.get()).unwrap_or(u32::MAX))
    }
}

/// Pages that a round found, protected and still to be copied.
pub(crate) struct Found {
    written: PageSet,
    scan: Duration,
}

impl Found {
    /// How many there are.
    pub(crate) fn count(&self) -> PageCount {
        self.written.count()
    }
}

/// How long the last round may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PauseBound {
    /// As long as it takes.
    None,
    /// Longer, and there is no cut.
    AtMost(Duration),
}

/// Why a live cut was not made; everything is as before.
pub(crate) enum NoCut {
    /// The last round would take so long, for so many pages.
    TooLong(Duration, PageCount),
    /// It failed.
    Space(SpaceError),
}

impl<E: Into<SpaceError>> From<E> for NoCut {
    fn from(error: E) -> Self {
        Self::Space(error.into())
    }
}

/// A cut whose layer was made ahead.
pub(crate) struct LiveCut<'a> {
    pub(crate) cut: MappedCut<'a>,
    /// The last round.
    pub(crate) last: Round,
    /// What the pause was estimated to take, before the last copy.
    pub(crate) estimate: Duration,
}

impl Mapped {
    /// Begins a pre-copy: turns write protection on where it is not. Protects and copies nothing yet.
    ///
    /// # Errors
    /// What the system refuses, but for write protection itself, which is [`Begun::Unwatched`].
    pub(crate) fn precopy(&self, onward: Onward) -> Result<Begun<'_>, SpaceError> {
        let state = self.shared()?;
        if !matches!(state.view, View::Private) {
            return Ok(Begun::NothingToCopy);
        }
        // Refused now rather than after all the work.
        state.origin.check_depth()?;
        state.origin.tree().0.check_room_for_file()?;
        let before = match state.watch() {
            Ok(before) => before,
            Err(UffdError::Sys(error)) => return Err(error.into()),
            Err(why) => {
                let pages = state.written_pages()?.count();
                let pause = Pace::default().copying(pages);
                return Ok(Begun::Unwatched { why, pause, pages });
            }
        };
        // From here on it is undone on drop.
        let attempt = Attempt { tracker: before, protected: PageSet::new() };
        let file = match Memfd::create("offshoot-layer", state.geometry().len()) {
            Ok(file) => file,
            Err(error) => {
                attempt.undo(&state);
                return Err(error.into());
            }
        };
        Ok(Begun::Watching(Precopy {
            space: self,
            origin: state.origin.clone(),
            layer: Layer::promised(state.origin.tree()),
            file: Some(file),
            index: state.origin.index().clone(),
            number: state.origin.family().number(),
            copied: PageSet::new(),
            onward,
            mappings: 0,
            pace: Pace::default(),
            attempt,
        }))
    }
}

const USED: SysError = SysError::Misuse("a pre-copy was used after its cut");

fn misuse(what: &'static str) -> SpaceError {
    SysError::Misuse(what).into()
}

impl<'a> Precopy<'a> {
    /// Finds the pages written since it last looked, at first all that are not the origin's, and protects them.
    ///
    /// # Errors
    /// What the system refuses.
    pub(crate) fn look(&mut self) -> Result<Found, SpaceError> {
        let state = self.space.shared()?;
        let found = self.look_in(&state)?;
        // Refused now rather than in the pause.
        if let Some(map) = state.origin.map() {
            let next = map.with(&self.copied.union(&found.written), self.layer.clone());
            merge::check(&next, state.origin.tree().limits())?;
            self.mappings = next.mappings();
        }
        Ok(found)
    }

    fn look_in(&mut self, state: &State) -> Result<Found, SpaceError> {
        let start = Instant::now();
        {
            let mut slot = state.tracker.lock();
            let tracker = slot.as_mut().filter(|_| state.origin.same(&self.origin));
            let Some((uffd, fresh)) = tracker.and_then(|t| Some((&t.uffd, t.attempt.as_mut()?))) else {
                return Err(misuse("a space was reset or cut by others during a live fork"));
            };
            let fresh = take(fresh);
            if !fresh.is_empty() {
                // Zeroed pages are mapped anew, and not watched yet. One written since is found below.
                uffd.register(&state.mapping).map_err(|error| match error {
                    UffdError::Sys(error) => error.into(),
                    _ => misuse("a live fork's memory was registered with another userfaultfd"),
                })?;
            }
            for range in fresh {
                // What was copied of it must not show through if it is named in this layer again.
                self.punch(state, range)?;
                state.name_shown(range, &mut self.index);
                self.copied = self.copied.difference(&one_run(range));
            }
        }
        let pagemap = state.origin.family().pagemap()?;
        let candidates = pagemap.candidates(&state.mapping)?;
        let scan = start.elapsed();
        let attempt = &mut self.attempt;
        let protected = pagemap.protect(&state.mapping, &candidates).inspect_err(|_| {
            attempt.tracker = Before::Nothing;
        })?;
        attempt.protected = attempt.protected.union(&protected);
        self.pace.scan = scan;
        let written = space_pages(state.geometry(), &protected);
        Ok(Found { written, scan: start.elapsed() })
    }

    /// Copies what was found.
    ///
    /// # Errors
    /// What the system refuses.
    pub(crate) fn copy(&mut self, found: Found) -> Result<Round, SpaceError> {
        let start = Instant::now();
        for run in found.written.runs().flat_map(in_batches) {
            // Held no longer, so that whoever wants the space to himself need not wait for all pages.
            let state = self.space.shared()?;
            self.copy_run(&state, run)?;
        }
        Ok(self.copied_all(found, start))
    }

    fn copied_all(&mut self, found: Found, start: Instant) -> Round {
        self.copied = self.copied.union(&found.written);
        let round = Round { pages: found.count(), scan: found.scan, copy: start.elapsed() };
        self.pace.note(round);
        round
    }

    fn copy_run(&mut self, state: &State, run: PageRange) -> Result<(), SpaceError> {
        let copied = copy_run(self.file()?, state.geometry(), &state.mapping, run)?;
        // What an earlier round wrote there is still in the file.
        copied.holes.runs().try_for_each(|run| self.punch(state, run))?;
        copied.data.runs().for_each(|run| self.name(run, Content::Data));
        copied.holes.runs().for_each(|run| self.name(run, Content::Hole));
        Ok(())
    }

    fn name(&mut self, run: PageRange, content: Content) {
        let named = PageState::Data(self.number.version(content));
        if !run.iter().all(|page| self.index.get(page).same(named.as_ref())) {
            self.index.set(run, &named);
        }
    }

    fn file(&self) -> Result<&Memfd, SpaceError> {
        Ok(self.file.as_ref().ok_or(USED)?)
    }

    /// Makes holes of what the new layer holds as data in `range`.
    fn punch(&self, state: &State, range: PageRange) -> Result<(), SpaceError> {
        let file = self.file()?;
        let data = self.number.version(Content::Data);
        for (run, version) in self.index.runs(range) {
            if version == PageState::Data(&data) {
                file.punch(host_pages(state.geometry(), run))?;
            }
        }
        Ok(())
    }

    /// How long a last round would take for so many pages.
    pub(crate) fn estimate(&self, pages: PageCount) -> Duration {
        self.pace.scan.saturating_add(self.still_to_do(pages))
    }

    /// What copying so many pages takes, and mapping them where the space goes on.
    fn still_to_do(&self, pages: PageCount) -> Duration {
        let mapping = match self.onward {
            Onward::Here => Duration::ZERO,
            Onward::Elsewhere => MAPPING.saturating_mul(u32::try_from(self.mappings).unwrap_or(u32::MAX)),
        };
        self.pace.copying(pages).saturating_add(mapping)
    }

    /// The last round and the cut. The guest must be paused.
    ///
    /// # Errors
    /// [`NoCut`]. Nothing is undone before this is dropped, so that the guest need not wait for it.
    pub(crate) fn cut(&mut self, bound: PauseBound) -> Result<LiveCut<'a>, NoCut> {
        let start = Instant::now();
        let state = self.space.exclusive()?;
        let found = self.look_in(&state)?;
        let estimate = start.elapsed().saturating_add(self.still_to_do(found.count()));
        if let PauseBound::AtMost(limit) = bound
            && estimate > limit
        {
            return Err(NoCut::TooLong(estimate, found.count()));
        }
        let copying = Instant::now();
        found.written.runs().try_for_each(|run| self.copy_run(&state, run))?;
        let last = self.copied_all(found, copying);
        let sealed = state.origin.child(None, |below| {
            let zeroed = state.with_zeroed(below, &state.zeroed_by_tracker())?;
            Ok(Parts { index: self.index.clone(), map: zeroed.with(&self.copied, self.layer.clone()) })
        })?;
        let file = self.file.take().ok_or(USED)?;
        // Enough to keep everybody out; the seal that walks the file's pages is set when the guest runs again.
        let file = file.seal_future_write().map_err(|failed| super::layer::seal_error(failed.error))?;
        self.layer.fulfil(file);
        let cut = MappedCut::live(state, sealed, self.layer.clone());
        Ok(LiveCut { cut, last, estimate })
    }

    /// Sets what copying a page takes, in place of what was measured.
    #[cfg(test)]
    pub(crate) fn set_pace(&mut self, page: Duration) {
        self.pace.page = Some(page);
    }
}

impl Drop for Precopy<'_> {
    fn drop(&mut self) {
        self.attempt.undo(&self.space.state.read());
    }
}

impl Attempt {
    /// Unless its cut was committed, lifts the protections that it made, so that the pages count as written again; if that cannot
    /// be, all there are.
    fn undo(&self, state: &State) {
        let mut slot = state.tracker.lock();
        let Some(tracker) = slot.as_mut() else { return };
        if tracker.attempt.take().is_none() {
            return;
        }
        let lift = |tracker: &Tracker| -> Result<(), UffdError> {
            // Part of the mapping may have been mapped anew.
            tracker.uffd.register(&state.mapping)?;
            Ok(self.protected.runs().try_for_each(|run| tracker.uffd.unprotect(&state.mapping, run))?)
        };
        match self.tracker {
            Before::Nothing => *slot = None,
            Before::Kept => {
                if let Err(error) = lift(tracker) {
                    tracing::debug!(%error, "write protection is lifted altogether: the next fork copies every private page");
                    *slot = None;
                }
            }
        }
    }
}
