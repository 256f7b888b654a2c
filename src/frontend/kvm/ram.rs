//! Guest memory over host memory: slots that keep their memory alive.
//!
//! It knows addresses and slot numbers, not what the memory is made of.

use std::fmt;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use super::call::KvmCall;
use super::dirty::Log;
use super::error::KvmError;
use crate::page::{ByteSize, GuestAddress, PageCount, PageSet, PageSize};
use crate::sys::kvm::Slot;
pub use crate::sys::kvm::{AnonymousRam, DirtyLog, HostMemory};

/// Number of a memory slot within one VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct SlotNumber(u32);

impl fmt::Display for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

impl SlotNumber {
    /// Wraps a number.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Host memory registered as guest memory, for as long as this value lives.
///
/// It holds the VM and the memory. Dropping it takes the memory away from the guest and only then lets go of it, so
/// vCPUs made from the VM may outlive it: they fault instead of reaching memory that is somebody else's by then.
///
/// # Cost
/// Registering takes time with the size of the slot (0.1 to 1 ms from 1 to 8 GiB) if anything is mapped there. Over an
/// address range where nothing is mapped yet it can be done ahead of need, and mapping into the range later costs
/// nothing. **Register before the interrupt chips and the timer exist**: afterwards each registration waits for a grace
/// period inside the kernel, 8 ms where it was 0.3. [`VmBuilder`](super::VmBuilder) makes that order the only one.
/// Dropping waits for the same grace period (7.5 ms with the chips, 0.03 without): drop off the path that somebody
/// waits for.
///
/// ```no_run
/// use std::sync::Arc;
/// use offshoot::frontend::kvm::{AnonymousRam, DirtyLog, KvmHost, RamSlot, SlotNumber};
/// use offshoot::page::{ByteSize, GuestAddress};
///
/// let host = KvmHost::open()?;
/// let vm = Arc::new(host.kvm().create_vm()?);
/// let ram = AnonymousRam::new(ByteSize::mib(1))?;
/// let slot = RamSlot::register(&vm, SlotNumber::new(0), GuestAddress::new(0), ram, DirtyLog::Off)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RamSlot {
    slot: Slot,
    log: Mutex<Log>,
    number: SlotNumber,
    at: GuestAddress,
    size: ByteSize,
}

impl RamSlot {
    /// Registers all of `memory` at the guest-physical address `at`.
    ///
    /// # Errors
    /// [`KvmError::Machine`] with `KVM_SET_USER_MEMORY_REGION` if the host refuses (overlap, alignment, slot number);
    /// [`KvmError::SlotRange`] if it would wrap around the address space.
    pub fn register(
        vm: &Arc<VmFd>,
        number: SlotNumber,
        at: GuestAddress,
        memory: Arc<dyn HostMemory>,
        log: DirtyLog,
    ) -> Result<Self, KvmError> {
        let size = memory.size();
        if at.checked_add(size).is_none() {
            return Err(KvmError::SlotRange { slot: number });
        }
        let slot = Slot::register(vm, number.get(), at, memory, log)
            .map_err(|source| KvmError::Machine { call: KvmCall::SetUserMemoryRegion, source })?;
        Ok(Self { slot, log: Mutex::default(), number, at, size })
    }

    /// A slot that was registered before its memory was there.
    pub(super) fn over(slot: Slot, number: SlotNumber, at: GuestAddress) -> Self {
        let size = slot.memory().size();
        Self { slot, log: Mutex::default(), number, at, size }
    }

    /// The host memory behind it.
    pub fn memory(&self) -> &Arc<dyn HostMemory> {
        self.slot.memory()
    }

    /// The pages that the guest wrote since this was last asked, counted from the slot's start in pages of 4 KiB.
    ///
    /// The bitmap of the whole slot is copied, so this costs by the slot: 0.3 µs and 3.5 µs per GiB here, and little per page written.
    /// Writes of this process are not in it.
    ///
    /// # Errors
    /// [`KvmError::Machine`] with `KVM_GET_DIRTY_LOG` where the slot was registered with [`DirtyLog::Off`]. Nothing is lost: the next
    /// call gives it.
    pub fn take_dirty(&self) -> Result<PageSet, KvmError> {
        self.fetch_dirty()?;
        Ok(self.fetched())
    }

    /// Reads the log, for [`RamSlot::fetched`]: until then it counts as not asked for.
    pub(super) fn fetch_dirty(&self) -> Result<(), KvmError> {
        let pages = PageCount::new(self.size.get().div_ceil(PageSize::KIB_4.bytes().get()));
        let fetched = self.log.lock().fetch(&self.slot, pages);
        fetched.map_err(|source| KvmError::Machine { call: KvmCall::GetDirtyLog, source })
    }

    /// What was fetched and not handed out.
    pub(super) fn fetched(&self) -> PageSet {
        self.log.lock().take()
    }

    /// Its number.
    pub fn number(&self) -> SlotNumber {
        self.number
    }

    /// Where the guest sees it.
    pub fn guest_address(&self) -> GuestAddress {
        self.at
    }

    /// How long it is.
    pub fn size(&self) -> ByteSize {
        self.size
    }
}

impl fmt::Debug for RamSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamSlot")
            .field("number", &self.number)
            .field("at", &self.at)
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}
