//! All the `unsafe` that KVM needs: the calls whose argument has no fixed size (XSAVE, the dirty log), the two that `kvm-ioctls`
//! does not offer (special registers with page-directory pointers), kernel structures seen as bytes, and memory slots.
//!
//! It knows the kernel's ABI and nothing about what a machine is: order, skipping and errors with advice belong to
//! `frontend::kvm`.
//!
//! Why the crate-wide ban on unsafe code is lifted here: these are raw system calls over raw memory. Each block says
//! which rule it relies on.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_pre_fault_memory, kvm_regs, kvm_sregs, kvm_sregs2, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd, VmFd};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use super::fault::{self, Call};
use crate::page::{ByteOffset, ByteSize, GuestAddress};

/// The ioctl group of every KVM call.
const KVM_GROUP: u8 = 0xAE;

/// Size of the XSAVE area that every kernel reads and writes, and of the structure in the call numbers.
pub(crate) const XSAVE_LEGACY_SIZE: usize = 4096;

type LegacyXsave = [u32; XSAVE_LEGACY_SIZE / 4];
const KVM_GET_XSAVE: Opcode = opcode::read::<LegacyXsave>(KVM_GROUP, 0xa4);
const KVM_SET_XSAVE: Opcode = opcode::write::<LegacyXsave>(KVM_GROUP, 0xa5);
const KVM_GET_XSAVE2: Opcode = opcode::read::<LegacyXsave>(KVM_GROUP, 0xcf);
const KVM_GET_SREGS2: Opcode = opcode::read::<kvm_sregs2>(KVM_GROUP, 0xcc);
const KVM_GET_DIRTY_LOG: Opcode = opcode::write::<kvm_dirty_log>(KVM_GROUP, 0x42);
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVM_GROUP, 0xd5);
const KVM_SET_SREGS2: Opcode = opcode::write::<kvm_sregs2>(KVM_GROUP, 0xcd);

/// One ioctl whose argument is a pointer.
struct PointerCall {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: `opcode` and `as_ptr` return exactly what the (unsafe) constructor sites below paired up; the calls return
// nothing through their integer result.
unsafe impl Ioctl for PointerCall {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Issues `opcode` on a vCPU or a machine with a pointer argument.
///
/// # Safety
/// `argument` must be valid for the whole call for every byte the kernel reads or writes under that call number.
unsafe fn call(on: &impl AsRawFd, opcode: Opcode, argument: *mut c_void) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as its owner is borrowed.
    let fd: BorrowedFd<'_> = unsafe { BorrowedFd::borrow_raw(on.as_raw_fd()) };
    // SAFETY: the caller vouches for the argument.
    unsafe { rustix::ioctl::ioctl(fd.as_fd(), PointerCall { opcode, argument }) }.map_err(io::Error::from)
}

/// The largest XSAVE area that any guest of this host can have.
///
/// The kernel copies as many bytes as the features *this process was given leave for* take, and that can grow while we
/// run (`arch_prctl`). No leave reaches past what the processor has, so the processor's own figure bounds every copy.
pub(crate) fn xsave_bound() -> ByteSize {
    static BOUND: OnceLock<u64> = OnceLock::new();
    ByteSize::new(*BOUND.get_or_init(|| {
        // Leaf 0xD exists where leaf 0 says so; without it there is no extended state and 4,096 bytes hold everything.
        let highest = core::arch::x86_64::__cpuid(0).eax;
        let all = if highest >= 0xD { core::arch::x86_64::__cpuid_count(0xD, 0).ecx } else { 0 };
        u64::from(all).next_multiple_of(64).max(XSAVE_LEGACY_SIZE as u64)
    }))
}

/// An XSAVE area as the kernel lays it out: never smaller than [`xsave_bound`], so that no kernel call overruns it.
#[derive(Clone)]
pub(crate) struct XsaveArea {
    words: Box<[u64]>,
    /// How many bytes the kernel filled in; the rest is zero.
    used: usize,
}

impl XsaveArea {
    fn zeroed(used: usize) -> Self {
        let bytes = (xsave_bound().get() as usize).max(used);
        Self { words: vec![0u64; bytes.div_ceil(8)].into_boxed_slice(), used }
    }

