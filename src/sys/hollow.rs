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

    /// Lets each vCPU do what the kernel does the first time one is run, without entering the guest: `KVM_RUN` with
    /// `immediate_exit` returns before it. Some 15 µs that the fork's own first run then has not to spend.
    ///
    /// Left out before Linux 6.12: there a vCPU that changes threads waits for an RCU grace period in its next run, milliseconds, and a
    /// shell is made by another thread than the one that runs it.
    ///
    /// # Errors
    /// If the call returns anything but that it was told not to enter.
    pub(crate) fn warm(&mut self) -> io::Result<()> {
        if !vcpus_change_threads_freely() {
            return Ok(());
        }
        for vcpu in &mut self.vcpus {
            vcpu.set_kvm_immediate_exit(1);
            let stopped = match vcpu.run() {
                Err(error) => io::Error::from_raw_os_error(error.errno()),
                Ok(exit) => io::Error::other(format!("a vCPU that was told to stop at once reports {exit:?}")),
            };
            vcpu.set_kvm_immediate_exit(0);
            if stopped.kind() != io::ErrorKind::Interrupted {
                return Err(stopped);
            }
        }
        Ok(())
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

/// Whether this kernel is 6.12 or later. False if it cannot be told.
pub(crate) fn vcpus_change_threads_freely() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| at_least_6_12(&release))
}

fn at_least_6_12(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_apart() {
        for (release, new) in
            [("6.18.44-fc\n", true), ("6.12.0", true), ("7.0-rc1", true), ("6.9.1", false), ("x", false)]
        {
            assert_eq!(at_least_6_12(release), new, "{release}");
        }
    }
}
