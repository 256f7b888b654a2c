//! Cutting mapped RAM so that it goes on at other addresses: in a hole over which a hypervisor has its memory slots already.
//!
//! ```text
//!   address   A (the guest's until now)       H (a hole: nothing mapped)
//!   before    the old view, page tables       nothing
//!   the cut   the old view, untouched         private view of the image           mmap(MAP_FIXED_NOREPLACE)
//!   commit    left to a thread of its own     the guest's from now on
//!   undone    the guest's again               nothing
//! ```
//!
//! Nothing is moved and nothing is unmapped while the guest stands still, so no MMU notifier runs: the price does not know how
//! much of the old view is resident, nor whether KVM has slots over it. Until the commit the old view is exactly what it was, and undoing
//! the cut is dropping the new one.
//!
//! The new view has no private pages and no write protection, so a [`Tracker`] goes with the old one at the commit. Private pages that a
//! live fork left with the origin's bytes are read from the origin's layers from then on, and their memory is given back.
//!
//! Safe code must not reach the old view, which at a first cut writes the file that is sealed: a space with leases of vm-memory is not moved.
//! Memory slots are another matter: only a guest that runs writes through them. Must not know who uses the addresses.

use std::fmt;
use std::mem::replace;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLockWriteGuard;

use super::cut::{OldView, Seal, Step, seal};
use super::layer::Layer;
use super::tracker::Tracker;
use super::{HostRange, Mapped, MappedCut, MappedImage, State, View};
use crate::backing::{Deferred, Sealed};
use crate::error::{SpaceError, SystemError};
use crate::page::{ByteOffset, ByteSize};
use crate::ram::{Ram, RamLayout};
use crate::sys::mapping::{KeptRange, Mapping, Placement};
use crate::sys::reservation::Hole;

/// Addresses of this process where nothing is mapped, at a multiple of 1 GiB: where a VM's RAM may go next.
///
/// A hypervisor can be told of them ahead of need (KVM accepts a memory slot over a hole), and mapping RAM there later
/// disturbs nobody, because there is nothing to invalidate. Nothing reserves them: whatever else maps memory in this process may take
/// them, which is [`SpaceError::HoleTaken`] and the end of this hole. A guest must not run over it before RAM is there.
///
/// ```
/// use offshoot::{backing::AddressHole, page::ByteSize};
/// let hole = AddressHole::pick(ByteSize::gib(8))?;
/// assert_eq!((hole.base().addr().get() % (1 << 30), hole.was_lost()), (0, false));
/// # Ok::<(), offshoot::SpaceError>(())
/// ```
#[derive(Clone)]
pub struct AddressHole(Arc<Inner>);

struct Inner {
    hole: Hole,
    lost: AtomicBool,
}

impl AddressHole {
    /// Finds `len` bytes, a whole number of pages of 4 KiB, at random in the middle of the address space. About 4 µs.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] for another length, or what the system refuses.
    pub fn pick(len: ByteSize) -> Result<Self, SpaceError> {
        Ok(Self(Arc::new(Inner { hole: Hole::pick(len)?, lost: AtomicBool::new(false) })))
    }

    /// Its first address.
    pub fn base(&self) -> NonNull<u8> {
        self.0.hole.base()
    }

    /// Its length.
    pub fn len(&self) -> ByteSize {
        self.0.hole.len()
    }

    /// Never: a hole has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len() == ByteSize::ZERO
    }

    /// Whether RAM was to go there and found something mapped.
    pub fn was_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }

    #[cfg(feature = "kvm")]
    pub(crate) fn addresses(&self) -> Hole {
        self.0.hole
    }
}

impl fmt::Debug for AddressHole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressHole").field("base", &self.base()).field("len", &self.len()).finish_non_exhaustive()
    }
}

/// RAM and where it lies, for whoever holds host pointers: the addresses stay mapped for as long as this lives, even past the VM.
///
/// They show the VM's memory until it is moved ([`Vm::fork_relocating`](crate::Vm::fork_relocating)) or dropped.
#[derive(Clone, Debug)]
pub struct PlacedRam {
    layout: RamLayout,
    kept: KeptRange,
}

impl PlacedRam {
    fn of(layout: &RamLayout, mapping: &Mapping) -> Result<Self, SpaceError> {
        Ok(Self { layout: layout.clone(), kept: mapping.keep(ByteOffset::ZERO, mapping.len())? })
    }

    /// Which guest addresses are RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Every region with its host address, as [`Ram::host_ranges`].
    pub fn host_ranges(&self) -> impl ExactSizeIterator<Item = HostRange> + '_ {
        super::host_ranges(&self.layout, self.kept.base())
    }

    #[cfg(feature = "kvm")]
    pub(crate) fn kept(&self) -> &KeptRange {
        &self.kept
    }
}

impl Ram<Mapped> {
    /// Where it lies now, kept mapped.
    ///
    /// # Errors
    /// [`SpaceError::System`] where an earlier failure has made the content untrustworthy.
    pub fn place(&self) -> Result<PlacedRam, SpaceError> {
        PlacedRam::of(self.layout(), &self.space().shared()?.mapping)
    }
}

impl MappedImage {
    /// Maps the image into a hole.
    pub(crate) fn map_into(&self, hole: &AddressHole) -> Result<Mapping, SpaceError> {
        let space = self.geometry().len();
        if hole.len() != space {
            return Err(SpaceError::HoleLength { hole: hole.len(), space });
        }
        let mapped = self.map_at(Placement::Hole(hole.0.hole));
        // Only the first mapping can meet anything: what follows goes over it.
        if let Err(SpaceError::System(SystemError::Other { error, .. })) = &mapped
            && error.kind() == std::io::ErrorKind::AlreadyExists
        {
            hole.0.lost.store(true, Ordering::Release);
            return Err(SpaceError::HoleTaken);
        }
        mapped
    }

