//! Shells, their pool, and KVM guests that move: a tiny guest counts in RAM and in a register, and says so at a port, so that a
//! write or an instruction lost or repeated is seen at once.
//!
//! Where `/dev/kvm` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::machine::{kvm_host, machine, start_in_real_mode};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::frontend::kvm::{
    Devices, KvmHost, KvmMachine, MachinePlan, MachineState, MsrIndex, Part, PoolLimits, PoolStats, Shell, ShellCount,
    ShellError, ShellPool, ShellShape, VcpuCount, VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{
    AtRest, BoxError, CloneSpec, DeviceState, ForkError, ForkPoint, Guest, Relocate, Tree, Vm, VmName, VmStatus,
};

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

/// These tests count what the process holds: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn layout() -> RamLayout {
    let region = |start, len| RamRegion { start: GuestAddress::new(start), len };
    RamLayout::new(&[region(0, ByteSize::mib(2)), region(64 << 20, ByteSize::mib(1))], PageSize::KIB_4).unwrap()
}

/// Descriptors and mappings of the engine's and of KVM's in this process.
fn held() -> (usize, usize) {
    let ours = |name: &str| name.contains("offshoot") || name.contains("kvm-v");
    let links =
        std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let descriptors = links.filter(|link| ours(&link.to_string_lossy())).count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (descriptors, maps.lines().filter(|line| ours(line)).count())
}

/// Runs to the next port write and returns what was sent.
fn next_count(vcpu: &mut VcpuFd) -> u32 {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, data) => u32::from_le_bytes(data.try_into().unwrap()),
        other => panic!("the guest went astray: {other:?}"),
    }
}

/// Where the guest is to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fail {
    Nothing,
    NextHole,
    /// With the shell untouched.
    BeforeEntering,
    /// With the state loaded in the shell.
    AfterEntering,
    /// Somebody else is in the hole.
    HoleTaken,
}

/// The guest's processors, which move from shell to shell.
struct Cpus {
    machine: Option<KvmMachine>,
    plan: MachinePlan,
    pool: Arc<ShellPool>,
    next: Option<Shell>,
    count: u32,
    fail: Fail,
    decoy: Option<(ForkPoint<Mapped>, Vec<Vm<Mapped>>)>,
}

struct Counting {
    vm: Vm<Mapped>,
    cpus: Cpus,
}

fn shape(host: &Arc<KvmHost>, devices: Devices) -> ShellShape {
    let machine = VmBuilder::new(host).unwrap().devices(devices).unwrap().vcpus(VcpuCount::ONE).unwrap();
    machine.vcpus()[0].set_cpuid2(host.supported_cpuid()).unwrap();
    ShellShape::new(&MachinePlan::read(host, machine.vcpus(), devices).unwrap(), &layout())
}

fn pool(host: &Arc<KvmHost>, devices: Devices, ready: u64) -> Arc<ShellPool> {
    let pool =
        ShellPool::new(shape(host, devices), PoolLimits { ready: ShellCount::new(ready), ..PoolLimits::default() })
            .unwrap();
    pool.wait_filled().unwrap();
    Arc::new(pool)
}

fn counting(host: &Arc<KvmHost>, tree: &Tree, devices: Devices, pool: Arc<ShellPool>) -> Counting {
    let vm: Vm<Mapped> = Vm::new(tree, VmName::new("counting").unwrap(), layout(), vec![]).unwrap();
    vm.ram().write(GuestAddress::new(CODE), COUNTING).unwrap();
    let machine = machine(host, vm.ram(), devices);
    start_in_real_mode(&machine.vcpus()[0], CODE);
    let plan = MachinePlan::read(host, machine.vcpus(), devices).unwrap();
    vm.start().unwrap();
    let (machine, next, count, fail, decoy) = (Some(machine), None, 0, Fail::Nothing, None);
    Counting { vm, cpus: Cpus { machine, plan, pool, next, count, fail, decoy } }
}

impl Cpus {
    fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.machine.as_mut().unwrap().vcpus_mut()[0]
    }

    /// Runs on, and checks that no count is lost or repeated.
    fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.count += 1;
            let count = self.count;
            assert_eq!(next_count(self.vcpu()), count);
            assert_eq!(self.vcpu().get_regs().unwrap().rcx, u64::from(count));
        }
    }
}

