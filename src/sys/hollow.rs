//! A KVM machine whose memory slots lie over addresses where nothing is mapped yet.
//!
//! Owns what makes that sound: the slots name addresses that belong to nobody, so until RAM is mapped there no vCPU may enter the guest.
//! Therefore the vCPUs cannot be borrowed mutably (running one needs that) and the machine's descriptor is not handed
//! out; [`HollowVm::fill`] gives both, and wants the RAM that lies there for it. It must not know what a shell is for, nor which devices a
//! machine has.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::fault::{self, Call};
use super::kvm::Slot;
use super::mapping::KeptRange;
use super::reservation::Hole;
use crate::page::{ByteOffset, ByteSize, GuestAddress};

/// A slot over a part of the hole.
#[derive(Clone, Copy, Debug)]
struct HollowSlot {
    number: u32,
    offset: ByteOffset,
    len: ByteSize,
}

/// A machine that cannot run yet.
pub(crate) struct HollowVm {
    // Dropped before the machine, as the kernel likes it.
    vcpus: Vec<VcpuFd>,
    slots: Vec<HollowSlot>,
    hole: Hole,
    vm: Arc<VmFd>,
}

/// A machine with its RAM in place.
pub(crate) struct FilledVm {
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) vm: Arc<VmFd>,
}

/// Passes a call through the fault plan.
fn checked<T>(call: impl FnOnce() -> Result<T, kvm_ioctls::Error>) -> io::Result<T> {
    fault::check(Call::Kvm)?;
    call().map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

impl HollowVm {
    /// An empty machine.
    ///
    /// # Errors
    /// Those of `KVM_CREATE_VM`.
    pub(crate) fn new(kvm: &Kvm, hole: Hole) -> io::Result<Self> {
        let vm = checked(|| kvm.create_vm())?;
        Ok(Self { vcpus: Vec::new(), slots: Vec::new(), hole, vm: Arc::new(vm) })
    }

    /// Registers `len` bytes of the hole, from `offset`, as guest memory at `at`.
    ///
    /// # Errors
    /// A range outside the hole, or those of `KVM_SET_USER_MEMORY_REGION`.
    pub(crate) fn slot(&mut self, at: GuestAddress, offset: ByteOffset, len: ByteSize) -> io::Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end.get() <= self.hole.len().get());
        if !inside {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a slot must lie in the hole"));
        }
        let number = self.slots.len() as u32;
        let address = self.hole.base().addr().get() as u64 + offset.get();
        fault::check(Call::Kvm)?;
        Slot::register_hollow(&self.vm, number, at, address, len)?;
        self.slots.push(HollowSlot { number, offset, len });
        Ok(())
    }

    /// The machine's descriptor, to create its devices; not to create vCPUs.
    ///
    /// # Errors
    /// The fault plan's.
    pub(crate) fn for_devices(&self) -> io::Result<&VmFd> {
        fault::check(Call::Kvm)?;
        Ok(&self.vm)
    }

    /// Creates the next vCPU.
    ///
    /// # Errors
    /// Those of `KVM_CREATE_VCPU`.
    pub(crate) fn add_vcpu(&mut self) -> io::Result<()> {
        let vcpu = checked(|| self.vm.create_vcpu(self.vcpus.len() as u64))?;
        self.vcpus.push(vcpu);
        Ok(())
    }

    /// The machine's descriptor, to ask it things; not to create vCPUs.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The vCPUs, to look at and to set; running one takes a mutable borrow.
    pub(crate) fn vcpus(&self) -> &[VcpuFd] {
        &self.vcpus
    }

    /// Gives the machine out, now that RAM lies where its slots point, which the result keeps mapped.
    ///
    /// # Errors
    /// `None` if `ram` is not the very range of the hole; the machine is gone then.
    pub(crate) fn fill(self, ram: &KeptRange) -> Option<FilledVm> {
        if ram.base() != self.hole.base() || ram.len() != self.hole.len() {
            return None;
        }
        let mut slots = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            // Checked against the hole when it was registered.
            let memory = ram.part(slot.offset, slot.len).ok()?;
            slots.push(Slot::adopt(&self.vm, slot.number, Arc::new(memory)));
        }
        Some(FilledVm { vcpus: self.vcpus, slots, vm: self.vm })
    }
}
