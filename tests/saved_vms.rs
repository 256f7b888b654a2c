//! Fork points saved whole and brought back: on every backing, with disks of every kind, one upon the other; what is damaged or missing is named and
//! never believed.

#![cfg(unix)]

mod common;
mod saved;

use std::collections::BTreeMap;
use std::sync::Mutex;

use offshoot::backing::{Backing, Heap};
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, Lba, PageSize};
use offshoot::store::{
    Cancel, CloneError, CloneStore, Health, Job, Manifest, Problem, Progress, SavedAccess, SavedDisk, SavedId,
    SavedRegion, StoreOptions,
};
use offshoot::testing::Dice;
use offshoot::testing::crash::Recorder;
use offshoot::{CloneSpec, ForkPoint, Limits, Reading, SavedError, SpaceError, StoreError, Tree};
use saved::{Flat, Machine, PAGE, Temp, flat, load, name, open, over, problems, save, threads};

on_every_backing!(
    what_was_saved_comes_back,
    the_parent_runs_on_while_it_is_saved,
    a_chain_of_saves_holds_every_instant,
    a_flipped_bit_in_ram_is_named,
);

/// RAM with holes and zero pages, disks of four kinds, state of none, little and much, read at once or on demand, and saved again from there.
fn what_was_saved_comes_back<B: Backing>() {
    let temp = Temp::new("back");
    let mut dice = Dice::new(1);
    for state in [0, 1, 3 << 20] {
        let store = open(&temp);
        let mut machine = Machine::<B>::new(&store, PageSize::KIB_4, dice.bytes(state));
        let empty = machine.fork();
        save(&empty, &store, "empty");
        (0..8).for_each(|_| machine.mess(&mut dice));
        machine.guest.0 = offshoot::DeviceState::from_bytes(dice.bytes(state));
        let point = machine.fork();
        let manifest = save(&point, &store, "full");
        let want = [flat(&empty).unwrap(), flat(&point).unwrap()];
        assert_eq!(*manifest.parent, *"saved one");
        assert!(problems(&store).is_empty());
        let generation = machine.vm.identity().generation;
        drop((machine, empty, point, store));

        let store = open(&temp);
        assert!(problems(&store).is_empty());
        for reading in [Reading::Now, Reading::OnDemand] {
            for (text, want) in [("empty", &want[0]), ("full", &want[1])] {
                let point: ForkPoint<B> = load(&store, text, reading);
                point.validate().unwrap();
                assert_eq!(&flat(&point).unwrap(), want);
                let clones = [0, 1].map(|_| point.spawn(CloneSpec::default()).unwrap());
                assert_eq!(clones[0].identity().name.as_str(), "saved one-1");
                assert!(clones.iter().all(|clone| clone.identity().generation != generation));
                assert_ne!(clones[0].identity().generation, clones[1].identity().generation);
                // What one writes, the other does not see, nor does the fork point.
                clones[0].ram().write(GuestAddress::new(4 << 30), &[7; 5000]).unwrap();
                clones[0].disk("own").unwrap().write(Lba::new(3), &[7; 512]).unwrap();
                assert!(clones[0].disk("image").unwrap().write(Lba::new(0), &[7; 512]).is_err());
                let mut seen = vec![0; 5000];
                clones[1].ram().read(GuestAddress::new(4 << 30), &mut seen).unwrap();
                assert!(seen == want.ram[13 * PAGE as usize..13 * PAGE as usize + 5000]);
                assert_eq!(&flat(&point).unwrap(), want);
                // A third, which goes on and is saved.
                let mut third = Machine::of(&point);
                third.mess(&mut dice);
                let next = third.fork();
                next.save_since(&point, &store, &name("next"), &threads(1), &Job::new()).unwrap();
                let want = flat(&next).unwrap();
                drop((next, third));
                assert_eq!(flat(&load::<B>(&store, "next", reading)).unwrap(), want);
                store.delete(&name("next")).unwrap();
            }
        }
        for text in ["empty", "full"] {
            store.delete(&name(text)).unwrap();
        }
        assert_eq!(store.list_saved().unwrap(), []);
        store.repair().unwrap();
        assert_eq!(temp.files(".vm"), [""; 0]);
    }
}

