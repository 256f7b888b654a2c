//! The mapped face: the pause at a cut, the first write to a shared page, reset. Linux.
#![allow(unsafe_code)] // A guest's stores go through host pointers, so these must.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use offshoot::backing::{Backing, Cut, Mapped, Sealed};
use offshoot::page::{ByteSize, PageIndex};

use super::bare::{self, View, filled_memfd};
use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, Stats, timed};
use super::subject::{Idle, PAGE, at, cut, empty, fill, needs_memory, running, size_name, spawned};

/// The fork of a resident parent, stopped time and what it put off. Each sample is the first fork of a parent of its own; cutting one
/// parent again and again, each cut undone, is a row beside it.
pub fn pause(effort: &Effort, report: &mut Report) -> Outcome {
    let (small, large) = effort.pick((ByteSize::mib(256), ByteSize::gib(1)), (ByteSize::gib(1), ByteSize::gib(8)));
    needs_memory(large)?;
    let mut samples = [const { Vec::new() }; 6];
    for _ in 0..effort.pick(5, 3) {
        for (at, len) in [small, large].into_iter().enumerate() {
            let vm = running::<Mapped>(len)?;
            let point = vm.fork(&mut Idle)?;
            samples[at].push(nanoseconds(point.timings().stopped()));
            samples[2 + at].push(nanoseconds(point.timings().cut));
            samples[4 + at].push(nanoseconds(point.teardown().wait()));
        }
    }
    let [small_stop, large_stop, small_cut, large_cut, small_down, large_down] = samples.map(Stats::of);
    let mut again = Vec::new();
    for len in [small, large] {
        let vm = running::<Mapped>(len)?;
        let mut round = Round::new(effort);
        round.probe(|| {
            let (time, cut) = timed(|| vm.ram().space().cut().expect("nobody else uses it"));
            drop(cut);
            time
        });
        let [stats] = round.run();
        again.push(stats);
    }
    let in_place = {
        let file = filled_memfd(large)?;
        let mut samples = Vec::new();
        for _ in 0..3 {
            let view = View::shared(&file, large)?;
            view.populate()?;
            let (time, done) = timed(|| view.remap_private(&file));
            done?;
            samples.push(time);
        }
        Stats::of(samples)
    };
    let in_place = || Baseline::new(format!("remap in place, {}", size_name(large)), in_place);
    let mut row = |case: String, unit, stats, baseline, goal| {
        report.row(&Row { case, unit, stats, baseline: Some(baseline), goal });
    };
    let (small, large) = (size_name(small), size_name(large));
    let micro = Unit::Microseconds;
    row(format!("stopped, {small} resident"), micro, small_stop, in_place(), Goal::None);
    row(format!("stopped, {large} resident"), micro, large_stop, in_place(), Goal::Median(200.0));
    let same = Baseline::new(format!("the same at {small}"), small_stop);
    row(format!("flat: stopped, {large} resident"), micro, large_stop, same, Goal::Ratio(1.5));
    row(format!("of it the cut, {small}"), micro, small_cut, in_place(), Goal::None);
    row(format!("of it the cut, {large}"), micro, large_cut, in_place(), Goal::None);
    row(format!("cut again, each undone, {small}"), micro, again[0], in_place(), Goal::None);
    row(format!("cut again, each undone, {large}"), micro, again[1], in_place(), Goal::None);
    row(format!("put off, {small}"), Unit::Milliseconds, small_down, in_place(), Goal::None);
    row(format!("put off, {large}"), Unit::Milliseconds, large_down, in_place(), Goal::None);
    Ok(())
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// Where the dirty pages of a clone lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Together,
    Scattered,
}

impl Where {
    fn name(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::Scattered => "scattered",
        }
    }

    /// `count` pages of a space; ascending.
    fn pages(self, space_pages: u64, count: u64) -> Vec<u64> {
        match self {
            Self::Together => (space_pages / 2..space_pages / 2 + count).collect(),
            Self::Scattered => {
                let (mut random, stride) = (Random::new(5), space_pages / count);
                (0..count).map(|page| page * stride + random.next() % stride).collect()
            }
        }
    }
}

/// A clone that has written is forked again: its pages are found and copied inside the pause.
pub fn refork(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(len)?;
    let root: Mapped = empty(len)?;
    fill(&root)?;
    let point = cut(&root)?;
    for (count, place) in
        [(0, Where::Together), (64, Where::Scattered), (1000, Where::Together), (1000, Where::Scattered)]
    {
        let pages = place.pages(len.get() / PAGE, count.max(1));
        let pages = &pages[..count as usize];
        let clone_once = || {
            let clone = point.spawn().expect("room for a mapping");
            for page in pages {
                clone.write(at(*page), &[7; 8]).expect("a page of memory");
            }
            clone
        };
        let mut round = Round::new(effort);
        round.probe(|| {
            let clone = clone_once();
            let (time, made) = timed(|| clone.cut().expect("nobody else uses it").commit());
            drop(made);
            time
        });
        round.probe(|| {
            let (time, file) = timed(|| {
                let file = filled_memfd(ByteSize::ZERO).expect("a memory file");
                for page in pages {
                    file.write_all_at(&[7; PAGE as usize], page * PAGE).expect("a page of memory");
                }
                file
            });
            drop(file);
            time
        });
        let [cut, copy] = round.run();
        report.row(&Row {
            case: format!("{count} dirty pages {}, {}", place.name(), size_name(len)),
            unit: Unit::Microseconds,
            stats: cut,
            baseline: Some(Baseline::new("pwrite of them to a new memfd", copy)),
            goal: Goal::None,
        });
    }
    Ok(())
}

