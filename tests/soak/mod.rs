//! A soak: threads that write pages through every fork of their VM, clones with such threads of their own that are forked too, and readers
//! that check every page they see. A page check is a few loads, so that a thousand million of them take minutes.
//!
//! The table of figures runs it too (`checks`): faults are counted, not panicked over. No verdict depends on time.

mod stamp;
mod subject;
mod tally;
mod vcpus;

pub use stamp::{Expected, PAGE, PLACES, Stamp, Wrong, check_at_rest, check_racing, salted};
pub use subject::{Subject, Typed};

pub use tally::{Found, Tally};
pub use vcpus::{Stopping, Vcpus, get, put, saved};

use subject::Access;

use offshoot::backing::Backing;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, PageSize};
use offshoot::ram::RamLayout;
use offshoot::testing::Dice;
use offshoot::{CloneSpec, ForkPoint, Limits, Tree, TreeUsage, Vm, VmName};

/// Few enough that writers meet on the same tables, many enough to cross them.
pub const SPACE_PAGES: u64 = 192;
pub const SPACE: ByteSize = ByteSize::new(SPACE_PAGES * PAGE);
const CLONES: u64 = 2;
/// Checks that a reader makes before it lets a pause in.
const STEP: u64 = 64;
/// Checks of one round: a tree of its own, so that no run is one tree for ever.
const ROUND: u64 = 4_000_000;
/// What a fault is reported with.
const TAGS_OF_A_ROUND: u64 = 1 << 20;

/// At least `wanted` page checks, in rounds of forks under writers.
pub fn soak<S: Subject>(wanted: u64) -> Found {
    let mut found = Found::default();
    for round in 0.. {
        if found.checks >= wanted {
            break;
        }
        found += one_round::<S>(round, (wanted - found.checks).min(ROUND));
    }
    found
}

/// A parent under writers is forked again and again while its clones write, are forked themselves, and are read.
pub fn one_round<S: Subject>(round: u64, wanted: u64) -> Found {
    let tree = Tree::new(Limits::default());
    let layout = RamLayout::flat(SPACE, PageSize::KIB_4).expect("a layout");
    let vm = Vm::<S>::new(&tree, VmName::new("parent").expect("a name"), layout, vec![]).expect("a VM");
    let tag = |n: u64| round % (1 << 9) * TAGS_OF_A_ROUND + 1 + n;
    let first: Vec<u64> = (0..SPACE_PAGES).map(|page| Stamp { page, tag: tag(0), sequence: 1 }.word()).collect();
    first.iter().for_each(|word| put(&Typed(vm.ram().clone()), *word));
    vm.start().expect("it is off");
    let tally = Tally::default();
    // So many checks in one visit that even a short run makes a good number of forks.
    let visit = (wanted / 64).clamp(SPACE_PAGES, 16 * SPACE_PAGES);
    let vcpus = Vcpus::start(&vm, tag(0), first);
    let mut teardowns = Vec::new();
    let mut generation = 0;
    while tally.checks() < wanted {
        generation += 1;
        let forked = S::fork(&vm, &mut Stopping::new(&vcpus), generation - 1).expect("it runs");
        tally.forked();
        let Some(point) = forked else { continue };
        teardowns.push(point.teardown().clone());
        std::thread::scope(|scope| {
            for clone in 0..CLONES {
                let (point, tally) = (&point, &tally);
                let own = tag(generation * CLONES + clone);
                scope.spawn(move || live_clone(point, own, generation + clone, visit, tally));
            }
            // The parent runs on under its own readers.
            check_running(&vcpus, 2 * visit, &mut Dice::new(generation), &tally);
        });
        // After all that its clones did.
        check_point(&point, &tally);
    }
    let last = vcpus.join();
    check_vm(&vm, &last, &tally);
    vm.validate().unwrap_or_else(|wrong| panic!("{wrong}"));
    drop(vm);
    for teardown in teardowns {
        teardown.wait();
    }
    assert_eq!(tree.usage(), TreeUsage::default(), "something is left");
    tally.found()
}

/// A clone: read before it runs, while it writes, through a fork of its own, and when it has stopped; then its fork point once it is gone.
fn live_clone<S: Subject>(point: &ForkPoint<S>, own: u64, n: u64, visit: u64, tally: &Tally) {
    let clone = point.spawn(CloneSpec::default()).expect("a clone");
    let inherited = saved(point.device_state());
    check_vm(&clone, &inherited, tally);
    clone.start().expect("it is paused");
    let vcpus = Vcpus::start(&clone, own, inherited);
    let mut dice = Dice::new(own);
    check_running(&vcpus, visit, &mut dice, tally);
    let deeper = S::fork(&clone, &mut Stopping::new(&vcpus), n).expect("it runs");
    tally.forked();
    check_running(&vcpus, visit, &mut dice, tally);
    let last = vcpus.join();
    check_vm(&clone, &last, tally);
    drop(clone);
    if let Some(deeper) = deeper {
        let grandchild = deeper.spawn(CloneSpec::default()).expect("a clone");
        check_vm(&grandchild, &saved(deeper.device_state()), tally);
        check_point(&deeper, tally);
        deeper.teardown().wait();
    }
}

/// Checks random pages of a VM that runs.
fn check_running<S: Subject>(vcpus: &Vcpus<S>, checks: u64, dice: &mut Dice, tally: &Tally) {
    let known = &*vcpus.known;
    for _ in 0..checks.div_ceil(STEP) {
        let access = vcpus.reach();
        let held = access.hold();
        for _ in 0..STEP {
            let page = dice.below(SPACE_PAGES);
            let from = known.written(page);
            let words = get(&held, page);
            let to = Stamp::of(known.written(page)).sequence + 1;
            let expected = Expected { own: known.own, inherited: known.inherited[page as usize], from, to };
            if let Err(wrong) = check_racing(&words, expected) {
                tally.wrong(wrong, format_args!("page {page} of running VM {}", known.own));
            }
        }
        drop(held);
        drop(access);
        tally.checked(STEP);
    }
}

/// Checks all pages of a VM whose guest stands still.
fn check_vm<S: Subject>(vm: &Vm<S>, expected: &[u64], tally: &Tally) {
    let (access, typed) = (S::access(vm), Typed(vm.ram().clone()));
    let held = access.hold();
    for (page, expected) in (0..).zip(expected) {
        let words = if page % 2 == 0 { get(&held, page) } else { get(&typed, page) };
        if let Err(wrong) = check_at_rest(&words, *expected) {
            tally.wrong(wrong, format_args!("page {page} of {} at rest", vm.identity().name));
        }
    }
    tally.checked(SPACE_PAGES);
}

/// Checks a fork point against what its guest had written: exactly that.
fn check_point<B: Backing>(point: &ForkPoint<B>, tally: &Tally) {
    for (page, expected) in (0..).zip(saved(point.device_state())) {
        let words = PLACES.map(|place| {
            let mut bytes = [0; 8];
            point.ram().read(ByteOffset::new(page * PAGE + place), &mut bytes).expect("an image can be read");
            u64::from_ne_bytes(bytes)
        });
        if let Err(wrong) = check_at_rest(&words, expected) {
            tally.wrong(wrong, format_args!("page {page} of a fork point"));
        }
    }
    tally.checked(SPACE_PAGES);
}
