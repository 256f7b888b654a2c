//! Torn and foreign pages: the soak of the concurrency tests, long enough to count for something. Linux.

use offshoot::backing::{Heap, Mapped};

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Stats, timed};
use super::soak::{Found, soak};

/// Every kind of fork under writers: whatever is found is one too many.
pub fn checks(effort: &Effort, report: &mut Report) -> Outcome {
    let each = effort.pick(5_000_000, 500_000_000);
    let mut all = Found::default();
    for (name, run) in [("heap", soak::<Heap> as fn(u64) -> Found), ("mapped", soak::<Mapped>)] {
        let (time, found) = timed(|| run(each));
        report.row(&Row {
            case: format!("{name}: a page check, {} forks among them", found.forks),
            unit: Unit::Nanoseconds,
            stats: Stats::exactly(time / found.checks as f64),
            baseline: None,
            goal: Goal::None,
        });
        all += found;
    }
    for (kind, count) in [("torn", all.torn), ("foreign", all.foreign), ("lost", all.lost)] {
        report.row(&Row {
            case: format!("{kind} pages"),
            unit: Unit::Count,
            stats: Stats::exactly(count as f64),
            baseline: Some(Baseline::new("checks", Stats::exactly(all.checks as f64))),
            goal: Goal::Median(0.0),
        });
    }
    all.first.map_or(Ok(()), |first| Err(Skip::new(first)))
}
