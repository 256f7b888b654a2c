//! Which guest-physical addresses are RAM, and where each lies in the space.
//!
//! Regions are laid one after another in the space, in ascending order of address; what lies between them is a hole.
//! Pure arithmetic on numbers that a guest or a configuration names: everything is checked here, once.

use std::sync::Arc;

use super::RamError;
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, GuestAddress, PageSize};

/// One run of guest-physical addresses that are RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamRegion {
    /// Its first address; a multiple of the page size.
    pub start: GuestAddress,
    /// Its length; a multiple of the page size, not zero.
    pub len: ByteSize,
}

/// Why regions cannot be laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No region at all, or more than the limit.
    #[error("{count} regions: from 1 to {limit} are allowed")]
    Count {
        /// How many were given.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// A region of no bytes.
    #[error("the region at {:?} is empty", .0.start)]
    Empty(RamRegion),
    /// A start or length that is not a multiple of the page size.
    #[error("the region at {:?} of {} is not aligned to pages of {page}", .region.start, .region.len)]
    Misaligned {
        /// The region.
        region: RamRegion,
        /// The page size.
        page: ByteSize,
    },
    /// A region that ends past the last address.
    #[error("the region at {:?} of {} ends past the last guest address", .0.start, .0.len)]
    Overflow(RamRegion),
    /// Two regions that share an address.
    #[error("the regions at {:?} and {:?} overlap", .0.start, .1.start)]
    Overlap(RamRegion, RamRegion),
    /// All together longer than a space may be.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

/// The regions of a VM's RAM. Cloning it costs two reference counts: every clone of a VM has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RamLayout {
    regions: Arc<[Placed]>,
    /// Regions that touch, joined: an access may run across them. Never empty.
    spans: Arc<[Placed]>,
    geometry: Geometry,
}

/// A run of addresses and where it lies in the space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placed {
    region: RamRegion,
    offset: ByteOffset,
}

impl Placed {
    /// The offset of `len` bytes at `at`, if all of them lie in this run.
    #[inline]
    pub(super) fn locate(&self, at: GuestAddress, len: ByteSize) -> Option<ByteOffset> {
        // An address below the start wraps, to past the region's end because no region's end overflows.
        let into = at.get().wrapping_sub(self.region.start.get());
        let room = self.region.len.get().checked_sub(len.get())?;
        (into <= room).then(|| ByteOffset::new(self.offset.get() + into))
    }
}

impl RamLayout {
    /// The most regions: as many memory slots as KVM promises on x86-64.
    pub const MAX_REGIONS: u64 = 509;

    /// Checks regions, given in any order.
    ///
    /// # Errors
    /// [`LayoutError`], which names the regions at fault.
    ///
    /// ```
    /// use offshoot::page::{ByteSize, GuestAddress, PageSize};
    /// use offshoot::ram::{LayoutError, RamLayout, RamRegion};
    /// let region = |start, len| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) };
    /// assert!(RamLayout::new(&[region(0, 8192), region(1 << 32, 4096)], PageSize::KIB_4).is_ok());
    /// let overlap = RamLayout::new(&[region(4096, 8192), region(8192, 4096)], PageSize::KIB_4);
    /// assert!(matches!(overlap, Err(LayoutError::Overlap(..))));
    /// ```
    pub fn new(regions: &[RamRegion], page_size: PageSize) -> Result<Self, LayoutError> {
        let count = regions.len() as u64;
        if count == 0 || count > Self::MAX_REGIONS {
            return Err(LayoutError::Count { count, limit: Self::MAX_REGIONS });
        }
        let page = page_size.bytes();
        for &region in regions {
            if region.len == ByteSize::ZERO {
                return Err(LayoutError::Empty(region));
            }
            if !region.start.get().is_multiple_of(page.get()) || !region.len.get().is_multiple_of(page.get()) {
                return Err(LayoutError::Misaligned { region, page });
            }
            if region.start.checked_add(region.len).is_none() {
                return Err(LayoutError::Overflow(region));
            }
        }
        let mut sorted = regions.to_vec();
        sorted.sort_by_key(|region| region.start);
        if let Some(pair) = sorted.windows(2).find(|pair| end(pair[0]) > pair[1].start.get()) {
            return Err(LayoutError::Overlap(pair[0], pair[1]));
        }
        let mut placed: Vec<Placed> = Vec::with_capacity(sorted.len());
        let mut spans: Vec<Placed> = Vec::new();
        let mut total = ByteSize::ZERO;
        for region in sorted {
            let here = Placed { region, offset: ByteOffset::new(total.get()) };
            total = total.checked_add(region.len).ok_or(LayoutError::Overflow(region))?;
            placed.push(here);
            match spans.last_mut() {
                Some(last) if end(last.region) == region.start.get() => {
                    last.region.len = ByteSize::new(last.region.len.get() + region.len.get());
                }
                _ => spans.push(here),
            }
        }
        let geometry = Geometry::new(total, page_size)?;
        Ok(Self { regions: placed.into(), spans: spans.into(), geometry })
    }

