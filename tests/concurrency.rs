//! Threads that write while VMs are forked: no page is torn, lost or another VM's.
//!
//! Every page that is checked carries its number, its VM's tag, a sequence and a checksum over all its words. Writers stop
//! only where a page is whole, which is what a guest's pause does; a reader that finds anything else has found a fault. No
//! verdict depends on time. `OFFSHOOT_SOAK=<n>` asks for n million page checks.

mod common;
mod mutants;
mod soak;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{PAGE, RAM_PAGES, get, put, running};
use offshoot::backing::Backing;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, GuestAddress};
use offshoot::testing::{Dice, ScriptedGuest};
use offshoot::{BoxError, CloneSpec, DeviceState, Guest, Limits};
use soak::{Stamp, WORDS, Wrong, read_stamp, soak, stamp_page, wanted_checks};

on_every_backing! {
    forks_under_writers,
    writers_of_different_words,
    writers_that_do_not_stop,
    first_writes_while_siblings_are_spawned,
}

/// At least the wanted number of page checks, in rounds of forks under writers.
fn forks_under_writers<B: Backing>() {
    let wanted = wanted_checks();
    let mut checks = 0;
    let mut round = 0;
    while checks < wanted {
        checks += soak::<B>(round, wanted.min(200_000));
        round += 1;
    }
    println!("{checks} page checks in {round} rounds on {}", std::any::type_name::<B>());
}

/// Several threads write their own words of the same pages, starting with the first write; every word that was written is there, in
/// the space and in each fork, and none goes backwards from one fork to the next.
fn writers_of_different_words<B: Backing>() {
    const THREADS: u64 = 4;
    let rounds = 12;
    for round in 0..rounds {
        let (_tree, vm, mut guest) = running::<B>(Limits::default());
        (0..RAM_PAGES).for_each(|page| put(&vm, page, 0));
        let point = vm.fork(&mut guest).expect("it runs");
        let clone = point.spawn(CloneSpec::default()).expect("a clone");
        clone.start().expect("it is paused");
        let start = std::sync::Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (ram, start) = (clone.ram().clone(), &start);
                scope.spawn(move || {
                    let mut dice = Dice::new(round * THREADS + thread);
                    start.wait();
                    for n in 1..=40u64 {
                        for page in 0..RAM_PAGES {
                            // Its own word; and two bytes of a word that all threads share.
                            let at = GuestAddress::new(page * PAGE + 8 * thread);
                            ram.store(at, n << 8 | thread).expect("RAM can be written");
                            let at = GuestAddress::new(page * PAGE + 512 + 2 * thread);
                            ram.store(at, (n << 8 | thread) as u16).expect("RAM can be written");
                            if dice.below(64) == 0 {
                                std::thread::yield_now();
                            }
                        }
                    }
                });
            }
        });
        for page in 0..RAM_PAGES {
            for thread in 0..THREADS {
                let word: u64 = clone.ram().load(GuestAddress::new(page * PAGE + 8 * thread)).expect("RAM");
                assert_eq!(word, 40 << 8 | thread, "a word of page {page} was lost");
                let half: u16 = clone.ram().load(GuestAddress::new(page * PAGE + 512 + 2 * thread)).expect("RAM");
                assert_eq!(u64::from(half), 40 << 8 | thread, "two bytes of page {page} were lost");
            }
        }
        assert_eq!(get(&vm, 1), 0, "the parent has none of it");
        clone.validate().expect("all is right");
    }
}

/// A guest whose pause stops nobody.
struct Unstoppable;

