//! Debian guests in unmodified QEMU processes: what a fork stops, what a clone takes until it runs and while it idles, and what its disk does.
//!
//! Beside each stands what the same QEMU does without us: resumed from the same state and memory file, its disks on qcow2 overlays, or booted.
//! A first fork happens once in a guest's life, so there are as many samples of it as boots.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot::disk::DiskImage;
use offshoot::frontend::qemu::{AfterFork, QemuClone, QemuForkTimings, QemuPoint, QemuVm};
use offshoot::page::{ByteSize, Lba, SECTOR_SIZE};

use super::options::Effort;
use super::place::Place;
use super::process::bytes_in;
use super::qemu_guest::{Bare, BareKit, Held, Images, in_guest, install, make_resident, requests};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::subject::{needs_memory, size_name};
use super::tools;

/// The guest that is cloned.
const RAM: ByteSize = ByteSize::mib(512);
/// Clones that idle.
const CLONES: usize = 20;
/// What a clone may take beside what a QEMU takes anyhow.
const ALLOWANCE: f64 = (8 << 20) as f64;
/// What a clone does before it is forked itself: 8 MiB of its disk go to its page cache and to a file in its RAM.
const WRITE: &str = "dd if=/dev/vdb of=/tmp/written bs=1M skip=1 count=8 2>&1";

pub fn qemu(effort: &Effort, report: &mut Report) -> Outcome {
    needs_memory(ByteSize::gib(effort.pick(4, 9)))?;
    let place = Place::memory()?;
    let images = Images::make(place.path())?;
    let first = first_forks(effort, report, &images)?;
    let template = first.point.spawn(QemuClone::default())?;
    let base = Base::of(&first.point, &place)?;
    let boots = boots(effort, &images)?;
    let figures: [&dyn Fn(&mut Report) -> Outcome; 4] = [
        &|report| births(effort, report, &first, &base, &template, &boots),
        &|report| idle(effort, report, &first, &base, &template, &boots),
        &|report| disk(effort, report, &base, &template),
        &|report| generations(effort, report, &first),
    ];
    for figure in figures {
        if let Err(skip) = figure(report) {
            report.skipped(&skip);
        }
    }
    Ok(())
}

/// The guest that the other figures are about.
struct First {
    parent: QemuVm,
    point: QemuPoint,
    timings: QemuForkTimings,
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// What of a pause is QEMU's: its stop, its saving of its state, its loading of it where it goes on, its start there.
fn of_qemu(timings: &QemuForkTimings) -> Duration {
    timings.stop + timings.save + timings.load + timings.engine.resume
}

/// All the rest: gates, a clone's own pages, flush, cut.
fn of_ours(timings: &QemuForkTimings) -> Duration {
    timings.engine.stopped().saturating_sub(of_qemu(timings))
}

fn median(timings: &[QemuForkTimings], of: impl Fn(&QemuForkTimings) -> Duration) -> Stats {
    Stats::of(timings.iter().map(|timings| nanoseconds(of(timings))).collect())
}

/// Boots guests of all sizes, has their RAM resident, and forks each once.
fn first_forks(effort: &Effort, report: &mut Report, images: &Images) -> Result<First, Skip> {
    let sizes = effort.pick(&[256, 2048][..], &[256, 1024, 4096]);
    let mut forks: Vec<(f64, Vec<QemuForkTimings>)> = vec![(0.0, Vec::new()); sizes.len()];
    let mut first = None;
    for round in 0..effort.pick(1, 3) {
        let ours = if round == 0 { Some(images.launch(RAM)?) } else { None };
        let booting = sizes.iter().map(|&mib| images.launch(ByteSize::mib(mib))).collect::<Result<Vec<_>, _>>()?;
        let booted = booting.into_iter().map(|booting| booting.ready()).collect::<Result<Vec<_>, _>>()?;
        if let Some(ours) = ours {
            let mut parent = ours.ready()?;
            install(&parent)?;
            let point = parent.fork(AfterFork::Continue)?;
            first = Some(First { parent, timings: point.timings(), point });
        }
        for (mut vm, (resident, timings)) in booted.into_iter().zip(&mut forks) {
            make_resident(vm.pid()?)?;
            *resident = Held::by(vm.pid()?)?.ram;
            timings.push(vm.fork(AfterFork::Continue)?.timings());
        }
    }
    let flat = median(&forks[0].1, |timings| timings.engine.stopped());
    for (&mib, (resident, timings)) in sizes.iter().zip(&forks) {
        let size = size_name(ByteSize::mib(mib));
        report.row(&Row {
            case: format!("first fork, {size}, {:.0} MiB resident: ours", resident / 1048576.0),
            unit: Unit::Microseconds,
            stats: median(timings, of_ours),
            baseline: Some(Baseline::new("QEMU's stop, save, load and run", median(timings, of_qemu))),
            goal: Goal::Median(1000.0),
        });
        report.row(&Row {
            case: format!("first fork, {size}: stopped in all (median of {})", timings.len()),
            unit: Unit::Microseconds,
            stats: median(timings, |timings| timings.engine.stopped()),
            baseline: Some(Baseline::new(format!("{} MiB", sizes[0]), flat)),
            goal: Goal::Ratio(1.5),
        });
        report.row(&Row {
            case: format!("first fork, {size}: QEMU's stop"),
            unit: Unit::Microseconds,
            stats: median(timings, |timings| timings.stop),
            baseline: Some(Baseline::new("QEMU's saving of its state", median(timings, |timings| timings.save))),
            goal: Goal::None,
        });
    }
    first.ok_or_else(|| Skip::new("no guest was forked"))
}

/// What a QEMU without us is given: the point's state, and its disks as raw files.
struct Base<'a> {
    dir: &'a Path,
    state: PathBuf,
    disks: Vec<PathBuf>,
    overlays: Vec<PathBuf>,
}

