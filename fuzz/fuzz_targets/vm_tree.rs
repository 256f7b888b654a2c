//! Whole VMs: fork, freeze, spawn, commit, reset and delete in any order, with an embedder that fails at any step.
//!
//! Oracle: one `Vec<u8>` for RAM and for each disk, one byte for device state, and a status, per VM and per fork point. A call
//! succeeds exactly when the model's status allows it and the embedder did not fail; a call that fails leaves content, status
//! and guest as the documentation says, and fork points and VMs alive are counted at every step. After each step
//! every VM's content is compared, `validate()` re-derives the invariants, and at the end nothing is left.
#![no_main]

use std::rc::Rc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use offshoot::backing::Heap;
use offshoot::disk::{Access, Disk, DiskError};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Gfn, GuestAddress, Lba, PageCount, PageIndex, PageSize, SectorCount};
use offshoot::ram::{RamError, RamLayout, RamRegion};
use offshoot::{
    BoxError, CloneSpec, CommitError, Config, DeviceState, DiskName, ForkError, ForkPoint, Guest, ResetError, Rewind,
    SpaceError, SpawnError, Tree, Vm, VmName, VmStatus,
};
use offshoot_fuzz::disk_model::DiskModel;
use offshoot_fuzz::held::{Counter, Held, Line};
use offshoot_fuzz::{Base, pattern};

const MOST_OPS: usize = 64;
const MOST_VMS: usize = 8;
const MOST_POINTS: usize = 10;
const PAGE: usize = 4096;
const RAM_PAGES: [u64; 2] = [3, 2];
const HIGH: u64 = 4 << 30;
const DISKS: [&str; 2] = ["root", "data"];

#[derive(Arbitrary, Debug)]
struct Input {
    image: u16,
    seed: u8,
    data_sectors: u8,
    ops: Vec<Op>,
}

/// Where the embedder fails.
#[derive(Arbitrary, Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    Pause,
    Save,
    Load,
    Resume,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Hook {
    None,
    Writes,
    Fails,
}

#[derive(Arbitrary, Debug)]
enum Op {
    WriteRam { vm: u8, at: u16, len: u16, seed: u8 },
    DiscardRam { vm: u8, page: u8, count: u8 },
    WriteDisk { vm: u8, disk: u8, lba: u8, sectors: u8, seed: u8 },
    Discard { vm: u8, disk: u8, lba: u8, count: u8 },
    WriteZeroes { vm: u8, disk: u8, lba: u8, count: u8 },
    StepCpu { vm: u8 },
    Start { vm: u8 },
    Pause { vm: u8 },
    PowerOff { vm: u8 },
    Fork { vm: u8, fails: Option<Fails> },
    Freeze { vm: u8, fails: Option<Fails> },
    Spawn { point: u8, hook: Hook },
    Commit { into: u8, from: u8 },
    Reset { vm: u8, fails: Option<Fails> },
    DropVm { vm: u8 },
    DropPoint { point: u8 },
    Diff { a: u8, b: u8 },
    Flatten { point: u8 },
    MergeOnto { point: u8, ancestor: u8 },
}

/// Everything that a guest could see.
#[derive(Clone, PartialEq, Eq)]
struct Content {
    ram: Vec<u8>,
    disks: [DiskModel; 2],
}

/// The embedder's side of one VM.
struct FakeGuest {
    cpu: u8,
    running: bool,
    fails: Option<Fails>,
}

impl FakeGuest {
    fn failing(&self, here: Fails) -> Result<(), BoxError> {
        if self.fails == Some(here) { Err("asked to fail".into()) } else { Ok(()) }
    }
}

