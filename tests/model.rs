//! Trees of VMs against the naive model, in orders that proptest thinks of.
//!
//! Failing cases are shrunk and kept in `tests/regressions/`, and tried first from then on. `OFFSHOOT_SOAK=<n>` runs n
//! times as many.

mod mutants;
mod trees;

use mutants::{Broken, Flaw, Has};
use offshoot::backing::{AnyPage, Heap};
use offshoot::testing::faults::Refusal;
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestRunner};
use trees::{Course, Goes, Op, Power, Seen, Way, Ways, World, Write};

fn goes(calls: u64) -> impl Strategy<Value = Goes> {
    prop_oneof![5 => Just(Goes::Well), 1 => (1..=calls).prop_map(Goes::Wrong)]
}

/// How a fork goes while the guest goes on.
fn course() -> impl Strategy<Value = Course> {
    let way = prop_oneof![2 => Just(Way::Live), 1 => Just(Way::Moving), 2 => Just(Way::LiveMoving)];
    let how = prop_oneof![Just(Refusal::OutOfMemory), Just(Refusal::OutOfDescriptors), Just(Refusal::Unsupported)];
    let refused = prop_oneof![4 => Just(None), 1 => (1..40u64, how).prop_map(Some)];
    let write = (0..7u64, 0..16u64, 0..4096u64, any::<u64>(), prop::bool::weighted(0.2));
    let write = write.prop_map(|(moment, page, len, seed, discards)| Write { moment, page, len, seed, discards });
    let writes = prop::collection::vec(write, 0..6);
    (way, 0..4u32, prop::bool::weighted(0.1), refused, writes)
        .prop_map(|(way, rounds, gives_up, refused, writes)| Course { way, rounds, gives_up, refused, writes })
}

fn op() -> impl Strategy<Value = Op> {
    let vm = || 0..64usize;
    let power = prop_oneof![3 => Just(Power::Start), 2 => Just(Power::Pause), 1 => Just(Power::Off)];
    let (at, len) = (0..1u64 << 20, prop_oneof![0..40u64, 0..12_288u64]);
    let (lba, count) = (|| 0..128u64, || 0..64u64);
    prop_oneof![
        8 => (vm(), at, len, any::<u64>()).prop_map(|(vm, at, len, seed)| Op::WriteRam { vm, at, len, seed }),
        2 => (vm(), 0..32u64, 0..8u64).prop_map(|(vm, first, count)| Op::DiscardRam { vm, first, count }),
        5 => (vm(), 0..2usize, lba(), count(), any::<u64>())
            .prop_map(|(vm, disk, lba, count, seed)| Op::WriteDisk { vm, disk, lba, count, seed }),
        2 => (vm(), 0..2usize, lba(), count()).prop_map(|(vm, disk, lba, count)| Op::Discard { vm, disk, lba, count }),
        2 => (vm(), 0..2usize, lba(), count())
            .prop_map(|(vm, disk, lba, count)| Op::WriteZeroes { vm, disk, lba, count }),
        1 => (vm(), 0..16u64).prop_map(|(vm, page)| Op::WriteBack { vm, page }),
        5 => (vm(), power).prop_map(|(vm, to)| Op::Power { vm, to }),
        8 => (vm(), goes(3)).prop_map(|(vm, goes)| Op::Fork { vm, goes }),
        6 => (vm(), goes(5), course()).prop_map(|(vm, goes, course)| Op::ForkBy { vm, goes, course }),
        1 => (vm(), goes(3)).prop_map(|(vm, goes)| Op::Freeze { vm, goes }),
        7 => (vm(), goes(3)).prop_map(|(point, goes)| Op::Spawn { point, goes }),
        3 => (vm(), goes(3)).prop_map(|(vm, goes)| Op::Reset { vm, goes }),
        3 => (vm(), goes(3), 0..16u64, 0..4u64)
            .prop_map(|(vm, goes, first, count)| Op::ResetCopying { vm, goes, first, count }),
        2 => (vm(), vm()).prop_map(|(a, b)| Op::Diff { a, b }),
        1 => vm().prop_map(|point| Op::Flatten { point }),
        2 => (vm(), vm()).prop_map(|(point, onto)| Op::Merge { point, onto }),
        3 => (vm(), vm()).prop_map(|(clone, into)| Op::Commit { clone, into }),
        2 => vm().prop_map(|vm| Op::DropVm { vm }),
        2 => vm().prop_map(|point| Op::DropPoint { point }),
    ]
}

