//! Durable disks in one process, one request at a time and sixteen, against plain files in the same place. All of it in the system's cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use offshoot::backing::{Backing, Sealed};
use offshoot::image::Source;
use offshoot::page::ByteSize;
use offshoot::store::{DiskDir, Durable};
use rayon::ThreadPool;

use super::options::Effort;
use super::place::{Place, everywhere};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, Stats, timed};
use super::subject::{PAGE, at, cut, geometry, needs_memory, tree};
use super::tools::{self, Requests};

/// Requests of a sample, of each thread.
pub const REQUESTS: u64 = 1000;
/// Requests in flight where there are many: a thread for each, for the calls wait.
const MANY: usize = 16;
/// Scatters a sequence of pages: a prime.
const APART: u64 = 7919;

pub type Page = [u8; PAGE as usize];

/// A file with every page written.
pub fn plain_file(path: &Path, len: ByteSize) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let page: Page = [0x55; PAGE as usize];
    (0..len.get() / PAGE).try_for_each(|at| file.write_all_at(&page, at * PAGE))?;
    file.sync_all()?;
    Ok(file)
}

/// The mean time of a call with a random page out of `pages`, in nanoseconds.
pub fn mean(random: &mut Random, pages: u64, mut call: impl FnMut(u64)) -> f64 {
    timed(|| (0..REQUESTS).for_each(|_| call(random.next() % pages))).0 / REQUESTS as f64
}

/// The time of a call while each thread of a pool makes them one after the other: all time by all calls.
fn mean_of_many(threads: &ThreadPool, seed: &mut u64, pages: u64, call: impl Fn(u64) + Sync) -> f64 {
    *seed += MANY as u64;
    let base = *seed;
    let all = || {
        threads.broadcast(|thread| {
            let mut random = Random::new(base + thread.index() as u64);
            (0..REQUESTS).for_each(|_| call(random.next() % pages));
        })
    };
    timed(all).0 / (REQUESTS * MANY as u64) as f64
}

pub fn requests(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, requests_in)
}

fn requests_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::mib(512));
    needs_memory(ByteSize::new(6 * len.get()))?;
    let pages = len.get() / PAGE;
    let page: Page = [0x77; PAGE as usize];
    let file = plain_file(&place.path().join("plain"), len)?;
    let dir = DiskDir::open(place.path(), &tree())?;
    let disk = dir.create(geometry(len)?, None)?;
    (0..pages).try_for_each(|index| disk.write(at(index), &page))?;
    let origin = cut(&disk)?;
    let own = origin.spawn()?;
    (0..pages).try_for_each(|index| own.write(at(index), &page))?;
    own.flush()?;
    let sealed = origin.flatten()?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(MANY).build()?;

    let read = |index: u64| own.read(at(index), &mut [0; PAGE as usize]).expect("inside the disk");
    let pread = |index: u64| file.read_exact_at(&mut [0; PAGE as usize], index * PAGE).expect("inside the file");
    let checked = |index: u64| sealed.read(at(index), &mut [0; PAGE as usize]).expect("inside the disk");
    let write = |index: u64| own.write(at(index), &page).expect("inside the disk");
    let pwrite = |index: u64| file.write_all_at(&page, index * PAGE).expect("inside the file");
    let mut round = Round::new(effort);
    one_by_one(&mut round, pages, &read);
    one_by_one(&mut round, pages, &pread);
    one_by_one(&mut round, pages, &checked);
    one_by_one(&mut round, pages, &write);
    one_by_one(&mut round, pages, &pwrite);
    many(&mut round, &threads, pages, &read);
    many(&mut round, &threads, pages, &pread);
    many(&mut round, &threads, pages, &write);
    many(&mut round, &threads, pages, &pwrite);
    round.probe(|| first_writes(&origin.spawn().expect("room for a clone"), pages, &page));
    round.probe(|| {
        let path = place.path().join("fresh");
        let file = File::create_new(&path).expect("a new file");
        file.set_len(len.get()).expect("a sparse file");
        file.write_all_at(&page, 0).expect("inside the file");
        let write = |n| file.write_all_at(&page, scattered(n, pages) * PAGE).expect("inside the file");
        let time = timed(|| (0..REQUESTS).for_each(write)).0 / REQUESTS as f64;
        std::fs::remove_file(&path).expect("our own file");
        time
    });
    let [read, pread, checked, write, pwrite, reads, preads, writes, pwrites, first, fresh] = round.run();
    // 0.9 times a plain file's rate is 1.11 times its time.
    for (case, stats, name, baseline, goal) in [
        ("random read, an own page", read, "pread of a plain file", pread, Goal::Ratio(1.11)),
        ("random read, 16 threads", reads, "pread of a plain file, 16 threads", preads, Goal::Ratio(1.11)),
        ("random read, sealed layer, checked", checked, "pread of a plain file", pread, Goal::None),
        ("random write, an own page", write, "pwrite of a plain file", pwrite, Goal::Ratio(1.11)),
        ("random write, 16 threads", writes, "pwrite of a plain file, 16 threads", pwrites, Goal::Ratio(1.11)),
        ("first write to a shared page", first, "a write to an own page", write, Goal::Ratio(1.3)),
        ("first write to a shared page", first, "a write to a hole of a plain file", fresh, Goal::None),
    ] {
        row(report, place, case, stats, name, baseline, goal);
    }
    let [first, warm] = qcow2_writes(place, pages)?;
    let name = "qemu-img bench, cluster written before";
    row(report, place, "qcow2: first write to a shared cluster", first, name, warm, Goal::None);
    Ok(())
}

fn one_by_one<'a>(round: &mut Round<'a>, pages: u64, call: &'a impl Fn(u64)) {
    let mut random = Random::new(5);
    round.probe(move || mean(&mut random, pages, call));
}

fn many<'a>(round: &mut Round<'a>, threads: &'a ThreadPool, pages: u64, call: &'a (impl Fn(u64) + Sync)) {
    let mut seed = 5;
    round.probe(move || mean_of_many(threads, &mut seed, pages, call));
}

fn scattered(n: u64, pages: u64) -> u64 {
    (n + 1) * APART % pages
}

fn first_writes(clone: &Durable, pages: u64, page: &Page) -> f64 {
    // The file itself is made at the first write of all.
    clone.write(at(0), page).expect("inside the disk");
    let write = |n| clone.write(at(scattered(n, pages)), page).expect("inside the disk");
    timed(|| (0..REQUESTS).for_each(write)).0 / REQUESTS as f64
}

/// The first write to clusters of an overlay, and the second.
fn qcow2_writes(place: &Place, pages: u64) -> Result<[Stats; 2], Skip> {
    let (base, overlay) = (place.path().join("plain"), place.path().join("overlay.qcow2"));
    // Each in a cluster of its own: there are sixteen pages to one.
    let writes = Requests::Writes((pages / 16).min(4096));
    let first = tools::a_few(|| {
        tools::qcow2_over(&overlay, &base, "raw")?;
        tools::qemu_bench(&overlay, writes)
    })?;
    Ok([first, tools::a_few(|| tools::qemu_bench(&overlay, writes))?])
}

pub fn row(report: &mut Report, place: &Place, case: &str, stats: Stats, name: &str, baseline: Stats, goal: Goal) {
    let case = format!("{}: {case}", place.name);
    let baseline = Some(Baseline::new(name, baseline));
    report.row(&Row { case, unit: Unit::Nanoseconds, stats, baseline, goal });
}
