//! Reset of a KVM machine in place: the inner loop of a fuzzer, beside making the machine anew. The pages are written by the guest, the state
//! is loaded into the machine that ran, and a reset is timed from the exit that ends a run to the machine being ready for the next.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{
    Devices, DirtyLog, KvmHost, KvmMachine, MachinePlan, MachineState, Target, VcpuCount, VcpuIndex, VmBuilder,
    finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress, PageCount};
use offshoot::{BoxError, CloneSpec, DeviceState, ForkPoint, Guest, Rewind, Vm, VmName};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{PAGE, fill, needs_memory, size_name, tree};
use super::tiny_guest::{flat, layout, make_runnable};

const DIRTY: u64 = 64;
const CODE: u64 = 0x6000;

/// Flat 32-bit code that writes to `DIRTY` pages, `stride` apart, and says so.
fn program(stride: u64) -> Vec<u8> {
    let mut code = vec![0xbf, 0, 0, 0x10, 0]; // mov edi, 1 MiB
    code.extend([0xb9, DIRTY as u8, 0, 0, 0]); // mov ecx, DIRTY
    code.extend([0x89, 0x07, 0x81, 0xc7]); // next: mov [edi], eax; add edi, stride
    code.extend((stride as u32).to_le_bytes());
    code.extend([0x49, 0x75, 0xf5]); // dec ecx; jnz next
    code.extend([0xe6, 0x10, 0xeb, 0xfe]); // out 0x10, al; jmp here
    code
}

struct Cpus {
    host: Arc<KvmHost>,
    machine: KvmMachine,
    plan: MachinePlan,
}

impl Cpus {
    /// To the exit that ends a run.
    fn run(&mut self) {
        match self.machine.vcpus_mut()[0].run() {
            Ok(VcpuExit::IoOut(0x10, _)) => {}
            other => panic!("the guest went astray: {other:?}"),
        }
    }
}

