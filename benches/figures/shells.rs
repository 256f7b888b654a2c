//! Machines made ahead of need: what the parent's pause costs with KVM attached, moved into a shell and in place; and what a clone costs
//! up to its first instruction, in a shell, by bare calls, cold, and the way that others do it.
#![allow(unsafe_code)] // The baselines are the bare calls.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use offshoot::frontend::kvm::{
    Devices, KvmHost, MachineState, PoolLimits, ShellCount, ShellPool, Target, VcpuCount, VcpuIndex, VmBuilder,
    finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress};
use offshoot::{CloneSpec, ForkTimings};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{needs_memory, size_name};
use super::tiny_guest::{TinyGuest, run_once, shape};

const DEVICES: [(&str, Devices); 2] = [("no chips", Devices::NONE), ("chips", Devices::FULL)];

fn host() -> Result<Arc<KvmHost>, Skip> {
    KvmHost::open().map_err(|error| Skip::new(error.to_string()))
}

fn pool(host: &Arc<KvmHost>, size: ByteSize, devices: Devices) -> Result<ShellPool, Skip> {
    let pool =
        ShellPool::new(shape(host, size, devices)?, PoolLimits { ready: ShellCount::new(8), ..PoolLimits::default() })?;
    pool.wait_filled()?;
    Ok(pool)
}

/// The parent's pause in its first fork, all of RAM resident, up to the next byte that it sends.
pub fn pause(effort: &Effort, report: &mut Report) -> Outcome {
    let host = host()?;
    let sizes = effort.pick(&[1, 2][..], &[1, 4, 8][..]);
    for (name, devices) in DEVICES {
        let mut smallest = None;
        for &gib in sizes {
            let size = ByteSize::gib(gib);
            needs_memory(size)?;
            let pool = pool(&host, size, devices)?;
            let moves = RefCell::new(Vec::new());
            let mut round = Round::new(effort);
            for way in [Way::IntoShell, Way::InPlace] {
                let (host, pool, moves) = (&host, &pool, &moves);
                round.probe(move || {
                    let timings = first_fork(host, size, devices, pool, way).expect("a fork");
                    if let Way::IntoShell = way {
                        moves.borrow_mut().push(timings);
                    }
                    timings.stopped().as_secs_f64() * 1e9
                });
            }
            let [shell, in_place] = round.run();
            let moves = moves.take();
            let stages: [(&str, StageOf); 4] = [
                ("bring to rest", |fork| fork.pause),
                ("capture", |fork| fork.save),
                ("seal and map", |fork| fork.cut),
                ("load", |fork| fork.relocate),
            ];
            for (stage, of) in stages {
                report.row(&Row {
                    case: format!("{}, {name}: into a shell, of it {stage}", size_name(size)),
                    unit: Unit::Microseconds,
                    stats: Stats::of(moves.iter().map(|fork| of(fork).as_secs_f64() * 1e9).collect()),
                    baseline: None,
                    goal: Goal::None,
                });
            }
            let smallest: Stats = *smallest.get_or_insert(shell);
            report.row(&Row {
                case: format!("{}, {name}: into a shell", size_name(size)),
                unit: Unit::Microseconds,
                stats: shell,
                baseline: Some(Baseline::new("in place: addresses stay", in_place)),
                goal: Goal::Median(150.0),
            });
            report.row(&Row {
                case: format!("{}, {name}: flat", size_name(size)),
                unit: Unit::Microseconds,
                stats: shell,
                baseline: Some(Baseline::new("the same at 1 GiB", smallest)),
                goal: Goal::Ratio(1.3),
            });
        }
    }
    Ok(())
}

/// One stage of a fork's time.
type StageOf = fn(&ForkTimings) -> Duration;

#[derive(Clone, Copy)]
enum Way {
    IntoShell,
    InPlace,
}

fn first_fork(
    host: &Arc<KvmHost>,
    size: ByteSize,
    devices: Devices,
    pool: &ShellPool,
    way: Way,
) -> Result<ForkTimings, Skip> {
    pool.wait_filled()?;
    let mut guest = TinyGuest::start(host, size, devices, Some(pool))?;
    let point = match way {
        Way::IntoShell => guest.vm.fork_relocating(&mut guest.cpus)?,
        Way::InPlace => guest.vm.fork(&mut guest.cpus)?,
    };
    point.teardown().wait();
    Ok(point.timings())
}

