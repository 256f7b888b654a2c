//! The KVM backend: a vCPU over the engine's RAM, whose slots log what the guest writes.

mod program;

use std::sync::Arc;

use kvm_ioctls::VcpuExit;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{
    Devices, DirtyLog, KvmHost, KvmMachine, MachinePlan, MachineState, MsrIndex, Part, Target, VcpuCount, VcpuIndex,
    VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, PageCount, PageSet, PageSize};
use offshoot::ram::{Ram, RamLayout};
use offshoot::{BoxError, DeviceState, Guest, Rewind, Vm};

use crate::common::long_mode;
use crate::guest::{Bell, gap};
use crate::machine::{Cpu, Hypervisor, Timed};

/// The host's KVM.
pub struct Kvm {
    host: Arc<KvmHost>,
}

/// A machine with one vCPU.
pub struct KvmCpu {
    host: Arc<KvmHost>,
    plan: MachinePlan,
    machine: KvmMachine,
}

impl Kvm {
    /// Opens `/dev/kvm`. An error says why it cannot be used.
    pub fn open() -> Result<Self, BoxError> {
        Ok(Self { host: KvmHost::open()? })
    }

    fn build(&self, vm: &Vm<Mapped>) -> Result<KvmMachine, BoxError> {
        let slots = VmBuilder::new(&self.host)?.engine_ram_with_log(vm.ram(), DirtyLog::On)?;
        Ok(slots.devices(Devices::NONE)?.vcpus(VcpuCount::ONE)?)
    }
}

impl Hypervisor for Kvm {
    type Ram = Mapped;
    type Cpu = KvmCpu;

    const NAME: &'static str = "kvm";

    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError> {
        Ok(RamLayout::flat(ram, PageSize::KIB_4)?)
    }

    fn firmware(&self, ram: ByteSize) -> Vec<(u64, Vec<u8>)> {
        let mut pages = long_mode::page_tables(ram);
        pages.push(program::code());
        pages
    }

    fn power_on(&self, vm: &Vm<Mapped>) -> Result<KvmCpu, BoxError> {
        let machine = self.build(vm)?;
        let vcpu = &machine.vcpus()[0];
        vcpu.set_cpuid2(self.host.supported_cpuid())?;
        vcpu.set_sregs(&long_mode::enter(vcpu.get_sregs()?))?;
        vcpu.set_regs(&program::entry(gap(vm.ram().layout().geometry().len())))?;
        let plan = MachinePlan::read(&self.host, machine.vcpus(), Devices::NONE)?;
        Ok(KvmCpu { host: self.host.clone(), plan, machine })
    }

    fn restore(&self, vm: &Vm<Mapped>, state: &DeviceState) -> Result<KvmCpu, BoxError> {
        let state: &MachineState = state.object().ok_or("the state was not saved by KVM")?;
        let mut machine = self.build(vm)?;
        machine.restore(&self.host, state)?;
        Ok(KvmCpu { host: self.host.clone(), plan: state.plan(&self.host), machine })
    }

    /// KVM's log names what the guest wrote, so nothing has to be looked for; and one input writes about the same pages as the next, so their
    /// bytes are copied back rather than the pages dropped, to be made anew by as many faults.
    fn reset(&self, vm: &Vm<Mapped>, cpu: &mut Timed<KvmCpu>, by_host: &PageSet) -> Result<PageCount, BoxError> {
        let by_guest = cpu.cpu.machine.take_dirty(vm.ram().layout())?;
        Ok(vm.reset_copying(cpu, &by_guest.union(by_host))?)
    }
}

impl Guest for KvmCpu {
    fn pause(&mut self) -> Result<(), BoxError> {
        let mut unexpected = None;
        let vcpu = &mut self.machine.vcpus_mut()[0];
        finish_exit(vcpu, VcpuIndex::new(0), |exit| unexpected = Some(format!("one bell rang twice: {exit:?}")))?;
        unexpected.map_or(Ok(()), |what| Err(what.into()))
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_object(Arc::new(self.machine.capture(&self.plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Rewind for KvmCpu {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        let state: &MachineState = state.object().ok_or("the state was not saved by KVM")?;
        Ok(self.machine.load(&self.host, state, Target::Used)?)
    }
}

impl Cpu<Mapped> for KvmCpu {
    fn run(&mut self, _: &Ram<Mapped>) -> Result<Bell, BoxError> {
        match self.machine.vcpus_mut()[0].run()? {
            VcpuExit::IoOut(port, _) => {
                Ok(Bell::from_number(port.into()).ok_or_else(|| format!("the guest rang bell {port:#x}"))?)
            }
            exit => Err(format!("the guest stopped: {exit:?}").into()),
        }
    }

    fn differs(&mut self, from: &DeviceState) -> Result<Option<String>, BoxError> {
        let from: &MachineState = from.object().ok_or("the state was not saved by KVM")?;
        let mut differences = from.differences(&self.machine.capture(&self.plan)?);
        differences.retain(|difference| difference.part != Part::Msr(MsrIndex::TSC));
        Ok(differences.first().map(ToString::to_string))
    }
}
