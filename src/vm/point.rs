//! The fork point: a VM at one instant, immutable, and the clones made from it.
//!
//! Holds layers, not parents: it and its clones live on when the VM that was cut is gone. Spawning touches neither the parent nor
//! siblings, takes no lock that siblings share, and is done or leaves nothing.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::debug_span;

use super::{
    BoxError, CloneSpec, DeviceState, DiskName, ForkTimings, IdentityError, Life, Teardown, Vm, VmName, VmStatus,
};
use crate::account::{Charge, Item};
use crate::admission::AdmissionError;
use crate::backing::{Backing, Prefault, Prefaulted, Sealed, Tree};
use crate::disk::DiskImage;
use crate::error::SpaceError;
use crate::page::{ByteSize, PageSet};
use crate::ram::{Ram, RamLayout};

/// Why there is no clone. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// There is no room for one more clone: nothing was begun.
    #[error(transparent)]
    Refused(#[from] AdmissionError),
    /// RAM or a disk could not be made.
    #[error("the clone's memory could not be made: {0}")]
    Space(#[from] SpaceError),
    /// It could not be given an identity of its own.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The embedder's customization failed: the clone was destroyed before anybody could run it.
    #[error("customization failed, and the clone was destroyed: {0}")]
    Customize(#[source] BoxError),
}

/// A VM at one instant. Cloning this handle costs one reference; what it holds lives until the last handle, clone and relative that needs it is gone.
pub struct ForkPoint<B: Backing>(Arc<Inner<B>>);

struct Inner<B: Backing> {
    tree: Tree,
    parts: PointParts<B>,
    timings: ForkTimings,
    teardown: Teardown,
    #[cfg(all(feature = "store", unix))]
    saved: parking_lot::Mutex<Option<super::saved::SavedAs>>,
    _charge: Charge,
}

/// What a cut yields.
pub(super) struct PointParts<B: Backing> {
    pub(super) layout: RamLayout,
    pub(super) ram: B::Sealed,
    pub(super) disks: Vec<(DiskName, DiskImage)>,
    pub(super) device: DeviceState,
    pub(super) parent: VmName,
    /// How many clones were named after the parent.
    pub(super) clones: Arc<AtomicU64>,
}

/// Which pages may differ between two fork points.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointDiff {
    /// Pages of RAM.
    pub ram: PageSet,
    /// Pages of each disk, by name.
    pub disks: Vec<(DiskName, PageSet)>,
}

impl<B: Backing> Clone for ForkPoint<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backing> ForkPoint<B> {
    pub(super) fn new(tree: Tree, parts: PointParts<B>, timings: ForkTimings, teardown: Teardown) -> Self {
        let charge = tree.0.charge(Item::ForkPoint);
        Self(Arc::new(Inner {
            tree,
            parts,
            timings,
            teardown,
            #[cfg(all(feature = "store", unix))]
            saved: parking_lot::Mutex::default(),
            _charge: charge,
        }))
    }

    /// Spawns a clone: paused at this instant, with an identity of its own.
    ///
    /// The embedder loads [`Vm::device_state`] into fresh vCPUs, calls [`Vm::start`] and runs it. Cost: independent of RAM
    /// size and of siblings; on the mapped backing, one kernel mapping for each extent of layers.
    ///
    /// # Errors
    /// [`SpawnError::Refused`], [`SpawnError::Space`].
    pub fn spawn(&self, spec: CloneSpec) -> Result<Vm<B>, SpawnError> {
        self.spawn_with(spec, |_| Ok(()))
    }

    /// Spawns a clone and customizes it before it is handed out: write its identity into its memory or disks, register its name,
    /// whatever must be done before anybody can run it.
    ///
    /// # Errors
    /// As [`ForkPoint::spawn`]; [`SpawnError::Customize`] where `customize` fails. There is no clone then.
    ///
    /// ```
    /// # use offshoot::{*, backing::Heap, page::*, ram::*};
    /// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
    /// # let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("web")?, layout, vec![])?;
    /// # vm.start()?;
    /// let point = vm.fork(&mut AtRest(DeviceState::from_bytes([])))?;
    /// let clone = point.spawn_with(CloneSpec::default(), |clone| {
    ///     let id = clone.identity().generation.bytes();
    ///     Ok(clone.ram().write(GuestAddress::new(0x1000), &id)?)
    /// })?;
    /// assert_eq!(clone.identity().name.as_str(), "web-1");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn spawn_with(
        &self,
        spec: CloneSpec,
        customize: impl FnOnce(&Vm<B>) -> Result<(), BoxError>,
    ) -> Result<Vm<B>, SpawnError> {
        self.spawn_from(B::Sealed::spawn, spec, customize)
    }

    pub(super) fn spawn_from(
        &self,
        ram: impl FnOnce(&B::Sealed) -> Result<B, SpaceError>,
        spec: CloneSpec,
        customize: impl FnOnce(&Vm<B>) -> Result<(), BoxError>,
    ) -> Result<Vm<B>, SpawnError> {
        let _span = debug_span!("spawn", parent = %self.0.parts.parent).entered();
        let parts = &self.0.parts;
        let mappings = parts.disks.iter().map(|(_, image)| image.image().clone_mappings()).sum::<u64>();
        let mappings = mappings.saturating_add(parts.ram.clone_mappings());
        let ledger = &self.0.tree.0;
        let size = parts.layout.geometry().page_size();
        let ready =
            spec.prefault.as_ref().map_or(ByteSize::ZERO, |prefault| size.size_of(parts.ram.prefault_copies(prefault)));
        let seat = ledger.admit_vm(ledger.needs_of_clone(mappings, ready))?;
        let ram = Ram::over(parts.layout.clone(), ram(&parts.ram)?);
        let prefaulted = prefault(ram.space(), spec.prefault.as_ref())?;
        let disks = parts.disks.iter().map(|(name, image)| Ok((name.clone(), Arc::new(image.spawn()?))));
        let disks = disks.collect::<Result<_, SpaceError>>()?;
        let identity = spec.identity(|| {
            // Relaxed: only uniqueness is asked of it.
            parts.parent.of_clone(parts.clones.fetch_add(1, Ordering::Relaxed) + 1)
        })?;
        let life = Life { status: VmStatus::Busy, origin: Some(self.clone()) };
        let mut clone = Vm::assemble(self.0.tree.clone(), seat, identity, ram, disks, life);
        clone.prefaulted = prefaulted;
        customize(&clone).map_err(SpawnError::Customize)?;
        clone.life.lock().status = VmStatus::Paused;
        Ok(clone)
    }

    /// vCPU and device state at this instant.
    pub fn device_state(&self) -> &DeviceState {
        &self.0.parts.device
    }

    /// RAM at this instant.
    pub fn ram(&self) -> &B::Sealed {
        &self.0.parts.ram
    }

    /// Where the guest addresses of RAM lie in it.
    pub fn ram_layout(&self) -> &RamLayout {
        &self.0.parts.layout
    }

    /// A disk at this instant.
    pub fn disk(&self, name: &str) -> Option<&DiskImage> {
        self.0.parts.disks.iter().find(|(own, _)| own.as_str() == name).map(|(_, image)| image)
    }

    /// The disks, in the order of the VM's.
    pub fn disks(&self) -> impl ExactSizeIterator<Item = (&DiskName, &DiskImage)> {
        self.0.parts.disks.iter().map(|(name, image)| (name, image))
    }

    /// Where it lies in a store, if it was saved there or comes from there.
    #[cfg(all(feature = "store", unix))]
    pub(super) fn saved(&self) -> &parking_lot::Mutex<Option<super::saved::SavedAs>> {
        &self.0.saved
    }

    /// The name of the VM that was cut.
    pub fn parent_name(&self) -> &VmName {
        &self.0.parts.parent
    }

    /// What the fork cost, stage by stage. Zero for a fork point made from another one.
    pub fn timings(&self) -> ForkTimings {
        self.0.timings
    }

    /// What the fork put off.
    pub fn teardown(&self) -> &Teardown {
        &self.0.teardown
    }

    /// Fork points between this one and the first ancestor, itself included.
    pub fn depth(&self) -> u32 {
        self.0.parts.ram.depth()
    }

    /// Which pages may differ between this and another fork point of the same family. Costs by what changed between them.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] where they do not come from one parent.
    pub fn diff(&self, other: &Self) -> Result<PointDiff, SpaceError> {
        let disks = self.0.parts.disks.iter().map(|(name, image)| {
            let theirs = other.disk(name.as_str()).ok_or(NO_SUCH_DISK)?;
            Ok((name.clone(), image.image().diff(theirs.image())?))
        });
        Ok(PointDiff {
            ram: self.0.parts.ram.diff(&other.0.parts.ram)?,
            disks: disks.collect::<Result<_, SpaceError>>()?,
        })
    }

    /// The same instant as a full copy that shares nothing with anybody.
    ///
    /// # Errors
    /// As [`Sealed::flatten`].
    pub fn flatten(&self) -> Result<Self, SpaceError> {
        self.derive(self.0.parts.ram.flatten()?, |_, image| image.flatten())
    }

    /// The same instant with all layers above `ancestor` merged into one.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] unless `ancestor` is an ancestor of this fork point.
    pub fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        self.derive(self.0.parts.ram.merge_onto(&ancestor.0.parts.ram)?, |name, image| {
            image.merge_onto(ancestor.disk(name).ok_or(NO_SUCH_DISK)?.image())
        })
    }

    fn derive(
        &self,
        ram: B::Sealed,
        each: impl Fn(&str, &dyn crate::disk::AnySealed) -> Result<Arc<dyn crate::disk::AnySealed>, SpaceError>,
    ) -> Result<Self, SpaceError> {
        let old = &self.0.parts;
        let disks = old
            .disks
            .iter()
            .map(|(name, disk)| Ok((name.clone(), disk.with_image(each(name.as_str(), disk.image())?))));
        let parts = PointParts {
            layout: old.layout.clone(),
            ram,
            disks: disks.collect::<Result<_, SpaceError>>()?,
            device: old.device.clone(),
            parent: old.parent.clone(),
            clones: old.clones.clone(),
        };
        Ok(Self::new(self.0.tree.clone(), parts, ForkTimings::default(), Teardown::default()))
    }

    /// Derives every invariant of its images again and compares. For tests.
    ///
    /// # Errors
    /// What was found wrong, and in which image.
    pub fn validate(&self) -> Result<(), String> {
        self.0.parts.ram.validate().map_err(|wrong| format!("RAM: {wrong}"))?;
        let mut disks = self.0.parts.disks.iter();
        disks.try_for_each(|(name, disk)| disk.image().validate().map_err(|wrong| format!("disk {name}: {wrong}")))
    }
}

