//! What a fork cost, stage by stage, and what it put off.
//!
//! Every stage is here, the embedder's too: a figure that hides a stage is worth nothing. Plain values; knows nothing of VMs.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backing::Deferred;
use crate::page::{ByteSize, PageCount};

/// The time of each stage of one fork, in order. `pause` to `resume` is what the guest loses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ForkTimings {
    /// The embedder's pause and drain.
    pub pause: Duration,
    /// The embedder's saving of device state.
    pub save: Duration,
    /// Flushing the disks' metadata.
    pub flush: Duration,
    /// The engine's cut of RAM and all disks.
    pub cut: Duration,
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
        self.pause + self.save + self.flush + self.cut + self.resume
    }
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

type Done = Arc<(Mutex<Option<Duration>>, Condvar)>;

/// Says that work is done.
struct Tell {
    start: Instant,
    done: Done,
}

impl Drop for Tell {
    fn drop(&mut self) {
        *self.done.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.start.elapsed());
        self.done.1.notify_all();
    }
}

/// Work that a fork put off until the guest ran again: page tables to tear down, tables to free.
#[derive(Clone, Debug, Default)]
pub struct Teardown(Option<Done>);

impl Teardown {
    /// Does cheap work now and the rest on a thread of its own; here, if no thread can be had.
    pub(crate) fn run(work: Vec<Deferred>) -> Self {
        let (later, now): (Vec<_>, Vec<_>) = work.into_iter().partition(Deferred::is_costly);
        drop(now);
        if later.is_empty() {
            return Self(None);
        }
        let done = Arc::new((Mutex::new(None), Condvar::new()));
        let finish = {
            let done = done.clone();
            move |work: Vec<Deferred>| {
                let done = done.clone();
                // On drop, so that whoever waits is told even if the work panics.
                let _tell = Tell { start: Instant::now(), done };
                drop(work);
            }
        };
        // The work goes through a slot so that it is still ours if the thread cannot be made.
        let slot = Arc::new(Mutex::new(Some(later)));
        let take = |slot: &Mutex<Option<Vec<Deferred>>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (theirs, finish_there) = (slot.clone(), finish.clone());
        let thread = std::thread::Builder::new().name("offshoot-teardown".into()).spawn(move || {
            if let Some(work) = take(&theirs) {
                finish_there(work);
            }
        });
        if thread.is_err()
            && let Some(work) = take(&slot)
        {
            finish(work);
        }
        Self(Some(done))
    }

    /// How long it took, once it is done; `None` while it runs. Zero where nothing was put off.
    pub fn finished(&self) -> Option<Duration> {
        match &self.0 {
            None => Some(Duration::ZERO),
            Some(done) => *done.0.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Waits until it is done; returns how long it took.
    pub fn wait(&self) -> Duration {
        let Some(done) = &self.0 else { return Duration::ZERO };
        let mut guard = done.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *guard {
                Some(took) => return took,
                None => guard = done.1.wait(guard).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}
