//! Durable disks against flat bytes: random families on real files, with everything that can be done to them, opened again and again.

#![cfg(unix)]

mod durable;

use std::path::PathBuf;
use std::sync::Arc;

use durable::{PAGE, geometry, pages, read_all};
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::ByteOffset;
use offshoot::store::{DiskDir, DiskId, Durable, DurableImage, Job};
use offshoot::testing::crash::{Fault, Recorder};
use offshoot::testing::{ByteSource, Dice};
use offshoot::{Tree, TreeUsage};

const PAGES: u64 = 72;

struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A disk, what it holds, and what a reset goes back to.
struct Pair {
    disk: Durable,
    bytes: Vec<u8>,
    origin: Vec<u8>,
}

struct Family {
    path: PathBuf,
    base: Option<Arc<dyn Source>>,
    tree: Tree,
    dir: DiskDir,
    disks: Vec<Pair>,
    images: Vec<(DurableImage, Vec<u8>)>,
}

impl Family {
    fn cut(&mut self, at: usize) {
        let pair = &mut self.disks[at];
        let (image, later) = pair.disk.cut().unwrap().commit();
        drop(later);
        pair.origin = pair.bytes.clone();
        self.images.push((image, pair.bytes.clone()));
    }

    /// Everything is flushed and closed, and the disks are opened in another order.
    fn reopen(&mut self) {
        let closed: Vec<(DiskId, Vec<u8>)> = self
            .disks
            .drain(..)
            .map(|pair| {
                pair.disk.flush().unwrap();
                (pair.disk.id(), pair.bytes)
            })
            .collect();
        self.images.clear();
        assert_eq!(self.tree.usage(), TreeUsage::default(), "all was dropped");
        self.tree = Tree::default();
        self.dir = DiskDir::open(&self.path, &self.tree).unwrap();
        for (id, bytes) in closed.into_iter().rev() {
            let disk = self.dir.open_disk(id, self.base.clone()).unwrap();
            let mut origin = vec![0; bytes.len()];
            disk.origin().read(ByteOffset::ZERO, &mut origin).unwrap();
            self.disks.push(Pair { disk, bytes, origin });
        }
        self.check();
    }

    fn check(&self) {
        for pair in &self.disks {
            assert!(read_all(&pair.disk).unwrap() == pair.bytes, "a disk differs from its model");
            pair.disk.validate().unwrap();
            let usage = pair.disk.usage().unwrap();
            assert_eq!(usage.private.get() + usage.shared.get() + usage.zero.get(), PAGES);
        }
        for (image, bytes) in &self.images {
            let mut found = vec![0; bytes.len()];
            image.read(ByteOffset::ZERO, &mut found).unwrap();
            assert!(found == *bytes, "an image differs from its model");
            Sealed::validate(image).unwrap();
        }
    }

