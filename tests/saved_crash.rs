//! Saved VMs and power cuts: cut anywhere, the store opens to the saved VMs of before a call or after it, each whole; and calls of the medium that fail.

#![cfg(unix)]

mod saved;

use std::collections::BTreeMap;

use offshoot::backing::Heap;
use offshoot::store::{CloneError, CloneStore, Health, Job, Problem, StoreOptions};
use offshoot::testing::Dice;
use offshoot::testing::crash::{Fault, Log, Recorder, Tearing};
use offshoot::{ForkPoint, Reading, SavedError};
use saved::{Flat, Machine, flat, name, over, threads};

fn soak() -> Option<u64> {
    std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse().ok())
}

type World = BTreeMap<String, Flat>;

/// A store, a VM that goes on, and what must be in the store.
struct Player {
    store: CloneStore,
    machine: Machine<Heap>,
    last: Option<ForkPoint<Heap>>,
    world: World,
    threads: rayon::ThreadPool,
}

impl Player {
    fn over(recorder: &Recorder) -> Self {
        let store = over(recorder.folder());
        Self { store, machine: Machine::small(vec![1]), last: None, world: World::new(), threads: threads(1) }
    }

    /// A step: the world as it is after it, if it succeeds, and whether it does.
    fn step(&mut self, dice: &mut Dice) -> (World, Result<(), SavedError>) {
        let mut after = self.world.clone();
        let text = format!("n{}", dice.below(4));
        let job = Job::new();
        if after.remove(&text).is_some() {
            return (after, self.store.delete(&name(&text)).map_err(SavedError::from));
        }
        self.machine.mess(dice);
        let point = self.machine.fork();
        after.insert(text.clone(), flat(&point).expect("it is in memory"));
        let done = match &self.last {
            Some(last) => point.save_since(last, &self.store, &name(&text), &self.threads, &job),
            None => point.save(&self.store, &name(&text), &self.threads, &job),
        };
        self.last = Some(point);
        (after, done.map(drop))
    }
}

struct Step {
    from: usize,
    before: World,
    after: World,
}

fn history(recorder: &Recorder, seed: u64, steps: u64) -> Vec<Step> {
    let mut player = Player::over(recorder);
    let mut dice = Dice::new(seed);
    let mut done = Vec::new();
    for step in 0..steps {
        let (from, before) = (recorder.position(), player.world.clone());
        let (after, result) = player.step(&mut dice);
        result.unwrap_or_else(|error| panic!("seed {seed}, step {step}: {error}"));
        player.world = after.clone();
        done.push(Step { from, before, after });
    }
    // A process that is killed drops nothing.
    std::mem::forget(player);
    done
}

fn contents(store: &CloneStore) -> Result<World, String> {
    let threads = threads(1);
    let mut world = World::new();
    for info in store.list_saved().map_err(|error| error.to_string())? {
        let text = info.name.to_string();
        if info.health != Health::Whole {
            return Err(format!("{text} is {:?}", info.health));
        }
        let point = ForkPoint::<Heap>::load(store, &info.name, Reading::OnDemand, &threads, &Job::new());
        let point = point.map_err(|error| format!("{text}: {error}"))?;
        world.insert(text.clone(), flat(&point).map_err(|error| format!("{text}: {error}"))?);
    }
    Ok(world)
}

/// Opens a state that a cut left, and puts it right.
fn check_state(state: &Recorder, step: &Step) -> Result<(), String> {
    let store =
        CloneStore::over(state.folder(), StoreOptions::default()).map_err(|error| format!("opening: {error}"))?;
    let found = contents(&store)?;
    if found != step.before && found != step.after {
        return Err("neither what was saved before nor what was after".into());
    }
    let threads = threads(1);
    let check = || store.check(&threads, &Job::new()).map_err(|error| format!("checking: {error}"));
    let wrong = check()?;
    if !wrong.iter().all(|problem| matches!(problem, Problem::Orphan { .. } | Problem::Unfinished { .. })) {
        return Err(format!("{wrong:?}"));
    }
    store.repair().map_err(|error| format!("repairing: {error}"))?;
    let left = check()?;
    if !left.is_empty() {
        return Err(format!("after a repair: {left:?}"));
    }
    // And it goes on.
    let mut machine = Machine::<Heap>::small(vec![2]);
    let fresh = machine.fork();
    fresh.save(&store, &name("after the cut"), &threads, &Job::new()).map_err(|error| error.to_string())?;
    let mut want = found;
    want.insert("after the cut".into(), flat(&fresh).map_err(|error| error.to_string())?);
    if contents(&store)? == want { Ok(()) } else { Err("something is lost by going on".into()) }
}

