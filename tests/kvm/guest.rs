//! A machine with plain RAM: made, captured, cloned, and run for what it sends.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::frontend::kvm::{
    AnonymousRam, Devices, DirtyLog, Irqchips, KvmHost, KvmMachine, MachinePlan, MachineState, SlotNumber, VcpuCount,
    VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteOffset, ByteSize, GuestAddress};

const RAM_SIZE: ByteSize = ByteSize::mib(2);
const RAM_BYTES: usize = 2 << 20;
pub const TWO: VcpuCount = VcpuCount::new(2);

/// A port, what was written to it, and the registers after.
pub type Exit = (u16, Vec<u8>, kvm_regs);

/// A machine with its RAM.
pub struct Guest {
    ram: Arc<AnonymousRam>,
    pub machine: KvmMachine,
}

impl Guest {
    pub fn new(host: &KvmHost, devices: Devices, vcpus: VcpuCount) -> Self {
        let ram = AnonymousRam::new(RAM_SIZE).unwrap();
        let memory: Arc<AnonymousRam> = Arc::clone(&ram);
        let machine = VmBuilder::new(host)
            .and_then(|vm| vm.ram(SlotNumber::new(0), GuestAddress::ZERO, memory, DirtyLog::Off))
            .and_then(|vm| vm.devices(devices))
            .and_then(|vm| vm.vcpus(vcpus))
            .unwrap();
        Self { ram, machine }
    }

    /// A parent: CPUID set, every vCPU runnable.
    pub fn parent(host: &KvmHost, devices: Devices, vcpus: VcpuCount) -> Self {
        let guest = Self::new(host, devices, vcpus);
        for (id, vcpu) in guest.machine.vcpus().iter().enumerate() {
            vcpu.set_cpuid2(&cpuid(host, id as u32)).unwrap();
            if devices.irqchips == Irqchips::InKernel {
                vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
            }
        }
        guest
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write(ByteOffset::new(at), bytes).unwrap();
    }

    pub fn plan(&self, host: &Arc<KvmHost>, devices: Devices) -> MachinePlan {
        MachinePlan::read(host, self.machine.vcpus(), devices).unwrap()
    }

    pub fn capture(&mut self, plan: &MachinePlan) -> MachineState {
        for (position, vcpu) in self.machine.vcpus_mut().iter_mut().enumerate() {
            finish_exit(vcpu, VcpuIndex::new(position as u32), |exit| panic!("unexpected exit {exit:?}")).unwrap();
        }
        self.machine.capture(plan).unwrap()
    }

    /// A clone on a brand-new VM with a copy of the RAM.
    pub fn clone_of(host: &KvmHost, state: &MachineState, ram: &[u8]) -> Self {
        let mut clone = Self::new(host, state.devices(), state.vcpu_count());
        clone.write(0, ram);
        clone.machine.restore(host, state).unwrap();
        clone
    }

    pub fn copy_ram(&self) -> Vec<u8> {
        let mut copy = vec![0; RAM_BYTES];
        self.ram.read(ByteOffset::ZERO, &mut copy).unwrap();
        copy
    }

    pub fn vcpu(&mut self, position: usize) -> &mut VcpuFd {
        &mut self.machine.vcpus_mut()[position]
    }

    /// Runs one vCPU for a number of port writes, with the registers at each.
    pub fn trace(&mut self, position: usize, writes: usize) -> Vec<Exit> {
        let vcpu = self.vcpu(position);
        (0..writes)
            .map(|_| {
                let (port, data) = match vcpu.run().unwrap() {
                    VcpuExit::IoOut(port, data) => (port, data.to_vec()),
                    exit => panic!("unexpected exit {exit:?}"),
                };
                (port, data, vcpu.get_regs().unwrap())
            })
            .collect()
    }
}

fn cpuid(host: &KvmHost, apic_id: u32) -> CpuId {
    let mut cpuid = host.supported_cpuid().clone();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | apic_id << 24,
            0xb | 0x1f => leaf.edx = apic_id,
            _ => {}
        }
    }
    cpuid
}
