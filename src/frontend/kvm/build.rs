//! Creating a machine in the order that is fast: memory slots, then chips, then vCPUs.
//!
//! It knows how to create, not what to load.

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};

use super::call::KvmCall;
use super::chips::{Devices, Irqchips, Pit};
use super::count::VcpuCount;
use super::dirty;
use super::error::KvmError;
use super::host::KvmHost;
use super::machine::{MachinePlan, MachineState};
use super::ram::{DirtyLog, HostMemory, RamSlot, SlotNumber};
use super::vcpu::{Target, VcpuIndex};
use super::{machine_error, vcpu_error};
use crate::backing::Mapped;
use crate::page::{GuestAddress, PageSet, PageSize};
use crate::ram::{Ram, RamLayout};

/// Where Intel hosts that cannot run real mode directly keep three pages of their own: below the BIOS, as other VMMs
/// have it.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A machine being created, while memory slots are still cheap.
///
/// The types enforce the order: slots can only be registered here, [`devices`](Self::devices) ends that, and vCPUs come
/// last. A slot registered after the interrupt chips and timer exist costs some 8 ms (a grace period inside the kernel),
/// before them 0.3 ms.
pub struct VmBuilder {
    vm: Arc<VmFd>,
    slots: Vec<RamSlot>,
}

impl VmBuilder {
    /// Creates an empty machine. One call.
    ///
    /// # Errors
    /// [`KvmError::Machine`] with `KVM_CREATE_VM`.
    pub fn new(host: &KvmHost) -> Result<Self, KvmError> {
        let vm = host.kvm().create_vm().map_err(machine_error(KvmCall::CreateVm))?;
        Ok(Self { vm: Arc::new(vm), slots: Vec::new() })
    }

    /// Registers all of `memory` at a guest-physical address. One call.
    ///
    /// # Errors
    /// As [`RamSlot::register`].
    pub fn ram(
        mut self,
        number: SlotNumber,
        at: GuestAddress,
        memory: Arc<dyn HostMemory>,
        log: DirtyLog,
    ) -> Result<Self, KvmError> {
        self.slots.push(RamSlot::register(&self.vm, number, at, memory, log)?);
        Ok(self)
    }

    /// Registers every region of an engine VM's RAM, as slots from 0 up. One call a region. The addresses are stable, so the slots stay
    /// right through forks in place and resets, for which the vCPUs must be paused; a fork that moves RAM needs a
    /// [`Shell`](super::Shell); the slots keep the memory mapped even if the VM goes first.
    ///
    /// # Errors
    /// As [`RamSlot::register`], and [`KvmError::Ram`].
    pub fn engine_ram(self, ram: &Ram<Mapped>) -> Result<Self, KvmError> {
        self.engine_ram_with_log(ram, DirtyLog::Off)
    }

    /// The same, with or without a log of the pages that the guest writes: see [`KvmMachine::take_dirty`].
    ///
    /// # Errors
    /// As [`VmBuilder::engine_ram`].
    pub fn engine_ram_with_log(mut self, ram: &Ram<Mapped>, log: DirtyLog) -> Result<Self, KvmError> {
        for (region, offset) in ram.layout().regions() {
            let kept = ram.space().keep(offset, region.len).map_err(KvmError::Ram)?;
            let number = SlotNumber::new(self.slots.len() as u32);
            self.slots.push(RamSlot::register(&self.vm, number, region.start, Arc::new(kept), log)?);
        }
        Ok(self)
    }

    /// Creates the in-kernel devices. Up to three calls.
    ///
    /// # Errors
    /// [`KvmError::Machine`] names the call that the host refused.
    pub fn devices(self, devices: Devices) -> Result<VmWithDevices, KvmError> {
        create_devices(&self.vm, devices)?;
        Ok(VmWithDevices { vm: self.vm, slots: self.slots })
    }
}

/// Creates the in-kernel devices of a machine that has its memory slots and no vCPU yet.
pub(super) fn create_devices(vm: &VmFd, devices: Devices) -> Result<(), KvmError> {
    if devices.irqchips == Irqchips::InKernel {
        vm.set_tss_address(TSS_ADDRESS).map_err(machine_error(KvmCall::SetTssAddr))?;
        vm.create_irq_chip().map_err(machine_error(KvmCall::CreateIrqchip))?;
    }
    if devices.pit == Pit::InKernel {
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(config).map_err(machine_error(KvmCall::CreatePit2))?;
    }
    Ok(())
}

