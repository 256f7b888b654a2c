//! The clone store on real files: random histories against flat disks, missing layers, space, threads.

#![cfg(unix)]

mod clones;

use clones::{PAGE, Player, Temp, name, problems, read_disk, size};
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::page::{ByteOffset, ByteSize, PageIndex};
use offshoot::store::{CloneError, CloneName, CloneStore, Health, Job, Kind, Problem, StoreOptions};
use offshoot::testing::{ByteSource, Dice};

fn open(temp: &Temp) -> CloneStore {
    CloneStore::open(temp.path(), StoreOptions::default()).expect("it opens")
}

fn put(store: &CloneStore, clone: &CloneName, page: u64, value: u8) {
    let disk = store.open_disk(clone).unwrap();
    disk.write(ByteOffset::new(page * PAGE as u64), &[value; PAGE]).unwrap();
    disk.flush().unwrap();
}

fn byte(store: &CloneStore, clone: &CloneName, page: u64) -> u8 {
    let mut found = [0];
    store.open_disk(clone).unwrap().read(ByteOffset::new(page * PAGE as u64), &mut found).unwrap();
    found[0]
}

#[test]
fn random_histories_match_flat_disks_and_survive_reopening() {
    let seeds = std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(1u64) * 3;
    for seed in 0..seeds {
        let temp = Temp::new(&format!("model-{seed}"));
        let mut dice = Dice::new(seed);
        let mut player = Player::open(temp.path());
        for step in 0..60 {
            player.step(&mut dice).unwrap_or_else(|error| panic!("seed {seed}, step {step}: {error}"));
            if step % 8 == 0 {
                player.verify();
            }
            if step % 20 == 19 {
                let world = player.world;
                drop(player.store);
                player = Player::open(temp.path());
                player.world = world;
                player.verify();
            }
        }
        // Deleted in any order, all of them: nothing is left.
        while let Some(any) = player.world.keys().nth(dice.below(player.world.len().max(1) as u64) as usize).cloned() {
            player.store.delete(&any).unwrap();
            player.world.remove(&any);
            player.verify();
        }
        drop(player);
        for suffix in ["overlay", "layer", "disk", "partial"] {
            assert_eq!(temp.files(suffix), [] as [std::path::PathBuf; 0], "seed {seed}");
        }
    }
}

/// Three layers deep, and the middle one is lost.
#[test]
fn a_clone_with_a_layer_missing_is_listed_named_and_deleted() {
    let temp = Temp::new("degraded");
    let [golden, middle, leaf, other] = ["golden", "middle", "leaf", "other"].map(name);
    let store = open(&temp);
    store.create_image(&golden, &ByteSource::new(vec![1; 8 * PAGE]), &Job::new()).unwrap();
    store.clone_disk(&golden, &middle).unwrap();
    put(&store, &middle, 1, 2);
    store.clone_disk(&middle, &leaf).unwrap();
    store.clone_disk(&golden, &other).unwrap();
    put(&store, &leaf, 2, 3);
    let lost = store.info(&middle).unwrap().layers[0];
    assert_eq!(store.info(&leaf).unwrap().layers.len(), 3);
    drop(store);
    let file = temp.path().join(format!("{lost}.overlay"));
    let kept = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();

    let store = open(&temp);
    let degraded = Health::Degraded { missing: vec![lost] };
    let health = |name| store.info(name).unwrap().health;
    assert_eq!((health(&middle), health(&leaf)), (degraded.clone(), degraded));
    assert_eq!((health(&golden), health(&other)), (Health::Whole, Health::Whole));
    for refused in
        [store.open_disk(&leaf).map(drop), store.open_image(&leaf).map(drop), store.clone_disk(&leaf, &name("x"))]
    {
        assert!(matches!(&refused, Err(CloneError::Degraded { missing, .. }) if *missing == [lost]), "{refused:?}");
    }
    let wrong = problems(&store);
    let found = wrong.iter().find_map(|problem| match problem {
        Problem::Missing { layer, needed_by } => Some((*layer, needed_by.clone())),
        _ => None,
    });
    assert_eq!(found, Some((lost, vec![leaf.clone(), middle.clone()])), "{wrong:?}");
    // What lies below the missing layer is known, and stays, though the image that it came from goes.
    store.delete(&golden).unwrap();
    store.delete(&other).unwrap();
    assert_eq!(store.repair().unwrap().removed, [] as [String; 0]);
    drop(store);
    // Brought back, it is all there.
    std::fs::write(&file, kept).unwrap();
    let store = open(&temp);
    assert_eq!([0, 1, 2].map(|page| byte(&store, &leaf, page)), [1, 2, 3]);
    drop(store);
    std::fs::remove_file(&file).unwrap();
    let store = open(&temp);
    store.delete(&leaf).unwrap();
    store.delete(&middle).unwrap();
    store.repair().unwrap();
    assert!(store.list().unwrap().is_empty() && problems(&store).is_empty());
    assert!(temp.files("layer").is_empty() && temp.files("overlay").is_empty() && temp.files("disk").is_empty());
}

