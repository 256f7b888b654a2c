//! Many clones alive at once, each having written and been checked: what one more costs, what each holds, and what it takes to drop all.

use std::time::Instant;

use offshoot::backing::Mapped;
use offshoot::page::{ByteSize, GuestAddress, Lba, SECTOR_SIZE};
use offshoot::{CloneSpec, ForkPoint, Vm};

use super::alloc::live_bytes_of;
use super::bare::{View, filled_memfd};
use super::options::Effort;
use super::process::{bytes_in, mappings};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Stats, timed};
use super::subject::{PAGE, fork_point, needs_memory, size_name};

/// Pages of RAM that each clone writes.
const WRITES: u64 = 4;

/// Where clone `n` writes its `k`-th page: not all in the same places.
fn place(n: u64, k: u64, len: ByteSize) -> GuestAddress {
    let pages = len.get() / PAGE;
    GuestAddress::new((n * 7919 + k * (pages / WRITES)) % pages * PAGE)
}

/// A clone runs: writes pages and a sector, all its own.
fn write(clone: &Vm<Mapped>, n: u64, len: ByteSize) -> Outcome {
    for k in 0..WRITES {
        clone.ram().store(place(n, k, len), n * WRITES + k + 1)?;
    }
    let disk = clone.disk("root").ok_or_else(|| Skip::new("it had a disk"))?;
    let mut sector = [0; SECTOR_SIZE as usize];
    sector[..8].copy_from_slice(&n.to_ne_bytes());
    disk.write(Lba::new(n), &sector)?;
    Ok(())
}

/// What it wrote is there, and nobody else's: checked with all others alive.
fn check(clone: &Vm<Mapped>, n: u64, len: ByteSize) -> Outcome {
    for k in 0..WRITES {
        let found = clone.ram().load::<u64>(place(n, k, len))?;
        assert_eq!(found, n * WRITES + k + 1, "clone {n} reads another's page");
        let theirs = place(n + 1, k, len);
        let own = (0..WRITES).any(|k| place(n, k, len) == theirs);
        let found = clone.ram().load::<u64>(theirs)?;
        assert!(own || found != (n + 1) * WRITES + k + 1, "clone {n} reads the next one's page");
    }
    let mut sector = [0; SECTOR_SIZE as usize];
    clone.disk("root").ok_or_else(|| Skip::new("it had a disk"))?.read(Lba::new(n), &mut sector)?;
    assert_eq!(sector[..8], n.to_ne_bytes(), "clone {n} reads another's sector");
    Ok(())
}

/// Resident memory of this process, each page divided by how often it is mapped.
fn proportional() -> Result<f64, Skip> {
    bytes_in("/proc/self/smaps_rollup", "Pss")
}

fn counted(case: String, unit: Unit, value: f64, baseline: Option<Baseline>) -> Row {
    Row { case, unit, stats: Stats::exactly(value), baseline, goal: Goal::None }
}

/// The median of 101 spawns.
fn one_more(point: &ForkPoint<Mapped>) -> Stats {
    let spawn = || {
        let (time, clone) = timed(|| point.spawn(CloneSpec::default()).expect("room for a clone"));
        drop(clone);
        time
    };
    Stats::of((0..101).map(|_| spawn()).collect())
}

