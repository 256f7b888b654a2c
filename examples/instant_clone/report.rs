//! What a run tells: a page to read, or one JSON object.

use std::fmt::{self, Write};
use std::time::Duration;

use offshoot::ForkTimings;
use offshoot::page::ByteSize;

use crate::check::Findings;
use crate::common::program;
use crate::memory::MemoryReport;
use crate::options::Options;
use crate::scenario::Times;

/// Everything that a run found out.
pub struct Report {
    pub backend: &'static str,
    pub options: Options,
    /// For each depth: its forks, and how many clones were made from them.
    pub levels: Vec<Level>,
    pub stages: Stages,
    pub memory: MemoryReport,
    pub findings: Findings,
    /// Steps that the parent had made at its fork, and at its end.
    pub parent_steps: (u64, u64),
    pub took: Duration,
}

/// The forks that made one depth.
#[derive(Default)]
pub struct Level {
    /// How long each source stood still.
    pub forks: Vec<Duration>,
    pub vms: u32,
}

/// The times of each stage.
#[derive(Default)]
pub struct Stages {
    pause: Vec<Duration>,
    save: Vec<Duration>,
    cut: Vec<Duration>,
    resume: Vec<Duration>,
    spawn: Vec<Duration>,
    first_instruction: Vec<Duration>,
    first_pages: Vec<Duration>,
}

impl Stages {
    pub fn forked(&mut self, timings: &ForkTimings) {
        self.pause.push(timings.pause);
        self.save.push(timings.save);
        self.cut.push(timings.flush + timings.cut);
        self.resume.push(timings.resume);
    }

    /// Takes the times of a clone that has started; gives back the clone.
    pub fn spawned<T>(&mut self, (clone, times): (T, Times)) -> T {
        self.spawn.push(times.spawn);
        self.first_instruction.push(times.first_instruction);
        self.first_pages.push(times.first_pages);
        clone
    }

    /// Name, times, and what the stage is.
    fn each(&self) -> [(&'static str, &[Duration], &'static str); 7] {
        [
            ("pause", &self.pause, "vCPUs stop, disk requests are done"),
            ("save", &self.save, "vCPU state is read"),
            ("cut", &self.cut, "RAM and disk are sealed, fresh overlays put on"),
            ("resume", &self.resume, "the source runs on"),
            ("spawn", &self.spawn, "a clone's RAM and disk, its identity written"),
            ("first_instruction", &self.first_instruction, "from the start of spawn, vCPUs and their state included"),
            ("first_64_pages", &self.first_pages, "from there until 64 shared pages were written"),
        ]
    }
}

/// The middle, the worst but one in a hundred, and the worst.
struct Summary {
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Summary {
    fn of(times: &[Duration]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        // Nearest rank.
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or_default()
        };
        Self { p50: rank(50), p99: rank(99), max: rank(100) }
    }
}

impl program::Report for Report {
    fn is_good(&self) -> bool {
        self.findings.violations == 0
    }

    fn complaints(&self) -> Vec<String> {
        self.findings.examples.iter().map(|violation| format!("violation: {violation}")).collect()
    }

    /// All text in it is ours and needs no escaping.
    fn json(&self) -> String {
        let stages: Vec<_> =
            self.stages.each().iter().map(|(name, times, _)| format!("\"{name}\":{}", json_times(times))).collect();
        let levels = self.levels.iter().enumerate().map(|(above, level)| {
            let (depth, vms, forks) = (above + 1, level.vms, level.forks.len());
            format!("{{\"depth\":{depth},\"forks\":{forks},\"vms\":{vms},\"stopped\":{}}}", json_times(&level.forks))
        });
        let levels: Vec<_> = levels.collect();
        let (memory, options, findings) = (&self.memory, &self.options, &self.findings);
        let resident = memory.resident.map_or("null".to_owned(), |size| size.get().to_string());
        let fields = [
            ("backend", format!("\"{}\"", self.backend)),
            ("clones", options.clones.to_string()),
            ("depth", options.depth.to_string()),
            ("ram_bytes", options.ram.get().to_string()),
            ("vcpus", options.vcpus.to_string()),
            ("seed", options.common.seed.to_string()),
            ("vms", memory.vms.to_string()),
            ("violations", findings.violations.to_string()),
            ("pages_checked", findings.pages.to_string()),
            ("sectors_checked", findings.sectors.to_string()),
            ("parent_steps_at_fork", self.parent_steps.0.to_string()),
            ("parent_steps_at_end", self.parent_steps.1.to_string()),
            ("stages", format!("{{{}}}", stages.join(","))),
            (
                "memory",
                format!(
                    "{{\"resident_bytes\":{resident},\"shared_bytes\":{},\"private_bytes\":{},\"table_bytes\":{},\
                     \"full_copies_bytes\":{}}}",
                    memory.shared.get(),
                    memory.private.get(),
                    memory.tables.get(),
                    memory.full_copies.get()
                ),
            ),
            ("levels", format!("[{}]", levels.join(","))),
            ("seconds", format!("{:.3}", self.took.as_secs_f64())),
        ];
        let fields: Vec<_> = fields.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
        format!("{{{}}}", fields.join(","))
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }
}

