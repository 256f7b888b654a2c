//! A backing that is wrong in exactly one way: the heap, with one rule of the contract broken.
//!
//! What the conformance suite is tested with. The fault is a type parameter, because a backing is created without a value
//! that could carry it.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, Weak};

use offshoot::backing::{Backing, Cut, Deferred, Heap, HeapCut, HeapImage, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet};
use offshoot::{SpaceError, Tree, Usage};

/// What is wrong with a [`Broken`] backing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(dead_code, reason = "each test that includes this file uses some of them")]
pub enum Flaw {
    /// Nothing: the control.
    None,
    /// Two clones of one image are one space.
    SiblingsShare,
    /// Dropping a cut drops the private pages.
    RollbackLoses,
    /// Dropping a cut keeps it.
    RollbackCommits,
    /// A cut takes effect when it is committed, and keeps nobody out until then.
    CutHoldsNobody,
    /// A committed cut's image follows the space it was made from.
    ImageFollowsParent,
    /// The last page written before a cut is older in the image, in its second half.
    ImageTears,
    /// The same in all of it.
    ImageMisses,
    /// One private page too many is counted.
    UsageSum,
    /// An idle clone says that its pages are its own.
    NothingShared,
    /// The last dirty page is not named.
    DirtyMisses,
    /// All pages are named dirty.
    DirtyNamesAll,
    /// The first page of a range stays as it is.
    ZeroForgets,
    /// Pages that are not private keep what lies below.
    ZeroShowsBase,
    /// The page after a range is zeroed too.
    ZeroOneMore,
    /// A reset leaves the last dirty page.
    ResetLeaves,
    /// A reset says one page too few.
    ResetMiscounts,
    /// Nothing ever differs.
    DiffEmpty,
    /// Everything always differs.
    DiffNamesAll,
    /// Strangers are compared as if they were relatives.
    DiffStrangers,
    /// Flattening gives back the image itself.
    FlattenShares,
    /// Merging gives back the ancestor.
    MergeLoses,
    /// Merging onto anything is done.
    MergeAnything,
    /// Depth is always 1.
    DepthStuck,
    /// The origin is the first image for ever.
    OriginStale,
    /// A read over several pages fills only the first.
    ReadStops,
    /// A write over several pages writes only the first.
    WriteStops,
    /// A write past the end writes what fits and then fails.
    WriteBeforeFailing,
    /// Reads past the end give zeroes.
    ReadsPastTheEnd,
    /// A base that is too long is cut off in silence.
    BaseCutOff,
    /// Past the end of a base image there is garbage.
    BaseTail,
    /// Every spawn forgets an image.
    Leaks,
    /// A first write copies the page and writes later what other writers wrote meanwhile.
    ReadModifyWrite,
}

/// A flaw as a type.
pub trait Has: Send + Sync + std::fmt::Debug + 'static {
    const FLAW: Flaw;

    /// What a commit of this backing puts off.
    fn deferred(own: Deferred) -> Deferred {
        own
    }
}

pub struct Broken<F: Has> {
    heap: Arc<Heap>,
    first: HeapImage<offshoot::backing::Page4K>,
    _flaw: PhantomData<F>,
}

type Image = HeapImage<offshoot::backing::Page4K>;

pub struct BrokenImage<F: Has> {
    image: Image,
    parent: Weak<Heap>,
    shared: Arc<Mutex<Weak<Heap>>>,
    _flaw: PhantomData<F>,
}

pub struct BrokenCut<'a, F: Has> {
    space: &'a Broken<F>,
    cut: Option<HeapCut<'a, offshoot::backing::Page4K>>,
    /// Bytes of the origin that get into the image by mistake.
    older: Option<(ByteOffset, Vec<u8>)>,
}

impl<F: Has> Clone for BrokenImage<F> {
    fn clone(&self) -> Self {
        let (image, parent, shared) = (self.image.clone(), self.parent.clone(), self.shared.clone());
        Self { image, parent, shared, _flaw: PhantomData }
    }
}

impl<F: Has> std::fmt::Debug for Broken<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Broken({:?})", F::FLAW)
    }
}

impl<F: Has> std::fmt::Debug for BrokenImage<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BrokenImage({:?})", F::FLAW)
    }
}

fn is(found: Flaw, flaw: Flaw) -> bool {
    found == flaw
}

impl<F: Has> Broken<F> {
    fn over(heap: Arc<Heap>) -> Self {
        Self { first: heap.origin(), heap, _flaw: PhantomData }
    }

    fn sealed(&self, image: Image) -> BrokenImage<F> {
        BrokenImage { image, parent: Arc::downgrade(&self.heap), shared: Arc::default(), _flaw: PhantomData }
    }

    fn len(&self) -> u64 {
        self.heap.geometry().len().get()
    }

