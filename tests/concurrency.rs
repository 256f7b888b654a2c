//! Threads that write while VMs are forked: no page is torn, lost or another VM's.
//!
//! Every page that is checked carries its number, its VM's tag and a sequence, in words spread over it. Writers stop only where a page is
//! whole, which is what a guest's pause does; a reader that finds anything else has found a fault. No verdict depends on
//! time. `OFFSHOOT_SOAK=<n>` asks for n million page checks; the figure `checks` makes a thousand million.

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
use offshoot::{AtRest, CloneSpec, DeviceState, ForkError, ForkPoint, Limits, Vm};
use soak::{
    Found, PLACES, Stamp, Stopping, Subject, Typed, Wrong, check_at_rest, get as get_words, put as put_words, soak,
};

on_every_backing! {
    forks_under_writers,
    writers_of_different_words,
    writers_that_do_not_stop,
    first_writes_while_siblings_are_spawned,
}

/// Page checks that this run is to make.
fn wanted_checks() -> u64 {
    let millions = std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse::<u64>().ok());
    millions.map_or(60_000, |millions| millions * 1_000_000)
}

/// At least the wanted number of page checks, in rounds of forks under writers.
fn forks_under_writers<B: Subject>() {
    let found = soak::<B>(wanted_checks());
    println!("{}: {found}", std::any::type_name::<B>());
    assert_eq!(found.faults(), 0, "{found}");
    assert!(found.checks >= wanted_checks() && found.forks > 20, "{found}");
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
            // Its pause stops nobody.
            let point = vm.fork(&mut AtRest(DeviceState::from_bytes([]))).expect("it runs");
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
    let word = |page, tag, sequence| Stamp { page, tag, sequence }.word();
    (0..RAM_PAGES).for_each(|page| put_words(&Typed(vm.ram().clone()), word(page, 7, page)));
    let point = Arc::new(vm.fork(&mut guest).expect("it runs"));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let point = point.clone();
            scope.spawn(move || {
                for n in 0..25 {
                    let tag = 100 + thread * 1000 + n;
                    let clone = point.spawn(CloneSpec::default()).expect("a clone");
                    let own = (thread + n) % RAM_PAGES;
                    put_words(&Typed(clone.ram().clone()), word(own, tag, n));
                    let mut guest = ScriptedGuest::paused(0);
                    let deeper = clone.fork(&mut guest).expect("it is paused");
                    drop(clone);
                    let grandchild = deeper.spawn(CloneSpec::default()).expect("a clone");
                    for page in 0..RAM_PAGES {
                        let words = get_words(&Typed(grandchild.ram().clone()), page);
                        let expected = if page == own { word(page, tag, n) } else { word(page, 7, page) };
                        assert_eq!(check_at_rest(&words, expected), Ok(()), "page {page}");
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
fn wrong_pages_are_found() {
    let (_tree, vm, _) = running::<offshoot::backing::Heap>(Limits::default());
    let ram = Typed(vm.ram().clone());
    let good = Stamp { page: 3, tag: 9, sequence: 44 };
    put_words(&ram, good.word());
    let at_rest = |expected: Stamp| check_at_rest(&get_words(&ram, expected.page), expected.word());
    assert_eq!(at_rest(good), Ok(()));
    // What a reader finds who knows that 44 was written, and that 45 may have been begun.
    let racing = |page: u64, own: u64, inherited: Stamp| {
        let expected = soak::Expected {
            own,
            inherited: Stamp { page, ..inherited }.word(),
            from: good.word(),
            to: good.sequence + 1,
        };
        soak::check_racing(&get_words(&ram, page), expected)
    };
    let parents = Stamp { tag: 8, sequence: 40, ..good };
    assert_eq!(racing(3, 9, parents), Ok(()));
    for (place, at) in PLACES.into_iter().enumerate() {
        let at = GuestAddress::new(3 * PAGE + at);
        let old: u64 = vm.ram().load(at).expect("RAM");
        // A word of the page before the last write: torn, and lost if it is the one that is read first.
        vm.ram().store(at, soak::salted(Stamp { sequence: 43, ..good }.word(), place)).expect("RAM");
        assert_eq!(at_rest(good), Err(Wrong::Torn));
        let last = place == PLACES.len() - 1;
        assert_eq!(racing(3, 9, parents), Err(if last { Wrong::Lost } else { Wrong::Torn }), "place {place}");
        // A word of the next, with older ones before it, is what a writer leaves on its way, but only in that order.
        vm.ram().store(at, soak::salted(Stamp { sequence: 45, ..good }.word(), place)).expect("RAM");
        assert_eq!(racing(3, 9, parents), if place == 0 { Ok(()) } else { Err(Wrong::Torn) }, "place {place}");
        assert_eq!(at_rest(good), Err(Wrong::Torn));
        // Of the future, of another VM, of another page, of the VM that this one comes from but written later.
        for foreign in [
            Stamp { sequence: 46, ..good },
            Stamp { tag: 7, ..good },
            Stamp { page: 4, ..good },
            Stamp { sequence: 45, ..parents },
        ] {
            vm.ram().store(at, soak::salted(foreign.word(), place)).expect("RAM");
            assert_eq!(racing(3, 9, parents), Err(Wrong::Foreign), "place {place}: {foreign:?}");
        }
        // Any bit, and a word in another's place.
        for bit in 0..64 {
            vm.ram().store(at, old ^ 1 << bit).expect("RAM");
            assert_eq!(at_rest(good), Err(Wrong::Torn), "one bit of place {place}");
        }
        vm.ram().store(at, soak::salted(good.word(), (place + 1) % PLACES.len())).expect("RAM");
        assert!(at_rest(good).is_err() && racing(3, 9, parents).is_err(), "a word of another place");
        vm.ram().store(at, old).expect("RAM");
    }
    // A whole page in another's place, of another VM, or older.
    let mut page = vec![0; PAGE as usize];
    vm.ram().read(GuestAddress::new(3 * PAGE), &mut page).expect("RAM");
    vm.ram().write(GuestAddress::new(4 * PAGE), &page).expect("RAM");
    assert_eq!(at_rest(Stamp { page: 4, ..good }), Err(Wrong::Foreign));
    assert_eq!(at_rest(Stamp { tag: 10, ..good }), Err(Wrong::Foreign));
    assert_eq!(at_rest(Stamp { sequence: 45, ..good }), Err(Wrong::Lost));
    assert!(at_rest(Stamp { page: 5, ..good }).is_err(), "a page of zeroes carries no stamp");
}

impl<F: mutants::Has> Subject for mutants::Broken<F> {
    type Access = Typed<Self>;

    fn access(vm: &Vm<Self>) -> Typed<Self> {
        Typed(vm.ram().clone())
    }

    fn fork(vm: &Vm<Self>, guest: &mut Stopping<'_, Self>, _: u64) -> Result<Option<ForkPoint<Self>>, ForkError> {
        vm.fork(guest).map(Some)
    }
}

/// Soaks until a fault of the kind is found: whether threads meet in a short run is theirs to decide, and with so many runs they do.
fn soaked_until<S: Subject>(kind: fn(&Found) -> u64) -> Found {
    let mut found = Found::default();
    for _ in 0..300 {
        found += soak::<S>(20_000);
        if kind(&found) > 0 {
            break;
        }
    }
    found
}

/// The soak itself finds what it is there for.
#[test]
fn a_soak_over_a_broken_backing_finds_faults() {
    use mutants::{Broken, Flaw, Has};
    macro_rules! soaked {
        ($flaw:ident, $kind:expr) => {{
            #[derive(Debug)]
            struct Mutant;
            impl Has for Mutant {
                const FLAW: Flaw = Flaw::$flaw;
            }
            soaked_until::<Broken<Mutant>>($kind)
        }};
    }
    #[derive(Debug)]
    struct Unbroken;
    impl Has for Unbroken {
        const FLAW: Flaw = Flaw::None;
    }
    let found = soak::<Broken<Unbroken>>(100_000);
    assert_eq!(found.faults(), 0, "the control: {found}");
    let found = soaked!(ImageTears, |found| found.torn);
    assert!(found.torn > 0, "half of a page is older than the other: {found}");
    let found = soaked!(SiblingsShare, |found| found.foreign);
    assert!(found.foreign > 0, "clones see each other's pages: {found}");
    let found = soaked!(ImageFollowsParent, |found| found.foreign);
    assert!(found.foreign > 0, "a fork point changes: {found}");
    let found = soaked!(ImageMisses, |found| found.lost);
    assert!(found.lost > 0, "a page of a fork point is older than its instant: {found}");
}
