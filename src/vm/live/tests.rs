//! The live fork at chosen moments: writes, discards and failures between the steps of a pre-copy.

use rustix::io::Errno;

use super::*;
use crate::backing::{AddressHole, Backing, Deferred, PlacedRam};
use crate::page::{ByteSize, Gfn, GuestAddress, PageIndex, PageRange, PageSet, PageSize};
use crate::ram::RamLayout;
use crate::sys::fault::plan;
use crate::{AtRest, BoxError, CloneSpec, DeviceState, Relocate, Tree, VmName, VmStatus};

const PAGES: u64 = 64;

fn at(page: u64) -> GuestAddress {
    GuestAddress::new(page * 4096)
}

fn store(vm: &Vm<Mapped>, page: u64, value: u64) {
    vm.ram().store(GuestAddress::new(page * 4096 + 8 * (page % 500)), value).unwrap();
}

/// Running, cut once, with every page but the last eight holding something.
fn vm(tree: &Tree) -> Vm<Mapped> {
    let layout = RamLayout::flat(ByteSize::kib(4 * PAGES), PageSize::KIB_4).unwrap();
    let vm: Vm<Mapped> = Vm::new(tree, VmName::new("vm").unwrap(), layout, vec![]).unwrap();
    (0..PAGES - 8).for_each(|page| store(&vm, page, 1000 + page));
    vm.start().unwrap();
    // What it put off counts in the tree until it is done.
    vm.fork(&mut rest()).unwrap().teardown().wait();
    vm
}

fn rest() -> AtRest {
    AtRest(DeviceState::from_bytes(vec![7]))
}

fn bytes(vm: &Vm<Mapped>) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    vm.ram().read(GuestAddress::ZERO, &mut bytes).unwrap();
    bytes
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(PageIndex::new).collect()
}

/// Patient and exact: one round more for each that found anything.
fn policy() -> LivePolicy {
    LivePolicy { target: PageCount::ZERO, max_pause: Duration::from_secs(100), ..LivePolicy::default() }
}

/// Forks, and holds the clone and the VM against what the VM held.
fn check(vm: &Vm<Mapped>, policy: &LivePolicy, seam: Seam<'_>) -> ForkPoint<Mapped> {
    let point = vm.fork_live_at(&mut rest(), policy, seam).unwrap();
    let now = bytes(vm);
    vm.validate().unwrap();
    assert!(vm.dirty().unwrap().ram.is_empty());
    let clone = point.spawn(CloneSpec::default()).unwrap();
    clone.validate().unwrap();
    assert!(bytes(&clone) == now, "the clone is not what the VM was");
    point
}

fn pages_of(point: &ForkPoint<Mapped>) -> (Vec<u64>, u64) {
    let precopy = point.timings().precopy.unwrap();
    (precopy.rounds().iter().map(|round| round.pages.get()).collect(), precopy.last.pages.get())
}

#[test]
fn each_round_copies_what_was_written_during_the_one_before() {
    let vm = vm(&Tree::default());
    (0..10).for_each(|page| store(&vm, page, 1));
    let point = check(&vm, &policy(), &mut |moment, _| match moment {
        // Written after it was protected, before it was copied: copied with it, and again.
        Moment::Protected(0) => (3..5).for_each(|page| store(&vm, page, 2)),
        // Copied, and private only now.
        Moment::Copied(0) => [4, 9, 20, 30].into_iter().for_each(|page| store(&vm, page, 3)),
        Moment::Copied(1) => store(&vm, 20, 4),
        Moment::Copied(3) => store(&vm, 40, 5),
        _ => {}
    });
    // 3 and 4; 9, 20 and 30 with them; 20; nothing, and then the pause finds 40.
    assert_eq!(pages_of(&point), (vec![10, 5, 1, 0], 1));
    let timings = point.timings().precopy.unwrap();
    assert_eq!((timings.end, timings.bytes()), (PrecopyEnd::Converged, ByteSize::kib(16 * 4)));
    assert_eq!(timings.fallback(), None);

    // The next one copies what was written since, and no more.
    store(&vm, 3, 6);
    store(&vm, 50, 6);
    assert_eq!(vm.dirty().unwrap().ram, set([3, 50]));
    let point = check(&vm, &policy(), &mut |_, _| {});
    assert_eq!(pages_of(&point), (vec![2, 0], 0));
    let point = check(&vm, &policy(), &mut |_, _| {});
    assert_eq!(pages_of(&point), (vec![0], 0));
}

