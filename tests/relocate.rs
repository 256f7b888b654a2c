//! Forks that move RAM to other addresses, without a hypervisor: what holds through them, and that every failing step leaves the VM where
//! it was with nothing left behind.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::disk::{Access, Disk};
use offshoot::page::{
    ByteOffset, ByteSize, Gfn, GuestAddress, Lba, PageCount, PageIndex, PageRange, PageSize, SectorCount,
};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::testing::{Dice, Flat};
use offshoot::{
    AtRest, BoxError, CloneSpec, DeviceState, DiskName, ForkError, ForkPoint, Guest, LivePolicy, OnExceeded,
    PrecopyEnd, Relocate, SpaceError, SpawnError, Tree, Vm, VmName, VmStatus,
};

const REGION: ByteSize = ByteSize::mib(1);
const HIGH: u64 = 16 << 20;

/// The two ways to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Everything is copied in the pause.
    Stopped,
    /// Copied ahead.
    Live,
}

const WAYS: [Way; 2] = [Way::Stopped, Way::Live];

fn move_by(way: Way, vm: &Vm<Mapped>, guest: &mut (impl Relocate + ?Sized)) -> Result<ForkPoint<Mapped>, ForkError> {
    match way {
        Way::Stopped => vm.fork_relocating(guest),
        Way::Live => vm.fork_live_relocating(guest, &LivePolicy::default()),
    }
}

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
    on_pause: Option<Box<dyn FnMut()>>,
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
        self.on_pause.iter_mut().for_each(|then| then());
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
    Passive { fail, running: true, decoy, decoys: Vec::new(), hole: None, places: Vec::new(), on_pause: None }
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
            2 | 6 => move_by(Way::Live, &parent, &mut guest).unwrap(),
            _ => move_by(Way::Stopped, &parent, &mut guest).unwrap(),
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
        for (forks_before, way) in [0, 1].into_iter().flat_map(|before| WAYS.map(|way| (before, way))) {
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
            let failed = catch_unwind(AssertUnwindSafe(|| move_by(way, &parent, &mut guest)));
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
            assert_eq!((parent.status(), base(&parent)), (VmStatus::Running, before), "{fail:?}, {way:?}");
            let now = tree.usage();
            assert_eq!((now.vms, now.fork_points, now.images), (usage.vms, usage.fork_points, usage.images));
            check(&parent, 2);
            // And it can be forked either way afterwards.
            guest.fail = Fail::Nothing;
            stamp(&parent, 3);
            let moved = move_by(way, &parent, &mut guest).unwrap();
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
    for (forks_before, way) in [0, 1, 2].into_iter().flat_map(|before| WAYS.map(|way| (before, way))) {
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
            let forked = move_by(way, &parent, &mut guest);
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
                    let point = move_by(way, &parent, &mut guest).unwrap();
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
fn a_vm_whose_addresses_are_leased_is_not_moved() {
    use offshoot::frontend::vm_memory::lease;
    use vm_memory::Bytes;
    let at = |at| vm_memory::GuestAddress(at);
    // As a first fork, whose old view writes the file that is sealed, and as a later one.
    for forks_before in [0, 1] {
        let parent = vm(&Tree::default());
        let mut guest = passive(Fail::Nothing);
        stamp(&parent, 1);
        for _ in 0..forks_before {
            parent.fork_relocating(&mut guest).unwrap().teardown().wait();
        }
        stamp(&parent, 2);
        let home = base(&parent);
        // Whatever it is asked, it fails: it is asked nothing.
        guest.fail = Fail::NextHole;
        let refused = |guest: &mut Passive| {
            for way in WAYS {
                let refused = move_by(way, &parent, guest);
                assert!(matches!(refused, Err(ForkError::Cut(SpaceError::Leased))), "{refused:?}");
                assert_eq!((guest.running, base(&parent), parent.status()), (true, home, VmStatus::Running));
                check(&parent, 2);
            }
        };
        let leased = lease(parent.ram()).unwrap();
        refused(&mut guest);
        let memory = leased.guest_memory().unwrap();
        refused(&mut guest);
        // One region is enough.
        let (_, region) = memory.remove_region(at(HIGH), REGION.get()).unwrap();
        drop(memory);
        refused(&mut guest);
        drop(region);
        // One that was taken since: the guest is paused by then, and nothing is sealed.
        let taken = std::sync::Arc::new(std::sync::Mutex::new(None));
        guest.fail = Fail::Nothing;
        guest.on_pause = Some({
            let (ram, taken) = (parent.ram().clone(), taken.clone());
            Box::new(move || *taken.lock().unwrap() = Some(lease(&ram).unwrap().guest_memory().unwrap()))
        });
        refused(&mut guest);
        guest.on_pause = None;
        let memory = taken.lock().unwrap().take().unwrap();
        memory.write_obj(77u8, at(0x7000)).unwrap();
        assert_eq!(parent.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 77);
        // In place it can be forked as ever, and the lease goes on working.
        if forks_before == 1 {
            parent.fork(&mut guest).unwrap();
            memory.write_obj(78u8, at(0x7000)).unwrap();
        }
        drop(memory);
        let point = parent.fork_relocating(&mut guest).unwrap();
        assert_ne!(base(&parent), home);
        check(&parent, 2);
        // New ones, at the new place, are as good as any.
        let memory = lease(parent.ram()).unwrap().guest_memory().unwrap();
        memory.write_obj(79u8, at(0x7000)).unwrap();
        assert_eq!(parent.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 79);
        let clone = point.spawn(CloneSpec::default()).unwrap();
        assert_eq!(clone.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 77 + forks_before);
        check(&clone, 2);
    }
}

/// The contract says that nobody writes there. Whoever does all the same, once the old view was torn down, reaches nothing.
#[test]
fn old_addresses_that_are_kept_are_cut_off_from_the_fork_point() {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Nothing);
    stamp(&parent, 1);
    let stale = parent.ram().place().unwrap();
    let point = parent.fork_relocating(&mut guest).unwrap();
    point.teardown().wait();
    let at = (stale.host_ranges().next().unwrap().host.addr().get() + 0x3000) as u64;
    memory.write_all_at(&[99], at).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).unwrap();
    assert_eq!(byte, [99]);
    check(&parent, 1);
    check(&point.spawn(CloneSpec::default()).unwrap(), 1);
}