impl Guest for Cpus {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(finish_exit(self.vcpu(), VcpuIndex::new(0), |exit| panic!("unexpected exit {exit:?}"))?)
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let machine = self.machine.as_mut().unwrap();
        Ok(DeviceState::from_object(Arc::new(machine.capture(&self.plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.next = None;
        Ok(())
    }
}

impl Relocate for Cpus {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        if self.fail == Fail::NextHole {
            return Err("no hole".into());
        }
        let shell = self.pool.take()?;
        if self.fail == Fail::HoleTaken
            && let Some((point, decoys)) = &mut self.decoy
        {
            self.fail = Fail::Nothing;
            decoys.push(point.spawn_into(shell.hole(), CloneSpec::default())?);
        }
        Ok(self.next.insert(shell).hole().clone())
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        if self.fail == Fail::BeforeEntering {
            return Err("before entering".into());
        }
        let machine = self.next.take().ok_or("no shell")?.enter(ram, state.object().ok_or("no machine state")?)?;
        if self.fail == Fail::AfterEntering {
            return Err("after entering".into());
        }
        Ok(Deferred::costly(self.machine.replace(machine)))
    }
}

/// What the guest has written by the time it has counted to `count`.
fn check_ram(vm: &Vm<Mapped>, count: u32) {
    let load = |at: u64| vm.ram().load::<u32>(GuestAddress::new(at)).unwrap();
    assert_eq!(load(COUNT), count);
    for n in (1..=count).rev().take(128) {
        assert_eq!(load(0x10000 + u64::from(n & 0x7f) * 4096), n);
    }
    vm.validate().unwrap();
}

/// A clone goes on from the fork point's count and leaves everybody else alone.
fn check_clone(pool: &ShellPool, point: &ForkPoint<Mapped>, count: u32) {
    let state: &MachineState = point.device_state().object().unwrap();
    let (clone, mut machine) = pool.spawn(point, state, CloneSpec::default()).unwrap();
    check_ram(&clone, count);
    for n in 1..=20 {
        assert_eq!(next_count(&mut machine.vcpus_mut()[0]), count + n);
    }
    check_ram(&clone, count + 20);
}

#[test]
fn a_parent_that_moves_loses_nothing() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    for devices in [Devices::NONE, Devices::FULL] {
        let before = held();
        let tree = Tree::default();
        let pool = pool(&host, devices, 3);
        let mut parent = counting(&host, &tree, devices, Arc::clone(&pool));
        let mut points = Vec::new();
        let mut places = HashSet::new();
        for round in 0..8 {
            parent.cpus.run(17);
            places.insert(parent.vm.ram().space().host_base());
            let point = if round % 3 == 2 {
                parent.vm.fork(&mut parent.cpus).unwrap()
            } else {
                parent.vm.fork_relocating(&mut parent.cpus).unwrap()
            };
            check_ram(&parent.vm, parent.cpus.count);
            points.push((point, parent.cpus.count));
        }
        parent.cpus.run(30);
        assert_eq!(places.len(), 6, "it went to a new place at each fork that moves, and at no other");
        for (point, count) in &points {
            check_clone(&pool, point, *count);
        }
        // Nobody depends on the parent.
        drop(parent);
        for (point, count) in &points {
            point.teardown().wait();
            check_clone(&pool, point, *count);
        }
        drop((points, pool));
        assert_eq!((held(), tree.usage()), (before, Tree::default().usage()));
    }
}

/// Runs on a thread of its own; paused by taking the processors away from it.
struct Threaded {
    cpus: Arc<Mutex<Option<Cpus>>>,
    paused: Option<Cpus>,
}

impl Guest for Threaded {
    fn pause(&mut self) -> Result<(), BoxError> {
        let mut cpus = self.cpus.lock().unwrap().take().ok_or("it is not running")?;
        cpus.pause()?;
        self.paused = Some(cpus);
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.paused.as_mut().ok_or("not paused")?.save()
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        *self.cpus.lock().unwrap() = self.paused.take();
        Ok(())
    }
}

impl Relocate for Threaded {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        match &mut self.paused {
            Some(cpus) => cpus.next_hole(),
            None => self.cpus.lock().unwrap().as_mut().ok_or("it is not running")?.next_hole(),
        }
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        self.paused.as_mut().ok_or("not paused")?.relocate(ram, state)
    }
}

