//! What a fork cost, stage by stage, and what it put off.
//!
//! Every stage is here, the embedder's too: a figure that hides a stage is worth nothing. Plain values; knows nothing of VMs.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backing::Deferred;

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
}

impl ForkTimings {
    /// How long the guest stood still: every stage but what comes before and after.
    pub fn stopped(&self) -> Duration {
        self.pause + self.save + self.flush + self.cut + self.resume
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
