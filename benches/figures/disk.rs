//! The disk face in one process, against `pread` and `pwrite` of a plain file in memory.

use std::fs::File;

use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, Lba, SECTOR_SIZE, SectorCount};
use offshoot::{CloneSpec, DiskName, Vm, VmName};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{Idle, PAGE, needs_memory, tree};
use offshoot::backing::Heap;
use offshoot::page::PageSize;
use offshoot::ram::RamLayout;

const REQUESTS: u64 = 200;
const SECTORS_A_PAGE: u64 = PAGE / SECTOR_SIZE;

/// A file in memory where the system has one, else a temporary file.
#[cfg(target_os = "linux")]
fn plain_file(len: ByteSize) -> Result<File, Skip> {
    super::bare::filled_memfd(len)
}

#[cfg(not(target_os = "linux"))]
fn plain_file(_: ByteSize) -> Result<File, Skip> {
    Err(Skip::new("a plain file in memory is made on Linux only"))
}

#[cfg(unix)]
pub fn requests(effort: &Effort, report: &mut Report) -> Outcome {
    use std::os::unix::fs::FileExt;

    let len = effort.pick(ByteSize::mib(128), ByteSize::gib(1));
    needs_memory(ByteSize::new(2 * len.get()))?;
    let tree = tree();
    let disk = Disk::blank(&tree, SectorCount::new(len.get() / SECTOR_SIZE), Access::ReadWrite)?;
    let page = [0x77; PAGE as usize];
    let pages = len.get() / PAGE;
    (0..pages).try_for_each(|at| disk.write(Lba::new(at * SECTORS_A_PAGE), &page))?;
    let ram = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent")?, ram, vec![(DiskName::new("root"), disk)])?;
    vm.start()?;
    let point = vm.fork(&mut Idle)?;
    let fresh = || {
        let clone = point.spawn(CloneSpec::default()).expect("room for a clone");
        clone.disk("root").expect("the parent's disk").clone()
    };
    let warm = fresh();
    (0..pages / 2).try_for_each(|at| warm.write(Lba::new(at * 2 * SECTORS_A_PAGE), &page))?;
    let file = plain_file(len)?;
    let mean = |time: f64| time / REQUESTS as f64;

    let mut buf = page;
    let mut random = Random::new(21);
    let mut round = Round::new(effort);
    round.probe(|| {
        let read = |_| warm.read(Lba::new(random.next() % pages * SECTORS_A_PAGE), &mut buf).expect("inside the disk");
        mean(timed(|| (0..REQUESTS).for_each(read)).0)
    });
    let (mut other, mut file_random) = (page, Random::new(22));
    round.probe(|| {
        let read = |_| file.read_exact_at(&mut other, file_random.next() % pages * PAGE).expect("inside the file");
        mean(timed(|| (0..REQUESTS).for_each(read)).0)
    });
    let mut random = Random::new(23);
    round.probe(|| {
        let at = |random: &mut Random| Lba::new(random.next() % (pages / 2) * 2 * SECTORS_A_PAGE);
        mean(timed(|| (0..REQUESTS).for_each(|_| warm.write(at(&mut random), &page).expect("inside the disk"))).0)
    });
    let mut random = Random::new(24);
    round.probe(|| {
        let clone = fresh();
        let at = |random: &mut Random| Lba::new(random.next() % pages * SECTORS_A_PAGE);
        mean(timed(|| (0..REQUESTS).for_each(|_| clone.write(at(&mut random), &page).expect("inside the disk"))).0)
    });
    let mut random = Random::new(25);
    round.probe(|| {
        let write = |_| file.write_all_at(&page, random.next() % pages * PAGE).expect("inside the file");
        mean(timed(|| (0..REQUESTS).for_each(write)).0)
    });
    let [read, pread, write, first, pwrite] = round.run();
    for (case, stats, name, bare) in [
        ("random read, half of it the clone's own", read, "pread", pread),
        ("random write, the clone's own", write, "pwrite", pwrite),
        ("random write, shared before", first, "pwrite", pwrite),
    ] {
        report.row(&Row {
            case: case.into(),
            unit: Unit::Nanoseconds,
            stats,
            baseline: Some(Baseline::new(format!("{name} of a file in memory"), bare)),
            goal: Goal::None,
        });
    }
    Ok(())
}

#[cfg(not(unix))]
pub fn requests(_: &Effort, _: &mut Report) -> Outcome {
    Err(Skip::new("needs pread and pwrite"))
}
