//! The KVM backend: real vCPUs over a VM whose RAM is the engine's private mappings.
//!
//! Capture and restore of the machine are the library's (`offshoot::frontend::kvm`). The guest needs no interrupts, so it gets
//! no in-kernel chips; with `Devices::FULL` in place of `Devices::NONE` it would, and nothing else would change.
//!
//! One process holds all machines, which a real VMM would not do: the kernel tells every KVM machine of a process of each
//! page that any of them gets of its own, so a page costs more the more machines there are.

mod cpu;
mod program;

use std::sync::Arc;

use kvm_ioctls::VmFd;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{
    Devices, KvmHost, KvmMachine, MachinePlan, MachineState, RamSlot, VcpuCount, VcpuIndex, VmBuilder,
};
use offshoot::page::{ByteSize, PageSize};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, DeviceState, Vm};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::common::long_mode;
use crate::guest::Lane;
use crate::hypervisor::Hypervisor;
use cpu::KvmCpu;

/// The host's KVM.
pub struct Kvm {
    host: Arc<KvmHost>,
}

/// A machine's descriptors besides those of its vCPUs. The slots keep guest memory mapped for as long as the guest can run.
pub struct Chassis {
    plan: MachinePlan,
    vm: Arc<VmFd>,
    _slots: Vec<RamSlot>,
}

impl Kvm {
    /// Opens `/dev/kvm`. An error says why it cannot be used.
    pub fn open() -> Result<Self, BoxError> {
        let host = KvmHost::open()?;
        raise_descriptor_limit();
        Ok(Self { host })
    }

    /// An empty machine over a VM's RAM.
    fn build(&self, vm: &Vm<Mapped>, devices: Devices, vcpus: VcpuCount) -> Result<KvmMachine, BoxError> {
        Ok(VmBuilder::new(&self.host)?.engine_ram(vm.ram())?.devices(devices)?.vcpus(vcpus)?)
    }
}

impl Hypervisor for Kvm {
    type Ram = Mapped;
    type Cpu = KvmCpu;
    type Chassis = Chassis;

    const NAME: &'static str = "kvm";

    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError> {
        if ram > program::MOST_RAM {
            return Err("the guest's page tables reach 128G: --ram can be at most that with --backend kvm".into());
        }
        Ok(RamLayout::flat(ram, PageSize::KIB_4)?)
    }

    fn firmware(&self, ram: ByteSize) -> Vec<(u64, Vec<u8>)> {
        program::firmware(ram)
    }

    fn power_on(&self, vm: &Vm<Mapped>, lanes: &[Lane]) -> Result<(Chassis, Vec<KvmCpu>), BoxError> {
        let machine = self.build(vm, Devices::NONE, VcpuCount::new(lanes.len() as u64))?;
        for (vcpu, lane) in machine.vcpus().iter().zip(lanes) {
            vcpu.set_cpuid2(self.host.supported_cpuid())?;
            vcpu.set_sregs(&long_mode::enter(vcpu.get_sregs()?))?;
            vcpu.set_regs(&program::entry(lane))?;
        }
        let plan = MachinePlan::read(&self.host, machine.vcpus(), Devices::NONE)?;
        Ok(assemble(machine, plan))
    }

    fn save(&self, chassis: &Chassis, cpus: &mut [&mut KvmCpu]) -> Result<DeviceState, BoxError> {
        let mut vcpus: Vec<_> = cpus.iter_mut().map(|cpu| cpu.vcpu_mut()).collect();
        let state = MachineState::capture(&chassis.plan, &chassis.vm, &mut vcpus)?;
        Ok(DeviceState::from_object(Arc::new(state)))
    }

    fn restore(&self, vm: &Vm<Mapped>, state: &DeviceState) -> Result<(Chassis, Vec<KvmCpu>), BoxError> {
        let state: &MachineState = state.object().ok_or("the state was not saved by KVM")?;
        let mut machine = self.build(vm, state.devices(), state.vcpu_count())?;
        machine.restore(&self.host, state)?;
        Ok(assemble(machine, state.plan(&self.host)))
    }
}

fn assemble(machine: KvmMachine, plan: MachinePlan) -> (Chassis, Vec<KvmCpu>) {
    let (vm, vcpus, slots) = machine.into_parts();
    let cpus = (0..).map(VcpuIndex::new).zip(vcpus).map(|(index, vcpu)| KvmCpu::new(index, vcpu)).collect();
    (Chassis { plan, vm, _slots: slots }, cpus)
}

/// Each machine takes two descriptors and more, and the usual limit of 1,024 is for programs that still use `select`: asks for
/// what this user may have. If that is too little, making a machine says so.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
