//! One call goes wrong, for every n: `EIO`, `ENOSPC`, a write cut short; on a recording folder and on real files.
//!
//! Afterwards the disk holds what it held, or for a write that was cut short in place its old or new bytes; nothing that was acknowledged is
//! lost by any power cut; after a failed sync nothing is acknowledged until the disk is opened again.

#![cfg(unix)]

mod durable;

use std::path::PathBuf;

use durable::{Depth, PAGE, Player, geometry, pages, read_all};
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::page::ByteOffset;
use offshoot::store::{DiskDir, Job};
use offshoot::testing::Dice;
use offshoot::testing::crash::{Fault, Tearing};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{SpaceError, StoreError, Tree};

/// A history that goes on whatever fails; says how many calls it made.
fn play(player: &mut Player, n: u64, how: Fault) -> (u64, u64) {
    let mut dice = Dice::new(7);
    player.recorder.fail_nth(n, how);
    let mut failures = 0;
    let mut failed = |ok: bool| failures += u64::from(!ok);
    failed(player.write(0, 3, &dice.bytes(PAGE)));
    failed(player.flush(0).is_ok());
    failed(player.write(0, 5, &dice.bytes(4 * PAGE)));
    failed(player.zero(0, pages(1, 3)));
    failed(player.flush(0).is_ok());
    failed(player.write(0, 9, &dice.bytes(512)));
    failed(player.cut(0).is_ok());
    if player.images() > 0 {
        let clone = player.spawn(0).expect("a clone needs no call");
        failed(player.write(clone, 80, &dice.bytes(1024)));
        failed(player.flush(clone).is_ok());
    }
    failed(player.write(0, 81, &dice.bytes(1024)));
    failed(player.reset(0));
    failed(player.flush(0).is_ok());
    failed(player.write(0, 20, &dice.bytes(PAGE)));
    failed(player.cut(0).is_ok());
    failed(player.write(0, 21, &dice.bytes(PAGE)));
    failed(player.flush(0).is_ok());
    let calls = player.recorder.calls();
    player.recorder.fail_nth(0, how);
    (calls, failures)
}

#[test]
fn every_call_fails_once() {
    for how in [Fault::Io, Fault::NoSpace, Fault::Short] {
        let mut failures = 0;
        for n in 1.. {
            let mut player = Player::new(40, Some(9 * PAGE + 100));
            let (calls, failed) = play(&mut player, n, how);
            failures += failed;
            let log = player.recorder.log();
            // Every position comes up for some n.
            for position in (n as usize % 7..=log.len()).step_by(7) {
                for state in log.states_at(position, Tearing::Sectors, n, 3) {
                    player.check(&state, position, Depth::Open).unwrap_or_else(|wrong| {
                        panic!("{how:?} at call {n}, cut after {position}: {wrong}");
                    });
                }
            }
            player.kill();
            for disk in 0..player.disks() {
                // Whatever failed before: opened again, everything works.
                assert!(player.write(disk, 17, &[9; 1024]), "{how:?} at call {n}");
                player.flush(disk).unwrap();
            }
            let log = player.recorder.log();
            for state in log.states_at(log.len(), Tearing::Sectors, n, 4) {
                player.check(&state, log.len(), Depth::GoOn).unwrap();
            }
            if calls < n {
                assert_eq!(failed, 0);
                break;
            }
        }
        assert!(failures > 30, "{how:?}: only {failures} steps failed");
    }
}

/// Syncs fail at each place of a flush; nothing is acknowledged after that, though later syncs succeed.
#[test]
fn after_a_failed_sync_nothing_is_claimed_until_the_disk_is_opened_again() {
    let mut refused = 0;
    for n in 1..12 {
        let mut player = Player::new(40, None);
        player.write(0, 3, &[1; 512]);
        player.recorder.fail_nth(n, Fault::Io);
        match player.flush(0) {
            Err(SpaceError::Store(StoreError::Io { call: "sync", .. })) => {}
            _ => continue,
        }
        refused += 1;
        for _ in 0..3 {
            assert!(matches!(player.flush(0), Err(SpaceError::Store(StoreError::SyncFailed { .. }))));
            assert!(matches!(player.cut(0), Err(SpaceError::Store(StoreError::SyncFailed { .. }))));
        }
        player.kill();
        player.write(0, 3, &[2; 512]);
        player.flush(0).unwrap();
    }
    // Data, map, the directory, the head's two copies.
    assert!(refused >= 4, "{refused} syncs failed");
}

struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for the test");
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// The same calls on real files, as far as they get; the content at the end, opened again, if the first flush succeeded.
fn on_files(path: &std::path::Path, n: u64, how: Refusal) -> (u64, Result<(), SpaceError>) {
    let before = std::fs::read_dir(path).expect("the test's directory").count();
    let dir = DiskDir::open(path, &Tree::default()).expect("nothing fails yet");
    let plan = fail_nth_call(n, how);
    let mut id = None;
    let mut acknowledged = None;
    let mut run = || -> Result<(), SpaceError> {
        let disk = dir.create(geometry(40), None)?;
        id = Some(disk.id());
        disk.write(ByteOffset::new(700), &[1; 5000])?;
        disk.flush()?;
        acknowledged = Some(read_all(&disk)?);
        disk.zero(pages(0, 1))?;
        let (image, deferred) = disk.cut()?.commit();
        acknowledged = Some(read_all(&disk)?);
        drop(deferred);
        let clone = image.spawn()?;
        clone.write(ByteOffset::new(9000), &[2; 5000])?;
        clone.flush()?;
        image.seal(&Job::new())?;
        disk.write(ByteOffset::new(9000), &[3; 5000])?;
        disk.flush()?;
        acknowledged = Some(read_all(&disk)?);
        Ok(())
    };
    let result = run();
    let calls = plan.calls_seen();
    drop(plan);
    drop(dir);
    if let (Some(id), Some(content)) = (id, acknowledged) {
        let dir = DiskDir::open(path, &Tree::default()).unwrap();
        let again = dir.open_disk(id, None).unwrap_or_else(|error| panic!("{how:?} at call {n}: {error}"));
        let found = read_all(&again).unwrap();
        // What was acknowledged, or the step after it.
        let later = |at: usize| (9000..14000).contains(&at) || at < 4096;
        assert!((0..found.len()).all(|at| found[at] == content[at] || later(at)), "{how:?} at call {n}");
        again.validate().unwrap();
    }
    assert!(std::fs::read_dir(path).unwrap().all(|file| !file.unwrap().path().ends_with("partial")));
    assert!(before < 10_000);
    (calls, result)
}

#[test]
fn every_system_call_fails_on_real_files() {
    for how in [Refusal::Io, Refusal::NoSpace, Refusal::OutOfDescriptors] {
        let temp = Temp::new(&format!("faults-{how:?}"));
        let mut failures = 0;
        for n in 1.. {
            let (calls, result) = on_files(&temp.0, n, how);
            failures += u64::from(result.is_err());
            if calls < n {
                result.unwrap();
                break;
            }
        }
        assert!(failures > 30, "{how:?}: {failures} runs failed");
    }
}

#[test]
fn every_system_call_is_interrupted_on_real_files() {
    let temp = Temp::new("interrupted");
    for n in 1.. {
        let (calls, result) = on_files(&temp.0, n, Refusal::Interrupted);
        result.expect("an interrupted call is made again");
        if calls < n {
            assert!(n > 30);
            break;
        }
    }
}
