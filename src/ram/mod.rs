//! The memory face: guest-physical addresses over one space.
//!
//! Owns the translation from guest-physical addresses to offsets in the space, with holes between regions refused, and
//! the typed access that simulators use. Must not know how the space keeps its pages, nor anything of forks.

mod layout;
mod view;

pub use layout::{LayoutError, RamLayout, RamRegion};
pub use view::RamView;

use std::fmt;

use crate::account::Usage;
use crate::backing::{Backing, Word};
use crate::error::SpaceError;
use crate::gate::FreezeGate;
use crate::page::{ByteOffset, ByteSize, Gfn, GuestAddress, PageCount, PageRange};

/// What can go wrong with an access to guest memory. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Part of the access lies in no region.
    #[error("{len} at guest address {at:?} are not all RAM: they touch a hole or the end")]
    Hole {
        /// Where the access starts.
        at: GuestAddress,
        /// How long it is.
        len: ByteSize,
    },
    /// The VM was frozen: its memory never changes again.
    #[error("this VM is frozen: write to a clone spawned from its fork point")]
    Frozen,
    /// The space below refused.
    #[error(transparent)]
    Space(#[from] SpaceError),
}

/// A VM's RAM. Shared by its vCPU and device threads (`Arc<Ram>`), which all use `&self`.
///
/// ```
/// use offshoot::{Tree, backing::Heap, page::*, ram::*};
/// let layout = RamLayout::new(&[
///     RamRegion { start: GuestAddress::new(0), len: ByteSize::mib(1) },
///     RamRegion { start: GuestAddress::new(4 << 30), len: ByteSize::mib(1) }, // above a PCI gap
/// ], PageSize::KIB_4)?;
/// let ram: Ram<Heap> = Ram::create(&Tree::default(), layout)?;
/// ram.store(GuestAddress::new(4 << 30), 7u64)?;
/// assert_eq!(ram.load::<u64>(GuestAddress::new(4 << 30))?, 7);
/// assert!(matches!(ram.load::<u8>(GuestAddress::new(2 << 30)), Err(RamError::Hole { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Ram<B: Backing> {
    layout: RamLayout,
    space: B,
    gate: FreezeGate,
}

impl<B: Backing> Ram<B> {
    /// New RAM, all zeroes.
    ///
    /// # Errors
    /// As [`Backing::create`].
    pub fn create(tree: &crate::Tree, layout: RamLayout) -> Result<Self, SpaceError> {
        let space = B::create(tree, layout.geometry(), None)?;
        Ok(Self::over(layout, space))
    }

    pub(crate) fn over(layout: RamLayout, space: B) -> Self {
        Self { layout, space, gate: FreezeGate::default() }
    }

    /// Which guest addresses are RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The space that holds the pages. Only with feature `testing`: cutting or resetting it behind the VM's back leaves RAM at another
    /// instant than the disks.
    #[cfg(feature = "testing")]
    pub fn space(&self) -> &B {
        &self.space
    }

    #[cfg(not(feature = "testing"))]
    pub(crate) fn space(&self) -> &B {
        &self.space
    }

    pub(crate) fn gate(&self) -> &FreezeGate {
        &self.gate
    }

    /// Fills `buf` from guest memory.
    ///
    /// # Errors
    /// [`RamError::Hole`], [`RamError::Space`].
    pub fn read(&self, at: GuestAddress, buf: &mut [u8]) -> Result<(), RamError> {
        let offset = self.layout.locate(at, ByteSize::new(buf.len() as u64))?;
        Ok(self.space.read(offset, buf)?)
    }

    /// Writes `data` to guest memory.
    ///
    /// # Errors
    /// [`RamError::Hole`], [`RamError::Frozen`], [`RamError::Space`].
    pub fn write(&self, at: GuestAddress, data: &[u8]) -> Result<(), RamError> {
        let _open = self.gate.enter().ok_or(RamError::Frozen)?;
        let offset = self.layout.locate(at, ByteSize::new(data.len() as u64))?;
        Ok(self.space.write(offset, data)?)
    }

    /// Loads one word. For many of them on the heap backing, take a [`Ram::view`].
    ///
    /// # Errors
    /// As [`Ram::read`].
    pub fn load<T: Word>(&self, at: GuestAddress) -> Result<T, RamError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes[..T::SIZE])?;
        Ok(T::join(bytes))
    }

    /// Stores one word.
    ///
    /// # Errors
    /// As [`Ram::write`].
    pub fn store<T: Word>(&self, at: GuestAddress, value: T) -> Result<(), RamError> {
        self.write(at, &value.bytes()[..T::SIZE])
    }

    /// Gives whole frames back, as a balloon does: they read as zeroes and take no memory. Frames are of this VM's page size: a
    /// balloon that counts in 4 KiB frames over larger pages converts first.
    ///
    /// # Errors
    /// As [`Ram::write`], and [`SpaceError::Busy`] while views are held.
    pub fn discard(&self, first: Gfn, count: PageCount) -> Result<(), RamError> {
        let _open = self.gate.enter().ok_or(RamError::Frozen)?;
        let size = self.layout.geometry().page_size();
        let len = size.size_of(count);
        let at = GuestAddress::new(first.get().saturating_mul(size.bytes().get()));
        let start = size.page_of(self.layout.locate(at, len)?);
        let range = PageRange::new(start, count).ok_or(RamError::Hole { at, len })?;
        Ok(self.space.zero(range)?)
    }

    /// The position in the space of a guest address.
    ///
    /// # Errors
    /// [`RamError::Hole`] unless all `len` bytes are RAM.
    pub fn locate(&self, at: GuestAddress, len: ByteSize) -> Result<ByteOffset, RamError> {
        self.layout.locate(at, len)
    }

    /// What it holds.
    ///
    /// # Errors
    /// As [`Backing::usage`].
    pub fn usage(&self) -> Result<Usage, SpaceError> {
        self.space.usage()
    }
}

impl<B: Backing> fmt::Debug for Ram<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("layout", &self.layout).field("space", &self.space).finish_non_exhaustive()
    }
}
