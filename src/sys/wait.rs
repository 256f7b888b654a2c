//! Waiting for one of several descriptors: poll(2).
//!
//! Knows descriptors, not what comes out of them.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::fault::{Call, check};

/// Waits until one of `fds` can be read, has failed or was closed at its other end; says of each whether it did. None did where
/// `patience` ended first; `None` waits for ever.
///
/// # Errors
/// Those of poll(2), but for an interruption by a signal: it waits on then.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], patience: Option<Duration>) -> io::Result<Vec<bool>> {
    let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    loop {
        match check(Call::Poll).and_then(|()| poll(&mut polled, patience.as_ref())) {
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn tells_which_can_be_read() {
        let (quiet, _kept) = io::pipe().unwrap();
        let (loud, mut end) = io::pipe().unwrap();
        let both = [quiet.as_fd(), loud.as_fd()];
        assert_eq!(wait_readable(&both, Some(Duration::ZERO)).unwrap(), [false, false]);
        end.write_all(&[1]).unwrap();
        assert_eq!(wait_readable(&both, None).unwrap(), [false, true]);
        drop(end);
        assert_eq!(wait_readable(&both, None).unwrap(), [false, true]);
    }

    #[test]
    fn an_interruption_is_no_error_and_a_refusal_is() {
        let (read, _write) = io::pipe().unwrap();
        let interrupted = super::super::fault::plan::arm(1, Errno::INTR);
        assert_eq!(wait_readable(&[read.as_fd()], Some(Duration::ZERO)).unwrap(), [false]);
        drop(interrupted);
        let _refused = super::super::fault::plan::arm(1, Errno::NOMEM);
        assert!(wait_readable(&[read.as_fd()], None).is_err());
    }
}
