//! The live side of a durable disk, as a backing.
//!
//! A disk's pages are in its live overlay's file, or below: in the layers of its origin, or in the base. The overlay's file is made at the first
//! write, so a clone that never writes has none. As on the heap, the index of the next image is kept up with each first write, so that a cut is
//! one reference count, after a flush.
//!
//! Locking: `restacking`, then `head` (held by a flush, by a cut's and by the end of a restack), then `state` (shared by each access, exclusive for cut, reset and zero), then claims in
//! ascending order, then `next`.

use std::fmt;
use std::mem::replace;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::access::CLAIMS;
use super::directory::DiskDir;
use super::head::Head;
use super::id::{DiskId, LayerId};
use super::image::DurableImage;
use super::layer::{Body, Layer, Place};
use super::map::{BLOCK_PAGES, MapBlock};
use super::overlay::Overlay;
use super::presence::Presence;
use super::ranges::Ranges;
use crate::account::Usage;
use crate::backing::{Backing, Cut, Deferred, Extent, Sealed, Tree, extents_of};
use crate::error::SpaceError;
use crate::image::Source;
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet};
use crate::sync::{Mutex, OnceLock, RwLock, RwLockWriteGuard};

/// A disk whose overlay is a file. See the [module](crate::store) for what it promises.
///
/// A read is one look-up and one read of a file, at any depth. The first write to a page after a fork writes the whole page; other writes write what
/// they are given. A write that the medium refuses may have changed bytes that it was to overwrite, as on any disk, and no others.
///
/// [`Backing::create`] makes a *scratch* disk, for clones that are thrown away: in a directory of its own among the system's temporary
/// files, which goes with its last user, and never synced. Durable ones are made by [`DiskDir::create`].
pub struct Durable {
    id: DiskId,
    dir: DiskDir,
    state: RwLock<State>,
    /// Held by one flush at a time. `None` until the first, for a disk that was spawned.
    head: Mutex<Option<Head>>,
    pub(super) claims: [Mutex<()>; CLAIMS],
    /// Held by one restack at a time.
    pub(super) restacking: Mutex<()>,
    /// What a failed restack may have named on disk: kept, and so locked, for as long as the disk is open.
    pub(super) perhaps_named: Mutex<Vec<DurableImage>>,
}

/// Everything that the lock guards.
pub(super) struct State {
    pub(super) origin: DurableImage,
    /// The overlay of this disk alone, if it has written.
    pub(super) live: OnceLock<Live>,
    creating: Mutex<()>,
    /// What lies under the live overlay: the origin's index, with the pages zeroed since.
    pub(super) below: Index<Place>,
    /// Whether any page was zeroed since.
    pub(super) zeroed: bool,
    /// The index that the next cut seals.
    pub(super) next: Mutex<Next>,
}

pub(super) struct Next {
    pub(super) index: Index<Place>,
    /// Bytes of tables copied or made in it since the origin.
    pub(super) table_bytes: u64,
    /// Pages that were discarded. Their space may be given back once the map on disk says so.
    pub(super) waiting: Ranges,
    /// Pages of which it says so, or will when the flush under way is done.
    pub(super) ready: Ranges,
}

/// A live overlay and the table of the pages in it.
pub(super) struct Live {
    pub(super) layer: Arc<Layer>,
    pub(super) presence: Presence,
    /// Whether the disk's head may name it. What nothing names goes when it is dropped.
    pub(super) named: AtomicBool,
    dir: DiskDir,
}

impl Live {
    pub(super) fn new(dir: DiskDir, overlay: Overlay, below: Option<Arc<Layer>>) -> Self {
        let presence = Presence::new(overlay.shape().geometry.pages());
        let layer = Layer::new(overlay.id(), Body::Overlay(overlay), below);
        Self { layer, presence, named: AtomicBool::new(false), dir }
    }

    pub(super) fn overlay(&self) -> &Overlay {
        match self.layer.body() {
            Body::Overlay(overlay) => overlay,
            Body::Sealed(_) => unreachable!("made of an overlay above"),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if !*self.named.get_mut()
            && let Err(error) = self.dir.folder().remove(self.overlay().file().name())
        {
            tracing::warn!(%error, file = %self.overlay().file().name(), "an overlay that nothing names was left behind");
        }
    }
}

impl State {
    pub(super) fn over(origin: DurableImage) -> Self {
        Self {
            live: OnceLock::new(),
            creating: Mutex::new(()),
            below: origin.index().clone(),
            zeroed: false,
            next: Mutex::new(Next {
                index: origin.index().clone(),
                table_bytes: 0,
                waiting: Ranges::default(),
                ready: Ranges::default(),
            }),
            origin,
        }
    }

