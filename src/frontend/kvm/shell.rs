//! A machine made ahead of need: VM, memory slots, chips and vCPUs with their CPUID, over addresses where RAM will be.
//!
//! KVM accepts a slot over addresses where nothing is mapped. All that is slow happens there (registering the slots, the grace periods
//! of the chips, the vCPUs); what is left for the fork is mapping RAM into the hole and loading the state.
//!
//! **A shell never carries anything of a former tenant, because it has none.** It is built from nothing, used once by value
//! ([`Shell::enter`] takes it and gives a machine, which is no shell any more) and there is no way back: a machine that ran is dropped.
//! Until then its vCPUs cannot be run, set or even seen from outside, nothing is mapped in its hole, and every shell has a hole of its own.
//!
//! It knows how to build one shell; how many there are is `shell_pool.rs`.

use std::fmt;
use std::sync::Arc;

use super::build::{KvmMachine, create_devices};
use super::call::KvmCall;
use super::chips::Devices;
use super::count::{ShellCount, VcpuCount};
use super::error::KvmError;
use super::host::KvmHost;
use super::machine::{MachinePlan, MachineState};
use super::ram::{RamSlot, SlotNumber};
use super::shell_pool::Ticket;
use super::vcpu::{Target, VcpuIndex, VcpuPlan};
use crate::SpawnError;
use crate::admission::AdmissionError;
use crate::backing::{AddressHole, PlacedRam};
use crate::error::SpaceError;
use crate::ram::RamLayout;
use crate::sys::hollow::HollowVm;

/// What all shells of one kind have in common: where RAM is, which devices there are, and what each vCPU is told about its processor.
///
/// ```no_run
/// use offshoot::frontend::kvm::{Devices, KvmHost, MachinePlan, ShellShape};
/// # fn example(vcpus: &[kvm_ioctls::VcpuFd], ram: &offshoot::ram::RamLayout) -> Result<(), offshoot::frontend::kvm::KvmError> {
/// let host = KvmHost::open()?;
/// let plan = MachinePlan::read(&host, vcpus, Devices::FULL)?;
/// let shape = ShellShape::new(&plan, ram);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ShellShape {
    host: Arc<KvmHost>,
    layout: RamLayout,
    vcpus: Arc<[VcpuPlan]>,
    devices: Devices,
}

impl ShellShape {
    /// The shape of machines that a fork of one with this plan needs.
    pub fn new(plan: &MachinePlan, layout: &RamLayout) -> Self {
        Self {
            host: Arc::clone(&plan.host),
            layout: layout.clone(),
            vcpus: plan.vcpus.as_slice().into(),
            devices: plan.devices,
        }
    }

    /// How many vCPUs each has.
    pub fn vcpu_count(&self) -> VcpuCount {
        VcpuCount::of(&self.vcpus)
    }

    /// Which guest addresses are RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Descriptors that one takes: the machine's and each vCPU's.
    pub fn descriptors(&self) -> u64 {
        1 + self.vcpu_count().get()
    }

    /// Kernel mappings that one takes: each vCPU's communication page. Its RAM comes later.
    pub fn mappings(&self) -> u64 {
        self.vcpu_count().get()
    }

    /// Whether a machine of this shape can be loaded with `state`, and if not, why.
    fn check(&self, state: &MachineState) -> Result<(), ShellError> {
        if state.devices() != self.devices {
            return Err(ShellError::Shape("in-kernel devices"));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return Err(ShellError::Shape("number of vCPUs"));
        }
        let alike = self.vcpus.iter().zip(&state.vcpus).all(|(ours, theirs)| ours.fits(&theirs.plan));
        if alike { Ok(()) } else { Err(ShellError::Shape("CPUID or TSC frequency")) }
    }
}

impl fmt::Debug for ShellShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShellShape")
            .field("layout", &self.layout)
            .field("vcpus", &self.vcpus.len())
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

