//! Fork trees: what a thousand levels and ten thousand siblings add to a fork, a read and a spawn; and dirty pages that are scattered.

use std::hint::black_box;
#[cfg(target_os = "linux")]
use std::os::unix::fs::FileExt;

use offshoot::backing::{Backing, Cut, Deferred, Heap, Sealed};
use offshoot::page::{ByteSize, GuestAddress};
use offshoot::{CloneSpec, Limits, Tree};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, Stats, timed};
use super::subject::{PAGE, at, cut, fill, fork_point, geometry, needs_memory, size_name, spawned};

/// Images at each end of a chain that are sampled in turn: how many extents one has goes up level by level and down at a merge.
const ENDS: u32 = 16;
/// Pages that each level writes.
const WRITTEN: u64 = 16;
const READS: u64 = 10_000;

/// Which pages the levels of a chain write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// Each some of the same 64, scattered.
    WorkingSet,
    /// Each others, anywhere.
    Anywhere,
}

impl Writes {
    fn name(self) -> &'static str {
        match self {
            Self::WorkingSet => "a working set",
            Self::Anywhere => "anywhere",
        }
    }

    /// The pages of one level. The first level of a working set writes all of it, so that levels are alike.
    fn pages(self, random: &mut Random, space: u64, level: u32) -> Vec<u64> {
        let nth = |n: u64| n * (space / 64) + 3;
        match self {
            Self::WorkingSet if level == 0 => (0..64).map(nth).collect(),
            Self::WorkingSet => (0..WRITTEN).map(|_| nth(random.next() % 64)).collect(),
            Self::Anywhere => (0..WRITTEN).map(|_| random.next() % space).collect(),
        }
    }
}

fn write<B: Backing>(space: &B, pages: &[u64]) {
    pages.iter().for_each(|page| space.write(at(*page), &[7; 8]).expect("a page of memory"));
}

/// What a chain is made of.
#[derive(Clone, Copy)]
struct Shape {
    len: ByteSize,
    limits: Limits,
    levels: u32,
    writes: Writes,
}

/// Images one below the other, each cut from a clone of the one above that wrote some pages.
struct Chain<B: Backing> {
    /// Of level 1, each on its own.
    first: Vec<B::Sealed>,
    last: Vec<B::Sealed>,
    /// What each level put off.
    put_off: Stats,
}

impl<B: Backing> Chain<B> {
    fn grow(shape: Shape) -> Result<Self, Skip> {
        let root = B::create(&Tree::new(shape.limits), geometry(shape.len)?, None)?;
        fill(&root)?;
        let top = cut(&root)?;
        drop(root);
        let pages = shape.len.get() / PAGE;
        let mut random = Random::new(3);
        let mut next = |above: &B::Sealed, level| -> Result<(B::Sealed, Deferred), Skip> {
            let clone = above.spawn()?;
            write(&clone, &shape.writes.pages(&mut random, pages, level));
            Ok(clone.cut()?.commit())
        };
        let first = (0..ENDS).map(|_| Ok(next(&top, 0)?.0)).collect::<Result<_, Skip>>()?;
        let (mut last, mut deepest, mut put_off) = (top, Vec::new(), Vec::new());
        for level in 0..shape.levels {
            let deferred;
            (last, deferred) = next(&last, level)?;
            put_off.push(timed(|| drop(deferred)).0);
            if level >= shape.levels - ENDS {
                deepest.push(last.clone());
            }
        }
        Ok(Self { first, last: deepest, put_off: Stats::of(put_off) })
    }
}

fn spawn_sample<S: Sealed>(images: &[S]) -> impl FnMut() -> f64 + '_ {
    let mut images = images.iter().cycle();
    move || {
        let image = images.next().expect("there are some");
        let (time, clone) = timed(|| image.spawn().expect("room for a clone"));
        drop(clone);
        time
    }
}

fn fork_sample<S: Sealed>(images: &[S], writes: Writes) -> impl FnMut() -> f64 + '_ {
    let mut random = Random::new(9);
    let mut images = images.iter().cycle();
    move || {
        let image = images.next().expect("there are some");
        let space = image.geometry().pages().get();
        let clone = image.spawn().expect("room for a clone");
        write(&clone, &writes.pages(&mut random, space, 1));
        let (time, made) = timed(|| clone.cut().expect("nobody else uses it").commit());
        // The image goes first: nobody wants what the cut put off.
        let (made, deferred) = made;
        drop((made, clone, deferred));
        time
    }
}

