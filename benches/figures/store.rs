//! Durable disks in one process, against plain files in the same directory: the system's temporary one, or `OFFSHOOT_STORE_DIR`.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageCount, PageSize};
use offshoot::store::{DiskDir, Durable, DurableImage, Job};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{PAGE, tree};

const REQUESTS: u64 = 200;

struct Place(PathBuf);

impl Place {
    fn new() -> std::io::Result<Self> {
        let parent = std::env::var_os("OFFSHOOT_STORE_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = parent.join(format!("offshoot-figures-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Left behind, it is a temporary file like any other.
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn geometry(len: ByteSize) -> Result<Geometry, offshoot::SpaceError> {
    Ok(Geometry::new(len, PageSize::KIB_4)?)
}

fn plain_file(path: &Path, len: u64) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let page = [0x55; PAGE as usize];
    (0..len / PAGE).try_for_each(|at| file.write_all_at(&page, at * PAGE))?;
    file.sync_all()?;
    Ok(file)
}

fn cut(disk: &Durable) -> Result<DurableImage, offshoot::SpaceError> {
    Ok(disk.cut()?.commit().0)
}

/// Random 4 KiB requests, all of it in the page cache.
pub fn requests(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(64u64 << 20, 512 << 20);
    let pages = len / PAGE;
    let place = Place::new()?;
    let dir = DiskDir::open(&place.0, &tree())?;
    let page = [0x77; PAGE as usize];
    let file = plain_file(&place.0.join("plain"), len)?;
    let disk = dir.create(geometry(ByteSize::new(len))?, None)?;
    (0..pages).try_for_each(|at| disk.write(ByteOffset::new(at * PAGE), &page))?;
    let shallow = cut(&disk)?.spawn()?;
    // Every layer has a part of the pages, so that a look-up ends in any of them.
    for layer in 0..63 {
        for at in (layer..pages).step_by(63) {
            disk.write(ByteOffset::new(at * PAGE), &page)?;
        }
        cut(&disk)?;
    }
    let deep = disk.origin().spawn()?;
    let warm = disk.origin().spawn()?;
    (0..pages).try_for_each(|at| warm.write(ByteOffset::new(at * PAGE), &page))?;
    warm.flush()?;
    let origin = disk.origin();
    let sealed = origin.flatten()?;
    // What 64 files cost the system, whoever reads them.
    let files: Vec<File> = (0..64u64)
        .map(|n| {
            let path = place.0.join(format!("sparse-{n}"));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
            (n..pages).step_by(64).try_for_each(|at| file.write_all_at(&page, at * PAGE))?;
            Ok(file)
        })
        .collect::<std::io::Result<_>>()?;
    let mean = |time: f64| time / REQUESTS as f64;
    let mut round = Round::new(effort);
    for (seed, disk) in [(1, &warm), (2, &shallow), (3, &deep)] {
        let (mut random, mut buf) = (Random::new(seed), page);
        round.probe(move || {
            let read = |_| disk.read(ByteOffset::new(random.next() % pages * PAGE), &mut buf).expect("inside the disk");
            mean(timed(|| (0..REQUESTS).for_each(read)).0)
        });
    }
    let (mut random, mut buf) = (Random::new(4), page);
    round.probe(|| {
        let read = |_| sealed.read(ByteOffset::new(random.next() % pages * PAGE), &mut buf).expect("inside the disk");
        mean(timed(|| (0..REQUESTS).for_each(read)).0)
    });
    let (mut random, mut buf) = (Random::new(5), page);
    round.probe(|| {
        let read = |_| file.read_exact_at(&mut buf, random.next() % pages * PAGE).expect("inside the file");
        mean(timed(|| (0..REQUESTS).for_each(read)).0)
    });
    let (mut random, mut buf) = (Random::new(8), page);
    round.probe(|| {
        let mut read = |at: u64| files[at as usize % 64].read_exact_at(&mut buf, at * PAGE).expect("inside the file");
        // The last pages are not in all of the files.
        mean(timed(|| (0..REQUESTS).for_each(|_| read(random.next() % (pages - 64)))).0)
    });
    let mut random = Random::new(6);
    round.probe(|| {
        let write = |_| warm.write(ByteOffset::new(random.next() % pages * PAGE), &page).expect("inside the disk");
        mean(timed(|| (0..REQUESTS).for_each(write)).0)
    });
    round.probe(|| {
        let clone = origin.spawn().expect("room for a clone");
        // The file itself is made at the first write of all.
        clone.write(ByteOffset::ZERO, &page).expect("inside the disk");
        let write = |at| clone.write(ByteOffset::new((at + 1) * 7 % pages * PAGE), &page).expect("inside the disk");
        mean(timed(|| (0..REQUESTS).for_each(write)).0)
    });
    let mut random = Random::new(7);
    round.probe(|| {
        let write = |_| file.write_all_at(&page, random.next() % pages * PAGE).expect("inside the file");
        mean(timed(|| (0..REQUESTS).for_each(write)).0)
    });
    let [own, one, many, checked, pread, files, write, first, pwrite] = round.run();
    let baseline = |name: &str, stats| Some(Baseline::new(name, stats));
    // 0.9 times a plain file's rate is 1.11 times its time.
    for (case, stats, baseline, goal) in [
        ("random read, the clone's own page", own, baseline("pread of a plain file", pread), Goal::Ratio(1.11)),
        ("random read, 64 layers", many, baseline("the same with 1 layer", one), Goal::Ratio(1.05)),
        ("random read, 64 layers", many, baseline("pread of 64 sparse files", files), Goal::Ratio(1.11)),
        ("random read, sealed layer, checked", checked, baseline("pread of a plain file", pread), Goal::None),
        ("random write, the clone's own page", write, baseline("pwrite of a plain file", pwrite), Goal::Ratio(1.11)),
        ("first write to a shared page", first, baseline("a write to an own page", write), Goal::Ratio(1.3)),
    ] {
        report.row(&Row { case: case.into(), unit: Unit::Nanoseconds, stats, baseline, goal });
    }
    Ok(())
}

/// A clone of a 64 GiB disk with 10,000 extents: in memory, and durable under a name of its own. And verifying a sealed layer.
pub fn clones(effort: &Effort, report: &mut Report) -> Outcome {
    let place = Place::new()?;
    let dir = DiskDir::open(&place.0, &tree())?;
    let disk = dir.create(geometry(ByteSize::gib(64))?, None)?;
    let page = [0x77; PAGE as usize];
    for extent in 0..10_000 {
        disk.write(ByteOffset::new(extent * (6 << 20)), &page)?;
    }
    let image = cut(&disk)?;
    // The first clone freezes its parent.
    image.spawn()?.flush()?;
    let serial = Cell::new(0);
    let mut round = Round::new(effort);
    round.probe(|| timed(|| image.spawn().expect("room for a clone")).0);
    round.probe(|| {
        timed(|| {
            let clone = image.spawn().expect("room for a clone");
            clone.flush().expect("room on the medium");
            clone
        })
        .0
    });
    round.probe(|| {
        serial.set(serial.get() + 1);
        let path = place.0.join(format!("plain-{}", serial.get()));
        timed(|| {
            let file = File::create_new(&path).expect("a new file");
            file.write_all_at(&[1; 8192], 0).expect("room on the medium");
            file.sync_data().expect("a sync");
            File::open(&place.0).and_then(|dir| dir.sync_all()).expect("a sync of the directory");
            file
        })
        .0
    });
    let [spawn, durable, plain] = round.run();
    let rows = [
        ("a clone of 64 GiB in 10,000 extents", spawn, None, Goal::Median(100.0)),
        (
            "the same, durable",
            durable,
            Some(Baseline::new("a file of 8 KiB, synced with its directory", plain)),
            Goal::None,
        ),
    ];
    for (case, stats, baseline, goal) in rows {
        report.row(&Row { case: case.into(), unit: Unit::Microseconds, stats, baseline, goal });
    }
    drop(disk);

    let len = effort.pick(ByteSize::mib(64), ByteSize::gib(1));
    let pages = PageSize::KIB_4.page_of(ByteOffset::new(len.get())).get();
    let disk = dir.create(geometry(len)?, None)?;
    let bytes: Vec<u8> = (0..PAGE).map(|at| at as u8 | 1).collect();
    (0..pages).try_for_each(|at| disk.write(ByteOffset::new(at * PAGE), &bytes))?;
    let sealed = cut(&disk)?.flatten()?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let half = vec![0x5a_u8; len.get() as usize / 2];
    let mut round = Round::new(effort);
    round.probe(|| timed(|| sealed.verify(&threads, &Job::new()).expect("it is whole")).0);
    // What it cannot be faster than: the checksum of as many bytes, on as many threads.
    round.probe(|| {
        let checksum = || half.chunks(PAGE as usize).fold(0, |sum, page| sum ^ crc32fast::hash(page));
        let both = || std::thread::scope(|scope| [0, 1].map(|_| scope.spawn(checksum)).map(|thread| thread.join()));
        timed(both).0
    });
    let [verify, checksum] = round.run();
    let case = format!("verify {} of a sealed layer, 2 threads", PageCount::new(pages));
    let baseline = Some(Baseline::new("CRC-32 of as much memory, 2 threads", checksum));
    // 0.7 times the rate is 1.43 times the time.
    report.row(&Row { case, unit: Unit::Milliseconds, stats: verify, baseline, goal: Goal::Ratio(1.43) });
    Ok(())
}