/// A guest over any RAM, which may refuse to move.
struct Mover<'a> {
    len: ByteSize,
    refuse: bool,
    pause: &'a mut dyn FnMut(),
}

impl Guest for Mover<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        (self.pause)();
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes([]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Relocate for Mover<'_> {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        Ok(AddressHole::pick(self.len)?)
    }

    fn relocate(&mut self, _: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
        if self.refuse { Err("refused".into()) } else { Ok(Deferred::default()) }
    }
}

fn rest() -> AtRest {
    AtRest(DeviceState::from_bytes([]))
}

fn flat_vm(pages: u64, page: ByteSize) -> Vm<Mapped> {
    let size = PageSize::new(page).unwrap();
    let layout = RamLayout::flat(size.size_of(PageCount::new(pages)), size).unwrap();
    let vm = Vm::new(&Tree::default(), VmName::new("flat").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    vm
}

fn bytes(vm: &Vm<Mapped>) -> Vec<u8> {
    let mut bytes = vec![0; vm.ram().layout().geometry().len().get() as usize];
    vm.ram().read(GuestAddress::ZERO, &mut bytes).unwrap();
    bytes
}

/// Everything that a pre-copy found, where the kernel lets it.
fn copied(point: &ForkPoint<Mapped>) -> Option<u64> {
    let precopy = point.timings().precopy.unwrap();
    let rounds: u64 = precopy.rounds().iter().map(|round| round.pages.get()).sum();
    (!matches!(precopy.end, PrecopyEnd::Fallback(_))).then(|| rounds + precopy.last.pages.get())
}

#[test]
fn write_protection_goes_with_the_old_place_and_stays_if_it_is_kept() {
    let vm = flat_vm(256, ByteSize::kib(4));
    let touch = |pages: std::ops::Range<u64>, value: u8| {
        pages.for_each(|page| vm.ram().store(GuestAddress::new(page * 4096), value).unwrap());
    };
    let mut mover = Mover { len: ByteSize::mib(1), refuse: false, pause: &mut || {} };
    let live = |guest: &mut Mover<'_>| vm.fork_live(guest, &LivePolicy::default()).unwrap();
    vm.fork(&mut mover).unwrap();
    touch(0..100, 1);
    let Some(found) = copied(&live(&mut mover)) else {
        assert!(!std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all"), "no write protection here");
        return eprintln!("SKIPPED: no write protection here");
    };
    assert_eq!((found, vm.ram().usage().unwrap().private.get()), (100, 100), "its pages stay private");
    // Undone: only what is written since is found.
    touch(100..103, 2);
    mover.refuse = true;
    assert!(matches!(vm.fork_relocating(&mut mover), Err(ForkError::Relocate(_))));
    vm.validate().unwrap();
    assert_eq!(vm.dirty().unwrap().ram.count().get(), 3);
    assert_eq!(copied(&live(&mut mover)), Some(3));
    // Moved: the pages of both live forks are read from their layers, and nothing is private.
    touch(50..52, 3);
    let before = bytes(&vm);
    mover.refuse = false;
    let point = vm.fork_relocating(&mut mover).unwrap();
    point.teardown().wait();
    vm.validate().unwrap();
    assert!(bytes(&vm) == before && bytes(&point.spawn(CloneSpec::default()).unwrap()) == before);
    assert!(vm.ram().usage().unwrap().private.is_zero() && vm.dirty().unwrap().ram.is_empty());
    // And the new place is watched from its first live fork on.
    touch(200..205, 4);
    assert_eq!(copied(&live(&mut mover)), Some(5));
    touch(201..203, 5);
    assert_eq!(copied(&live(&mut mover)), Some(2));
    vm.reset(&mut rest()).unwrap();
    vm.validate().unwrap();

    // Both at once: given up or refused, it is where it was and goes by what it knew; done, nothing private is left behind.
    touch(10..14, 6);
    let (home, before) = (base(&vm), bytes(&vm));
    let none = LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..LivePolicy::default() };
    assert!(matches!(vm.fork_live_relocating(&mut mover, &none), Err(ForkError::PauseTooLong { .. })));
    mover.refuse = true;
    assert!(matches!(move_by(Way::Live, &vm, &mut mover), Err(ForkError::Relocate(_))));
    assert_eq!((base(&vm), vm.dirty().unwrap().ram.count().get()), (home, 4));
    vm.validate().unwrap();
    mover.refuse = false;
    let point = move_by(Way::Live, &vm, &mut mover).unwrap();
    assert_eq!((base(&vm) == home, copied(&point)), (false, Some(4)));
    point.teardown().wait();
    assert!(vm.ram().usage().unwrap().private.is_zero() && vm.dirty().unwrap().ram.is_empty());
    assert!(bytes(&vm) == before && bytes(&point.spawn(CloneSpec::default()).unwrap()) == before);
    vm.validate().unwrap();
}

/// Random lives of forks in place, live and moving, done and undone, and resets; a model says what is right.
#[test]
fn forks_of_every_kind_and_resets_agree_with_a_model() {
    let mut kinds = [0; 8];
    for (seed, page) in [(1, 4), (2, 4), (3, 4), (4, 4), (5, 16), (6, 16)] {
        life(&flat_vm(96, ByteSize::kib(page)), &mut Dice::new(seed), 40, 2, &mut kinds);
    }
    assert!(kinds.iter().all(|&times| times > 5), "{kinds:?}");
}

fn scribble(vm: &Vm<Mapped>, model: &mut Flat, dice: &mut Dice) {
    let geometry = vm.ram().layout().geometry();
    for _ in 0..dice.below(20) {
        let len = 1 + dice.below(9000);
        let at = dice.below(geometry.len().get() - len);
        let data = if dice.below(4) == 0 { vec![0; len as usize] } else { dice.bytes(len) };
        vm.ram().write(GuestAddress::new(at), &data).unwrap();
        model.write(ByteOffset::new(at), &data);
    }
    if dice.below(2) == 0 {
        let first = dice.below(geometry.pages().get() - 4);
        let range = PageRange::new(PageIndex::new(first), PageCount::new(1 + dice.below(4))).unwrap();
        vm.ram().discard(Gfn::new(first), range.count()).unwrap();
        model.zero(range);
    }
}

fn life(vm: &Vm<Mapped>, dice: &mut Dice, steps: u32, generations: u32, kinds: &mut [u32; 8]) {
    let len = vm.ram().layout().geometry().len();
    let mut model = Flat::new(vm.ram().layout().geometry(), &bytes(vm));
    let mut origin: Option<Flat> = None;
    // With what each read as when it was made.
    let mut points: Vec<(ForkPoint<Mapped>, Flat)> = Vec::new();
    for step in 0..steps {
        scribble(vm, &mut model, dice);
        let kind = dice.below(8) as usize;
        let (home, policy) = (base(vm), LivePolicy { max_rounds: dice.below(3) as u32, ..Default::default() });
        let forked = {
            // The guest's last writes are made once a live fork has copied, and RAM's next place is chosen.
            let mut pause = || scribble(vm, &mut model, dice);
            let mut guest = Mover { len, refuse: matches!(kind, 4 | 7), pause: &mut pause };
            match kind {
                0 => Some(vm.fork(&mut guest).unwrap()),
                1 | 2 => Some(vm.fork_live(&mut guest, &policy).unwrap()),
                3 => Some(vm.fork_relocating(&mut guest).unwrap()),
                4 => {
                    assert!(matches!(vm.fork_relocating(&mut guest), Err(ForkError::Relocate(_))));
                    None
                }
                6 => Some(vm.fork_live_relocating(&mut guest, &policy).unwrap()),
                7 => {
                    let refused = vm.fork_live_relocating(&mut guest, &policy);
                    assert!(matches!(refused, Err(ForkError::Relocate(_))));
                    None
                }
                _ => None,
            }
        };
        assert_eq!(base(vm) != home, matches!(kind, 3 | 6), "step {step}");
        if kind == 5
            && let Some(origin) = &origin
        {
            vm.reset(&mut rest()).unwrap();
            model = origin.clone();
        }
        kinds[kind] += 1;
        if let Some(point) = forked {
            assert!(vm.dirty().unwrap().ram.is_empty(), "step {step}");
            origin = Some(model.clone());
            points.push((point, model.clone()));
        }
        assert_eq!(model.first_difference(&bytes(vm)), None, "step {step}, kind {kind}");
        vm.validate().unwrap();
        if let Some(origin) = &origin {
            let (dirty, changed) = (vm.dirty().unwrap().ram, model.changed(origin));
            assert!(changed.difference(&dirty).is_empty(), "step {step}, kind {kind}");
        }
        if generations > 0
            && dice.below(12) == 0
            && let Some((point, _)) = points.last()
        {
            let clone = point.spawn(CloneSpec::default()).unwrap();
            clone.start().unwrap();
            life(&clone, dice, steps / 4, generations - 1, kinds);
        }
    }
    // Whatever the VM did since, each fork point is what it was.
    for (point, model) in &points {
        point.teardown().wait();
        point.validate().unwrap();
        assert_eq!(model.first_difference(&bytes(&point.spawn(CloneSpec::default()).unwrap())), None);
    }
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
