//! Putting what an open disk lies on into other layers, while it is read and written.
//!
//! Only what nobody writes is copied: the layers below the live overlay. So a guest's write always wins over a copied page, whichever came first: it is in
//! the overlay, and the copy lies below. The disk goes over at the end, in this order: the new layer and its name are durable; the live overlay's
//! record names it as its parent, or the head where there is no overlay, in one durable update; readers are shown the new index in one step. Both
//! stacks have the same content, so a crash at any point leaves a disk that reads as it did.
//!
//! Forks go on meanwhile. What one has frozen since is copied into a layer over the new one, and so on; the last such piece is copied while forks and
//! flushes wait, so that it ends. Images and clones of before keep the layers that they lie on.

use std::sync::Arc;

use crate::sync::MutexGuard;

use super::copy::Zeroes;
use super::durable::{Durable, State};
use super::head::Head;
use super::id::LayerId;
use super::image::DurableImage;
use super::job::Job;
use super::layer::{Layer, Place};
use super::made::Made;
use crate::backing::Sealed;
use crate::error::{SpaceError, StoreError};
use crate::overlay::{Index, PageState};
use crate::page::{PageRange, PageSet};

/// Forks that may come in between before they have to wait.
const ROUNDS: u32 = 4;

/// What a disk is put over.
pub(super) enum Onto {
    /// Nothing but its base image, if it has one.
    Base,
    /// A layer that it lies on, which stays; those above it become one.
    Layer(LayerId),
    /// Another image, from which the disk's origin differs in these pages at most.
    #[cfg(feature = "store")]
    Image(DurableImage, PageSet),
}

/// A restack that has begun: no other one of this disk does before it has ended.
pub(super) struct Restack<'a> {
    disk: &'a Durable,
    _one: MutexGuard<'a, ()>,
    origin: DurableImage,
}

/// What came of it.
pub(super) struct Restacked {
    /// The disk's last origin before it went over, where it was. Nothing of the disk's keeps it any more.
    #[cfg(feature = "store")]
    pub(super) before: DurableImage,
    /// The disk's origin of when it began, in its new place.
    #[cfg(feature = "store")]
    pub(super) first: DurableImage,
    /// The disk's origin now: the same, unless the disk was forked meanwhile.
    #[cfg(feature = "store")]
    pub(super) now: DurableImage,
}

/// Layers that nothing on disk names yet.
#[derive(Default)]
struct Claims(Vec<Made>);

impl Durable {
    /// Copies all that this disk lies on into one sealed layer without a parent, while it is read, written, flushed and forked. A disk over a base image
    /// lies on that layer and on the base then. What the disk reads as does not change, nor what a [`reset`](crate::backing::Backing::reset) goes back to.
    /// The old layers' files stay, for images and clones that lie on them: [`DiskDir::clean`](super::DiskDir::clean) removes what nothing needs.
    ///
    /// Costs a read of what is below that is not zero, and at the end a few syncs; readers and writers wait for the time that the pages take which changed
    /// during these syncs.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`]; [`StoreError::Restacking`] where this is going on already; what the medium says. The disk lies on its old layers then.
    pub fn flatten(&self, job: &Job<'_>) -> Result<(), SpaceError> {
        Restack::begin(self)?.finish(Onto::Base, job).map(drop)
    }

    /// Merges the layers between this disk and `ancestor`, an image that it descends from, into one sealed layer. As [`Durable::flatten`] otherwise. Costs a
    /// read of their pages.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] where `ancestor` is not below; as [`Durable::flatten`].
    pub fn merge_down_to(&self, ancestor: &DurableImage, job: &Job<'_>) -> Result<(), SpaceError> {
        let Some(bottom) = ancestor.top().map(|layer| layer.id()) else { return self.flatten(job) };
        Restack::begin(self)?.finish(Onto::Layer(bottom), job).map(drop)
    }

    fn origin_now(&self) -> DurableImage {
        self.state().read().origin.clone()
    }

