//! The clone store and other processes: a second opener is refused, and a process that is killed leaves the state before or after.
//!
//! One test: a process that is being started holds for a moment whatever locks its parent has, so nothing else may open a store meanwhile.

#![cfg(unix)]

mod clones;

use std::process::Command;

use clones::{Player, Temp, contents, of_world, problems};
use offshoot::StoreError;
use offshoot::store::{CloneError, CloneName, CloneStore, Kind, Problem, StoreOptions};
use offshoot::testing::Dice;

fn open(temp: &Temp) -> CloneStore {
    CloneStore::open(temp.path(), StoreOptions::default()).expect("it opens")
}

#[test]
fn other_processes() {
    a_second_opener_is_refused();
    killed_at_any_call_it_opens_to_the_state_before_or_after();
}

fn a_second_opener_is_refused() {
    let temp = Temp::new("two");
    let store = open(&temp);
    let in_use = |result: Result<CloneStore, CloneError>| {
        let error = result.expect_err("it is open already");
        assert!(matches!(&error, CloneError::Space(offshoot::SpaceError::Store(StoreError::InUse { .. }))), "{error}");
        assert!(error.to_string().contains("catalogue"), "{error}");
    };
    in_use(CloneStore::open(temp.path(), StoreOptions::default()));
    assert_eq!(child("in_another_process", &[("OFFSHOOT_CHILD_DIR", temp.path().to_str().unwrap())]), Some(17));
    drop(store);
    assert_eq!(child("in_another_process", &[("OFFSHOOT_CHILD_DIR", temp.path().to_str().unwrap())]), Some(0));
}

/// Runs one test of this program in a process of its own; its exit code, `None` for a signal.
fn child(test: &str, env: &[(&str, &str)]) -> Option<i32> {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--ignored", "--quiet"]).envs(env.iter().copied());
    command.output().expect("it starts").status.code()
}

#[test]
#[ignore = "the other process of a test"]
fn in_another_process() {
    let Ok(dir) = std::env::var("OFFSHOOT_CHILD_DIR") else { return };
    match CloneStore::open(dir, StoreOptions::default()) {
        Ok(_) => std::process::exit(0),
        Err(CloneError::Space(offshoot::SpaceError::Store(StoreError::InUse { .. }))) => std::process::exit(17),
        Err(error) => panic!("{error}"),
    }
}

#[path = "clones/kills.rs"]
mod kills;

/// Steps of the history that is killed.
const KILLED_STEPS: u64 = 24;

/// The worlds that a history goes through, and the disk that each step writes.
fn worlds(store: &CloneStore, seed: u64, mut after_step: impl FnMut(u64)) -> Vec<(clones::World, Option<CloneName>)> {
    let mut player = Player { store: store.clone(), world: clones::World::new(), wrote: None };
    let mut dice = Dice::new(seed);
    let mut worlds = vec![(player.world.clone(), None)];
    for step in 0..KILLED_STEPS {
        player.step(&mut dice).expect("nothing fails");
        after_step(step);
        worlds.push((player.world.clone(), player.wrote.clone()));
    }
    worlds
}

/// A process is killed before each call of a history in turn (every call in a soak): the store opens to a state of before or after the step.
fn killed_at_any_call_it_opens_to_the_state_before_or_after() {
    let seed = 5;
    let reference = Temp::new("kill-reference");
    let worlds = worlds(&open(&reference), seed, |_| {});
    let stride = if std::env::var_os("OFFSHOOT_SOAK").is_some() { 1 } else { 23 };
    let (mut kills, mut torn) = (0, 0);
    for n in (1u64..).step_by(stride) {
        let temp = Temp::new("kill");
        std::fs::create_dir_all(temp.path()).unwrap();
        let text = n.to_string();
        let env = [("OFFSHOOT_CHILD_DIR", temp.path().to_str().unwrap()), ("OFFSHOOT_CHILD_KILL", text.as_str())];
        let exit = child("a_history_that_is_killed", &env);
        let done: usize = std::fs::read_to_string(temp.path().join("steps")).map_or(0, |steps| steps.len());
        let store = open(&temp);
        let found = contents(&store).expect("it can be read");
        let (before, after) = (&worlds[done], &worlds[(done + 1).min(worlds.len() - 1)]);
        match &after.1 {
            Some(written) if found != of_world(&before.0) && found != of_world(&after.0) => {
                torn += 1;
                check_sectors(&found, &before.0, &after.0, written);
            }
            Some(_) => {}
            None => {
                assert!(found == of_world(&before.0) || found == of_world(&after.0), "killed at call {n}, step {done}")
            }
        }
        let wrong = problems(&store);
        let harmless = |problem: &Problem| matches!(problem, Problem::Orphan { .. } | Problem::Unfinished { .. });
        assert!(wrong.iter().all(harmless), "killed at call {n}: {wrong:?}");
        store.repair().unwrap();
        assert!(problems(&store).is_empty());
        assert!(contents(&store).unwrap() == found, "a repair changes no disk");
        match exit {
            None => kills += 1,
            Some(0) => break,
            Some(code) => panic!("the history ended with {code}"),
        }
    }
    assert!(kills > 10, "{kills} kills, {torn} of them between the sectors of one write");
}

fn check_sectors(
    found: &std::collections::BTreeMap<CloneName, (Kind, Vec<u8>)>,
    before: &clones::World,
    after: &clones::World,
    written: &CloneName,
) {
    for (name, (_, bytes)) in found {
        let (old, new) = (&before[name].now, &after[name].now);
        if name != written {
            assert!(bytes == old, "{name} was not touched");
        }
        for at in (0..bytes.len()).step_by(512) {
            let here = at..at + 512;
            assert!(bytes[here.clone()] == old[here.clone()] || bytes[here.clone()] == new[here], "{name} at {at}");
        }
    }
    assert_eq!(found.len(), before.len());
}

#[test]
#[ignore = "the process that is killed"]
fn a_history_that_is_killed() {
    let Ok(dir) = std::env::var("OFFSHOOT_CHILD_DIR") else { return };
    let calls: u64 = std::env::var("OFFSHOOT_CHILD_KILL").expect("set by the parent").parse().expect("a number");
    let fuse = std::sync::Arc::new(kills::Fuse { left: calls.into() });
    let inner = offshoot::store::open_folder(&dir).expect("it is there");
    let folder = std::sync::Arc::new(kills::Killing { inner, fuse });
    let store = CloneStore::over(folder, StoreOptions::default()).expect("it opens");
    let steps = std::path::Path::new(&dir).join("steps");
    worlds(&store, 5, |step| std::fs::write(&steps, "x".repeat(step as usize + 1)).expect("it can be noted"));
    std::process::exit(0);
}
