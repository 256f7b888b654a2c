//! A whole machine: all vCPUs and the kernel's devices, cut at one instant and loaded in an order that works.
//!
//! It knows the order between the parts; the parts themselves are `vcpu.rs` and `chips.rs`. RAM and disks are not its
//! business.

use std::borrow::{Borrow, BorrowMut};
use std::fmt;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_sync_regs};
use kvm_ioctls::{VcpuFd, VmFd};

use super::call::KvmCall;
use super::chips::{ChipState, Devices, Irqchips};
use super::core;
use super::count::VcpuCount;
use super::error::KvmError;
use super::host::KvmHost;
use super::msr::MsrIndex;
use super::vcpu::{Nested, Target, VcpuIndex, VcpuPlan, VcpuState};
use super::vcpu_error;

/// What does not change in a machine's life, read once so that no fork reads it again: each vCPU's CPUID and TSC
/// frequency, and which devices the kernel emulates.
#[derive(Clone)]
pub struct MachinePlan {
    pub(super) host: Arc<KvmHost>,
    pub(super) vcpus: Vec<VcpuPlan>,
    pub(super) devices: Devices,
}

impl MachinePlan {
    /// Reads the plan of a machine whose vCPUs have their CPUID. Two calls per vCPU.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] if a vCPU cannot be asked.
    pub fn read<V: Borrow<VcpuFd>>(host: &Arc<KvmHost>, vcpus: &[V], devices: Devices) -> Result<Self, KvmError> {
        let vcpus = numbered(vcpus).map(|(index, vcpu)| VcpuPlan::read(vcpu, index)).collect::<Result<_, _>>()?;
        Ok(Self { host: Arc::clone(host), vcpus, devices })
    }

    /// Which in-kernel devices the machine has.
    pub fn devices(&self) -> Devices {
        self.devices
    }

    /// How many vCPUs the machine has.
    pub fn vcpu_count(&self) -> VcpuCount {
        VcpuCount::of(&self.vcpus)
    }
}

/// Something that a capture could not take along. A clone may miss it; the embedder decides whether that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Omission {
    /// The host lists this register as worth saving and then refuses to read it.
    Msr {
        /// On which vCPU.
        vcpu: VcpuIndex,
        /// Which register.
        msr: MsrIndex,
    },
    /// The guest is offered VMX or SVM, and the host refuses to hand out what a guest hypervisor keeps in KVM. Harmless
    /// as long as no guest hypervisor is running.
    NestedState {
        /// On which vCPU.
        vcpu: VcpuIndex,
    },
}

impl fmt::Display for Omission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Msr { vcpu, msr } => write!(f, "{msr} of {vcpu}: KVM_GET_MSRS refuses it"),
            Self::NestedState { vcpu } => write!(f, "nested state of {vcpu}: {} is refused", KvmCall::GetNestedState),
        }
    }
}

/// A KVM machine at one instant: every vCPU and every device that the kernel emulates.
///
/// Share it as `Arc<MachineState>`: any number of clones load from it, and loading converts and allocates nothing.
/// [`to_bytes`](Self::to_bytes) and [`from_bytes`](Self::from_bytes) are for storing it.
///
/// # What differs between a capture and a capture of its clone
/// The time stamp counter (it runs on from the captured value), a TSC deadline that passed, the LAPIC timer's current
/// count, the interval timer's load times, the paravirtual clock, and whatever a host's own MSRs count. Everything else is equal.
///
/// ```no_run
/// use offshoot::frontend::kvm::{Devices, KvmHost, MachinePlan, MachineState};
/// # fn pause_and_finish_io() {}
/// # fn example(vm: &kvm_ioctls::VmFd, vcpus: &mut [kvm_ioctls::VcpuFd],
/// #            new_vm: &kvm_ioctls::VmFd, new_vcpus: &mut [kvm_ioctls::VcpuFd]) -> Result<(), offshoot::frontend::kvm::KvmError> {
/// let host = KvmHost::open()?;
/// let plan = MachinePlan::read(&host, vcpus, Devices::FULL)?; // once per machine
/// pause_and_finish_io(); // see `finish_exit`
/// let state = MachineState::capture(&plan, vm, vcpus)?;
/// for omission in state.omissions() {
///     eprintln!("not captured: {omission}");
/// }
/// state.restore(&host, new_vm, new_vcpus)?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MachineState {
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chips: ChipState,
}

