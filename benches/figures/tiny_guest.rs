//! A guest of two instructions on KVM: it sends a byte to a port, for ever. Must not measure.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::frontend::kvm::{
    Devices, Irqchips, KvmHost, KvmMachine, MachinePlan, Shell, ShellPool, ShellShape, VcpuCount, VcpuIndex, VmBuilder,
    finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, DeviceState, Guest, Relocate, Vm, VmName};

use super::report::{Outcome, Skip};
use super::subject::tree;

/// Real mode: `out 0x10, al; jmp` back.
const PROGRAM: [u8; 4] = [0xe6, 0x10, 0xeb, 0xfc];
const AT: u64 = 0x6000;

/// A VM of the engine's with the machine that runs it.
pub struct TinyGuest<'p> {
    pub vm: Vm<Mapped>,
    pub cpus: Cpus<'p>,
}

/// What runs it: the part that a fork pauses, saves, moves and resumes.
pub struct Cpus<'p> {
    pub machine: Option<KvmMachine>,
    pub plan: MachinePlan,
    pool: Option<&'p ShellPool>,
    next: Option<Shell>,
}

pub fn layout(size: ByteSize) -> Result<RamLayout, Skip> {
    Ok(RamLayout::flat(size, PageSize::KIB_4)?)
}

/// A machine without RAM of its own, just to read its plan: what a pool of shells needs.
pub fn shape(host: &Arc<KvmHost>, size: ByteSize, devices: Devices) -> Result<ShellShape, Skip> {
    let machine = VmBuilder::new(host)?.devices(devices)?.vcpus(VcpuCount::ONE)?;
    machine.vcpus()[0].set_cpuid2(host.supported_cpuid())?;
    Ok(ShellShape::new(&MachinePlan::read(host, machine.vcpus(), devices)?, &layout(size)?))
}

impl<'p> TinyGuest<'p> {
    /// RAM of `size` with every page written, the program in it, and a vCPU that has sent its first byte.
    pub fn start(
        host: &Arc<KvmHost>,
        size: ByteSize,
        devices: Devices,
        pool: Option<&'p ShellPool>,
    ) -> Result<Self, Skip> {
        let vm: Vm<Mapped> = Vm::new(&tree(), VmName::new("tiny")?, layout(size)?, vec![])?;
        let block = vec![0x5a; 1 << 20];
        for at in (0..size.get()).step_by(block.len()) {
            vm.ram().write(GuestAddress::new(at), &block)?;
        }
        vm.ram().write(GuestAddress::new(AT), &PROGRAM)?;
        let mut machine = VmBuilder::new(host)?.engine_ram(vm.ram())?.devices(devices)?.vcpus(VcpuCount::ONE)?;
        let vcpu = &mut machine.vcpus_mut()[0];
        vcpu.set_cpuid2(host.supported_cpuid())?;
        make_runnable(vcpu, devices)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs { rip: AT, rflags: 2, ..Default::default() })?;
        run_once(vcpu);
        let plan = MachinePlan::read(host, machine.vcpus(), devices)?;
        vm.start()?;
        Ok(Self { vm, cpus: Cpus { machine: Some(machine), plan, pool, next: None } })
    }
}

/// A vCPU beside in-kernel chips waits to be started by another one, unless it is told otherwise.
pub fn make_runnable(vcpu: &VcpuFd, devices: Devices) -> Outcome {
    if devices.irqchips == Irqchips::InKernel {
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    }
    Ok(())
}

/// Turns on 32-bit mode with flat segments and no paging.
pub fn flat(fresh: kvm_sregs) -> kvm_sregs {
    let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
    let code = kvm_segment { selector: 8, type_: 11, ..segment };
    let data = kvm_segment { selector: 16, type_: 3, ..segment };
    kvm_sregs { cs: code, ds: data, es: data, fs: data, gs: data, ss: data, cr0: 0x11, ..fresh }
}

/// To the next byte that the guest sends.
pub fn run_once(vcpu: &mut VcpuFd) {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(0x10, _)) => {}
        other => panic!("the tiny guest went astray: {other:?}"),
    }
}

impl Cpus<'_> {
    fn machine(&mut self) -> &mut KvmMachine {
        self.machine.as_mut().expect("a guest that runs has a machine")
    }

    /// To the next byte that the guest sends.
    pub fn run_once(&mut self) {
        run_once(&mut self.machine().vcpus_mut()[0]);
    }
}

impl Guest for Cpus<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(finish_exit(&mut self.machine().vcpus_mut()[0], VcpuIndex::new(0), |exit| panic!("unexpected {exit:?}"))?)
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let plan = self.plan.clone();
        let machine = self.machine();
        Ok(DeviceState::from_object(Arc::new(machine.capture(&plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.run_once();
        Ok(())
    }
}

impl Relocate for Cpus<'_> {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        let shell = self.pool.ok_or("no pool to move with")?.take()?;
        Ok(self.next.insert(shell).hole().clone())
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        let shell = self.next.take().ok_or("no shell was taken")?;
        let machine = shell.enter(ram, state.object().ok_or("saved by `save`")?)?;
        Ok(Deferred::costly(self.machine.replace(machine)))
    }
}
