//! Sampling: probes in turn, so that noise hits all alike, and what their samples come to. Must not know what is measured.

use std::time::{Duration, Instant};

use super::options::Effort;

/// Fewer samples than this are no median; a slow probe takes them whatever its time.
const FEWEST: usize = 3;

/// What the samples of one probe come to, in the base unit: nanoseconds, or bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Stats {
    pub p50: f64,
    pub p99: f64,
}

impl Stats {
    /// Percentiles by nearest rank. `samples` must not be empty.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let rank = |p: f64| samples[((samples.len() as f64 * p).ceil() as usize).clamp(1, samples.len()) - 1];
        Self { p50: rank(0.50), p99: rank(0.99) }
    }

    /// Something that is counted, not sampled.
    pub fn exactly(value: f64) -> Self {
        Self { p50: value, p99: value }
    }
}

/// Times one call. Its result comes back, so that dropping it is not in the time.
#[inline]
pub fn timed<T>(call: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = call();
    (start.elapsed().as_secs_f64() * 1e9, result)
}

/// Probes that are sampled in turn.
pub struct Round<'a> {
    effort: Effort,
    probes: Vec<Probe<'a>>,
}

struct Probe<'a> {
    sample: Box<dyn FnMut() -> f64 + 'a>,
    samples: Vec<f64>,
    spent: Duration,
}

impl<'a> Round<'a> {
    pub fn new(effort: &Effort) -> Self {
        Self { effort: *effort, probes: Vec::new() }
    }

    /// Adds a probe: each call prepares, times one thing (or the mean of a batch) and gives the time, usually by [`timed`].
    pub fn probe(&mut self, sample: impl FnMut() -> f64 + 'a) {
        self.probes.push(Probe { sample: Box::new(sample), samples: Vec::new(), spent: Duration::ZERO });
    }

    /// Samples all probes in turn; the first turn warms up and is not counted. A probe that has used up its time leaves the turn.
    pub fn run<const N: usize>(mut self) -> [Stats; N] {
        assert_eq!(self.probes.len(), N, "a figure names as many results as it has probes");
        self.turns();
        let mut probes = self.probes.into_iter();
        std::array::from_fn(|_| Stats::of(probes.next().map(|probe| probe.samples).unwrap_or_default()))
    }

    /// As [`Round::run`], for a number of probes that is not known here.
    pub fn run_all(mut self) -> Vec<Stats> {
        self.turns();
        self.probes.into_iter().map(|probe| Stats::of(probe.samples)).collect()
    }

    fn turns(&mut self) {
        for probe in &mut self.probes {
            (probe.sample)();
        }
        let (most, time) = (self.effort.samples(), self.effort.time_for_a_probe());
        loop {
            let mut idle = true;
            for probe in &mut self.probes {
                let taken = probe.samples.len();
                if taken >= most || (taken >= FEWEST && probe.spent >= time) {
                    continue;
                }
                idle = false;
                let start = Instant::now();
                let sample = (probe.sample)();
                probe.spent += start.elapsed();
                probe.samples.push(sample);
            }
            if idle {
                return;
            }
        }
    }
}

/// A small generator of pseudo-random numbers (xorshift64), the same for subjects and baselines.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Makes what comes next depend on `value`.
    #[inline]
    pub fn stir(&mut self, value: u64) {
        self.0 = (self.0 ^ value) | 1;
    }
}
