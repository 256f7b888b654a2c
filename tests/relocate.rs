//! Forks that move RAM to other addresses, without a hypervisor: what holds through them, and that every failing step leaves the VM where
//! it was with nothing left behind.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::panic::{AssertUnwindSafe, catch_unwind};

use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageSize, SectorCount};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{
    BoxError, CloneSpec, DeviceState, DiskName, ForkError, ForkPoint, Guest, Relocate, SpaceError, SpawnError, Tree,
    Vm, VmName, VmStatus,
};

const REGION: ByteSize = ByteSize::mib(1);
const HIGH: u64 = 16 << 20;

/// What a guest is to fail at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fail {
    Nothing,
    Pause,
    Save,
    NextHole,
    Relocate,
    Panic,
    Resume,
    /// Each hole is taken by somebody else, so many times.
    Taken(u32),
}

/// A guest without a processor that keeps account of what is asked of it.
struct Passive {
    fail: Fail,
    running: bool,
    decoy: ForkPoint<Mapped>,
    decoys: Vec<Vm<Mapped>>,
    hole: Option<AddressHole>,
    places: Vec<PlacedRam>,
}

impl Passive {
    fn step(&self, fail: Fail) -> Result<(), BoxError> {
        if self.fail == fail { Err(format!("{fail:?} fails").into()) } else { Ok(()) }
    }
}

impl Guest for Passive {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.step(Fail::Pause)?;
        self.running = false;
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(!self.running);
        self.step(Fail::Save)?;
        Ok(DeviceState::from_bytes([7]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.step(Fail::Resume)?;
        self.running = true;
        Ok(())
    }
}

impl Relocate for Passive {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        self.step(Fail::NextHole)?;
        let hole = AddressHole::pick(layout().geometry().len())?;
        if let Fail::Taken(times @ 1..) = self.fail {
            self.fail = Fail::Taken(times - 1);
            // A clone of another VM is what lies there first.
            self.decoys.push(self.decoy.spawn_into(&hole, CloneSpec::default())?);
        }
        Ok(self.hole.insert(hole).clone())
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        assert!(!self.running);
        assert_eq!(*state.encode(), [7]);
        let hole = self.hole.take().ok_or("no hole was given")?;
        assert_eq!(ram.host_ranges().next().unwrap().host, hole.base());
        self.step(Fail::Relocate)?;
        assert!(self.fail != Fail::Panic, "a panic of the embedder's");
        self.places.push(ram.clone());
        Ok(Deferred::default())
    }
}

fn layout() -> RamLayout {
    let region = |start| RamRegion { start: GuestAddress::new(start), len: REGION };
    RamLayout::new(&[region(0), region(HIGH)], PageSize::KIB_4).unwrap()
}

fn vm(tree: &Tree) -> Vm<Mapped> {
    let disk = Disk::blank(tree, SectorCount::new(64), Access::ReadWrite).unwrap();
    let vm = Vm::new(tree, VmName::new("mover").unwrap(), layout(), vec![(DiskName::new("root"), disk)]).unwrap();
    vm.start().unwrap();
    vm
}

fn passive(fail: Fail) -> Passive {
    let decoy = vm(&Tree::default()).fork(&mut offshoot::AtRest(DeviceState::from_bytes([]))).unwrap();
    decoy.teardown().wait();
    Passive { fail, running: true, decoy, decoys: Vec::new(), hole: None, places: Vec::new() }
}

/// Writes what is told apart by `stamp` to RAM, below and above the gap, and to the disk.
fn stamp(vm: &Vm<Mapped>, stamp: u8) {
    for at in [0x3000, HIGH + 0x5000 + u64::from(stamp) * 4096] {
        vm.ram().store(GuestAddress::new(at), stamp).unwrap();
    }
    vm.disk("root").unwrap().write(Lba::new(3), &[stamp; 512]).unwrap();
}

fn check(vm: &Vm<Mapped>, stamp: u8) {
    for at in [0x3000, HIGH + 0x5000 + u64::from(stamp) * 4096] {
        assert_eq!(vm.ram().load::<u8>(GuestAddress::new(at)).unwrap(), stamp);
    }
    let mut sector = [0; 512];
    vm.disk("root").unwrap().read(Lba::new(3), &mut sector).unwrap();
    assert_eq!(sector, [stamp; 512]);
    vm.validate().unwrap();
}

