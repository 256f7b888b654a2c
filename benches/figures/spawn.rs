//! Spawning: a clone's RAM, 64 GiB disk and device state, engine only; flat in resident RAM and in siblings. And what an idle clone holds.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use offshoot::backing::{Backing, Heap};
use offshoot::page::ByteSize;
use offshoot::{CloneSpec, ForkPoint};

use super::alloc::live_bytes_of;
use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{fork_point, needs_memory, size_name, spawned};

fn spawn_sample<B: Backing>(point: &ForkPoint<B>) -> impl FnMut() -> f64 + '_ {
    move || {
        let (time, clone) = timed(|| point.spawn(CloneSpec::default()).expect("room for a clone"));
        drop(clone);
        time
    }
}

/// What a backing is compared with: the name, and a sampler for RAM of that size.
type Bare<'a> = (String, Box<dyn FnMut() -> f64 + 'a>);

fn sizes<B: Backing>(
    backing: &str,
    effort: &Effort,
    report: &mut Report,
    bare: impl Fn(ByteSize) -> Result<Bare<'static>, Skip>,
) -> Outcome {
    let lens = effort.pick([64, 256, 1024], [64, 1024, 8192]).map(ByteSize::mib);
    needs_memory(ByteSize::new(lens.iter().map(|len| len.get()).sum::<u64>() + lens[1].get()))?;
    let points: Vec<ForkPoint<B>> = lens.iter().map(|len| fork_point(*len)).collect::<Result<_, _>>()?;
    let mut round = Round::new(effort);
    points.iter().for_each(|point| round.probe(spawn_sample(point)));
    let mut names = Vec::new();
    for len in lens {
        let (name, sample) = bare(len)?;
        names.push(name);
        round.probe(sample);
    }
    let stats = round.run_all();
    let (spawns, bares) = stats.split_at(lens.len());
    for (((len, stats), name), bare) in lens.iter().zip(spawns).zip(names).zip(bares) {
        report.row(&Row {
            case: format!("{backing}, {} resident", size_name(*len)),
            unit: Unit::Microseconds,
            stats: *stats,
            baseline: Some(Baseline::new(name, *bare)),
            goal: Goal::Median(20.0),
        });
    }
    report.row(&Row {
        case: format!("{backing}, flat: {} resident", size_name(lens[2])),
        unit: Unit::Microseconds,
        stats: spawns[2],
        baseline: Some(Baseline::new(format!("the same at {}", size_name(lens[0])), spawns[0])),
        goal: Goal::Ratio(1.2),
    });
    Ok(())
}

/// Two families of one size, one of which has a thousand clones alive.
fn siblings<B: Backing>(backing: &str, effort: &Effort, report: &mut Report) -> Outcome {
    let count = 1000;
    let (few, many) = (fork_point::<B>(ByteSize::mib(64))?, fork_point::<B>(ByteSize::mib(64))?);
    let alive = (spawned(&few, 1)?, spawned(&many, count)?);
    let mut round = Round::new(effort);
    round.probe(spawn_sample(&few));
    round.probe(spawn_sample(&many));
    let [few, many] = round.run();
    drop(alive);
    report.row(&Row {
        case: format!("{backing}, flat: {count} siblings"),
        unit: Unit::Microseconds,
        stats: many,
        baseline: Some(Baseline::new("the same with 1 sibling", few)),
        goal: Goal::Ratio(1.2),
    });
    Ok(())
}

/// The engine's part of a clone, on every backing.
pub fn spawn(effort: &Effort, report: &mut Report) -> Outcome {
    #[cfg(target_os = "linux")]
    {
        use super::bare::{View, filled_memfd};
        use offshoot::backing::Mapped;
        sizes::<Mapped>("mapped", effort, report, |len| {
            // Private mappings of a file cost the same whatever of it is allocated.
            let file = filled_memfd(ByteSize::mib(1))?;
            let sample = move || {
                let (time, view) = timed(|| View::private(&file, len).expect("room for a mapping"));
                drop(view);
                time
            };
            Ok((format!("bare mmap of a memfd, {}", size_name(len)), Box::new(sample)))
        })?;
        siblings::<Mapped>("mapped", effort, report)?;
    }
    let largest_copy = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    sizes::<Heap>("heap", effort, report, |len| {
        let copied = len.min(largest_copy);
        let flat = vec![1u8; copied.get() as usize];
        let sample = move || {
            let (time, copy) = timed(|| flat.clone());
            black_box(copy);
            time
        };
        Ok((format!("clone of a Vec<u8> of {}", size_name(copied)), Box::new(sample)))
    })?;
    siblings::<Heap>("heap", effort, report)
}