impl Guest for FakeGuest {
    fn pause(&mut self) -> Result<(), BoxError> {
        assert!(self.running, "paused twice");
        self.failing(Fails::Pause)?;
        self.running = false;
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(!self.running, "saved while running");
        self.failing(Fails::Save)?;
        Ok(DeviceState::from_bytes(vec![self.cpu]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        assert!(!self.running, "resumed twice");
        self.failing(Fails::Resume)?;
        self.running = true;
        Ok(())
    }
}

impl Rewind for FakeGuest {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        assert!(!self.running, "loaded while running");
        self.failing(Fails::Load)?;
        self.cpu = state.encode()[0];
        Ok(())
    }
}

struct PointModel {
    content: Content,
    cpu: u8,
    line: Rc<Line>,
    _held: Held,
}

struct Machine {
    vm: Vm<Heap>,
    guest: FakeGuest,
    content: Content,
    status: VmStatus,
    origin: Option<Rc<PointModel>>,
}

struct Point {
    point: ForkPoint<Heap>,
    model: Rc<PointModel>,
}

struct World {
    tree: Tree,
    root: Rc<Line>,
    families: u64,
    points_alive: Counter,
    machines: Vec<Machine>,
    points: Vec<Point>,
}

fn pick<T>(items: &[T], selector: u8) -> Option<usize> {
    (!items.is_empty()).then(|| usize::from(selector) % items.len())
}

/// RAM as runs of (guest address, offset in the model).
fn ram_runs() -> [(u64, usize, usize); 2] {
    let low = RAM_PAGES[0] as usize * PAGE;
    [(0, 0, low), (HIGH, low, RAM_PAGES[1] as usize * PAGE)]
}

fn read_vm(vm: &Vm<Heap>, like: &Content) -> Content {
    let mut seen = like.clone();
    for (at, offset, len) in ram_runs() {
        vm.ram().read(GuestAddress::new(at), &mut seen.ram[offset..offset + len]).unwrap();
    }
    for (name, disk) in DISKS.iter().zip(&mut seen.disks) {
        vm.disk(name).unwrap().read(Lba::ZERO, &mut disk.bytes).unwrap();
    }
    seen
}

fn read_point(point: &ForkPoint<Heap>, like: &Content) -> Content {
    let mut seen = like.clone();
    point.ram().read(ByteOffset::ZERO, &mut seen.ram).unwrap();
    for (name, disk) in DISKS.iter().zip(&mut seen.disks) {
        point.disk(name).unwrap().read(Lba::ZERO, &mut disk.bytes).unwrap();
    }
    seen
}

impl World {
    fn new(input: &Input) -> Self {
        let tree = Tree::default();
        let region =
            |start, pages: u64| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(pages * PAGE as u64) };
        let layout = RamLayout::new(&[region(HIGH, RAM_PAGES[1]), region(0, RAM_PAGES[0])], PageSize::KIB_4).unwrap();
        let image = pattern(input.seed, 1 + usize::from(input.image) % (3 * PAGE));
        let sectors = 1 + usize::from(input.data_sectors) % 24;
        let root = Disk::over_image(&tree, Base::shared(0, image.clone()), Access::ReadWrite).unwrap();
        let data = Disk::blank(&tree, SectorCount::new(sectors as u64), Access::ReadWrite).unwrap();
        let disks = vec![(DiskName::new(DISKS[0]), root), (DiskName::new(DISKS[1]), data)];
        let vm = Vm::new(&tree, VmName::new("vm").unwrap(), layout, disks).unwrap();
        let content = Content {
            ram: vec![0; (RAM_PAGES[0] + RAM_PAGES[1]) as usize * PAGE],
            disks: [DiskModel::over_image(&image), DiskModel::blank(sectors)],
        };
        let guest = FakeGuest { cpu: 1, running: false, fails: None };
        let machine = Machine { vm, guest, content, status: VmStatus::Off, origin: None };
        Self {
            tree,
            root: Line::root(0),
            families: 1,
            points_alive: Counter::default(),
            machines: vec![machine],
            points: Vec::new(),
        }
    }