#[test]
fn larger_pages_come_back() {
    let temp = Temp::new("large-pages");
    let store = open(&temp);
    let size = PageSize::new(ByteSize::kib(64)).unwrap();
    let mut machine = Machine::<common::AnyHeap>::new(&store, size, vec![1]);
    machine.mess(&mut Dice::new(2));
    let point = machine.fork();
    save(&point, &store, "large");
    let again: ForkPoint<common::AnyHeap> = load(&store, "large", Reading::Now);
    assert_eq!(flat(&again).unwrap(), flat(&point).unwrap());
    assert_eq!(again.ram_layout().geometry().page_size(), size);
    // A backing that does not have them says so.
    let refused = ForkPoint::<Heap>::load(&store, &name("large"), Reading::Now, &threads(1), &Job::new());
    assert!(matches!(refused, Err(SavedError::Space(SpaceError::PageSize { .. }))));
}

/// What was saved is told apart in pages of 4 KiB; RAM over it has larger ones, each of which may hold many of those.
#[test]
fn larger_pages_over_a_saved_vm_are_saved_again() {
    let temp = Temp::new("large-pages-again");
    let store = open(&temp);
    let size = PageSize::new(ByteSize::kib(64)).unwrap();
    let machine = Machine::<common::AnyHeap>::new(&store, size, vec![1]);
    // Every other page of 4 KiB, so that one of 64 KiB has data, then none, then data.
    for at in (0..10 * size.bytes().get()).step_by(2 * PAGE as usize) {
        machine.vm.ram().store(GuestAddress::new(at), at | 1).unwrap();
    }
    let mut machine = machine;
    let point = machine.fork();
    save(&point, &store, "large");
    let again: ForkPoint<common::AnyHeap> = load(&store, "large", Reading::OnDemand);
    assert_eq!(flat(&again).unwrap(), flat(&point).unwrap());
    save(&again, &store, "again");
    assert_eq!(flat(&load::<common::AnyHeap>(&store, "again", Reading::Now)).unwrap(), flat(&point).unwrap());
}

/// One backing's fork point comes back on another.
#[cfg(target_os = "linux")]
#[test]
fn a_backing_reads_what_another_saved() {
    let temp = Temp::new("other-backing");
    let store = open(&temp);
    let mut machine = Machine::<offshoot::backing::Mapped>::new(&store, PageSize::KIB_4, vec![9; 99]);
    (0..9).for_each(|n| machine.mess(&mut Dice::new(n)));
    let point = machine.fork();
    save(&point, &store, "one");
    assert_eq!(flat(&load::<Heap>(&store, "one", Reading::OnDemand)).unwrap(), flat(&point).unwrap());
}

fn the_parent_runs_on_while_it_is_saved<B: Backing>() {
    let temp = Temp::new("runs-on");
    let store = open(&temp);
    let mut machine = Machine::<B>::small(vec![1]);
    machine.mess(&mut Dice::new(3));
    let point = machine.fork();
    let want = flat(&point).unwrap();
    let machine = Mutex::new(machine);
    let told = Mutex::new(Vec::new());
    let threads = threads(2);
    let report = |progress: Progress| {
        told.lock().unwrap().push((progress.done.get(), progress.total.get()));
        let mut machine = machine.lock().unwrap();
        machine.mess(&mut Dice::new(4));
        machine.fork();
    };
    point.save(&store, &name("one"), &threads, &Job::new().report(&report)).unwrap();
    let told = told.into_inner().unwrap();
    assert!(told.iter().any(|(done, _)| *done == 0) && told.iter().all(|(done, total)| done <= total), "{told:?}");
    assert!(told.last().is_some_and(|(done, total)| done == total && *done > 0), "{told:?}");
    assert_eq!(flat(&load::<B>(&store, "one", Reading::Now)).unwrap(), want);
}

