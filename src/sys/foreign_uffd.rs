//! A userfaultfd that another process made and handed to us: its faults and events, and pages put where it waits for them.
//!
//! Owns the descriptor and the calls on it, each with what its errors mean here. It must not know what the pages hold, nor which
//! addresses they may go to: the kernel puts pages only where the other process registered memory with this descriptor and where no page
//! is yet, so nothing that is there can be overwritten.
//!
//! Facts are from userfaultfd(2), ioctl_userfaultfd(2) and uapi/linux/userfaultfd.h.
#![allow(unsafe_code)] // ioctls over structures, and a descriptor that the kernel makes in a read(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, opcode};

use super::error::{SysError, checked, checked_errno};
use super::fault::{Call, PeerCall};
use crate::page::ByteSize;

/// An address in another process, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VmmAddress(u64);

impl VmmAddress {
    /// Wraps a raw address.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw address.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl std::fmt::Debug for VmmAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VmmAddress({:#x})", self.0)
    }
}

/// Why a thread of the other process waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FaultKind {
    /// There is no page.
    Missing,
    /// The page is protected, or is in the page cache and not mapped: modes that a server of missing pages is not asked for.
    OtherMode,
}

/// What a read of the descriptor gives.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for a page.
    Fault { at: VmmAddress, kind: FaultKind },
    /// Pages were dropped (`MADV_DONTNEED`, `MADV_REMOVE`) or unmapped.
    Gone { start: VmmAddress, end: VmmAddress },
    /// Memory is elsewhere now.
    Moved,
    /// The process forked. The child's userfaultfd.
    Forked(OwnedFd),
    /// Something that this was not written for.
    Unknown,
}

/// Why pages were not put in place. Nothing was.
#[derive(Debug)]
pub(crate) enum PutError {
    /// `EEXIST`: there is a page.
    Present,
    /// `EAGAIN`: the other process is changing its mappings. Its event must be read, and its thread must have run on.
    Changing,
    /// `ENOENT`: these addresses do not lie in one registered mapping.
    Unmapped,
    /// `ESRCH`: the other process is gone.
    Exited,
    /// `ENOMEM`: no memory for it, or its memory cgroup is full.
    OutOfMemory,
    /// Anything else.
    Sys(SysError),
}

/// A descriptor that cannot be served.
#[derive(Debug)]
pub(crate) enum TakeError {
    /// It is something else.
    NotUserfaultfd,
    /// The system refuses to look at it.
    Sys(SysError),
}

