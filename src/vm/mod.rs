//! A virtual machine as the engine sees it: RAM, named disks, opaque device state and an identity.
//!
//! Owns the life of a VM (its status, and which calls are legal when) and everything done to RAM and all disks at once: fork,
//! spawn, reset, diff, flatten, commit. Must not know a hypervisor: the embedder's guest comes in through [`Guest`].

mod commit;
mod fork;
mod guest;
mod identity;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod live;
mod point;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod relocate;
mod reset;
#[cfg(all(feature = "store", unix))]
mod saved;
mod teardown;
mod timings;
mod working_set;

pub use commit::CommitError;
pub use fork::ForkError;
pub use guest::{AtRest, BoxError, DeviceState, Guest, Rewind, StateObject};
pub use identity::{CloneSpec, Config, GenerationId, Identity, IdentityError, MacAddress, Uuid, VmName};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use live::{LivePolicy, OnExceeded};
pub use point::{ForkPoint, PointDiff, SpawnError};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use relocate::Relocate;
pub use reset::ResetError;
#[cfg(all(feature = "store", unix))]
pub use saved::{Reading, SavedError};
pub use teardown::{PutOff, Teardown};
pub use timings::{Fallback, ForkTimings, PrecopyEnd, PrecopyRound, PrecopyTimings};

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use crate::account::{Seat, Usage};
use crate::admission::{AdmissionError, Needs};
use crate::backing::{Backing, Prefaulted, Tree};
use crate::disk::Disk;
use crate::error::SpaceError;
use crate::ram::{Ram, RamLayout};

/// What a VM is doing, as far as the engine must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmStatus {
    /// Not powered on: there is no instant to cut.
    Off,
    /// Its guest executes.
    Running,
    /// Its guest stands still and may run on. A clone is born so.
    Paused,
    /// A fork, freeze, reset or commit is under way.
    Busy,
    /// Stopped for good at its fork point; nothing of it changes again.
    Frozen,
}

/// A call that this VM's status does not allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call} needs a VM that is {needs}, this one is {status:?}")]
pub struct IllegalState {
    /// The call.
    pub call: &'static str,
    /// What it needs.
    pub needs: &'static str,
    /// What the VM is.
    pub status: VmStatus,
}

/// A name for one of a VM's disks, unique within the VM.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DiskName(Arc<str>);