#[test]
fn what_is_given_up_leaves_nothing() {
    let temp = Temp::new("given-up");
    let store = open(&temp);
    let mut machine = Machine::<Heap>::new(&store, PageSize::KIB_4, vec![1]);
    machine.mess(&mut Dice::new(5));
    let point = machine.fork();
    let before = temp.files("");
    let threads = threads(2);
    // Given up at the first word, and at each later one.
    for words in 0.. {
        let (cancel, left) = (Cancel::new(), Mutex::new(words));
        let report = |_: Progress| {
            let mut left = left.lock().unwrap();
            if *left == 0 {
                cancel.cancel();
            } else {
                *left -= 1;
            }
        };
        match point.save(&store, &name("one"), &threads, &Job::new().report(&report).cancel(&cancel)) {
            Ok(_) => {
                assert!(words >= 4, "RAM and three disks that are copied");
                break;
            }
            Err(error) => assert!(is_cancelled(&error), "{error}"),
        }
        assert_eq!(temp.files(""), before);
        assert!(problems(&store).is_empty());
    }
    let cancel = Cancel::new();
    cancel.cancel();
    let job = Job::new().cancel(&cancel);
    let given_up = ForkPoint::<Heap>::load(&store, &name("one"), Reading::Now, &threads, &job).unwrap_err();
    assert!(is_cancelled(&given_up), "{given_up}");
    let elsewhere = Temp::new("given-up-copy");
    let other = open(&elsewhere);
    let given_up = SavedError::from(store.copy_saved(&name("one"), &other, &name("one"), &threads, &job).unwrap_err());
    assert!(is_cancelled(&given_up) && other.list_saved().unwrap().is_empty(), "{given_up}");
}

/// A report may use the store, also while somebody repairs it: neither waits for the save, and nothing that is made goes.
#[test]
fn a_report_uses_the_store_while_it_is_repaired() {
    let temp = Temp::new("report");
    let store = open(&temp);
    let mut machine = Machine::<Heap>::small(vec![1]);
    machine.mess(&mut Dice::new(12));
    let point = machine.fork();
    std::thread::scope(|scope| {
        let once = std::sync::Once::new();
        let report = |_: Progress| {
            once.call_once(|| {
                let (begun, begins) = std::sync::mpsc::channel();
                let store = &store;
                scope.spawn(move || {
                    begun.send(()).unwrap();
                    store.repair().unwrap();
                });
                begins.recv().unwrap();
                // Many, so that the repair runs beside one of them.
                for n in 0..50 {
                    let name = name(&format!("made meanwhile {n}"));
                    store.create_empty(&name, ByteSize::new(PAGE)).unwrap();
                    store.grow(&name, ByteSize::new(2 * PAGE)).unwrap();
                }
            });
        };
        point.save(&store, &name("one"), &threads(2), &Job::new().report(&report)).unwrap();
    });
    assert_eq!(store.list().unwrap().len(), 50);
    assert_eq!(flat(&load::<Heap>(&store, "one", Reading::Now)).unwrap(), flat(&point).unwrap());
}

fn is_cancelled(error: &SavedError) -> bool {
    let (SavedError::Space(error) | SavedError::Store(CloneError::Space(error))) = error else { return false };
    matches!(error, SpaceError::Store(StoreError::Cancelled))
}