    fn check(&self) {
        for (n, machine) in self.machines.iter().enumerate() {
            assert_eq!(machine.vm.status(), machine.status, "status of VM {n}");
            assert_eq!(machine.guest.running, machine.status == VmStatus::Running, "the guest of VM {n}");
            let origin = machine.origin.as_ref().map(|origin| origin.cpu);
            assert_eq!(machine.vm.device_state().map(|state| state.encode()[0]), origin, "device state of VM {n}");
            assert!(read_vm(&machine.vm, &machine.content) == machine.content, "VM {n} differs");
            machine.vm.validate().unwrap();
        }
        let usage = self.tree.usage();
        assert_eq!(usage.vms, self.machines.len() as u64, "VMs alive");
        assert_eq!(usage.fork_points, self.points_alive.get(), "fork points alive");
    }

    fn check_points(&self) {
        for (n, point) in self.points.iter().enumerate() {
            assert!(read_point(&point.point, &point.model.content) == point.model.content, "point {n} differs");
            point.point.validate().unwrap();
            assert_eq!(point.point.depth(), point.model.line.depth, "depth of point {n}");
        }
    }

    fn hold(&self, content: Content, cpu: u8, line: Rc<Line>) -> Rc<PointModel> {
        Rc::new(PointModel { content, cpu, line, _held: self.points_alive.hold() })
    }

    fn set_status(&mut self, vm: u8, legal: &[VmStatus], to: VmStatus, call: impl FnOnce(&Vm<Heap>) -> bool) {
        let Some(n) = pick(&self.machines, vm) else { return };
        let machine = &mut self.machines[n];
        let allowed = legal.contains(&machine.status);
        assert_eq!(call(&machine.vm), allowed, "{to:?} from {:?}", machine.status);
        if allowed {
            machine.status = to;
            machine.guest.running = to == VmStatus::Running;
        }
    }

    fn cut(&mut self, vm: u8, fails: Option<Fails>, freeze: bool) -> Option<()> {
        let n = pick(&self.machines, vm)?;
        if self.points.len() >= MOST_POINTS {
            return None;
        }
        let line = self.machines[n].origin.as_ref().map_or(&self.root, |origin| &origin.line).child();
        let made = self.hold(self.machines[n].content.clone(), self.machines[n].guest.cpu, line);
        let machine = &mut self.machines[n];
        machine.guest.fails = fails;
        let (vm, guest) = (&machine.vm, &mut machine.guest);
        let result = if freeze { vm.freeze(guest) } else { vm.fork(guest) };
        machine.guest.fails = None;
        let running = machine.status == VmStatus::Running;
        let legal = running || machine.status == VmStatus::Paused;
        match result {
            Ok(point) => {
                assert!(legal, "forked a VM that is {:?}", machine.status);
                let missed = match fails {
                    Some(Fails::Pause) => running,
                    Some(Fails::Save) => true,
                    Some(Fails::Resume) => running && !freeze,
                    Some(Fails::Load) | None => false,
                };
                assert!(!missed, "an error of the embedder's was lost");
                if freeze {
                    machine.status = VmStatus::Frozen;
                }
                machine.origin = Some(made.clone());
                self.points.push(Point { point, model: made });
            }
            Err(ForkError::IllegalState(_)) => assert!(!legal),
            Err(ForkError::Pause(_)) => assert!(legal && running && fails == Some(Fails::Pause)),
            // The guest was resumed after the failure, as `check` sees.
            Err(ForkError::Save(_)) => assert!(legal && fails == Some(Fails::Save)),
            Err(ForkError::Resume(_)) => {
                assert!(legal && running && !freeze && fails == Some(Fails::Resume));
                // The cut was made and cannot be undone: the VM lies on it, whole.
                machine.status = VmStatus::Paused;
                machine.origin = Some(made);
            }
            Err(other) => panic!("fork: {other}"),
        }
        Some(())
    }

