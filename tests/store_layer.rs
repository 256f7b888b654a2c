//! Sealed layers: what is written comes back, every flipped bit is found and named, nothing in a file can do harm, and the files that this version writes
//! are those that the documents describe.

#![cfg(unix)]

mod durable;

use std::sync::Mutex;

use durable::{PAGE, geometry, pages, read_all};
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::ByteOffset;
use offshoot::store::{DiskDir, DiskId, DurableImage, Job, LayerId, Progress};
use offshoot::testing::Dice;
use offshoot::testing::crash::{Recorder, Tearing};
use offshoot::{SpaceError, StoreError, Tree};

const PAGES: u64 = 1200;

fn dir(recorder: &Recorder) -> DiskDir {
    DiskDir::over(recorder.folder(), &Tree::default())
}

fn threads() -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("two threads")
}

/// A disk whose only layer is sealed: more pages than one block of checksums has, more extents than one block of the index.
fn sealed(recorder: &Recorder) -> (DiskId, LayerId, Vec<u8>) {
    let disk = dir(recorder).create(geometry(PAGES), None).unwrap();
    let mut dice = Dice::new(1);
    disk.write(ByteOffset::ZERO, &dice.bytes(600 * PAGE)).unwrap();
    for page in (600..PAGES).step_by(2) {
        disk.write(ByteOffset::new(page * PAGE), &dice.bytes(PAGE)).unwrap();
    }
    let below = disk.cut().unwrap().commit().0;
    disk.write(ByteOffset::ZERO, &dice.bytes(1100 * PAGE)).unwrap();
    for page in (1..PAGES).step_by(2) {
        disk.zero(pages(page, 1)).unwrap();
    }
    let want = read_all(&disk).unwrap();
    let image = disk.cut().unwrap().commit().0;
    // Merged into one: the lower layer's pages that show are in it too.
    let clone = image.flatten().unwrap().spawn().unwrap();
    clone.flush().unwrap();
    drop((disk, below));
    let layer = clone.origin().layer().unwrap().unwrap();
    assert!(layer.content.is_some());
    (clone.id(), layer.id, want)
}

fn image(recorder: &Recorder, id: DiskId) -> Result<DurableImage, SpaceError> {
    dir(recorder).open_image(id, None)
}