/// One save upon the other, past the length at which all is copied again, deleted in any order, through a reopening in the middle.
fn a_chain_of_saves_holds_every_instant<B: Backing>() {
    let temp = Temp::new("chain");
    let mut store = open(&temp);
    let threads = threads(2);
    let job = Job::new();
    let mut dice = Dice::new(6);
    let mut machine = Machine::<B>::small(vec![]);
    machine.mess(&mut dice);
    let mut last = machine.fork();
    let mut model: BTreeMap<u64, Flat> = BTreeMap::from([(0, flat(&last).unwrap())]);
    save(&last, &store, "0");
    let layers_of = |store: &CloneStore, text: &str| {
        let saved = store.list_saved().unwrap();
        let info = saved.into_iter().find(|info| info.name == name(text)).unwrap();
        assert_eq!(info.health, Health::Whole);
        info.layers.len()
    };
    let mut longest = 0;
    for step in 1..24u64 {
        machine.mess(&mut dice);
        let point = machine.fork();
        point.save_since(&last, &store, &name(&step.to_string()), &threads, &job).unwrap();
        longest = longest.max(layers_of(&store, &step.to_string()));
        model.insert(step, flat(&point).unwrap());
        if step % 3 == 0 {
            let gone = *model.keys().nth(dice.below(model.len() as u64 - 1) as usize).unwrap();
            store.delete(&name(&gone.to_string())).unwrap();
            model.remove(&gone);
        }
        last = point;
        if step == 8 {
            // In another life of the process, as it were.
            drop((last, machine, store));
            store = open(&temp);
            last = load(&store, "8", Reading::Now);
            machine = Machine::of(&last);
        }
    }
    assert!((8..=32).contains(&longest), "{longest} layers of RAM and the disk");
    assert!(layers_of(&store, "23") < longest, "a long chain begins again");
    for (step, want) in &model {
        assert_eq!(&flat(&load::<B>(&store, &step.to_string(), Reading::Now)).unwrap(), want, "step {step}");
    }
    assert!(problems(&store).is_empty());
    drop((last, machine));
    for step in model.keys() {
        store.delete(&name(&step.to_string())).unwrap();
    }
    store.repair().unwrap();
    assert_eq!(temp.files(".layer"), [""; 0], "nothing is left");
}

/// A save since a fork point whose layers are gone from the store, or that was saved in another, copies everything.
#[test]
fn a_save_since_nothing_is_whole() {
    let (temp, other) = (Temp::new("since"), Temp::new("since-other"));
    let (store, other) = (open(&temp), open(&other));
    let threads = threads(1);
    let job = Job::new();
    let mut dice = Dice::new(7);
    let mut machine = Machine::<Heap>::small(vec![]);
    machine.mess(&mut dice);
    let first = machine.fork();
    save(&first, &store, "first");
    machine.mess(&mut dice);
    let second = machine.fork();
    second.save_since(&first, &other, &name("second"), &threads, &job).unwrap();
    store.delete(&name("first")).unwrap();
    second.save_since(&first, &store, &name("second"), &threads, &job).unwrap();
    for store in [&store, &other] {
        assert_eq!(flat(&load::<Heap>(store, "second", Reading::Now)).unwrap(), flat(&second).unwrap());
        assert_eq!(store.list_saved().unwrap()[0].layers.len(), 2);
    }
    // Strangers have nothing to save since.
    let mut stranger = Machine::<Heap>::small(vec![]);
    let refused = stranger.fork().save_since(&second, &store, &name("third"), &threads, &job);
    assert!(matches!(refused, Err(SavedError::Space(SpaceError::Unrelated(_)))));
}

