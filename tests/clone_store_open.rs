//! Layers merged under an open clone: what its guest wrote wins, forks keep what they had, and nothing is lost by a call that fails or is cancelled.

#![cfg(unix)]

mod clones;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use clones::{PAGE, Temp, name, problems, read_disk, size};
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, PageCount, PageIndex, PageRange};
use offshoot::store::{
    Cancel, CloneError, CloneName, CloneStore, DiskDir, Durable, DurableImage, Health, Job, Problem, Progress,
    StoreOptions,
};
use offshoot::testing::crash::{Fault, Recorder, Tearing};
use offshoot::testing::{ByteSource, Dice};
use offshoot::{SpaceError, StoreError, Tree};
use proptest::prelude::*;

const PAGES: u64 = 192;

fn open(temp: &Temp) -> CloneStore {
    CloneStore::open(temp.path(), StoreOptions::default()).expect("it opens")
}

fn cut(disk: &Durable) -> DurableImage {
    let (image, deferred) = disk.cut().expect("it can be cut").commit();
    drop(deferred);
    image
}

fn read_image(image: &DurableImage) -> Vec<u8> {
    let mut bytes = vec![0xa5; image.len().get() as usize];
    image.read(ByteOffset::ZERO, &mut bytes).expect("it can be read");
    bytes
}

fn at(page: u64) -> ByteOffset {
    ByteOffset::new(page * PAGE as u64)
}

/// A store with an image and a clone of it that has some layers of its own, open.
fn deep(store: &CloneStore) -> (CloneName, Durable) {
    let (golden, web) = (name("golden"), name("web"));
    let bytes = Dice::new(9).bytes(PAGES * PAGE as u64);
    store.create_image(&golden, &ByteSource::new(bytes), &Job::new()).unwrap();
    store.clone_disk(&golden, &web).unwrap();
    let disk = store.open_disk(&web).unwrap();
    for round in 0..5u64 {
        disk.write(at(round * 7), &vec![round as u8 + 1; 9 * PAGE]).unwrap();
        disk.zero(PageRange::new(PageIndex::new(round * 11 + 60), PageCount::new(5)).unwrap()).unwrap();
        cut(&disk);
    }
    disk.write(at(3), &[0x77; 700]).unwrap();
    (web, disk)
}

#[test]
fn a_flattened_clone_depends_on_nothing_else() {
    let temp = Temp::new("open-flatten");
    let store = open(&temp);
    let (web, disk) = deep(&store);
    let before = read_disk(&disk);
    let dirty = disk.dirty().unwrap();
    store.flatten_open(&disk, &Job::new()).unwrap();
    assert!(read_disk(&disk) == before);
    disk.validate().unwrap();
    assert_eq!(disk.dirty().unwrap(), dirty, "what was written since the last cut is what it was");
    assert_eq!(disk.usage().unwrap().layers, 1);
    assert!(problems(&store).is_empty(), "{:?}", problems(&store));
    store.delete(&name("golden")).unwrap();
    assert_eq!(temp.files("layer").len(), 1, "the old layers went with their last user");
    assert_eq!(temp.files("overlay").len(), 1);
    // A reset goes where it did.
    disk.write(at(3), &[0x78; 700]).unwrap();
    disk.reset().unwrap();
    let origin = read_disk(&disk);
    assert!(origin[..3 * PAGE] == before[..3 * PAGE] && origin[3 * PAGE] != 0x78);
    disk.write(at(3), &before[3 * PAGE..4 * PAGE]).unwrap();
    disk.flush().unwrap();
    drop((disk, store));
    let store = open(&temp);
    assert!(read_disk(&store.open_disk(&web).unwrap()) == before);
    store.reset(&web).unwrap();
    assert!(read_disk(&store.open_disk(&web).unwrap()) == origin);
    assert!(problems(&store).is_empty());
}

