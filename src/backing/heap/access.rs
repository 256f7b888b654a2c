//! Reading and writing a heap space: what one access does to one page, and the view that makes many accesses cheap.
//!
//! Runs under the space's lock held shared, and takes no other but the leaf lock of the next index when a page is made
//! private. Must not cut, reset or discard.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::page::{Page, PageBody, WORD};
use super::{Heap, PageArc, State};
use crate::error::SpaceError;
use crate::overlay::PageState;
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageIndex, PageRange};
use crate::sync::RwLockReadGuard;

/// An access as the pages it touches: (page, byte within it, range of the caller's buffer).
fn pieces(
    geometry: Geometry,
    at: ByteOffset,
    len: usize,
) -> impl Iterator<Item = (PageIndex, usize, std::ops::Range<usize>)> {
    let page_bytes = geometry.page_size().bytes().get();
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let here = at.get() + done as u64;
            let within = (here & (page_bytes - 1)) as usize;
            let take = (page_bytes as usize - within).min(len - done);
            done += take;
            (geometry.page_size().page_of(ByteOffset::new(here)), within, done - take..done)
        })
    })
}

impl<B: PageBody> State<B> {
    #[inline(always)]
    fn lookup(&self, page: PageIndex) -> PageState<&PageArc<B>> {
        match self.live.get(page) {
            Some(own) => PageState::Data(own),
            None => self.below.get(page),
        }
    }

    pub(super) fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.geometry.check(at, ByteSize::new(buf.len() as u64))?;
        // Neighbouring pages that lie in the base image are read in one call.
        let mut from_base = 0..0;
        for (page, within, part) in pieces(self.geometry, at, buf.len()) {
            match self.lookup(page) {
                PageState::Absent => {
                    if from_base.end != part.start {
                        self.read_base(at, from_base.clone(), buf)?;
                        from_base = part.start..part.start;
                    }
                    from_base.end = part.end;
                }
                PageState::Zero => buf[part].fill(0),
                PageState::Data(data) => data.read(within, &mut buf[part]),
            }
        }
        self.read_base(at, from_base, buf)
    }

    fn read_base(&self, at: ByteOffset, part: std::ops::Range<usize>, buf: &mut [u8]) -> Result<(), SpaceError> {
        if part.is_empty() {
            return Ok(());
        }
        self.origin.read_base(ByteOffset::new(at.get() + part.start as u64), &mut buf[part])
    }

    pub(super) fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        self.geometry.check(at, ByteSize::new(data.len() as u64))?;
        // Everything that can fail comes before the first byte is written, so a write happens whole or not at all.
        let mut made = Vec::new();
        for (page, within, part) in pieces(self.geometry, at, data.len()) {
            if self.live.get(page).is_none() {
                made.push((page, self.private_copy(page, within, &data[part])?));
            }
        }
        made.into_iter().for_each(|(page, new)| self.install(page, new));
        for (page, within, part) in pieces(self.geometry, at, data.len()) {
            let own = self.live.get(page).expect("installed above, and nobody takes a page out while the lock is held");
            own.write(within, &data[part]);
        }
        Ok(())
    }

    /// This VM's own copy of a page, made if there is none.
    fn private(&self, page: PageIndex) -> Result<&PageArc<B>, SpaceError> {
        if self.live.get(page).is_none() {
            let copy = self.private_copy(page, 0, &[])?;
            self.install(page, copy);
        }
        Ok(self.live.get(page).expect("installed above, and nobody takes a page out while the lock is held"))
    }

    /// The page that breaks sharing for this write: a copy of what is there, or the data itself where it fills the page.
    #[cold]
    fn private_copy(&self, page: PageIndex, within: usize, data: &[u8]) -> Result<Page<B>, SpaceError> {
        let size = self.page_size();
        let charge = || {
            let tree = self.origin.tree();
            let limit = tree.limits().heap_pages;
            tree.0.charge_heap_page().ok_or(SpaceError::HeapLimit { limit })
        };
        if within == 0 && data.len() as u64 == size.bytes().get() {
            return Ok(Page::from_bytes(size, data, charge()?));
        }
        Ok(match self.below.get(page) {
            PageState::Data(shared) => Page::copy_of(size, shared, charge()?),
            PageState::Zero => Page::zeroed(size, charge()?),
            PageState::Absent if self.origin.base().is_none() => Page::zeroed(size, charge()?),
            PageState::Absent => {
                let mut bytes = vec![0; size.bytes().get() as usize];
                self.origin.read_base(size.start_of(page), &mut bytes)?;
                Page::from_bytes(size, &bytes, charge()?)
            }
        })
    }

    /// Makes a page private, unless another CPU did so first: a normal outcome of two first writes, after which both write into the
    /// winner's page. The loser's was never seen by anybody.
    fn install(&self, page: PageIndex, new: Page<B>) {
        // Locked before the page can be seen: who has written to the winner's page finds it in the next index.
        let mut next = self.next.lock();
        if let Ok(own) = self.live.install(page, Arc::new(new)) {
            let bytes = next.index.set(PageRange::one(page), &PageState::Data(own.clone()));
            next.table_bytes += bytes;
        }
    }
}