/// Every outcome that a long enough run must have met.
const OUTCOMES: [&str; 19] = [
    "forked while running",
    "forked while paused",
    "frozen",
    "cut illegal",
    "cut undone",
    "not resumed",
    "clone refused by its hook",
    "reset done",
    "reset illegal",
    "reset to nothing",
    "reset not paused",
    "reset not loaded",
    "diff of relatives",
    "diff of strangers",
    "merged",
    "not merged",
    "committed",
    "commit of no child",
    "commit into a diverged VM",
];

/// And what must have come up where there is more than one way to fork.
#[cfg(target_os = "linux")]
const WAYS: [&str; 12] = [
    "copied back",
    "first fork in another way",
    "forked live",
    "forked live, and written meanwhile",
    "moved",
    "moved live",
    "moved live, and written meanwhile",
    "not resumed where it went",
    "given up",
    "no hole",
    "not moved",
    "refused by the system",
];

fn soak() -> u32 {
    std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Plays `cases` runs; what went wrong, if anything, in its smallest form.
fn explore<B: Ways>(cases: u32, keep: Option<&'static str>) -> Result<Seen, String> {
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: keep.map(|file| Box::new(FileFailurePersistence::Direct(file)) as Box<_>),
        // A sequence of eighty steps takes many small steps to shrink; a flaw put there on purpose need not be shrunk.
        max_shrink_iters: if keep.is_some() { 4096 } else { 0 },
        ..ProptestConfig::default()
    });
    // The first step puts the root VM on: a VM that is off cannot be forked, and most of what there is to find comes after that.
    let ops = prop::collection::vec(op(), 1..80).prop_map(|mut ops| {
        ops.insert(0, Op::Power { vm: 0, to: Power::Start });
        ops
    });
    let seen = Seen::default();
    let result = runner.run(&ops, |ops| {
        World::<B>::new(seen.clone()).play(&ops);
        Ok(())
    });
    result.map(|()| seen).map_err(|failure| failure.to_string())
}

fn check<B: Ways>(cases: u32, keep: &'static str, outcomes: &[&str]) {
    let seen = explore::<B>(cases.saturating_mul(soak()), Some(keep)).unwrap_or_else(|failure| panic!("{failure}"));
    let wanted = OUTCOMES.iter().chain(outcomes);
    let missed: Vec<_> = wanted.filter(|outcome| !seen.borrow().contains(*outcome)).collect();
    assert!(missed.is_empty(), "{cases} runs never came to: {missed:?}");
}

#[test]
fn trees_on_the_heap() {
    check::<Heap>(300, "tests/regressions/model-heap.txt", &[]);
}

#[test]
fn trees_on_the_heap_with_pages_of_any_size() {
    check::<Heap<AnyPage>>(200, "tests/regressions/model-any.txt", &[]);
}

#[cfg(target_os = "linux")]
#[test]
fn trees_on_mapped_memory() {
    check::<offshoot::backing::Mapped>(200, "tests/regressions/model-mapped.txt", &WAYS);
}

impl<F: Has> Ways for Broken<F> {}

/// Runs like these find what is wrong: each flaw in a few hundred of them.
#[test]
fn flaws_are_found() {
    macro_rules! found {
        ($($flaw:ident),*) => {$({
            #[derive(Debug)]
            struct $flaw;
            impl Has for $flaw {
                const FLAW: Flaw = Flaw::$flaw;
            }
            assert!(explore::<Broken<$flaw>>(400, None).is_err(), "{:?} was not found", Flaw::$flaw);
        })*};
    }
    found!(SiblingsShare, ImageFollowsParent, ResetLeaves, ZeroForgets, ZeroOneMore, DirtyMisses, DiffEmpty);
    found!(MergeLoses, WriteStops, ReadStops, UsageSum, Leaks, OriginStale);
}
