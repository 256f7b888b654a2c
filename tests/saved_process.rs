//! Saved VMs and other processes: one brings back what another saved, and one that is killed while it saves leaves the store as before or after.
//!
//! One test: a process that is being started holds for a moment whatever locks its parent has, so nothing else may open a store meanwhile.

#![cfg(unix)]

#[path = "clones/kills.rs"]
mod kills;
mod saved;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use offshoot::backing::{Backing, Heap};
use offshoot::page::PageSize;
use offshoot::store::{CloneStore, Health, Job, Problem};
use offshoot::testing::Dice;
use offshoot::{ForkPoint, Reading};
use saved::{Flat, Machine, Temp, flat, load, name, open, over, problems, save, threads};

#[test]
fn other_processes() {
    another_process_brings_it_back();
    killed_at_any_call_it_is_saved_or_not();
}

/// Runs one test of this program in a process of its own; its exit code, `None` for a signal.
fn child(test: &str, dir: &Path, kill: u64) -> Option<i32> {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--ignored", "--quiet"]);
    command.env("OFFSHOOT_CHILD_DIR", dir).env("OFFSHOOT_CHILD_KILL", kill.to_string());
    command.output().expect("it starts").status.code()
}

/// A VM that both processes make alike.
fn machine<B: Backing>(store: &CloneStore) -> Machine<B> {
    let mut machine = Machine::new(store, PageSize::KIB_4, vec![1; 1000]);
    let mut dice = Dice::new(11);
    (0..6).for_each(|_| machine.mess(&mut dice));
    machine
}

fn another_process_brings_it_back() {
    let temp = Temp::new("another");
    let store = open(&temp);
    save(&machine::<Heap>(&store).fork(), &store, "one");
    drop(store);
    assert_eq!(child("a_process_that_brings_it_back", &temp.0, 0), Some(0));
}

#[test]
#[ignore = "the other process of a test"]
fn a_process_that_brings_it_back() {
    let Ok(dir) = std::env::var("OFFSHOOT_CHILD_DIR") else { return };
    let own = Temp::new("another-reference");
    let want = flat(&machine::<Heap>(&open(&own)).fork()).unwrap();
    let store = CloneStore::open(dir, offshoot::store::StoreOptions::default()).unwrap();
    assert_eq!(flat(&load::<Heap>(&store, "one", Reading::OnDemand)).unwrap(), want);
    #[cfg(target_os = "linux")]
    assert_eq!(flat(&load::<offshoot::backing::Mapped>(&store, "one", Reading::Now)).unwrap(), want);
}

const STEPS: u64 = 8;

/// What a history leaves saved after each of its steps.
fn worlds(store: &CloneStore, after_step: impl Fn(u64)) -> Vec<BTreeMap<String, Flat>> {
    let threads = threads(1);
    let mut dice = Dice::new(12);
    let mut machine = Machine::<Heap>::small(vec![3]);
    let mut world = BTreeMap::new();
    let mut worlds = vec![world.clone()];
    let mut last: Option<ForkPoint<Heap>> = None;
    for step in 0..STEPS {
        let text = format!("n{}", dice.below(3));
        if world.remove(&text).is_some() {
            store.delete(&name(&text)).unwrap();
        } else {
            machine.mess(&mut dice);
            let point = machine.fork();
            let since = last.as_ref().unwrap_or(&point);
            point.save_since(since, store, &name(&text), &threads, &Job::new()).unwrap();
            world.insert(text, flat(&point).unwrap());
            last = Some(point);
        }
        after_step(step);
        worlds.push(world.clone());
    }
    worlds
}

fn contents(store: &CloneStore) -> BTreeMap<String, Flat> {
    let saved = store.list_saved().unwrap();
    let one = |info: offshoot::store::SavedInfo| {
        assert_eq!(info.health, Health::Whole);
        (info.name.to_string(), flat(&load::<Heap>(store, info.name.as_str(), Reading::OnDemand)).unwrap())
    };
    saved.into_iter().map(one).collect()
}

/// A process is killed before each call of a history in turn (every call in a soak).
fn killed_at_any_call_it_is_saved_or_not() {
    let reference = Temp::new("kill-reference");
    let worlds = worlds(&open(&reference), |_| {});
    let stride = if std::env::var_os("OFFSHOOT_SOAK").is_some() { 1 } else { 17 };
    let (mut kills, mut left) = (0, 0);
    for n in (1u64..).step_by(stride) {
        let temp = Temp::new("kill");
        std::fs::create_dir_all(&temp.0).unwrap();
        let exit = child("a_history_that_is_killed", &temp.0, n);
        let done: usize = std::fs::read_to_string(temp.0.join("steps")).map_or(0, |steps| steps.len());
        let store = open(&temp);
        let found = contents(&store);
        let after = &worlds[(done + 1).min(worlds.len() - 1)];
        assert!(found == worlds[done] || found == *after, "killed at call {n}, after step {done}");
        let wrong = problems(&store);
        let harmless = |problem: &Problem| matches!(problem, Problem::Orphan { .. } | Problem::Unfinished { .. });
        assert!(wrong.iter().all(harmless), "killed at call {n}: {wrong:?}");
        left += usize::from(!wrong.is_empty());
        store.repair().unwrap();
        assert!(problems(&store).is_empty());
        assert!(contents(&store) == found, "a repair changes nothing that is saved");
        match exit {
            None => kills += 1,
            Some(0) => break,
            Some(code) => panic!("the history ended with {code}"),
        }
    }
    println!("{kills} kills, {left} of them left something to clean up");
    assert!(kills > 5 && left > 0, "{kills} kills, {left} of them left something to clean up");
}

#[test]
#[ignore = "the process that is killed"]
fn a_history_that_is_killed() {
    let Ok(dir) = std::env::var("OFFSHOOT_CHILD_DIR") else { return };
    let calls: u64 = std::env::var("OFFSHOOT_CHILD_KILL").expect("set by the parent").parse().expect("a number");
    let inner = offshoot::store::open_folder(&dir).expect("it is there");
    let store = over(Arc::new(kills::Killing { inner, fuse: Arc::new(kills::Fuse { left: calls.into() }) }));
    let steps = Path::new(&dir).join("steps");
    worlds(&store, |step| std::fs::write(&steps, "x".repeat(step as usize + 1)).expect("it can be noted"));
    std::process::exit(0);
}