    /// Puts the disk over `new`, on disk and then for everybody who reads and writes it.
    fn go_over(
        &self,
        head: &mut Option<Head>,
        old: &DurableImage,
        new: &DurableImage,
        claims: &mut Claims,
    ) -> Result<(), SpaceError> {
        let mut moved = Moved::of(&self.state().read(), new);
        loop {
            if let Err(error) = self.go_over_on_disk(head, new) {
                // It may lie there all the same: then the layers are needed, and are locked for as long as this disk is open.
                claims.keep();
                self.perhaps_named.lock().push(new.clone());
                return Err(error.into());
            }
            let mut state = self.state().write();
            // Made in between, over the old layers.
            if !is_over(&state, new) {
                continue;
            }
            debug_assert!(state.origin.same(old), "who holds the head keeps cuts away");
            let dropped = moved.finish(&mut state, new);
            drop(state);
            // Tables and files may take long to go.
            drop(dropped);
            claims.keep();
            return Ok(());
        }
    }

    fn go_over_on_disk(&self, head: &mut Option<Head>, new: &DurableImage) -> Result<(), StoreError> {
        let state = self.state().read();
        let top = new.top().map(|layer| layer.id());
        new.freeze()?;
        let live = state.live.get();
        if let Some(live) = live.filter(|live| live.overlay().parent() != top) {
            live.overlay().lie_on(top)?;
        }
        let own = live.map(|live| live.layer.id());
        match head {
            // The overlay leads on from here.
            Some(head) if own.is_some() && head.top() == own => Ok(()),
            Some(head) if head.top() != top => head.advance(top),
            _ => Ok(()),
        }
    }
}

impl<'a> Restack<'a> {
    pub(super) fn begin(disk: &'a Durable) -> Result<Self, SpaceError> {
        let Some(one) = disk.restacking.try_lock() else { return Err(StoreError::Restacking.into()) };
        Ok(Self { disk, _one: one, origin: disk.origin_now() })
    }

    /// What the disk lay on when it began.
    #[cfg(feature = "store")]
    pub(super) fn origin(&self) -> &DurableImage {
        &self.origin
    }

    /// Puts the disk over something else that reads as what it lies on.
    pub(super) fn finish(self, onto: Onto, job: &Job<'_>) -> Result<Restacked, SpaceError> {
        let Self { disk, origin: mut old, .. } = self;
        let Some((below, pages, zeroes)) = plan(&old, onto)? else { return Ok(Restacked::nothing(old)) };
        let mut claims = Claims::default();
        let first = claims.lay(&old, &below, &pages, zeroes, job)?;
        let (mut new, mut held) = (first.clone(), None);
        for round in 1.. {
            // Keeps forks away, and so the origin what it is.
            let mut head = held.take().unwrap_or_else(|| disk.head().lock());
            let now = disk.origin_now();
            if now.same(&old) {
                disk.go_over(&mut head, &old, &new, &mut claims)?;
                break;
            }
            // Who watches must not wait for what is held here.
            let quiet = job.quiet();
            let job = if round < ROUNDS {
                drop(head);
                job
            } else {
                held = Some(head);
                &quiet
            };
            let since = old.index().diff(now.index());
            new = claims.lay(&now, &new, &since, Zeroes::Kept, job)?;
            old = now;
        }
        Ok(Restacked::new(old, first, new))
    }
}

impl Restacked {
    fn nothing(origin: DurableImage) -> Self {
        Self::new(origin.clone(), origin.clone(), origin)
    }

    #[cfg(feature = "store")]
    fn new(before: DurableImage, first: DurableImage, now: DurableImage) -> Self {
        Self { before, first, now }
    }

    #[cfg(not(feature = "store"))]
    fn new(_: DurableImage, _: DurableImage, _: DurableImage) -> Self {
        Self {}
    }
}

fn is_over(state: &State, new: &DurableImage) -> bool {
    state.live.get().is_none_or(|live| live.overlay().parent() == new.top().map(|layer| layer.id()))
}

