//! What a run tells: a page to read, or one JSON object.

use std::time::Duration;

use crate::common::program;
use crate::guest::Verdict;
use crate::options::Options;

/// Everything that a run found out.
pub struct Report {
    backend: &'static str,
    options: Options,
    accepted: u32,
    rejected: u32,
    smashed: u32,
    /// The number of the first input that found the bug.
    found_at: Option<u32>,
    run: Vec<Duration>,
    reset: Vec<Duration>,
    load: Vec<Duration>,
    respawn: Vec<Duration>,
    pages: u64,
    /// How many resets were compared in full.
    pub checked: u32,
    violations: u32,
    /// The first few, in words.
    examples: Vec<String>,
}

/// The middle, and the worst but one in a hundred.
fn summary(times: &[Duration]) -> [Duration; 2] {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    // Nearest rank.
    [50, 99].map(|percent| sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or_default())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn per_second(times: &[Duration]) -> f64 {
    let [p50, _] = summary(times);
    1e6 / micros(p50).max(1e-3)
}

impl Report {
    pub fn new(backend: &'static str, options: Options) -> Self {
        let [run, reset, load, respawn] = [const { Vec::new() }; 4];
        let (accepted, rejected, smashed, found_at, pages, checked, violations) = (0, 0, 0, None, 0, 0, 0);
        let examples = Vec::new();
        Self {
            backend,
            options,
            accepted,
            rejected,
            smashed,
            found_at,
            run,
            reset,
            load,
            respawn,
            pages,
            checked,
            violations,
            examples,
        }
    }

    pub fn took(&mut self, run: Duration, reset: Duration, load: Duration, pages: u64) {
        self.run.push(run);
        self.reset.push(reset);
        self.load.push(load);
        self.pages += pages;
    }

    pub fn respawned(&mut self, took: Duration) {
        self.respawn.push(took);
    }

    pub fn verdict(&mut self, number: u32, verdict: Verdict) {
        match verdict {
            Verdict::Accepted { .. } => self.accepted += 1,
            Verdict::Rejected { .. } => self.rejected += 1,
            Verdict::Smashed => {
                self.smashed += 1;
                self.found_at.get_or_insert(number);
            }
        }
    }

    pub fn violation(&mut self, what: impl FnOnce() -> String) {
        self.violations += 1;
        if self.examples.len() < 5 {
            self.examples.push(what());
        }
    }

    /// Name, times, and what they are.
    fn stages(&self) -> [(&'static str, Vec<Duration>, &'static str); 5] {
        let memory = self.reset.iter().zip(&self.load).map(|(all, load)| all.saturating_sub(*load)).collect();
        [
            ("run", self.run.clone(), "an input, to its verdict"),
            ("reset", self.reset.clone(), "back to the fork point"),
            ("reset_memory", memory, "of it RAM and disk"),
            ("load_state", self.load.clone(), "of it the vCPU"),
            ("respawn", self.respawn.clone(), "drop, spawn, a new machine, load: instead of a reset"),
        ]
    }

    fn mean_pages(&self) -> f64 {
        self.pages as f64 / self.reset.len().max(1) as f64
    }
}

impl program::Report for Report {
    fn is_good(&self) -> bool {
        self.violations == 0 && self.found_at.is_some()
    }

    fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<_> = self.examples.iter().map(|violation| format!("violation: {violation}")).collect();
        if self.found_at.is_none() {
            complaints.push(format!("error: {} inputs did not find the planted bug", self.options.inputs));
        }
        complaints
    }

    /// All text in it is ours and needs no escaping.
    fn json(&self) -> String {
        let stages = self.stages().map(|(name, times, _)| {
            let [p50, p99] = summary(&times).map(micros);
            format!("\"{name}\":{{\"p50_us\":{p50:.3},\"p99_us\":{p99:.3}}}")
        });
        let fields = [
            ("backend", format!("\"{}\"", self.backend)),
            ("inputs", self.options.inputs.to_string()),
            ("seed", self.options.common.seed.to_string()),
            ("ram_bytes", self.options.ram.get().to_string()),
            ("accepted", self.accepted.to_string()),
            ("rejected", self.rejected.to_string()),
            ("smashed", self.smashed.to_string()),
            ("found_at", self.found_at.map_or("null".to_owned(), |number| number.to_string())),
            ("resets_checked", self.checked.to_string()),
            ("violations", self.violations.to_string()),
            ("pages_a_reset", format!("{:.2}", self.mean_pages())),
            ("resets_a_second", format!("{:.1}", per_second(&self.reset))),
            ("respawns_a_second", format!("{:.1}", per_second(&self.respawn))),
            ("stages", format!("{{{}}}", stages.join(","))),
        ];
        format!("{{{}}}", fields.map(|(key, value)| format!("\"{key}\":{value}")).join(","))
    }

    fn text(&self) -> String {
        let Options { inputs, ram, common, .. } = self.options;
        let seed = common.seed;
        let mut lines = vec![
            format!("fuzz_reset on {}: {inputs} inputs from seed {seed}, {} MiB of RAM", self.backend, ram.get() >> 20),
            format!("  {} accepted, {} rejected, {} smashed the stack", self.accepted, self.rejected, self.smashed),
            self.found_at.map_or("  the planted bug was not found".to_owned(), |number| {
                format!("  the planted bug was found by input {number}")
            }),
            String::new(),
        ];
        for (name, times, what) in self.stages() {
            let [p50, p99] = summary(&times).map(micros);
            lines.push(format!("  {name:<13} p50 {p50:>9.1} µs  p99 {p99:>9.1} µs   {what}"));
        }
        let (resets, respawns) = (per_second(&self.reset), per_second(&self.respawn));
        lines.extend([
            String::new(),
            format!("  {resets:.0} resets a second, {respawns:.0} respawns: {:.1} times as many", resets / respawns),
            format!("  {:.1} pages written a run, of RAM and disk", self.mean_pages()),
            format!(
                "  {} resets compared in full, every verdict checked: {} violations",
                self.checked, self.violations
            ),
        ]);
        lines.join("\n") + "\n"
    }
}
