//! The heap backing: portable, safe, for simulators, fuzzing and in-memory disks.
//!
//! A space is an index of shared pages and a table of its own. At a cut the pages are handed over, never copied: the index of
//! the next image is kept up with every first write, so the cut itself is one reference count whatever was
//! written. The live table is what readers and writers use without a lock; the next index is touched once for
//! each page that is made private.
//!
//! Locking: `state` is held shared by every access (or by a [`HeapView`] for many), exclusively by cut, reset and zero. `next` is
//! a leaf lock, taken with `state` held. Nothing else is locked here.

mod access;
mod image;
#[cfg(all(test, shuttle))]
mod interleavings;
mod page;

pub use access::{HeapView, Word};
pub use image::HeapImage;
pub use page::{AnyPage, Page4K, PageBody};

use std::fmt;
use std::mem::replace;
use std::sync::Arc;
use std::time::Duration;

use self::page::Page;
use super::{Backing, Cut, Deferred, Extent, Sealed, Tree, extents_of};
use crate::account::Usage;
use crate::error::SpaceError;
use crate::image::Source;
use crate::overlay::{Index, Live, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, PageCount, PageRange, PageSet, PageSize};
use crate::sync::{Mutex, RwLock, RwLockWriteGuard};

/// How long a cut, a reset or a discard waits for views of the space to be dropped.
pub(super) const VIEW_PATIENCE: Duration = Duration::from_secs(2);

/// How many live pages' slots are freed within a fork; with more, a thread frees them: some 3 µs each where they are scattered.
const CHEAP_TO_FREE: PageCount = PageCount::new(64);

type PageArc<B> = Arc<Page<B>>;

/// A space on the heap. See the [module](crate::backing) for the contract, and [`Heap::view`] for fast access.
///
/// The first write after a fork copies the root of the index: 16 bytes for each 128 MiB of the space (at 4 KiB pages), 8 KiB for
/// 64 GiB.
///
/// ```
/// use offshoot::Tree;
/// use offshoot::backing::{Backing, Cut, Heap, Sealed};
/// use offshoot::page::{ByteOffset, ByteSize, Geometry, PageSize};
///
/// let geometry = Geometry::new(ByteSize::gib(64), PageSize::KIB_4)?;
/// let parent: Heap = Heap::create(&Tree::default(), geometry, None)?;
/// parent.write(ByteOffset::new(5000), b"before")?;
/// let (image, _deferred) = parent.cut()?.commit();
/// let clone = image.spawn()?;
/// parent.write(ByteOffset::new(5000), b"after!")?;
/// let mut seen = [0; 6];
/// clone.read(ByteOffset::new(5000), &mut seen)?;
/// assert_eq!(&seen, b"before");
/// # Ok::<(), offshoot::SpaceError>(())
/// ```
pub struct Heap<B: PageBody = Page4K> {
    state: RwLock<State<B>>,
}

/// Everything that the lock guards.
pub(super) struct State<B: PageBody> {
    geometry: Geometry,
    origin: HeapImage<B>,
    /// What lies under the live table: the origin's index, with the pages zeroed since.
    below: Index<PageArc<B>>,
    live: Live<PageArc<B>>,
    /// The index that the next cut seals: `below` with every live page.
    next: Mutex<Next<B>>,
}

struct Next<B: PageBody> {
    index: Index<PageArc<B>>,
    /// Bytes of tables copied or made in it since the origin.
    table_bytes: u64,
}

impl<B: PageBody> Next<B> {
    fn of(index: Index<PageArc<B>>) -> Mutex<Self> {
        Mutex::new(Self { index, table_bytes: 0 })
    }
}

impl<B: PageBody> State<B> {
    fn over(origin: HeapImage<B>) -> Self {
        Self {
            geometry: origin.geometry(),
            below: origin.index().clone(),
            live: Live::new(origin.geometry().pages()),
            next: Next::of(origin.index().clone()),
            origin,
        }
    }

    fn page_size(&self) -> PageSize {
        self.geometry.page_size()
    }

    /// What a page with nothing to say is set to: below an image, a discard must hide it.
    fn blank(&self) -> PageState<PageArc<B>> {
        if self.origin.base().is_some() { PageState::Zero } else { PageState::Absent }
    }
}

impl<B: PageBody> Heap<B> {
    pub(super) fn over(origin: HeapImage<B>) -> Self {
        Self { state: RwLock::new(State::over(origin)) }
    }

    fn exclusive(&self) -> Result<RwLockWriteGuard<'_, State<B>>, SpaceError> {
        self.state.try_write_for(VIEW_PATIENCE).ok_or(SpaceError::Busy { waited: VIEW_PATIENCE })
    }
}

impl<B: PageBody> fmt::Debug for Heap<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state.try_read() {
            Some(state) => f
                .debug_struct("Heap")
                .field("geometry", &state.geometry)
                .field("private", &state.live.count())
                .field("depth", &state.origin.depth())
                .finish_non_exhaustive(),
            None => f.write_str("Heap(being cut)"),
        }
    }
}

