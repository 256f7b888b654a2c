//! The hand-shake: one JSON message with the regions of a VMM's memory, and with it one userfaultfd.
//!
//! Owns what may go wrong before the first fault. What is read is bounded in bytes, in descriptors and in time.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::map::{MapError, MemoryMap};
use super::stop::Stop;
use crate::error::{SpaceError, SystemError};
use crate::page::ByteSize;
use crate::sys::foreign_uffd::{ForeignUffd, TakeError};
use crate::sys::peer::{Received, receive};
use crate::sys::wait::wait_readable;

/// The longest message. A region takes some 130 bytes.
const LONGEST: usize = 64 << 10;
/// What is received at once.
const PIECE: usize = 4 << 10;

/// Why a VMM was not served at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// It said where its memory lies in a way that cannot be.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It hung up before it had said so.
    #[error("the connection ended before the regions were told")]
    HungUp,
    /// It took longer than [`FaultService::handshake`](super::FaultService::handshake).
    #[error("the regions were not told in time")]
    TooSlow,
    /// Its message is longer than any map of memory.
    #[error("a message of more than {LONGEST} bytes")]
    TooLong,
    /// The message came without a descriptor.
    #[error("no descriptor came with the message: a userfaultfd is needed")]
    NoDescriptor,
    /// The message came with several descriptors: guest_memfd and its bitmap are not supported.
    #[error("{0} descriptors came with the message: one userfaultfd is served, guest_memfd is not")]
    ManyDescriptors(u64),
    /// The descriptor is something else.
    #[error("the descriptor is no userfaultfd")]
    NotUserfaultfd,
    /// Something was said after the regions.
    #[error("there is more after the list of regions")]
    More,
    /// The service was stopped meanwhile.
    #[error("stopped during the hand-shake")]
    Stopped,
    /// The system refused.
    #[error(transparent)]
    System(#[from] SpaceError),
}

/// Reads a VMM's hand-shake.
pub(super) fn shake_hands(
    socket: &UnixStream,
    image: ByteSize,
    patience: Duration,
    stop: &Stop,
) -> Result<(MemoryMap, ForeignUffd), HandshakeError> {
    let until = Instant::now().checked_add(patience);
    let mut incoming =
        Incoming { socket, until, stop, piece: Vec::new(), taken: 0, received: 0, fds: Vec::new(), failed: None };
    let map = MemoryMap::from_reader(&mut incoming, image);
    if let Some(failed) = incoming.failed.take() {
        return Err(failed);
    }
    let map = map?;
    if !incoming.piece[incoming.taken..].iter().all(u8::is_ascii_whitespace) {
        return Err(HandshakeError::More);
    }
    let [fd] = <[OwnedFd; 1]>::try_from(incoming.fds).map_err(|fds| match fds.len() {
        0 => HandshakeError::NoDescriptor,
        many => HandshakeError::ManyDescriptors(many as u64),
    })?;
    let uffd = ForeignUffd::take(fd).map_err(|error| match error {
        TakeError::NotUserfaultfd => HandshakeError::NotUserfaultfd,
        TakeError::Sys(error) => HandshakeError::System(error.into()),
    })?;
    Ok((map, uffd))
}

/// What a refusal of poll(2) is to those who look for errors of the engine's.
pub(super) fn cannot_wait(error: io::Error) -> SpaceError {
    SystemError::Other { call: "poll", error: Arc::new(error) }.into()
}

/// What a VMM sends, as a stream of bytes; descriptors are kept aside.
struct Incoming<'a> {
    socket: &'a UnixStream,
    /// `None`: as long as it takes.
    until: Option<Instant>,
    stop: &'a Stop,
    piece: Vec<u8>,
    taken: usize,
    received: usize,
    fds: Vec<OwnedFd>,
    /// Why reading ended: said here, since a parser's errors have no room for it.
    failed: Option<HandshakeError>,
}

impl Incoming<'_> {
    fn next_piece(&mut self) -> Result<(), HandshakeError> {
        loop {
            let patience = self.until.map(|until| until.saturating_duration_since(Instant::now()));
            let ready = wait_readable(&[self.socket.as_fd(), self.stop.as_fd()], patience).map_err(cannot_wait)?;
            if ready[1] {
                return Err(HandshakeError::Stopped);
            }
            if !ready[0] {
                return Err(HandshakeError::TooSlow);
            }
            if self.received >= LONGEST {
                return Err(HandshakeError::TooLong);
            }
            self.piece.resize(PIECE, 0);
            self.taken = 0;
            match receive(self.socket, &mut self.piece).map_err(SpaceError::from)? {
                Received::Nothing => self.piece.clear(),
                Received::HungUp => return Err(HandshakeError::HungUp),
                Received::Bytes(bytes, fds) => {
                    self.piece.truncate(bytes);
                    self.received += bytes;
                    self.fds.extend(fds);
                    if self.fds.len() > 1 {
                        return Err(HandshakeError::ManyDescriptors(self.fds.len() as u64));
                    }
                    return Ok(());
                }
            }
        }
    }
}

impl Read for Incoming<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.piece.len()
            && let Err(error) = self.next_piece()
        {
            self.failed = Some(error);
            return Err(io::ErrorKind::Other.into());
        }
        let count = buf.len().min(self.piece.len() - self.taken);
        buf[..count].copy_from_slice(&self.piece[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }
}
