//! The block face: sectors over the same core.
//!
//! A [`Disk`] is the concrete handle that a device model holds; under it is any [`Backing`], by default pages on the heap over a
//! read-only image that all clones share. Owns sector arithmetic, discard and write-zeroes rules and the read-only
//! rule. Must not know of guests or forks: a fork cuts it as it cuts RAM.

mod erased;

pub(crate) use erased::{AnySealed, AnySpace};

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::account::Usage;
use crate::backing::{Backing, Extent, Heap, Tree};
use crate::error::SpaceError;
use crate::gate::{Entered, FreezeGate};
use crate::image::Source;
use crate::page::{
    ByteOffset, ByteSize, Geometry, Lba, PageIndex, PageRange, PageSet, PageSize, SECTOR_SIZE, SectorCount,
};

/// What can go wrong with a request to a disk. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Past the last sector.
    #[error("{count} at sector {lba} end past the disk's {capacity}")]
    OutOfRange {
        /// The first sector.
        lba: Lba,
        /// How many.
        count: SectorCount,
        /// How many there are.
        capacity: SectorCount,
    },
    /// A buffer that is not whole sectors.
    #[error("a buffer of {0} is not a multiple of 512 bytes")]
    Misaligned(ByteSize),
    /// A disk of no sectors.
    #[error("a disk must have at least one sector")]
    Empty,
    /// The disk may only be read.
    #[error("this disk is read-only")]
    ReadOnly,
    /// The VM was frozen: its disks never change again.
    #[error("this VM is frozen: write to a clone spawned from its fork point")]
    Frozen,
    /// The space below refused.
    #[error(transparent)]
    Space(#[from] SpaceError),
}

/// Whether a guest may write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reads and writes.
    ReadWrite,
    /// Reads only: every write, discard and write-zeroes is [`DiskError::ReadOnly`].
    ReadOnly,
}

/// One disk of a VM. Shared by its queue threads (`Arc<Disk>`), which all use `&self`.
///
/// ```
/// use offshoot::{Tree, disk::{Access, Disk}, page::{Lba, SectorCount}};
/// let disk = Disk::blank(&Tree::default(), SectorCount::new(1 << 21), Access::ReadWrite)?;
/// disk.write(Lba::new(100), &[7; 1024])?;
/// disk.write_zeroes(Lba::new(101), SectorCount::new(1))?;
/// let mut back = [1; 1024];
/// disk.read(Lba::new(100), &mut back)?;
/// assert_eq!((back[511], back[512]), (7, 0));
/// # Ok::<(), offshoot::disk::DiskError>(())
/// ```
pub struct Disk {
    space: Box<dyn AnySpace>,
    capacity: SectorCount,
    access: Access,
    gate: FreezeGate,
}

impl Disk {
    /// A disk of zeroes, kept on the heap.
    ///
    /// # Errors
    /// [`DiskError::Empty`], [`SpaceError::Geometry`].
    pub fn blank(tree: &Tree, capacity: SectorCount, access: Access) -> Result<Self, DiskError> {
        let space = Heap::<crate::backing::Page4K>::create(tree, geometry(capacity)?, None)?;
        Self::over(space, capacity, access)
    }

    /// A disk whose content is `image`, with the sectors written kept on the heap. The image is shared by every clone; a part of a sector
    /// at its end reads as if filled up with zeroes.
    ///
    /// # Errors
    /// [`DiskError::Empty`], [`SpaceError::Geometry`].
    pub fn over_image(tree: &Tree, image: Arc<dyn Source>, access: Access) -> Result<Self, DiskError> {
        let capacity = SectorCount::new(image.len().get().div_ceil(SECTOR_SIZE));
        let space = Heap::<crate::backing::Page4K>::create(tree, geometry(capacity)?, Some(image))?;
        Self::over(space, capacity, access)
    }

    /// A disk on a backing of your own.
    ///
    /// # Errors
    /// [`DiskError::Empty`]; [`SpaceError::Geometry`] where `space` is shorter than `capacity`.
    pub fn over<B: Backing>(space: B, capacity: SectorCount, access: Access) -> Result<Self, DiskError> {
        let len = geometry(capacity)?.len().get().min(capacity.get().saturating_mul(SECTOR_SIZE));
        space.geometry().check(ByteOffset::ZERO, ByteSize::new(len)).map_err(SpaceError::from)?;
        Ok(Self::from_parts(Box::new(space), capacity, access))
    }

    fn from_parts(space: Box<dyn AnySpace>, capacity: SectorCount, access: Access) -> Self {
        Self { space, capacity, access, gate: FreezeGate::default() }
    }