fn read(image: &DurableImage) -> Result<Vec<u8>, SpaceError> {
    let mut bytes = vec![0; Source::len(image).get() as usize];
    image.read(ByteOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

#[test]
fn what_was_sealed_comes_back() {
    let recorder = Recorder::new();
    let (id, _, want) = sealed(&recorder);
    let image = image(&recorder, id).unwrap();
    assert!(read(&image).unwrap() == want);
    Sealed::validate(&image).unwrap();
    let mut dice = Dice::new(2);
    for _ in 0..300 {
        let at = dice.below(PAGES * PAGE);
        let mut found = vec![0; dice.below((PAGES * PAGE - at).min(20_000)) as usize];
        image.read(ByteOffset::new(at), &mut found).unwrap();
        assert!(found == want[at as usize..at as usize + found.len()]);
    }
    let seen = Mutex::new(Vec::new());
    let tell = |progress: Progress| seen.lock().unwrap().push(progress);
    let verified = image.verify(&threads(), &Job::new().report(&tell));
    let verified = verified.unwrap();
    assert_eq!(verified.len(), 1);
    let (_, layer) = &verified[0];
    assert!(layer.damaged.is_empty() && layer.pages.get() > 500);
    let seen = seen.into_inner().unwrap();
    assert!(seen.iter().any(|progress| progress.done == progress.total));
}

/// One bit in each page of data: the read names it, and so does a verification; its neighbours are read.
#[test]
fn a_flipped_bit_in_any_page_is_found_and_named() {
    let recorder = Recorder::new();
    let (id, layer, want) = sealed(&recorder);
    let name = format!("{layer}.layer");
    let mut dice = Dice::new(4);
    let data_pages: Vec<u64> =
        (0..PAGES).filter(|page| want[(page * PAGE) as usize..((page + 1) * PAGE) as usize] != [0; 4096]).collect();
    for (in_file, page) in data_pages.iter().enumerate().step_by(41) {
        let at = ByteOffset::new((1 + in_file as u64) * PAGE + dice.below(PAGE));
        let bit = dice.below(8) as u32;
        assert!(recorder.flip(&name, at, bit));
        let image = image(&recorder, id).unwrap();
        let mut found = [0xa5; 512];
        let error = image.read(ByteOffset::new(page * PAGE + 512), &mut found).unwrap_err();
        match error {
            SpaceError::Store(StoreError::DamagedPage { file, page: named }) => {
                assert_eq!((&*file, named.get()), (&*name, *page));
            }
            other => panic!("{other}"),
        }
        assert_eq!(found, [0; 512], "damaged bytes were handed out");
        if in_file > 0 {
            image.read(ByteOffset::new(data_pages[in_file - 1] * PAGE), &mut found).unwrap();
        }
        assert!(recorder.flip(&name, at, bit));
    }
    for in_file in [0, 7, 255, 256, data_pages.len() - 1] {
        assert!(recorder.flip(&name, ByteOffset::new((1 + in_file as u64) * PAGE), 0));
    }
    let verified = image(&recorder, id).unwrap().verify(&threads(), &Job::new()).unwrap();
    let named: Vec<u64> = verified[0].1.damaged.pages().map(|page| page.get()).collect();
    assert_eq!(named, [0, 7, 255, 256, data_pages.len() - 1].map(|at| data_pages[at]));
}

/// A small disk whose only layer is sealed: three pages of data.
fn small(recorder: &Recorder) -> (DiskId, String) {
    let disk = dir(recorder).create(geometry(64), None).unwrap();
    disk.write(ByteOffset::new(5 * PAGE), &[7; 9000]).unwrap();
    let clone = disk.cut().unwrap().commit().0.flatten().unwrap().spawn().unwrap();
    clone.flush().unwrap();
    (clone.id(), format!("{}.layer", clone.origin().layer().unwrap().unwrap().id))
}

/// A bit of every byte of header, tables and trailer in a soak, of every fifth otherwise.
#[test]
fn a_flipped_bit_in_any_table_is_found() {
    let recorder = Recorder::new();
    let (id, name) = small(&recorder);
    let len = recorder.content(&name).unwrap().len() as u64;
    let step = if std::env::var("OFFSHOOT_SOAK").is_ok() { 1 } else { 5 };
    let tables = (0..PAGE).chain(4 * PAGE..len).step_by(step);
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for at in tables.map(ByteOffset::new) {
        let bit = (at.get() % 8) as u32;
        assert!(recorder.flip(&name, at, bit));
        let found = image(&recorder, id).and_then(|image| {
            let verified = image.verify(&threads, &Job::new())?;
            assert!(verified[0].1.damaged.is_empty());
            Ok(())
        });
        assert!(matches!(found, Err(SpaceError::Store(_))), "the bit at {at} was not found: {found:?}");
        assert!(recorder.flip(&name, at, bit));
    }
    image(&recorder, id).unwrap();
}

/// Every length that a file could be cut to, a block at a time and beside it.
#[test]
fn a_layer_cut_short_is_refused() {
    let recorder = Recorder::new();
    let (id, name) = small(&recorder);
    let whole = recorder.content(&name).unwrap();
    for len in (0..whole.len()).step_by(4096).flat_map(|len| [len, len + 1, len + 4095]) {
        recorder.place(&name, &whole[..len]);
        assert!(image(&recorder, id).is_err(), "{len} of {} bytes", whole.len());
    }
    let mut longer = whole.clone();
    longer.extend([0; 4096]);
    recorder.place(&name, &longer);
    assert!(image(&recorder, id).is_err());
    recorder.place(&name, &whole);
    image(&recorder, id).unwrap();
}

/// An overlay that is sealed while its disk and a clone run: both run on, and after any power cut both are there.
#[test]
fn sealing_changes_nothing_that_anybody_reads() {
    let recorder = Recorder::new();
    let (mut ids, mut want) = (Vec::new(), Vec::new());
    let begun;
    {
        let dir = dir(&recorder);
        let disk = dir.create(geometry(48), None).unwrap();
        disk.write(ByteOffset::new(100), &[1; 20_000]).unwrap();
        let first = disk.cut().unwrap().commit().0;
        disk.write(ByteOffset::new(9000), &[2; 20_000]).unwrap();
        disk.zero(pages(0, 2)).unwrap();
        let second = disk.cut().unwrap().commit().0;
        disk.write(ByteOffset::new(70_000), &[3; 5000]).unwrap();
        let clone = second.spawn().unwrap();
        clone.write(ByteOffset::new(60_000), &[4; 5000]).unwrap();
        disk.flush().unwrap();
        clone.flush().unwrap();
        begun = recorder.position();
        second.seal(&Job::new()).unwrap();
        first.seal(&Job::new()).unwrap();
        second.seal(&Job::new()).unwrap();
        for disk in [disk, clone] {
            ids.push(disk.id());
            want.push(read_all(&disk).unwrap());
            disk.validate().unwrap();
        }
    }
    assert!(recorder.folder().names().unwrap().iter().filter(|name| name.ends_with(".layer")).count() == 2);
    let log = recorder.log();
    let mut states = 0;
    for position in begun..=log.len() {
        for state in log.states_at(position, Tearing::Sectors, position as u64, 24) {
            for (id, want) in ids.iter().zip(&want) {
                let again = dir(&state).open_disk(*id, None).unwrap();
                assert!(read_all(&again).unwrap() == *want, "cut after call {position}");
                again.write(ByteOffset::ZERO, &[5; 512]).unwrap();
                again.flush().unwrap();
            }
            states += 1;
        }
    }
    assert!(states > 100, "{states} states");
}

/// What a crash left of a sealing is in nobody's way.
#[test]
fn a_layer_is_sealed_after_a_sealing_that_was_cut_off() {
    let recorder = Recorder::new();
    let disk = dir(&recorder).create(geometry(48), None).unwrap();
    disk.write(ByteOffset::new(100), &[1; 20_000]).unwrap();
    let image = disk.cut().unwrap().commit().0;
    let name = format!("{}.layer", image.layer().unwrap().unwrap().id);
    recorder.place(&format!("{name}.partial"), &[9; 5000]);
    image.seal(&Job::new()).unwrap();
    let names = recorder.folder().names().unwrap();
    assert!(names.contains(&name) && !names.iter().any(|name| name.ends_with("partial")), "{names:?}");
    let (id, want) = (disk.id(), read_all(&disk).unwrap());
    drop((disk, image));
    assert!(read_all(&dir(&recorder).open_disk(id, None).unwrap()).unwrap() == want);
}

/// Merging writes one layer with what its layers say, zeroes over something included, and it opens as such.
#[test]
fn a_merged_image_opens_as_it_was() {
    let recorder = Recorder::new();
    let disk = dir(&recorder).create(geometry(48), None).unwrap();
    disk.write(ByteOffset::ZERO, &Dice::new(1).bytes(20 * PAGE)).unwrap();
    let first = disk.cut().unwrap().commit().0;
    let mut last = first.clone();
    for round in 0..10u8 {
        disk.write(ByteOffset::new(u64::from(round) * 3000), &[round + 1; 3000]).unwrap();
        disk.zero(pages(u64::from(round) + 8, 1)).unwrap();
        last = disk.cut().unwrap().commit().0;
    }
    let merged = last.merge_onto(&first).unwrap().spawn().unwrap();
    merged.flush().unwrap();
    let (id, want) = (merged.id(), read_all(&disk).unwrap());
    drop((disk, last, first, merged));
    let again = dir(&recorder).open_disk(id, None).unwrap();
    assert!(read_all(&again).unwrap() == want);
    assert_eq!(again.usage().unwrap().layers, 2);
}

/// Copies are made by batches, which overlap in a pool: runs longer than a batch, and pages of zeroes anywhere in one.
#[test]
fn copies_are_the_same_in_a_pool_and_outside() {
    let recorder = Recorder::new();
    let disk = dir(&recorder).create(geometry(PAGES), None).unwrap();
    let mut dice = Dice::new(5);
    disk.write(ByteOffset::ZERO, &dice.bytes(PAGES * PAGE)).unwrap();
    let below = disk.cut().unwrap().commit().0;
    let mut bytes = dice.bytes(900 * PAGE);
    for page in bytes.chunks_exact_mut(PAGE as usize) {
        if dice.below(3) == 0 {
            page.fill(0);
        }
    }
    disk.write(ByteOffset::new(100 * PAGE), &bytes).unwrap();
    disk.zero(pages(400, 7)).unwrap();
    let want = read_all(&disk).unwrap();
    let top = disk.cut().unwrap().commit().0;
    let pool = threads();
    let ids = |images: [DurableImage; 2]| {
        images.map(|image| {
            assert!(read(&image).unwrap() == want);
            Sealed::validate(&image).unwrap();
            let verified = image.verify(&pool, &Job::new()).unwrap();
            assert!(verified.iter().all(|(_, found)| found.damaged.is_empty()));
            image.layer().unwrap().unwrap().content
        })
    };
    for [outside, inside] in [
        ids([top.flatten().unwrap(), pool.install(|| top.flatten()).unwrap()]),
        ids([top.merge_onto(&below).unwrap(), pool.install(|| top.merge_onto(&below)).unwrap()]),
    ] {
        assert!(outside.is_some() && outside == inside);
    }
    pool.install(|| top.seal(&Job::new())).unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop((top, below, disk));
    let opened = image(&recorder, id).unwrap();
    assert!(opened.layer().unwrap().unwrap().content.is_some() && read(&opened).unwrap() == want);
}

#[test]
fn equal_content_has_an_equal_id() {
    let recorder = Recorder::new();
    let content = |byte: u8| {
        let disk = dir(&recorder).create(geometry(48), None).unwrap();
        disk.write(ByteOffset::new(9000), &[byte; 9000]).unwrap();
        disk.cut().unwrap().commit().0.flatten().unwrap().layer().unwrap().unwrap().content.unwrap()
    };
    assert_eq!(content(1), content(1));
    assert_ne!(content(1), content(2));
}

const GOLDEN_DISK: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d01";
const GOLDEN_OVERLAY: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d02";
const GOLDEN_LAYER: &str = "3e5b7f10-65a4-4c3e-9d52-6f2a8c0b1d03";

/// The files in `tests/golden` as they are on disk; data of an overlay starts at 1 MiB, and is kept apart from the rest.
fn golden() -> Recorder {
    let path = |name: &str| format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let bytes = |name: &str| std::fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let recorder = Recorder::new();
    let mut overlay = bytes("v1.overlay.start");
    overlay.resize(1 << 20, 0);
    overlay.extend(bytes("v1.overlay.data"));
    recorder.place(&format!("{GOLDEN_OVERLAY}.overlay"), &overlay);
    recorder.place(&format!("{GOLDEN_DISK}.disk"), &bytes("v1.disk"));
    recorder.place(&format!("{GOLDEN_LAYER}.layer"), &bytes("v1.layer"));
    recorder
}

/// What the golden disk holds: see `fuzz/examples/store_seeds.rs`, which wrote it from the documents.
fn golden_content() -> Vec<u8> {
    let mut want = vec![0; 4 * PAGE as usize];
    // Page 0 from the layer, 1 hidden by a zero of the overlay, 2 from the overlay, 3 in neither.
    want[..PAGE as usize].fill(0x11);
    want[2 * PAGE as usize..3 * PAGE as usize].fill(0x33);
    want
}

/// Files of version 1 open for ever.
#[test]
fn golden_files_open() {
    let recorder = golden();
    let id = DiskId::parse(GOLDEN_DISK).unwrap();
    let disk = dir(&recorder).open_disk(id, None).unwrap();
    assert!(read_all(&disk).unwrap() == golden_content());
    disk.validate().unwrap();
    disk.write(ByteOffset::new(3 * PAGE), &[0x44; 512]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let image = image(&recorder, id).unwrap();
    assert_eq!(read(&image).unwrap()[3 * PAGE as usize], 0x44);
    let verified = image.verify(&threads(), &Job::new()).unwrap();
    assert_eq!((verified[0].1.pages.get(), verified[0].1.damaged.is_empty()), (2, true));
}