#[test]
fn rounds_are_bounded() {
    let vm = vm(&Tree::default());
    for (allowed, used) in [(0, 0), (1, 1), (3, 3), (1000, PrecopyTimings::MAX_ROUNDS as usize)] {
        store(&vm, 5, 1);
        let policy = LivePolicy { max_rounds: allowed, ..policy() };
        let point = check(&vm, &policy, &mut |moment, _| {
            if matches!(moment, Moment::Copied(_)) {
                store(&vm, 5, 2);
            }
        });
        let timings = point.timings().precopy.unwrap();
        assert_eq!((timings.rounds().len(), timings.end), (used, PrecopyEnd::RoundsUsedUp));
        assert_eq!(timings.last.pages.get(), 1);
    }
}

#[test]
fn discarded_pages_read_zero_in_the_clone_whenever_they_went() {
    for moment in [Moment::Protected(0), Moment::Copied(0), Moment::Protected(1), Moment::Copied(1)] {
        for rewritten in [false, true] {
            let vm = vm(&Tree::default());
            (0..10).for_each(|page| store(&vm, page, 1));
            vm.ram().discard(Gfn::new(12), PageCount::new(2)).unwrap();
            check(&vm, &policy(), &mut |now, _| {
                if now == Moment::Copied(0) {
                    (0..10).for_each(|page| store(&vm, page, 2));
                }
                if now == moment {
                    // Private ones, and one that never was.
                    vm.ram().discard(Gfn::new(8), PageCount::new(3)).unwrap();
                    if rewritten {
                        store(&vm, 9, 3);
                        store(&vm, 12, 3);
                    }
                }
            });
            // And it goes on from there.
            store(&vm, 10, 4);
            vm.ram().discard(Gfn::new(0), PageCount::new(1)).unwrap();
            assert_eq!(vm.dirty().unwrap().ram, set([0, 10]));
            check(&vm, &policy(), &mut |_, _| {});
        }
    }
}

#[test]
fn a_page_that_became_zero_is_a_hole_again() {
    let tree = Tree::default();
    let vm = vm(&tree);
    (0..10).for_each(|page| store(&vm, page, 1));
    // A hole that is read through a mapping takes memory.
    vm.ram().load::<u64>(at(60)).unwrap();
    let before = tree.memory_file_bytes();
    let mut seam = |now, _: &mut Precopy<'_>| {
        if now == Moment::Copied(0) {
            // By the guest's own writes. And one the other way.
            (0..4).for_each(|page| vm.ram().write(at(page), &[0; 4096]).unwrap());
            vm.ram().write(at(60), &[0; 8]).unwrap();
        }
        if now == Moment::Copied(1) {
            store(&vm, 60, 9);
        }
    };
    let point = vm.fork_live_at(&mut rest(), &policy(), &mut seam).unwrap();
    assert_eq!(tree.memory_file_bytes().get() - before.get(), 7 * 4096);
    let clone = point.spawn(CloneSpec::default()).unwrap();
    assert_eq!(clone.usage().unwrap().ram.zero.get(), 4);
}

