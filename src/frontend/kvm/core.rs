//! General registers, special registers and events of one vCPU: what KVM shares in a page, where it does.
//!
//! Every call on a vCPU pays for taking it up and putting it down (1.4 of 1.6 µs here), whatever it reads or writes. A `KVM_RUN` that is
//! told not to enter the guest takes it up once, and moves these three through the shared page (`KVM_CAP_SYNC_REGS`): 1.9 µs in place
//! of 4.8. So it is used wherever the caller can run the vCPU, that is, holds it mutably; else, and on kernels where a run by another
//! thread waits for a grace period (before Linux 6.12), it is a call each.
//!
//! It knows these three parts and their order, and no others.

use kvm_bindings::{
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs, kvm_sync_regs, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::call::KvmCall;
use super::error::KvmError;
use super::exit::EINTR;
use super::vcpu::VcpuIndex;
use super::{io_error, vcpu_error};
use crate::sys::fault::{self, Call};
use crate::sys::hollow::vcpus_change_threads_freely;

const ALL: u64 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as u64;

/// How these registers are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Through the shared page, all at once.
    Shared,
    /// By a call each.
    Calls,
}

impl Way {
    /// The best that this host has.
    pub(super) fn of(kvm: &Kvm) -> Self {
        let shared = u64::try_from(kvm.check_extension_int(Cap::SyncRegs)).unwrap_or(0);
        if shared & ALL == ALL && vcpus_change_threads_freely() { Self::Shared } else { Self::Calls }
    }
}

/// Reads them by a call each: the vCPU need not be held mutably.
pub(super) fn ask(vcpu: &VcpuFd, index: VcpuIndex) -> Result<kvm_sync_regs, KvmError> {
    let at = |call| vcpu_error(call, index);
    let regs = vcpu.get_regs().map_err(at(KvmCall::GetRegs))?;
    let sregs = vcpu.get_sregs().map_err(at(KvmCall::GetSregs))?;
    let events = vcpu.get_vcpu_events().map_err(at(KvmCall::GetVcpuEvents))?;
    Ok(kvm_sync_regs { regs, sregs, events })
}

/// Reads them. The vCPU is at rest; an exit that is finished by one more `KVM_RUN` is finished by this one.
pub(super) fn read(way: Way, vcpu: &mut VcpuFd, index: VcpuIndex) -> Result<kvm_sync_regs, KvmError> {
    if way == Way::Calls {
        return ask(vcpu, index);
    }
    fault::check(Call::Kvm).map_err(|errno| io_error(KvmCall::Run, index)(errno.into()))?;
    // The embedder may use the page for itself: what it asked for is asked for again afterwards.
    let asked = std::mem::replace(&mut vcpu.get_kvm_run().kvm_valid_regs, ALL);
    let stood_still = run_nowhere(vcpu, index);
    vcpu.get_kvm_run().kvm_valid_regs = asked;
    stood_still?;
    Ok(vcpu.sync_regs())
}

/// Writes them.
pub(super) fn write(
    way: Way,
    vcpu: &mut VcpuFd,
    index: VcpuIndex,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    events: &kvm_vcpu_events,
) -> Result<(), KvmError> {
    if way == Way::Shared {
        fault::check(Call::Kvm).map_err(|errno| io_error(KvmCall::Run, index)(errno.into()))?;
        *vcpu.sync_regs_mut() = kvm_sync_regs { regs: *regs, sregs: *sregs, events: *events };
        vcpu.get_kvm_run().kvm_dirty_regs = ALL;
        let stood_still = run_nowhere(vcpu, index);
        // The kernel takes the marks away when it has taken the values up. It does not for a vCPU that was never started, and where it
        // refuses one; the calls below name which.
        if std::mem::take(&mut vcpu.get_kvm_run().kvm_dirty_regs) == 0 && stood_still.is_ok() {
            return Ok(());
        }
    }
    let at = |call| vcpu_error(call, index);
    vcpu.set_sregs(sregs).map_err(at(KvmCall::SetSregs))?;
    vcpu.set_regs(regs).map_err(at(KvmCall::SetRegs))?;
    vcpu.set_vcpu_events(events).map_err(at(KvmCall::SetVcpuEvents))
}

/// A run that ends before it enters the guest.
fn run_nowhere(vcpu: &mut VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
    vcpu.set_kvm_immediate_exit(1);
    let end = match vcpu.run() {
        Err(errno) if errno.errno() == EINTR => Ok(()),
        Err(errno) => Err(vcpu_error(KvmCall::Run, index)(errno)),
        Ok(exit) => {
            let what = format!("the vCPU was not at rest, it reports {exit:?}: call `finish_exit` first");
            Err(io_error(KvmCall::Run, index)(std::io::Error::other(what)))
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::kvm::{Devices, VcpuCount, VmBuilder};
    use crate::sys::kvm::Plain;

    fn same(one: &kvm_sync_regs, two: &kvm_sync_regs) -> bool {
        (one.regs.bytes(), one.sregs.bytes(), one.events.bytes())
            == (two.regs.bytes(), two.sregs.bytes(), two.events.bytes())
    }

    #[test]
    fn both_ways_move_the_same() {
        let Some(host) = crate::frontend::kvm::host::or_skip() else { return };
        let built = VmBuilder::new(&host).and_then(|vm| vm.devices(Devices::NONE));
        let mut machine = built.and_then(|vm| vm.vcpus(VcpuCount::ONE)).unwrap();
        let (vcpu, index) = (&mut machine.vcpus_mut()[0], VcpuIndex::new(0));
        let ways = [host.core_way(), Way::Calls];
        for (n, way) in ways.into_iter().chain(ways).enumerate() {
            let mut core = ask(vcpu, index).unwrap();
            (core.regs.rax, core.regs.r15, core.regs.rip) = (n as u64 + 1, 15, 0x1000);
            (core.sregs.cr2, core.sregs.fs.base) = (n as u64 * 4096, 0x7000);
            core.events.nmi.masked = n as u8 % 2;
            write(way, vcpu, index, &core.regs, &core.sregs, &core.events).unwrap();
            assert!(ways.iter().all(|way| same(&read(*way, vcpu, index).unwrap(), &core)), "written by {way:?}");
        }
        // What the kernel refuses is named by the call that would have done it, and the marks do not stay for the next run.
        let mut core = ask(vcpu, index).unwrap();
        core.sregs.cr4 = u64::MAX;
        for way in ways {
            let refused = write(way, vcpu, index, &core.regs, &core.sregs, &core.events).unwrap_err();
            assert_eq!(refused.call(), Some(KvmCall::SetSregs), "{refused}");
            assert_eq!(vcpu.get_kvm_run().kvm_dirty_regs, 0);
        }
    }
}