/// A guest word: what one load or store of a simulator moves.
///
/// Sealed: `u8`, `u16`, `u32` and `u64`, in the machine's own byte order.
pub trait Word: Copy + private::Sealed {
    #[doc(hidden)]
    const SIZE: usize;
    #[doc(hidden)]
    fn cut(word: u64, shift: u32) -> Self;
    #[doc(hidden)]
    fn bytes(self) -> [u8; WORD];
    #[doc(hidden)]
    fn join(bytes: [u8; WORD]) -> Self;
}

mod private {
    pub trait Sealed {}
}

macro_rules! words {
    ($($t:ty),*) => {$(
        impl private::Sealed for $t {}
        impl Word for $t {
            const SIZE: usize = size_of::<$t>();
            #[inline]
            fn cut(word: u64, at: u32) -> Self {
                let bytes = word.to_ne_bytes();
                let mut own = [0; size_of::<$t>()];
                own.copy_from_slice(&bytes[at as usize..at as usize + size_of::<$t>()]);
                <$t>::from_ne_bytes(own)
            }
            #[inline]
            fn bytes(self) -> [u8; WORD] {
                let mut bytes = [0; WORD];
                bytes[..size_of::<$t>()].copy_from_slice(&self.to_ne_bytes());
                bytes
            }
            #[inline]
            fn join(bytes: [u8; WORD]) -> Self {
                let mut own = [0; size_of::<$t>()];
                own.copy_from_slice(&bytes[..size_of::<$t>()]);
                <$t>::from_ne_bytes(own)
            }
        }
    )*};
}
words!(u8, u16, u32, u64);

/// Access to a heap space with its lock taken once: for a simulator that runs a batch of instructions.
///
/// Any number of views exist at once. A cut waits until all are dropped, for two seconds: drop yours when the guest is paused,
/// and call nothing of the same space while holding one. `cut`, `reset` and `zero` would wait for this very view and fail; all
/// other calls stand behind a cut that waits for it, and make that one fail.
pub struct HeapView<'a, B: PageBody> {
    state: RwLockReadGuard<'a, State<B>>,
    /// Bytes in the space.
    len: u64,
}

impl<B: PageBody> Heap<B> {
    /// Takes the space's lock for many accesses.
    ///
    /// ```
    /// use offshoot::Tree;
    /// use offshoot::backing::{Backing, Heap};
    /// use offshoot::page::{ByteOffset, ByteSize, Geometry, PageSize};
    /// let ram: Heap = Heap::create(&Tree::default(), Geometry::new(ByteSize::mib(1), PageSize::KIB_4)?, None)?;
    /// let view = ram.view();
    /// view.store(ByteOffset::new(64), 0x1234_5678u32)?;
    /// assert_eq!(view.load::<u32>(ByteOffset::new(64))?, 0x1234_5678);
    /// # Ok::<(), offshoot::SpaceError>(())
    /// ```
    pub fn view(&self) -> HeapView<'_, B> {
        let state = self.state.read();
        HeapView { len: state.geometry.len().get(), state }
    }
}