#[test]
fn what_is_open_is_left_alone() {
    let temp = Temp::new("open");
    let store = open(&temp);
    let [a, b, image] = ["a", "b", "image"].map(name);
    store.create_empty(&a, size(8)).unwrap();
    let disk = store.open_disk(&a).unwrap();
    disk.write(ByteOffset::ZERO, &[7; PAGE]).unwrap();
    let is_open =
        |result: Result<(), CloneError>| assert!(matches!(result, Err(CloneError::Open { .. })), "{result:?}");
    is_open(store.open_disk(&a).map(drop));
    is_open(store.clone_disk(&a, &b));
    is_open(store.delete(&a));
    is_open(store.reset(&a));
    is_open(store.flatten(&a, &Job::new()));
    is_open(store.merge(&a, &Job::new()));
    is_open(store.grow(&a, size(9)));
    assert_eq!(store.info(&a).unwrap().health, Health::Open);
    assert!(problems(&store).is_empty());
    assert_eq!(store.repair().unwrap().removed, [] as [String; 0], "the overlay that is written is not an orphan");
    // Kept while it runs, and the disk goes on.
    store.snapshot_open(&disk, &image).unwrap();
    disk.write(ByteOffset::ZERO, &[8; PAGE]).unwrap();
    disk.flush().unwrap();
    store.clone_disk(&image, &b).unwrap();
    assert_eq!(byte(&store, &b, 0), 7);
    let refused = store.open_disk(&image).map(drop);
    assert!(matches!(refused, Err(CloneError::WrongKind { kind: Kind::Image, .. })), "{refused:?}");
    // A fork that has no name is not of the store: a repair leaves it alone while it is open, and removes it later.
    let (point, deferred) = disk.cut().unwrap().commit();
    drop(deferred);
    let child = point.spawn().unwrap();
    child.write(ByteOffset::ZERO, &[9; 512]).unwrap();
    child.flush().unwrap();
    assert_eq!(store.repair().unwrap().removed, [] as [String; 0]);
    let c = name("c");
    store.adopt(&child, &c).unwrap();
    assert!(matches!(store.adopt(&child, &name("d")), Err(CloneError::Exists { name }) if name == c));
    drop((disk, child, point));
    assert_eq!((byte(&store, &a, 0), byte(&store, &c, 0)), (8, 9));
    let elsewhere = Temp::new("elsewhere");
    let foreign = open(&elsewhere);
    let disk = store.open_disk(&a).unwrap();
    assert!(matches!(foreign.adopt(&disk, &a), Err(CloneError::OtherStore)));
}

#[test]
fn a_commit_needs_a_target_that_stood_still() {
    let temp = Temp::new("commit");
    let store = open(&temp);
    let [base, a, b] = ["base", "a", "b"].map(name);
    store.create_empty(&base, size(8)).unwrap();
    put(&store, &base, 0, 1);
    store.clone_disk(&base, &a).unwrap();
    store.clone_disk(&base, &b).unwrap();
    put(&store, &a, 1, 2);
    put(&store, &b, 1, 3);
    let before = store.info(&base).unwrap().generation;
    store.commit(&a, &base).unwrap();
    assert_ne!(store.info(&base).unwrap().generation, before);
    assert_eq!((byte(&store, &base, 1), byte(&store, &a, 1), byte(&store, &b, 1)), (2, 2, 3));
    // b comes from what base was.
    assert!(matches!(store.commit(&b, &base), Err(CloneError::Diverged { .. })));
    store.rebase(&b, &base, &Job::new()).unwrap();
    store.commit(&b, &base).unwrap();
    assert_eq!((byte(&store, &base, 1), byte(&store, &a, 1)), (3, 2));
    store.reset(&b).unwrap();
    assert_eq!(byte(&store, &b, 1), 2);
}

#[test]
fn space_is_told_and_given_back() {
    let temp = Temp::new("space");
    let store = open(&temp);
    let [golden, a, b] = ["golden", "a", "b"].map(name);
    store.create_image(&golden, &ByteSource::new(vec![1; 256 * PAGE]), &Job::new()).unwrap();
    store.clone_disk(&golden, &a).unwrap();
    store.clone_disk(&golden, &b).unwrap();
    for round in 0..3 {
        put(&store, &a, 7, round);
        store.snapshot(&a, &name("moment")).unwrap();
        store.delete(&name("moment")).unwrap();
    }
    let image = 256 * PAGE as u64;
    let space = store.space().unwrap();
    assert_eq!((space[&b].exclusive, space[&golden].exclusive), (ByteSize::ZERO, ByteSize::ZERO));
    assert!(space[&b].shared.get() >= image && space[&b].shared == space[&golden].shared);
    assert_eq!(space[&a].reclaimable, size(2), "two of three versions of a page are hidden");
    let layers = store.info(&a).unwrap().layers.len();
    store.merge(&a, &Job::new()).unwrap();
    let merged = store.space().unwrap()[&a];
    assert_eq!((layers, store.info(&a).unwrap().layers.len()), (4, 2));
    assert!(merged.reclaimable == ByteSize::ZERO && merged.exclusive < space[&a].exclusive);
    assert_eq!(byte(&store, &a, 7), 2);
    store.delete(&golden).unwrap();
    store.delete(&b).unwrap();
    let alone = store.space().unwrap()[&a];
    assert!(alone.shared == ByteSize::ZERO && alone.exclusive.get() >= image);
    store.delete(&a).unwrap();
    assert!(store.space().unwrap().is_empty() && temp.files("layer").is_empty());
}

