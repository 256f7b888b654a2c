//! Bringing a vCPU to rest: finishing the exit that `KVM_RUN` reported last.
//!
//! It knows nothing of what is captured afterwards.

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::call::KvmCall;
use super::error::KvmError;
use super::vcpu::VcpuIndex;
use super::vcpu_error;

/// What `KVM_RUN` answers when it was told not to enter the guest.
pub(super) const EINTR: i32 = 4;

/// Finishes the last exit of a vCPU without running the guest on. Call it before every capture.
///
/// After an exit for port or memory-mapped I/O the kernel completes the instruction (stores what was read, moves the
/// instruction pointer) only when the vCPU next enters `KVM_RUN`. A capture taken before that would make every clone do
/// the same I/O again. One call, no guest instruction.
///
/// An instruction may have more I/O to do (an access across two pages): `serve` is called with each such exit, and must
/// treat it as the VMM's run loop would.
///
/// # Errors
/// [`KvmError::Vcpu`] if `KVM_RUN` fails.
///
/// ```no_run
/// use offshoot::frontend::kvm::{KvmError, VcpuIndex, finish_exit};
///
/// fn pause(vcpu: &mut kvm_ioctls::VcpuFd) -> Result<(), KvmError> {
///     finish_exit(vcpu, VcpuIndex::new(0), |exit| println!("one more: {exit:?}"))
/// }
/// ```
pub fn finish_exit(vcpu: &mut VcpuFd, index: VcpuIndex, mut serve: impl FnMut(VcpuExit<'_>)) -> Result<(), KvmError> {
    vcpu.set_kvm_immediate_exit(1);
    let result = loop {
        match vcpu.run() {
            Ok(exit) => serve(exit),
            Err(errno) if errno.errno() == EINTR => break Ok(()),
            Err(errno) => break Err(vcpu_error(KvmCall::Run, index)(errno)),
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    result
}