/// Maps ahead what the caller asked for, before anybody can run the clone.
fn prefault<B: Backing>(space: &B, prefault: Option<&Prefault>) -> Result<Option<Prefaulted>, SpaceError> {
    let Some(prefault) = prefault else { return Ok(None) };
    debug_span!("prefault", pages = prefault.set.count().get()).in_scope(|| space.prefault(prefault).map(Some))
}

const NO_SUCH_DISK: SpaceError = SpaceError::Unrelated("the other fork point has no disk of this name");

impl<B: Backing> fmt::Debug for ForkPoint<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForkPoint")
            .field("parent", &self.0.parts.parent)
            .field("ram", &self.0.parts.ram)
            .field("disks", &self.0.parts.disks)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Heap;
    use crate::page::{ByteSize, PageSize};
    use crate::{AtRest, DeviceState};

    #[test]
    fn clones_of_one_vm_have_names_of_their_own() {
        let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).unwrap();
        let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("web").unwrap(), layout, vec![]).unwrap();
        let mut guest = AtRest(DeviceState::from_bytes(vec![]));
        vm.start().unwrap();
        let points = [vm.fork(&mut guest).unwrap(), vm.fork(&mut guest).unwrap()];
        let points = [points[0].clone(), points[1].flatten().unwrap(), points[1].clone()];
        let clones = points.map(|point| point.spawn(CloneSpec::default()).unwrap());
        assert_eq!(clones.map(|clone| clone.identity().name.to_string()), ["web-1", "web-2", "web-3"]);
    }
}
