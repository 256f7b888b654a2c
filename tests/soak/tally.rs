//! What a soak found: counts, and the first fault in words. Must not know what is checked.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::stamp::Wrong;

/// Counts of many threads.
#[derive(Default)]
pub struct Tally {
    checks: AtomicU64,
    torn: AtomicU64,
    foreign: AtomicU64,
    lost: AtomicU64,
    forks: AtomicU64,
    first: OnceLock<String>,
}

/// What it came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Found {
    pub checks: u64,
    pub torn: u64,
    pub foreign: u64,
    pub lost: u64,
    /// Forks, of whatever kind, that writers ran through.
    pub forks: u64,
    /// The first fault.
    pub first: Option<String>,
}

impl Tally {
    /// Takes note of page checks that were all right, or of one that was not.
    pub fn checked(&self, count: u64) {
        self.checks.fetch_add(count, Ordering::Relaxed);
    }

    pub fn wrong(&self, wrong: Wrong, what: impl fmt::Display) {
        let counter = match wrong {
            Wrong::Torn => &self.torn,
            Wrong::Foreign => &self.foreign,
            Wrong::Lost => &self.lost,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.first.get_or_init(|| format!("{wrong:?}: {what}"));
    }

    pub fn forked(&self) {
        self.forks.fetch_add(1, Ordering::Relaxed);
    }

    pub fn checks(&self) -> u64 {
        self.checks.load(Ordering::Relaxed)
    }

    pub fn found(&self) -> Found {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Found {
            checks: count(&self.checks),
            torn: count(&self.torn),
            foreign: count(&self.foreign),
            lost: count(&self.lost),
            forks: count(&self.forks),
            first: self.first.get().cloned(),
        }
    }
}

impl Found {
    /// Pages that were wrong in any way.
    pub fn faults(&self) -> u64 {
        self.torn + self.foreign + self.lost
    }
}

impl std::ops::AddAssign for Found {
    fn add_assign(&mut self, other: Self) {
        self.checks += other.checks;
        self.torn += other.torn;
        self.foreign += other.foreign;
        self.lost += other.lost;
        self.forks += other.forks;
        self.first = self.first.take().or(other.first);
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { checks, torn, foreign, lost, forks, first } = self;
        write!(f, "{checks} page checks through {forks} forks: {torn} torn, {foreign} foreign, {lost} lost")?;
        first.iter().try_for_each(|first| write!(f, "; {first}"))
    }
}