impl<'a> Base<'a> {
    fn of(point: &QemuPoint, place: &'a Place) -> Result<Self, Skip> {
        let dir = place.path();
        let state = dir.join("state");
        fs::write(&state, point.point().device_state().encode())?;
        let mut disks = Vec::new();
        for (at, (_, disk)) in point.point().disks().enumerate() {
            let path = dir.join(format!("base-{at}.raw"));
            copy_out(disk, &path)?;
            disks.push(path);
        }
        let overlays = (0..disks.len()).map(|at| dir.join(format!("overlay-{at}.qcow2"))).collect();
        Ok(Self { dir, state, disks, overlays })
    }

    /// Fresh overlays.
    fn overlay(&self) -> Outcome {
        self.disks.iter().zip(&self.overlays).try_for_each(|(disk, overlay)| tools::qcow2_over(overlay, disk, "raw"))
    }

    fn kit<'b>(&'b self, like: &'b QemuVm) -> BareKit<'b> {
        BareKit { like, state: &self.state, dir: self.dir, overlays: &self.overlays }
    }

    fn bare(&self, like: &QemuVm) -> Result<Bare, Skip> {
        self.overlay()?;
        Bare::start(&self.kit(like))
    }
}

fn copy_out(disk: &DiskImage, path: &Path) -> Outcome {
    let mut bytes = vec![0; (disk.capacity().get() * SECTOR_SIZE) as usize];
    disk.read(Lba::new(0), &mut bytes)?;
    Ok(fs::write(path, bytes)?)
}

/// Guests that were booted one after the other, and kept.
struct Boots {
    times: Stats,
    guests: Vec<QemuVm>,
}

fn boots(effort: &Effort, images: &Images) -> Result<Boots, Skip> {
    let mut times = Vec::new();
    let mut guests = Vec::new();
    for _ in 0..effort.pick(2, 3) {
        let (time, guest) = timed(|| images.launch(RAM)?.ready());
        times.push(time);
        guests.push(guest?);
    }
    Ok(Boots { times: Stats::of(times), guests })
}

