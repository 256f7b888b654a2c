//! Who is let in: every refusal, on a host that is as full as the test says; that nothing is left by it, that everything counted comes
//! back, and that a look is rare. Descriptors and mappings once for real.

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::{assert_empty, off, off_on, put, running};
use offshoot::backing::{Backing, Heap};
use offshoot::page::ByteSize;
use offshoot::testing::{FakeHost, ScriptedGuest};
use offshoot::{
    Admission, AdmissionError, BuildError, CloneSpec, ForkPoint, HostCheck, Limits, MemoryLimit, SpawnError, Tree, Vm,
};

const MOMENT: Duration = Duration::from_millis(11);
const WHILE: Duration = Duration::from_millis(101);

on_every_backing!(
    a_tree_has_as_many_vms_as_it_may,
    short_of_memory,
    short_in_the_cgroup,
    what_is_expected_of_clones_is_set_aside,
    what_was_written_is_not_set_aside_twice,
    what_others_came_to_hold_is_not_what_clones_wrote,
    what_others_gave_back_is_not_set_aside,
    what_the_embedder_opens_for_each_counts,
    a_burst_between_two_looks_stays_below_the_ceiling,
    a_refusal_is_looked_up_again,
    looks_are_rare,
    a_host_that_is_not_looked_at_refuses_nobody,
    clones_that_fail_count_for_nothing,
);

/// A tree with this admission on a fake host, and a fork point in it.
fn point_on<B: Backing>(
    host: &std::sync::Arc<FakeHost>,
    admission: Admission,
) -> (Tree, Vm<B>, ScriptedGuest, ForkPoint<B>) {
    let tree = host.tree(Limits { admission, ..Limits::default() });
    let vm: Vm<B> = off_on(&tree).expect("a VM");
    vm.start().expect("it is off");
    let mut guest = ScriptedGuest::running(1);
    put(&vm, 1, 1);
    let point = vm.fork(&mut guest).expect("a fork point");
    point.teardown().wait();
    (tree, vm, guest, point)
}

