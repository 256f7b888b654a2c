//! Forking a VM so that it goes on at other host addresses, and spawning clones at addresses chosen by the embedder.
//!
//! For hypervisors that prepare a machine ahead of need, its memory slots over a hole in the address space (a *shell*, see
//! `frontend::kvm`). The fork maps the image into the hole, the embedder moves its vCPUs into the shell, and the old machine with the old
//! view is torn down when nobody waits. What that costs does not grow with RAM, with a hypervisor attached or without: see the
//! table in `docs/design.md`.
//!
//! Must not know a hypervisor.

use super::fork::{Afterwards, Route};
use super::{BoxError, CloneSpec, DeviceState, ForkError, ForkPoint, Guest, SpawnError, Vm};
use crate::backing::{AddressHole, Deferred, Mapped, MappedCut, MappedImage, PlacedRam, RamMapping};
use crate::error::SpaceError;
use crate::ram::Ram;

/// A guest that can be moved to other host addresses at a fork.
///
/// # Contract
/// - After `relocate` returned `Ok`, nothing of the embedder's uses the old addresses: they show the fork point, which must not
///   change, and are unmapped when nobody waits. All that does is in the returned [`Deferred`].
/// - Above all, the machine that the guest has left must not run again, no vCPU and no device of it: it would write into the fork point. Of this
///   the engine can check as little as of what [`Guest::pause`] promises. Leases of vm-memory, through which safe code writes, it counts:
///   while there is one, the fork is refused.
/// - After `relocate` returned `Err`, the guest is as it was and can run on at its old place.
pub trait Relocate: Guest {
    /// Addresses where RAM may go next. Asked while the guest still runs; asked again, once it is paused, if something else has
    /// been mapped into the hole meanwhile: the answer must then be another.
    ///
    /// # Errors
    /// Whatever there is no hole for; the guest runs on.
    fn next_hole(&mut self) -> Result<AddressHole, BoxError>;

    /// Goes over to `ram`, which lies in the hole given last and reads as at the cut: loads `state` into a machine that is to run there.
    /// Called while paused. RAM is locked: use `ram`, not [`Vm::ram`].
    ///
    /// Returns the old machine, to be dropped in the background before the old view of RAM is unmapped.
    ///
    /// # Errors
    /// Whatever keeps the guest from going there; the fork is undone and the guest resumed at its old place.
    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError>;
}

/// How many holes are tried before a fork gives up. A hole is lost when a mapping of somebody else's lands in it, which are a few addresses
/// out of 64 TiB.
const TRIES: u32 = 8;

/// RAM goes on in a hole.
pub(super) struct IntoHole {
    hole: Option<AddressHole>,
}

impl IntoHole {
    pub(super) fn new() -> Self {
        Self { hole: None }
    }

    /// Maps an image into the hole that was taken, or into another if that was lost meanwhile.
    pub(super) fn place<G: Relocate + ?Sized>(
        &mut self,
        image: &MappedImage,
        guest: &mut G,
    ) -> Result<RamMapping, ForkError> {
        let mut tries = 1;
        loop {
            match image.map_into(&self.next(guest)?) {
                Err(SpaceError::HoleTaken) if tries < TRIES => tries += 1,
                other => return other.map_err(ForkError::Cut),
            }
        }
    }

    fn next<G: Relocate + ?Sized>(&mut self, guest: &mut G) -> Result<AddressHole, ForkError> {
        self.hole.take().map_or_else(|| guest.next_hole().map_err(ForkError::Hole), Ok)
    }
}

impl<'a, G: Relocate + ?Sized> Route<'a, Mapped, G> for IntoHole {
    fn prepare(&mut self, vm: &'a Vm<Mapped>, guest: &mut G) -> Result<(), ForkError> {
        // Asked again in the cut, which keeps new ones out.
        vm.ram().space().check_unleased()?;
        self.hole = Some(guest.next_hole().map_err(ForkError::Hole)?);
        Ok(())
    }

    fn cut(&mut self, vm: &'a Vm<Mapped>, guest: &mut G) -> Result<MappedCut<'a>, ForkError> {
        vm.ram().space().cut_elsewhere(|image| self.place(image, guest))
    }

    fn relocate(
        &mut self,
        ram: &Ram<Mapped>,
        cut: &MappedCut<'_>,
        guest: &mut G,
        device: &DeviceState,
    ) -> Result<Deferred, ForkError> {
        let place = cut.place(ram.layout())?;
        tracing::debug_span!("relocate").in_scope(|| guest.relocate(&place, device)).map_err(ForkError::Relocate)
    }
}

impl Vm<Mapped> {
    /// Forks the running VM as [`Vm::fork`] does, and lets it run on at other host addresses, in a machine that was made ahead of need.
    ///
    /// With KVM attached this keeps the pause flat, whatever is resident: [`Vm::fork`] moves page tables, of which KVM must be
    /// told, page by page. Its price: every host address of RAM changes ([`Ram::host_ranges`]), the embedder's devices must
    /// take up the new ones, and the vCPUs are loaded anew. The new view has no page tables yet: what the guest touches faults in again, as
    /// in a clone.
    ///
    /// # Errors
    /// [`ForkError`]. The VM runs on where it was, unchanged, and nothing is left behind. [`SpaceError::Leased`], in [`ForkError::Cut`], while
    /// vm-memory has the VM's addresses (`frontend::vm_memory::lease`): before the guest is paused, unless the lease was
    /// taken since.
    pub fn fork_relocating(&self, guest: &mut (impl Relocate + ?Sized)) -> Result<ForkPoint<Mapped>, ForkError> {
        self.cut_all("fork_relocating", guest, IntoHole::new(), Afterwards::RunOn)
    }
}

impl ForkPoint<Mapped> {
    /// Spawns a clone whose RAM lies in `hole`: for a machine that was made ahead of need. Otherwise as [`ForkPoint::spawn`].
    ///
    /// # Errors
    /// [`SpawnError::Space`], with [`SpaceError::HoleTaken`] where something else was mapped there.
    ///
    /// ```
    /// # use offshoot::{*, backing::{AddressHole, Mapped}, page::*, ram::*};
    /// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
    /// # let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("web")?, layout, vec![])?;
    /// # vm.start()?;
    /// let point = vm.fork(&mut AtRest(DeviceState::from_bytes([])))?;
    /// let hole = AddressHole::pick(ByteSize::mib(1))?;
    /// let clone = point.spawn_into(&hole, CloneSpec::default())?;
    /// assert_eq!(clone.ram().host_ranges().next().unwrap().host, hole.base());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn spawn_into(&self, hole: &AddressHole, spec: CloneSpec) -> Result<Vm<Mapped>, SpawnError> {
        self.spawn_into_with(hole, spec, |_| Ok(()))
    }

    /// The same, with a customization as in [`ForkPoint::spawn_with`].
    ///
    /// # Errors
    /// As [`ForkPoint::spawn_into`], and [`SpawnError::Customize`].
    pub fn spawn_into_with(
        &self,
        hole: &AddressHole,
        spec: CloneSpec,
        customize: impl FnOnce(&Vm<Mapped>) -> Result<(), BoxError>,
    ) -> Result<Vm<Mapped>, SpawnError> {
        self.spawn_from(|image| image.spawn_into(hole), spec, customize)
    }
}