impl<B: PageBody> Backing for Heap<B> {
    type Sealed = HeapImage<B>;
    type Cut<'a> = HeapCut<'a, B>;

    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        if !B::supports(geometry.page_size()) {
            return Err(SpaceError::PageSize {
                size: geometry.page_size(),
                backing: "Heap<Page4K>",
                instead: "Heap<AnyPage>",
            });
        }
        Ok(Self::over(HeapImage::root(tree.clone(), geometry, base)?))
    }

    fn geometry(&self) -> Geometry {
        self.state.read().geometry
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.state.read().read(at, buf)
    }

    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        self.state.read().write(at, data)
    }

    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        let mut state = self.exclusive()?;
        let state = &mut *state;
        state.geometry.check_pages(range)?;
        let blank = state.blank();
        state.live.remove(range);
        let next = state.next.get_mut();
        next.table_bytes += state.below.set(range, &blank) + next.index.set(range, &blank);
        Ok(())
    }

    fn flush(&self) -> Result<(), SpaceError> {
        // Memory has no medium behind it: what was written is already as durable as it gets.
        Ok(())
    }

    fn cut(&self) -> Result<HeapCut<'_, B>, SpaceError> {
        let mut state = self.exclusive()?;
        let next = state.next.get_mut().index.clone();
        let sealed = state.origin.child(next)?;
        let fresh = State::over(sealed.clone());
        let old = replace(&mut *state, fresh);
        Ok(HeapCut { state, old: Some(old), sealed })
    }

    fn origin(&self) -> HeapImage<B> {
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
        state.geometry.check_pages(range)?;
        let next = state.next.lock();
        Ok(extents_of(&next.index, range, state.origin.base_end()))
    }

    fn reset(&self) -> Result<PageCount, SpaceError> {
        let mut state = self.exclusive()?;
        // Every live page counts, and what was zeroed and not written since. Mostly nothing was, which is seen at the root.
        let zeroed = state.origin.index().diff(&state.below);
        let zeroed = zeroed.pages().filter(|page| state.live.get(*page).is_none()).count();
        let dirty = state.live.count().saturating_add(PageCount::new(zeroed as u64));
        let fresh = State::over(state.origin.clone());
        let old = replace(&mut *state, fresh);
        drop(state);
        drop(old);
        Ok(dirty)
    }

    fn usage(&self) -> Result<Usage, SpaceError> {
        let state = self.state.read();
        let next = state.next.lock();
        let private = state.live.count();
        let total = state.geometry.pages();
        let (data, below) = (next.index.tally().data, state.origin.base_pages_under(&next.index));
        let shared = PageCount::new((data + below).saturating_sub(private.get()));
        Ok(Usage {
            private,
            shared,
            zero: total.saturating_sub(private).saturating_sub(shared),
            table_bytes: ByteSize::new(state.live.table_bytes() + next.table_bytes),
            layers: state.origin.layers(),
            depth: state.origin.depth(),
        })
    }

    fn validate(&self) -> Result<(), String> {
        let mut state = self.exclusive().map_err(|e| e.to_string())?;
        let state = &mut *state;
        state.origin.validate()?;
        state.below.validate()?;
        let next = &state.next.get_mut().index;
        next.validate()?;
        let mut live = 0;
        for (page, own) in state.live.iter() {
            live += 1;
            match next.get(page) {
                PageState::Data(named) if Arc::ptr_eq(named, own) => {}
                _ => return Err(format!("{page:?} is live, and the next index does not name it")),
            }
        }
        if live != state.live.count().get() {
            return Err(format!("{live} live pages found, {} counted", state.live.count()));
        }
        let beyond = state.below.diff(next).pages().find(|page| state.live.get(*page).is_none());
        match beyond {
            Some(page) => Err(format!("{page:?} differs from below and is not live")),
            None => Ok(()),
        }
    }
}

/// A cut of a heap space; holds the space until it is committed or dropped.
pub struct HeapCut<'a, B: PageBody> {
    state: RwLockWriteGuard<'a, State<B>>,
    old: Option<State<B>>,
    sealed: HeapImage<B>,
}

impl<B: PageBody> Cut for HeapCut<'_, B> {
    type Sealed = HeapImage<B>;

    fn commit(mut self) -> (HeapImage<B>, Deferred) {
        // The old tables name what the image owns now; freeing them costs by what was written, so the caller says when.
        let old = self.old.take();
        let many = old.as_ref().is_some_and(|old| old.live.count() > CHEAP_TO_FREE);
        let deferred = if many { Deferred::costly(old) } else { Deferred::cheap(old) };
        (self.sealed.clone(), deferred.named("old table"))
    }
}

impl<B: PageBody> Drop for HeapCut<'_, B> {
    fn drop(&mut self) {
        if let Some(old) = self.old.take() {
            *self.state = old;
        }
    }
}