    fn spawn(&mut self, point: u8, hook: Hook) -> Option<()> {
        let point = &self.points[pick(&self.points, point)?];
        if self.machines.len() >= MOST_VMS {
            return None;
        }
        let mut content = point.model.content.clone();
        let spec = CloneSpec { config: Config::new(), ..CloneSpec::default() };
        let result = point.point.spawn_with(spec, |vm| match hook {
            Hook::None => Ok(()),
            Hook::Writes => {
                content.ram[..16].copy_from_slice(&vm.identity().generation.bytes());
                Ok(vm.ram().write(GuestAddress::ZERO, &vm.identity().generation.bytes())?)
            }
            Hook::Fails => {
                vm.ram().write(GuestAddress::ZERO, &[0xee; 64])?;
                Err("asked to fail".into())
            }
        });
        match (result, hook) {
            (Ok(vm), Hook::None | Hook::Writes) => {
                let own = vm.identity().generation;
                assert!(self.machines.iter().all(|machine| machine.vm.identity().generation != own), "not fresh");
                let guest = FakeGuest { cpu: point.model.cpu, running: false, fails: None };
                let origin = Some(point.model.clone());
                self.machines.push(Machine { vm, guest, content, status: VmStatus::Paused, origin });
            }
            (Err(SpawnError::Customize(_)), Hook::Fails) => {}
            (got, _) => panic!("spawn with {hook:?}: {got:?}"),
        }
        Some(())
    }

    fn commit(&mut self, into: u8, from: u8) -> Option<()> {
        if self.machines.len() < 2 {
            return None;
        }
        let from = pick(&self.machines, from)?;
        let clone = self.machines.swap_remove(from);
        let into = pick(&self.machines, into)?;
        let own = &mut self.machines[into];
        let still = |status| matches!(status, VmStatus::Paused | VmStatus::Off);
        let legal = still(own.status) && still(clone.status);
        let kin = match (&own.origin, &clone.origin) {
            (Some(a), Some(b)) => Rc::ptr_eq(a, b),
            _ => false,
        };
        let unchanged = own.origin.as_ref().is_some_and(|origin| origin.content == own.content);
        match own.vm.commit(clone.vm) {
            Ok(()) => {
                assert!(legal && kin && unchanged, "a commit that loses something");
                own.content = clone.content;
            }
            Err(refused) => {
                let (error, vm) = *refused;
                match error {
                    CommitError::IllegalState(_) => assert!(!legal),
                    CommitError::NotAChild => assert!(legal && !kin),
                    // A page written back to what it was counts as written.
                    CommitError::Diverged => assert!(legal && kin),
                    other => panic!("commit: {other}"),
                }
                self.machines.push(Machine { vm, ..clone });
            }
        }
        Some(())
    }

    fn reset(&mut self, vm: u8, fails: Option<Fails>) -> Option<()> {
        let n = pick(&self.machines, vm)?;
        let machine = &mut self.machines[n];
        machine.guest.fails = fails;
        let result = machine.vm.reset(&mut machine.guest);
        machine.guest.fails = None;
        let running = machine.status == VmStatus::Running;
        let legal = running || machine.status == VmStatus::Paused;
        let origin = machine.origin.clone();
        match result {
            Ok(_) => {
                let origin = origin.expect("nothing to go back to");
                assert!(legal);
                assert_eq!(machine.guest.cpu, origin.cpu, "device state after a reset");
                machine.content = origin.content.clone();
            }
            Err(ResetError::IllegalState(_)) => assert!(!legal),
            Err(ResetError::NoOrigin) => assert!(legal && origin.is_none()),
            Err(ResetError::Pause(_)) => assert!(legal && running && fails == Some(Fails::Pause)),
            Err(ResetError::Load(_)) => {
                assert!(legal && (fails == Some(Fails::Load) || running && fails == Some(Fails::Resume)));
                machine.content = origin.expect("nothing to go back to").content.clone();
                machine.status = VmStatus::Paused;
            }
            Err(other) => panic!("reset: {other}"),
        }
        Some(())
    }

    fn adopt(&mut self, point: ForkPoint<Heap>, of: &PointModel, line: Rc<Line>) {
        let model = self.hold(of.content.clone(), of.cpu, line);
        self.points.push(Point { point, model });
    }

