//! Where two states of the same machine differ, by name: for tests, and for finding out why a clone went astray.
//!
//! It compares bytes; it judges nothing.

use std::fmt;

use super::machine::MachineState;
use super::msr::MsrIndex;
use super::vcpu::{Nested, VcpuIndex, VcpuState};
use crate::sys::kvm::Plain;

/// A part of a machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// CPUID or TSC frequency.
    Cpuid,
    /// Running, halted or waiting to start.
    MpState,
    /// General registers.
    Registers,
    /// Special registers, with the PAE pointers.
    SpecialRegisters,
    /// Debug registers.
    DebugRegisters,
    /// Extended control registers.
    Xcrs,
    /// Vector and floating-point state.
    Xsave,
    /// One model-specific register.
    Msr(MsrIndex),
    /// What a guest hypervisor keeps in KVM.
    NestedState,
    /// Local interrupt controller, except its timer's current count.
    Lapic,
    /// The current count of the LAPIC timer, which runs on by itself.
    LapicTimer,
    /// Pending and injected events.
    Events,
    /// PICs and IOAPIC.
    Irqchips,
    /// Interval timer.
    Pit,
    /// Paravirtual clock.
    Clock,
}

/// One place where two states differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// On which vCPU; `None` for the machine's devices.
    pub vcpu: Option<VcpuIndex>,
    /// In which part.
    pub part: Part,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vcpu {
            Some(vcpu) => write!(f, "{:?} of {vcpu}", self.part),
            None => write!(f, "{:?}", self.part),
        }
    }
}

/// Where the LAPIC page has its timer's current count.
const LAPIC_CURRENT_COUNT: std::ops::Range<usize> = 0x390..0x394;

impl MachineState {
    /// Where this state differs from another of the same machine. Empty if and only if their bytes are equal and
    /// both have as many vCPUs.
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        let mut note = |vcpu, part, equal: bool| {
            if !equal {
                found.push(Difference { vcpu, part });
            }
        };
        for (position, (one, two)) in self.vcpus.iter().zip(&other.vcpus).enumerate() {
            let vcpu = Some(VcpuIndex::new(position as u32));
            compare_vcpus(one, two, &mut |part, equal| note(vcpu, part, equal));
        }
        let (one, two) = (&self.chips, &other.chips);
        let chips = |chips: &Option<Box<[kvm_bindings::kvm_irqchip; 3]>>| {
            chips.as_ref().map(|chips| chips.iter().flat_map(|chip| chip.bytes().to_vec()).collect::<Vec<_>>())
        };
        note(None, Part::Irqchips, chips(&one.irqchips) == chips(&two.irqchips));
        note(None, Part::Pit, same(&one.pit, &two.pit));
        note(None, Part::Clock, same(&one.clock, &two.clock));
        found
    }
}

fn same<T: Plain>(one: &Option<T>, two: &Option<T>) -> bool {
    one.as_ref().map(Plain::bytes) == two.as_ref().map(Plain::bytes)
}

fn compare_vcpus(one: &VcpuState, two: &VcpuState, note: &mut impl FnMut(Part, bool)) {
    let plans = one.plan.cpuid == two.plan.cpuid && one.plan.tsc_khz == two.plan.tsc_khz;
    note(Part::Cpuid, plans);
    note(Part::MpState, one.mp_state.bytes() == two.mp_state.bytes());
    note(Part::Registers, one.regs.bytes() == two.regs.bytes());
    note(Part::SpecialRegisters, one.sregs.bytes() == two.sregs.bytes() && one.pdptrs == two.pdptrs);
    note(Part::DebugRegisters, one.debug.bytes() == two.debug.bytes());
    note(Part::Xcrs, same(&one.xcrs, &two.xcrs));
    note(Part::Xsave, one.xsave.bytes() == two.xsave.bytes());
    let (mut left, mut right) = (one.msrs.entries().peekable(), two.msrs.entries().peekable());
    // Both lists are in the plan's order; a register that only one of them has is a difference of its own.
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        let (a, b) = (**a, **b);
        note(Part::Msr(MsrIndex::new(a.index)), a.bytes() == b.bytes());
        left.next();
        right.next();
    }
    for extra in left.chain(right) {
        note(Part::Msr(MsrIndex::new(extra.index)), false);
    }
    for refused in one.msrs.refused.iter().filter(|msr| !two.msrs.refused.contains(msr)) {
        note(Part::Msr(*refused), false);
    }
    note(Part::Msr(MsrIndex::TSC_DEADLINE), one.msrs.deadline == two.msrs.deadline);
    note(Part::NestedState, same_nested(&one.nested, &two.nested));
    let (a, b) = (one.lapic.as_ref().map(Plain::bytes), two.lapic.as_ref().map(Plain::bytes));
    match (a, b) {
        (Some(a), Some(b)) => {
            let count = LAPIC_CURRENT_COUNT;
            note(Part::LapicTimer, a[count.clone()] == b[count.clone()]);
            note(Part::Lapic, a[..count.start] == b[..count.start] && a[count.end..] == b[count.end..]);
        }
        (a, b) => note(Part::Lapic, a == b),
    }
    note(Part::Events, one.events.bytes() == two.events.bytes());
}

fn same_nested(one: &Nested, two: &Nested) -> bool {
    match (one, two) {
        (Nested::Captured(a), Nested::Captured(b)) => a.bytes() == b.bytes(),
        (Nested::NotOffered, Nested::NotOffered) | (Nested::Refused, Nested::Refused) => true,
        _ => false,
    }
}