/// Kept as it is in a fork point: a clone on this host decodes nothing.
impl crate::StateObject for MachineState {
    fn encode(&self) -> Vec<u8> {
        self.to_bytes()
    }
}

impl MachineState {
    /// Reads a machine at rest: every vCPU out of `KVM_RUN` with its last exit finished
    /// (see [`finish_exit`](super::finish_exit)), and no thread raising interrupts.
    ///
    /// Costs five calls per vCPU, seven with in-kernel chips, of 1.5 to 3 µs each; and five short ones per machine. The vCPUs are borrowed
    /// mutably because one of the calls is a `KVM_RUN` that does not enter the guest.
    ///
    /// # Errors
    /// [`KvmError`] names the call that the host refused. The machine is unchanged and can run on.
    pub fn capture<V: BorrowMut<VcpuFd>>(plan: &MachinePlan, vm: &VmFd, vcpus: &mut [V]) -> Result<Self, KvmError> {
        let way = plan.host.core_way();
        Self::capture_by(plan, vm, vcpus, |vcpu, index| core::read(way, vcpu.borrow_mut(), index))
    }

    /// The same of vCPUs that must not be run, by more calls.
    pub(super) fn look(plan: &MachinePlan, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<Self, KvmError> {
        let mut vcpus: Vec<&VcpuFd> = vcpus.iter().collect();
        Self::capture_by(plan, vm, &mut vcpus, |vcpu, index| core::ask(vcpu, index))
    }

    fn capture_by<V: Borrow<VcpuFd>>(
        plan: &MachinePlan,
        vm: &VmFd,
        vcpus: &mut [V],
        mut read_core: impl FnMut(&mut V, VcpuIndex) -> Result<kvm_sync_regs, KvmError>,
    ) -> Result<Self, KvmError> {
        check_count(&plan.vcpus, vcpus)?;
        let irqchips = plan.devices.irqchips;
        // Asking for the MP state makes the kernel act on a pending INIT or SIPI: all vCPUs before any register. Without in-kernel chips
        // there is nothing to ask.
        let mp_states = match irqchips {
            Irqchips::InKernel => numbered(vcpus)
                .map(|(index, vcpu)| vcpu.get_mp_state().map_err(vcpu_error(KvmCall::GetMpState, index)))
                .collect::<Result<Vec<_>, _>>()?,
            Irqchips::Absent => vec![kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }; vcpus.len()],
        };
        let mut states = Vec::with_capacity(vcpus.len());
        for ((position, vcpu), (plan_of, mp_state)) in
            vcpus.iter_mut().enumerate().zip(plan.vcpus.iter().zip(mp_states))
        {
            let index = VcpuIndex::new(position as u32);
            let core = read_core(vcpu, index)?;
            let vcpu: &VcpuFd = (*vcpu).borrow();
            states.push(VcpuState::capture(&plan.host, plan_of, vcpu, index, irqchips, mp_state, core)?);
        }
        let chips = ChipState::capture(vm, plan.devices)?;
        Ok(Self { vcpus: states, chips })
    }

    /// Makes fresh vCPUs go on where the capture was taken: [`prepare`](Self::prepare) and then [`load`](Self::load).
    ///
    /// The guest's RAM must be registered before, with the captured content in place: some registers name guest pages.
    ///
    /// # Errors
    /// [`KvmError`] names the call that the host refused; the new machine must then be thrown away.
    pub fn restore<V: BorrowMut<VcpuFd>>(&self, host: &KvmHost, vm: &VmFd, vcpus: &mut [V]) -> Result<(), KvmError> {
        self.prepare(host, vcpus)?;
        self.load(host, vm, vcpus, Target::Fresh)
    }

