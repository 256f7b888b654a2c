//! Model-specific registers: which ones to save, reading them in batches, and naming the one that a host refuses.
//!
//! It knows nothing of the other parts of a vCPU; the order among registers is decided here, the order against the
//! LAPIC in `vcpu.rs`.

use std::fmt;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::call::KvmCall;
use super::chips::Irqchips;
use super::error::KvmError;
use super::vcpu::VcpuIndex;
use super::{machine_error, vcpu_error};

/// Number of a model-specific register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MsrIndex(u32);

impl MsrIndex {
    /// The time stamp counter.
    pub const TSC: Self = Self(0x10);
    /// When the LAPIC timer fires, in ticks of the time stamp counter.
    pub const TSC_DEADLINE: Self = Self(0x6e0);

    /// Wraps a register number.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The register number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The usual name, for the registers that people look for.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0x10 => "IA32_TSC",
            0x3a => "IA32_FEATURE_CONTROL",
            0x3b => "IA32_TSC_ADJUST",
            0x48 => "IA32_SPEC_CTRL",
            0x8b => "IA32_UCODE_REV",
            0xce => "PLATFORM_INFO",
            0xe1 => "IA32_UMWAIT_CONTROL",
            0xfe => "IA32_MTRRCAP",
            0x10a => "IA32_ARCH_CAPABILITIES",
            0x122 => "IA32_TSX_CTRL",
            0x140 => "MISC_FEATURES_ENABLES",
            0x174 => "IA32_SYSENTER_CS",
            0x175 => "IA32_SYSENTER_ESP",
            0x176 => "IA32_SYSENTER_EIP",
            0x17a => "IA32_MCG_STATUS",
            0x17b => "IA32_MCG_CTL",
            0x1a0 => "IA32_MISC_ENABLE",
            0x1c4 => "IA32_XFD",
            0x1c5 => "IA32_XFD_ERR",
            0x1d9 => "IA32_DEBUGCTL",
            0x200..=0x21f => "IA32_MTRR_PHYS",
            0x250 | 0x258 | 0x259 | 0x268..=0x26f => "IA32_MTRR_FIX",
            0x277 => "IA32_PAT",
            0x2ff => "IA32_MTRR_DEF_TYPE",
            0x345 => "IA32_PERF_CAPABILITIES",
            0x480..=0x493 => "IA32_VMX capability",
            0x6e0 => "IA32_TSC_DEADLINE",
            0xda0 => "IA32_XSS",
            0x4b56_4d00 => "KVM_WALL_CLOCK_NEW",
            0x4b56_4d01 => "KVM_SYSTEM_TIME_NEW",
            0x4b56_4d02 => "KVM_ASYNC_PF_EN",
            0x4b56_4d03 => "KVM_STEAL_TIME",
            0x4b56_4d04 => "KVM_PV_EOI_EN",
            0x4b56_4d05 => "KVM_POLL_CONTROL",
            0x4b56_4d06 => "KVM_ASYNC_PF_INT",
            0x4b56_4d07 => "KVM_ASYNC_PF_ACK",
            0x4b56_4d08 => "KVM_MIGRATION_CONTROL",
            0xc000_0080 => "EFER",
            0xc000_0081 => "STAR",
            0xc000_0082 => "LSTAR",
            0xc000_0083 => "CSTAR",
            0xc000_0084 => "SFMASK",
            0xc000_0100 => "FS_BASE",
            0xc000_0101 => "GS_BASE",
            0xc000_0102 => "KERNEL_GS_BASE",
            0xc000_0103 => "TSC_AUX",
            _ => return None,
        })
    }
}

impl fmt::Display for MsrIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "MSR {:#x} ({name})", self.0),
            None => write!(f, "MSR {:#x}", self.0),
        }
    }
}

impl fmt::Debug for MsrIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Memory type ranges: every guest kernel sets them, yet the kernel's own list leaves them out.
const MTRRS: [(u32, u32); 5] = [(0x200, 0x20f), (0x250, 0x250), (0x258, 0x259), (0x268, 0x26f), (0x2ff, 0x2ff)];

/// Registers that exist only beside an in-kernel LAPIC: without one the kernel lists and reads them and then refuses
/// every write, the guest's too. So they are zero, and loading them would only stop the batch. (That cost 8 us per vCPU.)
const NEED_LAPIC: [MsrIndex; 1] = [MsrIndex(0x4b56_4d06)];

/// Which registers to save, worked out once per host.
///
/// The kernel's own `KVM_GET_MSR_INDEX_LIST`, plus the memory type ranges that it leaves out; the time stamp counter
/// first, because the others that depend on time are relative to it; the TSC deadline last, because it is read and
/// written apart, after the LAPIC.
#[derive(Clone, Debug)]
pub struct MsrPlan {
    order: Vec<MsrIndex>,
    /// The same as the kernel takes it, all zero: at most [`KVM_MAX_MSR_ENTRIES`] in each.
    questions: Vec<Msrs>,
}