    /// How many sectors it has.
    pub fn capacity(&self) -> SectorCount {
        self.capacity
    }

    /// Whether it may be written.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The backing under it, where it is a `B`: what only that kind can be asked, such as the name of a durable disk.
    ///
    /// ```
    /// use offshoot::{Tree, backing::Heap, disk::{Access, Disk}, page::SectorCount};
    /// let disk = Disk::blank(&Tree::default(), SectorCount::new(8), Access::ReadWrite)?;
    /// assert!(disk.backing::<Heap>().is_some());
    /// # Ok::<(), offshoot::disk::DiskError>(())
    /// ```
    pub fn backing<B: Backing>(&self) -> Option<&B> {
        let any: &dyn Any = &*self.space;
        any.downcast_ref()
    }

    pub(crate) fn space(&self) -> &dyn AnySpace {
        &*self.space
    }

    pub(crate) fn gate(&self) -> &FreezeGate {
        &self.gate
    }

    fn check(&self, lba: Lba, count: SectorCount) -> Result<(ByteOffset, ByteSize), DiskError> {
        let out_of_range = DiskError::OutOfRange { lba, count, capacity: self.capacity };
        match lba.get().checked_add(count.get()) {
            Some(end) if end <= self.capacity.get() => {}
            _ => return Err(out_of_range),
        }
        lba.byte_offset().zip(count.byte_size()).ok_or(out_of_range)
    }

    fn check_buffer(&self, lba: Lba, len: usize) -> Result<ByteOffset, DiskError> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::Misaligned(ByteSize::new(len)));
        }
        Ok(self.check(lba, SectorCount::new(len / SECTOR_SIZE))?.0)
    }

    /// Held for as long as a write takes: a freeze waits for it.
    fn enter(&self) -> Result<Entered<'_>, DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.gate.enter().ok_or(DiskError::Frozen)
    }

    /// Fills `buf`, a whole number of sectors, from `lba`.
    ///
    /// # Errors
    /// [`DiskError::Misaligned`], [`DiskError::OutOfRange`], [`DiskError::Space`] where the image fails.
    pub fn read(&self, lba: Lba, buf: &mut [u8]) -> Result<(), DiskError> {
        let at = self.check_buffer(lba, buf.len())?;
        Ok(self.space.read(at, buf)?)
    }

    /// Writes `data`, a whole number of sectors, at `lba`.
    ///
    /// # Errors
    /// As [`Disk::read`], and [`DiskError::ReadOnly`], [`DiskError::Frozen`], [`SpaceError::HeapLimit`].
    pub fn write(&self, lba: Lba, data: &[u8]) -> Result<(), DiskError> {
        let _open = self.enter()?;
        let at = self.check_buffer(lba, data.len())?;
        Ok(self.space.write(at, data)?)
    }

    /// Makes everything written so far durable, where the backing can be. Overlays on the heap have no medium: nothing to do.
    ///
    /// # Errors
    /// What the medium says; nothing is then claimed durable.
    pub fn flush(&self) -> Result<(), DiskError> {
        Ok(self.space.flush()?)
    }

    /// Tells that sectors are not needed: whole pages among them read as zeroes and give their memory back, the rest is left as
    /// it is.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&self, lba: Lba, count: SectorCount) -> Result<(), DiskError> {
        let _open = self.enter()?;
        let (at, len) = self.check(lba, count)?;
        let pages = self.whole_pages(at, len);
        if pages.is_empty() { Ok(()) } else { Ok(self.space.zero(pages)?) }
    }

    /// Makes sectors read as zeroes; whole pages among them give their memory back.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, lba: Lba, count: SectorCount) -> Result<(), DiskError> {
        let _open = self.enter()?;
        let (at, len) = self.check(lba, count)?;
        let (start, end) = (at.get(), at.get() + len.get());
        let pages = self.whole_pages(at, len);
        let size = self.space.geometry().page_size();
        if pages.is_empty() {
            return self.fill_zero(start, end);
        }
        // The edges first: they can fail for want of memory. An edge that was zeroed is private by then, so putting it
        // back cannot fail.
        let edges = [(start, size.start_of(pages.start()).get()), (size.start_of(pages.end()).get().min(end), end)];
        let mut saved = Vec::with_capacity(edges.len());
        for (from, to) in edges {
            let mut bytes = vec![0; (to - from) as usize];
            self.space.read(ByteOffset::new(from), &mut bytes)?;
            saved.push((ByteOffset::new(from), bytes));
        }
        let mut zeroed = 0;
        let edges = edges.into_iter().try_for_each(|(from, to)| {
            self.fill_zero(from, to)?;
            zeroed += 1;
            Ok(())
        });
        if let Err(error) = edges.and_then(|()| Ok(self.space.zero(pages)?)) {
            for (at, bytes) in &saved[..zeroed] {
                self.space.write(*at, bytes)?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// The edges of a range: less than two pages, in one write, which happens whole or not at all.
    fn fill_zero(&self, start: u64, end: u64) -> Result<(), DiskError> {
        let zeroes = vec![0; end.saturating_sub(start) as usize];
        Ok(self.space.write(ByteOffset::new(start), &zeroes)?)
    }

    /// The pages that lie in the range whole; the last page of a disk that ends within it counts as whole.
    fn whole_pages(&self, at: ByteOffset, len: ByteSize) -> PageRange {
        let size = self.space.geometry().page_size().bytes().get();
        let end = at.get() + len.get();
        let last = if end == self.capacity.get() * SECTOR_SIZE { end.div_ceil(size) } else { end / size };
        PageRange::from_bounds(PageIndex::new(at.get().div_ceil(size)), PageIndex::new(last))
    }

    /// What it holds.
    ///
    /// # Errors
    /// As [`Backing::usage`].
    pub fn usage(&self) -> Result<Usage, SpaceError> {
        self.space.usage()
    }

    /// The pages written since the last fork point, for incremental backup.
    ///
    /// # Errors
    /// As [`Backing::dirty`].
    pub fn dirty(&self) -> Result<PageSet, SpaceError> {
        self.space.dirty()
    }

    /// The same, of some pages only.
    ///
    /// # Errors
    /// As [`Backing::dirty`].
    pub fn dirty_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        self.space.dirty_in(range)
    }

    /// What pages are made of, in ascending extents.
    ///
    /// # Errors
    /// As [`Backing::allocation`].
    pub fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        self.space.allocation(range)
    }

    /// The unit of [`Disk::dirty`] and [`Disk::allocation`].
    pub fn page_size(&self) -> PageSize {
        self.space.geometry().page_size()
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("capacity", &self.capacity)
            .field("access", &self.access)
            .field("space", &self.space)
            .finish_non_exhaustive()
    }
}

