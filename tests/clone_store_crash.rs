//! Power cuts and failing calls in a clone store: the catalogue lies on the recording folder like everything else.
//!
//! A step of a history is one change. Cut anywhere, the store opens to the world before the step or after it; a write of sectors is the one step that
//! may be half done, sector by sector.

#![cfg(unix)]

mod clones;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use clones::{Player, World, contents, name, of_world, problems, size};
use offshoot::backing::Backing;
use offshoot::page::ByteOffset;
use offshoot::store::{CloneName, CloneStore, Kind, Problem, StoreOptions};
use offshoot::testing::Dice;
use offshoot::testing::crash::{Fault, Recorder, Tearing};

fn soak() -> Option<u64> {
    std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse().ok())
}

/// A step of a history: where it began in the log, the worlds around it, and whose sectors it wrote.
struct Step {
    from: usize,
    before: World,
    after: World,
    wrote: Option<CloneName>,
}

type Found = BTreeMap<CloneName, (Kind, Vec<u8>)>;

fn allowed(found: &Found, step: &Step) -> Result<(), String> {
    if *found == of_world(&step.before) || *found == of_world(&step.after) {
        return Ok(());
    }
    let Some(written) = &step.wrote else { return Err("neither the world before nor the one after".into()) };
    for (name, (_, bytes)) in found {
        let (Some(old), Some(new)) = (step.before.get(name), step.after.get(name)) else {
            return Err(format!("{name} is there"));
        };
        let is_allowed = |at: usize| {
            let here = at..at + 512;
            bytes[here.clone()] == old.now[here.clone()] || name == written && bytes[here.clone()] == new.now[here]
        };
        if bytes.len() != old.now.len() || !(0..bytes.len()).step_by(512).all(is_allowed) {
            return Err(format!("{name} holds what it never may"));
        }
    }
    if found.len() == step.before.len() { Ok(()) } else { Err("a disk is gone".into()) }
}

/// How far a state is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    Open,
    /// The store is repaired, and goes on.
    GoOn,
}

/// Opens a state that a cut left, and puts it right.
fn check_state(state: &Recorder, step: &Step, depth: Depth) -> Result<(), String> {
    let store =
        CloneStore::over(state.folder(), StoreOptions::default()).map_err(|error| format!("opening: {error}"))?;
    let found = contents(&store).map_err(|error| format!("reading: {error}"))?;
    allowed(&found, step)?;
    let harmless = |problem: &Problem| matches!(problem, Problem::Orphan { .. } | Problem::Unfinished { .. });
    let wrong = problems(&store);
    if !wrong.iter().all(harmless) {
        return Err(format!("{wrong:?}"));
    }
    if depth == Depth::Open {
        return Ok(());
    }
    store.repair().map_err(|error| format!("repairing: {error}"))?;
    let left = problems(&store);
    if !left.is_empty() {
        return Err(format!("after a repair: {left:?}"));
    }
    // And it goes on.
    let fresh = name("after the cut");
    store.create_empty(&fresh, size(2)).map_err(|error| error.to_string())?;
    if contents(&store).map_err(|error| error.to_string())?.len() != found.len() + 1 {
        return Err("a disk is lost by going on".into());
    }
    Ok(())
}

fn history(recorder: &Recorder, seed: u64, steps: u64) -> Vec<Step> {
    let mut player = Player::over(recorder.folder());
    let mut dice = Dice::new(seed);
    let mut done = Vec::new();
    for step in 0..steps {
        let (from, before) = (recorder.position(), player.world.clone());
        player.step(&mut dice).unwrap_or_else(|error| panic!("seed {seed}, step {step}: {error}"));
        done.push(Step { from, before, after: player.world.clone(), wrote: player.wrote.clone() });
    }
    // A process that is killed drops nothing.
    std::mem::forget(player);
    done
}

/// Checks states at every `stride`-th position of the log; how many, or the first that is wrong.
fn check_cuts(
    log: &offshoot::testing::crash::Log,
    steps: &[Step],
    stride: usize,
    most: usize,
    seed: u64,
) -> Result<u64, String> {
    let mut checked = 0;
    let mut check = |position: usize, tearing, state: &Recorder| {
        let step = &steps[steps.partition_point(|step| step.from <= position) - 1];
        checked += 1;
        let depth = if checked % 8 == 0 { Depth::GoOn } else { Depth::Open };
        check_state(state, step, depth).map_err(|wrong| format!("cut after call {position}, {tearing:?}: {wrong}"))
    };
    for tearing in [Tearing::Sectors, Tearing::Pages] {
        if stride == 1 {
            log.all_states(steps[0].from, tearing, seed, most)
                .try_for_each(|(at, state)| check(at, tearing, &state))?;
            continue;
        }
        for position in (steps[0].from..=log.len()).step_by(stride) {
            log.states_at(position, tearing, seed, most).try_for_each(|state| check(position, tearing, &state))?;
        }
    }
    Ok(checked)
}