fn read_sample<S: Sealed>(image: &S) -> Result<impl FnMut() -> f64 + use<S>, Skip> {
    let clone = image.spawn()?;
    let space = image.geometry().pages().get();
    let mut word = [0; 8];
    (0..space).try_for_each(|page| clone.read(at(page), &mut word))?;
    let mut random = Random::new(5);
    Ok(move || {
        let (time, ()) = timed(|| {
            for _ in 0..READS {
                clone.read(at(random.next() % space), &mut word).expect("inside");
                random.stir(black_box(word[0].into()));
            }
        });
        time / READS as f64
    })
}

fn one_depth<B: Backing>(backing: &str, shape: Shape, goal: Goal, effort: &Effort, report: &mut Report) -> Outcome {
    let chain: Chain<B> = Chain::grow(shape)?;
    let mut round = Round::new(effort);
    for images in [&chain.first, &chain.last] {
        round.probe(spawn_sample(images));
        round.probe(fork_sample(images, shape.writes));
        round.probe(read_sample(&images[0])?);
    }
    let [spawn_1, fork_1, read_1, spawn_n, fork_n, read_n] = round.run();
    let (levels, writes) = (shape.levels, shape.writes.name());
    for (what, unit, stats, first, goal) in [
        ("spawn", Unit::Microseconds, spawn_n, spawn_1, goal),
        ("fork", Unit::Microseconds, fork_n, fork_1, goal),
        ("random read", Unit::Nanoseconds, read_n, read_1, Goal::Ratio(1.1)),
    ] {
        report.row(&Row {
            case: format!("{backing}: {what}, level {levels}; {writes}"),
            unit,
            stats,
            baseline: Some(Baseline::new("the same at level 1", first)),
            goal,
        });
    }
    report.row(&Row {
        case: format!("{backing}: put off by a fork, {}; {writes}", size_name(shape.len)),
        unit: Unit::Microseconds,
        stats: chain.put_off,
        baseline: None,
        goal: Goal::None,
    });
    Ok(())
}

/// Level 1 is an image that was cut from a clone which had written. Each level writes 16 pages.
pub fn depth(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(16), ByteSize::mib(256));
    needs_memory(ByteSize::new(8 * len.get()))?;
    let shape = Shape { len, limits: Limits::default(), levels: 1000, writes: Writes::Anywhere };
    // Merged again and again, or spawned of many pieces: smaller.
    let dear = Shape { len: effort.pick(ByteSize::mib(8), ByteSize::mib(32)), levels: effort.pick(200, 1000), ..shape };
    let flat = Goal::Ratio(1.1);
    #[cfg(target_os = "linux")]
    {
        use offshoot::backing::Mapped;
        one_depth::<Mapped>("mapped", Shape { writes: Writes::WorkingSet, ..shape }, flat, effort, report)?;
        // As few mappings as level 1 has: nearly all of RAM is copied at each fork, when nobody waits.
        let limits = Limits { merge_over_layers: 2, merge_over_mappings: 2 * WRITTEN, ..shape.limits };
        let few = Shape { limits, ..dear };
        one_depth::<Mapped>("mapped, at most 32 mappings", few, flat, effort, report)?;
        one_depth::<Mapped>("mapped, at most 2048 mappings", dear, Goal::None, effort, report)?;
    }
    one_depth::<Heap>("heap", shape, flat, effort, report)
}

/// What a number of siblings alive adds to a spawn. Each has written a page.
fn among<B: Backing>(backing: &str, effort: &Effort, report: &mut Report) -> Outcome {
    const SIBLINGS: u64 = 10_000;
    let point = fork_point::<B>(ByteSize::mib(16))?;
    let sample = || {
        let mut round = Round::new(effort);
        round.probe(|| {
            let (time, clone) = timed(|| point.spawn(CloneSpec::default()).expect("room for a clone"));
            drop(clone);
            time
        });
        let [stats] = round.run();
        stats
    };
    let first = sample();
    let alive = spawned(&point, SIBLINGS)?;
    for (page, clone) in alive.iter().enumerate() {
        clone.ram().store(GuestAddress::new(page as u64 % 4096 * PAGE), 1u8)?;
    }
    let last = sample();
    drop(alive);
    report.row(&Row {
        case: format!("{backing}: spawn, {SIBLINGS} siblings alive"),
        unit: Unit::Microseconds,
        stats: last,
        baseline: Some(Baseline::new("the same with none", first)),
        goal: Goal::Ratio(1.2),
    });
    Ok(())
}

