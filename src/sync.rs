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

#[cfg(shuttle)]
pub(crate) use modelled::OnceLock;

#[cfg(shuttle)]
mod modelled {
    //! A once-cell with a scheduling point before every step that other threads can see. Shuttle runs one thread at a
    //! time, so std's cell underneath never blocks.

    pub(crate) struct OnceLock<T>(std::sync::OnceLock<T>);

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