    /// Reads the area of a vCPU; `size` is what the kernel says an area takes on this VM.
    pub(crate) fn read(vcpu: &VcpuFd, size: ByteSize) -> io::Result<Self> {
        let used = (size.get() as usize).max(XSAVE_LEGACY_SIZE);
        let mut area = Self::zeroed(used);
        let opcode = if used > XSAVE_LEGACY_SIZE { KVM_GET_XSAVE2 } else { KVM_GET_XSAVE };
        // SAFETY: the buffer is at least `xsave_bound()` bytes, which bounds what the kernel writes.
        unsafe { call(vcpu, opcode, area.words.as_mut_ptr().cast())? };
        Ok(area)
    }

    /// Loads the area into a vCPU.
    pub(crate) fn write(&self, vcpu: &VcpuFd) -> io::Result<()> {
        // SAFETY: the buffer is at least `xsave_bound()` bytes, which bounds what the kernel reads; it does not write.
        unsafe { call(vcpu, KVM_SET_XSAVE, self.words.as_ptr().cast_mut().cast()) }
    }

    /// The bytes the kernel filled in.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `words` is initialised, any byte is a valid u8, and `used` never exceeds its length in bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), self.used) }
    }

    /// An area holding `bytes`. The caller bounds their number.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut area = Self::zeroed(bytes.len().max(XSAVE_LEGACY_SIZE));
        for (word, chunk) in area.words.iter_mut().zip(bytes.chunks(8)) {
            let mut raw = [0u8; 8];
            raw[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(raw);
        }
        area
    }
}

/// Special registers with the page-directory pointers of PAE paging, which plain `KVM_GET_SREGS` leaves out.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one `kvm_sregs2`, whose size is part of the call number.
    unsafe { call(vcpu, KVM_GET_SREGS2, (&raw mut sregs).cast())? };
    Ok(sregs)
}

/// The opposite of [`get_sregs2`].
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads one `kvm_sregs2`, whose size is part of the call number.
    unsafe { call(vcpu, KVM_SET_SREGS2, (&raw const *sregs).cast_mut().cast()) }
}

/// Fills a vCPU's second-level page tables for `size` bytes from `at`, as if it had read there. Linux 6.11, with hardware paging.
pub(crate) fn pre_fault(vcpu: &VcpuFd, at: GuestAddress, size: ByteSize) -> io::Result<()> {
    let mut range = kvm_pre_fault_memory { gpa: at.get(), size: size.get(), ..Default::default() };
    // The kernel takes what it has done off the range, and may stop for a signal.
    while range.size > 0 {
        let before = range.size;
        fault::check(Call::Kvm)?;
        // SAFETY: the kernel reads and writes one `kvm_pre_fault_memory`, whose size is part of the call number. What it maps is
        // what the vCPU could reach anyway.
        match unsafe { call(vcpu, KVM_PRE_FAULT_MEMORY, (&raw mut range).cast()) } {
            Err(error) if !matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return Err(error);
            }
            Ok(()) if range.size >= before => return Err(io::ErrorKind::InvalidData.into()),
            _ => {}
        }
    }
    Ok(())
}

/// A kernel structure that is nothing but its bytes.
///
/// # Safety
/// The type is `repr(C)`, has no padding that the compiler may leave unset, no pointer, and every bit pattern is a
/// value of it.
pub(crate) unsafe trait Plain: Copy {
    /// The structure as bytes, in the kernel's layout.
    fn bytes(&self) -> &[u8] {
        // SAFETY: the contract of the trait: no unset padding, so every byte may be read.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast::<u8>(), size_of::<Self>()) }
    }

    /// The structure from bytes; `None` unless there are exactly as many as it takes.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        let mut value = MaybeUninit::<Self>::uninit();
        // SAFETY: the lengths are equal, and the contract of the trait makes every bit pattern a value.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast::<u8>(), bytes.len());
            Some(value.assume_init())
        }
    }
}