#[test]
fn what_follows_a_live_fork_goes_by_it() {
    let vm = vm(&Tree::default());
    let mut guest = rest();
    (0..10).for_each(|page| store(&vm, page, 1));
    check(&vm, &policy(), &mut |_, _| {});
    let at_fork = bytes(&vm);
    // A reset: pages written since, and those kept private under it.
    (5..15).for_each(|page| store(&vm, page, 2));
    vm.ram().discard(Gfn::new(0), PageCount::new(1)).unwrap();
    vm.reset(&mut guest).unwrap();
    assert!(bytes(&vm) == at_fork);
    vm.validate().unwrap();
    assert!(vm.dirty().unwrap().ram.is_empty());
    // 1 to 4 stay private with the origin's bytes.
    assert_eq!(vm.usage().unwrap().ram.private.get(), 4);
    // By a list: what it leaves out stays.
    let list = {
        store(&vm, 2, 7);
        store(&vm, 20, 7);
        vm.dirty().unwrap().ram
    };
    assert_eq!(list, set([2, 20]));
    store(&vm, 3, 8);
    assert_eq!(vm.ram().space().reset_listed(&list).unwrap().get(), 2);
    assert_eq!(vm.dirty().unwrap().ram, set([3]));
    assert_eq!(vm.ram().load::<u64>(GuestAddress::new(3 * 4096 + 24)).unwrap(), 8);
    vm.validate().unwrap();
    vm.reset(&mut guest).unwrap();
    assert!(bytes(&vm) == at_fork);

    // A plain fork: copies what was written since, and gives the kept pages back.
    store(&vm, 3, 3);
    check(&vm, &policy(), &mut |_, _| {});
    store(&vm, 4, 3);
    vm.ram().discard(Gfn::new(1), PageCount::new(1)).unwrap();
    let point = vm.fork(&mut guest).unwrap();
    let clone = point.spawn(CloneSpec::default()).unwrap();
    assert!(bytes(&clone) == bytes(&vm));
    vm.validate().unwrap();
    assert!(vm.usage().unwrap().ram.private.is_zero());
    // And live again, several times, each from a VM that goes on.
    for round in 0..5 {
        (0..20).for_each(|page| store(&vm, page * 3 % PAGES, round));
        check(&vm, &policy(), &mut |_, _| {});
    }
    let chain = vm.origin().unwrap();
    drop(vm);
    assert_eq!(chain.spawn(CloneSpec::default()).unwrap().status(), VmStatus::Paused);
}

#[test]
fn giving_up_leaves_everything_as_it_was() {
    for forked_before in [false, true] {
        let tree = Tree::default();
        let vm = vm(&tree);
        if forked_before {
            (0..30).for_each(|page| store(&vm, page, 1));
            check(&vm, &policy(), &mut |_, _| {});
        }
        (20..40).for_each(|page| store(&vm, page, 2));
        vm.ram().discard(Gfn::new(50), PageCount::new(2)).unwrap();
        let content = bytes(&vm);
        let state = |vm: &Vm<Mapped>| {
            assert!(bytes(vm) == content);
            (vm.dirty().unwrap(), vm.usage().unwrap(), tree.usage())
        };
        let before = state(&vm);
        let origin = vm.origin().unwrap().timings();
        let give_up = LivePolicy { on_exceeded: OnExceeded::GiveUp, ..policy() };

        // Seen before the pause.
        let none = LivePolicy { max_pause: Duration::ZERO, ..give_up };
        assert!(matches!(vm.fork_live(&mut rest(), &none), Err(ForkError::PauseTooLong { .. })));
        assert_eq!(state(&vm), before);
        vm.validate().unwrap();

        // Seen inside it: at a second a page, the two that were written last are too many.
        let second = LivePolicy { max_pause: Duration::from_secs(1), max_rounds: 2, ..give_up };
        let old = [20u64, 21].map(|page| vm.ram().load::<u64>(at(page)).unwrap());
        let refused = vm.fork_live_at(&mut rest(), &second, &mut |moment, precopy| {
            precopy.set_pace(Duration::from_secs(1));
            if moment == Moment::Copied(1) {
                (20..22).for_each(|page| vm.ram().store(at(page), old[page as usize - 20]).unwrap());
            }
        });
        assert!(matches!(refused, Err(ForkError::PauseTooLong { pages, .. }) if pages.get() == 2), "{refused:?}");
        assert_eq!(state(&vm), before);
        assert_eq!((vm.status(), vm.origin().unwrap().timings()), (VmStatus::Running, origin));
        vm.validate().unwrap();

        // The other policy goes through with it.
        let point = check(&vm, &LivePolicy { on_exceeded: OnExceeded::StopAndCopy, ..none }, &mut |_, _| {});
        assert_eq!(point.timings().precopy.unwrap().end, PrecopyEnd::StoppedAndCopied);
    }
}

