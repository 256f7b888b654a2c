//! The life of a VM: which call is legal when, who a clone is, how deep a line may grow, and what is put off.

mod common;
mod mutants;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock, mpsc};

use common::{PAGE, RAM_PAGES, assert_empty, get, off, put, running};
use mutants::{Broken, Flaw, Has};
use offshoot::backing::{Backing, Deferred, Sealed};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageCount};
use offshoot::testing::{ScriptedGuest, Trouble};
use offshoot::{
    AtRest, BoxError, CloneSpec, CommitError, Config, DeviceState, ForkError, Guest, IdentityError, IllegalState,
    Limits, MacAddress, ResetError, SpaceError, SpawnError, Uuid, Vm, VmName, VmStatus,
};

on_every_backing! {
    every_call_in_every_status,
    a_vm_under_a_fork_is_busy,
    a_guest_that_cannot_be_resumed_leaves_its_vm_paused,
    identities_are_unique,
    a_failing_hook_leaves_nothing,
    depth_is_limited,
    a_frozen_source_never_grows,
    the_parent_may_go_first,
    a_thousand_forks_of_a_running_vm,
    commits_are_legal_where_nothing_is_lost,
    device_state_is_limited,
}

fn bring<B: Backing>(vm: &Vm<B>, guest: &mut ScriptedGuest, to: VmStatus) {
    match to {
        VmStatus::Off => {}
        VmStatus::Running => vm.start().expect("it is off"),
        VmStatus::Paused => {
            vm.start().expect("it is off");
            vm.pause().expect("it runs");
        }
        VmStatus::Frozen => {
            vm.start().expect("it is off");
            guest.set_runs(true);
            drop(vm.freeze(guest).expect("it runs"));
        }
        VmStatus::Busy => unreachable!("has a test of its own"),
    }
    guest.set_runs(to == VmStatus::Running);
}

fn every_call_in_every_status<B: Backing>() {
    use VmStatus::{Frozen, Off, Paused, Running};
    /// What becomes of a VM that is off, running, paused or frozen.
    type Outcomes = [Option<VmStatus>; 4];
    type Call<B> = fn(&Vm<B>, &mut ScriptedGuest) -> Result<(), IllegalState>;
    fn fork<B: Backing>(vm: &Vm<B>, guest: &mut ScriptedGuest) -> Result<(), IllegalState> {
        vm.fork(guest).map(drop).map_err(|error| match error {
            ForkError::IllegalState(illegal) => illegal,
            error => panic!("{error}"),
        })
    }
    fn freeze<B: Backing>(vm: &Vm<B>, guest: &mut ScriptedGuest) -> Result<(), IllegalState> {
        vm.freeze(guest).map(drop).map_err(|error| match error {
            ForkError::IllegalState(illegal) => illegal,
            error => panic!("{error}"),
        })
    }
    fn reset<B: Backing>(vm: &Vm<B>, guest: &mut ScriptedGuest) -> Result<(), IllegalState> {
        match vm.reset(guest) {
            // Legal, and nothing to go back to: it was never forked.
            Ok(_) | Err(ResetError::NoOrigin) => Ok(()),
            Err(ResetError::IllegalState(illegal)) => Err(illegal),
            Err(error) => panic!("{error}"),
        }
    }
    // What each call makes of a VM that is off, running, paused or frozen; `None` where it is illegal.
    let calls: [(&str, Call<B>, Outcomes); 6] = [
        ("start", |vm, _| vm.start(), [Some(Running), None, Some(Running), None]),
        ("pause", |vm, _| vm.pause(), [None, Some(Paused), None, None]),
        ("power_off", |vm, _| vm.power_off(), [None, Some(Off), Some(Off), None]),
        ("fork", fork, [None, Some(Running), Some(Paused), None]),
        ("freeze", freeze, [None, Some(Frozen), Some(Frozen), None]),
        ("reset", reset, [None, Some(Running), Some(Paused), None]),
    ];
    for (name, call, becomes) in calls {
        for (before, after) in [Off, Running, Paused, Frozen].into_iter().zip(becomes) {
            let (tree, vm) = off::<B>(Limits::default());
            let mut guest = ScriptedGuest::paused(1);
            bring(&vm, &mut guest, before);
            assert_eq!(vm.status(), before);
            match (call(&vm, &mut guest), after) {
                (Ok(()), Some(after)) => assert_eq!(vm.status(), after, "{name} of a VM that is {before:?}"),
                (Err(illegal), None) => {
                    assert_eq!((illegal.call, illegal.status), (name, before));
                    assert_eq!(vm.status(), before, "a refused {name} changes nothing");
                }
                (result, _) => panic!("{name} of a VM that is {before:?}: {result:?}"),
            }
            if let Some(point) = vm.origin() {
                point.teardown().wait();
            }
            drop(vm);
            assert_empty(&tree);
        }
    }
}

