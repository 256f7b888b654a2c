//! Operations on whole images: diff, flatten, reset on the heap. Reported without a goal.

use std::hint::black_box;

use offshoot::backing::{Backing, Heap, Sealed};
use offshoot::page::ByteSize;

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{at, cut, empty, fill, needs_memory, size_name};

const CHANGED: u64 = 1000;

pub fn images(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::gib(1));
    needs_memory(ByteSize::new(4 * len.get()))?;
    let root: Heap = empty(len)?;
    fill(&root)?;
    let point = cut(&root)?;
    let pages = root.geometry().pages().get();
    let change = |seed: u64| -> Result<_, super::report::Skip> {
        let clone = point.spawn()?;
        let mut random = Random::new(seed);
        (0..CHANGED).try_for_each(|_| clone.write(at(random.next() % pages), &[1; 8]))?;
        Ok(clone)
    };
    let (left, right) = (cut(&change(1)?)?, cut(&change(2)?)?);
    let flat: Vec<u8> = vec![1; len.get() as usize];
    let other = flat.clone();
    let mut round = Round::new(effort);
    round.probe(|| timed(|| left.diff(&right).expect("relatives")).0);
    round.probe(|| timed(|| black_box(black_box(&flat) == black_box(&other))).0);
    round.probe(|| timed(|| left.flatten().expect("memory for a copy")).0);
    round.probe(|| timed(|| flat.clone()).0);
    round.probe(|| {
        let clone = change(3).expect("memory for its pages");
        timed(|| clone.reset().expect("nobody else uses it")).0
    });
    let [diff, compare, flatten, copy, reset] = round.run();
    let vec = format!("Vec<u8> of {}", size_name(len));
    for (case, stats, baseline) in [
        (
            format!("diff of two clones, {CHANGED} pages changed in each"),
            diff,
            Some((format!("comparing two {vec}"), compare)),
        ),
        (format!("flatten, {}", size_name(len)), flatten, Some((format!("clone of a {vec}"), copy))),
        (format!("reset, {CHANGED} dirty pages"), reset, Some((format!("clone of a {vec}"), copy))),
    ] {
        report.row(&Row {
            case,
            unit: Unit::Microseconds,
            stats,
            baseline: baseline.map(|(name, stats)| Baseline::new(name, stats)),
            goal: Goal::None,
        });
    }
    Ok(())
}