/// Calls of each thread in one sample.
const CALLS: u32 = 2000;

/// The time of a call, all threads' calls together: half as much with two threads, if nothing is shared.
fn together(threads: usize, call: impl Fn() + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let work = || {
        barrier.wait();
        let start = Instant::now();
        (0..CALLS).for_each(|_| call());
        (start, Instant::now())
    };
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it only spawns")).collect()
    });
    let (first, last) = (times.iter().map(|time| time.0).min(), times.iter().map(|time| time.1).max());
    let wall = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
    wall.as_secs_f64() * 1e9 / (f64::from(CALLS) * threads as f64)
}

/// Calls a second of all threads together.
fn rate(stats: Stats) -> Stats {
    Stats { p50: 1e9 / stats.p50, p99: 1e9 / stats.p99 }
}

/// By one and by two threads, beside a baseline of as many.
fn rates(
    effort: &Effort,
    report: &mut Report,
    (name, call): (&str, &(dyn Fn() + Sync)),
    (baseline, bare): (&str, &(dyn Fn() + Sync)),
) {
    let mut round = Round::new(effort);
    for threads in [1, 2] {
        round.probe(move || together(threads, call));
        round.probe(move || together(threads, bare));
    }
    let [one, bare_one, two, bare_two] = round.run();
    for (threads, stats, bare) in [("one thread", one, bare_one), ("two threads", two, bare_two)] {
        report.row(&Row {
            case: format!("{name} a second, {threads}"),
            unit: Unit::Count,
            stats: rate(stats),
            baseline: Some(Baseline::new(format!("{baseline}, {threads}"), rate(bare))),
            goal: Goal::None,
        });
    }
    let scaling = |two: Stats, one: Stats| Stats::exactly(one.p50 / two.p50);
    report.row(&Row {
        case: format!("{name}: two threads over one"),
        unit: Unit::Ratio,
        stats: scaling(two, one),
        baseline: Some(Baseline::new(baseline, scaling(bare_two, bare_one))),
        goal: Goal::None,
    });
}

/// Spawning and dropping clones of one fork point by one and by two threads, beside what the kernel and this machine allow.
pub fn parallel(effort: &Effort, report: &mut Report) -> Outcome {
    let len = ByteSize::mib(64);
    #[cfg(target_os = "linux")]
    {
        use super::bare::{View, filled_memfd};
        let file = filled_memfd(ByteSize::mib(1))?;
        let bare = || drop(View::private(&file, len).expect("room for a mapping"));
        let point = fork_point::<offshoot::backing::Mapped>(len)?;
        let spawn = || drop(point.spawn(CloneSpec::default()).expect("room for a clone"));
        rates(effort, report, ("mapped spawns", &spawn), ("bare mmap and munmap", &bare));
    }
    let count = || {
        black_box((0..1000).fold(0_u64, |sum, n| black_box(sum + n)));
    };
    let point = fork_point::<Heap>(len)?;
    let spawn = || drop(point.spawn(CloneSpec::default()).expect("room for a clone"));
    rates(effort, report, ("heap spawns", &spawn), ("counting to 1,000", &count));
    Ok(())
}

const IDLE_CLONES: u64 = 1000;

fn idle_clone<B: Backing>(backing: &str, report: &mut Report, point: &ForkPoint<B>, len: ByteSize) -> Outcome {
    drop(spawned(point, 1)?);
    let (bytes, clones) = live_bytes_of(|| spawned(point, IDLE_CLONES));
    drop(clones?);
    report.row(&Row {
        case: format!("{backing}: heap bytes of one of {IDLE_CLONES}"),
        unit: Unit::Bytes,
        stats: Stats::exactly(bytes / IDLE_CLONES as f64),
        baseline: Some(Baseline::new("a full copy", Stats::exactly(len.get() as f64))),
        goal: Goal::Median(16384.0),
    });
    Ok(())
}

/// Engine memory of an idle clone of a 1 GiB VM.
pub fn memory(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(len)?;
    #[cfg(target_os = "linux")]
    {
        let point = fork_point::<offshoot::backing::Mapped>(len)?;
        idle_clone("mapped", report, &point, len)?;
        super::mapped::kernel_memory(report, &point, IDLE_CLONES, len)?;
    }
    idle_clone("heap", report, &fork_point::<Heap>(len)?, len)
}
