//! What a space's pages live in, behind one pair of traits.
//!
//! [`Backing`] is the live side: the pages of one running VM (its RAM, or one disk), private ones over shared ones. A
//! [`Backing::cut`] makes an immutable [`Sealed`] image of this instant; [`Sealed::spawn`] makes any number of live spaces from it.
//! The same traits serve RAM and disks; the faces above speak guest addresses and sectors, these speak byte offsets.
//!
//! Implementations here: [`Heap`] (portable, pages handed over and never copied at a fork), [`Mapped`] (Linux: sealed
//! memory files and private mappings, the kernel breaks sharing) and, as a base below either, [`FileImage`]. Yours can join: run
//! `offshoot::testing::conformance` against it.

mod extent;
mod file;
mod heap;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod mapped;
mod working_set;

pub use extent::{Allocation, Extent};
pub(crate) use extent::{extents_of, next_data_in};
pub use file::FileImage;
pub use heap::{AnyPage, Heap, HeapCut, HeapImage, HeapView, Page4K, PageBody, Word};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use mapped::{AddressHole, HostRange, Mapped, MappedCut, MappedImage, PlacedRam};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use mapped::{Begun, NoCut, Onward, PauseBound, Precopy, RamMapping, Round};
pub use working_set::{Prefault, Prefaulted, WorkingSet};

use std::fmt;
use std::sync::Arc;

use crate::account::{Ledger, Limits, TreeUsage, Usage};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet};

/// What the spaces of one fork tree share: their limits, and the count of all that they hold.
///
/// ```
/// use offshoot::{Limits, Tree};
/// let tree = Tree::new(Limits::default());
/// assert_eq!(tree.usage().vms, 0);
/// ```
#[derive(Clone, Debug)]
pub struct Tree(pub(crate) Arc<Ledger>);

impl Tree {
    /// A tree with nothing in it.
    pub fn new(limits: Limits) -> Self {
        Self(Ledger::new(limits))
    }

    /// A tree on a host that is looked at in this way.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn on(limits: Limits, host: Arc<dyn crate::admission::HostView>) -> Self {
        Self(Ledger::on(limits, host))
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &Limits {
        self.0.limits()
    }

    /// Memory that the sealed layers of mapped RAM take in all, as the kernel counts it: shared by every clone, counted once. One call to
    /// the kernel for each file. A layer that was merged away and that only running VMs still show is not counted.
    pub fn memory_file_bytes(&self) -> ByteSize {
        self.0.file_bytes()
    }