impl DiskName {
    /// Any text.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a VM cannot be built of.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Two disks of one name.
    #[error("two disks are named {0}")]
    DuplicateDisk(DiskName),
    /// More disks than the limit.
    #[error("{count} disks: at most {limit} are allowed")]
    TooManyDisks {
        /// How many were given.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// There is no room for one more.
    #[error(transparent)]
    Refused(#[from] AdmissionError),
    /// RAM or a disk could not be made.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// It could not be given an identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A virtual machine: RAM on backing `B`, disks, and an identity.
///
/// See the [crate](crate) for a full example.
pub struct Vm<B: Backing> {
    tree: Tree,
    identity: Identity,
    ram: Arc<Ram<B>>,
    disks: Box<[(DiskName, Arc<Disk>)]>,
    life: Mutex<Life<B>>,
    /// Clones named after this VM, over all its fork points: no two of them get one name.
    clones: Arc<AtomicU64>,
    prefaulted: Option<Prefaulted>,
    /// Last: what it counts is gone by then.
    _seat: Seat,
}

struct Life<B: Backing> {
    status: VmStatus,
    /// The fork point that its spaces lie on: its own last one, or the one it was spawned from.
    origin: Option<ForkPoint<B>>,
}

impl<B: Backing> Vm<B> {
    /// The most disks that one VM may have.
    pub const MAX_DISKS: u64 = 256;

    /// A VM that is off, with RAM all zeroes. Disks count, and are limited, in the tree that they were made with.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn new(tree: &Tree, name: VmName, layout: RamLayout, disks: Vec<(DiskName, Disk)>) -> Result<Self, BuildError> {
        let count = disks.len() as u64;
        if count > Self::MAX_DISKS {
            return Err(BuildError::TooManyDisks { count, limit: Self::MAX_DISKS });
        }
        for (at, (name, _)) in disks.iter().enumerate() {
            if disks[..at].iter().any(|(other, _)| other == name) {
                return Err(BuildError::DuplicateDisk(name.clone()));
            }
        }
        let seat = tree.0.admit_vm(Needs::default())?;
        let identity = Identity::fresh(name)?;
        let ram = Ram::create(tree, layout)?;
        let disks = disks.into_iter().map(|(name, disk)| (name, Arc::new(disk))).collect();
        Ok(Self::assemble(tree.clone(), seat, identity, ram, disks, Life { status: VmStatus::Off, origin: None }))
    }

    fn assemble(
        tree: Tree,
        seat: Seat,
        identity: Identity,
        ram: Ram<B>,
        disks: Box<[(DiskName, Arc<Disk>)]>,
        life: Life<B>,
    ) -> Self {
        Self {
            tree,
            identity,
            ram: Arc::new(ram),
            disks,
            life: Mutex::new(life),
            clones: Arc::default(),
            prefaulted: None,
            _seat: seat,
        }
    }

    /// The fork tree it belongs to.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its RAM. vCPU and device threads keep their own reference.
    pub fn ram(&self) -> &Arc<Ram<B>> {
        &self.ram
    }

    /// Its disks, in the order they were given.
    pub fn disks(&self) -> impl ExactSizeIterator<Item = (&DiskName, &Arc<Disk>)> {
        self.disks.iter().map(|(name, disk)| (name, disk))
    }

    /// A disk by name.
    pub fn disk(&self, name: &str) -> Option<&Arc<Disk>> {
        self.disks.iter().find(|(own, _)| own.as_str() == name).map(|(_, disk)| disk)
    }

    /// What it is doing.
    pub fn status(&self) -> VmStatus {
        self.life.lock().status
    }

    /// The fork point that it lies on: its own last one, or the one it was spawned from. `None` before the first fork.
    pub fn origin(&self) -> Option<ForkPoint<B>> {
        self.life.lock().origin.clone()
    }

    /// The device state of its fork point: what a clone's vCPUs are to be loaded with.
    pub fn device_state(&self) -> Option<DeviceState> {
        self.life.lock().origin.as_ref().map(|point| point.device_state().clone())
    }

    /// Says that the guest executes from now on.
    ///
    /// # Errors
    /// [`IllegalState`] unless the VM is off or paused.
    pub fn start(&self) -> Result<(), IllegalState> {
        self.change("start", "off or paused", |status| {
            matches!(status, VmStatus::Off | VmStatus::Paused).then_some(VmStatus::Running)
        })
    }

    /// Says that the guest stands still and may run on.
    ///
    /// # Errors
    /// [`IllegalState`] unless the VM is running.
    pub fn pause(&self) -> Result<(), IllegalState> {
        self.change("pause", "running", |status| (status == VmStatus::Running).then_some(VmStatus::Paused))
    }

    /// Says that the VM was powered off. Its memory and disks keep what they hold.
    ///
    /// # Errors
    /// [`IllegalState`] unless the VM is running or paused.
    pub fn power_off(&self) -> Result<(), IllegalState> {
        self.change("power_off", "running or paused", |status| {
            matches!(status, VmStatus::Running | VmStatus::Paused).then_some(VmStatus::Off)
        })
    }

    fn change(
        &self,
        call: &'static str,
        needs: &'static str,
        step: impl FnOnce(VmStatus) -> Option<VmStatus>,
    ) -> Result<(), IllegalState> {
        let mut life = self.life.lock();
        life.status = step(life.status).ok_or(IllegalState { call, needs, status: life.status })?;
        Ok(())
    }

    /// Marks the VM busy for one operation; whatever happens, it has a status again when the guard goes.
    fn begin(&self, call: &'static str, needs: &'static str, legal: &[VmStatus]) -> Result<Busy<'_, B>, IllegalState> {
        let mut life = self.life.lock();
        let status = life.status;
        if !legal.contains(&status) {
            return Err(IllegalState { call, needs, status });
        }
        life.status = VmStatus::Busy;
        Ok(Busy { vm: self, before: status, after: status })
    }

    /// What its RAM and each disk hold.
    ///
    /// # Errors
    /// As [`Backing::usage`].
    pub fn usage(&self) -> Result<VmUsage, SpaceError> {
        let disks = self.disks.iter().map(|(name, disk)| Ok((name.clone(), disk.usage()?)));
        Ok(VmUsage { ram: self.ram.usage()?, disks: disks.collect::<Result<_, SpaceError>>()? })
    }

    /// The pages of RAM and of each disk that were written or zeroed since its last fork point, as far as its backing tells. Costs
    /// by what was written.
    ///
    /// # Errors
    /// As [`Backing::dirty`].
    pub fn dirty(&self) -> Result<PointDiff, SpaceError> {
        let disks = self.disks.iter().map(|(name, disk)| Ok((name.clone(), disk.dirty()?)));
        Ok(PointDiff { ram: self.ram.space().dirty()?, disks: disks.collect::<Result<_, SpaceError>>()? })
    }

    /// Derives every invariant of its spaces again and compares. For tests: it walks all tables.
    ///
    /// # Errors
    /// What was found wrong, and in which space.
    pub fn validate(&self) -> Result<(), String> {
        self.ram.space().validate().map_err(|wrong| format!("RAM: {wrong}"))?;
        self.disks
            .iter()
            .try_for_each(|(name, disk)| disk.space().validate().map_err(|wrong| format!("disk {name}: {wrong}")))
    }
}

/// What one VM holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmUsage {
    /// Its RAM.
    pub ram: Usage,
    /// Its disks, by name.
    pub disks: Vec<(DiskName, Usage)>,
}

/// An operation under way on a VM.
struct Busy<'a, B: Backing> {
    vm: &'a Vm<B>,
    before: VmStatus,
    after: VmStatus,
}

impl<B: Backing> Drop for Busy<'_, B> {
    fn drop(&mut self) {
        self.vm.life.lock().status = self.after;
    }
}

impl<B: Backing> fmt::Debug for Vm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("name", &self.identity.name)
            .field("status", &self.status())
            .field("ram", &self.ram)
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}