/// What to copy, and over what. `None` where there is nothing to do.
fn plan(old: &DurableImage, onto: Onto) -> Result<Option<(DurableImage, PageSet, Zeroes)>, SpaceError> {
    let (dir, shape, base) = (old.dir(), old.shape(), old.base().cloned());
    Ok(Some(match onto {
        Onto::Base => {
            if old.top().is_none_or(|top| top.sealed().is_some() && top.below().is_none()) {
                return Ok(None);
            }
            let zeroes = if base.is_some() { Zeroes::Kept } else { Zeroes::LeftOut };
            (DurableImage::root(dir.clone(), shape, base), old.pages_over_base(), zeroes)
        }
        Onto::Layer(bottom) => {
            let above = layers_down_to(old.top().cloned(), bottom)?;
            if above.len() < 2 {
                return Ok(None);
            }
            let mut pages = PageSet::new();
            for layer in above {
                let (data, zero) = layer.body().pages()?;
                pages = pages.union(&data).union(&zero);
            }
            (dir.image_at(bottom, shape, base)?, pages, Zeroes::Kept)
        }
        #[cfg(feature = "store")]
        Onto::Image(below, differing) => {
            let zeroes = if below.top().is_some() || base.is_some() { Zeroes::Kept } else { Zeroes::LeftOut };
            (below, differing, zeroes)
        }
    }))
}

/// The layers from `top` down to `bottom`, which is left out.
fn layers_down_to(top: Option<Arc<Layer>>, bottom: LayerId) -> Result<Vec<Arc<Layer>>, SpaceError> {
    let mut above = Vec::new();
    let mut next = top;
    while let Some(layer) = next {
        if layer.id() == bottom {
            return Ok(above);
        }
        next = layer.below();
        above.push(layer);
    }
    Err(SpaceError::Unrelated("layers are merged down to one that the disk lies on: name one of those"))
}

impl Claims {
    /// A layer over `below` with these pages of `source`, which the two together read as.
    fn lay(
        &mut self,
        source: &DurableImage,
        below: &DurableImage,
        pages: &PageSet,
        zeroes: Zeroes,
        job: &Job<'_>,
    ) -> Result<DurableImage, SpaceError> {
        if pages.is_empty() {
            return Ok(below.of_cut(source.lineage().clone()));
        }
        below.freeze()?;
        let (image, made) = source.sealed_over(below, source.lineage().clone(), pages, zeroes, job)?;
        self.0.push(made);
        Ok(image)
    }

    fn keep(&mut self) {
        self.0.iter_mut().for_each(Made::keep);
    }
}

/// The indexes of a disk over its new origin, worked out while the disk goes on, and put right at the end by what changed since.
struct Moved {
    /// As they were when this was worked out, over the old origin.
    was: [Index<Place>; 2],
    /// The same over the new one: what lies under the live overlay, and what the next cut seals.
    is: [Index<Place>; 2],
    table_bytes: u64,
}

impl Moved {
    fn of(state: &State, new: &DurableImage) -> Self {
        let was = [state.below.clone(), state.next.lock().index.clone()];
        let mut moved = Self { was, is: [new.index().clone(), new.index().clone()], table_bytes: 0 };
        let old = state.origin.index();
        for (was, is) in moved.was.iter().zip(&mut moved.is) {
            moved.table_bytes += carry(was, &old.diff(was), old, new.index(), is);
        }
        moved
    }

    /// Puts the state over the new origin. What it was over is handed back, to be dropped when nobody waits.
    fn finish(&mut self, state: &mut State, new: &DurableImage) -> impl Sized + use<> {
        let old = std::mem::replace(&mut state.origin, new.clone());
        let next = state.next.get_mut();
        let now = [state.below.clone(), next.index.clone()];
        for ((was, is), now) in self.was.iter().zip(&mut self.is).zip(&now) {
            self.table_bytes += carry(now, &was.diff(now), old.index(), new.index(), is);
        }
        let [below, index] = self.is.clone();
        state.below = below;
        next.index = index;
        next.table_bytes = self.table_bytes;
        let layer = state.live.get().map(|live| live.layer.lie_on(new.top().cloned()));
        (old, now, layer)
    }
}

/// Sets `into` to what `from` says of these pages; where that is what the old origin says, to what the new one does. Bytes of tables that were made.
fn carry(from: &Index<Place>, pages: &PageSet, old: &Index<Place>, new: &Index<Place>, into: &mut Index<Place>) -> u64 {
    let mut table_bytes = 0;
    let mut set = |run: PageRange, state: PageState<&Place>| table_bytes += into.set(run, &state.cloned());
    for (run, state) in pages.runs().flat_map(|run| from.runs(run)) {
        for (part, was) in old.runs(run) {
            if state.same(was) {
                new.runs(part).into_iter().for_each(|(part, state)| set(part, state));
            } else {
                set(part, state);
            }
        }
    }
    table_bytes
}
