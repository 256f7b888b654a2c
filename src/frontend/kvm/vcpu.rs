//! One vCPU: what is captured, in which order, and in which order it is loaded again.
//!
//! It knows one vCPU only; the order between vCPUs and the machine's own chips is `machine.rs`.
//!
//! **Order of capture.** The MP state first: asking for it makes the kernel act on a pending INIT or SIPI, which changes
//! registers. Then registers and events (`core.rs`), then the rest, which changes nothing.
//!
//! **Order of loading**, each because of the one before:
//! 1. CPUID (it decides which bits and registers exist), then the TSC frequency (values below are in its ticks);
//! 2. special registers (EFER and the control registers decide what the next ones mean; APIC base decides the LAPIC's mode),
//!    general registers and events (in this order: setting registers clears a pending exception);
//! 3. debug registers;
//! 4. XCRs before XSAVE (XCR0 says which parts of the area count);
//! 5. MSRs, the TSC first;
//! 6. nested state (it needs the registers and the VMX MSRs), then the events again;
//! 7. LAPIC, then the TSC deadline (loading the LAPIC disarms its timer);
//! 8. the machine's chips and clock, then the MP state of every vCPU (`machine.rs`).
//!
//! `KVM_SET_FPU` is never issued: XSAVE holds all of it.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_sync_regs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};

use super::call::KvmCall;
use super::chips::Irqchips;
use super::core;
use super::error::KvmError;
use super::host::KvmHost;
use super::msr::{MsrIndex, MsrValues};
use super::{io_error, vcpu_error};
use crate::sys::kvm::{Plain, XsaveArea, get_sregs2, set_sregs2, xsave_bound};

/// Position of a vCPU in the list handed over, from 0. (Not its APIC id.)
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct VcpuIndex(u32);

impl VcpuIndex {
    /// Wraps a position.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The position.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for VcpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

/// What the vCPU to load was doing until now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// It was just created and has not run. Calls that would only write what a fresh vCPU holds anyway are left out.
    Fresh,
    /// It ran before (reset in place), and is at rest: everything is written that the kernel takes.
    Used,
}

/// What a guest hypervisor inside this guest keeps in KVM.
#[derive(Clone)]
pub(super) enum Nested {
    /// The guest's CPUID has neither VMX nor SVM: there is nothing.
    NotOffered,
    /// Captured.
    Captured(Box<KvmNestedStateBuffer>),
    /// The guest may have some, but this host refuses to hand it out.
    Refused,
}

/// What one vCPU knows about its CPUID, read once in its life.
#[derive(Clone)]
pub(super) struct VcpuPlan {
    pub(super) cpuid: Arc<CpuId>,
    pub(super) tsc_khz: u32,
}

impl VcpuPlan {
    pub(super) fn read(vcpu: &VcpuFd, index: VcpuIndex) -> Result<Self, KvmError> {
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(vcpu_error(KvmCall::GetCpuid2, index))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(vcpu_error(KvmCall::GetTscKhz, index))?;
        Ok(Self { cpuid: Arc::new(cpuid), tsc_khz })
    }

    /// Tells a vCPU what its guest is told about its processor.
    pub(super) fn prepare(&self, host: &KvmHost, vcpu: &VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
        vcpu.set_cpuid2(&self.cpuid).map_err(vcpu_error(KvmCall::SetCpuid2, index))?;
        if self.tsc_khz != host.tsc_khz() {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(vcpu_error(KvmCall::SetTscKhz, index))?;
        }
        Ok(())
    }

    /// Whether a vCPU prepared for the one can be loaded with a state of the other.
    pub(super) fn fits(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.cpuid, &other.cpuid) || self.cpuid.as_slice() == other.cpuid.as_slice();
        same && self.tsc_khz == other.tsc_khz
    }

    /// Whether the guest is told that it can run guests of its own.
    fn offers_nesting(&self) -> bool {
        self.cpuid.as_slice().iter().any(|leaf| match leaf.function {
            1 => leaf.ecx & (1 << 5) != 0,
            0x8000_0001 => leaf.ecx & (1 << 2) != 0,
            _ => false,
        })
    }
}