    fn step(&mut self, op: &Op) -> Option<()> {
        match *op {
            Op::WriteRam { vm, at, len, seed } => {
                let n = pick(&self.machines, vm)?;
                let machine = &mut self.machines[n];
                let frozen = machine.status == VmStatus::Frozen;
                let start = usize::from(at) % machine.content.ram.len();
                let runs = ram_runs();
                let run = runs.iter().find(|(_, offset, len)| (*offset..offset + len).contains(&start))?;
                let end = (start + usize::from(len)).min(run.1 + run.2);
                let (data, at) = (pattern(seed, end - start), GuestAddress::new(run.0 + (start - run.1) as u64));
                match machine.vm.ram().write(at, &data) {
                    Ok(()) => {
                        assert!(!frozen);
                        machine.content.ram[start..end].copy_from_slice(&data);
                    }
                    Err(RamError::Frozen) => assert!(frozen),
                    Err(other) => panic!("{other}"),
                }
            }
            Op::DiscardRam { vm, page, count } => {
                let n = pick(&self.machines, vm)?;
                let machine = &mut self.machines[n];
                let frozen = machine.status == VmStatus::Frozen;
                let (page, count) = (u64::from(page) % RAM_PAGES[0], u64::from(count));
                let legal = page + count <= RAM_PAGES[0];
                match machine.vm.ram().discard(Gfn::new(page), PageCount::new(count)) {
                    Ok(()) => {
                        assert!(!frozen && legal);
                        machine.content.ram[page as usize * PAGE..(page + count) as usize * PAGE].fill(0);
                    }
                    Err(RamError::Frozen) => assert!(frozen),
                    Err(RamError::Hole { .. }) => assert!(!legal),
                    Err(other) => panic!("{other}"),
                }
            }
            Op::WriteDisk { vm, disk, lba, sectors, seed } => {
                let data = pattern(seed, usize::from(sectors % 18) * 512);
                self.disk_op(
                    vm,
                    disk,
                    lba,
                    u64::from(sectors % 18),
                    |disk| disk.write(Lba::new(lba.into()), &data),
                    |model, range| model.bytes[range].copy_from_slice(&data),
                )?;
            }
            Op::Discard { vm, disk, lba, count } => {
                let call = |disk: &Disk| disk.discard(Lba::new(lba.into()), SectorCount::new(count.into()));
                self.disk_op(vm, disk, lba, count.into(), call, |model, range| model.discard(range))?;
            }
            Op::WriteZeroes { vm, disk, lba, count } => {
                let call = |disk: &Disk| disk.write_zeroes(Lba::new(lba.into()), SectorCount::new(count.into()));
                self.disk_op(vm, disk, lba, count.into(), call, |model, range| model.bytes[range].fill(0))?;
            }
            Op::StepCpu { vm } => {
                let n = pick(&self.machines, vm)?;
                let guest = &mut self.machines[n].guest;
                guest.cpu = guest.cpu.wrapping_add(1);
            }
            Op::Start { vm } => {
                self.set_status(vm, &[VmStatus::Off, VmStatus::Paused], VmStatus::Running, |vm| vm.start().is_ok());
            }
            Op::Pause { vm } => {
                self.set_status(vm, &[VmStatus::Running], VmStatus::Paused, |vm| vm.pause().is_ok());
            }
            Op::PowerOff { vm } => {
                let legal = [VmStatus::Running, VmStatus::Paused];
                self.set_status(vm, &legal, VmStatus::Off, |vm| vm.power_off().is_ok());
            }
            Op::Fork { vm, fails } => self.cut(vm, fails, false)?,
            Op::Freeze { vm, fails } => self.cut(vm, fails, true)?,
            Op::Spawn { point, hook } => self.spawn(point, hook)?,
            Op::Commit { into, from } => self.commit(into, from)?,
            Op::Reset { vm, fails } => self.reset(vm, fails)?,
            Op::DropVm { vm } => {
                let n = pick(&self.machines, vm)?;
                self.machines.swap_remove(n);
            }
            Op::DropPoint { point } => {
                let n = pick(&self.points, point)?;
                self.points.swap_remove(n);
            }
            Op::Diff { a, b } => {
                let (a, b) = (&self.points[pick(&self.points, a)?], &self.points[pick(&self.points, b)?]);
                let related = a.model.line.family == b.model.line.family;
                match a.point.diff(&b.point) {
                    Ok(found) => {
                        assert!(related, "strangers compared");
                        let (x, y) = (&a.model.content, &b.model.content);
                        let named = |set: &offshoot::page::PageSet, x: &[u8], y: &[u8]| {
                            x.chunks(PAGE)
                                .zip(y.chunks(PAGE))
                                .enumerate()
                                .all(|(page, (x, y))| x == y || set.contains(PageIndex::new(page as u64)))
                        };
                        assert!(named(&found.ram, &x.ram, &y.ram), "RAM differs where diff does not say so");
                        for (at, (_, set)) in found.disks.iter().enumerate() {
                            assert!(named(set, &x.disks[at].bytes, &y.disks[at].bytes), "disk {at} differs");
                        }
                    }
                    Err(SpaceError::Unrelated(_)) => assert!(!related, "relatives refused"),
                    Err(other) => panic!("diff: {other}"),
                }
            }
            Op::Flatten { point } => {
                let point = &self.points[pick(&self.points, point)?];
                if self.points.len() >= MOST_POINTS {
                    return None;
                }
                let (flat, of) = (point.point.flatten().unwrap(), point.model.clone());
                let line = Line::root(self.families);
                self.families += 1;
                self.adopt(flat, &of, line);
            }
            Op::MergeOnto { point, ancestor } => {
                let (point, ancestor) =
                    (&self.points[pick(&self.points, point)?], &self.points[pick(&self.points, ancestor)?]);
                if self.points.len() >= MOST_POINTS {
                    return None;
                }
                let legal = point.model.line.comes_from(&ancestor.model.line);
                match point.point.merge_onto(&ancestor.point) {
                    Ok(merged) => {
                        assert!(legal, "merged onto a stranger");
                        let (of, line) = (point.model.clone(), ancestor.model.line.child());
                        self.adopt(merged, &of, line);
                    }
                    Err(SpaceError::Unrelated(_)) => assert!(!legal, "refused to merge onto an ancestor"),
                    Err(other) => panic!("merge: {other}"),
                }
            }
        }
        Some(())
    }

