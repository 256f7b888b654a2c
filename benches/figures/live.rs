//! The pause of a live re-fork beside stop-and-copy: a VM all of whose RAM is touched, so much of it written since its last fork, and a guest that
//! goes on writing through every fork. Without KVM and, from inside a vCPU, with it; in place and into a shell. Linux on x86-64.

use offshoot::frontend::kvm::{Devices, KvmHost, PoolLimits, ShellCount, ShellPool};
use offshoot::page::ByteSize;
use offshoot::{ForkTimings, LivePolicy};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::Stats;
use super::subject::{PAGE, needs_memory, size_name};
use super::writer::{Subject, shape};

/// How a parent is forked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Stop,
    Live,
    /// Into a shell: stop and copy, or live.
    Moving,
    LiveMoving,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop and copy",
            Self::Live => "live",
            Self::Moving => "into a shell, stop and copy",
            Self::LiveMoving => "into a shell, live",
        }
    }
}

/// What was written since the last fork.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Dirty {
    Together(ByteSize),
    /// One page of so many.
    Every(u64, ByteSize),
    Nothing,
}

/// One case: two ways to fork the same kind of parent, sampled in turn.
struct Case {
    name: String,
    dirty: Dirty,
    ways: [Way; 2],
}

/// RAM, and what is written of it.
fn sizes(effort: &Effort) -> Result<(ByteSize, ByteSize), Skip> {
    let (ram, written) = effort.pick((ByteSize::mib(256), ByteSize::mib(8)), (ByteSize::gib(1), ByteSize::mib(30)));
    needs_memory(ByteSize::new(3 * ram.get()))?;
    Ok((ram, written))
}

pub fn live(effort: &Effort, report: &mut Report) -> Outcome {
    let (ram, written) = sizes(effort)?;
    let together = Dirty::Together(written);
    let case = |name: &str, dirty, ways| Case { name: format!("{}, {name}", size_name(written)), dirty, ways };
    let in_place = [Way::Stop, Way::Live];
    for case in [
        case("together", together, in_place),
        case("every 8th page", Dirty::Every(8, written), in_place),
        Case { name: "nothing dirty".into(), dirty: Dirty::Nothing, ways: in_place },
    ] {
        measure(effort, report, ram, &case, None)?;
    }
    Ok(())
}

/// The same with the guest in a vCPU.
pub fn live_kvm(effort: &Effort, report: &mut Report) -> Outcome {
    let (ram, written) = sizes(effort)?;
    let together = Dirty::Together(written);
    let in_place = [Way::Stop, Way::Live];
    let host = KvmHost::open().map_err(|error| Skip::new(error.to_string()))?;
    let moving = [Way::Moving, Way::LiveMoving];
    for case in [
        Case { name: size_name(written), dirty: together, ways: in_place },
        Case { name: size_name(written), dirty: together, ways: moving },
        Case { name: "nothing dirty".into(), dirty: Dirty::Nothing, ways: in_place },
        Case { name: "nothing dirty".into(), dirty: Dirty::Nothing, ways: moving },
    ] {
        let pool =
            ShellPool::new(shape(&host, ram)?, PoolLimits { ready: ShellCount::new(4), ..PoolLimits::default() })?;
        measure(effort, report, ram, &case, Some((&host, &pool)))?;
    }
    Ok(())
}

type Kvm<'a> = (&'a std::sync::Arc<KvmHost>, &'a ShellPool);