fn base(vm: &Vm<Mapped>) -> usize {
    vm.ram().host_ranges().next().unwrap().host.addr().get()
}

#[test]
fn a_vm_moves_at_each_fork_and_every_point_is_right() {
    let tree = Tree::default();
    let parent = vm(&tree);
    let mut guest = passive(Fail::Nothing);
    let mut points = Vec::new();
    let mut bases = vec![base(&parent)];
    for n in 1..=6 {
        stamp(&parent, n);
        let point = match n {
            // Between moves, forks in place keep the address.
            3 | 5 => parent.fork(&mut guest).unwrap(),
            _ => parent.fork_relocating(&mut guest).unwrap(),
        };
        assert!(guest.running);
        let moved = !matches!(n, 3 | 5);
        assert_eq!(base(&parent) != *bases.last().unwrap(), moved);
        assert!(!moved || !point.timings().relocate.is_zero(), "its stage is in the account");
        bases.push(base(&parent));
        check(&parent, n);
        points.push(point);
    }
    stamp(&parent, 7);
    parent.reset(&mut offshoot::AtRest(DeviceState::from_bytes([7]))).unwrap();
    check(&parent, 6);
    drop(parent);
    for (point, n) in points.iter().zip(1..) {
        point.teardown().wait();
        point.validate().unwrap();
        check(&point.spawn(CloneSpec::default()).unwrap(), n);
    }
    drop((points, guest));
    assert_eq!(tree.usage(), Tree::default().usage());
}

#[test]
fn every_failing_step_leaves_the_vm_where_it_was() {
    for fail in [Fail::Pause, Fail::Save, Fail::NextHole, Fail::Relocate, Fail::Panic, Fail::Taken(u32::MAX)] {
        // As a first fork, and as a later one.
        for forks_before in [0, 1] {
            let tree = Tree::default();
            let parent = vm(&tree);
            let mut guest = passive(Fail::Nothing);
            stamp(&parent, 1);
            for _ in 0..forks_before {
                parent.fork_relocating(&mut guest).unwrap().teardown().wait();
            }
            stamp(&parent, 2);
            guest.fail = fail;
            let (before, usage) = (base(&parent), tree.usage());
            let failed = catch_unwind(AssertUnwindSafe(|| parent.fork_relocating(&mut guest)));
            match (fail, failed) {
                (Fail::Panic, Err(_))
                | (Fail::Pause, Ok(Err(ForkError::Pause(_))))
                | (Fail::Save, Ok(Err(ForkError::Save(_))))
                | (Fail::NextHole, Ok(Err(ForkError::Hole(_))))
                | (Fail::Relocate, Ok(Err(ForkError::Relocate(_))))
                | (Fail::Taken(_), Ok(Err(ForkError::Cut(SpaceError::HoleTaken)))) => {}
                (fail, other) => panic!("{fail:?} gave {other:?}"),
            }
            assert!(guest.running);
            assert_eq!((parent.status(), base(&parent)), (VmStatus::Running, before), "{fail:?}");
            let now = tree.usage();
            assert_eq!((now.vms, now.fork_points, now.images), (usage.vms, usage.fork_points, usage.images));
            check(&parent, 2);
            // And it can be forked either way afterwards.
            guest.fail = Fail::Nothing;
            stamp(&parent, 3);
            let moved = parent.fork_relocating(&mut guest).unwrap();
            stamp(&parent, 4);
            let stayed = parent.fork(&mut guest).unwrap();
            for (point, n) in [(&moved, 3), (&stayed, 4)] {
                point.teardown().wait();
                check(&point.spawn(CloneSpec::default()).unwrap(), n);
            }
        }
    }
}

#[test]
fn a_guest_that_cannot_resume_stands_paused_at_its_new_place() {
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Resume);
    stamp(&parent, 1);
    let before = base(&parent);
    assert!(matches!(parent.fork_relocating(&mut guest), Err(ForkError::Resume(_))));
    assert_eq!(parent.status(), VmStatus::Paused);
    assert_ne!(base(&parent), before);
    check(&parent, 1);
}