/// A clone from nothing until its guest runs.
fn births(
    effort: &Effort,
    report: &mut Report,
    first: &First,
    base: &Base<'_>,
    like: &QemuVm,
    boots: &Boots,
) -> Outcome {
    // Whether it resumes at all.
    drop(base.bare(like)?);
    let mut round = Round::new(effort);
    round.probe(|| timed(|| first.point.spawn(QemuClone::default()).expect("a clone")).0);
    round.probe(|| {
        base.overlay().expect("overlays");
        timed(|| Bare::start(&base.kit(like)).expect("a bare QEMU")).0
    });
    round.probe(|| {
        let answer = || {
            let clone = first.point.spawn(QemuClone::default()).expect("a clone");
            in_guest(&clone.agent_socket(), "true").expect("an answer");
            clone
        };
        timed(answer).0
    });
    // Stages of a clone: its process, and what is left where a process waits.
    round.probe(|| timed(|| first.point.shell(QemuClone::default()).expect("a shell")).0);
    round.probe(|| {
        let shell = first.point.shell(QemuClone::default()).expect("a shell");
        timed(|| shell.enter().expect("a clone")).0
    });
    let [ours, bare, answer, shell, enter] = round.run();
    let mut row = |case: &str, stats: Stats, baseline: Option<Baseline>, goal: Goal| {
        report.row(&Row { case: case.into(), unit: Unit::Milliseconds, stats, baseline, goal });
    };
    let boot = || Some(Baseline::new("booting the same guest", boots.times));
    row(
        "clone: process start to running guest",
        ours,
        Some(Baseline::new("bare QEMU -incoming", bare)),
        Goal::Ratio(1.1),
    );
    row("clone: process start to running guest", ours, boot(), Goal::Ratio(0.0333));
    row("clone: process start to its agent's first run", answer, boot(), Goal::Ratio(0.0333));
    row("clone: of it, until its process waits", shell, None, Goal::None);
    row("clone: of it, where a process waits", enter, None, Goal::None);
    Ok(())
}

/// What clones take that do nothing.
fn idle(effort: &Effort, report: &mut Report, first: &First, base: &Base<'_>, like: &QemuVm, boots: &Boots) -> Outcome {
    let settle = || std::thread::sleep(effort.pick(Duration::from_secs(2), Duration::from_secs(5)));
    let engine = || bytes_in("/proc/self/smaps_rollup", "Anonymous");
    let parent_alone = Held::by(first.parent.pid()?)?;
    let engine_before = engine()?;
    let clones = (0..CLONES).map(|_| first.point.spawn(QemuClone::default())).collect::<Result<Vec<_>, _>>()?;
    let bare = base.bare(like)?;
    settle();
    // The sizes of this process's own memory are the engine's for its clones: layers, exports, threads.
    let engine = engine()? - engine_before;
    let mut of_clones = Held::default();
    for clone in &clones {
        let held = Held::by(clone.pid()?)?;
        of_clones.own += held.own;
        of_clones.ram_own += held.ram_own;
    }
    let parent = Held::by(first.parent.pid()?)?;
    let theirs = Held::by(bare.pid())?;
    let count = CLONES as f64;
    let all = parent.file + parent.beside_the_file() + of_clones.beside_the_file() + engine.max(0.0);
    let allowed = parent.file + parent_alone.beside_the_file() + count * (theirs.own + ALLOWANCE);
    let mut booted = 0.0;
    for guest in &boots.guests {
        let held = Held::by(guest.pid()?)?;
        booted += (held.file + held.own) / boots.guests.len() as f64;
    }
    let mut row = |case: String, value: f64, baseline: Option<(String, f64)>, goal: Goal| {
        let baseline = baseline.map(|(name, value)| Baseline::new(name, Stats::exactly(value)));
        report.row(&Row { case, unit: Unit::Bytes, stats: Stats::exactly(value), baseline, goal });
    };
    let case = format!("parent and {CLONES} idle clones, all in");
    row(case.clone(), all, Some((format!("parent, {CLONES} × (bare QEMU's own + 8 MiB)"), allowed)), Goal::Ratio(1.0));
    let scaled = format!("{CLONES} boots and a parent: {} scaled", boots.guests.len());
    row(case, all, Some((scaled, booted * (count + 1.0))), Goal::None);
    let mean = |sum: f64| sum / count;
    row("idle clone: QEMU's own".into(), mean(of_clones.own), Some(("bare QEMU's own".into(), theirs.own)), Goal::None);
    let pages = mean(of_clones.ram_own);
    row("idle clone: guest pages of its own".into(), pages, Some(("bare QEMU's".into(), theirs.ram_own)), Goal::None);
    row("idle clone: the engine's part".into(), mean(engine), None, Goal::None);
    Ok(())
}

