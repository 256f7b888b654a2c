//! Second-level page tables filled ahead: what [`Prefault`](crate::Prefault) is for the host's page tables, for the processor's other ones.
//!
//! Knows vCPUs and where RAM lies, not where a working set comes from.

use kvm_ioctls::VcpuFd;

use super::call::KvmCall;
use super::error::KvmError;
use super::io_error;
use super::vcpu::VcpuIndex;
use crate::page::{ByteSize, GuestAddress, PageCount, PageSet};
use crate::ram::RamLayout;

/// Whether second-level page tables could be filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SecondLevel {
    /// They have so many pages more.
    Filled(PageCount),
    /// The kernel is older than 6.11, or this KVM has no hardware paging: the guest faults as it always does. Nothing was done.
    Unsupported,
}

/// Fills the second-level page tables of the machine that `vcpu` belongs to, as if the guest had read `pages`. Pages that
/// are private in the host's tables by then ([`Prefault`](crate::Prefault) of written pages) are mapped writable.
///
/// Call it between the load of state and the first run. A read that was not prefaulted is taken as the guest's own: it breaks no sharing.
///
/// # Errors
/// [`KvmError::Vcpu`] with `KVM_PRE_FAULT_MEMORY`: some pages may be mapped then, which changes nothing but time.
pub fn prefault_second_level(
    vcpu: &VcpuFd,
    index: VcpuIndex,
    layout: &RamLayout,
    pages: &PageSet,
) -> Result<SecondLevel, KvmError> {
    let size = layout.geometry().page_size();
    let mut filled = PageCount::ZERO;
    for run in pages.runs() {
        let (start, end) = (size.start_of(run.start()).get(), size.start_of(run.end()).get());
        for (region, offset) in layout.regions() {
            let from = start.max(offset.get());
            let to = end.min(offset.get().saturating_add(region.len.get()));
            if from >= to {
                continue;
            }
            let at = GuestAddress::new(region.start.get() + (from - offset.get()));
            match crate::sys::kvm::pre_fault(vcpu, at, ByteSize::new(to - from)) {
                Ok(()) => filled = filled.saturating_add(PageCount::new((to - from) >> size.shift())),
                Err(error) if is_unknown(&error) && filled.is_zero() => return Ok(SecondLevel::Unsupported),
                Err(error) => return Err(io_error(KvmCall::PreFaultMemory, index)(error)),
            }
        }
    }
    Ok(SecondLevel::Filled(filled))
}

/// ENOTTY or EINVAL: a call that the kernel does not know; EOPNOTSUPP: no hardware paging.
fn is_unknown(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::NOTTY, Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS]
        .iter()
        .any(|errno| Some(errno.raw_os_error()) == error.raw_os_error())
}
