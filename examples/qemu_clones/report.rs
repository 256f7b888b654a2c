//! What a run tells: two tables, or one JSON object.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot::frontend::qemu::{QemuForkTimings, QemuSpawnTimings, QemuVm, Value, json};
use offshoot::page::ByteSize;

use crate::memory::ProcessMemory;
use crate::options::Options;

/// The stages in the order they come in, and what each is.
const STAGES: &[(&str, &str)] = &[
    ("boot", "the parent: from the start of QEMU until it said that it was ready"),
    ("successor", "ahead of the pause: the process that the parent goes on in"),
    ("fork_stop", "QEMU stops its processors, drains and flushes its disks"),
    ("fork_gather", "a clone's own pages are copied out of its process"),
    ("fork_save", "QEMU saves its devices"),
    ("fork_load", "the parent's successor loads them"),
    ("fork_cut", "ours: disks drained, RAM and disks sealed"),
    ("fork_resume", "QEMU runs on"),
    ("fork_stopped", "how long the source stood still, all in all"),
    ("clone_engine", "RAM, overlays of the disks, identity, exports"),
    ("clone_start", "QEMU, from its start to its first word"),
    ("clone_load", "it loads the devices' state"),
    ("clone_run", "until it runs"),
    ("clone", "all of that: from nothing to a guest that runs"),
    ("first_answer", "from nothing to the first answer of the clone's agent"),
];

/// How long each stage took, each time.
#[derive(Default)]
pub struct Stages(Vec<(&'static str, Duration)>);

impl Stages {
    pub fn add(&mut self, name: &'static str, took: Duration) {
        debug_assert!(STAGES.iter().any(|(known, _)| *known == name), "{name}");
        self.0.push((name, took));
    }

    /// The middle, the worst but one in a hundred, and the worst; how many there are.
    fn summary(&self, name: &str) -> Option<([Duration; 3], usize)> {
        let mut times: Vec<_> = self.0.iter().filter(|(of, _)| *of == name).map(|(_, took)| *took).collect();
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1).copied();
        Some(([at(50)?, at(99)?, at(100)?], times.len()))
    }
}

/// One guest.
pub struct Row {
    name: String,
    generation: u32,
    pid: u32,
    console: PathBuf,
    agent: PathBuf,
    memory: ProcessMemory,
}

impl Row {
    pub fn new(name: &str, generation: u32, vm: &QemuVm, console: &Path, memory: ProcessMemory) -> Self {
        let pid = vm.pid().unwrap_or_default();
        Self { name: name.into(), generation, pid, console: console.into(), agent: vm.agent_socket(), memory }
    }
}

/// Everything that a run found out.
pub struct Report {
    ram: ByteSize,
    pub stages: Stages,
    pub memory: Vec<Row>,
}

impl Report {
    pub fn new(options: &Options) -> Self {
        Self { ram: options.ram, stages: Stages::default(), memory: Vec::new() }
    }

    /// Takes the times of a fork. Only the first generation's parent has a successor, only clones have pages of their own.
    pub fn forked(&mut self, generation: u32, timings: &QemuForkTimings) {
        if generation == 1 {
            self.stages.add("successor", timings.successor);
            self.stages.add("fork_load", timings.load);
        } else {
            self.stages.add("fork_gather", timings.gather);
        }
        self.stages.add("fork_stop", timings.stop);
        self.stages.add("fork_save", timings.save);
        self.stages.add("fork_cut", timings.drain + timings.engine.flush + timings.engine.cut);
        self.stages.add("fork_resume", timings.engine.resume);
        self.stages.add("fork_stopped", timings.engine.stopped());
    }

    /// Takes the times of a clone.
    pub fn spawned(&mut self, timings: &QemuSpawnTimings, whole: Duration) {
        self.stages.add("clone_engine", timings.engine);
        self.stages.add("clone_start", timings.start);
        self.stages.add("clone_load", timings.load);
        self.stages.add("clone_run", timings.run);
        self.stages.add("clone", whole);
    }

    fn total(&self, of: impl Fn(&ProcessMemory) -> ByteSize) -> ByteSize {
        ByteSize::new(self.memory.iter().map(|row| of(&row.memory).get()).sum())
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("text grows");
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{:14} {:>5} {:>10} {:>10} {:>10}", "milliseconds", "n", "p50", "p99", "max")?;
        for (name, what) in STAGES {
            let Some((times, count)) = self.stages.summary(name) else { continue };
            let [p50, p99, max] = times.map(|time| time.as_secs_f64() * 1e3);
            writeln!(out, "{name:14} {count:>5} {p50:>10.2} {p99:>10.2} {max:>10.2}  {what}")?;
        }
        writeln!(
            out,
            "\n{:14} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "MiB", "pid", "RAM", "shared", "private", "proport.", "QEMU's own"
        )?;
        for row in &self.memory {
            let (ram, own) = (&row.memory.ram, &row.memory.own);
            let [resident, shared, private, proportional, own] =
                [ram.resident, ram.shared, ram.private, ram.proportional, own.proportional].map(mib);
            writeln!(
                out,
                "{:14} {:>8} {resident:>10.1} {shared:>10.1} {private:>10.1} {proportional:>10.1} {own:>10.1}",
                row.name, row.pid
            )?;
        }
        let (resident, proportional) = (self.total(|m| m.ram.resident), self.total(|m| m.ram.proportional));
        writeln!(
            out,
            "\n{} guests of {:.0} MiB: their RAM is {:.1} MiB in all; without sharing, what they have touched would be {:.1}: {:.1} MiB saved",
            self.memory.len(),
            mib(self.ram),
            mib(proportional),
            mib(resident),
            mib(resident) - mib(proportional)
        )?;
        writeln!(out, "\nconsole and agent's socket of each")?;
        for row in &self.memory {
            writeln!(out, "{:14} {}  {}", row.name, row.console.display(), row.agent.display())?;
        }
        Ok(())
    }

    pub fn json(&self) -> Value {
        let stages: Vec<_> = STAGES
            .iter()
            .filter_map(|(name, _)| {
                let ([p50, p99, max], count) = self.stages.summary(name)?;
                let us = |time: Duration| time.as_secs_f64() * 1e6;
                Some(json!({ "stage": name, "n": count, "p50_us": us(p50), "p99_us": us(p99), "max_us": us(max) }))
            })
            .collect();
        let guests: Vec<_> = self
            .memory
            .iter()
            .map(|row| {
                let (ram, own) = (&row.memory.ram, &row.memory.own);
                json!({
                    "name": row.name, "generation": row.generation, "pid": row.pid, "console": row.console,
                    "agent": row.agent, "ram_resident": ram.resident.get(), "ram_shared": ram.shared.get(),
                    "ram_private": ram.private.get(), "ram_proportional": ram.proportional.get(),
                    "own_proportional": own.proportional.get(), "own_private": own.private.get(),
                })
            })
            .collect();
        json!({ "ram": self.ram.get(), "stages": stages, "guests": guests })
    }
}

fn mib(size: ByteSize) -> f64 {
    size.get() as f64 / f64::from(1 << 20)
}