/// Everything that KVM keeps for one vCPU, in the kernel's own structures: loading it converts nothing.
#[derive(Clone)]
pub(super) struct VcpuState {
    pub(super) plan: VcpuPlan,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// Page-directory pointers, for a guest in PAE paging: what the processor holds, which may differ from its RAM.
    pub(super) pdptrs: Option<[u64; 4]>,
    pub(super) debug: kvm_debugregs,
    /// Absent where the host has no XSAVE.
    pub(super) xcrs: Option<kvm_xcrs>,
    pub(super) xsave: XsaveArea,
    pub(super) msrs: MsrValues,
    pub(super) nested: Nested,
    /// Absent where the interrupt controller is not in the kernel.
    pub(super) lapic: Option<kvm_lapic_state>,
    pub(super) events: kvm_vcpu_events,
}

/// Debug registers of a vCPU that never ran.
const FRESH_DR6: u64 = 0xffff_0ff0;
const FRESH_DR7: u64 = 0x400;
/// XCR0 of a vCPU that never ran: x87 only.
const FRESH_XCR0: u64 = 1;

impl VcpuState {
    /// Reads the rest of a paused vCPU. `mp_state` and `core` were read before (see the order above).
    pub(super) fn capture(
        host: &KvmHost,
        plan: &VcpuPlan,
        vcpu: &VcpuFd,
        index: VcpuIndex,
        chips: Irqchips,
        mp_state: kvm_mp_state,
        core: kvm_sync_regs,
    ) -> Result<Self, KvmError> {
        let at = |call| vcpu_error(call, index);
        let kvm_sync_regs { regs, sregs, events } = core;
        let pdptrs = if uses_pae(&sregs) {
            let sregs2 = get_sregs2(vcpu).map_err(io_error(KvmCall::GetSregs2, index))?;
            (sregs2.flags & u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs2.pdptrs)
        } else {
            None
        };
        let debug = vcpu.get_debug_regs().map_err(at(KvmCall::GetDebugRegs))?;
        let xcrs = match host.has_xcrs() {
            true => Some(vcpu.get_xcrs().map_err(at(KvmCall::GetXcrs))?),
            false => None,
        };
        let xsave = XsaveArea::read(vcpu, host.xsave_size()).map_err(io_error(KvmCall::GetXsave2, index))?;
        let msrs = MsrValues::capture(host.msrs(), vcpu, index, chips)?;
        let nested = if !plan.offers_nesting() {
            Nested::NotOffered
        } else if !host.has_nested_state() {
            Nested::Refused
        } else {
            let mut buffer = Box::new(KvmNestedStateBuffer::empty());
            vcpu.nested_state(&mut buffer).map_err(at(KvmCall::GetNestedState))?;
            Nested::Captured(buffer)
        };
        let lapic = match chips {
            Irqchips::InKernel => Some(vcpu.get_lapic().map_err(at(KvmCall::GetLapic))?),
            Irqchips::Absent => None,
        };
        Ok(Self { plan: plan.clone(), mp_state, regs, sregs, pdptrs, debug, xcrs, xsave, msrs, nested, lapic, events })
    }

    /// Step 1, which can be done long before the fork: what the guest is told about its processor.
    pub(super) fn prepare(&self, host: &KvmHost, vcpu: &VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
        self.plan.prepare(host, vcpu, index)
    }