/// Clones of a VM with RAM and a disk, without a hypervisor.
pub fn engine(effort: &Effort, report: &mut Report) -> Outcome {
    let (count, len) = effort.pick((2_000, ByteSize::mib(256)), (10_000, ByteSize::gib(1)));
    needs_memory(ByteSize::new(len.get() + count * 64 * 1024))?;
    let point = fork_point::<Mapped>(len)?;
    let each = |total: f64| total / count as f64;

    let file = filled_memfd(ByteSize::mib(1))?;
    let views = || (0..count).map(|_| View::private(&file, len)).collect::<Result<Vec<_>, Skip>>();
    let (bare_time, views) = timed(views);
    let (bare_drop, ()) = timed(|| drop(views));

    let first = one_more(&point);
    let maps = mappings()?;
    let clones = || (0..count).map(|_| point.spawn(CloneSpec::default())).collect::<Result<Vec<_>, _>>();
    let (time, clones) = timed(clones);
    let clones = clones?;
    let idle = each(mappings()? - maps);
    let last = one_more(&point);
    let (pss, tables) = (proportional()?, bytes_in("/proc/self/status", "VmPTE")?);
    let (writing, written) = timed(|| clones.iter().zip(0..).try_for_each(|(clone, n)| write(clone, n, len)));
    written?;
    let (pss, tables) = (proportional()? - pss, bytes_in("/proc/self/status", "VmPTE")? - tables);
    let maps = each(mappings()? - maps);
    clones.iter().zip(0..).try_for_each(|(clone, n)| check(clone, n, len))?;
    let (dropping, ()) = timed(|| drop(clones));
    let (heap, clones) = live_bytes_of(|| -> Result<Vec<_>, Skip> {
        let clones = (0..count).map(|_| point.spawn(CloneSpec::default())).collect::<Result<Vec<_>, _>>()?;
        clones.iter().zip(0..).try_for_each(|(clone, n)| write(clone, n, len))?;
        Ok(clones)
    });
    drop(clones?);

    let of = format!("one of {count}, {}", size_name(len));
    let bare = |stats| Some(Baseline::new("bare mmap, bare munmap", Stats::exactly(stats)));
    report.row(&counted(format!("{of}: spawn"), Unit::Microseconds, each(time), bare(each(bare_time))));
    report.row(&Row {
        case: format!("one more, with {count} alive"),
        unit: Unit::Microseconds,
        stats: last,
        baseline: Some(Baseline::new("with none", first)),
        goal: Goal::Ratio(1.2),
    });
    report.row(&counted(format!("{of}: {WRITES} pages, 1 sector"), Unit::Microseconds, each(writing), None));
    report.row(&Row { goal: Goal::Median(1.01), ..counted("kernel mappings, idle".into(), Unit::Count, idle, None) });
    report.row(&counted("kernel mappings, having written".into(), Unit::Count, maps, None));
    let pages = Baseline::new("the pages written", Stats::exactly(((WRITES + 1) * PAGE) as f64));
    report.row(&counted("resident (PSS), by what it wrote".into(), Unit::Bytes, each(pss), Some(pages)));
    report.row(&counted("page tables, by what it wrote".into(), Unit::Bytes, each(tables), None));
    report.row(&counted("engine's heap, with disk page".into(), Unit::Bytes, each(heap), None));
    report.row(&counted(format!("{of}: drop"), Unit::Microseconds, each(dropping), bare(each(bare_drop))));
    Ok(())
}

/// Machines of a process are told of each change of its address space: what a first write costs with more and more of them.
#[cfg(target_arch = "x86_64")]
pub fn machines(effort: &Effort, report: &mut Report) -> Outcome {
    use super::process::allow_descriptors;
    use super::toucher::Toucher;
    const TOUCHED: u64 = 16;
    let count = effort.pick(200, 1000);
    allow_descriptors(3 * count)?;
    let len = ByteSize::mib(64);
    let toucher = Toucher::new(len, TOUCHED)?;
    let spawn = || -> Result<_, Skip> {
        let clone = toucher.point.spawn(CloneSpec::default())?;
        let mut machine = toucher.machine(&clone)?;
        Toucher::run(&mut machine);
        Ok((machine, clone))
    };
    drop(spawn()?);
    let before = [first_writes(&toucher.point, Before::Nothing)?, first_writes(&toucher.point, Before::Read)?];
    let (pss, start) = (proportional()?, Instant::now());
    let mut made = Vec::new();
    let mut times = Vec::new();
    for _ in 0..count {
        let (time, one) = timed(spawn);
        made.push(one?);
        times.push(time);
    }
    let total = start.elapsed().as_secs_f64() * 1e9;
    let pss = proportional()? - pss;
    let after = [first_writes(&toucher.point, Before::Nothing)?, first_writes(&toucher.point, Before::Read)?];
    // Each wrote its count-down to its pages; nobody wrote another's.
    for (n, (machine, clone)) in made.iter_mut().enumerate() {
        let at = GuestAddress::new(super::toucher::FIRST * PAGE);
        assert_eq!(clone.ram().load::<u32>(at)?, TOUCHED as u32);
        clone.ram().store(GuestAddress::new(0x5000), n as u64)?;
        Toucher::run(machine);
    }
    for (n, (_, clone)) in made.iter().enumerate() {
        assert_eq!(clone.ram().load::<u64>(GuestAddress::new(0x5000))?, n as u64, "another's write");
    }
    let (dropping, ()) = timed(|| drop(made));
    let tenth = times.len() / 10;
    let (first, last) = (Stats::of(times[..tenth].to_vec()), Stats::of(times[times.len() - tenth..].to_vec()));
    let each = |total: f64| total / count as f64;
    report.row(&counted(format!("one of {count}, cold, run once"), Unit::Microseconds, each(total), None));
    report.row(&Row {
        case: format!("the last tenth of {count}"),
        unit: Unit::Microseconds,
        stats: last,
        baseline: Some(Baseline::new("the first tenth", first)),
        goal: Goal::None,
    });
    for ((case, before), after) in ["never read", "read before"].into_iter().zip(before).zip(after) {
        report.row(&Row {
            case: format!("first write to a page {case}, {count} machines"),
            unit: Unit::Microseconds,
            stats: after,
            baseline: Some(Baseline::new("with none", before)),
            goal: Goal::None,
        });
    }
    let pages = Baseline::new("the pages written", Stats::exactly((TOUCHED * PAGE) as f64));
    report.row(&counted("resident (PSS) of one".into(), Unit::Bytes, each(pss), Some(pages)));
    report.row(&counted(format!("drop of one of {count}"), Unit::Microseconds, each(dropping), None));
    Ok(())
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Read,
}