fn measure(effort: &Effort, report: &mut Report, ram: ByteSize, case: &Case, kvm: Option<Kvm<'_>>) -> Outcome {
    // The writer goes on where there is anything written at all.
    let rate = if case.dirty == Dirty::Nothing { ByteSize::ZERO } else { ByteSize::mib(100) };
    let mut subjects = [Subject::start(ram, rate, kvm)?, Subject::start(ram, rate, kvm)?];
    let mut samples = [const { Vec::new() }; 2];
    for (at, &way) in case.ways.iter().enumerate() {
        // The first forks are of another kind, and not counted: from here on it is a VM that has been forked this way.
        subjects[at].fork(Way::Stop)?;
        subjects[at].touch_from_inside();
        subjects[at].fork(way)?;
    }
    // Forks of scattered pages have layers merged after each, which is waited for.
    let runs = if matches!(case.dirty, Dirty::Every(..)) { effort.pick(3, 20) } else { effort.pick(5, 100) };
    for run in 0..runs {
        for (at, &way) in case.ways.iter().enumerate() {
            if let Some((_, pool)) = kvm {
                pool.wait_filled()?;
            }
            let subject = &mut subjects[at];
            subject.touch();
            subject.dirty(case.dirty, run);
            samples[at].push(subject.fork(way)?);
        }
    }
    let [base, timings] = samples;
    let stats = |of: fn(&ForkTimings) -> f64, timings: &[ForkTimings]| Stats::of(timings.iter().map(of).collect());
    let stopped = |timings: &ForkTimings| timings.stopped().as_secs_f64() * 1e9;
    let cut = |timings: &ForkTimings| timings.cut.as_secs_f64() * 1e9;
    let (way, other) = (case.ways[1].name(), case.ways[0].name());
    let mut row = |what: String, of: [Stats; 2], goal| {
        report.row(&Row {
            case: what,
            unit: Unit::Microseconds,
            stats: of[0],
            baseline: Some(Baseline::new(other, of[1])),
            goal,
        });
    };
    let name = format!("{}: {way}", case.name);
    let stopped = [stats(stopped, &timings), stats(stopped, &base)];
    let tails = stopped.map(|stats| Stats::exactly(stats.p99));
    let goals = match case.dirty {
        Dirty::Nothing => [Goal::Median(300.0), Goal::None],
        _ => [Goal::Median(3000.0), Goal::Median(6000.0)],
    };
    row(name.clone(), stopped, goals[0]);
    if goals[1] != Goal::None {
        row(format!("{name}, p99"), tails, goals[1]);
    }
    row(format!("{name}, the engine's cut"), [stats(cut, &timings), stats(cut, &base)], Goal::None);
    // What the rounds after the first found is what was written during the fork.
    let pages = |timings: &ForkTimings| {
        timings.precopy.map_or((0, 0), |precopy| {
            let again: u64 = precopy.rounds().iter().skip(1).map(|round| round.pages.get()).sum();
            (again, precopy.last.pages.get())
        })
    };
    let mut count = |what: &str, of: &dyn Fn((u64, u64)) -> u64| {
        let counts = timings.iter().map(|timings| of(pages(timings)) as f64).collect();
        report.row(&Row {
            case: format!("{name}, pages {what}"),
            unit: Unit::Count,
            stats: Stats::of(counts),
            baseline: None,
            goal: Goal::None,
        });
    };
    count("written meanwhile", &|(again, last)| again + last);
    count("left for the pause", &|(_, last)| last);
    Ok(())
}

impl Dirty {
    /// The first page, the distance between two, and how many.
    pub fn pages(self, ram: ByteSize, run: u64) -> (u64, u64, u64) {
        let pages = ram.get() / PAGE;
        match self {
            // Above the guest's program, and below the quarter that the writer goes on in.
            Self::Together(len) => (256 + run * 1000 % (pages / 2), 1, len.get() / PAGE),
            // The same pages each time, or the layers would soon need more mappings than there are.
            Self::Every(step, len) => (256, step, (len.get() / PAGE).min(pages * 3 / 4 / step - 256)),
            Self::Nothing => (0, 1, 0),
        }
    }
}

/// One vCPU and no chips: what the others cost is in other figures.
pub const DEVICES: Devices = Devices::NONE;

/// As the figures are meant: what comes with the crate.
pub fn policy() -> LivePolicy {
    LivePolicy::default()
}