    /// A state whose overlay is on disk already.
    pub(super) fn reopened(origin: DurableImage, live: Live) -> Result<Self, SpaceError> {
        let mut state = Self::over(origin);
        let blank = state.origin.blank();
        let next = state.next.get_mut();
        let place = PageState::Data(Place::positional(live.layer.clone()));
        live.overlay().load(|start, block| {
            let block = block?;
            let shifted = |run: PageRange| {
                let page = |index: PageIndex| PageIndex::new(start.get() + index.get());
                PageRange::from_bounds(page(run.start()), page(run.end()))
            };
            for run in MapBlock::runs(&block.zero).into_iter().map(shifted) {
                state.zeroed = true;
                next.table_bytes += state.below.set(run, &blank) + next.index.set(run, &blank);
            }
            for run in MapBlock::runs(&block.data).into_iter().map(shifted) {
                live.presence.insert(run);
                next.table_bytes += next.index.set(run, &place);
            }
            Ok(())
        })?;
        // What was read needs not be written.
        live.presence.take_changed();
        live.named.store(true, Ordering::Relaxed);
        let live = state.live.set(live);
        debug_assert!(live.is_ok(), "a new state has none");
        Ok(state)
    }

    /// The live overlay, made if this is the first write.
    pub(super) fn live_or_new(&self, disk: &Durable) -> Result<&Live, SpaceError> {
        if let Some(live) = self.live.get() {
            return Ok(live);
        }
        let _one = self.creating.lock();
        if self.live.get().is_none() {
            let parent = self.origin.top();
            let id = LayerId::random().map_err(|error| disk.dir.no_id(error))?;
            let shape = self.origin.shape();
            let overlay = Overlay::create(disk.dir.folder(), id, disk.id, parent.map(|layer| layer.id()), shape)?;
            let live = Live::new(disk.dir.clone(), overlay, parent.cloned());
            let set = self.live.set(live);
            debug_assert!(set.is_ok(), "the lock is held, and it was empty");
        }
        Ok(self.live.get().expect("just made, and nobody takes it while the lock is held shared"))
    }
}

impl Durable {
    pub(super) fn new(dir: DiskDir, id: DiskId, state: State, head: Option<Head>) -> Self {
        Self {
            id,
            dir,
            state: RwLock::new(state),
            head: Mutex::new(head),
            claims: std::array::from_fn(|_| Mutex::new(())),
            restacking: Mutex::new(()),
            perhaps_named: Mutex::new(Vec::new()),
        }
    }

    /// Its name in its directory: what [`DiskDir::open_disk`] takes. A disk that was spawned is there from its first flush on.
    pub fn id(&self) -> DiskId {
        self.id
    }

    /// The directory that it lies in.
    pub fn dir(&self) -> &DiskDir {
        &self.dir
    }

    /// Space that its live overlay takes in the file system.
    ///
    /// # Errors
    /// What the system says.
    pub fn allocated(&self) -> Result<ByteSize, SpaceError> {
        self.state.read().live.get().map_or(Ok(ByteSize::ZERO), |live| live.overlay().allocated())
    }

    pub(super) fn state(&self) -> &RwLock<State> {
        &self.state
    }

    pub(super) fn head(&self) -> &Mutex<Option<Head>> {
        &self.head
    }
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Durable");
        out.field("id", &self.id);
        if let Some(state) = self.state.try_read() {
            out.field("private", &state.live.get().map(|live| live.presence.count()));
            out.field("depth", &state.origin.depth());
        }
        out.finish_non_exhaustive()
    }
}

