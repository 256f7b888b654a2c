//! Whole layers of durable disks: verified, sealed, opened, and what an open disk takes of memory.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;

use offshoot::backing::{Backing, Sealed};
use offshoot::page::ByteSize;
use offshoot::store::{DiskDir, Durable, Job};
use rayon::prelude::*;

use super::alloc::live_bytes_of;
use super::options::Effort;
use super::place::{Place, everywhere};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{PAGE, at, cut, fill, geometry, needs_memory, size_name, tree};

const THREADS: usize = 2;
/// What the baselines read and write at once.
const PIECE: usize = 1 << 20;

pub fn layers(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, layers_in)
}

fn layers_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::gib(1));
    needs_memory(ByteSize::new(7 * len.get()))?;
    let dir = DiskDir::open(place.path(), &tree())?;
    let disk = dir.create(geometry(len)?, None)?;
    fill(&disk)?;
    let image = cut(&disk)?;
    let id = image.layer()?.expect("it was written").id;
    let sealed = image.flatten()?;
    let layer = place.path().join(format!("{}.layer", sealed.layer()?.expect("it has data").id));
    let threads = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build()?;
    let memory = vec![0x5a_u8; len.get() as usize];
    let mut other = vec![0x5b_u8; len.get() as usize];
    let file = File::open(&layer)?;
    let verify = || drop(sealed.verify(&threads, &Job::new()).expect("it is whole"));

    let (result, copy) = (place.path().join(format!("{id}.layer")), place.path().join("copy"));
    let mut round = Round::new(effort);
    round.probe(|| timed(verify).0);
    // What neither can be faster than.
    round.probe(|| {
        let checksum = |piece: &[u8]| piece.chunks(PAGE as usize).fold(0, |sum, page| sum ^ crc32fast::hash(page));
        timed(|| black_box(threads.install(|| memory.par_chunks(PIECE).map(checksum).sum::<u32>()))).0
    });
    round.probe(|| {
        let pieces = other.par_chunks_mut(PIECE).zip(memory.par_chunks(PIECE));
        timed(|| threads.install(|| pieces.for_each(|(to, from)| to.copy_from_slice(from)))).0
    });
    round.probe(|| timed(|| read_all(&threads, &file, len)).0);
    // A seal makes the file anew, whatever is there; what the last one left is taken away first.
    round.probe(|| {
        std::fs::remove_file(&result).ok();
        timed(|| threads.install(|| image.seal(&Job::new())).expect("room on the medium")).0
    });
    round.probe(|| {
        std::fs::remove_file(&copy).ok();
        timed(|| copy_file(&file, &copy, len).expect("room on the medium")).0
    });
    let [verify_time, checksum, memory_copy, pread, seal, file_copy] = round.run();
    let slower =
        if checksum.p50 > memory_copy.p50 { ("CRC-32 of memory", checksum) } else { ("a copy of memory", memory_copy) };
    let size = size_name(len);
    let mut row = |case: &str, stats: Stats, (name, baseline): (&str, Stats), goal: Goal| {
        let case = format!("{}: {case} {size}, {THREADS} threads", place.name);
        let baseline = Some(Baseline::new(name, baseline));
        report.row(&Row { case, unit: Unit::Milliseconds, stats, baseline, goal });
    };
    // 0.7 times the rate is 1.43 times the time.
    row("verify", verify_time, slower, Goal::Ratio(1.43));
    row("verify", verify_time, ("pread of the file", pread), Goal::None);
    row("seal", seal, slower, Goal::Ratio(1.43));
    row("seal", seal, ("a copy of the file, and sync", file_copy), Goal::None);
    row("copy of memory", memory_copy, ("CRC-32 of memory", checksum), Goal::None);

    #[cfg(target_os = "linux")]
    if place.name == "disk" {
        let mut round = Round::new(effort);
        let forget = || rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a file of our own");
        round.probe(|| {
            forget();
            timed(verify).0
        });
        round.probe(|| {
            forget();
            timed(|| read_all(&threads, &file, len)).0
        });
        let [verify, pread] = round.run();
        row("verify, nothing cached,", verify, ("pread of the file, nothing cached", pread), Goal::None);
    }
    Ok(())
}