#[test]
fn rot_is_found_and_named() {
    let temp = Temp::new("rot");
    let store = open(&temp);
    let golden = name("golden");
    let bytes = Dice::new(3).bytes(40 * PAGE as u64);
    store.create_image(&golden, &ByteSource::new(bytes), &Job::new()).unwrap();
    let layer = store.info(&golden).unwrap().layers[0];
    assert!(problems(&store).is_empty());
    let file = temp.path().join(format!("{layer}.layer"));
    let mut content = std::fs::read(&file).unwrap();
    content[PAGE + 5 * PAGE + 100] ^= 4;
    std::fs::write(&file, content).unwrap();
    let wrong = problems(&store);
    assert!(
        matches!(&wrong[..], [Problem::Pages { layer: found, damaged }]
            if *found == layer && damaged.pages().collect::<Vec<_>>() == [PageIndex::new(5)]),
        "{wrong:?}"
    );
}

#[test]
fn a_directory_without_its_catalogue_is_not_made_a_new_store() {
    let temp = Temp::new("no-catalogue");
    let store = open(&temp);
    store.create_image(&name("golden"), &ByteSource::new(vec![1; PAGE]), &Job::new()).unwrap();
    drop(store);
    std::fs::remove_file(temp.path().join("catalogue.redb")).unwrap();
    let error = CloneStore::open(temp.path(), StoreOptions::default()).expect_err("there are disks");
    assert!(matches!(error, CloneError::NoCatalogue { .. }), "{error}");
    std::fs::write(temp.path().join("catalogue.redb"), [7; 8192]).unwrap();
    let error = CloneStore::open(temp.path(), StoreOptions::default()).expect_err("that is none");
    assert!(matches!(error, CloneError::Catalogue { .. }), "{error}");
}

/// The database asserts that its file is as long as it says: damage that passes its checksums is an error here, and the file is let go of.
#[test]
fn a_catalogue_that_its_database_gives_up_on_is_an_error() {
    let temp = Temp::new("gives-up");
    let store = open(&temp);
    store.create_image(&name("golden"), &ByteSource::new(vec![1; PAGE]), &Job::new()).unwrap();
    drop(store);
    let file = temp.path().join("catalogue.redb");
    let whole = std::fs::read(&file).unwrap();
    let mut wrong = whole.clone();
    wrong[0x17..0x1d].copy_from_slice(&[0, 0xa3, 0, 0, 0, 0]);
    std::fs::write(&file, wrong).unwrap();
    for _ in 0..2 {
        let error = CloneStore::open(temp.path(), StoreOptions::default()).expect_err("it says what cannot be");
        assert!(matches!(error, CloneError::Catalogue { .. }), "{error}");
    }
    std::fs::write(&file, whole).unwrap();
    assert_eq!(open(&temp).list().unwrap().len(), 1);
}

#[test]
fn many_threads_on_one_store() {
    let temp = Temp::new("threads");
    let store = open(&temp);
    let golden = name("golden");
    store.create_image(&golden, &ByteSource::new(vec![1; 64 * PAGE]), &Job::new()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let store = store.clone();
            scope.spawn(move || {
                for round in 0..6u8 {
                    let mine = name(&format!("clone-{thread}-{round}"));
                    store.clone_disk(&name("golden"), &mine).unwrap();
                    put(&store, &mine, u64::from(round), thread + 2);
                    match round % 3 {
                        0 => store.flatten(&mine, &Job::new()).unwrap(),
                        1 => store.merge(&mine, &Job::new()).unwrap(),
                        _ => drop(store.repair().unwrap()),
                    }
                    assert_eq!(byte(&store, &mine, u64::from(round)), thread + 2);
                    if round % 2 == 0 {
                        store.delete(&mine).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(store.list().unwrap().len(), 1 + 4 * 3);
    assert!(problems(&store).is_empty());
    let disk = store.open_disk(&name("clone-3-5")).unwrap();
    assert_eq!(read_disk(&disk)[5 * PAGE], 5);
}
