//! Working sets: what a clone touched is in them, and having it mapped ahead saves faults and changes nothing else.

mod common;

use std::sync::Arc;

use common::{PAGE, RAM_PAGES, assert_empty, get, put, running};
use offshoot::backing::{AnyPage, Backing, Heap};
use offshoot::page::{ByteSize, GuestAddress, PageCount, PageIndex, PageRange, PageSet, PageSize};
use offshoot::ram::RamLayout;
use offshoot::testing::{Dice, FakeHost, ScriptedGuest};
use offshoot::{
    Admission, AdmissionError, CloneSpec, ForkPoint, Limits, MemoryLimit, Prefault, Prefaulted, SpaceError, SpawnError,
    Tree, Vm, VmName, WorkingSet,
};

on_every_backing!(written_pages_are_in_it, prefaulted_clones_are_equal_to_others, a_set_of_another_vm_is_refused,);

fn pages(set: impl IntoIterator<Item = u64>) -> PageSet {
    set.into_iter().map(PageIndex::new).collect()
}

fn prefaulting(set: WorkingSet, limit: u64) -> CloneSpec {
    CloneSpec { prefault: Some(Prefault { limit: PageCount::new(limit), ..Prefault::new(set) }), ..Default::default() }
}

/// A fork point whose page `n` begins with `n + 1`, but for every third, which is zeroes.
fn point<B: Backing>(limits: Limits) -> (Tree, Vm<B>, ScriptedGuest, ForkPoint<B>) {
    let (tree, vm, mut guest) = running::<B>(limits);
    (0..RAM_PAGES).filter(|page| page % 3 > 0).for_each(|page| put(&vm, page, page + 1));
    let point = vm.fork(&mut guest).unwrap();
    point.teardown().wait();
    (tree, vm, guest, point)
}

fn content<B: Backing>(vm: &Vm<B>) -> Vec<u8> {
    let mut bytes = vec![0; (RAM_PAGES * PAGE) as usize];
    vm.ram().read(GuestAddress::ZERO, &mut bytes).unwrap();
    bytes
}

fn written_pages_are_in_it<B: Backing>() {
    let (tree, vm, _guest, point) = point::<B>(Limits::default());
    let clone = point.spawn(CloneSpec::default()).unwrap();
    assert_eq!((clone.working_set().unwrap().count(), clone.prefaulted()), (PageCount::ZERO, None));
    [2, 3, 9].into_iter().for_each(|page| put(&clone, page, 7));
    let set = clone.working_set().unwrap();
    assert_eq!(set.written(), &pages([2, 3, 9]));
    assert!(set.as_read().written().is_empty() && set.as_read().count() == set.count());
    let other = point.spawn(CloneSpec::default()).unwrap();
    put(&other, 4, 7);
    assert_eq!(set.merge(&other.working_set().unwrap()).written(), &pages([2, 3, 4, 9]));
    drop((clone, other, point, vm));
    assert_empty(&tree);
}

/// Beside a clone that was not prefaulted, through the same writes, forks and resets.
fn prefaulted_clones_are_equal_to_others<B: Backing>() {
    for seed in 0..40 {
        let mut dice = Dice::new(seed);
        let (tree, vm, _guest, point) = point::<B>(Limits::default());
        let mut some = || pages((0..RAM_PAGES).filter(|_| dice.below(3) == 0));
        let set = WorkingSet::new(some(), some());
        let limit = if seed % 4 == 0 { set.count().get() / 2 } else { u64::MAX };
        let plain = point.spawn(CloneSpec::default()).unwrap();
        let ahead = point.spawn(prefaulting(set.clone(), limit)).unwrap();
        let done = ahead.prefaulted().unwrap();
        let all = done.written.saturating_add(done.read).saturating_add(done.left_out);
        assert_eq!(all, set.count());
        assert!(done.written.saturating_add(done.read).get() <= limit);

        let mut point = point;
        let mut guests = [ScriptedGuest::paused(1), ScriptedGuest::paused(1)];
        for _ in 0..30 {
            assert_eq!(content(&plain), content(&ahead));
            match dice.below(12) {
                0 => {
                    let cut = [&plain, &ahead].map(|vm| vm.fork(&mut guests[0]).unwrap());
                    let spawned = cut.each_ref().map(|point| point.spawn(CloneSpec::default()).unwrap());
                    assert_eq!(content(&spawned[0]), content(&spawned[1]));
                    // The next generation's pages, mapped ahead by the set of this one.
                    let spec = prefaulting(set.clone(), u64::MAX);
                    assert_eq!(content(&cut[0].spawn(spec).unwrap()), content(&spawned[1]));
                    [point, _] = cut;
                }
                1 => {
                    for (vm, guest) in [&plain, &ahead].into_iter().zip(&mut guests) {
                        vm.reset(guest).unwrap();
                    }
                }
                2 => {
                    let gfn = offshoot::page::Gfn::new(dice.below(RAM_PAGES));
                    [&plain, &ahead].into_iter().for_each(|vm| vm.ram().discard(gfn, PageCount::new(1)).unwrap());
                }
                _ => {
                    let (page, value) = (dice.below(RAM_PAGES), dice.below(5));
                    [&plain, &ahead].into_iter().for_each(|vm| put(vm, page, value));
                }
            }
            // What differs is only what was prefaulted for writing: that counts as written.
            let (few, more) = (plain.dirty().unwrap().ram, ahead.dirty().unwrap().ram);
            assert!(few.difference(&more).is_empty());
            assert!(more.difference(&few).difference(set.written()).is_empty());
            plain.validate().unwrap();
            ahead.validate().unwrap();
        }
        drop((plain, ahead, point, vm));
        assert_empty(&tree);
    }
}

