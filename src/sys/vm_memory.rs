//! The `unsafe` that vm-memory needs: regions made of addresses that are already mapped.
//!
//! Owns the promise that such a region never outlives its mapping: [`KeepAlive`] ties the two together by riding in the
//! one part of a region that its maker chooses, the bitmap. It knows address ranges and vm-memory's types; which range is
//! whose RAM is the front end's business.
//!
//! Sound because: a [`LeasedRange`] holds its addresses mapped, readable and writable; a region's bitmap cannot be moved
//! out or exchanged and is dropped with the region; everything that vm-memory hands out borrows from the region; and
//! vm-memory touches memory through raw pointers and atomics only, so content that changes under it (a guest, a fork, a
//! reset) is a race of bytes and no more.
#![allow(unsafe_code)] // vm-memory takes a raw pointer on its caller's word that it stays mapped.

use std::fmt;
use std::ops::Deref;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::{BS, Bitmap, NewBitmap, WithBitmapSlice};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion};

use super::mapping::LeasedRange;
use crate::page::{ByteSize, GuestAddress};

/// A VM's RAM as vm-memory knows it, which keeps its addresses mapped by itself.
pub type KeptMemory<B = ()> = GuestMemoryMmap<KeepAlive<B>>;

/// A bitmap `B` (`()`, `AtomicBitmap`, your own) that also keeps the memory of its region mapped.
///
/// It dereferences to `B`, and its slices are those of `B`: `VolatileSlice`s have the same type as without it. One made by
/// `Default` or `NewBitmap` keeps nothing, for regions that own their memory: a VMM may add such to a [`KeptMemory`]
/// (`insert_region`), as for memory that is plugged in.
#[derive(Debug, Default)]
pub struct KeepAlive<B = ()> {
    bitmap: B,
    // Never taken out: a region that lies on it may live as long as this.
    _memory: Option<LeasedRange>,
}

impl<B> Deref for KeepAlive<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.bitmap
    }
}

impl<'a, B: WithBitmapSlice<'a>> WithBitmapSlice<'a> for KeepAlive<B> {
    type S = B::S;
}

impl<B: Bitmap> Bitmap for KeepAlive<B> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> BS<'_, B> {
        self.bitmap.slice_at(offset)
    }
}

impl<B: NewBitmap> NewBitmap for KeepAlive<B> {
    fn with_len(len: usize) -> Self {
        Self { bitmap: B::with_len(len), _memory: None }
    }
}

/// Why vm-memory did not take a VM's RAM. Nothing stays mapped for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmMemoryError {
    /// A region was refused.
    #[error("vm-memory refused the region at guest address {at:?}: {error}")]
    Region {
        /// Its first guest address.
        at: GuestAddress,
        /// What vm-memory said.
        #[source]
        error: MmapRegionError,
    },
    /// A region ends past the last address that vm-memory has.
    #[error("the region of {len} at guest address {at:?} ends past vm-memory's last address")]
    Overflow {
        /// Its first guest address.
        at: GuestAddress,
        /// Its length.
        len: ByteSize,
    },
    /// The regions were refused as a whole.
    #[error("vm-memory refused the regions: {0}")]
    Collection(#[from] GuestRegionCollectionError),
}

/// The addresses of a VM's RAM, kept mapped while this lives, whatever becomes of the VM: made by
/// [`lease`](crate::frontend::vm_memory::lease), to be turned into vm-memory's types.
pub struct RamLease {
    ranges: Box<[(GuestAddress, LeasedRange)]>,
}

impl RamLease {
    /// Of ranges in ascending order of guest address.
    pub(crate) fn new(ranges: Box<[(GuestAddress, LeasedRange)]>) -> Self {
        Self { ranges }
    }

    /// The RAM without dirty tracking. See [`guest_memory_with`](Self::guest_memory_with).
    ///
    /// # Errors
    /// [`VmMemoryError`].
    pub fn guest_memory(self) -> Result<KeptMemory, VmMemoryError> {
        self.guest_memory_with(|_| ())
    }

