//! A VMM as far as a page-fault server sees one, written from Firecracker's documentation: memory, a userfaultfd over it, and the
//! hand-shake. It can also get everything wrong.
#![allow(unsafe_code)] // A guest's memory is touched by address, and a userfaultfd is made by ioctls.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::{NonNull, null_mut};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, UserfaultfdFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

pub const PAGE: usize = 4096;

pub const MISSING: u64 = 1 << 0;
pub const WRITE_PROTECT: u64 = 1 << 1;
pub const EVENT_FORK: u64 = 1 << 1;
pub const EVENT_REMAP: u64 = 1 << 2;
pub const EVENT_REMOVE: u64 = 1 << 3;
pub const EVENT_UNMAP: u64 = 1 << 6;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0x00);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(0xAA, 0x03);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<Protect>(0xAA, 0x06);

/// Anonymous memory, which stays mapped as long as this lives.
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it is memory, reached by volatile accesses of single bytes and words.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(len: usize) -> Self {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address.
        let base = unsafe { rustix::mm::mmap_anonymous(null_mut(), len, prot, MapFlags::PRIVATE) }.expect("memory");
        Self { base: NonNull::new(base.cast()).expect("not the null page"), len }
    }

    pub fn base(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn at(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: checked to lie inside.
        unsafe { self.base.as_ptr().add(at) }
    }

    pub fn read(&self, at: usize) -> u8 {
        // SAFETY: mapped, and no reference to it exists.
        unsafe { self.at(at, 1).read_volatile() }
    }

    pub fn write(&self, at: usize, byte: u8) {
        // SAFETY: as above.
        unsafe { self.at(at, 1).write_volatile(byte) }
    }

    /// One page, byte by byte in words.
    pub fn page(&self, page: usize) -> Vec<u8> {
        let words = (0..PAGE / 8).map(|word| {
            // SAFETY: mapped and aligned, and no reference to it exists.
            unsafe { self.at(page * PAGE + word * 8, 8).cast::<u64>().read_volatile() }
        });
        words.flat_map(u64::to_ne_bytes).collect()
    }

    /// What a balloon does.
    pub fn drop_pages(&self, page: usize, count: usize) {
        // SAFETY: pages of this memory; no reference to it exists.
        unsafe { rustix::mm::madvise(self.at(page * PAGE, count * PAGE).cast(), count * PAGE, Advice::LinuxDontNeed) }
            .expect("pages to drop");
    }

    pub fn unmap(&self, page: usize, count: usize) {
        // SAFETY: pages of this memory, which the test does not touch again.
        unsafe { rustix::mm::munmap(self.at(page * PAGE, count * PAGE).cast(), count * PAGE) }.expect("pages to unmap");
    }

    /// Moves the last page elsewhere, and unmaps it there.
    pub fn move_last_page(&self) {
        let old = self.at(self.len - PAGE, PAGE);
        // SAFETY: a page of this memory, which the test does not touch again.
        unsafe {
            let moved = rustix::mm::mremap(old.cast(), PAGE, 2 * PAGE, MremapFlags::MAYMOVE).expect("a page to move");
            rustix::mm::munmap(moved, 2 * PAGE).expect("a page to unmap");
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, parts of it perhaps no more.
        let _unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A userfaultfd of this process.
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Not yet agreed on with the kernel.
    pub fn bare() -> Result<Self, Errno> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let user_mode_only = UserfaultfdFlags::from_bits_retain(1);
        // SAFETY: nothing is registered with it.
        let made = unsafe { rustix::mm::userfaultfd(flags) };
        // SAFETY: the same.
        made.or_else(|_| unsafe { rustix::mm::userfaultfd(flags | user_mode_only) }).map(Self)
    }

    pub fn with(features: u64) -> Result<Self, Errno> {
        let uffd = Self::bare()?;
        let mut api = Api { api: 0xAA, features, ioctls: 0 };
        // SAFETY: this opcode takes this structure.
        unsafe { rustix::ioctl::ioctl(&uffd.0, Updater::<UFFDIO_API, Api>::new(&mut api)) }?;
        Ok(uffd)
    }

    pub fn register(&self, memory: &Memory, mode: u64) {
        let mut register = Register { start: memory.base(), len: memory.len as u64, mode, ioctls: 0 };
        // SAFETY: this opcode takes this structure; the memory is the caller's, who serves it.
        unsafe { rustix::ioctl::ioctl(&self.0, Updater::<UFFDIO_REGISTER, Register>::new(&mut register)) }
            .expect("memory that can be registered");
    }

    /// The bare call, for a handler that has nothing but a buffer.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Result<(), Errno> {
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut copy = Copy { to, from, len: bytes.len() as u64, mode: 0, done: 0 };
        // SAFETY: this opcode takes this structure, and puts pages only where none are.
        unsafe { rustix::ioctl::ioctl(&self.0, Updater::<UFFDIO_COPY, Copy>::new(&mut copy)) }
    }

    pub fn protect(&self, start: u64, len: u64) {
        let mut protect = Protect { start, len, mode: 1 };
        // SAFETY: this opcode takes this structure.
        unsafe { rustix::ioctl::ioctl(&self.0, Updater::<UFFDIO_WRITEPROTECT, Protect>::new(&mut protect)) }
            .expect("memory that can be protected");
    }

    /// Waits for an event.
    pub fn wait(&self) {
        let mut polled = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut polled, None).expect("a descriptor that can be waited for");
    }

    /// The address of a fault, if one waits.
    pub fn next_fault(&self) -> Option<u64> {
        let mut message = [0; 32];
        match rustix::io::read(&self.0, &mut message) {
            Ok(32) => Some(u64::from_ne_bytes(message[16..24].try_into().expect("8 bytes"))),
            _ => None,
        }
    }
}