fn read_all(threads: &rayon::ThreadPool, file: &File, len: ByteSize) {
    let pieces = (0..len.get() / PIECE as u64).into_par_iter();
    let read = |buf: &mut Vec<u8>, piece| file.read_exact_at(buf, piece * PIECE as u64).expect("inside the file");
    threads.install(|| pieces.for_each_init(|| vec![0; PIECE], read));
}

fn copy_file(from: &File, to: &Path, len: ByteSize) -> std::io::Result<()> {
    let to = OpenOptions::new().write(true).create_new(true).open(to)?;
    let mut piece = vec![0; PIECE];
    for at in (0..len.get()).step_by(PIECE) {
        from.read_exact_at(&mut piece, at)?;
        to.write_all_at(&piece, at)?;
    }
    to.sync_data()
}

/// How a disk was written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Nothing,
    /// From the start on.
    Together,
    /// Every 16th page: no two beside each other.
    Apart,
}

pub fn open(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, open_in)
}

fn open_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let changed = effort.pick(ByteSize::mib(64), ByteSize::gib(1));
    let (sparse, huge) = (ByteSize::gib(64), ByteSize::gib(1024));
    let per_gib = (1u64 << 30) as f64 / changed.get() as f64;
    let dir = DiskDir::open(place.path(), &tree())?;

    let extents = dir.create(geometry(sparse)?, None)?;
    (0..10_000).try_for_each(|n| extents.write(at(n * (6 << 20) / PAGE), &[0x77; PAGE as usize]))?;
    extents.flush()?;
    let empty = dir.create(geometry(huge)?, None)?;
    empty.write(at(0), &[0x77; PAGE as usize])?;
    empty.flush()?;
    let ids = [extents.id(), empty.id()];
    drop((extents, empty));
    let mut round = Round::new(effort);
    for id in ids {
        let dir = &dir;
        round.probe(move || timed(|| dir.open_disk(id, None).expect("nobody else has it")).0);
    }
    let [extents, empty] = round.run();
    for (case, stats) in [("64 GiB in 10,000 extents", extents), ("1 TiB, one page written", empty)] {
        let case = format!("{}: open {case}", place.name);
        report.row(&Row { case, unit: Unit::Milliseconds, stats, baseline: None, goal: Goal::None });
    }

    needs_memory(ByteSize::new(4 * changed.get()))?;
    // What a disk of 64 GiB takes before anything is written is no part of what a change costs.
    let mut fixed = [0.0; 2];
    for (case, len, written) in [
        ("1 TiB, empty", huge, Written::Nothing),
        ("64 GiB, empty", sparse, Written::Nothing),
        ("for a GiB changed, together", sparse, Written::Together),
        ("for a GiB changed, every 16th page", sparse, Written::Apart),
    ] {
        let (making, disk) = live_bytes_of(|| written_disk(&dir, len, changed, written));
        let disk = disk?;
        let id = disk.id();
        cut(&disk)?.seal(&Job::new())?;
        disk.flush()?;
        drop(disk);
        let (opened, disk) = live_bytes_of(|| dir.open_disk(id, None));
        drop(disk?);
        let found = [making, opened];
        let told = if written == Written::Nothing {
            fixed = found;
            found
        } else {
            [0, 1].map(|how| (found[how] - fixed[how]) * per_gib)
        };
        for (how, bytes) in ["as it is written", "opened again, sealed"].into_iter().zip(told) {
            let case = format!("{}: memory, {case}, {how}", place.name);
            report.row(&Row {
                case,
                unit: Unit::Bytes,
                stats: Stats::exactly(bytes),
                baseline: None,
                goal: Goal::None,
            });
        }
    }
    Ok(())
}

fn written_disk(dir: &DiskDir, len: ByteSize, changed: ByteSize, written: Written) -> Result<Durable, Skip> {
    let disk = dir.create(geometry(len)?, None)?;
    let step = match written {
        Written::Nothing => return Ok(disk),
        Written::Together => 1,
        Written::Apart => 16,
    };
    (0..changed.get() / PAGE).try_for_each(|n| disk.write(at(n * step), &[0x77; PAGE as usize]))?;
    Ok(disk)
}