    /// One region from address 0.
    ///
    /// # Errors
    /// As [`RamLayout::new`].
    pub fn flat(len: ByteSize, page_size: PageSize) -> Result<Self, LayoutError> {
        Self::new(&[RamRegion { start: GuestAddress::ZERO, len }], page_size)
    }

    /// The shape of the space that holds all regions.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The regions in ascending order, each with its offset in the space.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = (RamRegion, ByteOffset)> + '_ {
        self.regions.iter().map(|placed| (placed.region, placed.offset))
    }

    /// The offset in the space of `len` bytes at `at`. One comparison for flat RAM, a binary search otherwise.
    ///
    /// # Errors
    /// [`RamError::Hole`] unless all of them are RAM. An empty access must still start at an address of RAM, or at the end of a region.
    #[inline]
    pub fn locate(&self, at: GuestAddress, len: ByteSize) -> Result<ByteOffset, RamError> {
        let hole = RamError::Hole { at, len };
        let after = match &*self.spans {
            [only] if at >= only.region.start => 1,
            spans => spans.partition_point(|span| span.region.start <= at),
        };
        let Some(span) = after.checked_sub(1).map(|i| &self.spans[i]) else { return Err(hole) };
        span.locate(at, len).ok_or(hole)
    }

    /// The longest run of addresses without a hole.
    pub(super) fn longest_span(&self) -> Placed {
        let longest = |a: Placed, b: &Placed| if b.region.len > a.region.len { *b } else { a };
        self.spans.iter().fold(self.spans[0], longest)
    }

    /// The guest address of an offset in the space; `None` past the end. O(log regions).
    pub fn address_of(&self, offset: ByteOffset) -> Option<GuestAddress> {
        let after = self.regions.partition_point(|placed| placed.offset <= offset);
        let placed = &self.regions[after.checked_sub(1)?];
        let into = offset.get() - placed.offset.get();
        (into < placed.region.len.get()).then(|| GuestAddress::new(placed.region.start.get() + into))
    }
}

/// Checked to be representable when the region was.
fn end(region: RamRegion) -> u64 {
    region.start.get() + region.len.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, len: u64) -> RamRegion {
        RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) }
    }

    fn layout(regions: &[RamRegion]) -> Result<RamLayout, LayoutError> {
        RamLayout::new(regions, PageSize::KIB_4)
    }

    #[test]
    fn hostile_regions_are_refused_by_name() {
        assert!(matches!(layout(&[]), Err(LayoutError::Count { count: 0, .. })));
        assert!(matches!(layout(&vec![region(0, 4096); 510]), Err(LayoutError::Count { count: 510, .. })));
        assert!(matches!(layout(&[region(0, 0)]), Err(LayoutError::Empty(_))));
        assert!(matches!(layout(&[region(1, 4096)]), Err(LayoutError::Misaligned { .. })));
        assert!(matches!(layout(&[region(0, 4097)]), Err(LayoutError::Misaligned { .. })));
        assert!(matches!(layout(&[region(u64::MAX - 4095, 4096)]), Err(LayoutError::Overflow(_))));
        assert!(matches!(layout(&[region(0, 8192), region(4096, 4096)]), Err(LayoutError::Overlap(..))));
        assert!(matches!(layout(&[region(0, 1 << 63), region(1 << 63, 1 << 62)]), Err(LayoutError::Geometry(_))));
    }

    #[test]
    fn accesses_stay_inside_regions() {
        let ram = layout(&[region(0x10000, 0x2000), region(0x4000, 0x1000), region(0x12000, 0x1000)]).unwrap();
        let at = |a, n| ram.locate(GuestAddress::new(a), ByteSize::new(n)).ok().map(ByteOffset::get);
        assert_eq!(at(0x4000, 0x1000), Some(0));
        assert_eq!(at(0x4fff, 2), None, "into the hole");
        assert_eq!(at(0x3fff, 1), None, "before the first");
        assert_eq!(at(0x11fff, 2), Some(0x2fff), "across two regions that touch");
        assert_eq!(at(0x12fff, 2), None, "past the last");
        assert_eq!(at(u64::MAX, u64::MAX), None);
        assert_eq!(ram.address_of(ByteOffset::new(0x1000)), Some(GuestAddress::new(0x10000)));
        assert_eq!(ram.address_of(ByteOffset::new(0x4000)), None);
    }
}