    /// Steps 2 to 7. A vCPU that ran is at rest.
    pub(super) fn load(
        &self,
        host: &KvmHost,
        vcpu: &mut VcpuFd,
        index: VcpuIndex,
        target: Target,
    ) -> Result<(), KvmError> {
        let at = |call| vcpu_error(call, index);
        let all = target == Target::Used;
        // A VM that ran on a host with more vector state than this one cannot go on here.
        if self.xsave.bytes().len() as u64 > xsave_bound().get() {
            return Err(KvmError::XsaveSize {
                captured: crate::page::ByteSize::new(self.xsave.bytes().len() as u64),
                host: host.xsave_size(),
            });
        }
        if self.lapic.is_none() {
            // Without a LAPIC every run takes CR8 from here.
            vcpu.get_kvm_run().cr8 = self.sregs.cr8;
        }
        core::write(host.core_way(), vcpu, index, &self.regs, &self.sregs, &self.events)?;
        if let Some(pdptrs) = self.pdptrs {
            // Once more, with the pointers that the processor holds: what is above took them from RAM.
            let sregs2 = with_pdptrs(&self.sregs, pdptrs);
            set_sregs2(vcpu, &sregs2).map_err(io_error(KvmCall::SetSregs2, index))?;
        }
        if all || !self.has_fresh_debug_registers() {
            vcpu.set_debug_regs(&self.debug).map_err(at(KvmCall::SetDebugRegs))?;
        }
        if let Some(xcrs) = self.xcrs.as_ref().filter(|xcrs| all || !has_fresh_xcrs(xcrs)) {
            vcpu.set_xcrs(xcrs).map_err(at(KvmCall::SetXcrs))?;
        }
        self.xsave.write(vcpu).map_err(io_error(KvmCall::SetXsave, index))?;
        self.msrs.load(vcpu, index)?;
        if let Nested::Captured(state) = &self.nested {
            vcpu.set_nested_state(state).map_err(at(KvmCall::SetNestedState))?;
            vcpu.set_vcpu_events(&self.events).map_err(at(KvmCall::SetVcpuEvents))?;
        }
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(at(KvmCall::SetLapic))?;
            // In any other mode of the timer the kernel ignores the register, and reads it as zero.
            if uses_deadline(lapic) && (all || self.msrs.deadline != Some(0)) {
                self.msrs.load_deadline(vcpu, index)?;
            }
        }
        Ok(())
    }

    /// The last step of all.
    pub(super) fn load_mp_state(&self, vcpu: &VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
        // Without in-kernel chips every vCPU is runnable, and no other state exists.
        if self.lapic.is_none() && self.mp_state.mp_state == KVM_MP_STATE_RUNNABLE {
            return Ok(());
        }
        vcpu.set_mp_state(self.mp_state).map_err(vcpu_error(KvmCall::SetMpState, index))
    }

    pub(super) fn refused_msrs(&self) -> &[MsrIndex] {
        &self.msrs.refused
    }

    fn has_fresh_debug_registers(&self) -> bool {
        let fresh = kvm_debugregs { dr6: FRESH_DR6, dr7: FRESH_DR7, ..Default::default() };
        self.debug.bytes() == fresh.bytes()
    }
}

/// Whether the LAPIC's timer fires at a value of the time stamp counter: bits 17 and 18 of its vector entry.
fn uses_deadline(lapic: &kvm_lapic_state) -> bool {
    const TIMER_ENTRY: usize = 0x320;
    lapic.regs[TIMER_ENTRY + 2] as u8 >> 1 & 0b11 == 0b10
}

/// Paging with four page-directory pointers that the processor loads with CR3: PG and PAE on, long mode off.
fn uses_pae(sregs: &kvm_sregs) -> bool {
    sregs.cr0 >> 31 & 1 == 1 && sregs.cr4 >> 5 & 1 == 1 && sregs.efer >> 10 & 1 == 0
}

/// Special registers in the newer form. It has no interrupt bitmap: an injected interrupt is in the events too.
fn with_pdptrs(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID),
        pdptrs,
    }
}

fn has_fresh_xcrs(xcrs: &kvm_xcrs) -> bool {
    xcrs.nr_xcrs == 1 && xcrs.xcrs[0].xcr == 0 && xcrs.xcrs[0].value == FRESH_XCR0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::kvm::{Clock, Devices, MachinePlan, Pit, VcpuCount, VmBuilder};

    /// What `load` leaves out for a fresh vCPU is right only while a fresh vCPU holds exactly that.
    #[test]
    fn a_fresh_vcpu_holds_what_load_leaves_out() {
        let Some(host) = crate::frontend::kvm::host::or_skip() else { return };
        for irqchips in [Irqchips::Absent, Irqchips::InKernel] {
            let devices = Devices { irqchips, pit: Pit::Absent, clock: Clock::Left };
            let mut machine = VmBuilder::new(&host)
                .and_then(|vm| vm.devices(devices))
                .and_then(|vm| vm.vcpus(VcpuCount::new(2)))
                .unwrap();
            for vcpu in machine.vcpus() {
                vcpu.set_cpuid2(host.supported_cpuid()).unwrap();
            }
            let plan = MachinePlan::read(&host, machine.vcpus(), devices).unwrap();
            let state = machine.capture(&plan).unwrap();
            for vcpu in &state.vcpus {
                assert!(vcpu.has_fresh_debug_registers(), "{:?}", vcpu.debug);
                assert!(vcpu.xcrs.as_ref().is_none_or(has_fresh_xcrs), "{:?}", vcpu.xcrs);
                assert_eq!(vcpu.msrs.deadline.unwrap_or(0), 0);
                assert_eq!(vcpu.plan.tsc_khz, host.tsc_khz());
                if irqchips == Irqchips::Absent {
                    assert_eq!(vcpu.mp_state.mp_state, KVM_MP_STATE_RUNNABLE);
                }
            }
        }
    }
}