fn a_set_of_another_vm_is_refused<B: Backing>() {
    let (tree, vm, _guest, point) = point::<B>(Limits::default());
    let before = tree.usage();
    let everything = PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(u64::MAX));
    for set in [
        WorkingSet::new(pages([RAM_PAGES]), PageSet::new()),
        WorkingSet::new(PageSet::new(), pages([1, RAM_PAGES])),
        WorkingSet::new(pages([3, u64::MAX - 1]), pages([0])),
        WorkingSet::new(PageSet::from(everything), PageSet::new()),
    ] {
        match point.spawn(prefaulting(set, u64::MAX)) {
            Err(SpawnError::Space(SpaceError::Geometry(_))) => {}
            // Nothing is mapped ahead, so nothing can be out of range.
            Ok(clone) => assert_eq!(clone.prefaulted().unwrap().written, PageCount::ZERO),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(tree.usage(), before);
    }
    drop((point, vm));
    assert_empty(&tree);
}

/// A fork point on a host that has 128 MiB, all of them spare.
fn point_on_a_full_host<B: Backing>() -> ForkPoint<B> {
    let host = FakeHost::new();
    host.set_available(ByteSize::mib(128), MemoryLimit::Host);
    let tree = host.tree(Limits { admission: Admission::default(), ..Limits::default() });
    let vm: Vm<B> = common::off_on(&tree).unwrap();
    vm.start().unwrap();
    let point = vm.fork(&mut ScriptedGuest::running(1)).unwrap();
    point.teardown().wait();
    point
}

#[test]
fn the_heap_has_nothing_to_map_ahead() {
    let (_tree, _vm, _guest, point) = point::<Heap<AnyPage>>(Limits::default());
    let clone = point.spawn(prefaulting(WorkingSet::new(pages([1]), pages([2])), u64::MAX)).unwrap();
    let nothing = Prefaulted { left_out: PageCount::new(2), ..Prefaulted::default() };
    assert_eq!(clone.prefaulted(), Some(nothing));
    assert_eq!(clone.dirty().unwrap().ram, PageSet::new());
    // And so nothing that there must be room for.
    let set = WorkingSet::new(PageSet::new(), pages(0..3));
    let clone = point_on_a_full_host::<Heap>().spawn(prefaulting(set, 3)).expect("nothing is copied");
    assert_eq!(clone.tree().usage().expected, ByteSize::ZERO);
}

#[cfg(target_os = "linux")]
mod mapped_only {
    use super::*;
    use offshoot::backing::{AddressHole, Mapped};
    use offshoot::testing::faults::{Refusal, fail_nth_call};

    /// Page faults that this thread has taken without a disk.
    #[test]
    fn private_copies_are_let_in_like_writes() {
        let point = point_on_a_full_host::<Mapped>();
        let set = WorkingSet::new(PageSet::new(), pages(0..3));
        match point.spawn(prefaulting(set.clone(), 2)) {
            Err(SpawnError::Refused(AdmissionError::Memory { needed, .. })) => assert_eq!(needed.get(), 2 * PAGE),
            other => panic!("{other:?}"),
        }
        point.spawn(prefaulting(set.as_read(), 2)).expect("shared pages take nothing");
    }