impl Backing for Durable {
    type Sealed = DurableImage;
    type Cut<'a> = DurableCut<'a>;

    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        DiskDir::scratch(tree)?.create(geometry, base)
    }

    fn geometry(&self) -> Geometry {
        self.state.read().origin.geometry_of()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.state.read().read(at, buf)
    }

    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        self.write_to(&self.state.read(), at, data)
    }

    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        let mut state = self.state.write();
        let state = &mut *state;
        state.origin.geometry_of().check_pages(range)?;
        let blank = state.origin.blank();
        let is_blank = |found: PageState<&Place>| found.same(blank.as_ref());
        let index = &state.next.get_mut().index;
        let changes: Vec<_> =
            index.runs(range).into_iter().filter(|(_, found)| !is_blank(*found)).map(|(run, _)| run).collect();
        if changes.is_empty() {
            return Ok(());
        }
        state.live_or_new(self)?.overlay().file().check_synced()?;
        let Some(live) = state.live.get_mut() else { unreachable!("made above") };
        let next = state.next.get_mut();
        live.presence.remove(range).into_iter().for_each(|run| next.waiting.insert(run));
        changes.iter().for_each(|run| live.presence.touch(*run));
        next.table_bytes += state.below.set(range, &blank) + next.index.set(range, &blank);
        state.zeroed = true;
        Ok(())
    }

    fn flush(&self) -> Result<(), SpaceError> {
        self.flush_all()
    }

    fn cut(&self) -> Result<DurableCut<'_>, SpaceError> {
        let mut head = self.head.lock();
        let mut state = self.state.write();
        // What the image is made of is durable before anybody has the image; a pause has flushed nearly all of it.
        self.flush_state(&state, &mut head)?;
        drop(head);
        let index = state.next.get_mut().index.clone();
        let sealed = match state.live.get() {
            Some(live) => state.origin.child(index, Some(live.layer.clone()))?,
            None => state.origin.child(index, state.origin.top().cloned())?,
        };
        let fresh = State::over(sealed.clone());
        let old = replace(&mut *state, fresh);
        Ok(DurableCut { state, old: Some(old), sealed })
    }

    fn origin(&self) -> DurableImage {
        self.state.read().origin.clone()
    }

    fn dirty(&self) -> Result<PageSet, SpaceError> {
        let state = self.state.read();
        let next = state.next.lock().index.clone();
        Ok(state.origin.index().diff(&next))
    }

    fn dirty_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        let state = self.state.read();
        let next = state.next.lock();
        Ok(state.origin.index().diff_in(&next.index, range))
    }

    fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        let state = self.state.read();
        state.origin.geometry_of().check_pages(range)?;
        let next = state.next.lock();
        Ok(extents_of(&next.index, range, state.origin.base_pages().end()))
    }

    fn reset(&self) -> Result<PageCount, SpaceError> {
        let mut state = self.state.write();
        let state = &mut *state;
        let next = state.next.get_mut();
        let dirty = state.origin.index().diff(&next.index);
        if let Some(live) = state.live.get_mut() {
            live.overlay().file().check_synced()?;
            let all = state.origin.geometry_of().all();
            live.presence.remove(all).into_iter().for_each(|run| next.waiting.insert(run));
            dirty.runs().for_each(|run| live.presence.touch(run));
        }
        next.index = state.origin.index().clone();
        state.below = state.origin.index().clone();
        state.zeroed = false;
        Ok(dirty.count())
    }

    fn usage(&self) -> Result<Usage, SpaceError> {
        let state = self.state.read();
        let next = state.next.lock();
        let live = state.live.get();
        let private = live.map_or(PageCount::ZERO, |live| live.presence.count());
        let total = state.origin.geometry_of().pages();
        let (data, below) = (next.index.tally().data, state.origin.base_pages_under(&next.index));
        let shared = PageCount::new((data + below).saturating_sub(private.get()));
        Ok(Usage {
            private,
            shared,
            zero: total.saturating_sub(private).saturating_sub(shared),
            table_bytes: ByteSize::new(live.map_or(0, |live| live.presence.table_bytes()) + next.table_bytes),
            layers: state.origin.layers(),
            depth: state.origin.depth(),
        })
    }

    fn validate(&self) -> Result<(), String> {
        let mut state = self.state.write();
        let state = &mut *state;
        state.origin.validate()?;
        state.below.validate()?;
        let next = state.next.get_mut();
        next.index.validate()?;
        let mut pages = 0;
        if let Some(live) = state.live.get() {
            let own = Place::positional(live.layer.clone());
            for block in live.presence.blocks() {
                let start = block * BLOCK_PAGES;
                for run in MapBlock::runs(&live.presence.block(block)) {
                    for page in run.iter().map(|page| PageIndex::new(start + page.get())) {
                        pages += 1;
                        if !next.index.get(page).same(PageState::Data(&own)) {
                            return Err(format!("{page:?} is in the overlay, and the next index does not say so"));
                        }
                    }
                }
            }
            let counted = live.presence.count().get();
            if counted != pages {
                return Err(format!("{pages} pages in the overlay, {counted} counted"));
            }
            let waiting = next.waiting.iter().chain(next.ready.iter()).flat_map(|range| range.iter());
            for page in waiting {
                if live.presence.contains(page) {
                    return Err(format!("{page:?} is in the overlay and waits to be punched"));
                }
            }
        }
        let strays = state.below.diff(&next.index).count().get();
        if strays != pages {
            return Err(format!("{strays} pages differ from below, {pages} are in the overlay"));
        }
        let zeroed = !state.origin.index().diff(&state.below).is_empty();
        if zeroed && !state.zeroed {
            return Err("pages were zeroed, and the map will not say so".into());
        }
        Ok(())
    }
}

/// A cut of a durable disk; holds the disk until it is committed or dropped.
pub struct DurableCut<'a> {
    state: RwLockWriteGuard<'a, State>,
    old: Option<State>,
    sealed: DurableImage,
}

impl Cut for DurableCut<'_> {
    type Sealed = DurableImage;

    fn commit(mut self) -> (DurableImage, Deferred) {
        let old = self.old.take().map(AfterCut);
        self.sealed.remember();
        // Punching costs by what was discarded, so it waits until nobody does.
        let long = old.as_ref().is_some_and(|old| !old.0.next.lock().ready.is_empty());
        (self.sealed.clone(), if long { Deferred::costly(old) } else { Deferred::cheap(old) })
    }
}

impl Drop for DurableCut<'_> {
    fn drop(&mut self) {
        if let Some(old) = self.old.take() {
            *self.state = old;
        }
    }
}

/// The tables of before a cut, and space of the layer that it sealed which nothing names.
struct AfterCut(State);

impl Drop for AfterCut {
    fn drop(&mut self) {
        let ready = std::mem::take(&mut self.0.next.get_mut().ready);
        if let Some(live) = self.0.live.get() {
            for range in ready.iter() {
                if let Err(error) = live.overlay().punch(range) {
                    tracing::warn!(%error, "the space of discarded pages could not be given back");
                    return;
                }
            }
        }
    }
}