    /// One request to a disk: granted exactly where it is on the disk and the VM is not frozen.
    fn disk_op(
        &mut self,
        vm: u8,
        disk: u8,
        lba: u8,
        count: u64,
        call: impl FnOnce(&Disk) -> Result<(), DiskError>,
        apply: impl FnOnce(&mut DiskModel, std::ops::Range<usize>),
    ) -> Option<()> {
        let n = pick(&self.machines, vm)?;
        let machine = &mut self.machines[n];
        let at = usize::from(disk) % DISKS.len();
        let frozen = machine.status == VmStatus::Frozen;
        let model = &mut machine.content.disks[at];
        let range = model.range(lba.into(), count);
        match call(machine.vm.disk(DISKS[at])?) {
            Ok(()) => {
                assert!(!frozen, "a frozen disk was written");
                apply(model, range.expect("a request past the end was granted"));
            }
            Err(DiskError::Frozen) => assert!(frozen),
            Err(DiskError::OutOfRange { .. }) => assert!(range.is_none()),
            Err(other) => panic!("{other}"),
        }
        Some(())
    }

    fn run(mut self, ops: &[Op]) {
        for op in ops.iter().take(MOST_OPS) {
            self.step(op);
            self.check();
        }
        self.check_points();
        // Delete the parents first: nobody depends on them.
        let tree = self.tree.clone();
        if !self.machines.is_empty() {
            self.machines.remove(0);
        }
        self.check();
        self.check_points();
        drop(self);
        assert_eq!(tree.usage(), offshoot::TreeUsage::default(), "something is left");
    }
}

fuzz_target!(|input: Input| World::new(&input).run(&input.ops));