impl From<SysError> for TakeError {
    fn from(error: SysError) -> Self {
        Self::Sys(error)
    }
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage` and `struct uffdio_poison`, which are alike.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    filled: i64,
}

const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<Fill>() == 32);

const GROUP: u8 = 0xAA;
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<Fill>(GROUP, 0x04);
const UFFDIO_POISON: Opcode = opcode::read_write::<Fill>(GROUP, 0x08);

/// Length of a `struct uffd_msg`.
const MESSAGE: usize = 32;
/// The most messages that one read takes.
pub(crate) const MOST_EVENTS: usize = 16;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
/// Write protection, and minor faults.
const FAULT_OTHER_MODES: u64 = 1 << 1 | 1 << 2;

/// Another process's userfaultfd. Closing it leaves the other process's own descriptor, and with it everybody who waits.
#[derive(Debug)]
pub(crate) struct ForeignUffd {
    fd: OwnedFd,
}

impl ForeignUffd {
    /// Takes a descriptor that was handed to us, if it is a userfaultfd, and makes reads of it return at once.
    ///
    /// # Errors
    /// [`TakeError`]; the descriptor is closed then.
    pub(crate) fn take(fd: OwnedFd) -> Result<Self, TakeError> {
        // Calls on other descriptors could mean anything, so its kind is asked for first, and by a name that no file can have.
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let name = checked(Call::Peer(PeerCall::Readlink), || rustix::fs::readlink(&link, Vec::new()))?;
        if name.as_bytes() != b"anon_inode:[userfaultfd]" {
            return Err(TakeError::NotUserfaultfd);
        }
        checked(Call::Peer(PeerCall::SetNonblocking), || {
            let flags = rustix::fs::fcntl_getfl(&fd)?;
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
        })?;
        Ok(Self { fd })
    }

    /// What has happened since the last read: up to `most` events, none if nothing has. Reading an event that is not a fault lets the thread
    /// that caused it go on.
    ///
    /// # Errors
    /// `EINVAL` where the other process never agreed on the interface with the kernel.
    pub(crate) fn read(&self, most: usize) -> Result<Vec<Event>, SysError> {
        let mut buffer = [0; MESSAGE * MOST_EVENTS];
        let room = &mut buffer[..MESSAGE * most.clamp(1, MOST_EVENTS)];
        let read = checked_errno(Call::Peer(PeerCall::Read), || rustix::io::read(&self.fd, &mut *room));
        let read = match read {
            Err(Errno::AGAIN) => 0,
            read => read.map_err(|errno| SysError::new(Call::Peer(PeerCall::Read), errno))?,
        };
        let (messages, _) = buffer[..read].as_chunks::<MESSAGE>();
        Ok(messages.iter().map(event).collect())
    }

    /// Puts a copy of `bytes`, whole pages, at an address and wakes who waits there. Says how much was put: less than asked for where
    /// it was stopped on the way.
    ///
    /// # Errors
    /// [`PutError`].
    pub(crate) fn copy(&self, at: VmmAddress, bytes: &[u8]) -> Result<ByteSize, PutError> {
        let (src, len) = (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64);
        let mut copy = Copy { dst: at.0, src, len, mode: 0, copied: 0 };
        let call = Call::Peer(PeerCall::Copy);
        let done = checked_errno(call, || {
            // SAFETY: this opcode takes a `struct uffdio_copy`, which lives during the call, as do the bytes that it names. It
            // puts new pages into memory that was registered with this descriptor, and touches none that is there.
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<UFFDIO_COPY, Copy>::new(&mut copy)) }
        });
        outcome(call, done, len, copy.copied)
    }

    /// The same with zeroes, which take no memory until they are written.
    ///
    /// # Errors
    /// [`PutError`]; `EINVAL` for huge pages.
    pub(crate) fn zero(&self, at: VmmAddress, len: ByteSize) -> Result<ByteSize, PutError> {
        let mut fill = Fill { range: Range { start: at.0, len: len.get() }, mode: 0, filled: 0 };
        let call = Call::Peer(PeerCall::Zeropage);
        let done = checked_errno(call, || {
            // SAFETY: this opcode takes a `struct uffdio_zeropage`, which lives during the call; as for `copy`.
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<UFFDIO_ZEROPAGE, Fill>::new(&mut fill)) }
        });
        outcome(call, done, len.get(), fill.filled)
    }

    /// Has whoever touches these pages get SIGBUS from now on, and wakes who waits for them. Linux 6.6.
    ///
    /// # Errors
    /// [`PutError`]; [`SysError::Unsupported`] from an older kernel.
    pub(crate) fn poison(&self, at: VmmAddress, len: ByteSize) -> Result<ByteSize, PutError> {
        let mut fill = Fill { range: Range { start: at.0, len: len.get() }, mode: 0, filled: 0 };
        let call = Call::Peer(PeerCall::Poison);
        let done = checked_errno(call, || {
            // SAFETY: this opcode takes a `struct uffdio_poison`, which lives during the call. It marks pages that are not there.
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<UFFDIO_POISON, Fill>::new(&mut fill)) }
        });
        // EINVAL: a kernel that does not know the call.
        if let Err(Errno::INVAL) = done {
            return Err(PutError::Sys(SysError::Unsupported { call, why: "it needs Linux 6.6" }));
        }
        outcome(call, done, len.get(), fill.filled)
    }

    /// Has who waits for these pages look again.
    ///
    /// # Errors
    /// Those of the call.
    pub(crate) fn wake(&self, at: VmmAddress, len: ByteSize) -> Result<(), SysError> {
        let range = Range { start: at.0, len: len.get() };
        checked(Call::Peer(PeerCall::Wake), || {
            // SAFETY: this opcode reads a `struct uffdio_range`; waking changes no memory.
            unsafe { rustix::ioctl::ioctl(&self.fd, Setter::<UFFDIO_WAKE, Range>::new(range)) }
        })
    }
}

impl AsFd for ForeignUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a call that puts pages came to: `done` is what it says it has done, an amount or a negative error.
fn outcome(call: Call, result: Result<(), Errno>, len: u64, done: i64) -> Result<ByteSize, PutError> {
    match result {
        Ok(()) => Ok(ByteSize::new(len)),
        // Stopped on the way: what is done is done.
        Err(Errno::AGAIN) if done > 0 => Ok(ByteSize::new((done as u64).min(len))),
        Err(Errno::AGAIN) => Err(PutError::Changing),
        Err(Errno::EXIST) => Err(PutError::Present),
        Err(Errno::NOENT) => Err(PutError::Unmapped),
        Err(Errno::SRCH) => Err(PutError::Exited),
        Err(Errno::NOMEM) => Err(PutError::OutOfMemory),
        Err(errno) => Err(PutError::Sys(SysError::new(call, errno))),
    }
}

fn event(message: &[u8; MESSAGE]) -> Event {
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    match message[0] {
        EVENT_PAGEFAULT => {
            let kind = if word(8) & FAULT_OTHER_MODES == 0 { FaultKind::Missing } else { FaultKind::OtherMode };
            Event::Fault { at: VmmAddress(word(16)), kind }
        }
        EVENT_REMOVE | EVENT_UNMAP => Event::Gone { start: VmmAddress(word(8)), end: VmmAddress(word(16)) },
        EVENT_REMAP => Event::Moved,
        EVENT_FORK => {
            let fd = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
            // SAFETY: the kernel has made this descriptor for us in the read that gave the message, and nobody else knows it.
            Event::Forked(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        }
        _ => Event::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, words: [u64; 3]) -> [u8; MESSAGE] {
        let mut message = [0; MESSAGE];
        message[0] = kind;
        for (to, word) in message[8..].chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        message
    }

    #[test]
    fn messages_are_read_as_the_header_lays_them_out() {
        let fault = |flags| event(&message(EVENT_PAGEFAULT, [flags, 0x7000, 5]));
        let missing = |event| matches!(event, Event::Fault { at: VmmAddress(0x7000), kind: FaultKind::Missing });
        assert!(missing(fault(0)) && missing(fault(1)));
        assert!(matches!(fault(2), Event::Fault { kind: FaultKind::OtherMode, .. }));
        assert!(matches!(fault(4), Event::Fault { kind: FaultKind::OtherMode, .. }));
        for kind in [EVENT_REMOVE, EVENT_UNMAP] {
            let gone = event(&message(kind, [0x1000, 0x3000, 0]));
            assert!(matches!(gone, Event::Gone { start: VmmAddress(0x1000), end: VmmAddress(0x3000) }));
        }
        assert!(matches!(event(&message(EVENT_REMAP, [0; 3])), Event::Moved));
        assert!(matches!(event(&message(0x99, [0; 3])), Event::Unknown));
    }

    #[test]
    fn outcomes_have_meanings() {
        let of = |result, done| outcome(Call::Peer(PeerCall::Copy), result, 8192, done);
        assert_eq!(of(Ok(()), 0).unwrap(), ByteSize::kib(8));
        assert_eq!(of(Err(Errno::AGAIN), 4096).unwrap(), ByteSize::kib(4));
        assert!(matches!(of(Err(Errno::AGAIN), -11), Err(PutError::Changing)));
        assert!(matches!(of(Err(Errno::AGAIN), 0), Err(PutError::Changing)));
        assert!(matches!(of(Err(Errno::EXIST), -17), Err(PutError::Present)));
        assert!(matches!(of(Err(Errno::SRCH), 0), Err(PutError::Exited)));
    }

    #[test]
    fn what_is_no_userfaultfd_is_not_taken() {
        for fd in [OwnedFd::from(std::io::pipe().unwrap().0), std::fs::File::open("/proc/self/maps").unwrap().into()] {
            assert!(matches!(ForeignUffd::take(fd), Err(TakeError::NotUserfaultfd)));
        }
    }
}