    fn faults() -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // proc_pid_stat(5): the tenth field; the second ends with the last bracket.
        let after = stat.rsplit_once(')').unwrap().1;
        after.split_whitespace().nth(7).unwrap().parse().unwrap()
    }

    const LEN: ByteSize = ByteSize::mib(64);

    fn large() -> (Vm<Mapped>, ForkPoint<Mapped>) {
        let layout = RamLayout::flat(LEN, PageSize::KIB_4).unwrap();
        let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("vm").unwrap(), layout, vec![]).unwrap();
        (0..LEN.get() / PAGE).for_each(|page| put(&vm, page, page));
        vm.start().unwrap();
        let point = vm.fork(&mut ScriptedGuest::running(1)).unwrap();
        point.teardown().wait();
        (vm, point)
    }

    #[test]
    fn pages_read_are_told_from_pages_written() {
        let (_vm, point) = large();
        let clone = point.spawn(CloneSpec::default()).unwrap();
        assert_eq!(get(&clone, 4000), 4000);
        put(&clone, 9000, 1);
        let set = clone.working_set().unwrap();
        assert_eq!(set.written(), &pages([9000]));
        assert!(set.read().contains(PageIndex::new(4000)));
        // The kernel maps around a page that is read, in a window of 16.
        let window = PageRange::from_bounds(PageIndex::new(4000 / 16 * 16), PageIndex::new(4000 / 16 * 16 + 16));
        assert!(set.read().difference(&PageSet::from(window)).is_empty(), "{set:?}");
    }

    #[test]
    fn a_prefaulted_clone_takes_no_faults() {
        const STEP: u64 = 37;
        let (_vm, point) = large();
        let touch = |clone: &Vm<Mapped>| {
            let before = faults();
            (0..400).for_each(|n| put(clone, n * STEP, n));
            (0..400).for_each(|n| assert_eq!(get(clone, n * STEP + 17), n * STEP + 17));
            faults() - before
        };
        let first = point.spawn(CloneSpec::default()).unwrap();
        let without = touch(&first);
        let set = Arc::new(first.working_set().unwrap());
        let spec = CloneSpec { prefault: Some(Prefault::new(set.clone())), ..CloneSpec::default() };
        let next = point.spawn(spec.clone()).unwrap();
        let done = next.prefaulted().unwrap();
        assert_eq!((done.written.get(), done.left_out), (400, PageCount::ZERO));
        let with = touch(&next);
        assert!(without >= 400 && with < 10, "{without} faults without, {with} with");
        // It is private, and a reset takes it all back.
        let fresh = point.spawn(spec).unwrap();
        assert_eq!(&fresh.dirty().unwrap().ram, set.written());
        assert_eq!(fresh.usage().unwrap().ram.private, set.written().count());
        assert_eq!(fresh.reset(&mut ScriptedGuest::paused(1)).unwrap(), set.written().count());
        assert!(fresh.dirty().unwrap().ram.is_empty());
        // In a hole too.
        let hole = AddressHole::pick(LEN).unwrap();
        let spec = CloneSpec { prefault: Some(Prefault::new(set.as_read())), ..CloneSpec::default() };
        let shared = point.spawn_into(&hole, spec).unwrap();
        assert_eq!(shared.prefaulted().unwrap().read, set.count());
        assert!(shared.dirty().unwrap().ram.is_empty());
        assert_eq!(get(&shared, 9001), 9001);
    }

    #[test]
    fn larger_pages_are_prefaulted_whole() {
        let layout = RamLayout::flat(ByteSize::mib(1), PageSize::new(ByteSize::kib(16)).unwrap()).unwrap();
        let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("vm").unwrap(), layout, vec![]).unwrap();
        vm.ram().store(GuestAddress::new(5 << 14), 5_u64).unwrap();
        vm.start().unwrap();
        let point = vm.fork(&mut ScriptedGuest::running(1)).unwrap();
        let clone = point.spawn(CloneSpec::default()).unwrap();
        clone.ram().store(GuestAddress::new((5 << 14) + 5000), 1_u8).unwrap();
        let set = clone.working_set().unwrap();
        assert_eq!(set.written(), &pages([5]));
        let next = point.spawn(prefaulting(set.clone(), u64::MAX)).unwrap();
        assert_eq!(next.dirty().unwrap().ram, pages([5]));
        assert_eq!(next.ram().load::<u64>(GuestAddress::new(5 << 14)).unwrap(), 5);
    }

    #[test]
    fn a_spawn_that_fails_anywhere_leaves_nothing() {
        let (tree, vm, _guest, point) = point::<Mapped>(Limits::default());
        let set = WorkingSet::new(pages([0, 3, 4, 7]), pages([1, 5, 9]));
        let before = tree.usage();
        for how in [Refusal::OutOfMemory, Refusal::Io] {
            let mut failed = 0;
            for n in 1.. {
                let plan = fail_nth_call(n, how);
                let spawned = point.spawn(prefaulting(set.clone(), u64::MAX));
                let seen = plan.calls_seen();
                drop(plan);
                match spawned {
                    Ok(clone) => {
                        assert!(seen < n);
                        assert_eq!(clone.prefaulted().unwrap().left_out, PageCount::ZERO);
                        break;
                    }
                    Err(SpawnError::Space(_) | SpawnError::Identity(_)) => failed += 1,
                    Err(error) => panic!("{error}"),
                }
                assert_eq!(tree.usage(), before);
            }
            // One mapping, three runs written, three read, one call for random numbers.
            assert_eq!(failed, 8);
        }
        // A kernel that cannot says so, and the clone is as good as any.
        let plan = fail_nth_call(3, Refusal::Unsupported);
        let clone = point.spawn(prefaulting(set.clone(), u64::MAX)).unwrap();
        drop(plan);
        assert_eq!(clone.prefaulted().unwrap().left_out, set.count());
        let plain = point.spawn(CloneSpec::default()).unwrap();
        assert_eq!(content(&clone), content(&plain));
        drop((clone, plain, point, vm));
        assert_empty(&tree);
    }
}