    /// What the origin holds of the last page written since.
    fn older(&self) -> Result<Option<(ByteOffset, Vec<u8>)>, SpaceError> {
        let from = match F::FLAW {
            Flaw::ImageTears => 2048,
            Flaw::ImageMisses => 0,
            _ => return Ok(None),
        };
        let Some(page) = self.heap.dirty()?.pages().last() else { return Ok(None) };
        let at = ByteOffset::new(page.get() * 4096 + from as u64);
        let mut bytes = vec![0; 4096 - from];
        self.heap.origin().read(at, &mut bytes)?;
        Ok(Some((at, bytes)))
    }
}

/// The bytes of `len` from `at` that lie in the first page.
fn first_page(at: ByteOffset, len: usize) -> usize {
    len.min(4096 - (at.get() % 4096) as usize)
}

/// A base of which only so much is seen, or after which there is garbage.
struct Tampered {
    base: Arc<dyn Source>,
    len: ByteSize,
}

impl Source for Tampered {
    fn len(&self) -> ByteSize {
        self.len
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let here = (self.base.len().get().saturating_sub(at.get()) as usize).min(buf.len());
        buf[here..].fill(0xff);
        self.base.read(at, &mut buf[..here])
    }
}

impl<F: Has> Backing for Broken<F> {
    type Sealed = BrokenImage<F>;
    type Cut<'a> = BrokenCut<'a, F>;

    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        let len = geometry.len();
        let base = match F::FLAW {
            Flaw::BaseCutOff => {
                base.map(|base| Arc::new(Tampered { len: base.len().min(len), base }) as Arc<dyn Source>)
            }
            Flaw::BaseTail => base.map(|base| Arc::new(Tampered { len: base.len().max(len), base }) as Arc<dyn Source>),
            _ => base,
        };
        Ok(Self::over(Arc::new(Heap::create(tree, geometry, base)?)))
    }

    fn geometry(&self) -> Geometry {
        self.heap.geometry()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        match F::FLAW {
            Flaw::ReadStops => {
                self.heap.geometry().check(at, ByteSize::new(buf.len() as u64))?;
                let here = first_page(at, buf.len());
                self.heap.read(at, &mut buf[..here])
            }
            Flaw::ReadsPastTheEnd => {
                let here = (self.len().saturating_sub(at.get()) as usize).min(buf.len());
                buf[here..].fill(0);
                if here == 0 { Ok(()) } else { self.heap.read(at, &mut buf[..here]) }
            }
            _ => self.heap.read(at, buf),
        }
    }

    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        match F::FLAW {
            Flaw::WriteStops => {
                self.heap.geometry().check(at, ByteSize::new(data.len() as u64))?;
                self.heap.write(at, &data[..first_page(at, data.len())])
            }
            Flaw::WriteBeforeFailing if at.get() < self.len() => {
                let here = ((self.len() - at.get()) as usize).min(data.len());
                self.heap.write(at, &data[..here])?;
                self.heap.write(at, data)
            }
            Flaw::ReadModifyWrite if data.len() < 8 && !data.is_empty() && at.get() < self.len() - 8 => {
                let mut word = [0; 8];
                let word_at = ByteOffset::new(at.get() / 8 * 8);
                let within = (at.get() % 8) as usize;
                if within + data.len() > 8 {
                    return self.heap.write(at, data);
                }
                self.heap.read(word_at, &mut word)?;
                std::thread::yield_now();
                word[within..within + data.len()].copy_from_slice(data);
                self.heap.write(word_at, &word)
            }
            _ => self.heap.write(at, data),
        }
    }

    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        let (start, end) = (range.start().get(), range.end().get());
        let range_of = |start, end| PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
        match F::FLAW {
            Flaw::ZeroForgets if end - start > 1 => self.heap.zero(range_of(start + 1, end)),
            Flaw::ZeroOneMore if end < self.heap.geometry().pages().get() => self.heap.zero(range_of(start, end + 1)),
            Flaw::ZeroShowsBase => {
                self.heap.geometry().check_pages(range)?;
                let dirty = self.heap.dirty()?;
                range
                    .iter()
                    .filter(|page| dirty.contains(*page))
                    .try_for_each(|page| self.heap.zero(PageRange::one(page)))
            }
            _ => self.heap.zero(range),
        }
    }

    fn flush(&self) -> Result<(), SpaceError> {
        self.heap.flush()
    }

    fn cut(&self) -> Result<BrokenCut<'_, F>, SpaceError> {
        let older = self.older()?;
        let cut = Some(self.heap.cut()?).filter(|_| !is(F::FLAW, Flaw::CutHoldsNobody));
        Ok(BrokenCut { space: self, cut, older })
    }

    fn origin(&self) -> BrokenImage<F> {
        self.sealed(if is(F::FLAW, Flaw::OriginStale) { self.first.clone() } else { self.heap.origin() })
    }

    fn dirty(&self) -> Result<PageSet, SpaceError> {
        let dirty = self.heap.dirty()?;
        Ok(match F::FLAW {
            Flaw::DirtyMisses => dirty.pages().take((dirty.count().get() as usize).saturating_sub(1)).collect(),
            Flaw::DirtyNamesAll => self.heap.geometry().all().iter().collect(),
            _ => dirty,
        })
    }

    fn reset(&self) -> Result<PageCount, SpaceError> {
        let last = self.heap.dirty()?.pages().last();
        let mut kept = [0; 4096];
        if let Some(last) = last {
            self.heap.read(ByteOffset::new(last.get() * 4096), &mut kept)?;
        }
        let count = self.heap.reset()?;
        match (F::FLAW, last) {
            (Flaw::ResetLeaves, Some(last)) => self.heap.write(ByteOffset::new(last.get() * 4096), &kept)?,
            (Flaw::ResetMiscounts, _) => return Ok(count.saturating_sub(PageCount::new(1))),
            _ => {}
        }
        Ok(count)
    }

    fn usage(&self) -> Result<Usage, SpaceError> {
        let mut usage = self.heap.usage()?;
        match F::FLAW {
            Flaw::UsageSum => usage.private = usage.private.saturating_add(PageCount::new(1)),
            Flaw::NothingShared => {
                usage.private = usage.private.saturating_add(usage.shared);
                usage.shared = PageCount::ZERO;
            }
            Flaw::DepthStuck => usage.depth = 1,
            Flaw::OriginStale => usage.depth = self.first.depth(),
            _ => {}
        }
        Ok(usage)
    }

    fn validate(&self) -> Result<(), String> {
        self.heap.validate()
    }
}