impl Guest for Unstoppable {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(vec![]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// The embedder breaks its word, and writers run on through the cut. The cut locks the space, so each single write still lands
/// wholly before it or wholly after: fork points never change, siblings see nothing, and no write is lost.
fn writers_that_do_not_stop<B: Backing>() {
    const THREADS: u64 = 3;
    const WRITES: u64 = 3000;
    let (tree, vm, _) = running::<B>(Limits::default());
    let done = AtomicU64::new(0);
    let mut points = Vec::new();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (ram, done) = (vm.ram().clone(), &done);
            scope.spawn(move || {
                for n in 1..=WRITES {
                    for page in 0..4 {
                        let at = GuestAddress::new(page * PAGE + 8 * thread);
                        // A cut may be waited for longer than a write likes to: then it is tried again.
                        while ram.store(at, n).is_err() {}
                    }
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        while done.load(Ordering::SeqCst) < THREADS && points.len() < 200 {
            let point = vm.fork(&mut Unstoppable).expect("it runs");
            let seen: Vec<u64> = words(point.ram());
            points.push((point, seen));
        }
    });
    assert!(!points.is_empty());
    let mut last = vec![0; 4 * THREADS as usize];
    for (point, seen) in &points {
        assert_eq!(&words(point.ram()), seen, "a fork point changed");
        let clone = point.spawn(CloneSpec::default()).expect("a clone");
        for (at, word) in seen.iter().enumerate() {
            let address = GuestAddress::new(at as u64 / THREADS * PAGE + 8 * (at as u64 % THREADS));
            assert_eq!(clone.ram().load::<u64>(address).expect("RAM"), *word);
            assert!(*word >= last[at], "a write that one fork had is gone from the next");
        }
        last.clone_from(seen);
    }
    for page in 0..4 {
        for thread in 0..THREADS {
            let word: u64 = vm.ram().load(GuestAddress::new(page * PAGE + 8 * thread)).expect("RAM");
            assert_eq!(word, WRITES, "the last write of a thread was lost at a cut");
        }
    }
    for (point, _) in &points {
        point.teardown().wait();
    }
    drop((vm, points));
    common::assert_empty(&tree);

    fn words(image: &impl Source) -> Vec<u64> {
        let mut words = Vec::new();
        for page in 0..4 {
            for thread in 0..THREADS {
                let mut bytes = [0; 8];
                image.read(ByteOffset::new(page * PAGE + 8 * thread), &mut bytes).expect("an image can be read");
                words.push(u64::from_ne_bytes(bytes));
            }
        }
        words
    }
}

/// Many threads spawn from one fork point at once, write first, and drop, while others fork their clones further.
fn first_writes_while_siblings_are_spawned<B: Backing>() {
    let (tree, vm, mut guest) = running::<B>(Limits::default());
    for page in 0..RAM_PAGES {
        stamp_page(&vm, Stamp { page, tag: 7, sequence: page });
    }
    let point = Arc::new(vm.fork(&mut guest).expect("it runs"));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let point = point.clone();
            scope.spawn(move || {
                for n in 0..25 {
                    let tag = 100 + thread * 1000 + n;
                    let clone = point.spawn(CloneSpec::default()).expect("a clone");
                    let own = (thread + n) % RAM_PAGES;
                    stamp_page(&clone, Stamp { page: own, tag, sequence: n });
                    let mut guest = ScriptedGuest::paused(0);
                    let deeper = clone.fork(&mut guest).expect("it is paused");
                    drop(clone);
                    let grandchild = deeper.spawn(CloneSpec::default()).expect("a clone");
                    for page in 0..RAM_PAGES {
                        let stamp =
                            read_stamp(&grandchild, page).unwrap_or_else(|wrong| panic!("page {page}: {wrong:?}"));
                        assert_eq!(stamp.tag, if page == own { tag } else { 7 }, "page {page} is another VM's");
                    }
                    deeper.teardown().wait();
                }
            });
        }
    });
    point.teardown().wait();
    drop((vm, point));
    common::assert_empty(&tree);
}

/// The checks can fail: each kind of fault is told from the others.
#[test]
fn a_torn_page_is_found() {
    let (_tree, vm, _) = running::<offshoot::backing::Heap>(Limits::default());
    let good = Stamp { page: 3, tag: 9, sequence: 44 };
    stamp_page(&vm, good);
    assert_eq!(read_stamp(&vm, 3), Ok(good));
    for word in 0..WORDS {
        let at = GuestAddress::new(3 * PAGE + 8 * word);
        let old: u64 = vm.ram().load(at).expect("RAM");
        vm.ram().store(at, old ^ 1 << (word % 64)).expect("RAM");
        assert!(read_stamp(&vm, 3).is_err(), "one bit of word {word} was changed");
        vm.ram().store(at, old).expect("RAM");
    }
    // Half of one sequence and half of the next.
    let mut halves = vec![0; PAGE as usize];
    vm.ram().read(GuestAddress::new(3 * PAGE), &mut halves).expect("RAM");
    stamp_page(&vm, Stamp { sequence: 45, ..good });
    vm.ram().write(GuestAddress::new(3 * PAGE), &halves[..PAGE as usize / 2]).expect("RAM");
    assert_eq!(read_stamp(&vm, 3), Err(Wrong::Torn));
    // A whole page in another's place.
    vm.ram().write(GuestAddress::new(4 * PAGE), &halves).expect("RAM");
    assert_eq!(read_stamp(&vm, 4), Err(Wrong::Page { found: 3 }));
    assert_eq!(read_stamp(&vm, 5), Err(Wrong::Torn), "a page of zeroes carries no stamp");
}

/// The soak itself finds what it is there for: clones that are one space.
#[test]
fn a_soak_over_a_broken_backing_fails() {
    use mutants::{Broken, Flaw, Has};
    #[derive(Debug)]
    struct Shared;
    impl Has for Shared {
        const FLAW: Flaw = Flaw::SiblingsShare;
    }
    let soaked = std::panic::catch_unwind(|| soak::<Broken<Shared>>(0, 20_000));
    assert!(soaked.is_err(), "siblings that share everything were not noticed");
}