impl<B: PageBody> HeapView<'_, B> {
    /// As [`Backing::read`](super::Backing::read).
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.state.read(at, buf)
    }

    /// As [`Backing::write`](super::Backing::write).
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        self.state.write(at, data)
    }

    /// The page of an aligned word inside the space, and the word's place in it.
    #[inline(always)]
    fn aligned<T: Word>(&self, at: ByteOffset) -> Option<(PageIndex, usize)> {
        let byte = at.get();
        let shift = B::shift(self.state.page_size());
        let inside = byte < self.len && byte.is_multiple_of(T::SIZE as u64);
        inside.then(|| (PageIndex::new(byte >> shift), (byte & ((1 << shift) - 1)) as usize))
    }

    /// Loads one word. One atomic load where it is aligned to its size.
    ///
    /// # Errors
    /// As [`Backing::read`](super::Backing::read).
    // Out of line, its result goes through memory: a third more time for a random read.
    #[inline(always)]
    pub fn load<T: Word>(&self, at: ByteOffset) -> Result<T, SpaceError> {
        if let Some((page, within)) = self.aligned::<T>(at)
            && let PageState::Data(data) = self.state.lookup(page)
        {
            return Ok(T::cut(data.word(within).load(Relaxed), (within % WORD) as u32));
        }
        self.load_slowly(at)
    }

    #[cold]
    fn load_slowly<T: Word>(&self, at: ByteOffset) -> Result<T, SpaceError> {
        let mut bytes = [0; WORD];
        self.state.read(at, &mut bytes[..T::SIZE])?;
        Ok(T::join(bytes))
    }

    /// Stores one word. One atomic store where it is 8 bytes and aligned; a compare-and-swap where it is less.
    ///
    /// # Errors
    /// As [`Backing::write`](super::Backing::write).
    #[inline]
    pub fn store<T: Word>(&self, at: ByteOffset, value: T) -> Result<(), SpaceError> {
        if let Some((page, within)) = self.aligned::<T>(at)
            && let Some(own) = self.state.live.get(page)
        {
            own.write(within, &value.bytes()[..T::SIZE]);
            return Ok(());
        }
        self.state.write(at, &value.bytes()[..T::SIZE])
    }

    /// Stores `new` if the word holds `expected`, in one sequentially consistent step: what a simulator's atomic instructions are
    /// made of. Says what the word held: it was stored if that is `expected`.
    ///
    /// # Errors
    /// As [`Backing::write`](super::Backing::write); [`GeometryError::Misaligned`] unless the address is a multiple of the word's size.
    ///
    /// ```
    /// # use offshoot::{Tree, backing::{Backing, Heap}, page::*};
    /// # let ram: Heap = Heap::create(&Tree::default(), Geometry::new(ByteSize::mib(1), PageSize::KIB_4)?, None)?;
    /// let view = ram.view();
    /// assert_eq!(view.compare_exchange(ByteOffset::new(4), 0u32, 7)?, 0); // stored
    /// assert_eq!(view.compare_exchange(ByteOffset::new(4), 0u32, 9)?, 7); // not stored
    /// # Ok::<(), offshoot::SpaceError>(())
    /// ```
    pub fn compare_exchange<T: Word>(&self, at: ByteOffset, expected: T, new: T) -> Result<T, SpaceError> {
        let len = ByteSize::new(T::SIZE as u64);
        self.state.geometry.check(at, len)?;
        let Some((page, within)) = self.aligned::<T>(at) else {
            return Err(GeometryError::Misaligned { len: ByteSize::new(at.get()), page_size: len }.into());
        };
        Ok(T::join(self.state.private(page)?.compare_exchange(
            within,
            &expected.bytes()[..T::SIZE],
            &new.bytes()[..T::SIZE],
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tree;
    use crate::backing::{Backing, Cut, Page4K, Sealed};
    use crate::page::PageSize;

    #[test]
    fn an_exchange_breaks_sharing_and_keeps_its_neighbours() {
        let geometry = Geometry::new(ByteSize::kib(8), PageSize::KIB_4).unwrap();
        let parent: Heap<Page4K> = Backing::create(&Tree::default(), geometry, None).unwrap();
        parent.write(ByteOffset::new(4096), &[9; 16]).unwrap();
        let (image, _deferred) = parent.cut().unwrap().commit();
        let clone = image.spawn().unwrap();
        let at = |byte: u64| ByteOffset::new(4096 + byte);
        let view = clone.view();
        assert_eq!(view.compare_exchange(at(2), 0x0909u16, 0x0102).unwrap(), 0x0909);
        assert_eq!(view.compare_exchange(at(2), 0x0909u16, 0x0304).unwrap(), 0x0102, "not stored");
        assert_eq!(view.load::<u16>(at(2)).unwrap(), 0x0102);
        assert_eq!((view.load::<u16>(at(0)).unwrap(), view.load::<u32>(at(4)).unwrap()), (0x0909, 0x0909_0909));
        assert!(view.compare_exchange(at(1), 0u16, 0).is_err(), "misaligned");
        assert!(view.compare_exchange(ByteOffset::new(8192), 0u8, 0).is_err(), "past the end");
        assert_eq!(parent.view().load::<u16>(at(2)).unwrap(), 0x0909);
    }

    #[test]
    fn exchanges_of_several_threads_lose_nothing() {
        let geometry = Geometry::new(ByteSize::kib(4), PageSize::KIB_4).unwrap();
        let ram: Heap<Page4K> = Backing::create(&Tree::default(), geometry, None).unwrap();
        std::thread::scope(|threads| {
            for _ in 0..3 {
                threads.spawn(|| {
                    let view = ram.view();
                    for _ in 0..2000 {
                        let mut now = view.load::<u32>(ByteOffset::new(8)).unwrap();
                        while let seen = view.compare_exchange(ByteOffset::new(8), now, now + 1).unwrap()
                            && seen != now
                        {
                            now = seen;
                        }
                    }
                });
            }
        });
        assert_eq!(ram.view().load::<u32>(ByteOffset::new(8)).unwrap(), 6000);
    }
}