#[test]
fn a_cut_anywhere_leaves_the_world_before_or_after() {
    let (wanted, stride, most) = match soak() {
        Some(n) => (n * 100_000, 1, 4),
        None => (100, 37, 2),
    };
    let (seeds, checked) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Histories one by one, on every core, until there were states enough.
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while checked.load(Ordering::Relaxed) < wanted {
                    let seed = seeds.fetch_add(1, Ordering::Relaxed);
                    let recorder = Recorder::new();
                    let steps = history(&recorder, seed, 14);
                    let found = check_cuts(&recorder.log(), &steps, stride, most, seed);
                    let found = found.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
                    checked.fetch_add(found, Ordering::Relaxed);
                }
            });
        }
    });
    println!("{} states of {} histories", checked.into_inner(), seeds.into_inner());
}

/// With the syncs taken out the test above must fail, or it could not find anything.
#[test]
fn without_its_syncs_the_same_history_is_found_out() {
    let recorder = Recorder::new();
    let steps = history(&recorder, 1, 14);
    for (which, of_catalogue) in [("the catalogue's", true), ("the layers'", false)] {
        let of = |file: &str| file.starts_with("catalogue") == of_catalogue;
        let log = recorder.log().without_syncs(|sync| sync.file.as_deref().is_some_and(of));
        let found = check_cuts(&log, &steps, 11, 6, 1);
        assert!(found.is_err(), "{which} syncs were missed by nobody, in {found:?} states");
    }
}

#[test]
fn the_first_opening_can_be_cut_too() {
    let recorder = Recorder::new();
    let store = CloneStore::over(recorder.folder(), StoreOptions::default()).unwrap();
    std::mem::forget(store);
    let log = recorder.log();
    let nothing = Step { from: 0, before: World::new(), after: World::new(), wrote: None };
    for position in 0..=log.len() {
        for state in log.states_at(position, Tearing::Sectors, position as u64, 3) {
            check_state(&state, &nothing, Depth::GoOn)
                .unwrap_or_else(|wrong| panic!("cut after call {position}: {wrong}"));
        }
    }
}

/// `EIO`, `ENOSPC` and short writes at the n-th call: what fails fails cleanly, and opened again the store is as before the step or after it.
#[test]
fn every_call_fails_once() {
    // Those under an open disk, each: `clone_store_open.rs`.
    let stride = if soak().is_some() { 7 } else { 97 };
    for how in [Fault::Io, Fault::NoSpace, Fault::Short] {
        let mut failures = 0;
        for n in (1u64..).step_by(stride) {
            let recorder = Recorder::new();
            let mut player = Player::over(recorder.folder());
            recorder.fail_nth(n, how);
            let mut dice = Dice::new(5);
            let mut step = Step { from: 0, before: World::new(), after: World::new(), wrote: None };
            let mut failed = false;
            for _ in 0..24 {
                let (before, mut after) = (player.world.clone(), player.world.clone());
                let done = player.try_step(&mut dice, &mut after);
                step = Step { from: 0, before, after: after.clone(), wrote: player.wrote.clone() };
                if let Err(error) = done {
                    assert!(!error.to_string().is_empty());
                    failed = true;
                    break;
                }
                player.world = after;
            }
            let calls = recorder.calls();
            recorder.fail_nth(0, how);
            failures += u64::from(failed);
            drop(player);
            let log = recorder.log();
            check_state(&log.all_done(), &step, Depth::GoOn)
                .unwrap_or_else(|wrong| panic!("{how:?} at call {n}, killed: {wrong}"));
            for state in log.states_at(log.len(), Tearing::Sectors, n, 3) {
                check_state(&state, &step, Depth::GoOn)
                    .unwrap_or_else(|wrong| panic!("{how:?} at call {n}, cut: {wrong}"));
            }
            if calls < n {
                break;
            }
        }
        assert!(failures > 3, "{how:?}: only {failures} steps failed");
    }
}

/// A disk that is open when the power goes: what was flushed is there, under its name.
#[test]
fn a_flush_of_an_open_clone_is_durable() {
    let recorder = Recorder::new();
    let store = CloneStore::over(recorder.folder(), StoreOptions::default()).unwrap();
    let [golden, web] = ["golden", "web"].map(name);
    store.create_empty(&golden, size(8)).unwrap();
    store.clone_disk(&golden, &web).unwrap();
    let disk = store.open_disk(&web).unwrap();
    disk.write(ByteOffset::new(512), &[5; 512]).unwrap();
    disk.flush().unwrap();
    let log = recorder.log();
    for state in log.states_at(log.len(), Tearing::Sectors, 1, 64) {
        let store = CloneStore::over(state.folder(), StoreOptions::default()).unwrap();
        let mut found = [0; 512];
        store.open_disk(&web).unwrap().read(ByteOffset::new(512), &mut found).unwrap();
        assert_eq!(found, [5; 512]);
    }
}