fn spawn<B: Backing>(point: &ForkPoint<B>) -> Result<Vm<B>, AdmissionError> {
    match point.spawn(CloneSpec::default()) {
        Ok(clone) => Ok(clone),
        Err(SpawnError::Refused(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// Spawns until refused.
fn fill<B: Backing>(point: &ForkPoint<B>) -> (Vec<Vm<B>>, AdmissionError) {
    let mut clones = Vec::new();
    loop {
        match spawn(point) {
            Ok(clone) => clones.push(clone),
            Err(error) => return (clones, error),
        }
        assert!(clones.len() < 10_000, "nothing is refused");
    }
}

fn a_tree_has_as_many_vms_as_it_may<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits { vms: 5, ..Limits::default() });
    let point = vm.fork(&mut guest).unwrap();
    point.teardown().wait();
    let before = tree.usage();
    let (mut clones, error) = fill(&point);
    assert_eq!((clones.len(), error), (4, AdmissionError::Vms { held: 5, limit: 5 }));
    assert!(error.to_string().contains("Limits::vms"), "{error}");
    let none = off_on::<B>(&tree);
    assert!(matches!(none, Err(BuildError::Refused(AdmissionError::Vms { .. }))), "{none:?}");
    clones.pop();
    clones.push(spawn(&point).expect("one has gone"));
    drop(clones);
    assert_eq!(tree.usage(), before);
    drop((point, vm));
    assert_empty(&tree);
}

fn short_of_memory<B: Backing>() {
    let host = FakeHost::new();
    let admission = Admission { spare_memory: ByteSize::mib(100), ..Admission::default() };
    let (tree, vm, _guest, point) = point_on::<B>(&host, admission);
    let before = tree.usage();
    let clone = spawn(&point).expect("nothing is limited");
    host.set_available(ByteSize::mib(99), MemoryLimit::Host);
    host.pass_time(WHILE);
    let error = spawn(&point).unwrap_err();
    assert!(error.to_string().contains("MemAvailable"), "{error}");
    let expected = AdmissionError::Memory {
        needed: ByteSize::ZERO,
        owed: ByteSize::ZERO,
        spare: ByteSize::mib(100),
        available: ByteSize::mib(99),
        limit: MemoryLimit::Host,
    };
    assert_eq!(error, expected);
    let none = off_on::<B>(&tree);
    assert!(matches!(none, Err(BuildError::Refused(AdmissionError::Memory { .. }))), "{none:?}");
    host.set_available(ByteSize::mib(100), MemoryLimit::Host);
    host.pass_time(WHILE);
    drop((spawn(&point).expect("there is enough again"), clone));
    assert_eq!(tree.usage(), before);
    drop((point, vm));
    assert_empty(&tree);
}

fn short_in_the_cgroup<B: Backing>() {
    let host = FakeHost::new();
    host.set_available(ByteSize::mib(100), MemoryLimit::Cgroup);
    let tree = host.tree(Limits::default());
    let Err(BuildError::Refused(error)) = off_on::<B>(&tree) else { panic!("128 MiB are to stay free") };
    assert!(error.to_string().contains("cgroup"), "{error}");
    assert_empty(&tree);
}

fn what_is_expected_of_clones_is_set_aside<B: Backing>() {
    let host = FakeHost::new();
    host.set_available(ByteSize::mib(1000), MemoryLimit::Host);
    let (spare_memory, private_per_clone) = (ByteSize::mib(100), ByteSize::mib(90));
    let admission = Admission { spare_memory, private_per_clone, ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let (mut clones, error) = fill(&point);
    assert_eq!(clones.len(), 10);
    let AdmissionError::Memory { needed, owed, available, .. } = error else { panic!("{error}") };
    assert_eq!((needed, owed, available), (private_per_clone, ByteSize::mib(900), ByteSize::mib(1000)));
    assert_eq!(tree.usage().expected, ByteSize::mib(900));
    // However often it looks, nobody has written yet.
    for _ in 0..3 {
        host.pass_time(WHILE);
        spawn(&point).unwrap_err();
    }
    clones.truncate(4);
    assert_eq!(fill(&point).0.len(), 6);
    drop(clones);
    assert_eq!(tree.usage().expected, ByteSize::ZERO);
}

fn what_was_written_is_not_set_aside_twice<B: Backing>() {
    let host = FakeHost::new();
    let set = |available, anonymous| {
        host.set_available(ByteSize::mib(available), MemoryLimit::Host);
        host.set_anonymous(ByteSize::mib(anonymous));
    };
    set(1000, 50);
    let (spare_memory, private_per_clone) = (ByteSize::mib(100), ByteSize::mib(90));
    let admission = Admission { spare_memory, private_per_clone, ..Admission::default() };
    let (_tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let clones: Vec<_> = (0..6).map(|_| spawn(&point).unwrap()).collect();
    // They have written half of it: of the 730 left, 270 are set aside for the other half and 100 spare.
    set(730, 320);
    host.pass_time(WHILE);
    assert_eq!(fill(&point).0.len(), 4);
    // All of it, and more than was expected.
    set(400, 650);
    host.pass_time(WHILE);
    assert_eq!(fill(&point).0.len(), 3);
    drop(clones);
}

fn what_others_came_to_hold_is_not_what_clones_wrote<B: Backing>() {
    let host = FakeHost::new();
    let set = |available, anonymous| {
        host.set_available(ByteSize::mib(available), MemoryLimit::Host);
        host.set_anonymous(ByteSize::mib(anonymous));
        host.pass_time(WHILE);
    };
    set(1000, 50);
    let (spare_memory, private_per_clone) = (ByteSize::mib(100), ByteSize::mib(90));
    let admission = Admission { spare_memory, private_per_clone, ..Admission::default() };
    let (_tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    drop(spawn(&point).unwrap());
    // While no clone is alive, the process comes to hold more for itself.
    set(650, 400);
    let clones = fill(&point).0;
    assert_eq!(clones.len(), 6);
    // None of them has written anything.
    host.pass_time(WHILE);
    assert_eq!(fill(&point).0.len(), 0);
    drop(clones);
}

fn what_others_gave_back_is_not_set_aside<B: Backing>() {
    let host = FakeHost::new();
    let set = |available, anonymous| {
        host.set_available(ByteSize::mib(available), MemoryLimit::Host);
        host.set_anonymous(ByteSize::mib(anonymous));
        host.pass_time(WHILE);
    };
    set(1000, 800);
    let (spare_memory, private_per_clone) = (ByteSize::mib(100), ByteSize::mib(90));
    let admission = Admission { spare_memory, private_per_clone, ..Admission::default() };
    let (_tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let clones: Vec<_> = (0..6).map(|_| spawn(&point).unwrap()).collect();
    set(1700, 100);
    drop(spawn(&point).unwrap());
    // They have written all of it.
    set(1160, 640);
    assert_eq!(fill(&point).0.len(), 11);
    drop(clones);
}

fn what_the_embedder_opens_for_each_counts<B: Backing>() {
    let host = FakeHost::new();
    host.set_descriptors(100, 1024);
    host.set_mappings(1000, 65_530);
    let admission = Admission { spare_descriptors: 64, descriptors_per_clone: 3, ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let sealed = tree.usage().descriptors;
    let (clones, error) = fill(&point);
    assert_eq!(clones.len() as u64, (1024 - 64 - 100 - sealed) / 3);
    let held = 100 + sealed + 3 * clones.len() as u64;
    assert_eq!(error, AdmissionError::Descriptors { needed: 3, spare: 64, held, limit: 1024 });
    assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
    assert_eq!(tree.usage().descriptors, sealed + 3 * clones.len() as u64);
    drop(clones);
    assert_eq!(tree.usage().descriptors, sealed);

    let host = FakeHost::new();
    host.set_mappings(1000, 4000);
    let admission = Admission { spare_mappings: 1000, mappings_per_clone: 99, ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let (clones, error) = fill(&point);
    let each = tree.usage().clone_mappings / clones.len() as u64;
    assert!((99..=100).contains(&each));
    assert_eq!(clones.len() as u64, 2000 / each);
    assert!(matches!(error, AdmissionError::Mappings { spare: 1000, limit: 4000, .. }), "{error}");
    assert!(error.to_string().contains("vm.max_map_count"), "{error}");
}

fn a_burst_between_two_looks_stays_below_the_ceiling<B: Backing>() {
    const THREADS: usize = 4;
    let host = FakeHost::new();
    host.set_available(ByteSize::mib(1000), MemoryLimit::Host);
    let (spare_memory, private_per_clone) = (ByteSize::mib(100), ByteSize::mib(3));
    let admission = Admission { spare_memory, private_per_clone, ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let looks = host.looks();
    let clones: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| fill(&point).0)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(clones.len(), 300, "neither one too many nor one too few");
    let names: HashSet<_> = clones.iter().map(|clone| clone.identity().name.clone()).collect();
    assert_eq!(names.len(), clones.len());
    assert_eq!(host.looks(), looks, "no time has passed");
    drop(clones);
    assert_eq!(tree.usage().expected, ByteSize::ZERO);
}

fn a_refusal_is_looked_up_again<B: Backing>() {
    let host = FakeHost::new();
    host.set_available(ByteSize::mib(100), MemoryLimit::Host);
    let admission = Admission { spare_memory: ByteSize::mib(100), ..Admission::default() };
    let (_tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    host.set_available(ByteSize::mib(1), MemoryLimit::Host);
    host.pass_time(WHILE);
    spawn(&point).unwrap_err();
    let looks = host.looks();
    // Somebody else has made room: not seen in the same instant, but soon.
    host.set_available(ByteSize::mib(100), MemoryLimit::Host);
    (0..100).for_each(|_| assert!(spawn(&point).is_err()));
    assert_eq!(host.looks(), looks);
    host.pass_time(MOMENT);
    spawn(&point).expect("looked again before it said no");
    assert_eq!(host.looks(), looks + 1);
}

fn looks_are_rare<B: Backing>() {
    let host = FakeHost::new();
    let (_tree, _vm, _guest, point) = point_on::<B>(&host, Admission::default());
    let looks = host.looks();
    (0..1000).for_each(|_| drop(spawn(&point).unwrap()));
    assert_eq!(host.looks(), looks);
    for _ in 0..10 {
        host.pass_time(WHILE / 2);
        (0..10).for_each(|_| drop(spawn(&point).unwrap()));
    }
    assert_eq!(host.looks(), looks + 5);
}

fn a_host_that_is_not_looked_at_refuses_nobody<B: Backing>() {
    let host = FakeHost::new();
    host.set_available(ByteSize::ZERO, MemoryLimit::Host);
    host.set_mappings(10, 10);
    host.set_descriptors(10, 10);
    let admission = Admission { host: HostCheck::Off, private_per_clone: ByteSize::gib(1), ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let clone = spawn(&point).unwrap();
    assert_eq!((host.looks(), tree.usage().expected), (0, ByteSize::gib(1)));
    drop(clone);
    assert_eq!(tree.usage().expected, ByteSize::ZERO);
    let (private_per_clone, most) = (ByteSize::new(u64::MAX), u64::MAX);
    let absurd = Admission { private_per_clone, mappings_per_clone: most, descriptors_per_clone: most, ..admission };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, absurd);
    let before = tree.usage();
    let clones: Vec<_> = (0..9).map(|_| spawn(&point).unwrap()).collect();
    drop(clones);
    assert_eq!(tree.usage(), before);
}

fn clones_that_fail_count_for_nothing<B: Backing>() {
    let host = FakeHost::new();
    let admission = Admission { private_per_clone: ByteSize::mib(1), descriptors_per_clone: 2, ..Admission::default() };
    let (tree, _vm, _guest, point) = point_on::<B>(&host, admission);
    let before = tree.usage();
    let failed = point.spawn_with(CloneSpec::default(), |_| Err("no".into()));
    assert!(matches!(failed, Err(SpawnError::Customize(_))));
    assert_eq!(tree.usage(), before);
}

/// Without a fake: this host has room, and the default lets a VM in.
#[test]
fn a_host_with_room_lets_in() {
    let (tree, vm) = off::<Heap>(Limits::default());
    drop(vm);
    assert_empty(&tree);
}

#[cfg(target_os = "linux")]
mod mapped_only {
    use super::*;
    use offshoot::backing::Mapped;
    use offshoot::{ForkError, LivePolicy, SpaceError};
    use std::fs::File;
    use std::process::Command;
    use std::time::Instant;

    #[test]
    fn a_fork_that_needs_a_layer_is_refused_and_undone() {
        let host = FakeHost::new();
        let (tree, vm, mut guest, point) = point_on::<Mapped>(&host, Admission::default());
        let before = tree.usage();
        put(&vm, 3, 33);
        host.set_descriptors(961, 1024);
        host.pass_time(WHILE);
        for live in [false, true] {
            let refused = if live { vm.fork_live(&mut guest, &LivePolicy::default()) } else { vm.fork(&mut guest) };
            match refused {
                Err(ForkError::Cut(SpaceError::Refused(AdmissionError::Descriptors { needed: 1, .. }))) => {}
                other => panic!("{other:?}"),
            }
            assert!(guest.runs());
            assert_eq!((common::get(&vm, 1), common::get(&vm, 3)), (1, 33));
            assert_eq!(tree.usage(), before);
        }
        let none = off_on::<Mapped>(&tree);
        assert!(matches!(none, Err(BuildError::Space(SpaceError::Refused(_)))), "{none:?}");
        // A clone takes none.
        spawn(&point).unwrap();
        host.set_descriptors(900, 1024);
        host.pass_time(WHILE);
        let again = vm.fork(&mut guest).expect("there is room again");
        assert_eq!(common::get(&again.spawn(CloneSpec::default()).unwrap(), 3), 33);
    }

    #[test]
    fn mappings_of_clones_are_counted_as_the_kernel_has_them() {
        let host = FakeHost::new();
        host.set_mappings(100, 1200);
        let (tree, vm, mut guest, point) =
            point_on::<Mapped>(&host, Admission { spare_mappings: 1000, ..Admission::default() });
        assert_eq!(spawn(&point).map(|_clone| tree.usage().clone_mappings), Ok(1));
        // Every other page in a layer of its own: the clone is made of as many mappings as there are runs.
        (1..common::RAM_PAGES).step_by(4).for_each(|page| put(&vm, page, 5));
        let scattered = vm.fork(&mut guest).unwrap();
        let clone = spawn(&scattered).unwrap();
        let each = tree.usage().clone_mappings;
        assert!(each > 1);
        assert_eq!(each, clone.ram().space().kernel_mappings());
        drop(clone);
        let (clones, error) = fill(&scattered);
        assert_eq!(clones.len() as u64, 100 / each);
        assert!(matches!(error, AdmissionError::Mappings { needed, .. } if needed == each), "{error}");
        drop(clones);
        assert_eq!(tree.usage().clone_mappings, 0);
    }

    /// This test again as a process of its own, with a limit lowered.
    fn in_a_child(test: &str, limit: &str) {
        let command = format!("ulimit {limit} && exec \"$0\" --exact {test} --ignored --nocapture");
        let this = std::env::current_exe().expect("a test has a path");
        let out = Command::new("sh").args(["-c", &command]).arg(this).output().expect("a shell");
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn descriptors_for_real() {
        in_a_child("mapped_only::child_short_of_descriptors", "-n 256");
    }

    #[test]
    #[ignore = "run by `descriptors_for_real`, in a child process"]
    fn child_short_of_descriptors() {
        let (tree, vm, mut guest) = running::<Mapped>(Limits::default());
        put(&vm, 1, 1);
        let point = vm.fork(&mut guest).unwrap();
        let clone = spawn(&point).unwrap();
        clone.start().unwrap();
        let mut clones_guest = ScriptedGuest::running(0);
        let mut hoard = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            hoard.push(file);
        }
        // Fewer are left than are to stay free, and more than a fork needs.
        hoard.truncate(hoard.len() - 40);
        let start = Instant::now();
        let mut fork = || {
            // Others' descriptors are seen within 100 ms, and that they are gone, within 10.
            assert!(start.elapsed() < Duration::from_secs(20), "never seen");
            put(&clone, 2, 2);
            clone.fork(&mut clones_guest)
        };
        let error = loop {
            if let Err(error) = fork() {
                break error;
            }
        };
        match error {
            ForkError::Cut(SpaceError::Refused(error @ AdmissionError::Descriptors { held, .. })) => {
                assert_eq!(error, AdmissionError::Descriptors { needed: 1, spare: 64, held, limit: 256 });
                assert!(held > 256 - 64, "{held}");
            }
            other => panic!("{other}"),
        }
        drop(hoard);
        while fork().is_err() {}
        drop((clone, point, vm));
        assert_empty(&tree);
    }

    /// As many as are free here and now, but for some, are to stay so: no need to use them up.
    #[test]
    fn mappings_for_real() {
        in_a_child("mapped_only::child_short_of_mappings", "-c 0");
    }

    #[test]
    #[ignore = "run by `mappings_for_real`, in a child process, where nobody else maps anything"]
    fn child_short_of_mappings() {
        let held = || std::fs::read_to_string("/proc/self/maps").expect("Linux has it").lines().count() as u64;
        let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
        let spare_mappings = limit - held() - 500;
        let admission = Admission { spare_mappings, ..Admission::default() };
        let (tree, vm, mut guest) = running::<Mapped>(Limits { admission, ..Limits::default() });
        let point = vm.fork(&mut guest).unwrap();
        point.teardown().wait();
        let (clones, error) = fill(&point);
        let AdmissionError::Mappings { needed: 1, held: seen, limit: named, .. } = error else { panic!("{error}") };
        assert_eq!(named, limit);
        // Some are the VM's, some come with threads that the runtime and admission start.
        assert!((400..=500).contains(&clones.len()), "{}", clones.len());
        assert!(seen.abs_diff(held()) < 64, "{seen} counted, {} there", held());
        drop(clones);
        assert_eq!(tree.usage().clone_mappings, 0);
        let (clones, _) = fill(&point);
        assert!((400..=500).contains(&clones.len()), "{}", clones.len());
    }
}