macro_rules! plain {
    ($($name:ident: $size:literal),* $(,)?) => { $(
        const _: () = assert!(size_of::<$name>() == $size, "a kernel structure changed its size: raise the format version");
        // SAFETY: generated from the kernel's header; all its padding is named fields, checked by the size above.
        unsafe impl Plain for $name {}
    )* };
}

plain! {
    kvm_regs: 144, kvm_sregs: 312, kvm_sregs2: 320, kvm_debugregs: 128, kvm_xcrs: 392, kvm_vcpu_events: 64,
    kvm_lapic_state: 1024, kvm_mp_state: 4, kvm_cpuid_entry2: 40, kvm_msr_entry: 16, kvm_irqchip: 520,
    kvm_pit_state2: 112, kvm_clock_data: 48, KvmNestedStateBuffer: 8320,
}

/// Host memory that can be a guest's RAM.
///
/// Implement it for whatever owns the mapping; [`RamSlot`](crate::frontend::kvm::RamSlot) keeps the owner alive for as
/// long as a guest can reach it.
///
/// # Safety
/// From construction to drop, the `size()` bytes at `base()` are address space that this value owns: nothing else is
/// ever mapped there. Parts may be unmapped or remapped by the owner (KVM then sees a hole, or the new pages). Nobody
/// makes a Rust reference into it while a guest may run: the guest writes whenever it likes. Both answers never change.
pub unsafe trait HostMemory: Send + Sync {
    /// Where the memory starts. Page-aligned.
    fn base(&self) -> NonNull<u8>;
    /// How long it is: whole pages.
    fn size(&self) -> ByteSize;
}

// SAFETY: the addresses belong to the mapping that it was taken from, whose owner alone maps layers over them, and stay
// mapped while this lives; the crate makes no reference to guest memory.
unsafe impl HostMemory for super::mapping::KeptRange {
    fn base(&self) -> NonNull<u8> {
        self.base()
    }

    fn size(&self) -> ByteSize {
        self.len()
    }
}

/// Plain anonymous memory for guests that need no copy-on-write: tests, firmware scratch areas, probes.
///
/// Reads and writes copy; a guest that runs meanwhile can tear them.
#[derive(Debug)]
pub struct AnonymousRam {
    mapping: memmap2::MmapRaw,
}

impl AnonymousRam {
    /// Maps `size` bytes of zeroes; the host spends memory only on what is written.
    ///
    /// # Errors
    /// What `mmap` says; a size of zero is refused.
    pub fn new(size: ByteSize) -> io::Result<Arc<Self>> {
        let length = usize::try_from(size.get()).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Arc::new(Self { mapping: memmap2::MmapMut::map_anon(length)?.into() }))
    }

    fn range(&self, at: ByteOffset, length: usize) -> io::Result<*mut u8> {
        let start = usize::try_from(at.get()).ok();
        match start.and_then(|start| start.checked_add(length)) {
            Some(end) if end <= self.mapping.len() => Ok(self.mapping.as_mut_ptr().wrapping_add(end - length)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the range leaves this memory: check it first")),
        }
    }

    /// Copies out of guest memory.
    ///
    /// # Errors
    /// If the range leaves the memory.
    pub fn read(&self, at: ByteOffset, into: &mut [u8]) -> io::Result<()> {
        let from = self.range(at, into.len())?;
        for (index, byte) in into.iter_mut().enumerate() {
            // SAFETY: `range` checked the bounds; volatile because a guest may write meanwhile.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        Ok(())
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// If the range leaves the memory.
    pub fn write(&self, at: ByteOffset, bytes: &[u8]) -> io::Result<()> {
        let to = self.range(at, bytes.len())?;
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `range` checked the bounds; volatile because a guest may read meanwhile.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        Ok(())
    }
}

// SAFETY: the mapping is owned, never moves or shrinks, and is only reached by copies through raw pointers.
unsafe impl HostMemory for AnonymousRam {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.mapping.as_mut_ptr()).expect("mmap never returns the null page")
    }

    fn size(&self) -> ByteSize {
        ByteSize::new(self.mapping.len() as u64)
    }
}