/// The space for a disk of this many sectors: whole pages of 4 KiB.
fn geometry(capacity: SectorCount) -> Result<Geometry, DiskError> {
    if capacity == SectorCount::ZERO {
        return Err(DiskError::Empty);
    }
    let page = PageSize::KIB_4;
    let bytes = capacity.get().saturating_mul(SECTOR_SIZE);
    let len = ByteSize::new(bytes.checked_next_multiple_of(page.bytes().get()).unwrap_or(u64::MAX));
    Ok(Geometry::new(len, page).map_err(SpaceError::from)?)
}

/// An immutable disk at a cut.
#[derive(Clone)]
pub struct DiskImage {
    image: Arc<dyn AnySealed>,
    capacity: SectorCount,
    access: Access,
}

impl DiskImage {
    pub(crate) fn new(image: Arc<dyn AnySealed>, of: &Disk) -> Self {
        Self { image, capacity: of.capacity, access: of.access }
    }

    #[cfg(all(feature = "store", unix))]
    pub(crate) fn from_image(image: Arc<dyn AnySealed>, capacity: SectorCount, access: Access) -> Self {
        Self { image, capacity, access }
    }

    pub(crate) fn with_image(&self, image: Arc<dyn AnySealed>) -> Self {
        Self { image, ..*self }
    }

    pub(crate) fn image(&self) -> &dyn AnySealed {
        &*self.image
    }

    #[cfg(all(feature = "imago", unix))]
    pub(crate) fn shared(&self) -> Arc<dyn AnySealed> {
        self.image.clone()
    }

    /// How many sectors it has.
    pub fn capacity(&self) -> SectorCount {
        self.capacity
    }

    /// Whether a guest may write it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// A live disk that reads as this image.
    ///
    /// # Errors
    /// As [`Sealed::spawn`](crate::backing::Sealed::spawn).
    pub fn spawn(&self) -> Result<Disk, SpaceError> {
        Ok(Disk::from_parts(self.image.spawn()?, self.capacity, self.access))
    }

    /// Fills `buf`, a whole number of sectors, from `lba`.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn read(&self, lba: Lba, buf: &mut [u8]) -> Result<(), DiskError> {
        let live = Disk::from_parts(self.image.spawn()?, self.capacity, Access::ReadOnly);
        live.read(lba, buf)
    }
}

impl fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskImage").field("capacity", &self.capacity).field("image", &self.image).finish()
    }
}
