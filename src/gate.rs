//! The gate that a freeze closes: what was let in is waited for, and nobody is let in after.
//!
//! Held shared for as long as one write takes, so that no write that began before a freeze ends after it. Knows neither RAM nor disks.

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Open until it is closed for good.
#[derive(Debug, Default)]
pub(crate) struct FreezeGate(RwLock<bool>);

/// A write that was let in.
pub(crate) type Entered<'a> = RwLockReadGuard<'a, bool>;

/// A gate held shut: it opens again on drop, unless it was closed for good.
pub(crate) struct Shut<'a>(RwLockWriteGuard<'a, bool>);

impl FreezeGate {
    /// Lets a write in; `None` once closed for good. Waits while the gate is held shut.
    pub(crate) fn enter(&self) -> Option<Entered<'_>> {
        let closed = self.0.read();
        (!*closed).then_some(closed)
    }

    /// Waits for the writes that are in, and lets nobody else in.
    pub(crate) fn shut(&self) -> Shut<'_> {
        Shut(self.0.write())
    }
}

impl Shut<'_> {
    /// Closes the gate for good.
    pub(crate) fn close(mut self) {
        *self.0 = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_again_unless_it_was_closed_for_good() {
        let gate = FreezeGate::default();
        assert!(gate.enter().is_some());
        drop(gate.shut());
        assert!(gate.enter().is_some());
        gate.shut().close();
        assert!(gate.enter().is_none());
    }
}
