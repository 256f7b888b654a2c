//! The heap face: what a fork costs whatever the size, and what a read costs whatever the depth.

use std::hint::black_box;

use offshoot::backing::{Backing, Cut, Heap, Sealed};
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, PageSize};
use offshoot::ram::{Ram, RamLayout};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, Stats, timed};
use super::subject::{PAGE, at, cut, empty, fill, size_name, tree};

/// Cut and commit: what the guest waits for. What the cut put off is a row of its own.
pub fn fork(effort: &Effort, report: &mut Report) -> Outcome {
    let largest_copy = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    let sizes = [ByteSize::mib(1), ByteSize::gib(1), ByteSize::gib(64)];
    for (dirty, most, flat_most) in [(4, Goal::Median(1.0), Goal::Ratio(1.2)), (1000, Goal::None, Goal::None)] {
        let spaces: Vec<Heap> = sizes.iter().map(|size| empty(*size)).collect::<Result<_, _>>()?;
        let flats: Vec<Vec<u8>> = [sizes[0], largest_copy].iter().map(|size| vec![1; size.get() as usize]).collect();
        let mut round = Round::new(effort);
        for space in &spaces {
            round.probe(fork_sample(space, dirty, Part::Fork));
        }
        for space in &spaces {
            round.probe(fork_sample(space, dirty, Part::Teardown));
        }
        for flat in &flats {
            round.probe(move || {
                let (time, copy) = timed(|| flat.clone());
                black_box(copy);
                time
            });
        }
        let [small, middle, large, small_down, middle_down, large_down, small_copy, large_copy] = round.run();
        for (size, stats, copied, copy) in [
            (sizes[0], small, sizes[0], small_copy),
            (sizes[1], middle, largest_copy, large_copy),
            (sizes[2], large, largest_copy, large_copy),
        ] {
            report.row(&Row {
                case: format!("{}, {dirty} dirty pages", size_name(size)),
                unit: Unit::Microseconds,
                stats,
                baseline: Some(Baseline::new(format!("clone of a Vec<u8> of {}", size_name(copied)), copy)),
                goal: most,
            });
        }
        report.row(&Row {
            case: format!("flat: 64 GiB, {dirty} dirty pages"),
            unit: Unit::Microseconds,
            stats: large,
            baseline: Some(Baseline::new("the same at 1 MiB", small)),
            goal: flat_most,
        });
        for (size, stats) in sizes.iter().zip([small_down, middle_down, large_down]) {
            report.row(&Row {
                case: format!("put off: {}, {dirty} dirty pages", size_name(*size)),
                unit: Unit::Microseconds,
                stats,
                baseline: None,
                goal: Goal::None,
            });
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Fork,
    Teardown,
}

fn fork_sample(space: &Heap, dirty: u64, part: Part) -> impl FnMut() -> f64 + '_ {
    let pages = space.geometry().pages().get();
    let mut random = Random::new(7);
    move || {
        for _ in 0..dirty {
            space.write(at(random.next() % pages), &[1; 8]).expect("a page of memory");
        }
        let (fork, (image, deferred)) = timed(|| space.cut().expect("nobody else uses it").commit());
        let (teardown, ()) = timed(|| drop(deferred));
        drop(image);
        match part {
            Part::Fork => fork,
            Part::Teardown => teardown,
        }
    }
}

/// Whether the address of a read depends on what the read before it gave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    Independent,
    Chained,
}

impl Reads {
    /// How many make a sample: few enough that most samples are shorter than a time slice, so that a busy machine shows in the p99 and not
    /// in the median.
    fn count(self) -> u64 {
        match self {
            Self::Independent => 4000,
            Self::Chained => 500,
        }
    }
}

/// The mean time of one read at a random multiple of 8 below `len`, a power of two.
#[inline(always)]
fn reads(random: &mut Random, len: ByteSize, how: Reads, mut load: impl FnMut(u64) -> u64) -> f64 {
    let mask = (len.get() - 1) & !7;
    let (time, ()) = timed(|| {
        let mut sum = 0u64;
        for _ in 0..how.count() {
            let value = load(random.next() & mask);
            sum = sum.wrapping_add(value);
            if how == Reads::Chained {
                random.stir(value);
            }
        }
        black_box(sum);
    });
    time / how.count() as f64
}

fn flat_reads(flat: &[u8], seed: u64, how: Reads) -> impl FnMut() -> f64 + '_ {
    let (mut random, len) = (Random::new(seed), ByteSize::new(flat.len() as u64));
    move || {
        reads(&mut random, len, how, |at| {
            let mut word = [0; 8];
            word.copy_from_slice(&flat[at as usize..at as usize + 8]);
            u64::from_ne_bytes(word)
        })
    }
}