fn check_cuts(log: &Log, steps: &[Step], stride: usize, most: usize, seed: u64) -> Result<u64, String> {
    let mut checked = 0;
    for position in (steps[0].from..=log.len()).step_by(stride) {
        let step = &steps[steps.partition_point(|step| step.from <= position) - 1];
        for tearing in [Tearing::Sectors, Tearing::Pages] {
            for state in log.states_at(position, tearing, seed ^ position as u64, most) {
                check_state(&state, step)
                    .map_err(|wrong| format!("cut after call {position}, {tearing:?}: {wrong}"))?;
                checked += 1;
            }
        }
    }
    Ok(checked)
}

#[test]
fn a_cut_anywhere_leaves_what_was_saved_before_or_after() {
    let (seeds, stride, most) = match soak() {
        Some(n) => (20 * n, 1, 8),
        None => (1, 11, 2),
    };
    let mut checked = 0;
    for seed in 0..seeds {
        let recorder = Recorder::new();
        let steps = history(&recorder, seed, 8);
        checked += check_cuts(&recorder.log(), &steps, stride, most, seed)
            .unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
    println!("{checked} states");
    assert!(checked > 50, "only {checked} states");
}

/// With any of the syncs taken out the test above must fail, or it could not find anything.
#[test]
fn without_its_syncs_the_same_history_is_found_out() {
    let recorder = Recorder::new();
    let steps = history(&recorder, 1, 9);
    for which in ["catalogue", ".layer", ".vm"] {
        let log = recorder.log().without_syncs(|sync| sync.file.as_deref().is_some_and(|file| file.contains(which)));
        let found = check_cuts(&log, &steps, 5, 6, 1);
        assert!(found.is_err(), "the syncs of {which} were missed by nobody, in {found:?} states");
    }
    let log = recorder.log().without_syncs(|sync| sync.file.is_none());
    let found = check_cuts(&log, &steps, 5, 6, 1);
    assert!(found.is_err(), "the syncs of names were missed by nobody, in {found:?} states");
}

/// `EIO`, `ENOSPC` and short writes at the n-th call: what fails fails cleanly, in this process and for whoever opens the store next.
#[test]
fn every_call_fails_once() {
    let stride = if soak().is_some() { 1 } else { 31 };
    for how in [Fault::Io, Fault::NoSpace, Fault::Short] {
        let mut failures = 0;
        for n in (1u64..).step_by(stride) {
            let recorder = Recorder::new();
            let mut player = Player::over(&recorder);
            let mut dice = Dice::new(3);
            recorder.fail_nth(n, how);
            let mut failed = None;
            let mut around = Step { from: 0, before: World::new(), after: World::new() };
            for _ in 0..7 {
                let before = player.world.clone();
                let (after, done) = player.step(&mut dice);
                around = Step { from: 0, before, after: after.clone() };
                if let Err(error) = done {
                    failed = Some(error);
                    break;
                }
                player.world = after;
            }
            let calls = recorder.calls();
            recorder.fail_nth(0, how);
            // Unless it was the catalogue that failed, the store is as it was, and holds nothing of what was begun but what could not be removed.
            if let Some(error) = &failed {
                failures += 1;
                assert!(!error.to_string().is_empty());
                if !matches!(error, SavedError::Store(CloneError::Catalogue { .. })) {
                    let found = contents(&player.store).unwrap_or_else(|wrong| panic!("{how:?} at call {n}: {wrong}"));
                    assert!(found == around.before, "{how:?} at call {n}: {error}");
                }
            }
            drop(player);
            let log = recorder.log();
            check_state(&log.all_done(), &around)
                .unwrap_or_else(|wrong| panic!("{how:?} at call {n}, killed: {wrong}"));
            for state in log.states_at(log.len(), Tearing::Sectors, n, 3) {
                check_state(&state, &around).unwrap_or_else(|wrong| panic!("{how:?} at call {n}, cut: {wrong}"));
            }
            if calls < n {
                break;
            }
        }
        println!("{how:?}: {failures} steps failed");
        assert!(failures >= 3, "{how:?}: only {failures} steps failed");
    }
}