impl Report {
    fn write_text(&self, out: &mut String) -> fmt::Result {
        let (options, memory, findings) = (&self.options, &self.memory, &self.findings);
        writeln!(
            out,
            "{} clones of one running parent, {} VMs in all to depth {}; each {} of RAM, {} vCPU; backend {}, seed {}",
            grouped(options.clones.into()),
            grouped(memory.vms),
            options.depth,
            Bytes(options.ram),
            options.vcpus,
            self.backend,
            options.common.seed
        )?;
        let (before, after) = self.parent_steps;
        let further = after.saturating_sub(before);
        writeln!(
            out,
            "The parent was {} steps old at its fork and made {} more.\n",
            grouped(before),
            grouped(further)
        )?;

        writeln!(out, "{:<18}{:>13}{:>13}{:>13}  of   what it is", "stage", "p50", "p99", "max")?;
        for (name, times, what) in self.stages.each() {
            let Summary { p50, p99, max } = Summary::of(times);
            let (p50, p99, max) = (Micros(p50), Micros(p99), Micros(max));
            writeln!(out, "{name:<18}{p50:>13}{p99:>13}{max:>13}  {:<4} {what}", times.len())?;
        }

        writeln!(out, "\n{:<18}{:>13}{:>13}{:>13}  of", "fork, source stops", "p50", "p99", "max")?;
        for (above, level) in self.levels.iter().enumerate() {
            let Summary { p50, p99, max } = Summary::of(&level.forks);
            let (p50, p99, max, depth) = (Micros(p50), Micros(p99), Micros(max), above + 1);
            let (forks, vms) = (level.forks.len(), grouped(level.vms.into()));
            writeln!(out, "to depth {depth:<9}{p50:>13}{p99:>13}{max:>13}  {forks:<4} for {vms} clones")?;
        }

        let resident = memory.resident.map_or("not told".to_owned(), |size| Bytes(size).to_string());
        writeln!(out, "\nmemory of {} VMs", grouped(memory.vms))?;
        writeln!(out, "  resident in all   {resident:>11}  the whole process, this program's own records included")?;
        writeln!(out, "  shared            {:>11}  pages that clones have in common, once", Bytes(memory.shared))?;
        let each = Bytes(memory.private_of_each());
        writeln!(out, "  private           {:>11}  {each} for each VM", Bytes(memory.private))?;
        writeln!(out, "  tables            {:>11}", Bytes(memory.tables))?;
        writeln!(out, "  as full copies    {:>11}", Bytes(memory.full_copies))?;

        let (pages, sectors) = (grouped(findings.pages), grouped(findings.sectors));
        writeln!(out, "\nchecked {pages} pages and {sectors} sectors in {:.1} s in all", self.took.as_secs_f64())?;
        match findings.violations {
            0 => writeln!(out, "every clone holds its fork point and its own writes, and nothing else"),
            found => writeln!(out, "VIOLATIONS: {}", grouped(found)),
        }
    }
}

fn json_times(times: &[Duration]) -> String {
    let Summary { p50, p99, max } = Summary::of(times);
    let micros = |time: Duration| format!("{:.3}", time.as_secs_f64() * 1e6);
    format!("{{\"p50_us\":{},\"p99_us\":{},\"max_us\":{}}}", micros(p50), micros(p99), micros(max))
}

/// A number with a comma after each three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A time in microseconds.
struct Micros(Duration);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:.1} µs", self.0.as_secs_f64() * 1e6))
    }
}

/// A size in the unit that suits it.
struct Bytes(ByteSize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.get() as f64;
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let unit = units.iter().find(|(_, shift)| bytes >= (1u64 << shift) as f64).unwrap_or(&("KiB", 10));
        let size = bytes / (1u64 << unit.1) as f64;
        // Sizes that the user gave are mostly whole.
        if size.fract() == 0.0 { f.pad(&format!("{size} {}", unit.0)) } else { f.pad(&format!("{size:.1} {}", unit.0)) }
    }
}