/// A guest whose VM is tried from inside its own fork.
struct Nosy<B: Backing> {
    vm: Arc<Vm<B>>,
    seen: Vec<IllegalState>,
}

impl<B: Backing> Guest for Nosy<B> {
    fn pause(&mut self) -> Result<(), BoxError> {
        assert_eq!(self.vm.status(), VmStatus::Busy);
        let illegal = [self.vm.start(), self.vm.pause(), self.vm.power_off()];
        self.seen.extend(illegal.into_iter().filter_map(Result::err));
        let mut inner = ScriptedGuest::running(0);
        for result in [self.vm.fork(&mut inner), self.vm.freeze(&mut inner)] {
            match result {
                Err(ForkError::IllegalState(illegal)) => self.seen.push(illegal),
                result => panic!("a VM was cut while it was being cut: {result:?}"),
            }
        }
        match self.vm.reset(&mut inner) {
            Err(ResetError::IllegalState(illegal)) => self.seen.push(illegal),
            result => panic!("a VM was reset while it was being cut: {result:?}"),
        }
        assert_eq!(inner.calls_seen(), 0, "nobody touched the other guest");
        // Reading and writing go on until the cut.
        put(&self.vm, 1, 77);
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(vec![]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

fn a_vm_under_a_fork_is_busy<B: Backing>() {
    let (_tree, vm, _) = running::<B>(Limits::default());
    let vm = Arc::new(vm);
    let mut nosy = Nosy { vm: vm.clone(), seen: Vec::new() };
    let point = vm.fork(&mut nosy).expect("the fork itself is legal");
    assert_eq!(nosy.seen.len(), 6);
    assert!(nosy.seen.iter().all(|illegal| illegal.status == VmStatus::Busy));
    assert_eq!(vm.status(), VmStatus::Running);
    assert_eq!(get(&point.spawn(CloneSpec::default()).expect("a clone"), 1), 77);
}

/// Fails whatever comes after the pause.
struct Stuck(ScriptedGuest);

impl Guest for Stuck {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.0.pause()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Err("no state".into())
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Err("no resume".into())
    }
}

fn a_guest_that_cannot_be_resumed_leaves_its_vm_paused<B: Backing>() {
    let (tree, vm, guest) = running::<B>(Limits::default());
    put(&vm, 0, 5);
    let mut stuck = Stuck(guest);
    assert!(matches!(vm.fork(&mut stuck), Err(ForkError::Save(_))));
    assert!(!stuck.0.runs());
    assert_eq!(vm.status(), VmStatus::Paused, "its guest stands still");
    assert_eq!(tree.usage().fork_points, 0);
    // The embedder gets its guest going in the end, and all is as before.
    stuck.0.resume().expect("it can now");
    vm.start().expect("it is paused");
    assert_eq!(get(&vm, 0), 5);
    drop(vm.fork(&mut stuck.0).expect("it runs again"));
}

fn identities_are_unique<B: Backing>() {
    let (_tree, vm, mut guest) = running::<B>(Limits::default());
    let point = vm.fork(&mut guest).expect("it runs");
    let (mut names, mut generations) = (HashSet::new(), HashSet::new());
    let (mut macs, mut uuids) = (HashSet::new(), HashSet::new());
    let mut clones = vec![vm];
    clones.extend((0..1000).map(|_| point.spawn(CloneSpec::default()).expect("a clone")));
    for clone in &clones {
        let id = clone.identity();
        assert!(names.insert(id.name.clone()) && generations.insert(id.generation), "{id:?}");
        assert!(macs.insert(id.mac) && uuids.insert(id.uuid), "{id:?}");
        assert!(id.mac.bytes()[0] & 1 == 0, "unicast");
    }
    // What is chosen is kept; the generation cannot be chosen.
    let mut config = Config::new();
    config.set("role", "worker").expect("small");
    let (mac, uuid) = (MacAddress::from_bytes([2, 0, 0, 0, 0, 9]), Uuid::from_bytes([9; 16]));
    let name = VmName::new("chosen").expect("a name");
    let spec = CloneSpec { name: Some(name.clone()), mac: Some(mac), uuid: Some(uuid), config, prefault: None };
    for _ in 0..2 {
        let clone = point.spawn(spec.clone()).expect("a clone");
        let id = clone.identity();
        assert_eq!((&id.name, id.mac, id.uuid, id.config.get("role")), (&name, mac, uuid, Some("worker")));
        assert!(generations.insert(id.generation), "new for every clone");
    }
    let mut full = Config::new();
    full.set("k", "v".repeat(Config::LIMIT.get() as usize - 1)).expect("exactly the limit");
    assert!(matches!(full.set("l", ""), Err(IdentityError::ConfigTooBig { .. })));
    assert_eq!(full.iter().count(), 1, "a refused key changes nothing");
}

fn a_failing_hook_leaves_nothing<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits::default());
    let point = vm.fork(&mut guest).expect("it runs");
    point.teardown().wait();
    let before = tree.usage();
    for trouble in [Trouble::Error, Trouble::Panic] {
        let mut hook = ScriptedGuest::paused(0);
        hook.fail_nth_call(1, trouble);
        let spawn = std::panic::AssertUnwindSafe(|| {
            point.spawn_with(CloneSpec::default(), |clone| {
                assert_eq!(clone.status(), VmStatus::Busy);
                assert!(clone.start().is_err(), "nobody can run it yet");
                put(clone, 3, 1);
                clone.disk("d").expect("it has one").write(Lba::ZERO, &[1; 512])?;
                hook.call()
            })
        });
        match (std::panic::catch_unwind(spawn), trouble) {
            (Ok(Err(SpawnError::Customize(_))), Trouble::Error) | (Err(_), Trouble::Panic) => {}
            (result, _) => panic!("{trouble:?}: {result:?}"),
        }
        assert_eq!(tree.usage(), before);
    }
    let clone = point.spawn(CloneSpec::default()).expect("a clone");
    assert_eq!((clone.status(), get(&clone, 3)), (VmStatus::Paused, 0));
}

