//! One thing goes wrong, for every n: the n-th page, system call, embedder's call or read of the base image.
//!
//! Afterwards the parent runs, all contents are right, and nothing is left: no page, mapping or descriptor. What a process
//! holds is counted, so these tests take turns.

#![cfg(unix)]

mod scenario;

use std::sync::{Mutex, MutexGuard, PoisonError};

use offshoot::backing::{Backing, Heap};
use offshoot::testing::Trouble;
use offshoot::testing::faults::Refusal;
use scenario::{Fault, PAGE, RAM_PAGES, Report, play};

/// One at a time: they count what the process holds.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the engine holds of this process: mappings of its files, its spare address ranges, descriptors of its files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    mappings: usize,
    spares: usize,
    descriptors: usize,
}

fn held() -> Held {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return Held { mappings: 0, spares: 0, descriptors: 0 };
    };
    let is_spare = |line: &&str| {
        let Some((range, rest)) = line.split_once(' ') else { return false };
        let ends = range.split_once('-').map(|(a, b)| (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)));
        matches!(ends, Some((Ok(a), Ok(b))) if b - a == RAM_PAGES * PAGE) && rest.starts_with("---p")
    };
    let links = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let ours = |name: &str| name.contains("memfd:offshoot") || name.contains("pagemap");
    Held {
        mappings: maps.lines().filter(|line| line.contains("memfd:offshoot")).count(),
        spares: maps.lines().filter(is_spare).count(),
        descriptors: links
            .filter_map(|link| std::fs::read_link(link.path()).ok())
            .filter(|to| to.to_str().is_some_and(ours))
            .count(),
    }
}

/// Plays the scenario with the n-th going wrong, for every n, and says how many there were.
fn for_every_n<B: Backing>(fault: impl Fn(u64) -> Fault) -> u64 {
    let _turn = turn();
    let before = held();
    let mut failures = 0;
    for n in 1.. {
        let report = play::<B>(fault(n));
        assert_eq!(held(), before, "left behind by {:?}", fault(n));
        failures += report.failures;
        if report.failures == 0 && report.met < n {
            // The last run met fewer than n: every n has been tried.
            assert!(failures > 0 || n == 1, "none of {n} made any step fail");
            return failures;
        }
    }
    unreachable!("the scenario ends")
}

fn without_a_fault<B: Backing>() {
    let _turn = turn();
    let before = held();
    assert_eq!(play::<B>(Fault::None), Report { met: 0, failures: 0 });
    assert_eq!(held(), before);
}

fn the_embedder_fails<B: Backing>() {
    let errors = for_every_n::<B>(|n| Fault::Embedder(n, Trouble::Error));
    let panics = for_every_n::<B>(|n| Fault::Embedder(n, Trouble::Panic));
    // Four forks of a running guest with three calls each, five spawns with two, and what else there is.
    assert!(errors >= 20 && panics == errors, "{errors} errors and {panics} panics");
}

fn the_base_fails<B: Backing>(least: u64) {
    let failures = for_every_n::<B>(Fault::BaseRead);
    assert!(failures >= least, "{failures} reads of the base failed");
}

#[test]
fn all_goes_well_on_the_heap() {
    without_a_fault::<Heap>();
}

#[test]
fn every_page_of_the_heap_is_refused_once() {
    let failures = for_every_n::<Heap>(Fault::HeapPage);
    assert!(failures >= 40, "{failures} pages were refused");
}

#[test]
fn the_embedder_fails_on_the_heap() {
    the_embedder_fails::<Heap>();
}

#[test]
fn the_base_fails_on_the_heap() {
    the_base_fails::<Heap>(6);
}

/// Only the random numbers of identities ask the system for anything.
#[test]
fn every_system_call_fails_on_the_heap() {
    let failures = for_every_n::<Heap>(|n| Fault::Call(n, Refusal::Io));
    assert_eq!(failures, if cfg!(target_os = "linux") { 6 } else { 0 });
}

#[cfg(target_os = "linux")]
mod mapped {
    use super::*;
    use offshoot::backing::Mapped;

    #[test]
    fn all_goes_well_on_mapped_memory() {
        without_a_fault::<Mapped>();
    }

    #[test]
    fn the_embedder_fails_on_mapped_memory() {
        the_embedder_fails::<Mapped>();
    }

    #[test]
    fn the_base_fails_on_mapped_memory() {
        the_base_fails::<Mapped>(5);
    }

    #[test]
    fn every_system_call_fails_on_mapped_memory() {
        for how in
            [Refusal::OutOfMemory, Refusal::OutOfDescriptors, Refusal::NoSpace, Refusal::Io, Refusal::Unsupported]
        {
            let failures = for_every_n::<Mapped>(|n| Fault::Call(n, how));
            assert!(failures >= 50, "{how:?}: {failures} steps failed");
        }
    }

    /// A signal is no failure.
    #[test]
    fn every_system_call_is_interrupted_on_mapped_memory() {
        let _turn = turn();
        for n in 1.. {
            let report = play::<Mapped>(Fault::Call(n, Refusal::Interrupted));
            assert_eq!(report.failures, 0, "an interrupted call is made again");
            if report.met < n {
                assert!(n > 50, "only {n} calls");
                break;
            }
        }
    }
}
