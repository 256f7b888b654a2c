//! What was done for VMMs, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was done for one VMM, or for all of a server.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct FaultCounts {
    /// Faults that were read.
    pub faults: u64,
    /// Pages of 4 KiB that were put with the image's bytes.
    pub copied: u64,
    /// Pages of 4 KiB that were put as zeroes: the image's, or dropped before.
    pub zeroes: u64,
    /// Pages of 4 KiB that the VMM dropped or unmapped, and that had not been counted so.
    pub dropped: u64,
    /// Faults that had to be tried again, since the VMM was changing its mappings or memory was short.
    pub retries: u64,
    /// Pages of 4 KiB that could not be read, and give SIGBUS.
    pub poisoned: u64,
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// The same while it goes on.
        #[derive(Default, Debug)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)*
        }

        impl Counters {
            pub(super) fn now(&self) -> FaultCounts {
                FaultCounts { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters!(faults, copied, zeroes, dropped, retries, poisoned);

/// One number. Relaxed: nothing is concluded from it.
#[derive(Default, Debug)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

impl std::ops::AddAssign for FaultCounts {
    fn add_assign(&mut self, more: Self) {
        self.faults += more.faults;
        self.copied += more.copied;
        self.zeroes += more.zeroes;
        self.dropped += more.dropped;
        self.retries += more.retries;
        self.poisoned += more.poisoned;
    }
}
