//! A KVM guest that is saved to disk and brought back in another process, where it runs on from the tick at which it was cut: it counts in a register
//! and in RAM, so that a write or an instruction lost or repeated is seen at once.
//!
//! Where `/dev/kvm` is missing the test says so and passes, unless OFFSHOOT_REQUIRE=all is set: then it fails.
#![cfg(all(feature = "kvm", feature = "store", target_os = "linux", target_arch = "x86_64"))]

mod saved;

use std::process::Command;
use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use kvm_ioctls::VcpuExit;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{
    Devices, Irqchips, KvmHost, KvmMachine, MachinePlan, MachineState, VcpuCount, VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::store::{CloneStore, Job, StoreOptions};
use offshoot::{BoxError, CloneSpec, DeviceState, ForkPoint, Guest, Reading, Tree, Vm, VmName};
use saved::{Temp, load, name, open, save, threads};

/// Real mode. Counts in ecx and in RAM, writes the count to one of 128 pages, sends what is in RAM.
const COUNTING: &[u8] = &[
    0x66, 0x41, // inc ecx
    0x66, 0xff, 0x06, 0x00, 0x80, // inc dword [0x8000]
    0x66, 0xa1, 0x00, 0x80, // mov eax, [0x8000]
    0x88, 0xcf, // mov bh, cl
    0x80, 0xe7, 0x7f, // and bh, 0x7f
    0xb3, 0x00, // mov bl, 0
    0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
    0x8e, 0xc3, // mov es, bx
    0x26, 0x66, 0x89, 0x0e, 0x00, 0x00, // mov es:[0], ecx
    0x66, 0xe7, 0x10, // out 0x10, eax
    0xeb, 0xdd, // jmp start
];
const CODE: u64 = 0x6000;
const COUNT: u64 = 0x8000;
const KINDS: [(&str, Devices); 2] = [("bare", Devices::NONE), ("with chips", Devices::FULL)];

fn host() -> Option<Arc<KvmHost>> {
    match KvmHost::open() {
        Ok(host) => Some(host),
        Err(error) => {
            let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
            assert!(!required, "OFFSHOOT_REQUIRE=all, but KVM is missing: {error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

fn ram() -> RamLayout {
    let region = |start, len| RamRegion { start: GuestAddress::new(start), len };
    RamLayout::new(&[region(0, ByteSize::mib(2)), region(64 << 20, ByteSize::mib(1))], PageSize::KIB_4).unwrap()
}

struct Cpu {
    machine: KvmMachine,
    plan: MachinePlan,
}

impl Cpu {
    fn run(&mut self, steps: u32, mut count: u32) -> u32 {
        for _ in 0..steps {
            count += 1;
            let vcpu = &mut self.machine.vcpus_mut()[0];
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x10, data) => assert_eq!(u32::from_le_bytes(data.try_into().unwrap()), count),
                other => panic!("the guest went astray: {other:?}"),
            }
            assert_eq!(vcpu.get_regs().unwrap().rcx, u64::from(count));
        }
        count
    }
}

impl Guest for Cpu {
    fn pause(&mut self) -> Result<(), BoxError> {
        let vcpu = &mut self.machine.vcpus_mut()[0];
        Ok(finish_exit(vcpu, VcpuIndex::new(0), |exit| panic!("unexpected exit {exit:?}"))?)
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_object(Arc::new(self.machine.capture(&self.plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

fn built(host: &Arc<KvmHost>, vm: &Vm<Mapped>, devices: Devices) -> KvmMachine {
    VmBuilder::new(host).unwrap().engine_ram(vm.ram()).unwrap().devices(devices).unwrap().vcpus(VcpuCount::ONE).unwrap()
}

fn counting(host: &Arc<KvmHost>, devices: Devices) -> (Vm<Mapped>, Cpu) {
    let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("counting").unwrap(), ram(), vec![]).unwrap();
    vm.ram().write(GuestAddress::new(CODE), COUNTING).unwrap();
    let mut machine = built(host, &vm, devices);
    let vcpu = &mut machine.vcpus_mut()[0];
    vcpu.set_cpuid2(host.supported_cpuid()).unwrap();
    if devices.irqchips == Irqchips::InKernel {
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    }
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, rsp: 0x5000, ..Default::default() }).unwrap();
    let plan = MachinePlan::read(host, machine.vcpus(), devices).unwrap();
    vm.start().unwrap();
    (vm, Cpu { machine, plan })
}

/// A clone of a fork point that came from disk: its vCPU goes on at `count`, and so does what is in RAM.
fn runs_on(host: &Arc<KvmHost>, point: &ForkPoint<Mapped>, devices: Devices, count: u32) -> (Vm<Mapped>, Cpu) {
    let clone = point.spawn(CloneSpec::default()).unwrap();
    let load = |at: u64| clone.ram().load::<u32>(GuestAddress::new(at)).unwrap();
    assert_eq!(load(COUNT), count);
    (1..=count).rev().take(128).for_each(|n| assert_eq!(load(0x10000 + u64::from(n & 0x7f) * 4096), n));
    let state = MachineState::from_bytes(&clone.device_state().unwrap().encode()).unwrap();
    let mut machine = built(host, &clone, devices);
    machine.restore(host, &state).unwrap();
    clone.start().unwrap();
    let plan = MachinePlan::read(host, machine.vcpus(), devices).unwrap();
    let mut cpu = Cpu { machine, plan };
    cpu.run(300, count);
    assert_eq!(clone.ram().load::<u32>(GuestAddress::new(COUNT)).unwrap(), count + 300);
    (clone, cpu)
}

#[test]
fn a_guest_runs_on_from_its_tick_in_another_process() {
    let Some(host) = host() else { return };
    let temp = Temp::new("kvm");
    let store = open(&temp);
    for (text, devices) in KINDS {
        let (vm, mut cpu) = counting(&host, devices);
        cpu.run(200, 0);
        let first = vm.fork(&mut cpu).unwrap();
        save(&first, &store, &format!("{text}, first"));
        let count = cpu.run(50, 200);
        let second = vm.fork(&mut cpu).unwrap();
        // The guest runs on while it is saved.
        std::thread::scope(|scope| {
            let saving = scope.spawn(|| {
                let text = name(&format!("{text}, second"));
                second.save_since(&first, &store, &text, &threads(2), &Job::new()).unwrap();
            });
            cpu.run(500, count);
            saving.join().unwrap();
        });
    }
    drop(store);
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "the_other_process", "--ignored", "--quiet"]).env("OFFSHOOT_CHILD_DIR", &temp.0);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
#[ignore = "the other process of a test"]
fn the_other_process() {
    let Ok(dir) = std::env::var("OFFSHOOT_CHILD_DIR") else { return };
    let host = host().expect("the parent has it");
    let store = CloneStore::open(dir, StoreOptions::default()).unwrap();
    for (text, devices) in KINDS {
        for (which, count) in [("first", 200), ("second", 250)] {
            let point: ForkPoint<Mapped> = load(&store, &format!("{text}, {which}"), Reading::Now);
            // Two of one fork point; and one of a fork of the first.
            let (clone, mut cpu) = runs_on(&host, &point, devices, count);
            runs_on(&host, &point, devices, count);
            let next = clone.fork(&mut cpu).unwrap();
            let again = name("again");
            next.save_since(&point, &store, &again, &threads(1), &Job::new()).unwrap();
            runs_on(&host, &load(&store, "again", Reading::Now), devices, count + 300);
            store.delete(&again).unwrap();
        }
    }
}
