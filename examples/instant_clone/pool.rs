//! A few threads that share out work, and a line on the terminal that says how far they are.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use offshoot::BoxError;

/// How many threads this computer runs at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` on every item, on so many threads. After the first error no more items are handed out.
pub fn share<T: Send, R: Send>(
    workers: usize,
    items: impl Iterator<Item = T> + Send,
    progress: &Progress,
    work: impl Fn(T) -> Result<R, BoxError> + Sync,
) -> Result<Vec<R>, BoxError> {
    let items = Mutex::new(items.fuse());
    let results = Mutex::new(Ok(Vec::new()));
    let lock_results = || results.lock().unwrap_or_else(PoisonError::into_inner);
    let worker = || {
        loop {
            let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(item) = next.filter(|_| lock_results().is_ok()) else { return };
            let result = work(item);
            progress.step();
            let mut results = lock_results();
            match (&mut *results, result) {
                (Ok(done), Ok(result)) => done.push(result),
                (Ok(_), Err(error)) => *results = Err(error),
                (Err(_), _) => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(worker);
        }
        worker();
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// A line on standard error for what takes longer than a second, where that is a terminal.
pub struct Progress {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    start: Instant,
    drawn: Mutex<Option<Instant>>,
}

impl Progress {
    pub fn new(what: &'static str, total: u64) -> Self {
        Self { what, total, done: AtomicU64::new(0), start: Instant::now(), drawn: Mutex::new(None) }
    }

    fn step(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if self.start.elapsed() < Duration::from_secs(1) {
            return;
        }
        // Whoever finds another thread drawing has nothing to add.
        let Ok(mut drawn) = self.drawn.try_lock() else { return };
        let mut out = std::io::stderr();
        if out.is_terminal() && drawn.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
            *drawn = Some(Instant::now());
            let _ = write!(out, "\r{}: {done} of {}\x1b[K", self.what, self.total);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.lock().is_ok_and(|drawn| drawn.is_some()) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