fn view_reads(space: &Heap, seed: u64, how: Reads) -> impl FnMut() -> f64 + '_ {
    let (mut random, len) = (Random::new(seed), space.geometry().len());
    move || {
        let view = space.view();
        reads(&mut random, len, how, |at| view.load(ByteOffset::new(at)).expect("inside the space"))
    }
}

fn ram_reads(ram: &Ram<Heap>, seed: u64, how: Reads) -> impl FnMut() -> f64 + '_ {
    let (mut random, len) = (Random::new(seed), ram.layout().geometry().len());
    move || {
        let view = ram.view().expect("not frozen");
        reads(&mut random, len, how, |at| view.load(GuestAddress::new(at)).expect("inside RAM"))
    }
}

/// Writes `count` pages, a word each, at random.
fn scatter(space: &Heap, count: u64, seed: u64) -> Outcome {
    let (mut random, pages) = (Random::new(seed), space.geometry().pages().get());
    for _ in 0..count {
        space.write(at(random.next() % pages), &seed.to_ne_bytes())?;
    }
    Ok(())
}

/// A clone `depth` forks below a filled space, each level having written some pages.
fn clone_at_depth(root: Heap, depth: u32) -> Result<Heap, Skip> {
    let pages = root.geometry().pages().get();
    let mut clone = root;
    for level in 0..depth {
        scatter(&clone, pages / 512, u64::from(level) + 1)?;
        clone = cut(&clone)?.spawn()?;
    }
    Ok(clone)
}

/// Every pair is a round of its own over memory of its own, so that neither side warms the other's cache.
pub fn read(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    let size = size_name(len);
    let flat: Vec<u8> = {
        let mut random = Random::new(3);
        (0..len.get() / 8).flat_map(|_| random.next().to_ne_bytes()).collect()
    };
    let filled = || -> Result<Heap, Skip> {
        let root = empty(len)?;
        fill(&root)?;
        Ok(root)
    };
    let baseline = |stats| Some(Baseline::new(format!("Vec<u8> of {size}"), stats));
    let mut row = |case: String, stats: Stats, baseline: Option<Baseline>, goal| {
        report.row(&Row { case, unit: Unit::Nanoseconds, stats, baseline, goal });
    };

    let shallow = clone_at_depth(filled()?, 1)?;
    let deep = clone_at_depth(filled()?, 64)?;
    for (how, name, goal) in
        [(Reads::Independent, "", Goal::Ratio(2.0)), (Reads::Chained, ", each needs the last", Goal::None)]
    {
        for (space, depth) in [(&shallow, 1), (&deep, 64)] {
            let mut round = Round::new(effort);
            round.probe(view_reads(space, 11, how));
            round.probe(flat_reads(&flat, 12, how));
            let [view, flat] = round.run();
            row(format!("depth {depth}{name}"), view, baseline(flat), goal);
        }
    }
    let mut round = Round::new(effort);
    round.probe(view_reads(&deep, 13, Reads::Independent));
    round.probe(view_reads(&shallow, 14, Reads::Independent));
    let [stats, other] = round.run();
    row("flat: depth 64".into(), stats, Some(Baseline::new("the same at depth 1", other)), Goal::Ratio(1.05));

    scatter(&shallow, len.get() / PAGE / 16, 99)?;
    let mut round = Round::new(effort);
    round.probe(view_reads(&shallow, 15, Reads::Independent));
    round.probe(flat_reads(&flat, 16, Reads::Independent));
    let [view, plain] = round.run();
    row("depth 1, one page in 16 its own".into(), view, baseline(plain), Goal::Ratio(2.0));
    drop((shallow, deep));

    // Through guest addresses, in a VM that was never forked: every page is its own.
    let ram: Ram<Heap> = Ram::create(&tree(), RamLayout::flat(len, PageSize::KIB_4)?)?;
    fill(ram.space())?;
    let mut round = Round::new(effort);
    round.probe(ram_reads(&ram, 17, Reads::Independent));
    round.probe(flat_reads(&flat, 18, Reads::Independent));
    let [view, plain] = round.run();
    row("Ram::view, never forked".into(), view, baseline(plain), Goal::Ratio(2.0));
    drop(cut(ram.space())?);
    let mut round = Round::new(effort);
    round.probe(ram_reads(&ram, 19, Reads::Independent));
    round.probe(flat_reads(&flat, 20, Reads::Independent));
    let [view, plain] = round.run();
    row("Ram::view, depth 1".into(), view, baseline(plain), Goal::Ratio(2.0));
    Ok(())
}