    fn step(&mut self, dice: &mut Dice) {
        let at = dice.below(self.disks.len() as u64) as usize;
        let some_image = |dice: &mut Dice, images: &[_]| dice.below(images.len() as u64) as usize;
        match dice.below(24) {
            0..8 => {
                let from = dice.below(PAGES * PAGE);
                let len = dice.below((PAGES * PAGE - from).min(3 * PAGE)) + 1;
                let data = dice.bytes(len);
                self.disks[at].disk.write(ByteOffset::new(from), &data).unwrap();
                self.disks[at].bytes[from as usize..from as usize + data.len()].copy_from_slice(&data);
            }
            8..11 => {
                let first = dice.below(PAGES);
                let count = dice.below((PAGES - first).min(9)) + 1;
                self.disks[at].disk.zero(pages(first, count)).unwrap();
                self.disks[at].bytes[(first * PAGE) as usize..((first + count) * PAGE) as usize].fill(0);
            }
            11..13 => self.disks[at].disk.flush().unwrap(),
            13..15 => self.cut(at),
            15 if self.disks.len() < 4 && !self.images.is_empty() => {
                let (image, bytes) = &self.images[some_image(dice, &self.images)];
                let disk = image.spawn().unwrap();
                self.disks.push(Pair { disk, bytes: bytes.clone(), origin: bytes.clone() });
            }
            16 => {
                self.disks[at].disk.reset().unwrap();
                self.disks[at].bytes = self.disks[at].origin.clone();
            }
            17 if !self.images.is_empty() => self.images[some_image(dice, &self.images)].0.seal(&Job::new()).unwrap(),
            18 if self.images.len() > 1 => {
                let (a, b) = (some_image(dice, &self.images), some_image(dice, &self.images));
                if let Ok(merged) = self.images[a].0.merge_onto(&self.images[b].0) {
                    let bytes = self.images[a].1.clone();
                    self.images.push((merged, bytes));
                }
            }
            // A flattened disk lies over no base, so it goes when all is opened over the one base again.
            19 if self.base.is_none() && !self.images.is_empty() => {
                let at = some_image(dice, &self.images);
                let flat = self.images[at].0.flatten().unwrap();
                let bytes = self.images[at].1.clone();
                self.images.push((flat, bytes));
            }
            20 if self.disks.len() > 1 => drop(self.disks.swap_remove(at)),
            21 if self.images.len() > 2 => drop(self.images.swap_remove(some_image(dice, &self.images))),
            22 => drop(self.disks[at].disk.cut().unwrap()),
            23 => self.reopen(),
            _ => self.check(),
        }
    }
}

