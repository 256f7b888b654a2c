//! A KVM guest that writes one word to each of so many pages, then sends a byte to a port, for ever. Must not measure.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{Devices, KvmHost, KvmMachine, MachinePlan, MachineState, VcpuCount, VmBuilder};
use offshoot::page::{ByteSize, GuestAddress};
use offshoot::{AtRest, DeviceState, ForkPoint, Vm, VmName};

use super::report::Skip;
use super::subject::{PAGE, tree};
use super::tiny_guest::{flat, layout, run_once};

const CODE: u64 = 0x6000;
/// The first page that it writes.
pub const FIRST: u64 = 0x10_0000 / PAGE;

/// 32-bit protected mode, no paging.
fn program(pages: u32) -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, pages
    code.extend(pages.to_le_bytes());
    code.push(0xbb); // mov ebx, FIRST
    code.extend(((FIRST * PAGE) as u32).to_le_bytes());
    code.extend([0x89, 0x0b]); // mov [ebx], ecx
    code.extend([0x81, 0xc3, 0x00, 0x10, 0x00, 0x00]); // add ebx, 0x1000
    code.extend([0x49, 0x75, 0xf5]); // dec ecx; jnz to the mov
    code.extend([0xe6, 0x10]); // out 0x10, al
    code.extend([0xeb, 0xe7]); // jmp to the start
    code
}

/// A fork point whose clones are to write `pages` pages as soon as they run, and the machines for them.
pub struct Toucher {
    pub host: Arc<KvmHost>,
    pub point: ForkPoint<Mapped>,
    state: Arc<MachineState>,
}

impl Toucher {
    pub fn new(size: ByteSize, pages: u64) -> Result<Self, Skip> {
        let host = KvmHost::open().map_err(|error| Skip::new(error.to_string()))?;
        let vm: Vm<Mapped> = Vm::new(&tree(), VmName::new("toucher")?, layout(size)?, vec![])?;
        let block = vec![0x5a; 1 << 20];
        for at in (0..size.get()).step_by(block.len()) {
            vm.ram().write(GuestAddress::new(at), &block)?;
        }
        vm.ram().write(GuestAddress::new(CODE), &program(u32::try_from(pages)?))?;
        let mut machine = VmBuilder::new(&host)?.engine_ram(vm.ram())?.devices(Devices::NONE)?.vcpus(VcpuCount::ONE)?;
        set_up(&host, &machine.vcpus()[0])?;
        let plan = MachinePlan::read(&host, machine.vcpus(), Devices::NONE)?;
        let state = Arc::new(machine.capture(&plan)?);
        drop(machine);
        vm.start()?;
        let point = vm.fork(&mut AtRest(DeviceState::from_object(state.clone())))?;
        point.teardown().wait();
        Ok(Self { host, point, state })
    }

    /// A machine for a clone, ready to run.
    pub fn machine(&self, clone: &Vm<Mapped>) -> Result<KvmMachine, Skip> {
        let built = VmBuilder::new(&self.host)?.engine_ram(clone.ram())?.devices(Devices::NONE)?;
        let mut machine = built.vcpus(VcpuCount::ONE)?;
        machine.restore(&self.host, &self.state)?;
        Ok(machine)
    }

    /// Has a machine's guest touch all its pages.
    pub fn run(machine: &mut KvmMachine) {
        run_once(&mut machine.vcpus_mut()[0]);
    }
}

fn set_up(host: &KvmHost, vcpu: &VcpuFd) -> Result<(), Skip> {
    vcpu.set_cpuid2(host.supported_cpuid())?;
    vcpu.set_sregs(&flat(vcpu.get_sregs()?))?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, rsp: 0x5000, ..Default::default() })?;
    Ok(())
}
