//! The gate of one export: every request passes it, and a fork holds it shut.
//!
//! Unlike the disk's own gate it lets nothing through while it is held, reads neither, and it can be closed for good, which wakes whoever
//! waits. Knows no disks and no sockets.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    inside: u64,
    holders: u64,
    closed: bool,
}

/// Open, held, or closed for good.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A request that is being executed.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Gate);

/// The export is going away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Closed;

/// An export whose requests wait: those that had begun have ended, and later ones go on when this is dropped.
///
/// Hold one in [`Guest::pause`](crate::Guest::pause) for each export of the VM, and drop them in [`Guest::resume`](crate::Guest::resume): a
/// request is then wholly before the cut or wholly after it.
#[derive(Debug)]
#[must_use = "requests go on when this is dropped"]
pub struct Drained(Arc<Gate>);

impl Gate {
    /// Lets a request in, now or not at all; `None` while held.
    pub(super) fn try_enter(&self) -> Option<Result<Inside<'_>, Closed>> {
        let mut state = self.state.lock();
        if state.closed {
            return Some(Err(Closed));
        }
        (state.holders == 0).then(|| {
            state.inside += 1;
            Ok(Inside(self))
        })
    }

    /// Lets a request in; waits while held.
    pub(super) fn enter(&self) -> Result<Inside<'_>, Closed> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.holders > 0 && !state.closed);
        if state.closed {
            return Err(Closed);
        }
        state.inside += 1;
        Ok(Inside(self))
    }

    /// Lets nobody in any more, and waits for those inside.
    pub(super) fn hold(self: Arc<Self>) -> Drained {
        let mut state = self.state.lock();
        state.holders += 1;
        self.changed.wait_while(&mut state, |state| state.inside > 0);
        drop(state);
        Drained(self)
    }

    /// Turns everybody away for good, those who wait included, and waits for those inside.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        self.changed.notify_all();
        self.changed.wait_while(&mut state, |state| state.inside > 0);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.inside -= 1;
        if state.inside == 0 && (state.holders > 0 || state.closed) {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.holders -= 1;
        if state.holders == 0 {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn holds_whoever_comes_and_waits_for_whoever_is_in() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter().unwrap();
        thread::scope(|threads| {
            let holding = threads.spawn(|| gate.clone().hold());
            while gate.try_enter().is_some() {
                thread::yield_now();
            }
            assert!(!holding.is_finished());
            drop(inside);
            let (first, second) = (holding.join().unwrap(), gate.clone().hold());
            let waiting = threads.spawn(|| gate.enter().is_ok());
            drop(first);
            assert!(gate.try_enter().is_none());
            assert!(!waiting.is_finished());
            drop(second);
            assert!(waiting.join().unwrap());
        });
        assert_eq!(gate.state.lock().inside, 0);
    }

    #[test]
    fn once_closed_turns_even_those_away_who_waited() {
        let gate = Arc::new(Gate::default());
        let held = gate.clone().hold();
        thread::scope(|threads| {
            let waiting = threads.spawn(|| gate.enter().err());
            gate.close();
            assert_eq!(waiting.join().unwrap(), Some(Closed));
        });
        drop(held);
        assert!(matches!(gate.try_enter(), Some(Err(Closed))));
    }
}
