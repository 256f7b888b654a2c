//! A word to those who wait in poll(2) that they are to end.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};

/// Ends services from another thread, for good.
///
/// ```
/// let stop = offshoot::frontend::uffd::Stop::new()?;
/// stop.stop();
/// stop.stop(); // once is enough
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Stop {
    told: PipeReader,
    tell: PipeWriter,
}

impl Stop {
    /// Not stopped.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        let (told, tell) = io::pipe()?;
        Ok(Self { told, tell })
    }

    /// Has everybody who was given this end.
    pub fn stop(&self) {
        // Nothing is ever read, so that every waiter sees it; a second byte more does no harm, and both ends are ours.
        let _told = (&self.tell).write_all(&[0]);
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.told.as_fd()
    }
}