impl Guest for Cpus {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(finish_exit(&mut self.machine.vcpus_mut()[0], VcpuIndex::new(0), |exit| panic!("unexpected {exit:?}"))?)
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_object(Arc::new(self.machine.capture(&self.plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Rewind for Cpus {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        Ok(self.machine.load(&self.host, state.object().ok_or("saved by `save`")?, Target::Used)?)
    }
}

/// A clone of `point` with a machine over it that is about to run.
fn spawn(
    host: &Arc<KvmHost>,
    point: &ForkPoint<Mapped>,
    devices: Devices,
    log: DirtyLog,
) -> Result<(Cpus, Vm<Mapped>), Skip> {
    let vm = point.spawn(CloneSpec::default())?;
    let state: &MachineState = point.device_state().object().ok_or_else(|| Skip::new("the state was lost"))?;
    let built = VmBuilder::new(host)?.engine_ram_with_log(vm.ram(), log)?;
    let mut machine = built.devices(devices)?.vcpus(state.vcpu_count())?;
    machine.restore(host, state)?;
    vm.start()?;
    Ok((Cpus { host: Arc::clone(host), machine, plan: state.plan(host) }, vm))
}

fn parent(host: &Arc<KvmHost>, size: ByteSize, stride: u64, devices: Devices) -> Result<ForkPoint<Mapped>, Skip> {
    let vm: Vm<Mapped> = Vm::new(&tree(), VmName::new("parent")?, layout(size)?, vec![])?;
    fill(vm.ram().space())?;
    vm.ram().write(GuestAddress::new(CODE), &program(stride))?;
    let mut machine = VmBuilder::new(host)?.engine_ram(vm.ram())?.devices(devices)?.vcpus(VcpuCount::ONE)?;
    let vcpu = &mut machine.vcpus_mut()[0];
    vcpu.set_cpuid2(host.supported_cpuid())?;
    make_runnable(vcpu, devices)?;
    vcpu.set_sregs(&flat(vcpu.get_sregs()?))?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
    let plan = MachinePlan::read(host, machine.vcpus(), devices)?;
    vm.start()?;
    let point = vm.fork(&mut Cpus { host: Arc::clone(host), machine, plan })?;
    point.teardown().wait();
    Ok(point)
}

/// What becomes of the pages that the log names.
#[derive(Clone, Copy)]
enum Put {
    Dropped,
    Copied,
}

fn put_back(vm: &Vm<Mapped>, cpus: &mut Cpus, put: Put) -> PageCount {
    let dirty = cpus.machine.take_dirty(vm.ram().layout()).expect("it has a log");
    let pages = match put {
        Put::Dropped => vm.reset_listed(cpus, &dirty),
        Put::Copied => vm.reset_copying(cpus, &dirty),
    };
    pages.expect("a state that fits")
}

pub fn vcpu(effort: &Effort, report: &mut Report) -> Outcome {
    let host = KvmHost::open().map_err(|error| Skip::new(error.to_string()))?;
    let size = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(size)?;
    let mib_2 = 2 << 20;
    for (chips, devices) in [("", Devices::NONE), (", chips", Devices::FULL)] {
        for (place, stride) in [("together", PAGE), ("scattered", mib_2.min(size.get() / (2 * DIRTY)))] {
            let point = parent(&host, size, stride, devices)?;
            // One machine for both ways: the kernel tells every machine of a process of each page that is dropped.
            let (cpus, vm) = spawn(&host, &point, devices, DirtyLog::On)?;
            let (cpus, ram) = (std::cell::RefCell::new(cpus), vm.ram().layout());
            // What the kernel noted while the state was loaded.
            cpus.borrow().machine.take_dirty(ram)?;
            let mut round = Round::new(effort);
            round.probe(|| {
                let cpus = &mut *cpus.borrow_mut();
                cpus.run();
                let (time, pages) = timed(|| put_back(&vm, cpus, Put::Dropped));
                assert_eq!(pages.get(), DIRTY, "the log names what the guest wrote");
                time
            });
            round.probe(|| {
                let cpus = &mut *cpus.borrow_mut();
                cpus.run();
                let (time, pages) = timed(|| vm.reset(cpus).expect("a state that fits"));
                assert_eq!(pages.get(), DIRTY, "the scan finds what the guest wrote");
                cpus.machine.take_dirty(ram).expect("it has a log");
                time
            });
            round.probe(|| {
                let again = || spawn(&host, &point, devices, DirtyLog::Off).expect("a machine");
                let mut machine = again();
                machine.0.run();
                let (time, made) = timed(|| {
                    drop(machine);
                    again()
                });
                drop(made);
                time
            });
            round.probe(|| {
                let cpus = &mut *cpus.borrow_mut();
                cpus.run();
                let (time, pages) = timed(|| put_back(&vm, cpus, Put::Copied));
                assert_eq!(pages.get(), DIRTY, "the log names what the guest wrote");
                time
            });
            // A run meets what the reset before it left, so the turn before the one that is timed is of the same kind.
            for put in [Put::Copied, Put::Dropped] {
                let (vm, cpus) = (&vm, &cpus);
                round.probe(move || {
                    let cpus = &mut *cpus.borrow_mut();
                    let mut turn = || {
                        cpus.run();
                        put_back(vm, cpus, put)
                    };
                    turn();
                    timed(turn).0
                });
            }
            round.probe(|| {
                let again = || spawn(&host, &point, devices, DirtyLog::Off).expect("a machine");
                let mut machine = again();
                let (time, made) = timed(|| {
                    machine.0.run();
                    drop(machine);
                    again()
                });
                drop(made);
                time
            });
            let [listed, scanned, respawn, copied, turn_copied, turn_dropped, turn_respawned] = round.run();
            for (way, stats) in [("copied back", turn_copied), ("dropped", turn_dropped)] {
                report.row(&Row {
                    case: format!("run to {DIRTY} pages {place}{chips}, and reset from the log: {way}"),
                    unit: Unit::Microseconds,
                    stats,
                    baseline: Some(Baseline::new("run, drop, spawn, make, load", turn_respawned)),
                    goal: Goal::None,
                });
            }
            for (way, stats) in [("from the log", listed), ("copied back", copied), ("by a scan", scanned)] {
                report.row(&Row {
                    case: format!("{DIRTY} pages {place}{chips}, {way}, {}", size_name(size)),
                    unit: Unit::Microseconds,
                    stats,
                    baseline: Some(Baseline::new("drop, spawn, make, load", respawn)),
                    goal: Goal::Median(25.0),
                });
                report.row(&Row {
                    case: format!("{DIRTY} pages {place}{chips}, {way}: rate"),
                    unit: Unit::PerSecond,
                    stats: per_second(stats),
                    baseline: Some(Baseline::new("drop, spawn, make, load: rate", per_second(respawn))),
                    goal: Goal::None,
                });
            }
        }
    }
    Ok(())
}

/// How many fit into a second.
fn per_second(stats: Stats) -> Stats {
    Stats { p50: 1e9 / stats.p50, p99: 1e9 / stats.p99 }
}