#[test]
fn merged_rebased_and_committed_while_it_is_open() {
    let temp = Temp::new("open-merge");
    let store = open(&temp);
    let (web, disk) = deep(&store);
    let (golden, other) = (name("golden"), name("other"));
    let before = read_disk(&disk);
    assert_eq!(store.info(&web).unwrap().health, Health::Open);
    store.merge_open(&disk, &Job::new()).unwrap();
    assert!(read_disk(&disk) == before);
    assert_eq!(disk.usage().unwrap().layers, 2, "its own and the image's; its live overlay is no layer yet");
    store.merge_open(&disk, &Job::new()).unwrap();
    store.create_image(&other, &ByteSource::new(before.clone()), &Job::new()).unwrap();
    store.rebase_open(&disk, &other, &Job::new()).unwrap();
    assert!(read_disk(&disk) == before);
    disk.validate().unwrap();
    // All but what is in the live overlay is the other image's.
    let space = store.space().unwrap();
    assert!(space[&web].exclusive.get() < 64 << 10, "{space:?}");
    let copy = name("copy");
    store.clone_disk(&other, &copy).unwrap();
    disk.write(at(5), &[0x55; PAGE]).unwrap();
    store.commit_open(&disk, &copy).unwrap();
    let expected = read_disk(&disk);
    assert!(read_image(&store.open_image(&copy).unwrap()) == expected);
    let refused = store.commit_open(&disk, &golden);
    assert!(matches!(refused, Err(CloneError::WrongKind { .. })), "{refused:?}");
    let short = name("short");
    store.create_empty(&short, size(PAGES + 1)).unwrap();
    let refused = store.rebase_open(&disk, &short, &Job::new());
    assert!(matches!(refused, Err(CloneError::Length { .. })), "{refused:?}");
    let refused = store.rebase_open(&disk, &web, &Job::new());
    assert!(matches!(refused, Err(CloneError::Open { .. })), "{refused:?}");
    let child = cut(&disk).spawn().unwrap();
    assert!(matches!(store.flatten_open(&child, &Job::new()), Err(CloneError::Nameless)));
    drop((disk, child));
    assert!(read_image(&store.open_image(&web).unwrap()) == expected);
    store.reset(&web).unwrap();
    assert!(read_image(&store.open_image(&web).unwrap()) == before);
    store.repair().unwrap();
    assert!(problems(&store).is_empty());
}

/// Fork points and clones of before keep the old layers, until they go.
#[test]
fn forks_keep_the_layers_that_they_lie_on() {
    let temp = Temp::new("open-forks");
    let store = open(&temp);
    let (_, disk) = deep(&store);
    let point = cut(&disk);
    let held = read_image(&point);
    let clone = point.spawn().unwrap();
    clone.write(at(1), &[9; 512]).unwrap();
    clone.flush().unwrap();
    let cloned = read_disk(&clone);
    disk.write(at(2), &[8; 512]).unwrap();
    store.flatten_open(&disk, &Job::new()).unwrap();
    store.delete(&name("golden")).unwrap();
    assert!(disk.origin().same(&point), "it is of the same cut");
    assert!(read_image(&point) == held && read_disk(&clone) == cloned);
    let files = temp.files("overlay").len();
    assert!(files > 5, "{files}");
    store.repair().unwrap();
    assert_eq!(temp.files("overlay").len(), files, "what is read is not removed");
    let kept = name("kept");
    store.adopt(&clone, &kept).unwrap();
    drop((point, clone));
    store.repair().unwrap();
    assert!(read_disk(&store.open_disk(&kept).unwrap()) == cloned);
    store.delete(&kept).unwrap();
    store.repair().unwrap();
    assert_eq!((temp.files("overlay").len(), temp.files("layer").len()), (1, 1));
    assert!(problems(&store).is_empty());
}

