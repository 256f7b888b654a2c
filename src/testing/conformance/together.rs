//! Several threads at once: what a held cut keeps out, and that relatives do not disturb one another.
//!
//! No verdict here depends on time: a correct backing passes under every interleaving.

use std::sync::mpsc;
use std::time::Duration;

use super::Bench;
use crate::backing::{Backing, Cut, Sealed, Tree};
use crate::error::SpaceError;
use crate::page::{ByteOffset, ByteSize, PageSize};
use crate::testing::Dice;
use crate::testing::pair::{Pair, broken, geometry, ok, on_a_tree};

pub(super) fn run<B: Backing>() {
    for bytes in [4 << 10, 2 << 20] {
        let Ok(size) = PageSize::new(ByteSize::new(bytes)) else { unreachable!("a power of two in range") };
        if !super::supports::<B>(size) {
            continue;
        }
        for base in [None, Some(bytes + 100)] {
            let bench = Bench::<B>::new(size, base);
            on_a_tree(crate::Limits::default(), |tree| a_held_cut_keeps_writers_out(&bench, tree));
        }
        on_a_tree(crate::Limits::default(), |tree| relatives_do_not_disturb::<B>(size, tree));
        on_a_tree(crate::Limits::default(), |tree| first_writes_race::<B>(size, tree));
    }
}

/// A write that races with a cut waits or is refused; it lands in the space after the cut, never in the image.
fn a_held_cut_keeps_writers_out<B: Backing>(bench: &Bench<B>, tree: &Tree) {
    let mut pair = bench.space(tree);
    pair.write(0, b"before");
    for commit in [true, false] {
        let space = &pair.space;
        let (image, written) = std::thread::scope(|scope| {
            let cut = ok("cut", space.cut());
            let (started, at_the_door) = mpsc::channel();
            let (done, came_through) = mpsc::channel();
            let writer = scope.spawn(move || {
                started.send(()).ok();
                let result = space.write(ByteOffset::ZERO, b"during");
                done.send(()).ok();
                result
            });
            at_the_door.recv().ok();
            // A chance for a wrong backing to let it through; a right one makes this wait for nothing.
            let early = came_through.recv_timeout(Duration::from_millis(20)).is_ok();
            let image = commit.then(|| cut.commit().0);
            let written = match writer.join() {
                Ok(Ok(())) => true,
                Ok(Err(SpaceError::Busy { .. })) => false,
                Ok(Err(error)) => broken("write while a cut is held", error),
                Err(panic) => std::panic::resume_unwind(panic),
            };
            if early && written {
                broken("a held cut", "a write got through while the cut was held");
            }
            (image, written)
        });
        if let Some(image) = image {
            let mut found = [0; 6];
            ok("read of an image", crate::image::Source::read(&image, ByteOffset::ZERO, &mut found));
            if &found != b"before" {
                broken("a held cut", "a write that raced with the cut is in its image");
            }
            pair.origin = pair.now.clone();
        }
        if written {
            pair.now.write(ByteOffset::ZERO, b"during");
        }
        pair.check("after a write that raced with a cut");
        pair.write(0, b"before");
    }
}

/// Clones write and reset, the parent is cut again and again, and each sees only its own.
fn relatives_do_not_disturb<B: Backing>(size: PageSize, tree: &Tree) {
    let mut parent: Pair<B> = Pair::create(tree, geometry(size, 6), None);
    parent.write(0, &Dice::new(8).bytes(3 * size.bytes().get()));
    let image = parent.cut();
    let rounds = if size == PageSize::KIB_4 { 30 } else { 4 };
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let mut clone = image.spawn();
            scope.spawn(move || {
                let mut dice = Dice::new(seed + 50);
                for _ in 0..rounds {
                    clone.random_step(&mut dice);
                    clone.check("while relatives run on other threads");
                }
            });
        }
        let mut dice = Dice::new(49);
        for _ in 0..rounds {
            parent.random_step(&mut dice);
            let point = parent.cut();
            point.spawn().check("spawned while relatives run on other threads");
            image.check("while its clones run on other threads");
        }
    });
}

/// Many threads' first writes to the same shared pages, each to its own words: none may be lost.
fn first_writes_race<B: Backing>(size: PageSize, tree: &Tree) {
    const THREADS: u64 = 4;
    let mut parent: Pair<B> = Pair::create(tree, geometry(size, 4), None);
    parent.write(0, &Dice::new(9).bytes(4 * size.bytes().get()));
    let image = parent.cut();
    for round in 0..if size == PageSize::KIB_4 { 40 } else { 4 } {
        let mut clone = image.spawn();
        let start = std::sync::Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (space, start) = (&clone.space, &start);
                scope.spawn(move || {
                    start.wait();
                    for page in 0..4 {
                        // Three bytes each, so that neighbours share words.
                        let at = page * size.bytes().get() + 3 * thread;
                        ok("write", space.write(ByteOffset::new(at), &[thread as u8 + 1, round, page as u8]));
                    }
                });
            }
        });
        for thread in 0..THREADS {
            for page in 0..4 {
                let at = ByteOffset::new(page * size.bytes().get() + 3 * thread);
                clone.now.write(at, &[thread as u8 + 1, round, page as u8]);
            }
        }
        clone.check("after first writes of several threads to the same pages");
        image.check("whose clone's threads raced");
        // Its own cut must hold all of them too.
        let point = clone.cut();
        point.check("cut after a race of first writes");
        if ok("diff", point.image.diff(&image.image)).count().get() != 4 {
            broken("diff", "four pages were written");
        }
    }
}
