//! Whole VMs saved to files and brought back, against what cannot be avoided: copying, summing, writing and reading as many bytes. In the system's
//! temporary directory, or `OFFSHOOT_STORE_DIR`; all of it is in the page cache.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use offshoot::backing::{Backing, Heap, Mapped};
use offshoot::page::{ByteSize, PageSize};
use offshoot::ram::RamLayout;
use offshoot::store::{CloneName, CloneStore, Job, StoreOptions};
use offshoot::{AtRest, CloneSpec, DeviceState, ForkPoint, Reading, Vm, VmName};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{PAGE, fill, size_name, tree};

/// Bytes that the plain copies write and read at once.
const CHUNK: usize = 1 << 20;

struct Place(PathBuf);

impl Place {
    fn new() -> std::io::Result<Self> {
        let parent = std::env::var_os("OFFSHOOT_STORE_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = parent.join(format!("offshoot-figures-saved-{}", std::process::id()));
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

fn point<B: Backing>(len: ByteSize) -> Result<ForkPoint<B>, Skip> {
    let vm: Vm<B> = Vm::new(&tree(), VmName::new("saved")?, RamLayout::flat(len, PageSize::KIB_4)?, vec![])?;
    fill(vm.ram().space())?;
    vm.start()?;
    Ok(vm.fork(&mut AtRest(DeviceState::from_bytes(vec![7; 64 << 10])))?)
}

fn plain_write(path: &Path, chunk: &[u8], len: u64) -> f64 {
    let write = || -> std::io::Result<File> {
        let mut file = File::create(path)?;
        (0..len / CHUNK as u64).try_for_each(|_| file.write_all(chunk))?;
        file.sync_data()?;
        Ok(file)
    };
    timed(|| write().expect("room on the medium")).0
}

fn plain_read(path: &Path, len: u64) -> f64 {
    let read = || {
        let mut bytes = vec![0; len as usize];
        File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map(|()| bytes)
    };
    timed(|| read().expect("as long as it was written")).0
}

/// RAM of a backing to disk and back.
fn both_ways<B: Backing>(what: &str, reading: Reading, effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::gib(1));
    let place = Place::new()?;
    let store = CloneStore::open(place.0.join("store"), StoreOptions::default().tree(&tree()))?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    let saved = point::<B>(len)?;
    let (kept, plain) = (CloneName::new("kept")?, place.0.join("plain"));
    saved.save(&store, &kept, &threads, &Job::new())?;
    let chunk: Vec<u8> = (0..CHUNK).map(|at| at as u8 | 1).collect();
    let (memory, mut copy) = (vec![0x5a_u8; len.get() as usize], vec![0_u8; len.get() as usize]);
    let half = memory.len() / 2;

    let serial = Cell::new(0);
    let mut round = Round::new(effort);
    round.probe(|| {
        serial.set(serial.get() + 1);
        let name = CloneName::new(format!("{}", serial.get())).expect("a good name");
        let time = timed(|| saved.save(&store, &name, &threads, &Job::new()).expect("room on the medium")).0;
        store.delete(&name).expect("just saved");
        time
    });
    round.probe(|| plain_write(&plain, &chunk, len.get()));
    round.probe(|| {
        let checksum = |part: &[u8]| part.chunks(PAGE as usize).fold(0, |sum, page| sum ^ crc32fast::hash(page));
        timed(|| threads.join(|| checksum(&memory[..half]), || checksum(&memory[half..]))).0
    });
    round.probe(|| timed(|| copy.copy_from_slice(&memory)).0);
    let [save, write, checksum, copied] = round.run();
    // It can be no faster than the slowest of these. 0.7 times the rate is 1.43 times the time.
    let floors = [("a plain file, synced", write), ("CRC-32, 2 threads", checksum), ("a memory copy", copied)];
    let slowest = floors
        .into_iter()
        .max_by(|a, b| a.1.p50.total_cmp(&b.1.p50))
        .map(|(name, stats)| Baseline::new(format!("{name}, of as many bytes"), stats));
    let size = size_name(len);
    let mut row = |case: String, stats: Stats, baseline, goal| {
        report.row(&Row { case, unit: Unit::Milliseconds, stats, baseline, goal });
    };
    row(format!("save {size} of RAM, {what}, 2 threads"), save, slowest, Goal::Ratio(1.43));

    let load = |reading| ForkPoint::<B>::load(&store, &kept, reading, &threads, &Job::new()).expect("it was saved");
    let mut round = Round::new(effort);
    round.probe(|| timed(|| load(Reading::Now)).0);
    round.probe(|| timed(|| load(reading).spawn(CloneSpec::default()).expect("room for a clone")).0);
    round.probe(|| plain_read(&plain, len.get()));
    let [load, first, read] = round.run();
    let flat = || Some(Baseline::new("a plain file into new memory", read));
    row(format!("bring back {size} of RAM, {what}, 2 threads"), load, flat(), Goal::None);
    let how = if reading == Reading::Now { "read at once" } else { "read on demand" };
    row(format!("to the first clone of it, {what}, {how}"), first, flat(), Goal::None);
    Ok(())
}

/// Mapped RAM, and RAM on the heap.
pub fn saved(effort: &Effort, report: &mut Report) -> Outcome {
    both_ways::<Mapped>("mapped", Reading::Now, effort, report)?;
    both_ways::<Heap>("heap", Reading::OnDemand, effort, report)
}
