//! What a fork cost, stage by stage, and what it put off.
//!
//! Every stage is here, the embedder's too: a figure that hides a stage is worth nothing. Plain values; knows nothing of VMs. What
//! was put off, and when it was done, is in [`teardown`](super::teardown).
//!
//! The same goes to `tracing`: a span for each stage within the span `fork`, an event for each round of a pre-copy (in the spans `round` and
//! `last round`), one with all stages when the fork is done, and one for each piece of work that was put off (in the span `teardown`).

use std::fmt;
use std::time::{Duration, Instant};

use tracing::debug;

use crate::page::{ByteSize, PageCount};

/// The time of each stage of one fork, in order. `pause` to `resume` is what the guest loses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ForkTimings {
    /// What is done while the guest still runs: taking a shell, where it is to be moved; copying ahead, in a live fork.
    pub prepare: Duration,
    /// The embedder's pause and drain.
    pub pause: Duration,
    /// The embedder's saving of device state.
    pub save: Duration,
    /// Flushing the disks' metadata.
    pub flush: Duration,
    /// The engine's cut of RAM and all disks.
    pub cut: Duration,
    /// The embedder's taking its guest to where RAM goes on. Next to nothing for a fork in place.
    pub relocate: Duration,
    /// The embedder's resume.
    pub resume: Duration,
    /// From the call to its return; what is put off is not in it.
    pub total: Duration,
    /// What was copied before the pause, in a [`Vm::fork_live`](crate::Vm::fork_live).
    pub precopy: Option<PrecopyTimings>,
}

impl ForkTimings {
    /// How long the guest stood still: every stage but what comes before and after.
    pub fn stopped(&self) -> Duration {
        self.pause + self.save + self.flush + self.cut + self.relocate + self.resume
    }

    /// All of it as one event.
    pub(crate) fn note(&self) {
        debug!(
            prepare_ns = nanoseconds(self.prepare),
            pause_ns = nanoseconds(self.pause),
            save_ns = nanoseconds(self.save),
            flush_ns = nanoseconds(self.flush),
            cut_ns = nanoseconds(self.cut),
            relocate_ns = nanoseconds(self.relocate),
            resume_ns = nanoseconds(self.resume),
            stopped_ns = nanoseconds(self.stopped()),
            total_ns = nanoseconds(self.total),
            "forked"
        );
        if let Some(precopy) = &self.precopy {
            debug!(
                end = ?precopy.end,
                rounds = precopy.rounds().len() as u64,
                bytes = precopy.bytes().get(),
                last_bytes = precopy.last.bytes.get(),
                estimate_ns = nanoseconds(precopy.estimate),
                total_ns = nanoseconds(precopy.total),
                "copied ahead"
            );
        }
    }
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What a live fork copied while the guest ran, and the last round, inside the pause.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrecopyTimings {
    /// From the call to the pause.
    pub total: Duration,
    /// How it came to the pause.
    pub end: PrecopyEnd,
    /// What the last round was estimated to take, once its pages were found.
    pub estimate: Duration,
    /// The last round, part of [`ForkTimings::cut`].
    pub last: PrecopyRound,
    rounds: [PrecopyRound; Self::MAX_ROUNDS as usize],
    used: u8,
}

/// One round of a pre-copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PrecopyRound {
    /// Pages copied.
    pub pages: PageCount,
    /// Bytes copied.
    pub bytes: ByteSize,
    /// Finding the pages that were written, and protecting them.
    pub scan: Duration,
    /// Copying them.
    pub copy: Duration,
}

impl PrecopyRound {
    /// As an event, in the span of its round.
    pub(crate) fn note(&self) {
        let (pages, bytes) = (self.pages.get(), self.bytes.get());
        debug!(pages, bytes, scan_ns = nanoseconds(self.scan), copy_ns = nanoseconds(self.copy), "copied");
    }
}

/// How a pre-copy ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PrecopyEnd {
    /// Few enough pages were left.
    Converged,
    /// The guest wrote faster than the rounds allowed could copy; what was left fits the pause's bound all the same.
    RoundsUsedUp,
    /// The pause was estimated over its bound, and the policy was to copy all the same.
    StoppedAndCopied,
    /// There was nothing to copy: the VM had never been cut.
    NotNeeded,
    /// There was no write protection to be had: everything was copied inside the pause.
    Fallback(Fallback),
}

/// Why a live fork copied everything inside the pause.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallback {
    /// A kernel before 6.7, or without userfaultfd.
    Kernel,
    /// userfaultfd(2) is not permitted.
    NotPermitted,
    /// The embedder has registered the memory with a userfaultfd of its own.
    Taken,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "asynchronous write protection needs Linux 6.7 with CONFIG_USERFAULTFD",
            Self::NotPermitted => "userfaultfd(2) is not permitted: allow it in the seccomp profile or security policy",
            Self::Taken => "the memory is registered with another userfaultfd",
        })
    }
}

impl PrecopyTimings {
    /// The most rounds that any policy gets.
    pub const MAX_ROUNDS: u32 = 16;

    pub(crate) fn new(end: PrecopyEnd) -> Self {
        let none = PrecopyRound::default();
        let rounds = [none; Self::MAX_ROUNDS as usize];
        Self { total: Duration::ZERO, end, estimate: Duration::ZERO, last: none, rounds, used: 0 }
    }

    /// Appends a round; past [`MAX_ROUNDS`](Self::MAX_ROUNDS) it is forgotten.
    pub(crate) fn push(&mut self, round: PrecopyRound) {
        if let Some(slot) = self.rounds.get_mut(usize::from(self.used)) {
            *slot = round;
            self.used += 1;
        }
    }

    /// The rounds while the guest ran, in order.
    pub fn rounds(&self) -> &[PrecopyRound] {
        &self.rounds[..usize::from(self.used)]
    }

    /// Bytes copied while the guest ran, pages that were copied again counted again.
    pub fn bytes(&self) -> ByteSize {
        ByteSize::new(self.rounds().iter().map(|round| round.bytes.get()).sum())
    }

    /// Why everything was copied inside the pause, if it was.
    pub fn fallback(&self) -> Option<Fallback> {
        match self.end {
            PrecopyEnd::Fallback(why) => Some(why),
            _ => None,
        }
    }
}

/// Measures stages one after another.
pub(crate) struct Stopwatch {
    start: Instant,
    last: Instant,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now }
    }

    pub(crate) fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.last, now)
    }

    pub(crate) fn total(&self) -> Duration {
        self.start.elapsed()
    }
}