#[test]
fn a_guest_that_runs_meanwhile_loses_nothing() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    let pool = pool(&host, Devices::FULL, 3);
    let Counting { vm, cpus } = counting(&host, &Tree::default(), Devices::FULL, Arc::clone(&pool));
    let cpus = Arc::new(Mutex::new(Some(cpus)));
    let done = AtomicBool::new(false);
    let points: Vec<_> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Some(cpus) = &mut *cpus.lock().unwrap() {
                    cpus.run(5);
                }
                std::thread::yield_now();
            }
        });
        let mut guest = Threaded { cpus: Arc::clone(&cpus), paused: None };
        let points = (0..20).map(|_| vm.fork_relocating(&mut guest).unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        points
    });
    let mut last = 0;
    for point in &points {
        let count = point.spawn(CloneSpec::default()).unwrap().ram().load::<u32>(GuestAddress::new(COUNT)).unwrap();
        assert!(count >= last);
        last = count;
        check_clone(&pool, point, count);
    }
}

/// A guest that has moved so many times, and has run since.
fn moved(host: &Arc<KvmHost>, tree: &Tree, pool: &Arc<ShellPool>, times: u32) -> Counting {
    let mut counting = counting(host, tree, Devices::FULL, Arc::clone(pool));
    for _ in 0..times {
        counting.cpus.run(3);
        counting.vm.fork_relocating(&mut counting.cpus).unwrap().teardown().wait();
    }
    counting.cpus.run(10);
    counting
}

#[test]
fn every_failing_step_leaves_the_parent_running_where_it_was() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    for forks_before in [0, 1] {
        for fail in [Fail::NextHole, Fail::BeforeEntering, Fail::AfterEntering] {
            let before = held();
            let tree = Tree::default();
            let pool = pool(&host, Devices::FULL, 2);
            let mut parent = moved(&host, &tree, &pool, forks_before);
            let home = parent.vm.ram().space().host_base();
            parent.cpus.fail = fail;
            let failed = parent.vm.fork_relocating(&mut parent.cpus);
            assert!(matches!(failed, Err(ForkError::Hole(_) | ForkError::Relocate(_))), "{failed:?}");
            assert_eq!((parent.vm.status(), parent.vm.ram().space().host_base()), (VmStatus::Running, home));
            parent.cpus.run(200);
            check_ram(&parent.vm, parent.cpus.count);
            parent.cpus.fail = Fail::Nothing;
            let point = parent.vm.fork_relocating(&mut parent.cpus).unwrap();
            check_clone(&pool, &point, parent.cpus.count);
            parent.cpus.run(10);
            point.teardown().wait();
            drop((point, parent, pool));
            assert_eq!((held(), tree.usage()), (before, Tree::default().usage()), "{fail:?}");
        }
    }
}

#[test]
fn no_failing_call_leaves_anything_behind() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    for forks_before in [0, 1] {
        for n in 1.. {
            let before = held();
            let tree = Tree::default();
            // Nothing ready: the shell is built by this thread, whose calls fail, those to KVM among them.
            let pool = pool(&host, Devices::FULL, 0);
            let mut parent = moved(&host, &tree, &pool, forks_before);
            let home = parent.vm.ram().space().host_base();
            let plan = fail_nth_call(n, Refusal::OutOfMemory);
            let forked = parent.vm.fork_relocating(&mut parent.cpus);
            let done = plan.calls_seen() < n;
            drop(plan);
            if forked.is_err() {
                assert_eq!((parent.vm.status(), parent.vm.ram().space().host_base()), (VmStatus::Running, home));
            }
            let count = parent.cpus.count;
            parent.cpus.run(10);
            if let Ok(point) = &forked {
                point.teardown().wait();
                check_clone(&pool, point, count);
            }
            check_ram(&parent.vm, parent.cpus.count);
            drop((forked, parent, pool));
            assert_eq!((held(), tree.usage()), (before, Tree::default().usage()), "call {n}");
            if done {
                assert!(n > 8, "a shell and a move take more calls than {n}");
                break;
            }
        }
    }
}