fn depth_is_limited<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits { depth: 3, ..Limits::default() });
    let mut points = Vec::new();
    for depth in 1..=3 {
        put(&vm, 0, depth);
        points.push(vm.fork(&mut guest).expect("within the limit"));
        assert_eq!(u64::from(points[points.len() - 1].depth()), depth);
    }
    put(&vm, 0, 4);
    match vm.fork(&mut guest) {
        Err(ForkError::Cut(SpaceError::DepthLimit { depth: 4, limit: 3 })) => {}
        result => panic!("{result:?}"),
    }
    assert!(guest.runs() && vm.status() == VmStatus::Running && get(&vm, 0) == 4);
    assert_eq!(tree.usage().fork_points, 3);
    // The remedies that the message names.
    let mut clone_guest = ScriptedGuest::paused(0);
    for shallow in [points[2].flatten().expect("flat"), points[2].merge_onto(&points[0]).expect("merged")] {
        let clone = shallow.spawn(CloneSpec::default()).expect("a clone");
        assert_eq!(get(&clone, 0), 3);
        drop(clone.fork(&mut clone_guest).expect("there is room again"));
    }
}

fn a_frozen_source_never_grows<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits::default());
    (0..RAM_PAGES).for_each(|page| put(&vm, page, page + 1));
    let point = vm.freeze(&mut guest).expect("it runs");
    assert!(!guest.runs(), "it stays stopped");
    point.teardown().wait();
    let (usage, total) = (vm.usage().expect("usage"), tree.usage());
    for n in 0..10_000 {
        let clone = point.spawn(CloneSpec::default()).expect("a clone");
        put(&clone, n % RAM_PAGES, n);
    }
    assert_eq!(vm.usage().expect("usage"), usage);
    assert_eq!(tree.usage(), total);
    assert_eq!((vm.status(), point.depth()), (VmStatus::Frozen, 1));
    assert!(vm.ram().write(GuestAddress::ZERO, &[1]).is_err());
    assert!(vm.disk("d").expect("it has one").write(Lba::ZERO, &[1; 512]).is_err());
    assert_eq!(get(&vm, 3), 4, "it can still be read");
    assert!(matches!(vm.freeze(&mut guest), Err(ForkError::IllegalState(_))), "frozen twice");
    assert!(vm.origin().expect("its fork point").ram().same(point.ram()));
}

