//! Watching a long call, and stopping it: one mechanism for everything that copies or checks many pages.
//!
//! A call that is stopped has changed nothing. Must not know what the call does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::id::LayerId;
use crate::error::StoreError;
use crate::page::PageCount;

/// How far a call has come with one layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The layer that is checked, or made.
    pub layer: LayerId,
    /// Pages done.
    pub done: PageCount,
    /// Pages in all.
    pub total: PageCount,
}

/// Stops long calls, from any thread. Clones of it are one.
#[derive(Clone, Default, Debug)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// One that stops nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops the calls that were given this, now and later: each ends with [`StoreError::Cancelled`] after at most some 64 pages, unless it was done
    /// with its pages already.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it does.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a long call reports to, and is stopped by; by default nobody and nothing.
///
/// ```
/// use offshoot::page::ByteSize;
/// use offshoot::store::{Cancel, CloneError, CloneName, CloneStore, Job, Progress, StoreOptions};
/// # let path = std::env::temp_dir().join(format!("offshoot-job-doc-{}", std::process::id()));
/// let store = CloneStore::open(&path, StoreOptions::default())?;
/// let (cancel, name) = (Cancel::new(), CloneName::new("golden")?);
/// let image = offshoot::testing::ByteSource::new(vec![7; 1 << 20]);
/// // Stopped by its own report, at the first that is told.
/// let report = |progress: Progress| if progress.done > offshoot::page::PageCount::ZERO { cancel.cancel() };
/// let stopped = store.create_image(&name, &image, &Job::new().report(&report).cancel(&cancel));
/// assert!(stopped.unwrap_err().to_string().contains("cancelled"));
/// store.create_image(&name, &image, &Job::new())?;
/// # drop(store);
/// # std::fs::remove_dir_all(&path).unwrap();
/// # Ok::<(), CloneError>(())
/// ```
#[derive(Clone, Copy, Default)]
pub struct Job<'a> {
    report: Option<&'a (dyn Fn(Progress) + Sync)>,
    cancel: Option<&'a Cancel>,
}

impl fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl<'a> Job<'a> {
    /// One that nobody watches or stops.
    pub const fn new() -> Self {
        Self { report: None, cancel: None }
    }

    /// Has `report` told of progress, on the threads that work, every 64 pages or so. It may use the store and its disks, but not what the call itself
    /// works on alone: it is called with no lock held.
    #[must_use]
    pub const fn report(self, report: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self { report: Some(report), ..self }
    }

    /// Has `cancel` stop it.
    #[must_use]
    pub const fn cancel(self, cancel: &'a Cancel) -> Self {
        Self { cancel: Some(cancel), ..self }
    }

    /// The same, with nobody told.
    pub(super) const fn quiet(self) -> Self {
        Self { report: None, ..self }
    }

    /// Fails once it is cancelled.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        if self.cancel.is_some_and(Cancel::is_cancelled) { Err(StoreError::Cancelled) } else { Ok(()) }
    }

    /// Tells of progress, and fails once it is cancelled.
    pub(crate) fn step(&self, layer: LayerId, done: u64, total: u64) -> Result<(), StoreError> {
        if let Some(report) = self.report {
            report(Progress { layer, done: PageCount::new(done), total: PageCount::new(total) });
        }
        self.check()
    }
}