#[test]
fn a_shell_whose_hole_was_taken_is_dropped_and_counted() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    let pool = pool(&host, Devices::NONE, 3);
    let mut parent = counting(&host, &Tree::default(), Devices::NONE, Arc::clone(&pool));
    let other: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("other").unwrap(), layout(), vec![]).unwrap();
    other.start().unwrap();
    let decoy = other.fork(&mut AtRest(DeviceState::from_bytes([]))).unwrap();
    parent.cpus.decoy = Some((decoy, Vec::new()));
    parent.cpus.fail = Fail::HoleTaken;
    parent.cpus.run(10);
    let point = parent.vm.fork_relocating(&mut parent.cpus).unwrap();
    parent.cpus.run(10);
    check_ram(&parent.vm, 20);
    check_clone(&pool, &point, 10);
    let stats = pool.stats();
    assert_eq!(counts(&stats, |it| [it.holes_lost, it.discarded, it.entered]), [1, 1, 2], "{stats:?}");
    let decoys = parent.cpus.decoy.take().unwrap().1;
    assert_eq!(
        decoys[0].ram().load::<u64>(GuestAddress::new(COUNT)).unwrap(),
        0,
        "nobody wrote to who was there first"
    );
    // RAM elsewhere, or a state of another kind, does not get a shell.
    let state: &MachineState = point.device_state().object().unwrap();
    let elsewhere = point.spawn(CloneSpec::default()).unwrap();
    let wrong = pool.take().unwrap().enter(&elsewhere.ram().place().unwrap(), state);
    assert!(matches!(wrong, Err(ShellError::Place)));
    let full = self::pool(&host, Devices::FULL, 1);
    let wrong = full.spawn(&point, state, CloneSpec::default());
    assert!(matches!(wrong, Err(ShellError::Shape(_))));
}

/// Some of a pool's figures, as numbers.
fn counts<const N: usize>(stats: &PoolStats, which: impl Fn(&PoolStats) -> [ShellCount; N]) -> [u64; N] {
    which(stats).map(ShellCount::get)
}

#[test]
fn the_pool_is_bounded_refills_and_drains() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    let before = held();
    let limits = PoolLimits { ready: ShellCount::new(4), alive: ShellCount::new(6), ..PoolLimits::default() };
    let pool = ShellPool::new(shape(&host, Devices::NONE), limits).unwrap();
    pool.wait_filled().unwrap();
    let four = ShellCount::new(4);
    assert_eq!(pool.stats(), PoolStats { ready: four, alive: four, built: four, ..PoolStats::default() });
    let mut taken: Vec<_> = (0..4).map(|_| pool.try_take().unwrap()).collect();
    // Six may exist, four are out: two come, and what the thread meets at the limit is told.
    assert!(matches!(pool.wait_filled(), Err(ShellError::ShellLimit { limit }) if limit == limits.alive));
    assert_eq!(counts(&pool.stats(), |it| [it.ready, it.alive]), [2, 6]);
    taken.extend([pool.take().unwrap(), pool.take().unwrap()]);
    let refused = pool.take();
    assert!(matches!(refused, Err(ShellError::ShellLimit { limit }) if limit == limits.alive), "{refused:?}");
    assert!(refused.unwrap_err().to_string().contains("PoolLimits::alive"));
    assert!(pool.try_take().is_none());
    let bases: HashSet<_> = taken.iter().map(|shell| shell.hole().base()).collect();
    assert_eq!(bases.len(), 6, "each has a hole of its own");
    drop(taken);
    pool.wait_filled().or_else(|_| pool.wait_filled()).unwrap();
    assert_eq!(counts(&pool.stats(), |it| [it.ready, it.alive, it.discarded]), [4, 4, 6]);

    assert_eq!(pool.drain(), four);
    pool.wait_filled().unwrap();
    assert_eq!(counts(&pool.stats(), |it| [it.ready, it.alive]), [0, 0]);
    assert_eq!(held(), before);
    drop(pool.take().unwrap());
    pool.wait_filled().unwrap();
    assert_eq!(counts(&pool.stats(), |it| [it.ready, it.built_on_demand]), [0, 1], "drained means drained");
    pool.refill();
    pool.wait_filled().unwrap();
    assert_eq!(pool.stats().ready, four);
    drop(pool);
    assert_eq!(held(), before);
}

#[test]
fn limits_of_the_process_are_named() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    for (limits, name) in [
        (PoolLimits { spare_descriptors: 1 << 40, ..PoolLimits::default() }, "RLIMIT_NOFILE"),
        (PoolLimits { spare_mappings: 1 << 40, ..PoolLimits::default() }, "vm.max_map_count"),
        (PoolLimits { alive: ShellCount::ZERO, ..PoolLimits::default() }, "PoolLimits::alive"),
    ] {
        let pool = ShellPool::new(shape(&host, Devices::NONE), limits).unwrap();
        if limits.alive > ShellCount::ZERO {
            assert!(pool.wait_filled().unwrap_err().to_string().contains(name));
        }
        assert!(pool.take().unwrap_err().to_string().contains(name));
        // The pool's own thread may be trying still, and what it tries counts until it is refused: let it come to rest.
        pool.drain();
        let _refused = pool.wait_filled();
        assert_eq!(counts(&pool.stats(), |it| [it.alive, it.built]), [0, 0]);
    }
}