fn the_parent_may_go_first<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits::default());
    (0..RAM_PAGES).for_each(|page| put(&vm, page, 100 + page));
    let point = vm.fork(&mut guest).expect("it runs");
    put(&vm, 0, 1);
    let clones: Vec<_> = (0..20).map(|_| point.spawn(CloneSpec::default()).expect("a clone")).collect();
    let teardown = point.teardown().clone();
    drop(vm);
    drop(point);
    for (n, clone) in clones.iter().enumerate() {
        put(clone, 1, n as u64);
    }
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!((get(clone, 0), get(clone, 1), get(clone, 2)), (100, n as u64, 102));
    }
    assert_eq!(tree.usage().vms, 20);
    drop(clones);
    teardown.wait();
    assert_empty(&tree);
}

fn a_thousand_forks_of_a_running_vm<B: Backing>() {
    const FORKS: u64 = 1000;
    let (tree, vm, mut guest) = running::<B>(Limits::default());
    let mut kept = Vec::new();
    let mut most_images = 0;
    for n in 1..=FORKS {
        put(&vm, n % RAM_PAGES, n);
        let point = vm.fork(&mut guest).expect("it runs");
        point.teardown().wait();
        if n % 250 == 0 {
            kept.push((n, point));
        }
        most_images = most_images.max(tree.usage().images);
    }
    let usage = vm.usage().expect("usage").ram;
    assert_eq!(u64::from(usage.depth), FORKS, "every fork counts");
    // A layer for each page at the most, however many forks there were.
    assert!(u64::from(usage.layers) <= RAM_PAGES + 1, "{usage:?}");
    // RAM's and the disk's image of the points kept, of the one lain on, and of the one being replaced.
    assert!(most_images <= 2 * (kept.len() as u64 + 3), "{most_images} images at once");
    for (n, point) in &kept {
        let clone = point.spawn(CloneSpec::default()).expect("a clone");
        for page in 0..RAM_PAGES {
            let want = (0..RAM_PAGES).map(|back| n.saturating_sub(back)).find(|n| n % RAM_PAGES == page).unwrap_or(0);
            assert_eq!(get(&clone, page), want, "page {page} of fork {n}");
        }
    }
    vm.validate().expect("all is right");
}

fn commits_are_legal_where_nothing_is_lost<B: Backing>() {
    let (_tree, vm, mut guest) = running::<B>(Limits::default());
    put(&vm, 0, 1);
    let point = vm.fork(&mut guest).expect("it runs");
    let clone = point.spawn(CloneSpec::default()).expect("a clone");
    put(&clone, 1, 2);
    clone.disk("d").expect("it has one").write(Lba::new(9), &[7; 512]).expect("it can be written");
    let Err(failed) = vm.commit(clone) else { panic!("a running VM took a commit") };
    assert!(matches!(failed.0, CommitError::IllegalState(IllegalState { status: VmStatus::Running, .. })));
    vm.pause().expect("it runs");
    put(&vm, 5, 5);
    let Err(failed) = vm.commit(failed.1) else { panic!("a VM that had written took a commit") };
    assert!(matches!(failed.0, CommitError::Diverged));
    assert_eq!((get(&vm, 1), get(&vm, 5)), (0, 5), "nothing was changed");
    guest.set_runs(false);
    vm.reset(&mut guest).expect("back to the fork point");
    let stranger = point.flatten().expect("flat").spawn(CloneSpec::default()).expect("a clone");
    let Err(other) = vm.commit(stranger) else { panic!("a stranger was committed") };
    assert!(matches!(other.0, CommitError::NotAChild));
    failed.1.start().expect("it is paused");
    let Err(failed) = vm.commit(failed.1) else { panic!("a running clone was committed") };
    assert!(matches!(failed.0, CommitError::IllegalState(_)));
    failed.1.power_off().expect("it runs");
    vm.commit(failed.1).unwrap_or_else(|failed| panic!("{}", failed.0));
    let mut sector = [0; 512];
    vm.disk("d").expect("it has one").read(Lba::new(9), &mut sector).expect("it can be read");
    assert_eq!((get(&vm, 0), get(&vm, 1), sector), (1, 2, [7; 512]));
    // The fork point is as it was.
    assert_eq!(get(&point.spawn(CloneSpec::default()).expect("a clone"), 1), 0);
}