/// A disk of the store is not copied; deleting goes in any order; a clone's disk can be given a name.
#[test]
fn disks_of_the_store_are_shared() {
    let temp = Temp::new("shared");
    let store = open(&temp);
    let own = name("a disk of the store's");
    let mut machine = Machine::<Heap>::new(&store, PageSize::KIB_4, vec![1]);
    machine.vm.disk("own").unwrap().write(Lba::new(8), &[9; 512]).unwrap();
    let point = machine.fork();
    let manifest = save(&point, &store, "one");
    let layers = store.list_saved().unwrap()[0].layers.clone();
    assert_eq!(manifest.disks[1].access, SavedAccess::ReadOnly);
    assert_eq!(manifest.disks[1].sectors.get(), 40);
    let disk = manifest.disks[2].layer.unwrap();
    assert!(layers.contains(&disk) && temp.files(".overlay").contains(&format!("{disk}.overlay")));
    let want = flat(&point).unwrap();
    drop((machine, point));
    assert!(store.info(&own).unwrap().layers.contains(&disk));
    let space = store.space().unwrap();
    assert!(space[&own].shared.get() > 0 && space[&name("one")].exclusive.get() > 0);
    assert!(space[&name("one")].shared.get() > 0);
    store.delete(&own).unwrap();
    assert!(problems(&store).is_empty());

    let point: ForkPoint<Heap> = load(&store, "one", Reading::OnDemand);
    assert_eq!(flat(&point).unwrap(), want);
    let clone = point.spawn(CloneSpec::default()).unwrap();
    let disk = clone.disk("own").unwrap();
    disk.write(Lba::new(9), &[8; 512]).unwrap();
    disk.flush().unwrap();
    store.adopt(disk.backing::<offshoot::store::Durable>().unwrap(), &name("its disk")).unwrap();
    drop((clone, point));
    assert!(matches!(store.create_empty(&name("one"), ByteSize::kib(4)), Err(CloneError::Exists { .. })));
    store.delete(&name("one")).unwrap();
    assert_eq!(temp.files(".vm"), [""; 0]);
    let disk = store.open_disk(&name("its disk")).unwrap();
    let mut found = [0; 1024];
    disk.read(ByteOffset::new(8 * 512), &mut found).unwrap();
    assert_eq!((found[0], found[512]), (9, 8));
}

#[test]
fn a_copy_needs_nothing_else() {
    let (temp, other) = (Temp::new("copy"), Temp::new("copy-to"));
    let (store, to) = (open(&temp), open(&other));
    let threads = threads(2);
    let job = Job::new();
    let mut dice = Dice::new(8);
    let mut machine = Machine::<Heap>::new(&store, PageSize::KIB_4, vec![4; 400]);
    machine.mess(&mut dice);
    let first = machine.fork();
    save(&first, &store, "first");
    machine.mess(&mut dice);
    let second = machine.fork();
    second.save_since(&first, &store, &name("second"), &threads, &job).unwrap();
    let copy = store.copy_saved(&name("second"), &to, &name("copy"), &threads, &job).unwrap();
    assert_eq!(to.list_saved().unwrap()[0].layers.len(), copy.layers().count());
    let want = flat(&second).unwrap();
    drop((machine, first, second, store, temp));
    assert_eq!(flat(&load::<Heap>(&to, "copy", Reading::Now)).unwrap(), want);
    assert!(problems(&to).is_empty());
    // And the directory is all there is to it.
    drop(to);
    let moved = Temp::new("copy-moved");
    std::fs::rename(&other.0, &moved.0).unwrap();
    assert_eq!(flat(&load::<Heap>(&open(&moved), "copy", Reading::OnDemand)).unwrap(), want);
}

#[test]
fn a_missing_layer_degrades_and_is_named() {
    let temp = Temp::new("missing");
    let store = open(&temp);
    let mut machine = Machine::<Heap>::small(vec![]);
    machine.mess(&mut Dice::new(9));
    let manifest = save(&machine.fork(), &store, "one");
    let gone = manifest.ram.unwrap();
    std::fs::rename(temp.0.join(format!("{gone}.layer")), temp.0.join("aside")).unwrap();
    assert_eq!(store.list_saved().unwrap()[0].health, Health::Degraded { missing: vec![gone] });
    let refused =
        ForkPoint::<Heap>::load(&store, &name("one"), Reading::OnDemand, &threads(1), &Job::new()).unwrap_err();
    assert!(
        matches!(&refused, SavedError::Store(CloneError::Degraded { missing, .. }) if *missing == [gone]),
        "{refused}"
    );
    let found = problems(&store);
    assert!(
        matches!(&found[..], [Problem::Missing { layer, needed_by }] if *layer == gone && needed_by[..] == [name("one")]),
        "{found:?}"
    );
    // Brought back, it is whole.
    std::fs::rename(temp.0.join("aside"), temp.0.join(format!("{gone}.layer"))).unwrap();
    load::<Heap>(&store, "one", Reading::Now);
    std::fs::remove_file(temp.0.join(format!("{gone}.layer"))).unwrap();
    // A manifest that is gone as well.
    std::fs::remove_file(temp.0.join(format!("{}.vm", manifest.id))).unwrap();
    assert!(problems(&store).iter().any(|problem| matches!(problem, Problem::File { .. })));
    store.delete(&name("one")).unwrap();
    assert!(problems(&store).is_empty());
    assert_eq!(temp.files(".layer"), [""; 0]);
}

