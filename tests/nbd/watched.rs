//! A backing that counts flushes, fails when told and stands still when told; otherwise a heap space.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use offshoot::backing::{Allocation, Backing, Cut, Deferred, Extent, Heap, HeapCut, HeapImage, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageCount, PageRange, PageSet, PageSize, SectorCount};
use offshoot::{ImageError, SpaceError, SystemError, Tree, Usage};

/// What is done to the space, and what happened to it.
#[derive(Debug, Default)]
pub struct Watch {
    pub flushes: AtomicU64,
    /// Writes that had returned when the last flush began.
    pub writes_before_flush: AtomicU64,
    writes: AtomicU64,
    failing: Mutex<Option<std::io::ErrorKind>>,
    held: Mutex<bool>,
    released: Condvar,
}

impl Watch {
    /// Every access fails so, until told otherwise.
    pub fn fail(&self, how: Option<std::io::ErrorKind>) {
        *self.failing.lock().unwrap() = how;
    }

    /// Flushes stand still until [`Watch::release`].
    pub fn hold_flushes(&self) {
        *self.held.lock().unwrap() = true;
    }

    pub fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    fn check(&self) -> Result<(), SpaceError> {
        match *self.failing.lock().unwrap() {
            None => Ok(()),
            Some(kind @ std::io::ErrorKind::StorageFull) => {
                Err(SpaceError::System(SystemError::Other { call: "pwrite", error: Arc::new(kind.into()) }))
            }
            Some(kind) => Err(ImageError::Io(Arc::new(kind.into())).into()),
        }
    }
}

#[derive(Debug)]
pub struct Watched(Heap, Arc<Watch>);

#[derive(Clone, Debug)]
pub struct WatchedImage(HeapImage<offshoot::backing::Page4K>, Arc<Watch>);

pub struct WatchedCut<'a>(HeapCut<'a, offshoot::backing::Page4K>, Arc<Watch>);

/// A disk of this many sectors that is watched.
pub fn disk(sectors: u64) -> (Arc<Disk>, Arc<Watch>) {
    let geometry = Geometry::new(ByteSize::new((sectors * 512).next_multiple_of(4096)), PageSize::KIB_4).unwrap();
    let space = Watched::create(&Tree::default(), geometry, None).unwrap();
    let watch = space.1.clone();
    (Arc::new(Disk::over(space, SectorCount::new(sectors), Access::ReadWrite).unwrap()), watch)
}

impl Backing for Watched {
    type Sealed = WatchedImage;
    type Cut<'a> = WatchedCut<'a>;

    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        Ok(Self(Heap::create(tree, geometry, base)?, Arc::default()))
    }
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.1.check()?;
        self.0.read(at, buf)
    }
    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        self.1.check()?;
        self.0.write(at, data)?;
        self.1.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        self.1.check()?;
        self.0.zero(range)
    }
    fn flush(&self) -> Result<(), SpaceError> {
        self.1.check()?;
        self.1.writes_before_flush.store(self.1.writes.load(Ordering::SeqCst), Ordering::SeqCst);
        drop(self.1.released.wait_while(self.1.held.lock().unwrap(), |held| *held).unwrap());
        self.1.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn cut(&self) -> Result<WatchedCut<'_>, SpaceError> {
        Ok(WatchedCut(self.0.cut()?, self.1.clone()))
    }
    fn origin(&self) -> WatchedImage {
        WatchedImage(self.0.origin(), self.1.clone())
    }
    fn dirty(&self) -> Result<PageSet, SpaceError> {
        self.0.dirty()
    }
    // `dirty_in` and `allocation` are the trait's own: what a backing serves that knows no better.
    fn reset(&self) -> Result<PageCount, SpaceError> {
        self.0.reset()
    }
    fn usage(&self) -> Result<Usage, SpaceError> {
        self.0.usage()
    }
    fn validate(&self) -> Result<(), String> {
        self.0.validate()
    }
}

impl Cut for WatchedCut<'_> {
    type Sealed = WatchedImage;

    fn commit(self) -> (WatchedImage, Deferred) {
        let (image, deferred) = self.0.commit();
        (WatchedImage(image, self.1), deferred)
    }
}

impl Source for WatchedImage {
    fn len(&self) -> ByteSize {
        self.0.len()
    }
    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.0.read(at, buf)
    }
}

impl Sealed for WatchedImage {
    type Live = Watched;

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn spawn(&self) -> Result<Watched, SpaceError> {
        Ok(Watched(self.0.spawn()?, self.1.clone()))
    }
    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        self.0.diff(&other.0)
    }
    fn flatten(&self) -> Result<Self, SpaceError> {
        Ok(Self(self.0.flatten()?, self.1.clone()))
    }
    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        Ok(Self(self.0.merge_onto(&ancestor.0)?, self.1.clone()))
    }
    fn depth(&self) -> u32 {
        self.0.depth()
    }
    fn same(&self, other: &Self) -> bool {
        self.0.same(&other.0)
    }
    fn validate(&self) -> Result<(), String> {
        self.0.validate()
    }
}

/// A backing that cannot tell says so of everything.
#[test]
fn tells_nothing_of_allocation() {
    let (disk, _watch) = disk(16);
    let pages = PageRange::new(offshoot::page::PageIndex::new(0), PageCount::new(2)).unwrap();
    assert_eq!(disk.allocation(pages).unwrap(), [Extent { pages, state: Allocation::Data }]);
}