/// Memory in regions, each from its offset in the image; the userfaultfd; the connection.
pub struct Vmm {
    pub regions: Vec<(Memory, usize)>,
    pub uffd: Uffd,
    _socket: Option<UnixStream>,
}

/// The list of regions as Firecracker writes it.
pub fn told(regions: &[(u64, usize, usize)]) -> String {
    let region = |&(base, len, offset): &(u64, usize, usize)| {
        format!(
            r#"{{"base_host_virt_addr":{base},"size":{len},"offset":{offset},"page_size":{PAGE},"page_size_kib":{PAGE}}}"#
        )
    };
    format!("[{}]", regions.iter().map(region).collect::<Vec<_>>().join(","))
}

/// Sends bytes and descriptors in one message.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

impl Vmm {
    /// Regions of so many pages, each with its first page in the image; registered, and not connected yet.
    pub fn new(regions: &[(usize, usize)], features: u64, mode: u64) -> Self {
        let uffd = Uffd::with(features).expect("a userfaultfd");
        let regions: Vec<_> = regions.iter().map(|&(pages, first)| (Memory::new(pages * PAGE), first * PAGE)).collect();
        regions.iter().for_each(|(memory, _)| uffd.register(memory, mode));
        Self { regions, uffd, _socket: None }
    }

    pub fn message(&self) -> String {
        told(&self.regions.iter().map(|(memory, offset)| (memory.base(), memory.len(), *offset)).collect::<Vec<_>>())
    }

    pub fn shake_hands(&self, socket: &UnixStream) {
        send(socket, self.message().as_bytes(), &[self.uffd.as_fd()]).expect("a server that listens");
    }

    /// As Firecracker restores: one userfaultfd with `remove` events, one message, and the connection is kept.
    pub fn restore(server: &Path, regions: &[(usize, usize)]) -> Self {
        let mut vmm = Self::new(regions, EVENT_REMOVE, MISSING);
        let socket = UnixStream::connect(server).expect("a server that listens");
        vmm.shake_hands(&socket);
        vmm._socket = Some(socket);
        vmm
    }

    /// The memory of the only region.
    pub fn memory(&self) -> &Memory {
        &self.regions[0].0
    }
}
