//! Writes, cuts, resets and discards of a heap space in every order that shuttle thinks of: `RUSTFLAGS="--cfg shuttle" cargo test --lib
//! shuttle`.
//!
//! What each test asks is whether the outcome is that of some order of whole operations.

use std::sync::Arc;

use shuttle::thread;

use super::{Heap, HeapImage, Page4K};
use crate::Tree;
use crate::backing::{Backing, Cut, Sealed};
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageRange, PageSize};

const SCHEDULES: usize = 2_000;
type Image = HeapImage<Page4K>;

fn explore(test: fn()) {
    crate::sync::interleavings::explore(SCHEDULES, test);
}

/// A space of two pages whose first is shared with `image`, holding `old!`.
fn shared() -> (Arc<Heap>, Image) {
    let geometry = Geometry::new(ByteSize::kib(8), PageSize::KIB_4).unwrap();
    let parent: Heap = Heap::create(&Tree::default(), geometry, None).unwrap();
    parent.write(ByteOffset::ZERO, b"old!old!old!").unwrap();
    let (image, deferred) = parent.cut().unwrap().commit();
    drop(deferred);
    (Arc::new(image.spawn().unwrap()), image)
}

fn four(space: &impl Reads, at: u64) -> [u8; 4] {
    let mut four = [0; 4];
    space.bytes(ByteOffset::new(at), &mut four);
    four
}

trait Reads {
    fn bytes(&self, at: ByteOffset, buf: &mut [u8]);
}

impl Reads for Heap {
    fn bytes(&self, at: ByteOffset, buf: &mut [u8]) {
        self.read(at, buf).unwrap();
    }
}

impl Reads for Image {
    fn bytes(&self, at: ByteOffset, buf: &mut [u8]) {
        Source::read(self, at, buf).unwrap();
    }
}

fn write(space: &Arc<Heap>, at: u64, data: &'static [u8]) -> thread::JoinHandle<()> {
    let space = space.clone();
    thread::spawn(move || space.write(ByteOffset::new(at), data).unwrap())
}

fn check(space: &Heap, image: &Image) {
    space.validate().unwrap();
    Sealed::validate(image).unwrap();
    assert_eq!(&four(image, 0), b"old!", "the image that both lie on never changes");
    assert_eq!(&four(image, 8), b"old!");
}

#[test]
fn shuttle_first_writes_of_one_page_are_all_kept() {
    explore(|| {
        let (space, image) = shared();
        // Two in different words, two in one word.
        let writers = [write(&space, 0, b"aaaa"), write(&space, 4, b"bbbb"), write(&space, 8, b"cccc")];
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!([four(&*space, 0), four(&*space, 4), four(&*space, 8)], [*b"aaaa", *b"bbbb", *b"cccc"]);
        check(&space, &image);
        // What the next cut seals has them too.
        let (cut, _deferred) = space.cut().unwrap().commit();
        assert_eq!([four(&cut, 0), four(&cut, 4), four(&cut, 8)], [*b"aaaa", *b"bbbb", *b"cccc"]);
    });
}

