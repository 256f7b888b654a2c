//! Fault debt: what the first touches of a clone cost, with and without its pages mapped ahead; and what mapping them costs the spawn.
#![allow(unsafe_code)] // Host addresses are touched as a hypervisor does.

use std::sync::Arc;

use offshoot::backing::Mapped;
use offshoot::page::{ByteSize, PageCount, PageIndex, PageRange, PageSet};
use offshoot::{CloneSpec, ForkPoint, Prefault, Vm, WorkingSet};

use super::bare;
use super::options::Effort;
use super::process::faults;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{PAGE, fork_point, needs_memory};

const TOUCHED: [u64; 2] = [64, 10_000];

/// With and without, and what is mapped ahead.
fn spec(set: Option<&Arc<WorkingSet>>) -> CloneSpec {
    let prefault = set.map(|set| Prefault { limit: PageCount::new(u64::MAX), ..Prefault::new(set.clone()) });
    CloneSpec { prefault, ..CloneSpec::default() }
}

struct Case<'a> {
    name: &'a str,
    set: Option<Arc<WorkingSet>>,
    /// For its faults, against those of a clone with nothing mapped ahead.
    goal: Goal,
}

/// Samples spawns and first runs of clones with each set in turn, and reports them beside those without any.
fn report_cases<'a, C>(
    what: &str,
    effort: &Effort,
    report: &mut Report,
    cases: &'a [Case<'a>],
    spawn: impl Fn(CloneSpec) -> C,
    run: impl Fn(&mut C),
) -> Outcome {
    let mut round = Round::new(effort);
    for case in cases {
        let (spawn, run) = (&spawn, &run);
        round.probe(move || {
            let (time, clone) = timed(|| spawn(spec(case.set.as_ref())));
            drop(clone);
            time
        });
        round.probe(move || {
            let mut clone = spawn(spec(case.set.as_ref()));
            timed(|| run(&mut clone)).0
        });
    }
    let stats = round.run_all();
    let mut debts = Vec::new();
    for case in cases {
        let mut clone = spawn(spec(case.set.as_ref()));
        let before = faults()?;
        run(&mut clone);
        debts.push(Stats::exactly(faults()? - before));
    }
    let plain = (stats[0], stats[1], debts[0]);
    for ((case, stats), debt) in cases.iter().zip(stats.chunks_exact(2)).zip(debts) {
        let ahead = case.set.is_some();
        let baseline = |stats| ahead.then(|| Baseline::new("nothing mapped ahead", stats));
        let row = |which: &str, unit, stats, base, goal| Row {
            case: format!("{what}, {}: {which}", case.name),
            unit,
            stats,
            baseline: baseline(base),
            goal,
        };
        report.row(&row("first run", Unit::Microseconds, stats[1], plain.1, Goal::None));
        report.row(&row("faults of its thread", Unit::Count, debt, plain.2, case.goal));
        report.row(&row("spawn", Unit::Microseconds, stats[0], plain.0, Goal::None));
    }
    Ok(())
}

fn host(point: &ForkPoint<Mapped>, pages: u64, stride: u64, effort: &Effort, report: &mut Report) -> Outcome {
    let touch = |clone: &mut Vm<Mapped>| {
        let base = clone.ram().space().host_base();
        // SAFETY: the clone's addresses are mapped writable for as long as it lives.
        (0..pages).for_each(|page| unsafe { bare::touch(base, page * stride) });
    };
    let mut first = point.spawn(CloneSpec::default())?;
    touch(&mut first);
    let set = first.working_set()?;
    drop(first);
    let cases = [
        Case { name: "nothing ahead", set: None, goal: Goal::None },
        Case { name: "as written", set: Some(Arc::new(set.clone())), goal: Goal::Ratio(0.05) },
        Case { name: "as read", set: Some(Arc::new(set.as_read())), goal: Goal::None },
    ];
    let place = if stride == 1 { "together" } else { "scattered" };
    let what = format!("{pages} pages {place}");
    report_cases(&what, effort, report, &cases, |spec| point.spawn(spec).expect("a clone"), touch)
}

/// Touches by the host, and by a KVM guest.
pub fn prefault(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(256), ByteSize::gib(1));
    needs_memory(len)?;
    let point = fork_point::<Mapped>(len)?;
    for pages in TOUCHED {
        host(&point, pages, 1, effort, report)?;
        host(&point, pages, len.get() / PAGE / pages, effort, report)?;
    }
    #[cfg(target_arch = "x86_64")]
    for pages in TOUCHED {
        guest(pages, effort, report)?;
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn guest(pages: u64, effort: &Effort, report: &mut Report) -> Outcome {
    use super::toucher::{FIRST, Toucher};
    let toucher = Toucher::new(ByteSize::mib(64), pages)?;
    let spawn = |spec| {
        let clone = toucher.point.spawn(spec).expect("a clone");
        let machine = toucher.machine(&clone).expect("a machine");
        (machine, clone)
    };
    let mut first = spawn(CloneSpec::default());
    Toucher::run(&mut first.0);
    let set = first.1.working_set()?;
    let written = PageRange::from_bounds(PageIndex::new(FIRST), PageIndex::new(FIRST + pages));
    if *set.written() != PageSet::from(written) {
        return Err(Skip::new(format!("the guest wrote {}, and not {written:?}", set.written().count())));
    }
    drop(first);
    let cases = [
        Case { name: "nothing ahead", set: None, goal: Goal::None },
        Case { name: "as written", set: Some(Arc::new(set)), goal: Goal::Ratio(0.05) },
    ];
    let what = format!("KVM guest, {pages} pages");
    report_cases(&what, effort, report, &cases, spawn, |(machine, _)| Toucher::run(machine))
}