#[test]
fn a_space_that_others_reset_or_cut_meanwhile_is_not_forked_live() {
    type Meddle = fn(&Vm<Mapped>);
    let reset: Meddle = |vm| assert!(vm.ram().space().reset().unwrap().get() > 0);
    let cut: Meddle = |vm| drop(crate::backing::Cut::commit(vm.ram().space().cut().unwrap()));
    for meddle in [reset, cut] {
        for moment in [Moment::Protected(0), Moment::Copied(0)] {
            for kept in [false, true] {
                let vm = vm(&Tree::default());
                (0..10).for_each(|page| store(&vm, page, 1));
                if kept {
                    check(&vm, &policy(), &mut |_, _| {});
                    (5..15).for_each(|page| store(&vm, page, 2));
                }
                let mut after = vec![];
                let refused = vm.fork_live_at(&mut rest(), &policy(), &mut |now, _| {
                    if now == moment {
                        meddle(&vm);
                        after = bytes(&vm);
                    }
                });
                assert!(matches!(refused, Err(ForkError::Cut(_))), "{refused:?}");
                assert!(bytes(&vm) == after);
                vm.validate().unwrap();
                store(&vm, 30, 3);
                check(&vm, &policy(), &mut |_, _| {});
            }
        }
    }
}

#[test]
fn a_second_attempt_beside_the_first_is_refused() {
    let vm = vm(&Tree::default());
    store(&vm, 1, 1);
    check(&vm, &policy(), &mut |_, _| {
        assert!(vm.ram().space().precopy(Onward::Here).is_err());
        assert!(matches!(vm.fork_live(&mut rest(), &policy()), Err(ForkError::IllegalState(_))));
        // What is asked meanwhile is answered with what is protected counted in.
        assert!(vm.dirty().unwrap().ram.contains(PageIndex::new(1)));
    });
}

const ONWARD: [Onward; 2] = [Onward::Here, Onward::Elsewhere];

/// A guest that may be moved.
struct Mover;

impl Guest for Mover {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(vec![7]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Relocate for Mover {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        Ok(AddressHole::pick(ByteSize::kib(4 * PAGES))?)
    }

    fn relocate(&mut self, _: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
        Ok(Deferred::default())
    }
}

fn fork(vm: &Vm<Mapped>, onward: Onward, seam: Seam<'_>) -> Result<ForkPoint<Mapped>, ForkError> {
    match onward {
        Onward::Here => vm.fork_live_at(&mut rest(), &policy(), seam),
        Onward::Elsewhere => vm.fork_live_relocating_at(&mut Mover, &policy(), seam),
    }
}

/// Every call of a live fork fails once, in every way that has a meaning of its own; whatever comes of it, the VM is right.
#[test]
fn a_failure_of_any_call_leaves_the_vm_right() {
    for errno in [Errno::NOMEM, Errno::PERM, Errno::NOSYS, Errno::INVAL, Errno::MFILE, Errno::BUSY, Errno::INTR] {
        for (kept, onward) in [false, true].into_iter().flat_map(|kept| ONWARD.map(|onward| (kept, onward))) {
            let (mut failed, mut fell_back) = (0, 0);
            for n in 1.. {
                let tree = Tree::default();
                let vm = vm(&tree);
                if kept {
                    (0..20).for_each(|page| store(&vm, page, 1));
                    check(&vm, &policy(), &mut |_, _| {});
                }
                (10..30).for_each(|page| store(&vm, page, 2));
                vm.ram().discard(Gfn::new(40), PageCount::new(2)).unwrap();
                let files = tree.usage().memory_files;
                let guard = plan::arm(n, errno);
                let home = vm.ram().space().host_base();
                let forked = fork(&vm, onward, &mut |moment, _| match moment {
                    Moment::Copied(0) => {
                        (25..35).for_each(|page| store(&vm, page, 3));
                        vm.ram().write(at(11), &[0; 4096]).unwrap();
                    }
                    Moment::Copied(1) => vm.ram().discard(Gfn::new(28), PageCount::new(2)).unwrap(),
                    _ => {}
                });
                let seen = plan::calls_seen();
                drop(guard);
                vm.validate().unwrap();
                assert_eq!(vm.status(), VmStatus::Running);
                match &forked {
                    Ok(point) => {
                        let clone = point.spawn(CloneSpec::default()).unwrap();
                        assert!(bytes(&clone) == bytes(&vm));
                        fell_back += u64::from(point.timings().precopy.unwrap().fallback().is_some());
                    }
                    Err(_) => {
                        assert_eq!(vm.ram().space().host_base(), home);
                        failed += 1;
                        assert_eq!(tree.usage().memory_files, files);
                    }
                }
                // Whatever it was, it does not linger.
                store(&vm, 33, 4);
                check(&vm, &policy(), &mut |_, _| {});
                if seen < n {
                    assert!(forked.is_ok() && n > 15, "{n} calls");
                    break;
                }
            }
            assert_eq!(failed > 10, errno != Errno::INTR, "{errno}: {failed}");
            // Who has a userfaultfd already is not refused one.
            let refusals = [Errno::NOSYS, Errno::INVAL, Errno::BUSY];
            let without = refusals.contains(&errno) || (errno == Errno::PERM && !kept);
            assert_eq!(fell_back > 0, without, "{errno}, {kept}");
        }
    }
}

#[test]
fn without_write_protection_it_falls_back_and_says_so() {
    for (errno, why) in [(Errno::NOSYS, Fallback::Kernel), (Errno::PERM, Fallback::NotPermitted)] {
        let vm = vm(&Tree::default());
        (0..10).for_each(|page| store(&vm, page, 1));
        // Finding the page tables' file is what a plain fork does too; done before, it is not what fails.
        vm.dirty().unwrap();
        let guard = plan::arm(1, errno);
        let point = vm.fork_live(&mut rest(), &LivePolicy::default()).unwrap();
        drop(guard);
        let timings = point.timings().precopy.unwrap();
        assert_eq!((timings.fallback(), timings.rounds().len()), (Some(why), 0));
        assert!(bytes(&point.spawn(CloneSpec::default()).unwrap()) == bytes(&vm));

        // The bound holds there as well.
        store(&vm, 1, 2);
        let guard = plan::arm(1, errno);
        let none = LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..LivePolicy::default() };
        assert!(matches!(vm.fork_live(&mut rest(), &none), Err(ForkError::PauseTooLong { .. })));
        drop(guard);
        vm.validate().unwrap();
    }
}