/// Random requests inside a guest, past its page cache.
fn disk(effort: &Effort, report: &mut Report, base: &Base<'_>, clone: &QemuVm) -> Outcome {
    let bare = base.bare(clone)?;
    let (ours, theirs) = (clone.agent_socket(), &bare.agent);
    let count = effort.pick(400, 2000);
    for verb in ["read", "write"] {
        for workers in [1, 8] {
            requests(&ours, verb, count, workers)?;
            requests(theirs, verb, count, workers)?;
            let mut round = Round::new(effort);
            round.probe(|| requests(&ours, verb, count, workers).expect("a guest that answers"));
            round.probe(|| requests(theirs, verb, count, workers).expect("a guest that answers"));
            let [ours, theirs] = round.run();
            report.row(&Row {
                case: format!("4 KiB {verb}s inside a clone, {workers} at once"),
                unit: Unit::Microseconds,
                stats: ours,
                baseline: Some(Baseline::new("its disk on a qcow2 overlay", theirs)),
                goal: Goal::Ratio(1.0),
            });
        }
    }
    Ok(())
}

/// Forks of clones that have run and written, and forks of their clones.
fn generations(effort: &Effort, report: &mut Report, first: &First) -> Outcome {
    let mut point = first.point.clone();
    for generation in 2..=3 {
        let mut forks = Vec::new();
        let mut flat = Vec::new();
        let mut births = Vec::new();
        let mut next = None;
        for _ in 0..effort.pick(3, 5) {
            let mut clone = point.spawn(QemuClone::default())?;
            in_guest(&clone.agent_socket(), WRITE)?;
            let fork = clone.fork(AfterFork::Continue)?;
            forks.push(fork.timings());
            // The first clone of a point makes the file that all of them share.
            flat.push(nanoseconds(fork.shell(QemuClone::default())?.enter()?.1.engine));
            births.push(timed(|| fork.spawn(QemuClone::default())));
            next = Some(fork);
        }
        point = next.ok_or_else(|| Skip::new("no clone was forked"))?;
        let last = point.timings();
        let stages = format!("{} pages of {} differ", last.changed.get(), last.private.get());
        let mut row = |what: String, stats: Stats, baseline: Option<Duration>| {
            let baseline = baseline.map(|time| Baseline::new("the first fork", Stats::exactly(nanoseconds(time))));
            let case = format!("generation {generation}: {what}");
            report.row(&Row { case, unit: Unit::Milliseconds, stats, baseline, goal: Goal::None });
        };
        let whole = median(&forks, |timings| timings.engine.stopped());
        row("stopped in all".into(), whole, Some(first.timings.engine.stopped()));
        row("QEMU's stop".into(), median(&forks, |timings| timings.stop), Some(first.timings.stop));
        row(format!("own pages, {stages}"), median(&forks, |timings| timings.gather), None);
        row("QEMU's saving".into(), median(&forks, |timings| timings.save), Some(first.timings.save));
        let cut = |timings: &QemuForkTimings| timings.drain + timings.engine.flush + timings.engine.cut;
        row("gates, flush and cut".into(), median(&forks, cut), Some(cut(&first.timings)));
        row("going on".into(), median(&forks, |timings| timings.engine.resume), Some(first.timings.engine.resume));
        row("after it, its flat file, once".into(), Stats::of(flat), None);
        let births = births.into_iter().map(|(time, clone)| clone.map(|_| time)).collect::<Result<Vec<_>, _>>()?;
        row("after it, a clone".into(), Stats::of(births), None);
    }
    Ok(())
}