#[test]
fn two_threads_take_from_one_pool() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    let pool = pool(&host, Devices::NONE, 4);
    let mut parent = counting(&host, &Tree::default(), Devices::NONE, Arc::clone(&pool));
    parent.cpus.run(10);
    let point = parent.vm.fork(&mut parent.cpus).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..20).for_each(|_| check_clone(&pool, &point, 10)));
        }
    });
    let stats = pool.stats();
    let [taken, on_demand] = counts(&stats, |it| [it.taken, it.built_on_demand]);
    assert_eq!(taken + on_demand, 40, "{stats:?}");
    assert_eq!(counts(&stats, |it| [it.entered, it.discarded]), [40, 0], "{stats:?}");
}

/// A shell's state is a new machine's, but for what counts time, and nothing is mapped in its hole.
fn assert_like_new(host: &Arc<KvmHost>, shell: &Shell, devices: Devices) {
    let mut new = VmBuilder::new(host).unwrap().devices(devices).unwrap().vcpus(VcpuCount::ONE).unwrap();
    new.vcpus()[0].set_cpuid2(host.supported_cpuid()).unwrap();
    let plan = MachinePlan::read(host, new.vcpus(), devices).unwrap();
    let untouched = new.capture(&plan).unwrap();
    // A shell is warmed where the kernel allows. That does not enter the guest either, and says of vector state at its initial values that
    // it is in use.
    finish_exit(&mut new.vcpus_mut()[0], VcpuIndex::new(0), |exit| panic!("unexpected exit {exit:?}")).unwrap();
    let warm = new.capture(&plan).unwrap();
    let shell_state = shell.capture().unwrap();
    let by_itself = |part| matches!(part, Part::Msr(MsrIndex::TSC) | Part::Clock | Part::Pit | Part::LapicTimer);
    let [from_untouched, from_warm] = [untouched, warm].map(|new| {
        let differences = shell_state.differences(&new);
        differences.into_iter().filter(|found| !by_itself(found.part)).collect::<Vec<_>>()
    });
    assert!(
        from_untouched.is_empty() || from_warm.is_empty(),
        "a shell differs from a new machine: {from_untouched:?}, {from_warm:?}"
    );

    let (start, end) = (shell.hole().base().addr().get(), shell.hole().len().get() as usize);
    let end = start + end;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().find(|line| {
        let (from, rest) = line.split_once('-').unwrap();
        let to = rest.split_once(' ').unwrap().0;
        let at = |hex| usize::from_str_radix(hex, 16).unwrap();
        at(from) < end && at(to) > start
    });
    assert_eq!(mapped, None, "nothing is mapped in its hole");
}

#[test]
fn a_shell_is_as_a_new_machine_whoever_was_there_before() {
    let _alone = alone();
    let Some(host) = kvm_host() else { return };
    for devices in [Devices::NONE, Devices::FULL] {
        let pool = pool(&host, devices, 2);
        let mut parent = counting(&host, &Tree::default(), devices, Arc::clone(&pool));
        parent.cpus.run(10);
        let point = parent.vm.fork_relocating(&mut parent.cpus).unwrap();
        for _ in 0..3 {
            assert_like_new(&host, &pool.take().unwrap(), devices);
            // A tenant lives and goes, with registers, vector state and model-specific registers of its own.
            let state: &MachineState = point.device_state().object().unwrap();
            let (clone, mut machine) = pool.spawn(&point, state, CloneSpec::default()).unwrap();
            for n in 11..30 {
                assert_eq!(next_count(&mut machine.vcpus_mut()[0]), n);
            }
            drop((clone, machine));
            pool.wait_filled().unwrap();
        }
        let stats = pool.stats();
        assert_eq!(stats.alive, stats.ready, "no shell came back: {stats:?}");
        let [built, where_they_are @ ..] = counts(&stats, |it| [it.built, it.ready, it.entered, it.discarded]);
        assert_eq!(built, where_they_are.iter().sum::<u64>());
    }
}