impl<F: Has> Cut for BrokenCut<'_, F> {
    type Sealed = BrokenImage<F>;

    fn commit(mut self) -> (BrokenImage<F>, Deferred) {
        let cut = self.cut.take().unwrap_or_else(|| self.space.heap.cut().expect("nobody holds it"));
        let (mut image, deferred) = cut.commit();
        if let Some((at, bytes)) = self.older.take() {
            let clone = image.spawn().expect("memory for a page");
            clone.write(at, &bytes).expect("memory for a page");
            image = clone.cut().expect("nobody holds it").commit().0;
        }
        (self.space.sealed(image), F::deferred(deferred))
    }
}

impl<F: Has> Drop for BrokenCut<'_, F> {
    fn drop(&mut self) {
        let Some(cut) = self.cut.take() else { return };
        match F::FLAW {
            Flaw::RollbackCommits => drop(cut.commit()),
            Flaw::RollbackLoses => {
                drop(cut);
                self.space.heap.reset().expect("nobody holds it");
            }
            _ => drop(cut),
        }
    }
}

impl<F: Has> Source for BrokenImage<F> {
    fn len(&self) -> ByteSize {
        self.image.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        match self.parent.upgrade() {
            Some(parent) if is(F::FLAW, Flaw::ImageFollowsParent) => parent.read(at, buf),
            _ => self.image.read(at, buf),
        }
    }
}

impl<F: Has> BrokenImage<F> {
    fn with(&self, image: Image) -> Self {
        Self { image, parent: Weak::new(), shared: Arc::default(), _flaw: PhantomData }
    }
}

impl<F: Has> Sealed for BrokenImage<F> {
    type Live = Broken<F>;

    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn spawn(&self) -> Result<Broken<F>, SpaceError> {
        if is(F::FLAW, Flaw::Leaks) {
            std::mem::forget(self.image.clone());
        }
        if is(F::FLAW, Flaw::SiblingsShare) {
            let mut shared = self.shared.lock().expect("no thread panics with it");
            if let Some(heap) = shared.upgrade() {
                return Ok(Broken::over(heap));
            }
            let heap = Arc::new(self.image.spawn()?);
            *shared = Arc::downgrade(&heap);
            return Ok(Broken::over(heap));
        }
        Ok(Broken::over(Arc::new(self.image.spawn()?)))
    }

    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        let diff = self.image.diff(&other.image);
        match F::FLAW {
            Flaw::DiffEmpty => diff.map(|_| PageSet::new()),
            Flaw::DiffNamesAll => diff.map(|_| self.image.geometry().all().iter().collect()),
            Flaw::DiffStrangers => Ok(diff.unwrap_or_default()),
            _ => diff,
        }
    }

    fn flatten(&self) -> Result<Self, SpaceError> {
        if is(F::FLAW, Flaw::FlattenShares) { Ok(self.clone()) } else { Ok(self.with(self.image.flatten()?)) }
    }

    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        let merged = self.image.merge_onto(&ancestor.image);
        match F::FLAW {
            Flaw::MergeLoses => merged.map(|_| self.with(ancestor.image.clone())),
            Flaw::MergeAnything => Ok(merged.map_or_else(|_| self.clone(), |merged| self.with(merged))),
            _ => Ok(self.with(merged?)),
        }
    }

    fn depth(&self) -> u32 {
        if is(F::FLAW, Flaw::DepthStuck) { 1 } else { self.image.depth() }
    }

    fn same(&self, other: &Self) -> bool {
        self.image.same(&other.image)
    }

    fn validate(&self) -> Result<(), String> {
        self.image.validate()
    }
}