#[test]
fn random_families_agree_with_flat_bytes() {
    let seeds = if std::env::var("OFFSHOOT_SOAK").is_ok() { 200 } else { 6 };
    for seed in 0..seeds {
        let path = std::env::temp_dir().join(format!("offshoot-model-{seed}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let temp = Temp(path.clone());
        let mut dice = Dice::new(seed);
        let len = [None, Some(20 * PAGE + 77), Some(PAGES * PAGE)][seed as usize % 3];
        let base_bytes = len.map(|len| dice.bytes(len));
        let base = base_bytes.clone().map(|bytes| Arc::new(ByteSource::new(bytes)) as Arc<dyn Source>);
        let tree = Tree::default();
        let dir = DiskDir::open(&temp.0, &tree).unwrap();
        let disk = dir.create(geometry(PAGES), base.clone()).unwrap();
        let mut bytes = base_bytes.unwrap_or_default();
        bytes.resize((PAGES * PAGE) as usize, 0);
        let disks = vec![Pair { disk, origin: bytes.clone(), bytes }];
        let mut family = Family { path, base, tree, dir, disks, images: Vec::new() };
        (0..120).for_each(|_| family.step(&mut dice));
        family.reopen();
    }
}

/// A discard is queued, the page is written again, and then the discard's turn comes: what was written stays.
#[test]
fn a_page_written_again_is_not_punched() {
    let recorder = Recorder::new();
    let dir = DiskDir::over(recorder.folder(), &Tree::default());
    let disk = dir.create(geometry(64), None).unwrap();
    let mut dice = Dice::new(1);
    for _ in 0..50 {
        let (page, other) = (dice.below(60), dice.below(60));
        disk.write(ByteOffset::new(page * PAGE), &dice.bytes(PAGE)).unwrap();
        disk.flush().unwrap();
        disk.zero(pages(page, 3)).unwrap();
        disk.write(ByteOffset::new(page * PAGE + 512), &dice.bytes(512)).unwrap();
        disk.zero(pages(other, 2)).unwrap();
        disk.write(ByteOffset::new(other * PAGE + 4000), &dice.bytes(500)).unwrap();
        let want = read_all(&disk).unwrap();
        disk.flush().unwrap();
        disk.flush().unwrap();
        assert!(read_all(&disk).unwrap() == want);
        disk.validate().unwrap();
    }
}

/// A punch that was refused waits for the next flush; a page that is written until then is taken out of it.
#[test]
fn a_page_written_while_its_punch_waits_is_not_punched() {
    let mut waited = 0;
    for n in 1..40 {
        let recorder = Recorder::new();
        let disk = DiskDir::over(recorder.folder(), &Tree::default()).create(geometry(64), None).unwrap();
        disk.write(ByteOffset::ZERO, &[1; 4 * PAGE as usize]).unwrap();
        disk.flush().unwrap();
        disk.zero(pages(0, 4)).unwrap();
        recorder.fail_nth(n, Fault::Io);
        let flushed = disk.flush();
        let calls = recorder.calls();
        recorder.fail_nth(0, Fault::Io);
        // Where a sync failed the disk takes no more.
        if flushed.is_ok() && calls >= n {
            waited += 1;
            disk.write(ByteOffset::new(PAGE), &[2; 2 * PAGE as usize]).unwrap();
            disk.flush().unwrap();
            let all = read_all(&disk).unwrap();
            let page = |page: usize| (all[page * PAGE as usize], all[(page + 1) * PAGE as usize - 1]);
            assert_eq!([page(0), page(1), page(2), page(3)], [(0, 0), (2, 2), (2, 2), (0, 0)]);
        }
    }
    assert!(waited > 0, "no punch was refused");
}

/// Guest data goes nowhere but to its own place: whatever is written and discarded, records and map change only when the disk is flushed.
#[test]
fn guest_data_never_touches_records_or_map() {
    let recorder = Recorder::new();
    let dir = DiskDir::over(recorder.folder(), &Tree::default());
    let disk = dir.create(geometry(64), None).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
    disk.flush().unwrap();
    let name = recorder.folder().names().unwrap().into_iter().find(|name| name.ends_with(".overlay")).unwrap();
    let start = |recorder: &Recorder| recorder.content(&name).unwrap()[..1 << 20].to_vec();
    let before = start(&recorder);
    let mut dice = Dice::new(2);
    for _ in 0..200 {
        let at = dice.below(64 * PAGE);
        let data = dice.bytes((64 * PAGE - at).min(70_000));
        disk.write(ByteOffset::new(at), &data).unwrap();
        disk.zero(pages(dice.below(60), 4)).unwrap();
    }
    assert!(start(&recorder) == before);
    assert_eq!(recorder.content(&name).unwrap().len() as u64, (1 << 20) + 64 * PAGE);
}

/// Handles of one disk and its relatives go in every order; the last one to go leaves everything as it was flushed, and unlocked.
#[test]
fn handles_are_dropped_in_any_order() {
    for order in 0..24u64 {
        let path = std::env::temp_dir().join(format!("offshoot-order-{order}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let temp = Temp(path);
        let dir = DiskDir::open(&temp.0, &Tree::default()).unwrap();
        let disk = dir.create(geometry(16), None).unwrap();
        disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
        let image = disk.cut().unwrap().commit().0;
        let clone = image.spawn().unwrap();
        clone.write(ByteOffset::ZERO, &[2; 512]).unwrap();
        disk.write(ByteOffset::ZERO, &[3; 512]).unwrap();
        clone.flush().unwrap();
        disk.flush().unwrap();
        let ids = [(disk.id(), 3), (clone.id(), 2)];
        let mut handles: Vec<Box<dyn std::any::Any>> =
            vec![Box::new(disk), Box::new(image), Box::new(clone), Box::new(dir)];
        let mut left = order;
        for choices in (1..=4u64).rev() {
            drop(handles.swap_remove((left % choices) as usize));
            left /= choices;
        }
        for (id, byte) in ids {
            let again = DiskDir::open(&temp.0, &Tree::default()).unwrap().open_disk(id, None).unwrap();
            assert_eq!(read_all(&again).unwrap()[0], byte);
        }
    }
}

/// All that queue threads share is shared by type, not by copies.
#[test]
fn a_disk_is_shared_by_reference() {
    fn shared<T: Send + Sync>() {}
    shared::<Durable>();
    shared::<DurableImage>();
    shared::<DiskDir>();
}