#[test]
fn larger_pages_are_copied_whole() {
    let layout = RamLayout::flat(ByteSize::kib(4 * PAGES), PageSize::new(ByteSize::kib(16)).unwrap()).unwrap();
    let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("vm").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    (0..PAGES).for_each(|page| store(&vm, page, 1));
    vm.fork(&mut rest()).unwrap();
    (0..6).for_each(|page| store(&vm, page, 2));
    let point = check(&vm, &policy(), &mut |moment, _| match moment {
        // One host page of a page that is copied, which was not private when it was.
        Moment::Copied(0) => store(&vm, 7, 3),
        Moment::Protected(1) => store(&vm, 4, 3),
        Moment::Copied(1) => {
            vm.ram().space().zero(PageRange::one(PageIndex::new(0))).unwrap();
            store(&vm, 2, 4);
        }
        _ => {}
    });
    assert_eq!(pages_of(&point), (vec![2, 1, 2, 0], 0));
    assert_eq!(vm.dirty().unwrap().ram, PageSet::new());
}

#[test]
fn scattered_pages_stay_within_the_limit_on_mappings() {
    let tree = Tree::new(crate::Limits { mappings_per_vm: 16, ..crate::Limits::default() });
    let vm = vm(&tree);
    (0..PAGES).step_by(8).for_each(|page| store(&vm, page, 2));
    let point = check(&vm, &policy(), &mut |moment, _| match moment {
        Moment::Copied(0) => (4..PAGES).step_by(8).for_each(|page| store(&vm, page, 3)),
        Moment::Copied(2) => (2..PAGES).step_by(4).for_each(|page| store(&vm, page, 4)),
        _ => {}
    });
    let clone = point.spawn(CloneSpec::default()).unwrap();
    assert!(clone.ram().space().kernel_mappings() <= 16);
    // The gaps that were copied along show another layer than the origin names, and count as unchanged.
    check(&vm, &policy(), &mut |_, _| {});
    let none = Tree::new(crate::Limits { mappings_per_vm: 1, ..crate::Limits::default() });
    let vm = self::vm(&none);
    store(&vm, 10, 1);
    // One layer under another takes three mappings.
    let before = bytes(&vm);
    let refused = vm.fork_live(&mut rest(), &policy());
    assert!(matches!(refused, Err(ForkError::Cut(crate::SpaceError::MappingLimit { .. }))), "{refused:?}");
    assert!(bytes(&vm) == before);
    assert_eq!(vm.dirty().unwrap().ram, set([10]));
    vm.validate().unwrap();
}
