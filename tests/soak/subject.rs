//! What a soak needs of a backing: how its threads reach RAM, and the kinds of fork that it has.
#![allow(unsafe_code)] // vCPUs reach mapped RAM by host pointers, so threads that stand for them do.

use std::sync::Arc;

use offshoot::backing::{Backing, Heap, PageBody};
use offshoot::page::GuestAddress;
use offshoot::ram::{Ram, RamView};
use offshoot::{ForkError, ForkPoint, Vm};

use super::vcpus::Stopping;

/// Words of RAM.
pub trait Words {
    fn load(&self, at: u64) -> u64;
    fn store(&self, at: u64, word: u64);
}

/// RAM as threads see it between two pauses.
pub trait Access: Send + Sync + 'static {
    /// What a thread holds for a few pages.
    type Held<'a>: Words;

    fn hold(&self) -> Self::Held<'_>;
}

/// A backing under test.
pub trait Subject: Backing {
    /// How half of a VM's threads reach its RAM; the others use [`Typed`] access.
    type Access: Access;

    fn access(vm: &Vm<Self>) -> Self::Access;

    /// A fork in the `n`-th of the ways that there are, again from the first after the last. `None` where the way was to give up.
    fn fork(vm: &Vm<Self>, guest: &mut Stopping<'_, Self>, n: u64) -> Result<Option<ForkPoint<Self>>, ForkError>;
}

/// By typed access to guest addresses.
pub struct Typed<B: Backing>(pub Arc<Ram<B>>);

impl<B: Backing> Clone for Typed<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backing> Access for Typed<B> {
    type Held<'a> = Self;

    fn hold(&self) -> Self {
        self.clone()
    }
}

impl<B: Backing> Words for Typed<B> {
    #[inline]
    fn load(&self, at: u64) -> u64 {
        self.0.load(GuestAddress::new(at)).expect("RAM can be read")
    }

    #[inline]
    fn store(&self, at: u64, word: u64) {
        self.0.store(GuestAddress::new(at), word).expect("RAM can be written");
    }
}

/// By views of the heap, as a simulator's loop does.
pub struct Viewed<P: PageBody>(Arc<Ram<Heap<P>>>);

impl<P: PageBody> Access for Viewed<P> {
    type Held<'a> = RamView<'a, P>;

    fn hold(&self) -> RamView<'_, P> {
        self.0.view().expect("RAM is not frozen")
    }
}

impl<P: PageBody> Words for RamView<'_, P> {
    #[inline]
    fn load(&self, at: u64) -> u64 {
        self.load(GuestAddress::new(at)).expect("RAM can be read")
    }

    #[inline]
    fn store(&self, at: u64, word: u64) {
        self.store(GuestAddress::new(at), word).expect("RAM can be written");
    }
}

impl<P: PageBody> Subject for Heap<P> {
    type Access = Viewed<P>;

    fn access(vm: &Vm<Self>) -> Viewed<P> {
        Viewed(vm.ram().clone())
    }

    fn fork(vm: &Vm<Self>, guest: &mut Stopping<'_, Self>, _: u64) -> Result<Option<ForkPoint<Self>>, ForkError> {
        vm.fork(guest).map(Some)
    }
}

#[cfg(target_os = "linux")]
mod mapped {
    use std::ptr::NonNull;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
    use offshoot::page::PageCount;
    use offshoot::{BoxError, DeviceState, LivePolicy, OnExceeded, Relocate};

    use super::super::SPACE;
    use super::*;

    /// By host pointers, as a vCPU does. Threads take it anew after each pause, in which RAM may have moved.
    #[derive(Clone, Copy)]
    pub struct Host(NonNull<u8>);

    // SAFETY: an address; what lies there is only accessed by atomics.
    unsafe impl Send for Host {}
    // SAFETY: the same.
    unsafe impl Sync for Host {}

    impl Host {
        fn word(&self, at: u64) -> &AtomicU64 {
            assert!(at < SPACE.get() && at.is_multiple_of(8));
            // SAFETY: within RAM, which is mapped here for as long as its VM lives and is not moved. Threads have ended before the one, and hold
            // the gate that a pause closes against the other.
            unsafe { AtomicU64::from_ptr(self.0.as_ptr().add(at as usize).cast()) }
        }
    }

    impl Access for Host {
        type Held<'a> = Self;

        fn hold(&self) -> Self {
            *self
        }
    }

    impl Words for Host {
        #[inline]
        fn load(&self, at: u64) -> u64 {
            self.word(at).load(Ordering::Acquire)
        }

        #[inline]
        fn store(&self, at: u64, word: u64) {
            self.word(at).store(word, Ordering::Release);
        }
    }

    impl Subject for Mapped {
        type Access = Host;

        fn access(vm: &Vm<Self>) -> Host {
            Host(vm.ram().space().host_base())
        }

        fn fork(vm: &Vm<Self>, guest: &mut Stopping<'_, Self>, n: u64) -> Result<Option<ForkPoint<Self>>, ForkError> {
            let policy = |max_rounds| LivePolicy { max_rounds, target: PageCount::new(4), ..LivePolicy::default() };
            let give_up =
                LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..LivePolicy::default() };
            let forked = match n % 8 {
                0 => vm.fork(guest),
                1 | 2 => vm.fork_live(guest, &policy((n / 8 % 4) as u32)),
                3 => vm.fork_live(guest, &give_up),
                4 => vm.fork_relocating(guest),
                5 | 6 => vm.fork_live_relocating(guest, &policy((n / 8 % 4) as u32)),
                _ => vm.fork_live_relocating(guest, &give_up),
            };
            match forked {
                Err(ForkError::PauseTooLong { .. }) => Ok(None),
                forked => forked.map(Some),
            }
        }
    }

    impl Relocate for Stopping<'_, Mapped> {
        fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
            Ok(AddressHole::pick(SPACE)?)
        }

        fn relocate(&mut self, ram: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
            let moved = ram.host_ranges().next().ok_or("RAM has a region")?.host;
            self.now_reached_by(Host(moved));
            Ok(Deferred::default())
        }
    }
}