/// A machine being created, with its memory and devices: only the vCPUs are missing.
pub struct VmWithDevices {
    vm: Arc<VmFd>,
    slots: Vec<RamSlot>,
}

impl VmWithDevices {
    /// Creates vCPUs with ids from 0. One call and one mapping each.
    ///
    /// # Errors
    /// [`KvmError::Vcpu`] with `KVM_CREATE_VCPU`.
    pub fn vcpus(self, count: VcpuCount) -> Result<KvmMachine, KvmError> {
        let vcpus = (0..count.get())
            .map(|id| {
                let index = VcpuIndex::new(id as u32);
                self.vm.create_vcpu(id).map_err(vcpu_error(KvmCall::CreateVcpu, index))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(KvmMachine { vcpus, slots: self.slots, vm: self.vm })
    }
}

/// A machine: its descriptors and its memory.
pub struct KvmMachine {
    vcpus: Vec<VcpuFd>,
    slots: Vec<RamSlot>,
    vm: Arc<VmFd>,
}

impl KvmMachine {
    pub(super) fn from_parts(vm: Arc<VmFd>, vcpus: Vec<VcpuFd>, slots: Vec<RamSlot>) -> Self {
        Self { vcpus, slots, vm }
    }

    /// The VM's descriptor.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The vCPUs, in the order of their ids.
    pub fn vcpus(&self) -> &[VcpuFd] {
        &self.vcpus
    }

    /// The vCPUs, to run them.
    pub fn vcpus_mut(&mut self) -> &mut [VcpuFd] {
        &mut self.vcpus
    }

    /// The VM's descriptor and the vCPUs, to capture and load them: see [`MachineState`].
    pub fn parts_mut(&mut self) -> (&VmFd, &mut [VcpuFd]) {
        (&self.vm, &mut self.vcpus)
    }

    /// [`MachineState::capture`] of the whole machine.
    ///
    /// # Errors
    /// As there.
    pub fn capture(&mut self, plan: &MachinePlan) -> Result<MachineState, KvmError> {
        MachineState::capture(plan, &self.vm, &mut self.vcpus)
    }

    /// [`MachineState::load`] into the whole machine.
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self, host: &KvmHost, state: &MachineState, target: Target) -> Result<(), KvmError> {
        state.load(host, &self.vm, &mut self.vcpus, target)
    }

    /// [`MachineState::restore`] into the whole machine, which must be fresh.
    ///
    /// # Errors
    /// As there.
    pub fn restore(&mut self, host: &KvmHost, state: &MachineState) -> Result<(), KvmError> {
        state.restore(host, &self.vm, &mut self.vcpus)
    }

    /// The pages of RAM that the guest wrote since this was last asked: what [`Vm::reset_listed`](crate::Vm::reset_listed) wants, once the
    /// pages are added that this process wrote itself. For machines whose slots are `ram`'s, with a log. The vCPUs must be paused.
    ///
    /// Costs by RAM, 3.5 µs per GiB here, where a scan of the page tables costs by what the guest has ever touched. See `docs/design.md`,
    /// Reset.
    ///
    /// # Errors
    /// As [`RamSlot::take_dirty`]; [`KvmError::ForeignSlot`]. Nothing is lost: the next call gives it.
    pub fn take_dirty(&self, ram: &RamLayout) -> Result<PageSet, KvmError> {
        let place = |slot: &RamSlot| ram.locate(slot.guest_address(), slot.size());
        if let Some(foreign) = self.slots.iter().find(|slot| place(slot).is_err()) {
            return Err(KvmError::ForeignSlot { slot: foreign.number() });
        }
        self.slots.iter().try_for_each(RamSlot::fetch_dirty)?;
        let size = ram.geometry().page_size().bytes().get() / PageSize::KIB_4.bytes().get();
        let mut placed: Vec<_> = self.slots.iter().filter_map(|slot| Some((place(slot).ok()?, slot))).collect();
        placed.sort_by_key(|(offset, _)| *offset);
        let mut dirty = PageSet::new();
        for (offset, slot) in placed {
            dirty::append(&mut dirty, &slot.fetched(), PageSize::KIB_4.page_of(offset).get(), size);
        }
        Ok(dirty)
    }

    /// The memory slots.
    pub fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// The parts, for a VMM that runs each vCPU on a thread of its own. The slots take their memory away from the guest
    /// when they are dropped: keep them for as long as the guest runs.
    pub fn into_parts(self) -> (Arc<VmFd>, Vec<VcpuFd>, Vec<RamSlot>) {
        (self.vm, self.vcpus, self.slots)
    }
}