/// Whether KVM keeps a log of the pages that the guest writes in a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLog {
    /// No log: the cheapest slot, and what a clone wants.
    #[default]
    Off,
    /// KVM notes the pages that the guest writes, for [`RamSlot::take_dirty`](crate::frontend::kvm::RamSlot::take_dirty) and the machine's. A
    /// first write to a page after each such call may cost an exit.
    On,
}

/// A registered memory slot. It owns the VM and the memory; dropping it removes the slot before it lets go of either.
pub(crate) struct Slot {
    vm: Arc<VmFd>,
    number: u32,
    memory: ManuallyDrop<Arc<dyn HostMemory>>,
}

impl Slot {
    pub(crate) fn memory(&self) -> &Arc<dyn HostMemory> {
        &self.memory
    }

    pub(crate) fn register(
        vm: &Arc<VmFd>,
        number: u32,
        at: GuestAddress,
        memory: Arc<dyn HostMemory>,
        log: DirtyLog,
    ) -> io::Result<Self> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if log == DirtyLog::On { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: at.get(),
            memory_size: memory.size().get(),
            userspace_addr: memory.base().as_ptr() as u64,
        };
        // SAFETY: the contract of `HostMemory` covers the range for as long as the owner lives, and this value holds
        // the owner until the kernel has confirmed that the slot is gone.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self { vm: Arc::clone(vm), number, memory: ManuallyDrop::new(memory) })
    }

    /// Registers addresses that nobody owns yet. The slot stays until the machine is gone, or [`adopt`](Self::adopt) makes it a
    /// `Slot`. For [`hollow`](super::hollow) only, whose machines cannot run before that.
    pub(super) fn register_hollow(
        vm: &VmFd,
        number: u32,
        at: GuestAddress,
        address: u64,
        len: ByteSize,
    ) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: at.get(),
            memory_size: len.get(),
            userspace_addr: address,
        };
        // SAFETY: only a running vCPU reaches memory through a slot, and the caller lets none run until the memory there is
        // owned by what `adopt` is given.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    /// Reads the log of pages written, a bit for each page of 4 KiB, and clears it. `bits` has room for the whole slot.
    ///
    /// # Errors
    /// `ENOENT` where the slot has no log; the plan's.
    pub(crate) fn read_log(&self, bits: &mut [u64]) -> io::Result<()> {
        let pages = self.memory.size().get().div_ceil(4096);
        if (bits.len() as u64) < pages.div_ceil(64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the log is longer than the room for it"));
        }
        fault::check(Call::Kvm)?;
        let dirty_bitmap = bits.as_mut_ptr().cast();
        let mut log = kvm_dirty_log {
            slot: self.number,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap },
        };
        // SAFETY: the kernel reads one `kvm_dirty_log`, and writes a bit for each page of the slot, in whole words: checked above.
        unsafe { call(&*self.vm, KVM_GET_DIRTY_LOG, (&raw mut log).cast()) }
    }

    /// Takes over a slot that was registered before its memory was there.
    pub(super) fn adopt(vm: &Arc<VmFd>, number: u32, memory: Arc<dyn HostMemory>) -> Self {
        Self { vm: Arc::clone(vm), number, memory: ManuallyDrop::new(memory) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let region = kvm_userspace_memory_region { slot: self.number, ..Default::default() };
        // SAFETY: a size of zero only takes memory away from the guest. When the call returns, no vCPU reaches it.
        let removed = unsafe { self.vm.set_user_memory_region(region) };
        match removed {
            // SAFETY: dropped once, here, and not touched again.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.memory) },
            // The guest may still reach the memory: better to lose it than to let the guest write into what comes next.
            Err(error) => {
                tracing::error!(%error, slot = self.number, "KVM kept a memory slot: its memory is leaked");
            }
        }
    }
}