#[test]
fn what_is_cancelled_has_changed_nothing() {
    let temp = Temp::new("open-cancel");
    let store = open(&temp);
    let (web, disk) = deep(&store);
    let before = read_disk(&disk);
    let files = || {
        let mut names: Vec<_> =
            ["layer", "overlay", "disk", "partial"].iter().flat_map(|suffix| temp.files(suffix)).collect();
        names.sort();
        names
    };
    disk.flush().unwrap();
    let there = files();
    let other = name("other");
    store.create_image(&other, &ByteSource::new(vec![1; 100 * PAGE]), &Job::new()).unwrap();
    let image = store.open_image(&other).unwrap();
    let plenty = ByteSource::new(vec![3; 200 * PAGE]);
    let there_with_it: Vec<_> = files();
    assert!(there.len() < there_with_it.len());
    type Call<'a> = Box<dyn Fn(&Job<'_>) -> Result<(), CloneError> + 'a>;
    let calls: [(&str, Call<'_>); 6] = [
        ("flatten", Box::new(|job| store.flatten_open(&disk, job))),
        ("merge", Box::new(|job| store.merge_open(&disk, job))),
        ("rebase", Box::new(|job| store.rebase_open(&disk, &other, job))),
        ("create_image", Box::new(|job| store.create_image(&name("new"), &plenty, job))),
        ("check", Box::new(|job| store.check(clones::threads(), job).map(drop))),
        ("verify", Box::new(|job| Ok(image.verify(clones::threads(), job).map(drop)?))),
    ];
    for (what, call) in &calls {
        let (cancel, seen) = (Cancel::new(), Mutex::new(Vec::<Progress>::new()));
        let report = |progress: Progress| {
            seen.lock().unwrap().push(progress);
            if progress.done > PageCount::ZERO {
                cancel.cancel();
            }
        };
        let stopped = call(&Job::new().report(&report).cancel(&cancel));
        assert!(
            matches!(stopped, Err(CloneError::Space(SpaceError::Store(StoreError::Cancelled)))),
            "{what}: {stopped:?}"
        );
        let seen = seen.into_inner().unwrap();
        assert!(seen.iter().any(|step| step.done > PageCount::ZERO && step.done <= step.total), "{what}: {seen:?}");
        assert_eq!(files(), there_with_it, "{what}");
        assert!(read_disk(&disk) == before);
    }
    assert!(problems(&store).is_empty());
    // Not cancelled, each is told of to its end.
    let last = Mutex::new(None);
    let report = |progress: Progress| *last.lock().unwrap() = Some(progress);
    store.flatten_open(&disk, &Job::new().report(&report)).unwrap();
    let last = last.into_inner().unwrap().expect("it was told of");
    assert_eq!(last.done, last.total);
    drop(calls);
    drop(disk);
    assert!(read_disk(&store.open_disk(&web).unwrap()) == before);
}

/// One at a time; and a report may use the disk and the store, for nothing is held while it is told.
#[test]
fn nothing_is_held_while_pages_are_copied() {
    let temp = Temp::new("open-unlocked");
    let store = open(&temp);
    let (web, disk) = deep(&store);
    let told = AtomicU64::new(0);
    let report = |_| {
        let n = told.fetch_add(1, Ordering::Relaxed);
        if n > 2 {
            return;
        }
        let again = store.merge_open(&disk, &Job::new());
        assert!(matches!(again, Err(CloneError::Space(SpaceError::Store(StoreError::Restacking)))), "{again:?}");
        disk.write(at(n), &[n as u8; PAGE]).unwrap();
        disk.zero(PageRange::one(PageIndex::new(n + 20))).unwrap();
        disk.flush().unwrap();
        let moment = name(&format!("moment-{n}"));
        store.snapshot_open(&disk, &moment).unwrap();
        store.clone_disk(&moment, &name(&format!("of-{n}"))).unwrap();
        assert_eq!(store.info(&web).unwrap().health, Health::Open);
        assert!(problems(&store).is_empty(), "what is being made is no orphan: {:?}", problems(&store));
        assert_eq!(store.repair().unwrap().removed, [] as [String; 0]);
    };
    store.flatten_open(&disk, &Job::new().report(&report)).unwrap();
    assert!(told.into_inner() > 2);
    let now = read_disk(&disk);
    assert_eq!((now[0], now[PAGE], now[2 * PAGE], now[21 * PAGE]), (0, 1, 2, 0));
    // A check reads pages while others work.
    let told = AtomicU64::new(0);
    let report = |_| {
        if told.fetch_add(1, Ordering::Relaxed) == 0 {
            store.create_empty(&name("meanwhile"), size(4)).unwrap();
            store.delete(&name("of-0")).unwrap();
            store.flatten(&name("of-1"), &Job::new()).unwrap();
        }
    };
    let found = store.check(clones::threads(), &Job::new().report(&report)).unwrap();
    assert!(found.is_empty() && told.into_inner() > 0, "{found:?}");
    drop(disk);
    assert!(read_disk(&store.open_disk(&web).unwrap()) == now);
}

