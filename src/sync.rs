//! The synchronisation types of the lock-free and locked parts: the real ones, or shuttle's under `--cfg shuttle`.
//!
//! Everything that `overlay::live` and the heap backing share between threads goes through here, so that the
//! interleaving tests run the code that ships.

#[cfg(not(any(shuttle, tsan)))]
pub(crate) use std::sync::OnceLock;

// ThreadSanitizer does not see into the compiled standard library, and takes its once-cell for a race. This one is
// compiled with the crate, and is the same otherwise.
#[cfg(tsan)]
pub(crate) use once_cell::sync::OnceCell as OnceLock;

#[cfg(not(shuttle))]
pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[cfg(shuttle)]
pub(crate) use modelled::{Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, step};

/// Where another thread may come between in the interleaving tests; nothing in any other build.
#[cfg(not(shuttle))]
#[inline(always)]
pub(crate) fn step() {}

#[cfg(shuttle)]
mod modelled {
    //! A once-cell with a scheduling point before every step that other threads can see. Shuttle runs one thread at a
    //! time, so std's cell underneath never blocks. And shuttle's locks under the names that parking_lot gives theirs.

    use std::sync::PoisonError;
    use std::time::Duration;

    pub(crate) use shuttle::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

    pub(crate) fn step() {
        shuttle::thread::yield_now();
    }

    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }

        pub(crate) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl<T: std::fmt::Debug> std::fmt::Debug for Mutex<T> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.0.fmt(f)
        }
    }

    pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            self.0.try_read().ok()
        }

        pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }

        /// Time does not pass here: it waits for as long as it takes.
        pub(crate) fn try_write_for(&self, _patience: Duration) -> Option<RwLockWriteGuard<'_, T>> {
            Some(self.0.write().unwrap_or_else(PoisonError::into_inner))
        }
    }

    #[derive(Debug)]
    pub(crate) struct OnceLock<T>(std::sync::OnceLock<T>);

    impl<T> Default for OnceLock<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    impl<T> From<T> for OnceLock<T> {
        fn from(value: T) -> Self {
            Self(value.into())
        }
    }

    impl<T> OnceLock<T> {
        pub(crate) const fn new() -> Self {
            Self(std::sync::OnceLock::new())
        }

        pub(crate) fn get(&self) -> Option<&T> {
            shuttle::thread::yield_now();
            self.0.get()
        }

        pub(crate) fn get_mut(&mut self) -> Option<&mut T> {
            self.0.get_mut()
        }

        pub(crate) fn set(&self, value: T) -> Result<(), T> {
            shuttle::thread::yield_now();
            self.0.set(value)
        }

        pub(crate) fn take(&mut self) -> Option<T> {
            self.0.take()
        }

        pub(crate) fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
            shuttle::thread::yield_now();
            if self.0.get().is_none() {
                let value = init();
                shuttle::thread::yield_now();
                let _lost = self.0.set(value);
            }
            self.0.get().expect("set above, by this thread or another")
        }
    }
}

/// For the interleaving tests.
#[cfg(all(test, shuttle))]
pub(crate) mod interleavings {
    use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
    use shuttle::{Config, Runner};

    /// Runs `test` under `schedules` random schedules, and as many with few preemptions at the worst places.
    pub(crate) fn explore(schedules: usize, test: fn()) {
        run(RandomScheduler::new(schedules), test);
        run(PctScheduler::new(3, schedules), test);
    }

    fn run(scheduler: impl Scheduler + 'static, test: fn()) {
        let mut config = Config::new();
        // Pages of 4 KiB pass over the stack in a debug build; shuttle's own stacks have 32 KiB.
        config.stack_size = 1 << 20;
        Runner::new(scheduler, config).run(test);
    }
}