    /// What it holds now. O(1); exact once the threads that make and drop things have come to rest.
    pub fn usage(&self) -> TreeUsage {
        self.0.usage()
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

/// The live side of a space: one VM's pages, private ones over shared ones.
///
/// # Contract
/// - Any number of threads read and write at once. A read that races with a write of the same bytes sees some order of
///   bytes; it never sees another VM's, and no access sees half an index.
/// - A write is seen by every later read through this space and through no other space.
/// - `zero` makes whole pages read as zeroes and gives their private memory back.
/// - While a [`Cut`] is held, no other access through the space happens: it waits, or gets [`SpaceError::Busy`].
/// - Every failing call leaves the space as it was.
pub trait Backing: Send + Sync + Sized + fmt::Debug + 'static {
    /// Its immutable images.
    type Sealed: Sealed<Live = Self>;
    /// A cut that is not yet committed.
    type Cut<'a>: Cut<Sealed = Self::Sealed>
    where
        Self: 'a;

    /// A new space that reads as `base`, followed by zeroes up to the end of `geometry`.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] where `base` is longer than the space; [`SpaceError::PageSize`] where the backing does not
    /// have this page size; whatever the system refuses.
    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError>;

    /// Page size and length.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `at`.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] past the end, [`SpaceError::Image`] where the base image fails.
    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError>;

    /// Writes `data` at `at`. The first write to a shared page makes a private copy of it.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] past the end; [`SpaceError::HeapLimit`] or [`SpaceError::System`] where there is no room for a private
    /// copy. A write happens whole or not at all.
    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError>;

    /// Makes whole pages read as zeroes, whatever lies below, and frees what they held.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] past the end; [`SpaceError::Busy`].
    fn zero(&self, range: PageRange) -> Result<(), SpaceError>;

    /// Makes everything written so far durable, where the backing can be; a pause calls it before the cut.
    ///
    /// # Errors
    /// Whatever the medium says. Nothing is then claimed durable.
    fn flush(&self) -> Result<(), SpaceError>;

    /// Cuts: the content of this instant becomes an immutable image, once the returned guard is committed. The guest must be
    /// paused. Dropping the guard undoes the cut.
    ///
    /// # Errors
    /// [`SpaceError::Busy`], [`SpaceError::DepthLimit`], [`SpaceError::MappingLimit`], or what the system refuses.
    fn cut(&self) -> Result<Self::Cut<'_>, SpaceError>;

    /// The image that this space was last cut into or spawned from.
    fn origin(&self) -> Self::Sealed;

    /// The pages written or zeroed since [`Backing::origin`], as far as the backing tells them from shared ones: a page written back
    /// to what it was is in it. Costs by what was written (heap) or by the page tables in use (mapped).
    ///
    /// # Errors
    /// [`SpaceError::Busy`], or what the system refuses.
    fn dirty(&self) -> Result<PageSet, SpaceError>;

    /// The pages of [`Backing::dirty`] that lie in `range`. Costs by what was written there, where the backing has an index; otherwise as
    /// [`Backing::dirty`].
    ///
    /// # Errors
    /// As [`Backing::dirty`].
    fn dirty_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        let mut within = PageSet::new();
        self.dirty()?.runs().for_each(|run| within.push(run.intersect(range)));
        Ok(within)
    }

    /// What the pages of `range` are made of, in ascending extents that cover it. A backing that cannot tell says
    /// [`Allocation::Data`]. Costs by what was written there.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] past the end.
    fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        self.geometry().check_pages(range)?;
        let all = Extent { pages: range, state: Allocation::Data };
        Ok(if range.is_empty() { Vec::new() } else { vec![all] })
    }

    /// Drops everything written since [`Backing::origin`], in place; returns how many pages that were. The guest must be paused.
    /// Costs by what was written.
    ///
    /// # Errors
    /// [`SpaceError::Busy`], or what the system refuses.
    fn reset(&self) -> Result<PageCount, SpaceError>;

    /// What it holds.
    ///
    /// # Errors
    /// What the system refuses: the mapped backing asks the kernel.
    fn usage(&self) -> Result<Usage, SpaceError>;

    /// The pages touched since the space was spawned. A backing that does not see reads tells what was written.
    ///
    /// # Errors
    /// As [`Backing::dirty`].
    fn working_set(&self) -> Result<WorkingSet, SpaceError> {
        Ok(WorkingSet::new(PageSet::new(), self.dirty()?))
    }

    /// Takes the page faults of a working set in advance, where the backing has any. Content stays what it is.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] where the set reaches past the end, or what the system refuses; some pages may be mapped then.
    fn prefault(&self, prefault: &Prefault) -> Result<Prefaulted, SpaceError> {
        Ok(Prefaulted { left_out: prefault.set.count(), ..Prefaulted::default() })
    }

    /// Derives every invariant again and compares. For tests: it walks all tables.
    ///
    /// # Errors
    /// What was found wrong.
    fn validate(&self) -> Result<(), String>;
}

/// A cut that can still be undone: dropping it puts the space back as it was. While it is held, nobody reads or writes the space.
#[must_use = "a cut that is dropped is undone"]
pub trait Cut {
    /// The image it makes.
    type Sealed;

    /// Keeps the cut. Cannot fail. What can be torn down later is returned for the caller to drop when nobody waits.
    fn commit(self) -> (Self::Sealed, Deferred);
}