/// The file and the page are named, nothing wrong is read, and the rest is read all the same.
fn a_flipped_bit_in_ram_is_named<B: Backing>() {
    let recorder = Recorder::new();
    let store = over(recorder.folder());
    let mut machine = Machine::<B>::small(vec![]);
    // Pages 3 and 12 of the space; the latter is the last of the second region.
    machine.vm.ram().write(GuestAddress::new(3 * PAGE), &[3; 4096]).unwrap();
    machine.vm.ram().write(GuestAddress::new((16 << 20) + 2 * PAGE), &[12; 4096]).unwrap();
    let manifest = save(&machine.fork(), &store, "one");
    let file = format!("{}.layer", manifest.ram.unwrap());
    assert!(recorder.flip(&file, ByteOffset::new(2 * PAGE + 77), 5));
    let threads = threads(2);
    let is_named = |error: &SpaceError| matches!(error, SpaceError::Store(StoreError::DamagedPage { file: named, page }) if **named == *file && page.get() == 12);
    let refused = ForkPoint::<B>::load(&store, &name("one"), Reading::Now, &threads, &Job::new()).unwrap_err();
    assert!(matches!(&refused, SavedError::Space(error) if is_named(error)), "{refused}");
    match ForkPoint::<B>::load(&store, &name("one"), Reading::OnDemand, &threads, &Job::new()) {
        // The backing has copied everything.
        Err(refused) => assert!(matches!(&refused, SavedError::Space(error) if is_named(error)), "{refused}"),
        Ok(point) => {
            let clone = point.spawn(CloneSpec::default()).unwrap();
            assert_eq!(clone.ram().load::<u8>(GuestAddress::new(3 * PAGE)).unwrap(), 3);
            let refused = clone.ram().load::<u8>(GuestAddress::new((16 << 20) + 2 * PAGE)).unwrap_err();
            assert!(matches!(&refused, offshoot::ram::RamError::Space(error) if is_named(error)), "{refused}");
        }
    }
    let found = problems(&store);
    assert!(
        matches!(&found[..], [Problem::Pages { layer, damaged }] if Some(*layer) == manifest.ram && damaged.count().get() == 1),
        "{found:?}"
    );
    assert_eq!(store.list_saved().unwrap()[0].health, Health::Whole, "its pages are not looked at");
}

/// Every bit of every byte of the manifest, which is seen by a list, a load and a check.
#[test]
fn a_flipped_bit_in_a_manifest_is_found() {
    let recorder = Recorder::new();
    let store = over(recorder.folder());
    let mut machine = Machine::<Heap>::small((0..=255).collect());
    machine.mess(&mut Dice::new(10));
    let manifest = save(&machine.fork(), &store, "one");
    let file = format!("{}.vm", manifest.id);
    let bytes = recorder.content(&file).unwrap();
    assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            assert!(Manifest::from_bytes(&flipped).is_err(), "byte {at}, bit {bit}");
        }
        if at % 61 == 0 {
            recorder.flip(&file, ByteOffset::new(at as u64), 3);
            let refused = store.open_manifest(&name("one")).unwrap_err();
            assert!(refused.to_string().contains(&file), "byte {at}: {refused}");
            assert_eq!(store.list_saved().unwrap()[0].health, Health::Damaged);
            assert!(matches!(&problems(&store)[..], [Problem::File { .. }]));
            assert_eq!(store.space().unwrap().len(), 1, "what the files take is known all the same");
            recorder.flip(&file, ByteOffset::new(at as u64), 3);
        }
    }
    for len in 0..bytes.len() {
        assert!(Manifest::from_bytes(&bytes[..len]).is_err(), "cut at {len}");
    }
    assert!(Manifest::from_bytes(&[bytes, vec![0]].concat()).is_err());
}

