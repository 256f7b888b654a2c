//! The host: one handle on `/dev/kvm`, with everything that is asked once and never again.
//!
//! It knows no machine.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::call::KvmCall;
use super::core;
use super::error::KvmError;
use super::machine_error;
use super::msr::MsrPlan;
use crate::page::ByteSize;

/// An open `/dev/kvm` with what capture and restore need to know of the host, asked once.
///
/// Make one per process and share it: every [`MachinePlan`](super::MachinePlan) holds it.
///
/// ```no_run
/// use offshoot::frontend::kvm::KvmHost;
///
/// let host = KvmHost::open()?;
/// println!("{} model-specific registers per vCPU", host.msrs().registers().len());
/// # Ok::<(), offshoot::frontend::kvm::KvmError>(())
/// ```
pub struct KvmHost {
    kvm: Kvm,
    msrs: MsrPlan,
    cpuid: CpuId,
    xsave_size: ByteSize,
    tsc_khz: u32,
    has_xcrs: bool,
    has_nested_state: bool,
    core_way: core::Way,
}

impl KvmHost {
    /// Opens `/dev/kvm`. Costs some ten system calls and one scratch machine, under 1 ms.
    ///
    /// # Errors
    /// If the device is missing or closed to this user, or a question that every host of the last years answers is
    /// refused; the error names the call.
    pub fn open() -> Result<Arc<Self>, KvmError> {
        Self::new(Kvm::new().map_err(machine_error(KvmCall::Open))?)
    }

    /// The same over a handle that the VMM has already.
    ///
    /// # Errors
    /// As [`KvmHost::open`].
    pub fn new(kvm: Kvm) -> Result<Arc<Self>, KvmError> {
        let msrs = MsrPlan::probe(&kvm)?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(machine_error(KvmCall::GetSupportedCpuid))?;
        // Two answers only come from a VM and a vCPU: the size of its vector state and its default TSC frequency.
        let vm = kvm.create_vm().map_err(machine_error(KvmCall::CreateVm))?;
        let vcpu = vm.create_vcpu(0).map_err(machine_error(KvmCall::CreateVcpu))?;
        let xsave_size = u64::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let tsc_khz = vcpu.get_tsc_khz().map_err(machine_error(KvmCall::GetTscKhz))?;
        Ok(Arc::new(Self {
            core_way: core::Way::of(&kvm),
            has_xcrs: kvm.check_extension(Cap::Xcrs),
            has_nested_state: kvm.check_extension_int(Cap::NestedState) > 0,
            xsave_size: ByteSize::new(xsave_size.max(crate::sys::kvm::XSAVE_LEGACY_SIZE as u64)),
            tsc_khz,
            msrs,
            cpuid,
            kvm,
        }))
    }

    /// The handle itself, to create machines with.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Which model-specific registers are saved.
    pub fn msrs(&self) -> &MsrPlan {
        &self.msrs
    }

    /// Everything that a guest can be told about its processor on this host (`KVM_GET_SUPPORTED_CPUID`), read once.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// What the vector and floating-point state of a vCPU takes.
    pub fn xsave_size(&self) -> ByteSize {
        self.xsave_size
    }

    /// The frequency that a fresh vCPU's time stamp counter has.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// How general and special registers and events are moved.
    pub(super) fn core_way(&self) -> core::Way {
        self.core_way
    }

    pub(super) fn has_xcrs(&self) -> bool {
        self.has_xcrs
    }

    pub(super) fn has_nested_state(&self) -> bool {
        self.has_nested_state
    }
}

impl std::fmt::Debug for KvmHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmHost")
            .field("msrs", &self.msrs.registers().len())
            .field("xsave_size", &self.xsave_size)
            .field("tsc_khz", &self.tsc_khz)
            .finish_non_exhaustive()
    }
}

/// The host's KVM, or a skip that is told; a failure where nothing may be skipped.
#[cfg(test)]
pub(super) fn or_skip() -> Option<Arc<KvmHost>> {
    KvmHost::open().map_err(crate::testing::skip).ok()
}