const TOUCHED: u64 = 4096;

/// Breaking sharing is the kernel's work; the engine must add nothing to it.
pub fn first_write(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(ByteSize::new(2 * len.get()))?;
    let root: Mapped = empty(len)?;
    fill(&root)?;
    let point = cut(&root)?;
    let file = filled_memfd(len)?;
    let pages = len.get() / PAGE;
    for (place, stride) in [("together", 1), ("scattered", pages / TOUCHED)] {
        let mut round = Round::new(effort);
        round.probe(|| {
            let clone = point.spawn().expect("room for a mapping");
            let base = clone.host_base();
            // SAFETY: the clone's addresses are mapped writable for as long as it lives.
            let (time, ()) = timed(|| (0..TOUCHED).for_each(|page| unsafe { bare::touch(base, page * stride) }));
            time / TOUCHED as f64
        });
        round.probe(|| {
            let view = View::private(&file, len).expect("room for a mapping");
            let (time, ()) = timed(|| (0..TOUCHED).for_each(|page| view.touch(page * stride)));
            time / TOUCHED as f64
        });
        let [clone, view] = round.run();
        report.row(&Row {
            case: format!("per page, {TOUCHED} pages {place}"),
            unit: Unit::Microseconds,
            stats: clone,
            baseline: Some(Baseline::new("bare private mapping", view)),
            goal: Goal::Ratio(1.05),
        });
    }
    Ok(())
}

/// Dropping what a clone wrote, in place.
pub fn reset(effort: &Effort, report: &mut Report) -> Outcome {
    const DIRTY: u64 = 64;
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(ByteSize::new(2 * len.get()))?;
    let root: Mapped = empty(len)?;
    fill(&root)?;
    let point = cut(&root)?;
    let file = filled_memfd(len)?;
    let (clone, view) = (point.spawn()?, View::private(&file, len)?);
    let write = |pages: &[u64]| {
        for page in pages {
            clone.write(at(*page), &[9; 8]).expect("a page of memory");
        }
    };
    let cases = [
        (Where::Together, "", Goal::Median(25.0)),
        (Where::Scattered, "", Goal::Median(25.0)),
        (Where::Scattered, ", all RAM read before", Goal::None),
    ];
    for (place, after, goal) in cases {
        if !after.is_empty() {
            let mut word = [0; 8];
            (0..len.get() / PAGE).try_for_each(|page| clone.read(at(page), &mut word))?;
        }
        let pages = place.pages(len.get() / PAGE, DIRTY);
        let listed = pages.iter().copied().map(PageIndex::new).collect();
        let mut round = Round::new(effort);
        round.probe(|| {
            write(&pages);
            timed(|| clone.reset().expect("nobody else uses it")).0
        });
        round.probe(|| {
            write(&pages);
            timed(|| clone.reset_listed(&listed).expect("nobody else uses it")).0
        });
        round.probe(|| {
            pages.iter().for_each(|page| view.touch(*page));
            let drop_all = || match place {
                Where::Together => view.drop_private(pages[0], DIRTY),
                Where::Scattered => pages.iter().try_for_each(|page| view.drop_private(*page, 1)),
            };
            let (time, done) = timed(drop_all);
            done.expect("an advice that Linux has");
            time
        });
        let [reset, listed, bare] = round.run();
        for (way, stats, goal) in [("", reset, goal), (", pages known", listed, Goal::Median(25.0))] {
            report.row(&Row {
                case: format!("{DIRTY} dirty pages {}{after}{way}", place.name()),
                unit: Unit::Microseconds,
                stats,
                baseline: Some(Baseline::new("MADV_DONTNEED, pages known", bare)),
                goal,
            });
        }
    }
    Ok(())
}

/// Spawned clones cost the kernel page tables and mappings of its own.
pub fn kernel_memory(report: &mut Report, point: &offshoot::ForkPoint<Mapped>, clones: u64, len: ByteSize) -> Outcome {
    let file = filled_memfd(ByteSize::mib(1))?;
    let before = page_table_bytes()?;
    let made = spawned(point, clones)?;
    let with_clones = page_table_bytes()?;
    drop(made);
    let before_views = page_table_bytes()?;
    let views: Vec<View> = (0..clones).map(|_| View::private(&file, len)).collect::<Result<_, Skip>>()?;
    let with_views = page_table_bytes()?;
    drop(views);
    let each = |after: f64, before: f64| Stats::exactly((after - before).max(0.0) / clones as f64);
    report.row(&Row {
        case: "kernel: page tables of one idle clone".into(),
        unit: Unit::Bytes,
        stats: each(with_clones, before),
        baseline: Some(Baseline::new("bare private mapping", each(with_views, before_views))),
        goal: Goal::None,
    });
    Ok(())
}

/// Bytes of this process's page tables.
fn page_table_bytes() -> Result<f64, Skip> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmPTE:")?.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib * 1024.0).ok_or_else(|| Skip::new("/proc/self/status has no VmPTE"))
}