    /// What can be done ahead of need, on a warm shell that waits for its fork: CPUID, and the TSC frequency where it
    /// is not the host's own. Needs no RAM. One call per vCPU.
    ///
    /// # Errors
    /// [`KvmError`] names the call that the host refused.
    pub fn prepare<V: Borrow<VcpuFd>>(&self, host: &KvmHost, vcpus: &[V]) -> Result<(), KvmError> {
        check_count(&self.vcpus, vcpus)?;
        for ((index, vcpu), state) in numbered(vcpus).zip(&self.vcpus) {
            state.prepare(host, vcpu, index)?;
        }
        Ok(())
    }

    /// Loads everything else. With [`Target::Used`] it resets a machine in place, onto the very state; its vCPUs are at rest (see
    /// [`finish_exit`](super::finish_exit)).
    ///
    /// Three calls per fresh vCPU, five per used one, two more with in-kernel chips; 1.5 to 3.5 µs each. For a fresh vCPU those are left
    /// out that would write what it holds (debug registers, XCRs, TSC deadline); a unit test checks that it does. For any, those that the
    /// kernel ignores: a TSC deadline where the timer has another mode, the MP state without in-kernel chips.
    ///
    /// # Errors
    /// [`KvmError`] names the call that the host refused; the machine must then be thrown away.
    pub fn load<V: BorrowMut<VcpuFd>>(
        &self,
        host: &KvmHost,
        vm: &VmFd,
        vcpus: &mut [V],
        target: Target,
    ) -> Result<(), KvmError> {
        check_count(&self.vcpus, vcpus)?;
        for ((position, vcpu), state) in vcpus.iter_mut().enumerate().zip(&self.vcpus) {
            state.load(host, vcpu.borrow_mut(), VcpuIndex::new(position as u32), target)?;
        }
        self.chips.load(vm)?;
        for ((index, vcpu), state) in numbered(vcpus).zip(&self.vcpus) {
            state.load_mp_state(vcpu, index)?;
        }
        Ok(())
    }

    /// The plan of a clone made from this state: the same as its parent's, without asking anything.
    pub fn plan(&self, host: &Arc<KvmHost>) -> MachinePlan {
        MachinePlan {
            host: Arc::clone(host),
            vcpus: self.vcpus.iter().map(|vcpu| vcpu.plan.clone()).collect(),
            devices: self.devices(),
        }
    }

    /// What the capture could not take along, by name. Empty is what one hopes for.
    pub fn omissions(&self) -> Vec<Omission> {
        let mut omissions = Vec::new();
        for (position, state) in self.vcpus.iter().enumerate() {
            let vcpu = VcpuIndex::new(position as u32);
            omissions.extend(state.refused_msrs().iter().map(|&msr| Omission::Msr { vcpu, msr }));
            if matches!(state.nested, Nested::Refused) {
                omissions.push(Omission::NestedState { vcpu });
            }
        }
        omissions
    }

    /// Which in-kernel devices a machine needs before it can take this state.
    pub fn devices(&self) -> Devices {
        self.chips.devices()
    }

    /// How many vCPUs a machine needs to take this state.
    pub fn vcpu_count(&self) -> VcpuCount {
        VcpuCount::of(&self.vcpus)
    }

    /// What one vCPU's guest is told about its processor.
    pub fn cpuid(&self, vcpu: VcpuIndex) -> Option<&CpuId> {
        self.vcpus.get(vcpu.get() as usize).map(|state| &*state.plan.cpuid)
    }
}

impl fmt::Debug for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineState")
            .field("vcpus", &self.vcpus.len())
            .field("devices", &self.devices())
            .field("omissions", &self.omissions())
            .finish_non_exhaustive()
    }
}

/// Whether there is a vCPU for each that is known of.
fn check_count<T, V>(known: &[T], vcpus: &[V]) -> Result<(), KvmError> {
    let (expected, given) = (VcpuCount::of(known), VcpuCount::of(vcpus));
    if expected == given { Ok(()) } else { Err(KvmError::VcpuCount { expected, given }) }
}

fn numbered<V: Borrow<VcpuFd>>(vcpus: &[V]) -> impl Iterator<Item = (VcpuIndex, &VcpuFd)> {
    vcpus.iter().enumerate().map(|(position, vcpu)| (VcpuIndex::new(position as u32), vcpu.borrow()))
}