    /// A live space in a hole that reads as this image.
    pub(crate) fn spawn_into(&self, hole: &AddressHole) -> Result<Mapped, SpaceError> {
        if self.is_root() {
            return Err(SystemError::Misuse("RAM that was never cut has no image to map into a hole").into());
        }
        Ok(Mapped::with(self.clone(), self.map_into(hole)?, View::Private))
    }
}

/// A view of an image that is to become the space's own.
pub(super) struct Elsewhere {
    mapping: Mapping,
    unsealed: Unsealed,
}

/// A layer whose last seal is due when nobody waits.
enum Unsealed {
    /// The layer of a later cut is sealed already.
    None,
    /// The file of a space that is cut for the first time. The old view writes it, and must go first.
    OwnFile(Arc<Layer>),
    /// What a pre-copy made: nobody maps it writable.
    Copied(Arc<Layer>),
}

impl State {
    fn unleased(&self) -> Result<(), SpaceError> {
        if self.mapping.is_leased() { Err(SpaceError::Leased) } else { Ok(()) }
    }
}

impl Mapped {
    /// Whether the space may be moved: safe code that writes through a lease would go on at the old addresses, and at a first cut they are
    /// those of the file that is sealed.
    pub(crate) fn check_unleased(&self) -> Result<(), SpaceError> {
        self.shared()?.unleased()
    }

    /// Cuts, and lets `place` map the image wherever the space is to go on. Until the commit the space is where it was, with its
    /// write protection.
    pub(crate) fn cut_elsewhere<E: From<SpaceError>>(
        &self,
        place: impl FnOnce(&MappedImage) -> Result<Mapping, E>,
    ) -> Result<MappedCut<'_>, E> {
        let mut state = self.exclusive()?;
        // With the lock held: nobody can take one any more.
        state.unleased()?;
        let written = state.written_by_guest()?;
        let (sealed, unsealed) = match seal(&mut state, written)? {
            Seal::First(sealed, layer) => (sealed, Unsealed::OwnFile(layer)),
            Seal::Later(sealed, _) => (sealed, Unsealed::None),
        };
        let mapping = place(&sealed)?;
        Ok(MappedCut { state, sealed, step: Step::Elsewhere(Elsewhere { mapping, unsealed }), _attempt: None })
    }
}

impl MappedCut<'_> {
    /// Lets a cut whose layer was copied ahead go on elsewhere, where `place` maps the image. If that fails, the cut is undone.
    pub(crate) fn go_elsewhere<E: From<SpaceError>>(
        mut self,
        place: impl FnOnce(&MappedImage) -> Result<Mapping, E>,
    ) -> Result<Self, E> {
        // With the lock held: nobody can take one any more.
        self.state.unleased()?;
        let Step::Live(layer) = &self.step else {
            return Err(
                SpaceError::from(SystemError::Misuse("only a cut that was copied ahead can still be moved")).into()
            );
        };
        let unsealed = Unsealed::Copied(layer.clone());
        let mapping = place(&self.sealed)?;
        self.step = Step::Elsewhere(Elsewhere { mapping, unsealed });
        Ok(self)
    }

    /// Where RAM will be once the cut is committed: the new place of a cut that moves, the old one of any other.
    pub(crate) fn place(&self, layout: &RamLayout) -> Result<PlacedRam, SpaceError> {
        match &self.step {
            Step::Elsewhere(elsewhere) => PlacedRam::of(layout, &elsewhere.mapping),
            _ => PlacedRam::of(layout, &self.state.mapping),
        }
    }
}

impl Elsewhere {
    /// Makes the new view the space's own. The old one is torn down when nobody waits.
    pub(super) fn commit(
        self,
        state: &mut RwLockWriteGuard<'_, State>,
        sealed: &MappedImage,
        origin: impl Send + 'static,
    ) -> Deferred {
        let old = replace(&mut state.mapping, self.mapping);
        state.view = View::Private;
        state.shown = sealed.index().clone();
        // The new view has no private pages: there is nothing that write protection could tell apart.
        let (own, unsealed) = match self.unsealed {
            Unsealed::None => (None, None),
            Unsealed::OwnFile(layer) => (Some(layer.clone()), Some(layer)),
            Unsealed::Copied(layer) => (None, Some(layer)),
        };
        let old = LeftView { mapping: old, own, _tracker: state.tracker.get_mut().take() };
        Deferred::costly((OldView::new(old, unsealed), origin)).named("old view")
    }
}

/// The view that the guest has left.
struct LeftView {
    mapping: Mapping,
    /// The file that it writes, if it does.
    own: Option<Arc<Layer>>,
    /// It watched that view. Dropped after it, when there is nothing left to lift.
    _tracker: Option<Tracker>,
}

impl Drop for LeftView {
    fn drop(&mut self) {
        let Some(layer) = self.own.as_ref().filter(|_| self.mapping.is_kept()) else { return };
        // Somebody still has the old addresses, through which they could write into what is sealed. They stay mapped, and show the same
        // bytes, but writes go nowhere else any more.
        tracing::warn!(
            "old addresses of RAM are still in use after it was moved: let go of them in Relocate::relocate"
        );
        if let Err(error) = self.mapping.in_place_remap(&layer.file) {
            tracing::warn!(%error, "and could not be cut off from the fork point");
        }
    }
}
