//! A machine state as stable bytes. The layout is written here once; `decode.rs` reads it back.
//!
//! It knows the fields, not what they mean. All numbers are little-endian; kernel structures are copied as the x86-64
//! kernel lays them out, which is part of its ABI and cannot change.
//!
//! ```text
//!  0  8  magic "OFFSKVM\0"
//!  8  4  format version (1)
//! 12  4  CRC-32 of everything from byte 16 to the end
//! 16  8  length of the whole encoding in bytes
//! 24  4  devices: bit 0 interrupt chips, bit 1 interval timer, bit 2 clock
//! 28  4  number of vCPUs
//! 32     3 x 520  interrupt chips, if bit 0
//!        112      interval timer, if bit 1
//!        48       clock, if bit 2
//!        the vCPUs, each:
//!          4      parts: bit 0 XCRs, bit 1 PAE pointers, bit 2 LAPIC, bit 3 TSC deadline,
//!                        bits 4-5 nested state (0 not offered, 1 captured, 2 refused by the host)
//!          4      TSC frequency in kHz
//!          4      MP state
//!          4      number of CPUID entries, then 40 bytes each
//!          144    general registers
//!          312    special registers
//!          32     PAE page-directory pointers, if bit 1
//!          128    debug registers
//!          392    XCRs, if bit 0
//!          4      size of the XSAVE area, then the area
//!          4      number of MSRs, then 16 bytes each, in the order in which they are loaded
//!          4      number of MSRs that the host refused to read, then 4 bytes each
//!          8      TSC deadline, if bit 3
//!          8320   nested state, if bits 4-5 are 1
//!          1024   LAPIC, if bit 2
//!          64     events
//! ```
//!
//! To change the format: raise [`FORMAT_VERSION`], describe the change here, keep reading the old version or say in
//! CHANGELOG.md that it is refused, and let the round-trip test in `tests/kvm.rs` see both.

use super::machine::MachineState;
use super::vcpu::{Nested, VcpuState};
use crate::sys::kvm::Plain;

/// Version of the encoding that [`MachineState::to_bytes`] writes.
pub const FORMAT_VERSION: u32 = 1;

/// No encoding is longer: some 4,000 vCPUs with everything fit.
pub const MAX_ENCODED_SIZE: crate::page::ByteSize = crate::page::ByteSize::mib(128);

pub(super) const MAGIC: [u8; 8] = *b"OFFSKVM\0";
/// Where the length field starts: what the checksum covers starts here too.
pub(super) const CHECKED_FROM: usize = 16;
/// Bytes before the first variable part.
pub(super) const HEADER_SIZE: usize = 32;

pub(super) const DEVICE_IRQCHIPS: u32 = 1;
pub(super) const DEVICE_PIT: u32 = 1 << 1;
pub(super) const DEVICE_CLOCK: u32 = 1 << 2;

pub(super) const PART_XCRS: u32 = 1;
pub(super) const PART_PDPTRS: u32 = 1 << 1;
pub(super) const PART_LAPIC: u32 = 1 << 2;
pub(super) const PART_DEADLINE: u32 = 1 << 3;
pub(super) const PART_NESTED_SHIFT: u32 = 4;
pub(super) const NESTED_NOT_OFFERED: u32 = 0;
pub(super) const NESTED_CAPTURED: u32 = 1;
pub(super) const NESTED_REFUSED: u32 = 2;

impl MachineState {
    /// The state as bytes, for storing it as opaque device state. Some 8 to 24 KB per vCPU; one copy of it.
    ///
    /// Equal states give equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_SIZE + 4096 + self.vcpus.len() * (32 << 10));
        out.extend_from_slice(&MAGIC);
        put(&mut out, FORMAT_VERSION);
        put(&mut out, 0); // checksum, below
        out.extend_from_slice(&0u64.to_le_bytes()); // length, below
        put(&mut out, self.device_bits());
        put(&mut out, self.vcpus.len() as u32);
        for chip in self.chips.irqchips.iter().flat_map(|chips| chips.iter()) {
            out.extend_from_slice(chip.bytes());
        }
        if let Some(pit) = &self.chips.pit {
            out.extend_from_slice(pit.bytes());
        }
        if let Some(clock) = &self.chips.clock {
            out.extend_from_slice(clock.bytes());
        }
        for vcpu in &self.vcpus {
            put_vcpu(&mut out, vcpu);
        }
        let length = out.len() as u64;
        out[16..24].copy_from_slice(&length.to_le_bytes());
        let checksum = crc32fast::hash(&out[CHECKED_FROM..]);
        out[12..16].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    fn device_bits(&self) -> u32 {
        let bit = |present: Option<u32>| present.unwrap_or(0);
        bit(self.chips.irqchips.as_ref().map(|_| DEVICE_IRQCHIPS))
            | bit(self.chips.pit.as_ref().map(|_| DEVICE_PIT))
            | bit(self.chips.clock.as_ref().map(|_| DEVICE_CLOCK))
    }
}

fn put(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn part_bits(vcpu: &VcpuState) -> u32 {
    let bit = |present: Option<u32>| present.unwrap_or(0);
    let nested = match vcpu.nested {
        Nested::NotOffered => NESTED_NOT_OFFERED,
        Nested::Captured(_) => NESTED_CAPTURED,
        Nested::Refused => NESTED_REFUSED,
    };
    bit(vcpu.xcrs.as_ref().map(|_| PART_XCRS))
        | bit(vcpu.pdptrs.map(|_| PART_PDPTRS))
        | bit(vcpu.lapic.as_ref().map(|_| PART_LAPIC))
        | bit(vcpu.msrs.deadline.map(|_| PART_DEADLINE))
        | nested << PART_NESTED_SHIFT
}

fn put_vcpu(out: &mut Vec<u8>, vcpu: &VcpuState) {
    put(out, part_bits(vcpu));
    put(out, vcpu.plan.tsc_khz);
    out.extend_from_slice(vcpu.mp_state.bytes());
    let cpuid = vcpu.plan.cpuid.as_slice();
    put(out, cpuid.len() as u32);
    for entry in cpuid {
        out.extend_from_slice(entry.bytes());
    }
    out.extend_from_slice(vcpu.regs.bytes());
    out.extend_from_slice(vcpu.sregs.bytes());
    for pointer in vcpu.pdptrs.iter().flatten() {
        out.extend_from_slice(&pointer.to_le_bytes());
    }
    out.extend_from_slice(vcpu.debug.bytes());
    if let Some(xcrs) = &vcpu.xcrs {
        out.extend_from_slice(xcrs.bytes());
    }
    let xsave = vcpu.xsave.bytes();
    put(out, xsave.len() as u32);
    out.extend_from_slice(xsave);
    put(out, vcpu.msrs.entries().count() as u32);
    for entry in vcpu.msrs.entries() {
        out.extend_from_slice(entry.bytes());
    }
    put(out, vcpu.msrs.refused.len() as u32);
    for msr in &vcpu.msrs.refused {
        put(out, msr.get());
    }
    if let Some(deadline) = vcpu.msrs.deadline {
        out.extend_from_slice(&deadline.to_le_bytes());
    }
    if let Nested::Captured(nested) = &vcpu.nested {
        out.extend_from_slice(nested.bytes());
    }
    if let Some(lapic) = &vcpu.lapic {
        out.extend_from_slice(lapic.bytes());
    }
    out.extend_from_slice(vcpu.events.bytes());
}