/// A plain directory: what a merge leaves is removed by a call that refuses to guess.
#[test]
fn a_plain_directory_is_cleaned() {
    let temp = Temp::new("clean");
    std::fs::create_dir_all(temp.path()).unwrap();
    let dir = DiskDir::open(temp.path(), &Tree::default()).unwrap();
    let geometry = offshoot::page::Geometry::new(size(64), offshoot::page::PageSize::KIB_4).unwrap();
    let disk = dir.create(geometry, None).unwrap();
    for round in 0..4 {
        disk.write(at(round), &[round as u8 + 1; 3 * PAGE]).unwrap();
        cut(&disk);
    }
    let point = cut(&disk);
    disk.write(at(9), &[9; 512]).unwrap();
    disk.flush().unwrap();
    disk.flatten(&Job::new()).unwrap();
    let expected = read_disk(&disk);
    let refused = dir.clean();
    assert!(matches!(refused, Err(SpaceError::Store(StoreError::InUse { .. }))), "{refused:?}");
    let id = disk.id();
    drop(disk);
    std::fs::write(temp.path().join("notes.txt"), "not ours").unwrap();
    assert_eq!(dir.clean().unwrap(), [] as [String; 0], "an image that is held keeps its layers");
    drop(point);
    assert_eq!(dir.clean().unwrap().len(), 4, "the overlays that were copied");
    assert_eq!(dir.clean().unwrap(), [] as [String; 0]);
    assert!(read_disk(&dir.open_disk(id, None).unwrap()) == expected);
    assert!(temp.path().join("notes.txt").exists());
    // Where a layer is gone, nobody knows what lay below: nothing is removed.
    let layer = temp.files("layer").pop().unwrap();
    let stray = temp.path().join("3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d03.layer");
    std::fs::rename(&layer, &stray).unwrap();
    let refused = dir.clean();
    assert!(matches!(refused, Err(SpaceError::Store(StoreError::Missing { .. }))), "{refused:?}");
    assert!(stray.exists());
    std::fs::rename(&stray, &layer).unwrap();
    assert!(read_disk(&dir.open_disk(id, None).unwrap()) == expected);
    let other = Temp::new("clean-store");
    drop(open(&other));
    let refused = DiskDir::open(other.path(), &Tree::default()).unwrap().clean();
    assert!(matches!(refused, Err(SpaceError::Store(StoreError::Chain { .. }))), "{refused:?}");
}

/// What a merge of an open disk over a base image leaves is over the base still.
#[test]
fn a_disk_over_a_base_is_merged_down_to_it() {
    let recorder = Recorder::new();
    let dir = || DiskDir::over(recorder.folder(), &Tree::default());
    let base = || Some(std::sync::Arc::new(ByteSource::new(vec![5; 20 * PAGE + 100])) as std::sync::Arc<dyn Source>);
    let geometry = offshoot::page::Geometry::new(size(64), offshoot::page::PageSize::KIB_4).unwrap();
    let disk = dir().create(geometry, base()).unwrap();
    let bottom = cut(&disk);
    for round in 0..4 {
        disk.write(at(round), &[round as u8 + 1; PAGE]).unwrap();
        disk.zero(PageRange::one(PageIndex::new(round + 10))).unwrap();
        cut(&disk);
    }
    disk.zero(PageRange::one(PageIndex::new(0))).unwrap();
    disk.write(at(12), &[7; 512]).unwrap();
    let expected = read_disk(&disk);
    disk.merge_down_to(&bottom, &Job::new()).unwrap();
    disk.validate().unwrap();
    assert!(read_disk(&disk) == expected);
    assert_eq!(disk.usage().unwrap().layers, 2);
    disk.flush().unwrap();
    let id = disk.id();
    drop((disk, bottom));
    assert!(read_disk(&dir().open_disk(id, base()).unwrap()) == expected);
}