/// A clone from the fork point to the first byte that it sends.
pub fn spawn(effort: &Effort, report: &mut Report) -> Outcome {
    let host = host()?;
    for (name, devices) in DEVICES {
        let mut smallest = None;
        for &gib in effort.pick(&[1, 2][..], &[1, 4, 8][..]) {
            let size = ByteSize::gib(gib);
            let pool = pool(&host, size, devices)?;
            let mut parent = TinyGuest::start(&host, ByteSize::mib(16), devices, None)?;
            let state = capture(&mut parent)?;
            let vm: offshoot::Vm<offshoot::backing::Mapped> = offshoot::Vm::new(
                &super::subject::tree(),
                offshoot::VmName::new("parent")?,
                super::tiny_guest::layout(size)?,
                vec![],
            )?;
            vm.ram().write(GuestAddress::new(0x6000), &[0xe6, 0x10, 0xeb, 0xfc])?;
            vm.start()?;
            let point = vm.fork(&mut offshoot::AtRest(offshoot::DeviceState::from_object(state.clone())))?;
            point.teardown().wait();
            let file = bare_file(size)?;

            let mut round = Round::new(effort);
            let (host, pool, state, point, file) = (&host, &pool, &*state, &point, &file);
            let into_shell = move || {
                let (time, kept) = timed(|| {
                    let (clone, mut machine) = pool.spawn(point, state, CloneSpec::default()).expect("a clone");
                    run_once(&mut machine.vcpus_mut()[0]);
                    (clone, machine)
                });
                drop(kept);
                time
            };
            round.probe(move || {
                pool.wait_filled().expect("shells");
                into_shell()
            });
            round.probe(into_shell);
            round.probe(move || {
                let mut shell = BareShell::new(host, size, devices, state).expect("a bare shell");
                let (time, ()) = timed(|| shell.enter(host, file, state));
                time
            });
            round.probe(move || {
                let (time, kept) = timed(|| {
                    let clone = point.spawn(CloneSpec::default()).expect("a clone");
                    let built = VmBuilder::new(host).and_then(|vm| vm.engine_ram(clone.ram()));
                    let mut machine =
                        built.and_then(|vm| vm.devices(devices)?.vcpus(VcpuCount::ONE)).expect("a machine");
                    machine.restore(host, state).expect("a state that fits");
                    run_once(&mut machine.vcpus_mut()[0]);
                    (clone, machine)
                });
                drop(kept);
                time
            });
            round.probe(move || {
                let (time, kept) = timed(|| zeroboot_like(host, size, file, devices, state).expect("a clone"));
                drop(kept);
                time
            });
            let [shell, unattended, bare, cold, zeroboot] = round.run();
            let row = |case: &str, stats, baseline: &str, base, goal| Row {
                case: format!("{}, {name}: {case}", size_name(size)),
                unit: Unit::Microseconds,
                stats,
                baseline: Some(Baseline::new(baseline, base)),
                goal,
            };
            let smallest: Stats = *smallest.get_or_insert(shell);
            report.row(&row("into a shell", shell, "zeroboot-like", zeroboot, Goal::Median(150.0)));
            let over = Stats::exactly(shell.p50 - bare.p50);
            report.row(&row("over bare calls", over, "bare calls", bare, Goal::Median(30.0)));
            report.row(&row("flat", shell, "the same at the smallest size", smallest, Goal::Ratio(1.3)));
            report.row(&row("the pool never waited for", unattended, "bare calls", bare, Goal::None));
            report.row(&row("cold", cold, "zeroboot-like", zeroboot, Goal::None));
        }
    }
    Ok(())
}

fn capture(parent: &mut TinyGuest<'_>) -> Result<Arc<MachineState>, Skip> {
    use offshoot::Guest;
    let wrong = |error: offshoot::BoxError| Skip::new(error.to_string());
    parent.cpus.pause().map_err(wrong)?;
    let machine = parent.cpus.machine.as_mut().expect("it was started");
    Ok(Arc::new(machine.capture(&parent.cpus.plan)?))
}

