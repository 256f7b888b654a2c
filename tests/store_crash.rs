//! Power cuts: every state that one can leave opens to what was acknowledged, or later.
//!
//! The control runs take syncs out of the record, or move them, and must be found out: so the test can tell.

#![cfg(unix)]

mod durable;

use durable::{PAGE, Player, pages, wanted_states};
use offshoot::testing::Dice;
use offshoot::testing::crash::{SyncOf, Tearing};

/// Everything once: first writes, overwrites, discards, rewrites of what was discarded, resets, forks, clones, a kill.
fn scripted(base: Option<u64>) -> Player {
    let mut dice = Dice::new(1);
    let mut player = Player::new(40, base);
    player.write(0, 0, &dice.bytes(PAGE));
    player.write(0, 11, &dice.bytes(512));
    player.flush(0).unwrap();
    player.write(0, 8, &dice.bytes(3 * PAGE));
    player.zero(0, pages(1, 2));
    player.flush(0).unwrap();
    player.write(0, 9, &dice.bytes(1024));
    player.zero(0, pages(1, 1));
    player.write(0, 10, &dice.bytes(512));
    player.flush(0).unwrap();
    player.cut(0).unwrap();
    let clone = player.spawn(0).unwrap();
    player.write(clone, 8, &dice.bytes(2 * PAGE));
    player.write(0, 12, &dice.bytes(1536));
    player.flush(clone).unwrap();
    player.flush(0).unwrap();
    player.reset(0);
    player.flush(0).unwrap();
    player.write(0, 100, &dice.bytes(512));
    player.cut(0).unwrap();
    player.cut(0).unwrap();
    player.write(0, 101, &dice.bytes(5 * PAGE));
    player.flush(0).unwrap();
    player.kill();
    player.write(0, 3, &dice.bytes(PAGE));
    player.write(1, 3, &dice.bytes(PAGE));
    player.flush(1).unwrap();
    player.flush(0).unwrap();
    player
}

#[test]
fn every_cut_in_a_scripted_history_leaves_what_was_acknowledged() {
    for base in [None, Some(9 * PAGE + 100)] {
        let player = scripted(base);
        for tearing in [Tearing::Sectors, Tearing::Pages] {
            let states = player.check_all(&player.recorder.log(), tearing, 1, 8).unwrap();
            assert!(states > 300, "{states} states");
        }
    }
}

#[test]
fn every_cut_in_random_histories_leaves_what_was_acknowledged() {
    let (mut states, mut seed) = (0, 1);
    while states < wanted_states() {
        let player = Player::random(seed, 40);
        let tearing = if seed % 2 == 0 { Tearing::Sectors } else { Tearing::Pages };
        let found = player.check_all(&player.recorder.log(), tearing, seed, 6);
        states += found.unwrap_or_else(|wrong| panic!("history {seed}: {wrong}"));
        seed += 1;
    }
    println!("{states} states of {} histories", seed - 1);
}

/// Where few things are in doubt, all their combinations are tried.
#[test]
fn every_combination_of_a_short_history() {
    let mut player = Player::new(16, None);
    player.write(0, 8, &[1; 512]);
    player.flush(0).unwrap();
    player.write(0, 8, &[2; 512]);
    player.zero(0, pages(1, 1));
    player.flush(0).unwrap();
    player.write(0, 9, &[3; 512]);
    player.flush(0).unwrap();
    for (tearing, most, least) in [(Tearing::Pages, 1 << 12, 100), (Tearing::Sectors, 1 << 9, 1000)] {
        let states = player.check_all(&player.recorder.log(), tearing, 1, most).unwrap();
        assert!(states > least, "{states} states");
    }
}

/// Whether taking these syncs out is found in some history.
fn must_be_found(name: &str, which: impl Fn(&SyncOf) -> bool + Copy) {
    must_be_found_in(name, |_, sync| which(sync));
}

fn must_be_found_in(name: &str, which: impl Fn(&Player, &SyncOf) -> bool + Copy) {
    for seed in 0..40 {
        let player = if seed == 0 { scripted(None) } else { Player::random(seed, 40) };
        let mut taken = 0;
        let log = player.recorder.log().without_syncs(|sync| {
            let take = which(&player, sync);
            taken += u32::from(take);
            take
        });
        if taken > 0 && player.check_all(&log, Tearing::Sectors, seed, 40).is_err() {
            return;
        }
    }
    panic!("{name} were taken out of the record, and nobody noticed");
}

fn of_overlay(sync: &SyncOf) -> bool {
    sync.file.as_ref().is_some_and(|name| name.ends_with(".overlay"))
}

/// Data of a disk this small starts at 1 MiB.
fn wrote_data(sync: &SyncOf) -> bool {
    sync.offsets.iter().any(|at| *at >= 1 << 20)
}

fn wrote_map(sync: &SyncOf) -> bool {
    sync.offsets.iter().any(|at| (8192..1 << 20).contains(at))
}

#[test]
fn without_any_sync_it_fails() {
    must_be_found("all syncs", |_| true);
}

#[test]
fn without_the_sync_between_data_and_map_it_fails() {
    must_be_found("syncs of data", |sync| of_overlay(sync) && wrote_data(sync) && !wrote_map(sync));
}

#[test]
fn without_the_sync_of_the_map_it_fails() {
    must_be_found("syncs of the map", |sync| of_overlay(sync) && wrote_map(sync));
}

#[test]
fn without_the_sync_of_the_head_it_fails() {
    must_be_found("syncs of heads", |sync| sync.file.as_ref().is_some_and(|name| name.ends_with(".disk")));
}

#[test]
fn without_the_sync_of_names_it_fails() {
    must_be_found("syncs of names", |sync| sync.file.is_none());
}

/// An overlay's records: written when it is made, and when it is frozen.
#[test]
fn without_the_sync_of_a_freeze_it_fails() {
    must_be_found("syncs of records", |sync| {
        of_overlay(sync) && !wrote_data(sync) && !wrote_map(sync) && !sync.offsets.is_empty()
    });
}

/// What a killed process left in the system's memory is built upon: it must be durable first.
#[test]
fn without_the_sync_of_what_a_killed_process_left_it_fails() {
    must_be_found_in("syncs of files opened again", |player, sync| {
        player.reopened.iter().any(|range| range.contains(&sync.position))
    });
}

#[test]
fn punching_before_the_map_says_so_fails() {
    for seed in 1..200 {
        let player = Player::random(seed, 40);
        let (log, moved) = player.recorder.log().punching_early();
        if moved > 0 && player.check_all(&log, Tearing::Sectors, seed, 40).is_err() {
            return;
        }
    }
    panic!("punches were done before the map was durable, and nobody noticed");
}
