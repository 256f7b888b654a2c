//! What a fork put off until the guest ran again, and when it was done.
//!
//! Cheap work is done before the fork returns, the rest on a thread of its own. Each piece is accounted for by name, to whoever asks and to
//! `tracing`. Must not know what the work is.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{Span, debug, debug_span, dispatcher};

use super::timings::nanoseconds;
use crate::backing::Deferred;

/// One piece of work that a fork put off, done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PutOff {
    /// What it was: `"old view"`, `"old machine"`. Empty where an embedder did not say.
    pub what: &'static str,
    /// How long it took.
    pub took: Duration,
    /// When it was finished, counted from when the guest ran again.
    pub finished: Duration,
}

#[derive(Debug, Default)]
struct Progress {
    done: Vec<PutOff>,
    /// How long the thread took, once it has nothing left.
    took: Option<Duration>,
}

type Shared = Arc<(Mutex<Progress>, Condvar)>;

fn lock(shared: &Shared) -> MutexGuard<'_, Progress> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that all is done.
struct Tell {
    start: Instant,
    shared: Shared,
}

impl Drop for Tell {
    fn drop(&mut self) {
        lock(&self.shared).took = Some(self.start.elapsed());
        self.shared.1.notify_all();
    }
}

/// Work that a fork put off until the guest ran again: page tables to tear down, tables to free.
#[derive(Clone, Debug, Default)]
pub struct Teardown(Option<Shared>);

/// Does pieces of work one after another.
fn finish(works: Vec<Deferred>, since: Instant, shared: &Shared) {
    for work in works {
        let (what, start) = (work.what(), Instant::now());
        drop(work);
        let piece = PutOff { what, took: start.elapsed(), finished: since.elapsed() };
        debug!(what, took_ns = nanoseconds(piece.took), finished_ns = nanoseconds(piece.finished), "put off, and done");
        lock(shared).done.push(piece);
    }
}

impl Teardown {
    /// Does cheap work now and the rest on a thread of its own; here, if no thread can be had. What it notes belongs to `fork`.
    pub(crate) fn run(work: Vec<Deferred>, fork: &Span) -> Self {
        let since = Instant::now();
        let (later, now): (Vec<_>, Vec<_>) =
            work.into_iter().filter(|work| !work.is_empty()).partition(Deferred::is_costly);
        if now.is_empty() && later.is_empty() {
            return Self(None);
        }
        let shared = Shared::default();
        debug_span!(parent: fork, "teardown").in_scope(|| finish(now, since, &shared));
        if later.is_empty() {
            lock(&shared).took = Some(Duration::ZERO);
            return Self(Some(shared));
        }
        let finish_all = {
            let (shared, fork, dispatch) = (shared.clone(), fork.clone(), dispatcher::get_default(Clone::clone));
            move |works: Vec<Deferred>| {
                // On drop, so that whoever waits is told even if the work panics.
                let tell = Tell { start: Instant::now(), shared };
                // The thread is ours: what it notes goes where the fork's notes went.
                dispatcher::with_default(&dispatch, || {
                    debug_span!(parent: &fork, "teardown").in_scope(|| finish(works, since, &tell.shared));
                    drop(fork);
                });
            }
        };
        // The work goes through a slot so that it is still ours if the thread cannot be made.
        let slot = Arc::new(Mutex::new(Some(later)));
        let take = |slot: &Mutex<Option<Vec<Deferred>>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (theirs, finish_there) = (slot.clone(), finish_all.clone());
        let thread = std::thread::Builder::new().name("offshoot-teardown".into()).spawn(move || {
            if let Some(works) = take(&theirs) {
                finish_there(works);
            }
        });
        if thread.is_err()
            && let Some(works) = take(&slot)
        {
            finish_all(works);
        }
        Self(Some(shared))
    }

    /// How long what was put off took on its own thread, once it is done; `None` while it runs. Zero where there was nothing to be
    /// done there.
    pub fn finished(&self) -> Option<Duration> {
        match &self.0 {
            None => Some(Duration::ZERO),
            Some(shared) => lock(shared).took,
        }
    }

    /// The pieces of work that are done, in the order in which they were: all there are once [`Teardown::finished`] says so.
    pub fn done(&self) -> Vec<PutOff> {
        self.0.as_ref().map(|shared| lock(shared).done.clone()).unwrap_or_default()
    }

    /// Waits until it is done; returns how long it took.
    pub fn wait(&self) -> Duration {
        let Some(shared) = &self.0 else { return Duration::ZERO };
        let mut progress = lock(shared);
        loop {
            match progress.took {
                Some(took) => return took,
                None => progress = shared.1.wait(progress).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}