fn device_state_is_limited<B: Backing>() {
    let (tree, vm, _) = running::<B>(Limits { device_state: ByteSize::new(100), ..Limits::default() });
    match vm.fork(&mut AtRest(DeviceState::from_bytes(vec![0; 101]))) {
        Err(ForkError::StateTooBig { size, limit }) => assert_eq!((size.get(), limit.get()), (101, 100)),
        result => panic!("{result:?}"),
    }
    assert_eq!((vm.status(), tree.usage().fork_points), (VmStatus::Running, 0));
    let point = vm.fork(&mut AtRest(DeviceState::from_bytes(vec![3; 100]))).expect("exactly the limit");
    assert_eq!(*point.device_state().encode(), [3; 100]);
}

/// Work that ends when the test says so, and tells on which thread it ended.
struct Gate(mpsc::Receiver<()>, mpsc::Sender<Option<String>>);

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.recv().ok();
        self.1.send(std::thread::current().name().map(str::to_owned)).ok();
    }
}

static GATE: Mutex<Option<Gate>> = Mutex::new(None);

/// Puts off work that takes as long as the test wants.
#[derive(Debug)]
struct Slow;

impl Has for Slow {
    const FLAW: Flaw = Flaw::None;

    fn deferred(own: Deferred) -> Deferred {
        drop(own);
        Deferred::costly(GATE.lock().expect("no thread panics with it").take())
    }
}

#[test]
fn what_is_costly_is_put_off_until_the_guest_runs() {
    let (open, gate) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let (tree, vm, mut guest) = running::<Broken<Slow>>(Limits::default());
    *GATE.lock().expect("no thread panics with it") = Some(Gate(gate, tell));
    let point = vm.fork(&mut guest).expect("the fork does not wait for what it puts off");
    assert!(guest.runs());
    assert_eq!(point.teardown().finished(), None, "the gate is closed");
    let waiter = point.teardown().clone();
    let took = OnceLock::new();
    std::thread::scope(|scope| {
        scope.spawn(|| took.set(waiter.wait()));
        open.send(()).expect("the work waits");
    });
    assert_eq!(point.teardown().finished(), took.get().copied());
    assert_eq!(told.recv().expect("it was dropped").as_deref(), Some("offshoot-teardown"));
    // Without anything costly there is nothing to wait for.
    let second = vm.fork(&mut guest).expect("it runs");
    second.teardown().wait();
    drop((vm, point, second));
    assert_empty(&tree);
}

#[test]
fn what_is_cheap_is_done_before_the_fork_returns() {
    #[derive(Debug)]
    struct Quick;
    impl Has for Quick {
        const FLAW: Flaw = Flaw::None;

        fn deferred(own: Deferred) -> Deferred {
            assert!(!own.is_costly(), "the heap puts off nothing that takes long");
            own
        }
    }
    let (_tree, vm, mut guest) = running::<Broken<Quick>>(Limits::default());
    let point = vm.fork(&mut guest).expect("it runs");
    assert_eq!(point.teardown().finished(), Some(std::time::Duration::ZERO));
    let timings = point.timings();
    assert!(timings.total >= timings.stopped(), "{timings:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_reset_by_a_list_drops_what_is_listed() {
    use offshoot::backing::Mapped;
    use offshoot::page::{PageIndex, PageSet};
    let (_tree, vm, mut guest) = running::<Mapped>(Limits::default());
    (0..RAM_PAGES).for_each(|page| put(&vm, page, page));
    let point = vm.fork(&mut guest).expect("it runs");
    let clone = point.spawn(CloneSpec::default()).expect("a clone");
    let mut rewinder = ScriptedGuest::paused(0);
    [2, 3, 9].into_iter().for_each(|page| put(&clone, page, 1 << 40));
    let list: PageSet = [2, 9].into_iter().map(PageIndex::new).collect();
    assert_eq!(clone.reset_listed(&mut rewinder, &list).expect("it is paused"), PageCount::new(2));
    assert_eq!((get(&clone, 2), get(&clone, 9)), (2, 9));
    assert_eq!(get(&clone, 3), 1 << 40, "what is left out stays");
    let past: PageSet = [RAM_PAGES].into_iter().map(PageIndex::new).collect();
    assert!(clone.reset_listed(&mut rewinder, &past).is_err());
    clone.reset(&mut rewinder).expect("it is paused");
    assert_eq!(get(&clone, 3), 3);
    assert_eq!(clone.ram().usage().expect("usage").private.get() * PAGE, 0);
}