/// Written, snapshotted, merged and flattened for ever: the directory holds what its clones do, and no more.
#[cfg(target_os = "linux")]
#[test]
fn a_store_takes_what_its_clones_hold() {
    use std::os::unix::fs::MetadataExt;
    let temp = Temp::new("open-space");
    let store = open(&temp);
    let (_, disk) = deep(&store);
    let mut dice = Dice::new(6);
    for round in 0..24u64 {
        for _ in 0..8 {
            disk.write(at(dice.below(PAGES - 4)), &dice.bytes(4 * PAGE as u64)).unwrap();
        }
        disk.zero(PageRange::new(PageIndex::new(dice.below(100)), PageCount::new(60)).unwrap()).unwrap();
        let moment = name(&format!("moment-{round}"));
        store.snapshot_open(&disk, &moment).unwrap();
        if round % 3 == 2 {
            (round - 2..=round).for_each(|old| store.delete(&name(&format!("moment-{old}"))).unwrap());
            if round.is_multiple_of(2) {
                store.merge_open(&disk, &Job::new())
            } else {
                store.flatten_open(&disk, &Job::new())
            }
            .unwrap();
            disk.flush().unwrap();
            let held: u64 = ["layer", "overlay"]
                .iter()
                .flat_map(|suffix| temp.files(suffix))
                .map(|file| std::fs::metadata(file).unwrap().blocks() * 512)
                .sum();
            // The image, what the clone has over it (its own, at most its whole length), and for each file its tables and the file system's.
            let files = (temp.files("layer").len() + temp.files("overlay").len()) as u64;
            let most = 2 * PAGES * PAGE as u64 + files * (64 << 10);
            assert!(held <= most && files <= 3, "round {round}: {held} bytes in {files} files, {most} allowed");
        }
    }
    assert!(problems(&store).is_empty());
}

/// What the proptest machine does between two looks at the disk.
#[derive(Clone, Debug)]
enum Step {
    Flatten,
    Merge,
    Rebase,
    Fork,
    Seal,
    Cancelled(u64),
    Reset,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Flatten),
        3 => Just(Step::Merge),
        2 => Just(Step::Rebase),
        3 => Just(Step::Fork),
        1 => Just(Step::Seal),
        2 => (0u64..4).prop_map(Step::Cancelled),
        1 => Just(Step::Reset),
        1 => Just(Step::Reopen),
    ]
}

/// Stops guests, also where a call under them panics.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Two guests write, discard and flush their halves of a disk while `call` goes on; afterwards `flat` is what they wrote.
fn with_guests(disk: &Durable, seed: u64, flat: &mut [u8], call: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let half = flat.len() / 2;
    std::thread::scope(|scope| {
        let (low, high) = flat.split_at_mut(half);
        for (guest, (start, own)) in [(0, low), (half, high)].into_iter().enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                let mut dice = Dice::new(seed * 2 + guest as u64);
                let pages = (own.len() / PAGE) as u64;
                for round in 0.. {
                    if round >= 8 && stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let page = dice.below(pages);
                    let here = (page as usize) * PAGE;
                    let index = PageIndex::new((start / PAGE) as u64 + page);
                    match dice.below(8) {
                        0 => {
                            disk.zero(PageRange::one(index)).unwrap();
                            own[here..here + PAGE].fill(0);
                        }
                        1 => disk.flush().unwrap(),
                        2 => {
                            let mut found = vec![0xa5; PAGE];
                            disk.read(ByteOffset::new((start + here) as u64), &mut found).unwrap();
                            assert!(found == own[here..here + PAGE], "a guest does not read what it wrote");
                        }
                        _ => {
                            let from = dice.below(8) as usize * 512;
                            let len = (PAGE - from).min((dice.below(8) as usize + 1) * 512);
                            let data = dice.bytes(len as u64);
                            disk.write(ByteOffset::new((start + here + from) as u64), &data).unwrap();
                            own[here + from..here + from + len].copy_from_slice(&data);
                        }
                    }
                }
            });
        }
        let _stops = Stops(&stop);
        call();
    });
}

fn soak() -> bool {
    std::env::var_os("OFFSHOOT_SOAK").is_some()
}