/// Work that a cut put off. Dropping it does the work, on whatever thread drops it.
#[derive(Default)]
pub struct Deferred {
    work: Option<Box<dyn Send>>,
    cost: Cost,
    what: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Cost {
    #[default]
    Cheap,
    Costly,
}

impl Deferred {
    /// Puts off dropping `work` that takes microseconds: a fork does it before it returns.
    pub fn cheap(work: impl Send + 'static) -> Self {
        Self { work: Some(Box::new(work)), cost: Cost::Cheap, what: "" }
    }

    /// Puts off dropping `work` that takes long, such as page tables to tear down: a fork does it on a thread of its own.
    pub fn costly(work: impl Send + 'static) -> Self {
        Self { work: Some(Box::new(work)), cost: Cost::Costly, what: "" }
    }

    /// Says what it is, for the account that [`ForkPoint::teardown`](crate::ForkPoint::teardown) gives.
    #[must_use]
    pub fn named(self, what: &'static str) -> Self {
        Self { what, ..self }
    }

    /// What it is; empty where nobody said.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.work.is_none()
    }

    /// Whether it wants a thread of its own.
    pub fn is_costly(&self) -> bool {
        self.cost == Cost::Costly
    }
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Deferred({:?}, {:?})", self.cost, self.what)
    }
}

/// An immutable image of a space at a cut. Clones of it are one reference; it and what it names live until the last is dropped.
pub trait Sealed: Source + Clone + fmt::Debug {
    /// The live spaces that it spawns.
    type Live: Backing<Sealed = Self>;

    /// Page size and length.
    fn geometry(&self) -> Geometry;

    /// A live space that reads as this image. Costs nothing by size or by siblings; by extents for the mapped backing.
    ///
    /// # Errors
    /// [`SpaceError::MappingLimit`], or what the system refuses.
    fn spawn(&self) -> Result<Self::Live, SpaceError>;

    /// The pages that may hold anything but zeroes: all that [`Source::next_data`] would find one after the other. Costs by their runs.
    ///
    /// # Errors
    /// As [`Source::next_data`].
    fn data(&self) -> Result<PageSet, SpaceError> {
        let size = self.geometry().page_size();
        let (mut pages, mut at) = (PageSet::new(), ByteOffset::ZERO);
        while let Some(data) = self.next_data(at)? {
            let end = PageIndex::new(data.end.get().div_ceil(size.bytes().get()));
            pages.push(PageRange::from_bounds(size.page_of(data.start), end));
            // The rest of a page is not asked for: a base image that tells smaller pieces apart would name the same page again.
            at = size.start_of(end);
        }
        Ok(pages)
    }

    /// Kernel mappings that a live space begins with, for admission to count. None, unless the kernel shares the pages.
    fn clone_mappings(&self) -> u64 {
        0
    }

    /// Pages that [`Backing::prefault`] makes private in a live space over this image, for admission to count. None, unless the backing maps ahead.
    fn prefault_copies(&self, _prefault: &Prefault) -> PageCount {
        PageCount::ZERO
    }

    /// The pages in which the two images may differ: those that either side's ancestors wrote since they parted. Costs by what
    /// changed. Exact up to pages that were written back to what they were, and up to clean pages which a backing
    /// has copied along with written ones.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] unless both come from one [`Backing::create`].
    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError>;

    /// The same content in one layer that shares nothing: a full copy, with pages of zeroes left out.
    ///
    /// # Errors
    /// What the base image or the system says.
    fn flatten(&self) -> Result<Self, SpaceError>;

    /// The same content with all layers above `ancestor` merged into one, directly on `ancestor`.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] unless `ancestor` is an ancestor of this image.
    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError>;

    /// Fork points between this image and its first ancestor, itself included.
    fn depth(&self) -> u32;

    /// Whether both are the very same cut.
    fn same(&self, other: &Self) -> bool;

    /// Derives every invariant again and compares. For tests: it walks all tables.
    ///
    /// # Errors
    /// What was found wrong.
    fn validate(&self) -> Result<(), String>;
}
