//! The process at the other end of a Unix socket: what it sends, descriptors included, and whether it is still there.
//!
//! Must not know what the messages mean.
#![allow(unsafe_code)] // A system call by number.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::error::{SysError, checked, checked_errno};
use super::fault::{Call, PeerCall};
use super::raw::syscall5;

/// The most descriptors that one message may bring: what is over is closed by the kernel.
const MOST_DESCRIPTORS: usize = 4;

/// What was received.
#[derive(Debug)]
pub(crate) enum Received {
    /// Bytes at the start of the buffer, and descriptors that came with them.
    Bytes(usize, Vec<OwnedFd>),
    /// Nothing is there now.
    Nothing,
    /// The other end is closed.
    HungUp,
}

/// Takes what is there, without waiting. Descriptors are closed on exec.
///
/// # Errors
/// Those of recvmsg(2), but for a connection that was reset, which counts as closed.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received, SysError> {
    let call = Call::Peer(PeerCall::Recvmsg);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = checked_errno(call, || {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut *buffer)], &mut control, flags)
    });
    let bytes = match received {
        Ok(message) => message.bytes,
        Err(Errno::AGAIN) => return Ok(Received::Nothing),
        Err(Errno::CONNRESET) => return Ok(Received::HungUp),
        Err(errno) => return Err(SysError::new(call, errno)),
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if bytes == 0 && descriptors.is_empty() { Ok(Received::HungUp) } else { Ok(Received::Bytes(bytes, descriptors)) }
}

/// The process that connected, by a descriptor that no other process can take over.
#[derive(Debug)]
pub(crate) struct Peer {
    pidfd: OwnedFd,
}

impl Peer {
    /// The process at the other end of a Unix socket. Becomes readable when it ends.
    ///
    /// # Errors
    /// Kernels before 6.5 do not tell.
    pub(crate) fn of(socket: impl AsFd) -> Result<Self, SysError> {
        #[cfg(target_arch = "x86_64")]
        const GETSOCKOPT: usize = 55;
        #[cfg(target_arch = "aarch64")]
        const GETSOCKOPT: usize = 209;
        const SOL_SOCKET: usize = 1;
        const SO_PEERPIDFD: usize = 77;
        let call = Call::Peer(PeerCall::Getsockopt);
        let (mut fd, mut len) = (-1i32, size_of::<i32>() as u32);
        checked(call, || {
            let socket = socket.as_fd().as_raw_fd() as usize;
            let (value, room) = ((&raw mut fd).expose_provenance(), (&raw mut len).expose_provenance());
            // SAFETY: the call writes one descriptor and its length to the two variables, whose sizes it is told.
            unsafe { syscall5(GETSOCKOPT, [socket, SOL_SOCKET, SO_PEERPIDFD, value, room]) }
        })?;
        if fd < 0 {
            return Err(SysError::Other { call, errno: Errno::BADF });
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { pidfd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Its process id as this process sees it; `None` once it has ended, and for a process that cannot be seen from here.
    pub(crate) fn pid(&self) -> Option<u32> {
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd())).ok()?;
        told.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok().filter(|&pid| pid > 0)
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn tells_bytes_from_silence_and_silence_from_the_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffer = [0; 8];
        assert!(matches!(receive(&ours, &mut buffer), Ok(Received::Nothing)));
        theirs.write_all(b"hello").unwrap();
        assert!(matches!(receive(&ours, &mut buffer), Ok(Received::Bytes(5, fds)) if fds.is_empty()));
        assert_eq!(&buffer[..5], b"hello");
        drop(theirs);
        assert!(matches!(receive(&ours, &mut buffer), Ok(Received::HungUp)));
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        match Peer::of(&ours) {
            Ok(peer) => assert_eq!(peer.pid(), Some(std::process::id())),
            Err(error) => assert!(matches!(error, SysError::Other { errno: Errno::NOPROTOOPT, .. }), "{error}"),
        }
    }
}