    /// The RAM, with a bitmap for each region: `bitmap` gets the length of the region. Two allocations a region, no
    /// system call that maps anything.
    ///
    /// Every region keeps the addresses of *all* RAM of this VM mapped until the last clone of the result, and of each
    /// region taken out of it, is gone.
    ///
    /// # Errors
    /// [`VmMemoryError`].
    ///
    /// ```
    /// use offshoot::{Tree, backing::Mapped, frontend::vm_memory::{KeptMemory, lease}, page::*, ram::*};
    /// use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, bitmap::{Bitmap, WithBitmapSlice}};
    ///
    /// /// Tells only whether anything was written. `vm_memory::bitmap::AtomicBitmap` tells which pages.
    /// struct Touched(&'static AtomicBool);
    /// # impl WithBitmapSlice<'_> for Touched { type S = Slice; }
    /// # #[derive(Clone, Debug)] struct Slice(&'static AtomicBool);
    /// # impl WithBitmapSlice<'_> for Slice { type S = Slice; }
    /// # impl vm_memory::bitmap::BitmapSlice for Slice {}
    /// # impl Bitmap for Slice {
    /// #     fn mark_dirty(&self, _: usize, _: usize) { self.0.store(true, Relaxed) }
    /// #     fn dirty_at(&self, _: usize) -> bool { self.0.load(Relaxed) }
    /// #     fn slice_at(&self, _: usize) -> Slice { self.clone() }
    /// # }
    /// impl Bitmap for Touched {
    ///     fn mark_dirty(&self, _: usize, _: usize) { self.0.store(true, Relaxed) }
    ///     // ...
    /// #   fn dirty_at(&self, _: usize) -> bool { self.0.load(Relaxed) }
    /// #   fn slice_at(&self, _: usize) -> Slice { Slice(self.0) }
    /// }
    ///
    /// static TOUCHED: AtomicBool = AtomicBool::new(false);
    /// let ram: Ram<Mapped> = Ram::create(&Tree::default(), RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?)?;
    /// let memory: KeptMemory<Touched> = lease(&ram)?.guest_memory_with(|_| Touched(&TOUCHED))?;
    /// assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000))?, 0);
    /// assert!(!TOUCHED.load(Relaxed));
    /// memory.write_obj(7u64, GuestAddress(0x1000))?;
    /// assert!(TOUCHED.load(Relaxed));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn guest_memory_with<B: Bitmap>(
        self,
        mut bitmap: impl FnMut(ByteSize) -> B,
    ) -> Result<KeptMemory<B>, VmMemoryError> {
        collect(self.ranges.into_iter().map(|(at, kept)| (at, kept_region(kept, &mut bitmap))))
    }

    /// The RAM as `GuestMemoryMmap<B>`, for a VMM that names that type and is not generic over the bitmap. The addresses
    /// are never given back: they stay mapped until the process exits, and with them whatever the VM wrote.
    ///
    /// Right for a process that holds one VM to its end (Firecracker with `B` = `Option<AtomicBitmap>`, Cloud
    /// Hypervisor with `AtomicBitmap`). One that makes and drops clones uses
    /// [`guest_memory_with`](Self::guest_memory_with), or [`unowned`](Self::unowned).
    ///
    /// # Errors
    /// [`VmMemoryError`]; nothing stays mapped then.
    ///
    /// ```
    /// # use offshoot::{Tree, backing::Mapped, frontend::vm_memory::lease, page::*, ram::*};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// # let ram: Ram<Mapped> = Ram::create(&Tree::default(), RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?)?;
    /// let memory: GuestMemoryMmap = lease(&ram)?.leak(|_| ())?;
    /// drop(ram);
    /// memory.write_obj(7u64, GuestAddress(0x1000))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn leak<B: Bitmap>(self, bitmap: impl FnMut(ByteSize) -> B) -> Result<GuestMemoryMmap<B>, VmMemoryError> {
        // SAFETY: the lease is never dropped if this succeeds; if it fails or panics, all regions are gone before it.
        let memory = unsafe { self.unowned(bitmap) }?;
        std::mem::forget(self);
        Ok(memory)
    }

    /// As [`leak`](Self::leak), with the addresses given back when this lease is dropped.
    ///
    /// # Safety
    /// The caller keeps this lease until the result, every clone of it and every region, slice and pointer taken from
    /// any of them is gone. vm-memory shares regions by reference counts, so devices that were handed the memory must be
    /// gone too. The VM may go before.
    ///
    /// # Errors
    /// [`VmMemoryError`].
    pub unsafe fn unowned<B: Bitmap>(
        &self,
        mut bitmap: impl FnMut(ByteSize) -> B,
    ) -> Result<GuestMemoryMmap<B>, VmMemoryError> {
        collect(self.ranges.iter().map(|(at, kept)| {
            let (base, len) = (kept.kept().base(), kept.kept().len());
            let builder = builder(len, bitmap(len));
            // SAFETY: the range is mapped for as long as the lease lives; the caller vouches for the rest.
            (*at, unsafe { builder.with_raw_mmap_pointer(base.as_ptr()) }.build())
        }))
    }
}

impl fmt::Debug for RamLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.ranges.iter().map(|(at, kept)| (at, kept.kept().len()))).finish()
    }
}

/// A region that keeps its own memory mapped.
fn kept_region<B: Bitmap>(
    kept: LeasedRange,
    bitmap: impl FnOnce(ByteSize) -> B,
) -> Result<MmapRegion<KeepAlive<B>>, MmapRegionError> {
    let (base, len) = (kept.kept().base(), kept.kept().len());
    let builder = builder(len, KeepAlive { bitmap: bitmap(len), _memory: Some(kept) });
    // SAFETY: `kept` is these very addresses. It moved into the bitmap, which lives as long as the region does.
    unsafe { builder.with_raw_mmap_pointer(base.as_ptr()) }.build()
}