fn cases() -> u32 {
    if soak() { 300 } else { 8 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to the layers while guests write, the disk is the flat bytes that they wrote, and images are what they were.
    #[test]
    fn guests_win_over_copies(steps in prop::collection::vec(step(), 1..10), seed in any::<u32>()) {
        let temp = Temp::new("open-model");
        let mut store = open(&temp);
        let (web, mut disk) = deep(&store);
        let onto = name("onto");
        store.create_image(&onto, &ByteSource::new(Dice::new(4).bytes(PAGES * PAGE as u64)), &Job::new()).unwrap();
        let (mut flat, mut origin) = (read_disk(&disk), read_image(&disk.origin()));
        let mut images: Vec<(DurableImage, Vec<u8>)> = Vec::new();
        for (n, step) in (0u64..).zip(steps) {
            let cancel = Cancel::new();
            let call = || match step {
                Step::Flatten => store.flatten_open(&disk, &Job::new()).unwrap(),
                Step::Merge => store.merge_open(&disk, &Job::new()).unwrap(),
                Step::Rebase => store.rebase_open(&disk, &onto, &Job::new()).unwrap(),
                Step::Cancelled(after) => {
                    let told = AtomicU64::new(0);
                    let report = |_| if told.fetch_add(1, Ordering::Relaxed) == after { cancel.cancel() };
                    let done = store.flatten_open(&disk, &Job::new().report(&report).cancel(&cancel));
                    assert!(matches!(done, Ok(()) | Err(CloneError::Space(SpaceError::Store(StoreError::Cancelled)))), "{done:?}");
                }
                Step::Seal => images.iter().for_each(|(image, _)| image.seal(&Job::new()).unwrap()),
                // An image of a disk that is written says nothing of what the guests think; these are for those who stand still.
                Step::Fork | Step::Reset | Step::Reopen => {}
            };
            with_guests(&disk, u64::from(seed) + n, &mut flat, call);
            match step {
                Step::Fork => {
                    images.push((cut(&disk), flat.clone()));
                    origin = flat.clone();
                }
                Step::Reset => {
                    disk.reset().unwrap();
                    flat = origin.clone();
                }
                Step::Reopen => {
                    disk.flush().unwrap();
                    images.clear();
                    drop((disk, store));
                    store = open(&temp);
                    disk = store.open_disk(&web).unwrap();
                    origin = read_image(&disk.origin());
                }
                _ => {}
            }
            prop_assert!(read_disk(&disk) == flat, "after {:?}", step);
            disk.validate().unwrap();
            for (image, bytes) in &images {
                prop_assert!(read_image(image) == *bytes, "an image changed in {:?}", step);
                Sealed::validate(image).unwrap();
            }
            let harmless = problems(&store).iter().all(|problem| matches!(problem, Problem::Orphan { .. }));
            prop_assert!(harmless, "after {:?}", step);
        }
        disk.flush().unwrap();
        images.clear();
        drop(disk);
        prop_assert!(read_image(&store.open_image(&web).unwrap()) == flat);
        store.repair().unwrap();
        prop_assert!(problems(&store).is_empty());
    }
}

/// A disk with layers under it, and what it holds; then one call after another under it, with its guest at work.
fn under_fault(recorder: &Recorder, n: u64, how: Fault) -> (u64, u64) {
    let store = CloneStore::over(recorder.folder(), StoreOptions::default()).expect("nothing fails yet");
    let [golden, other, web] = ["golden", "other", "web"].map(name);
    let image = |seed| ByteSource::new(Dice::new(seed).bytes(12 * PAGE as u64));
    store.create_image(&golden, &image(1), &Job::new()).unwrap();
    store.create_image(&other, &image(2), &Job::new()).unwrap();
    store.clone_disk(&golden, &web).unwrap();
    let disk = store.open_disk(&web).unwrap();
    for page in 0..3 {
        disk.write(at(page), &[page as u8 + 1; PAGE]).unwrap();
        cut(&disk);
    }
    disk.write(at(3), &[4; PAGE]).unwrap();
    disk.flush().unwrap();
    // Sector by sector: what is acknowledged, and what was written since.
    let (acknowledged, written) = (Mutex::new(read_disk(&disk)), Mutex::new(read_disk(&disk)));
    let failures = AtomicU64::new(0);
    let failed = |ok: bool| {
        failures.fetch_add(u64::from(!ok), Ordering::Relaxed);
    };
    let rounds = AtomicU64::new(10);
    let guest = || {
        let round = rounds.fetch_add(1, Ordering::Relaxed);
        let here = (round % 8) as usize * PAGE + 512;
        written.lock().unwrap()[here..here + 512].fill(round as u8);
        failed(disk.write(ByteOffset::new(here as u64), &[round as u8; 512]).is_ok());
        let now = read_disk(&disk);
        let flushed = disk.flush().is_ok();
        if flushed {
            *acknowledged.lock().unwrap() = now;
        }
        failed(flushed);
        if round.is_multiple_of(3) {
            failed(disk.cut().map(|cut| drop(cut.commit())).is_ok());
        }
    };
    recorder.fail_nth(n, how);
    let turns = AtomicU64::new(0);
    let report = |_| {
        if turns.fetch_add(1, Ordering::Relaxed) < 2 {
            guest();
        }
    };
    let job = Job::new().report(&report);
    let same = |call: &dyn Fn() -> Result<(), CloneError>| {
        turns.store(0, Ordering::Relaxed);
        let done = call();
        if let Err(error) = &done {
            assert!(!error.to_string().is_empty());
        }
        failed(done.is_ok());
        let (found, written) = (read_disk(&disk), written.lock().unwrap());
        let acknowledged = acknowledged.lock().unwrap();
        assert!(
            (0..found.len()).all(|at| found[at] == written[at] || found[at] == acknowledged[at]),
            "{how:?} at call {n}"
        );
        disk.validate().unwrap_or_else(|wrong| panic!("{how:?} at call {n}: {wrong}"));
    };
    same(&|| store.merge_open(&disk, &job));
    same(&|| store.rebase_open(&disk, &other, &job));
    same(&|| store.flatten_open(&disk, &job));
    guest();
    let calls = recorder.calls();
    recorder.fail_nth(0, how);
    // Killed, or cut off the power: what was acknowledged is there, or what was written over it.
    std::mem::forget((disk, store));
    let log = recorder.log();
    let most = if soak() { 8 } else { 1 };
    let mut states: Vec<Recorder> = log.states_at(log.len(), Tearing::Sectors, n, most).collect();
    states.push(log.all_done());
    let (acknowledged, written) = (acknowledged.into_inner().unwrap(), written.into_inner().unwrap());
    for state in states {
        let store = CloneStore::over(state.folder(), StoreOptions::default())
            .unwrap_or_else(|error| panic!("{how:?} at call {n}: {error}"));
        let disk = store.open_disk(&web).unwrap_or_else(|error| panic!("{how:?} at call {n}: {error}"));
        let found = read_disk(&disk);
        for at in (0..found.len()).step_by(512) {
            let here = at..at + 512;
            let known = [&acknowledged, &written].iter().any(|bytes| bytes[here.clone()] == found[here.clone()]);
            assert!(known, "{how:?} at call {n}: sector {}", at / 512);
        }
        // It goes on, whatever failed before.
        store.flatten_open(&disk, &Job::new()).unwrap();
        assert!(read_disk(&disk) == found);
        drop(disk);
        store.repair().unwrap();
        let left = problems(&store);
        assert!(left.is_empty(), "{how:?} at call {n}: {left:?}");
        assert!(read_image(&store.open_image(&web).unwrap()) == found);
    }
    (calls, failures.into_inner())
}

#[test]
fn every_call_under_an_open_disk_fails_once() {
    const FAULTS: [Fault; 3] = [Fault::Io, Fault::NoSpace, Fault::Short];
    for (first, how) in (0..).zip(FAULTS) {
        let mut failures = 0;
        // In a soak every call in every way; else every fifth, in one way each.
        for n in (first * 5 + 1..).step_by(if soak() { 1 } else { 5 * FAULTS.len() }) {
            let (calls, failed) = under_fault(&Recorder::new(), n, how);
            failures += failed;
            if calls < n {
                assert_eq!(failed, 0);
                break;
            }
        }
        assert!(failures > 5, "{how:?}: only {failures} steps failed");
    }
}