#[test]
fn limits_are_named() {
    let temp = Temp::new("limits");
    let (threads, limits) = (threads(1), Limits { device_state: ByteSize::new(100), ..Limits::default() });
    let job = Job::new();
    let store = CloneStore::open(&temp.0, StoreOptions::default().tree(&Tree::new(limits))).unwrap();
    let mut machine = Machine::<Heap>::small(vec![0; 101]);
    let point = machine.fork();
    let refused = point.save(&store, &name("one"), &threads, &job).unwrap_err();
    assert!(refused.to_string().contains("Limits::device_state"), "{refused}");
    machine.guest.0 = offshoot::DeviceState::from_bytes(vec![0; 100]);
    let point = machine.fork();
    point.save(&store, &name("one"), &threads, &job).unwrap();
    assert!(matches!(
        point.save(&store, &name("one"), &threads, &job),
        Err(SavedError::Store(CloneError::Exists { .. }))
    ));
    drop(store);
    let limits = Limits { device_state: ByteSize::new(99), ..Limits::default() };
    let store = CloneStore::open(&temp.0, StoreOptions::default().tree(&Tree::new(limits))).unwrap();
    let refused = ForkPoint::<Heap>::load(&store, &name("one"), Reading::Now, &threads, &job).unwrap_err();
    assert!(matches!(refused, SavedError::Store(CloneError::Space(SpaceError::Store(StoreError::Limit { .. })))));
    let unknown = ForkPoint::<Heap>::load(&store, &name("two"), Reading::Now, &threads, &job).unwrap_err();
    assert!(matches!(unknown, SavedError::Store(CloneError::Unknown { .. })));
    assert!(matches!(store.open_disk(&name("one")), Err(CloneError::Unknown { .. })));
}

/// The format does not drift: a file that was made by hand from the document is read, and written again byte by byte.
#[test]
fn the_golden_manifest() {
    let golden = include_bytes!("golden/v1.vm");
    let id = |last| [0x3e, 0x5b, 0x7f, 0x10, 0x65, 0xa4, 0x4c, 0x3e, 0x9d, 0x52, 0x6f, 0x2a, 0x8c, 0x0b, 0x1d, last];
    let layer = |last| Some(offshoot::store::LayerId::from_bytes(id(last)));
    let region = |start, len| SavedRegion { start: GuestAddress::new(start), len: ByteSize::new(len) };
    let disk = |text: &str, sectors, pages, access, layer| SavedDisk {
        name: text.into(),
        sectors: offshoot::page::SectorCount::new(sectors),
        pages: offshoot::page::PageCount::new(pages),
        access,
        layer,
    };
    let manifest = Manifest {
        id: SavedId::from_bytes(id(4)),
        parent: "golden".into(),
        page_size: PageSize::KIB_4,
        regions: vec![region(0, 0xa0000), region(1 << 32, 2 << 20)],
        ram: layer(5),
        disks: vec![
            disk("root", 31, 4, SavedAccess::ReadWrite, layer(3)),
            disk("cd", 8, 1, SavedAccess::ReadOnly, None),
        ],
        state: (0..100).collect::<Vec<u8>>().into(),
    };
    assert_eq!(Manifest::from_bytes(golden).unwrap(), manifest);
    assert!(manifest.to_bytes().unwrap() == golden);
}