impl MsrPlan {
    /// Asks the host which registers to save.
    pub(super) fn probe(kvm: &Kvm) -> Result<Self, KvmError> {
        let list = kvm.get_msr_index_list().map_err(machine_error(KvmCall::GetMsrIndexList))?;
        let listed = list.as_slice().iter().copied();
        let ranges = MTRRS.iter().flat_map(|&(first, last)| first..=last);
        let mut order: Vec<_> = listed.chain(ranges).map(MsrIndex).collect();
        order.sort_by_key(|&msr| match msr {
            MsrIndex::TSC => (0, msr),
            MsrIndex::TSC_DEADLINE => (2, msr),
            _ => (1, msr),
        });
        order.dedup();
        let questions = order.iter().map(|&msr| entry(msr, 0)).collect::<Vec<_>>();
        let questions = questions.chunks(KVM_MAX_MSR_ENTRIES).map(batch).collect();
        Ok(Self { order, questions })
    }

    /// The registers, in the order in which they are saved and loaded.
    pub fn registers(&self) -> &[MsrIndex] {
        &self.order
    }
}

/// The registers of one vCPU with their values, ready to be loaded in as few calls as the kernel allows.
#[derive(Clone)]
pub(super) struct MsrValues {
    /// Everything except the deadline, at most [`KVM_MAX_MSR_ENTRIES`] in each.
    pub(super) batches: Vec<Msrs>,
    /// The TSC deadline, if the host has one.
    pub(super) deadline: Option<u64>,
    /// What the host listed and then refused to read.
    pub(super) refused: Vec<MsrIndex>,
}

fn batch(entries: &[kvm_msr_entry]) -> Msrs {
    Msrs::from_entries(entries).expect("callers pass at most KVM_MAX_MSR_ENTRIES")
}

fn entry(index: MsrIndex, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index: index.get(), data, ..Default::default() }
}

impl MsrValues {
    /// Reads every register of the plan: one call, one more for each 256 registers and for each one refused.
    pub(super) fn capture(plan: &MsrPlan, vcpu: &VcpuFd, index: VcpuIndex, chips: Irqchips) -> Result<Self, KvmError> {
        let mut values = Vec::with_capacity(plan.order.len());
        let mut refused = Vec::new();
        for question in &plan.questions {
            let mut msrs = question.clone();
            let mut read = vcpu.get_msrs(&mut msrs).map_err(vcpu_error(KvmCall::GetMsrs, index))?;
            values.extend_from_slice(&msrs.as_slice()[..read]);
            let mut rest = &question.as_slice()[read..];
            // The kernel stops at the first register that it cannot read: note it and go on behind it.
            while let Some((stuck, behind)) = rest.split_first() {
                refused.push(MsrIndex(stuck.index));
                let mut msrs = batch(behind);
                read = vcpu.get_msrs(&mut msrs).map_err(vcpu_error(KvmCall::GetMsrs, index))?;
                values.extend_from_slice(&msrs.as_slice()[..read]);
                rest = &behind[read..];
            }
        }
        if chips == Irqchips::Absent {
            values.retain(|value| value.data != 0 || !NEED_LAPIC.contains(&MsrIndex(value.index)));
        }
        let deadline = match values.last() {
            Some(last) if last.index == MsrIndex::TSC_DEADLINE.get() => values.pop().map(|last| last.data),
            _ => None,
        };
        Ok(Self::new(&values, deadline, refused))
    }

    pub(super) fn new(values: &[kvm_msr_entry], deadline: Option<u64>, refused: Vec<MsrIndex>) -> Self {
        Self { batches: values.chunks(KVM_MAX_MSR_ENTRIES).map(batch).collect(), deadline, refused }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &kvm_msr_entry> {
        self.batches.iter().flat_map(|batch| batch.as_slice())
    }

    /// Loads everything except the deadline.
    pub(super) fn load(&self, vcpu: &VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
        for batch in &self.batches {
            let written = vcpu.set_msrs(batch).map_err(vcpu_error(KvmCall::SetMsrs, index))?;
            if written < batch.as_slice().len() {
                load_rest(vcpu, index, &batch.as_slice()[written..])?;
            }
        }
        Ok(())
    }

    /// Loads the deadline, which arms the LAPIC timer: the LAPIC must be loaded before.
    pub(super) fn load_deadline(&self, vcpu: &VcpuFd, index: VcpuIndex) -> Result<(), KvmError> {
        match self.deadline {
            Some(deadline) => load_rest(vcpu, index, &[entry(MsrIndex::TSC_DEADLINE, deadline)]),
            None => Ok(()),
        }
    }
}

/// Goes on behind a short `KVM_SET_MSRS`. A register that the host will not write but that already holds the captured
/// value (one that only the host sets) loses nothing and is passed over; anything else is an error that names it.
#[cold]
fn load_rest(vcpu: &VcpuFd, index: VcpuIndex, mut rest: &[kvm_msr_entry]) -> Result<(), KvmError> {
    while !rest.is_empty() {
        let written = vcpu.set_msrs(&batch(rest)).map_err(vcpu_error(KvmCall::SetMsrs, index))?;
        rest = &rest[written..];
        let Some((stuck, behind)) = rest.split_first() else { break };
        let mut probe = batch(&[entry(MsrIndex(stuck.index), 0)]);
        let read = vcpu.get_msrs(&mut probe).map_err(vcpu_error(KvmCall::GetMsrs, index))?;
        let present = (read == 1).then(|| probe.as_slice()[0].data);
        if present != Some(stuck.data) {
            return Err(KvmError::MsrRefused {
                vcpu: index,
                msr: MsrIndex(stuck.index),
                captured: stuck.data,
                present,
            });
        }
        rest = behind;
    }
    Ok(())
}