/// A memory file with the program in it.
fn bare_file(size: ByteSize) -> Result<File, Skip> {
    use std::os::unix::fs::FileExt;
    let file = File::from(rustix::fs::memfd_create("bare", MemfdFlags::CLOEXEC)?);
    file.set_len(size.get())?;
    file.write_all_at(&[0xe6, 0x10, 0xeb, 0xfc], 0x6000)?;
    Ok(file)
}

/// Private RAM over a file, by one call; unmapped on drop.
struct BareRam {
    base: *mut std::ffi::c_void,
    len: usize,
}

impl BareRam {
    fn map(file: &File, size: ByteSize, at: *mut std::ffi::c_void) -> std::io::Result<Self> {
        let len = size.get() as usize;
        let fixed = if at.is_null() { MapFlags::empty() } else { MapFlags::FIXED_NOREPLACE };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
        // SAFETY: a new mapping, where nothing is mapped.
        let base = unsafe { rustix::mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, file.as_fd(), 0) }?;
        Ok(Self { base, len })
    }
}

impl Drop for BareRam {
    fn drop(&mut self) {
        // SAFETY: mapped above; the machines over it do not run any more.
        let _ = unsafe { rustix::mm::munmap(self.base, self.len) };
    }
}

fn bare_slot(vm: &VmFd, size: ByteSize, address: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size.get(),
        userspace_addr: address,
    };
    // SAFETY: the machine runs only while RAM is mapped there.
    unsafe { vm.set_user_memory_region(region) }
}

/// A shell by nothing but calls to the kernel.
struct BareShell {
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    size: ByteSize,
    hole: *mut std::ffi::c_void,
    ram: Option<BareRam>,
}

impl BareShell {
    fn new(host: &KvmHost, size: ByteSize, devices: Devices, state: &MachineState) -> Result<Self, Skip> {
        let hole = offshoot::backing::AddressHole::pick(size)?.base().as_ptr().cast();
        let vm = host.kvm().create_vm()?;
        bare_slot(&vm, size, hole as u64)?;
        bare_devices(&vm, devices)?;
        let mut vcpus = vec![vm.create_vcpu(0)?];
        state.prepare(host, &vcpus)?;
        // The baseline knows the trick too: a run that does not enter the guest.
        finish_exit(&mut vcpus[0], VcpuIndex::new(0), |_| {})?;
        Ok(Self { vcpus, vm, size, hole, ram: None })
    }

    fn enter(&mut self, host: &KvmHost, file: &File, state: &MachineState) {
        self.ram = Some(BareRam::map(file, self.size, self.hole).expect("a hole"));
        state.load(host, &self.vm, &mut self.vcpus, Target::Fresh).expect("a state that fits");
        run_once(&mut self.vcpus[0]);
    }
}

fn bare_devices(vm: &VmFd, devices: Devices) -> Result<(), kvm_ioctls::Error> {
    if devices == Devices::FULL {
        vm.set_tss_address(0xfffb_d000)?;
        vm.create_irq_chip()?;
        vm.create_pit2(kvm_bindings::kvm_pit_config::default())?;
    }
    Ok(())
}

/// Everything at the fork, in the order in which Firecracker and others do it: VM, chips, private map, slot, vCPU, state.
fn zeroboot_like(
    host: &KvmHost,
    size: ByteSize,
    file: &File,
    devices: Devices,
    state: &MachineState,
) -> Result<(Vec<VcpuFd>, VmFd, BareRam), Skip> {
    let vm = host.kvm().create_vm()?;
    bare_devices(&vm, devices)?;
    let ram = BareRam::map(file, size, std::ptr::null_mut())?;
    bare_slot(&vm, size, ram.base as u64)?;
    let mut vcpus = vec![vm.create_vcpu(0)?];
    state.restore(host, &vm, &mut vcpus)?;
    run_once(&mut vcpus[0]);
    Ok((vcpus, vm, ram))
}
