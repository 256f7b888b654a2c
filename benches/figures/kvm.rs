//! A KVM clone from nothing to its first guest instruction, against the same system calls made bare. Linux on x86-64.
#![allow(unsafe_code)] // Bare KVM calls name host memory by address.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{
    Devices, KvmHost, KvmMachine, MachinePlan, MachineState, VcpuCount, VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress};
use offshoot::{BoxError, CloneSpec, DeviceState, Guest, Vm};

use super::bare::{View, filled_memfd};
use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, timed};
use super::subject::{needs_memory, running, size_name};

/// Real mode, again and again: `out 0x10, al`.
const CODE: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
const CODE_AT: u64 = 0x6000;

/// The parent: a machine at rest whose next instruction is the guest's.
struct Parent {
    plan: MachinePlan,
    machine: KvmMachine,
}

impl Guest for Parent {
    fn pause(&mut self) -> Result<(), BoxError> {
        finish_exit(&mut self.machine.vcpus_mut()[0], VcpuIndex::new(0), |_| {})?;
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let state = self.machine.capture(&self.plan)?;
        Ok(DeviceState::from_object(Arc::new(state)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

fn run_to_exit(vcpu: &mut VcpuFd) {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(0x10, _)) => {}
        other => panic!("the guest writes to a port and does nothing else: {other:?}"),
    }
}

fn set_up(host: &KvmHost, vcpu: &VcpuFd) -> Outcome {
    vcpu.set_cpuid2(host.supported_cpuid())?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE_AT, rflags: 2, rsp: 0x5000, ..Default::default() })?;
    Ok(())
}

/// What the bare sequence loads: the same registers, as the kernel's structures.
struct BareState {
    cpuid: CpuId,
    sregs: kvm_sregs,
    regs: kvm_regs,
    xsave: kvm_xsave,
    msrs: Msrs,
}

impl BareState {
    fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, Skip> {
        let mut entries = Vec::new();
        let list = kvm.get_msr_index_list()?;
        // The kernel's list leaves out the memory type ranges, which a clone cannot do without.
        let ranges = (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff]);
        for index in list.as_slice().iter().copied().chain(ranges) {
            let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
            if matches!(vcpu.get_msrs(&mut one), Ok(1)) && matches!(vcpu.set_msrs(&one), Ok(1)) {
                entries.extend_from_slice(one.as_slice());
            }
        }
        Ok(Self {
            cpuid: vcpu.get_cpuid2(256)?,
            sregs: vcpu.get_sregs()?,
            regs: vcpu.get_regs()?,
            xsave: vcpu.get_xsave()?,
            msrs: Msrs::from_entries(&entries)?,
        })
    }
}

/// The calls that any VMM must make, and nothing else.
fn bare_clone(kvm: &Kvm, file: &File, len: ByteSize, state: &BareState) -> Result<(VcpuFd, VmFd, View), Skip> {
    let ram = View::private(file, len)?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: len.get(),
        userspace_addr: ram.base().addr().get() as u64,
        ..Default::default()
    };
    // SAFETY: the view is dropped after the VM, see the order of the result, and nobody has references into it.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&state.cpuid)?;
    vcpu.set_sregs(&state.sregs)?;
    vcpu.set_regs(&state.regs)?;
    // SAFETY: the structure came from `get_xsave` of this host, which gives as much as this host takes.
    unsafe { vcpu.set_xsave(&state.xsave) }?;
    if vcpu.set_msrs(&state.msrs)? != state.msrs.as_slice().len() {
        return Err(Skip::new("the host refuses a register that it took before"));
    }
    run_to_exit(&mut vcpu);
    Ok((vcpu, vm, ram))
}

fn engine_clone(
    host: &KvmHost,
    point: &offshoot::ForkPoint<Mapped>,
    state: &MachineState,
) -> Result<(KvmMachine, Vm<Mapped>), Skip> {
    let clone = point.spawn(CloneSpec::default())?;
    let mut machine =
        VmBuilder::new(host)?.engine_ram(clone.ram())?.devices(state.devices())?.vcpus(state.vcpu_count())?;
    machine.restore(host, state)?;
    run_to_exit(&mut machine.vcpus_mut()[0]);
    Ok((machine, clone))
}

pub fn first_instruction(effort: &Effort, report: &mut Report) -> Outcome {
    let host = KvmHost::open().map_err(|error| Skip::new(format!("no KVM here: {error}")))?;
    for len in [ByteSize::mib(64), effort.pick(ByteSize::mib(256), ByteSize::gib(1))] {
        needs_memory(ByteSize::new(2 * len.get()))?;
        let vm: Vm<Mapped> = running(len)?;
        vm.ram().write(GuestAddress::new(CODE_AT), CODE)?;
        let mut machine = VmBuilder::new(&host)?.engine_ram(vm.ram())?.devices(Devices::NONE)?.vcpus(VcpuCount::ONE)?;
        set_up(&host, &machine.vcpus()[0])?;
        run_to_exit(&mut machine.vcpus_mut()[0]);
        let plan = MachinePlan::read(&host, machine.vcpus(), Devices::NONE)?;
        let mut parent = Parent { plan, machine };
        let point = vm.fork(&mut parent)?;
        let state = point.device_state().object::<MachineState>().ok_or_else(|| Skip::new("the state was lost"))?;

        let file = filled_memfd(len)?;
        file.write_all_at(CODE, CODE_AT)?;
        let bare_state = BareState::of(host.kvm(), &parent.machine.vcpus()[0])?;
        let mut round = Round::new(effort);
        round.probe(|| {
            let (time, made) = timed(|| engine_clone(&host, &point, state));
            made.map(drop).expect("a clone that runs");
            time
        });
        round.probe(|| {
            let (time, made) = timed(|| bare_clone(host.kvm(), &file, len, &bare_state));
            made.map(drop).expect("a machine that runs");
            time
        });
        let [clone, bare] = round.run();
        report.row(&Row {
            case: format!("1 vCPU, no chips, {} resident", size_name(len)),
            unit: Unit::Microseconds,
            stats: clone,
            baseline: Some(Baseline::new("the same system calls, bare", bare)),
            goal: Goal::Ratio(1.1),
        });
    }
    Ok(())
}