fn builder<B: Bitmap>(len: ByteSize, bitmap: B) -> MmapRegionBuilder<B> {
    // vm-memory only reports these. The view of a VM that was never forked is shared, but with nobody, and every later one private.
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    MmapRegionBuilder::new_with_bitmap(len.get() as usize, bitmap)
        .with_mmap_prot(prot.bits() as i32)
        .with_mmap_flags(flags.bits() as i32)
        .with_hugetlbfs(false)
}

fn collect<B: Bitmap>(
    regions: impl Iterator<Item = (GuestAddress, Result<MmapRegion<B>, MmapRegionError>)>,
) -> Result<GuestMemoryMmap<B>, VmMemoryError> {
    let regions = regions.map(|(at, region)| {
        let region = region.map_err(|error| VmMemoryError::Region { at, error })?;
        let len = ByteSize::new(region.size() as u64);
        GuestRegionMmap::new(region, vm_memory::GuestAddress(at.get())).ok_or(VmMemoryError::Overflow { at, len })
    });
    Ok(GuestMemoryMmap::from_regions(regions.collect::<Result<_, _>>()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::ByteOffset;
    use crate::sys::mapping::Mapping;
    use crate::sys::memfd::Memfd;
    use crate::sys::reservation::live;
    use vm_memory::{Bytes, GuestMemoryBackend};

    const LEN: ByteSize = ByteSize::kib(16);
    const HIGH: vm_memory::GuestAddress = vm_memory::GuestAddress(1 << 32);

    /// Two regions of two pages, the second above a hole.
    fn lease(mapping: &Mapping) -> RamLease {
        let half = ByteSize::kib(8);
        let range = |at, from| (GuestAddress::new(at), mapping.lease(ByteOffset::new(from), half).unwrap());
        RamLease::new([range(0, 0), range(1 << 32, 8192)].into())
    }

    fn mapping() -> Mapping {
        Mapping::map_shared(&Memfd::create("offshoot-test", LEN).unwrap(), LEN).unwrap()
    }

    #[test]
    fn the_last_region_lets_go_of_the_addresses() {
        let before = live::count();
        let mapping = mapping();
        mapping.store(ByteOffset::new(8192), 5_u64).unwrap();
        let memory = lease(&mapping).guest_memory().unwrap();
        drop(mapping);
        let (low, _) = memory.remove_region(HIGH, 8192).unwrap();
        let copy = memory.clone();
        drop(memory);
        assert_eq!(copy.read_obj::<u64>(HIGH).unwrap(), 5);
        drop(copy);
        assert_eq!(live::count(), before + 1, "one region is left");
        let mapping = low.iter().next().unwrap().get_mmap();
        drop(low);
        assert_eq!(live::count(), before + 1, "and what it was made of");
        drop(mapping);
        assert_eq!(live::count(), before);
    }

    #[test]
    fn unowned_regions_leave_it_to_the_lease() {
        let before = live::count();
        let mapping = mapping();
        let lease = lease(&mapping);
        drop(mapping);
        // SAFETY: dropped before the lease, and nothing was taken from it.
        let memory: GuestMemoryMmap<Option<()>> = unsafe { lease.unowned(|_| Some(())) }.unwrap();
        memory.write_obj(9_u32, HIGH).unwrap();
        assert_eq!(memory.read_obj::<u32>(HIGH).unwrap(), 9);
        drop(memory);
        assert_eq!(live::count(), before + 1);
        drop(lease);
        assert_eq!(live::count(), before);
    }

    #[test]
    fn a_refused_leak_leaks_nothing() {
        let before = live::count();
        let mapping = mapping();
        let keep = || mapping.lease(ByteOffset::ZERO, LEN).unwrap();
        let at = |at| GuestAddress::new(at);
        let overlap = RamLease::new([(at(0), keep()), (at(4096), keep())].into());
        let refused = overlap.leak(|_| ());
        assert!(matches!(refused, Err(VmMemoryError::Collection(GuestRegionCollectionError::MemoryRegionOverlap))));
        let wraps = RamLease::new([(at(u64::MAX - 4095), keep())].into());
        assert!(matches!(wraps.leak(|_| ()), Err(VmMemoryError::Overflow { len: LEN, .. })));
        let askew = mapping.lease(ByteOffset::new(8), ByteSize::kib(4)).unwrap();
        let askew = RamLease::new([(at(0), askew)].into()).guest_memory();
        assert!(matches!(askew, Err(VmMemoryError::Region { error: MmapRegionError::InvalidPointer, .. })));
        drop(mapping);
        assert_eq!(live::count(), before);
    }

    #[test]
    fn a_leaked_range_stays() {
        let before = live::count();
        let mapping = mapping();
        let memory = lease(&mapping).leak(|_| ()).unwrap();
        drop(mapping);
        memory.write_obj(1_u8, HIGH).unwrap();
        drop(memory);
        assert_eq!(live::count(), before + 1);
    }
}
