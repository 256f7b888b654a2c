//! A KVM machine with one vCPU over a VM's RAM.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use kvm_ioctls::VcpuFd;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{Devices, Irqchips, KvmHost, KvmMachine, VcpuCount, VmBuilder};
use offshoot::ram::Ram;

/// The host's KVM; `None` where there is none, which is told.
pub fn kvm_host() -> Option<Arc<KvmHost>> {
    KvmHost::open().map_err(offshoot::testing::skip).ok()
}

/// One that was never run: its vCPU has its CPUID and may run.
pub fn machine(host: &KvmHost, ram: &Ram<Mapped>, devices: Devices) -> KvmMachine {
    let built = VmBuilder::new(host).and_then(|vm| vm.engine_ram(ram)).and_then(|vm| vm.devices(devices));
    let machine = built.and_then(|vm| vm.vcpus(VcpuCount::ONE)).expect("a machine");
    let vcpu = &machine.vcpus()[0];
    vcpu.set_cpuid2(host.supported_cpuid()).expect("the host's own CPUID");
    if devices.irqchips == Irqchips::InKernel {
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).expect("a vCPU that runs");
    }
    machine
}

/// Puts a vCPU at the beginning of a program in real mode.
pub fn start_in_real_mode(vcpu: &VcpuFd, code: u64) {
    let mut sregs = vcpu.get_sregs().expect("special registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).expect("special registers");
    vcpu.set_regs(&kvm_regs { rip: code, rflags: 2, rsp: 0x5000, ..Default::default() }).expect("registers");
}