#[test]
fn a_hole_that_is_taken_is_left_for_another() {
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Taken(3));
    stamp(&parent, 1);
    let point = parent.fork_relocating(&mut guest).unwrap();
    assert_eq!(guest.decoys.len(), 3);
    guest.decoys.iter().for_each(|decoy| decoy.validate().unwrap());
    check(&parent, 1);
    let hole = AddressHole::pick(layout().geometry().len()).unwrap();
    let first = point.spawn_into(&hole, CloneSpec::default()).unwrap();
    assert!(!hole.was_lost());
    let taken = point.spawn_into(&hole, CloneSpec::default());
    assert!(matches!(taken, Err(SpawnError::Space(SpaceError::HoleTaken))), "{taken:?}");
    assert!(hole.was_lost());
    let other = AddressHole::pick(ByteSize::mib(4)).unwrap();
    let wrong = point.spawn_into(&other, CloneSpec::default());
    assert!(matches!(wrong, Err(SpawnError::Space(SpaceError::HoleLength { .. }))), "{wrong:?}");
    check(&first, 1);
}

/// Descriptors and mappings of the engine's in this process.
fn held() -> (usize, usize) {
    let links =
        std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let files = links.filter(|link| link.to_string_lossy().contains("offshoot")).count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (files, maps.lines().filter(|line| line.contains("offshoot")).count())
}

/// Alone in its process (see the end of the file), so that counts are its own.
fn no_failing_call_leaves_anything_behind() {
    for forks_before in [0, 1, 2] {
        for n in 1.. {
            let before = held();
            let tree = Tree::default();
            let parent = vm(&tree);
            let mut guest = passive(Fail::Nothing);
            for _ in 0..forks_before {
                stamp(&parent, 1);
                parent.fork_relocating(&mut guest).unwrap().teardown().wait();
            }
            stamp(&parent, 2);
            let (home, usage) = (base(&parent), tree.usage());
            let plan = fail_nth_call(n, Refusal::OutOfMemory);
            let forked = parent.fork_relocating(&mut guest);
            let done = plan.calls_seen() < n;
            drop(plan);
            match forked {
                Ok(point) => {
                    assert_ne!(base(&parent), home);
                    point.teardown().wait();
                    check(&point.spawn(CloneSpec::default()).unwrap(), 2);
                }
                Err(error) => {
                    assert!(!done, "{error}");
                    assert_eq!((base(&parent), tree.usage().images), (home, usage.images));
                    assert!(guest.running);
                    check(&parent, 2);
                    let point = parent.fork_relocating(&mut guest).unwrap();
                    point.teardown().wait();
                    check(&point.spawn(CloneSpec::default()).unwrap(), 2);
                }
            }
            check(&parent, 2);
            drop((parent, guest));
            assert_eq!((tree.usage(), held()), (Tree::default().usage(), before), "call {n}");
            if done {
                break;
            }
        }
    }
}

#[cfg(feature = "vm-memory")]
#[test]
fn whoever_still_has_the_old_addresses_cannot_reach_the_fork_point() {
    use offshoot::frontend::vm_memory::lease;
    use vm_memory::Bytes;
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Nothing);
    stamp(&parent, 1);
    let stale = lease(parent.ram()).unwrap().guest_memory().unwrap();
    let point = parent.fork_relocating(&mut guest).unwrap();
    point.teardown().wait();
    stale.write_obj(99u8, vm_memory::GuestAddress(0x3000)).unwrap();
    check(&parent, 1);
    check(&point.spawn(CloneSpec::default()).unwrap(), 1);
}

/// Counting what a process holds needs it for oneself: runs the one test that does in a child.
#[test]
fn no_failing_call_leaves_anything_behind_in_a_process_of_its_own() {
    if std::env::var_os("OFFSHOOT_ALONE").is_some() {
        return no_failing_call_leaves_anything_behind();
    }
    let name = "no_failing_call_leaves_anything_behind_in_a_process_of_its_own";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("OFFSHOOT_ALONE", "1")
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
}