/// The time of a clone's first write to a page, which nobody has touched, or which it has read.
#[cfg(target_arch = "x86_64")]
fn first_writes(point: &ForkPoint<Mapped>, before: Before) -> Result<Stats, Skip> {
    const PAGES: u64 = 64;
    let clone = point.spawn(CloneSpec::default())?;
    let at = |n| GuestAddress::new((1024 + n) * PAGE);
    if before == Before::Read {
        (0..PAGES).try_for_each(|n| clone.ram().load::<u64>(at(n)).map(drop))?;
    }
    let times = (0..PAGES).map(|n| {
        let (time, done) = timed(|| clone.ram().store(at(n), 1_u64));
        done.map(|()| time)
    });
    Ok(Stats::of(times.collect::<Result<_, _>>()?))
}

/// Figures of the whole host once they stand still: machines that are gone are freed a while after.
#[cfg(target_arch = "x86_64")]
fn settled(read: &impl Fn() -> Result<Vec<f64>, Skip>) -> Result<Vec<f64>, Skip> {
    const CLOSE: f64 = 256.0 * 1024.0;
    let mut last = read()?;
    for _ in 0..30 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = read()?;
        let still = last.iter().zip(&now).all(|(last, now)| (last - now).abs() < CLOSE);
        last = now;
        if still {
            break;
        }
    }
    Ok(last)
}

/// What a KVM clone holds that was made ready and never run, in the engine, the process and the kernel.
#[cfg(target_arch = "x86_64")]
pub fn idle_machines(effort: &Effort, report: &mut Report) -> Outcome {
    use super::process::allow_descriptors;
    use super::toucher::Toucher;
    let count: u64 = effort.pick(50, 200);
    allow_descriptors(3 * count)?;
    let toucher = Toucher::new(ByteSize::gib(1), 1)?;
    let make = || -> Result<Vec<_>, Skip> {
        let one = || {
            let clone = toucher.point.spawn(CloneSpec::default())?;
            Ok((toucher.machine(&clone)?, clone))
        };
        (0..count).map(|_| one()).collect()
    };
    drop(make()?);
    let each = |total: f64| total / count as f64;
    let clones_only = || (0..count).map(|_| toucher.point.spawn(CloneSpec::default())).collect::<Result<Vec<_>, _>>();
    let (engine, clones) = live_bytes_of(clones_only);
    drop(clones?);
    let (heap, made) = live_bytes_of(make);
    drop(made?);

    let host = ["Slab", "KernelStack", "PageTables", "SecPageTables", "Percpu", "VmallocUsed"];
    let read = || -> Result<Vec<f64>, Skip> {
        let mut all = vec![bytes_in("/proc/self/smaps_rollup", "Rss")?, bytes_in("/proc/self/status", "VmPTE")?];
        for key in host {
            all.push(bytes_in("/proc/meminfo", key)?);
        }
        all.push(-bytes_in("/proc/meminfo", "MemFree")?);
        Ok(all)
    };
    let before = settled(&read)?;
    let made = make()?;
    let after = settled(&read)?;
    drop(made);
    report
        .row(&Row { goal: Goal::Median(16384.0), ..counted("engine's heap".into(), Unit::Bytes, each(engine), None) });
    report.row(&counted("heap, with the machine's objects".into(), Unit::Bytes, each(heap), None));
    let names = ["process: resident", "process: page tables"].into_iter().map(String::from);
    let names =
        names.chain(host.into_iter().map(|key| format!("host: {key}"))).chain(["host: less memory free".into()]);
    for ((name, before), after) in names.zip(before).zip(after) {
        report.row(&counted(name, Unit::Bytes, each(after - before), None));
    }
    Ok(())
}