#[test]
fn shuttle_what_was_written_is_dirty() {
    explore(|| {
        let (space, image) = shared();
        let writers = [(0, b"aaaa"), (4, b"bbbb")].map(|(at, data)| {
            let space = space.clone();
            thread::spawn(move || {
                space.write(ByteOffset::new(at), data).unwrap();
                // Whoever's page it became, it is known by the time either write returns.
                assert!(space.dirty().unwrap().contains(PageIndex::ZERO), "written, and not dirty");
            })
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        check(&space, &image);
    });
}

#[test]
fn shuttle_a_write_lands_on_one_side_of_a_cut() {
    explore(|| {
        let (space, image) = shared();
        let writers = [write(&space, 0, b"aaaa"), write(&space, 8, b"cccc")];
        let cutter = {
            let space = space.clone();
            thread::spawn(move || {
                let (cut, deferred) = space.cut().unwrap().commit();
                drop(deferred);
                (four(&cut, 0), four(&cut, 8), cut)
            })
        };
        let (first, second, cut) = cutter.join().unwrap();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert!(first == *b"aaaa" || first == *b"old!");
        assert!(second == *b"cccc" || second == *b"old!");
        assert_eq!((four(&cut, 0), four(&cut, 8)), (first, second), "a sealed image changed");
        assert_eq!((four(&*space, 0), four(&*space, 8)), (*b"aaaa", *b"cccc"), "a write was lost at a cut");
        let dirty = space.dirty().unwrap().contains(PageIndex::ZERO);
        assert_eq!(dirty, first == *b"old!" || second == *b"old!", "dirty is what came after the cut");
        check(&space, &image);
    });
}

#[test]
fn shuttle_a_cut_that_is_undone_loses_nothing() {
    explore(|| {
        let (space, image) = shared();
        let writers = [write(&space, 0, b"aaaa"), write(&space, 4096, b"dddd")];
        let cutter = {
            let space = space.clone();
            thread::spawn(move || {
                let cut = space.cut().unwrap();
                thread::yield_now();
                drop(cut);
            })
        };
        cutter.join().unwrap();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!((four(&*space, 0), four(&*space, 4096)), (*b"aaaa", *b"dddd"));
        assert!(space.origin().same(&image));
        check(&space, &image);
    });
}

#[test]
fn shuttle_a_reset_takes_all_or_nothing_of_a_write() {
    explore(|| {
        let (space, image) = shared();
        let writer = write(&space, 4094, b"wwww");
        let resetter = {
            let space = space.clone();
            thread::spawn(move || space.reset().unwrap().get())
        };
        let dropped = resetter.join().unwrap();
        writer.join().unwrap();
        let found = four(&*space, 4094);
        match dropped {
            0 => assert_eq!(found, *b"wwww", "the write came after"),
            2 => assert_eq!(found, [0; 4], "the write came before"),
            other => panic!("{other} pages dropped: a write across two pages is one"),
        }
        check(&space, &image);
    });
}

#[test]
fn shuttle_a_discard_takes_all_or_nothing_of_a_write() {
    explore(|| {
        let (space, image) = shared();
        let writer = write(&space, 2, b"ww");
        let discarder = {
            let space = space.clone();
            thread::spawn(move || space.zero(PageRange::one(PageIndex::ZERO)).unwrap())
        };
        discarder.join().unwrap();
        writer.join().unwrap();
        let found = four(&*space, 0);
        assert!(found == [0; 4] || found == *b"\0\0ww", "{found:?}: what was below showed through");
        assert_eq!(four(&*space, 8), [0; 4]);
        check(&space, &image);
    });
}

#[test]
fn shuttle_a_sibling_sees_nothing() {
    explore(|| {
        let (space, image) = shared();
        let sibling = Arc::new(image.spawn().unwrap());
        let writers = [write(&space, 0, b"aaaa"), write(&sibling, 4, b"ssss")];
        let reader = {
            let sibling = sibling.clone();
            thread::spawn(move || assert_eq!(&four(&*sibling, 0), b"old!", "a sibling's write was seen"))
        };
        reader.join().unwrap();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!((four(&*space, 4), four(&*sibling, 0)), (*b"old!", *b"old!"));
        check(&space, &image);
        check(&sibling, &image);
    });
}

/// The exploration reaches the orders in which it matters: without a lock around it, a read and a write of a word lose one.
#[test]
fn shuttle_a_lost_write_would_be_found() {
    let found = std::panic::catch_unwind(|| {
        explore(|| {
            let (space, _) = shared();
            let writers = [(0, b'a'), (1, b'b')].map(|(at, byte)| {
                let space = space.clone();
                thread::spawn(move || {
                    let mut word = four(&*space, 0);
                    word[at] = byte;
                    space.write(ByteOffset::ZERO, &word).unwrap();
                })
            });
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            assert_eq!(&four(&*space, 0)[..2], b"ab");
        });
    });
    assert!(found.is_err(), "a write that reads the word and writes it back passed");
}