/// Why there is no shell, or why it could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShellError {
    /// The host refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no hole, or RAM could not be mapped into it.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The clone could not be spawned.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Too many shells.
    #[error("{limit} exist, ready or taken and not yet entered: drop some, or raise PoolLimits::alive")]
    ShellLimit {
        /// The limit.
        limit: ShellCount,
    },
    /// There is no room in this process or on this host for one more.
    #[error(transparent)]
    Refused(#[from] AdmissionError),
    /// The thread that refills could not be started.
    #[error("the pool's thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
    /// RAM lies somewhere else than in the shell's hole.
    #[error("RAM does not lie in this shell's hole: spawn or fork into the hole of the very shell that is entered")]
    Place,
    /// The state is one of another kind of machine.
    #[error("the machine state has another {0} than this shell: use a pool of the state's own shape")]
    Shape(&'static str),
}

/// A machine that waits for RAM and state. Used once, by value:
///
/// ```compile_fail,E0382
/// # use offshoot::{backing::PlacedRam, frontend::kvm::{MachineState, Shell, ShellError}};
/// fn twice(shell: Shell, ram: &PlacedRam, state: &MachineState) -> Result<(), ShellError> {
///     shell.enter(ram, state)?;
///     shell.enter(ram, state)?; // it was used up
///     Ok(())
/// }
/// ```
pub struct Shell {
    vm: HollowVm,
    hole: AddressHole,
    shape: ShellShape,
    ticket: Option<Ticket>,
}

impl Shell {
    /// Builds one: a machine, a slot for each region over a hole, the chips, the vCPUs with their CPUID. Some milliseconds.
    ///
    /// # Errors
    /// [`ShellError::Kvm`] names the call that the host refused; [`ShellError::Space`] if there are no addresses.
    pub fn build(shape: &ShellShape) -> Result<Self, ShellError> {
        let hole = AddressHole::pick(shape.layout.geometry().len())?;
        let refused = |call| move |source| KvmError::Machine { call, source };
        let mut vm = HollowVm::new(shape.host.kvm(), hole.addresses()).map_err(refused(KvmCall::CreateVm))?;
        // Slots before chips: afterwards each waits for a grace period.
        for (region, offset) in shape.layout.regions() {
            vm.slot(region.start, offset, region.len).map_err(refused(KvmCall::SetUserMemoryRegion))?;
        }
        create_devices(vm.for_devices().map_err(refused(KvmCall::CreateIrqchip))?, shape.devices)?;
        for (position, plan) in shape.vcpus.iter().enumerate() {
            let index = VcpuIndex::new(position as u32);
            vm.add_vcpu().map_err(|source| KvmError::Vcpu { call: KvmCall::CreateVcpu, vcpu: index, source })?;
            plan.prepare(&shape.host, &vm.vcpus()[position], index)?;
        }
        vm.warm().map_err(refused(KvmCall::Run))?;
        Ok(Self { vm, hole, shape: shape.clone(), ticket: None })
    }

    /// Where RAM is to be mapped: for [`ForkPoint::spawn_into`](crate::ForkPoint::spawn_into) and
    /// [`Relocate::next_hole`](crate::Relocate::next_hole).
    pub fn hole(&self) -> &AddressHole {
        &self.hole
    }

    /// What its kind has in common.
    pub fn shape(&self) -> &ShellShape {
        &self.shape
    }

    /// Goes over to `ram`, which lies in the shell's hole by now, and loads `state`: the shell is a machine, ready to run. The machine keeps
    /// the memory mapped.
    ///
    /// # Errors
    /// [`ShellError::Place`], [`ShellError::Shape`], [`ShellError::Kvm`]. The shell is gone: take another.
    pub fn enter(self, ram: &PlacedRam, state: &MachineState) -> Result<KvmMachine, ShellError> {
        self.shape.check(state)?;
        if ram.layout() != &self.shape.layout {
            return Err(ShellError::Place);
        }
        let filled = self.vm.fill(ram.kept()).ok_or(ShellError::Place)?;
        let regions = self.shape.layout.regions();
        let slots = filled
            .slots
            .into_iter()
            .zip(regions)
            .enumerate()
            .map(|(number, (slot, (region, _)))| RamSlot::over(slot, SlotNumber::new(number as u32), region.start));
        let mut machine = KvmMachine::from_parts(filled.vm, filled.vcpus, slots.collect());
        machine.load(&self.shape.host, state, Target::Fresh)?;
        if let Some(ticket) = self.ticket {
            ticket.entered();
        }
        Ok(machine)
    }

    /// Reads the state that it has before anything was loaded: that of a machine just made. For tests, and for those who do not
    /// believe it.
    ///
    /// # Errors
    /// As [`MachineState::capture`].
    pub fn capture(&self) -> Result<MachineState, KvmError> {
        let (host, devices) = (Arc::clone(&self.shape.host), self.shape.devices);
        let plan = MachinePlan { host, vcpus: self.shape.vcpus.to_vec(), devices };
        MachineState::look(&plan, self.vm.vm(), self.vm.vcpus())
    }

    pub(super) fn with_ticket(self, ticket: Ticket) -> Self {
        Self { ticket: Some(ticket), ..self }
    }
}

impl fmt::Debug for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shell").field("shape", &self.shape).field("hole", &self.hole).finish_non_exhaustive()
    }
}