/// The ten-thousandth spawn against the first.
pub fn siblings(effort: &Effort, report: &mut Report) -> Outcome {
    needs_memory(ByteSize::gib(1))?;
    #[cfg(target_os = "linux")]
    among::<offshoot::backing::Mapped>("mapped", effort, report)?;
    among::<Heap>("heap", effort, report)
}

/// Every 8th page dirty: more runs than a VM may have mappings.
#[cfg(target_os = "linux")]
pub fn scattered(effort: &Effort, report: &mut Report) -> Outcome {
    use offshoot::backing::Mapped;
    const STRIDE: u64 = 8;
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(ByteSize::new(4 * len.get()))?;
    let (pages, runs) = (len.get() / PAGE, len.get() / PAGE / STRIDE);
    let mut samples = [const { Vec::new() }; 6];
    let (mut mappings, mut files) = ([0, 0], [0, 0]);
    for _ in 0..3 {
        let tree = Tree::default();
        let parent = Mapped::create(&tree, geometry(len)?, None)?;
        fill(&parent)?;
        drop(cut(&parent)?);
        let below = tree.memory_file_bytes().get();
        (0..runs).try_for_each(|run| parent.write(at(run * STRIDE), &[9; 8]))?;
        let (pause, made) = timed(|| Ok::<_, Skip>(parent.cut()?.commit()));
        let (image, deferred) = made?;
        mappings[0] = parent.kernel_mappings();
        files[0] = tree.memory_file_bytes().get() - below;
        // The first clone comes at once, and waits for the gaps to be closed.
        let (early, clone) = timed(|| image.spawn());
        drop(clone?);
        drop(deferred);
        files[1] = tree.memory_file_bytes().get();
        let (later, clone) = timed(|| image.spawn());
        mappings[1] = clone?.kernel_mappings();
        (0..WRITTEN).try_for_each(|page| parent.write(at(page * STRIDE * 5), &[8; 8]))?;
        let (again, made) = timed(|| Ok::<_, Skip>(parent.cut()?.commit()));
        drop(made?);
        let target = super::bare::filled_memfd(ByteSize::ZERO)?;
        let page = [7; PAGE as usize];
        let (bare, done) = timed(|| (0..runs).try_for_each(|run| target.write_all_at(&page, run * STRIDE * PAGE)));
        done?;
        let all = vec![7; 1 << 20];
        let target = super::bare::filled_memfd(ByteSize::ZERO)?;
        let (whole, done) =
            timed(|| (0..(pages * PAGE) >> 20).try_for_each(|mib| target.write_all_at(&all, mib << 20)));
        done?;
        for (to, sample) in samples.iter_mut().zip([pause, early, later, again, bare, whole]) {
            to.push(sample);
        }
    }
    let [pause, early, later, again, bare, whole] = samples;
    let (bare, whole) = (Stats::of(bare), Stats::of(whole));
    let size = size_name(len);
    let same = || Baseline::new(format!("pwrite of {runs} pages to a new memfd"), bare);
    let with_gaps = || Baseline::new(format!("pwrite of {size}: the gaps too"), whole);
    let mut row = |case: String, unit, stats, baseline| {
        report.row(&Row { case, unit, stats, baseline, goal: Goal::None });
    };
    let milli = Unit::Milliseconds;
    row(format!("pause, {runs} runs of {size}"), milli, Stats::of(pause.clone()), Some(same()));
    row(format!("pause, {runs} runs of {size}; against"), milli, Stats::of(pause), Some(with_gaps()));
    row("pause of the next fork, 16 pages written".into(), milli, Stats::of(again), Some(same()));
    row("spawn at once, which closes the gaps".into(), milli, Stats::of(early), Some(with_gaps()));
    let case = format!("spawn later: {} mappings, the parent {}", mappings[1], mappings[0]);
    row(case, Unit::Microseconds, Stats::of(later), None);
    let full = || Some(Baseline::new(format!("all of {size}"), Stats::exactly(len.get() as f64)));
    row("memory of the layer made in the pause".into(), Unit::Bytes, Stats::exactly(files[0] as f64), full());
    row("memory of all layers once gathered".into(), Unit::Bytes, Stats::exactly(files[1] as f64), full());
    Ok(())
}
