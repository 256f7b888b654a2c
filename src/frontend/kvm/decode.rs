//! Reading an encoded machine state, from anybody: every number is held against a limit before it is believed, and
//! memory is only set aside for bytes that are there.
//!
//! It knows the layout (see `encode.rs`), not the meaning: a value that a processor would refuse is refused by the host
//! when it is loaded.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_msr_entry};

use super::chips::ChipState;
use super::encode::{
    CHECKED_FROM, DEVICE_CLOCK, DEVICE_IRQCHIPS, DEVICE_PIT, FORMAT_VERSION, HEADER_SIZE, MAGIC, MAX_ENCODED_SIZE,
    NESTED_CAPTURED, NESTED_NOT_OFFERED, NESTED_REFUSED, PART_DEADLINE, PART_LAPIC, PART_NESTED_SHIFT, PART_PDPTRS,
    PART_XCRS,
};
use super::error::DecodeError;
use super::machine::MachineState;
use super::msr::{MsrIndex, MsrValues};
use super::vcpu::{Nested, VcpuPlan, VcpuState};
use crate::page::ByteSize;
use crate::sys::kvm::{Plain, XSAVE_LEGACY_SIZE, XsaveArea};

/// The most vCPUs that KVM has.
const MAX_VCPUS: u32 = 4096;
/// The most MSRs of one vCPU, of either kind.
const MAX_MSRS: u32 = 4096;
/// The largest XSAVE area: several times what any processor has.
const MAX_XSAVE: u32 = 64 << 10;
/// Device bits that the format knows.
const KNOWN_DEVICES: u32 = DEVICE_IRQCHIPS | DEVICE_PIT | DEVICE_CLOCK;
/// Part bits that the format knows.
const KNOWN_PARTS: u32 =
    PART_XCRS | PART_PDPTRS | PART_LAPIC | PART_DEADLINE | (NESTED_CAPTURED | NESTED_REFUSED) << PART_NESTED_SHIFT;

impl MachineState {
    /// Reads what [`to_bytes`](Self::to_bytes) wrote. One pass for the checksum, one copy.
    ///
    /// # Errors
    /// [`DecodeError`] says what is wrong with the bytes. Any bytes are safe to hand in: nothing panics, and no more
    /// memory is set aside than a small multiple of their length.
    ///
    /// ```
    /// use offshoot::frontend::kvm::{DecodeError, MachineState};
    ///
    /// assert_eq!(MachineState::from_bytes(b"something else").unwrap_err(), DecodeError::Magic);
    /// ```
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader { rest: bytes };
        if reader.take(MAGIC.len(), "magic").ok() != Some(&MAGIC) {
            return Err(DecodeError::Magic);
        }
        let version = reader.u32("version")?;
        if version != FORMAT_VERSION {
            return Err(DecodeError::Version { found: version, supported: FORMAT_VERSION });
        }
        let expected = reader.u32("checksum")?;
        let declared = reader.u64("length")?;
        limit("length", declared, MAX_ENCODED_SIZE.get())?;
        if declared != bytes.len() as u64 || bytes.len() < HEADER_SIZE {
            return Err(DecodeError::Length {
                declared: ByteSize::new(declared.max(HEADER_SIZE as u64)),
                given: ByteSize::new(bytes.len() as u64),
            });
        }
        let found = crc32fast::hash(&bytes[CHECKED_FROM..]);
        if found != expected {
            return Err(DecodeError::Checksum { found, expected });
        }
        let devices = reader.bits("device bits", KNOWN_DEVICES)?;
        let count = reader.count("number of vCPUs", MAX_VCPUS)?;
        let chips = reader.chips(devices)?;
        let mut vcpus = Vec::new();
        for _ in 0..count {
            vcpus.push(reader.vcpu()?);
        }
        match reader.rest.len() {
            0 => Ok(Self { vcpus, chips }),
            excess => Err(DecodeError::Excess { excess: ByteSize::new(excess as u64) }),
        }
    }
}

fn limit(field: &'static str, found: u64, limit: u64) -> Result<(), DecodeError> {
    if found > limit { Err(DecodeError::Limit { field, found, limit }) } else { Ok(()) }
}

/// The bytes not read yet.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(DecodeError::Truncated { field })?;
        self.rest = rest;
        Ok(taken)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        let raw = self.rest.first_chunk::<4>().ok_or(DecodeError::Truncated { field })?;
        self.rest = &self.rest[4..];
        Ok(u32::from_le_bytes(*raw))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        let raw = self.rest.first_chunk::<8>().ok_or(DecodeError::Truncated { field })?;
        self.rest = &self.rest[8..];
        Ok(u64::from_le_bytes(*raw))
    }

    fn count(&mut self, field: &'static str, most: u32) -> Result<usize, DecodeError> {
        let found = self.u32(field)?;
        limit(field, u64::from(found), u64::from(most))?;
        Ok(found as usize)
    }

    /// A word of flags, of which only `known` may be set.
    fn bits(&mut self, field: &'static str, known: u32) -> Result<u32, DecodeError> {
        let found = self.u32(field)?;
        if found & !known == 0 {
            Ok(found)
        } else {
            Err(DecodeError::Limit { field, found: u64::from(found), limit: u64::from(known) })
        }
    }

    fn plain<T: Plain>(&mut self, field: &'static str) -> Result<T, DecodeError> {
        let bytes = self.take(size_of::<T>(), field)?;
        T::from_bytes(bytes).ok_or(DecodeError::Truncated { field })
    }

    /// A structure that is only there if `bit` is set in `present`.
    fn part<T: Plain>(&mut self, present: u32, bit: u32, field: &'static str) -> Result<Option<T>, DecodeError> {
        if present & bit == 0 { Ok(None) } else { self.plain(field).map(Some) }
    }

    /// `count` structures in a row. The bytes are taken first, so nothing is set aside for what is not there.
    fn list<T: Plain>(&mut self, count: usize, field: &'static str) -> Result<Vec<T>, DecodeError> {
        let bytes = self.take(count.saturating_mul(size_of::<T>()), field)?;
        bytes
            .chunks_exact(size_of::<T>())
            .map(|raw| T::from_bytes(raw).ok_or(DecodeError::Truncated { field }))
            .collect()
    }

    fn chips(&mut self, devices: u32) -> Result<ChipState, DecodeError> {
        let irqchips = match devices & DEVICE_IRQCHIPS {
            0 => None,
            _ => Some(Box::new([
                self.plain("interrupt chips")?,
                self.plain("interrupt chips")?,
                self.plain("interrupt chips")?,
            ])),
        };
        let pit = self.part(devices, DEVICE_PIT, "interval timer")?;
        let clock = self.part(devices, DEVICE_CLOCK, "clock")?;
        Ok(ChipState { irqchips, pit, clock })
    }

    fn vcpu(&mut self) -> Result<VcpuState, DecodeError> {
        let parts = self.bits("vCPU part bits", KNOWN_PARTS)?;
        let tsc_khz = self.u32("TSC frequency")?;
        let mp_state = self.plain("MP state")?;
        let entries = self.count("number of CPUID entries", KVM_MAX_CPUID_ENTRIES as u32)?;
        let entries: Vec<kvm_cpuid_entry2> = self.list(entries, "CPUID")?;
        let cpuid = CpuId::from_entries(&entries).expect("the count was held against the limit");
        let regs = self.plain("general registers")?;
        let sregs = self.plain("special registers")?;
        let pdptrs = match parts & PART_PDPTRS {
            0 => None,
            _ => Some([
                self.u64("PAE pointers")?,
                self.u64("PAE pointers")?,
                self.u64("PAE pointers")?,
                self.u64("PAE pointers")?,
            ]),
        };
        let debug = self.plain("debug registers")?;
        let xcrs = self.part(parts, PART_XCRS, "XCRs")?;
        let size = self.count("size of the XSAVE area", MAX_XSAVE)?;
        if size < XSAVE_LEGACY_SIZE {
            let (found, least) = (size as u64, XSAVE_LEGACY_SIZE as u64);
            return Err(DecodeError::TooSmall { field: "size of the XSAVE area", found, least });
        }
        let xsave = XsaveArea::from_bytes(self.take(size, "XSAVE area")?);
        let count = self.count("number of MSRs", MAX_MSRS)?;
        let values: Vec<kvm_msr_entry> = self.list(count, "MSRs")?;
        let count = self.count("number of refused MSRs", MAX_MSRS)?;
        let refused = self
            .take(count * 4, "refused MSRs")?
            .chunks_exact(4)
            .map(|raw| MsrIndex::new(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])))
            .collect();
        let deadline = match parts & PART_DEADLINE {
            0 => None,
            _ => Some(self.u64("TSC deadline")?),
        };
        let nested = match parts >> PART_NESTED_SHIFT {
            NESTED_NOT_OFFERED => Nested::NotOffered,
            NESTED_CAPTURED => Nested::Captured(Box::new(self.nested()?)),
            NESTED_REFUSED => Nested::Refused,
            found => {
                let (found, limit) = (u64::from(found), u64::from(NESTED_REFUSED));
                return Err(DecodeError::Limit { field: "kind of nested state", found, limit });
            }
        };
        let lapic = self.part(parts, PART_LAPIC, "LAPIC")?;
        let events = self.plain("events")?;
        Ok(VcpuState {
            plan: VcpuPlan { cpuid: Arc::new(cpuid), tsc_khz },
            mp_state,
            regs,
            sregs,
            pdptrs,
            debug,
            xcrs,
            xsave,
            msrs: MsrValues::new(&values, deadline, refused),
            nested,
            lapic,
            events,
        })
    }

    /// Nested state carries its own size, which the kernel believes: it must not reach past the buffer.
    fn nested(&mut self) -> Result<kvm_ioctls::KvmNestedStateBuffer, DecodeError> {
        let state: kvm_ioctls::KvmNestedStateBuffer = self.plain("nested state")?;
        limit("size of the nested state", u64::from(state.size), size_of_val(&state) as u64)?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_mp_state;

    use super::*;

    /// A state with every optional part, made without a host.
    fn state() -> MachineState {
        let vcpu = |number: u64| VcpuState {
            plan: VcpuPlan {
                cpuid: Arc::new(
                    CpuId::from_entries(&[kvm_cpuid_entry2 { function: 1, ..Default::default() }; 3]).unwrap(),
                ),
                tsc_khz: 2_100_000,
            },
            mp_state: kvm_mp_state { mp_state: 3 },
            regs: kvm_bindings::kvm_regs { rip: number, ..Default::default() },
            sregs: Default::default(),
            pdptrs: Some([number, 2, 3, 4]),
            debug: Default::default(),
            xcrs: Some(Default::default()),
            xsave: XsaveArea::from_bytes(&[number as u8; 4160]),
            msrs: MsrValues::new(
                &[kvm_msr_entry { index: 0x10, data: number, ..Default::default() }; 300],
                Some(7),
                vec![MsrIndex::new(0x480)],
            ),
            nested: Nested::Captured(Box::new(kvm_ioctls::KvmNestedStateBuffer::empty())),
            lapic: Some(Default::default()),
            events: Default::default(),
        };
        let chips = ChipState {
            irqchips: Some(Box::new([Default::default(); 3])),
            pit: Some(Default::default()),
            clock: Some(Default::default()),
        };
        MachineState { vcpus: vec![vcpu(1), vcpu(2)], chips }
    }

    /// A small one, for what is tried at every byte.
    fn lean_state() -> MachineState {
        let mut state = state();
        state.vcpus.truncate(1);
        state.vcpus[0].nested = Nested::Refused;
        state.vcpus[0].msrs = MsrValues::new(&[kvm_msr_entry::default(); 4], Some(7), vec![MsrIndex::new(0x480)]);
        state
    }

    /// What somebody does who wants the bytes to be believed.
    fn repair(bytes: &mut [u8]) {
        let checksum = crc32fast::hash(&bytes[CHECKED_FROM..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    }

    #[test]
    fn everything_comes_back() {
        let state = state();
        let decoded = MachineState::from_bytes(&state.to_bytes()).unwrap();
        assert_eq!(state.differences(&decoded), []);
        assert_eq!(state.omissions(), decoded.omissions());
        assert_eq!(decoded.to_bytes(), state.to_bytes());
    }

    #[test]
    fn every_cut_and_every_change_is_an_error() {
        let bytes = lean_state().to_bytes();
        for length in 0..bytes.len() {
            assert!(MachineState::from_bytes(&bytes[..length]).is_err(), "cut to {length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(MachineState::from_bytes(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn hostile_bytes_with_a_right_checksum_never_panic() {
        let bytes = lean_state().to_bytes();
        for at in CHECKED_FROM..bytes.len() {
            for value in [0x01, 0xff] {
                let mut hostile = bytes.clone();
                hostile[at] = value;
                repair(&mut hostile);
                let _ = MachineState::from_bytes(&hostile);
            }
        }
        for length in HEADER_SIZE..bytes.len() {
            let mut cut = bytes[..length].to_vec();
            cut[16..24].copy_from_slice(&(length as u64).to_le_bytes());
            repair(&mut cut);
            assert!(MachineState::from_bytes(&cut).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn a_limit_is_named() {
        let mut bytes = state().to_bytes();
        bytes[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        repair(&mut bytes);
        let error = MachineState::from_bytes(&bytes).unwrap_err();
        let expected = DecodeError::Limit { field: "number of vCPUs", found: u64::from(u32::MAX), limit: 4096 };
        assert_eq!(error, expected);
        let mut bytes = state().to_bytes();
        bytes[8] = 9;
        assert_eq!(MachineState::from_bytes(&bytes).unwrap_err(), DecodeError::Version { found: 9, supported: 1 });
    }

    #[test]
    fn something_appended_is_an_error_even_with_a_right_header() {
        let mut bytes = state().to_bytes();
        bytes.push(0);
        let length = bytes.len() as u64;
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
        repair(&mut bytes);
        assert_eq!(MachineState::from_bytes(&bytes).unwrap_err(), DecodeError::Excess { excess: ByteSize::new(1) });
    }

    /// Found by fuzzing (`kvm_state`): it was accepted, filled up, and came back as other bytes.
    #[test]
    fn an_xsave_area_that_no_kernel_has_is_refused() {
        // Up to the area's size a vCPU without optional parts is fixed: 16 bytes of numbers, then three register sets.
        let fixed = 16 + 144 + 312 + 128;
        for (size, accepted) in [(0u32, false), (4095, false), (4096, true)] {
            let mut bytes = [MAGIC.as_slice(), &FORMAT_VERSION.to_le_bytes(), &[0; 16], &1u32.to_le_bytes()].concat();
            bytes.resize(HEADER_SIZE + fixed, 0);
            bytes.extend(size.to_le_bytes());
            // The area, no MSR of either kind, the events.
            bytes.resize(bytes.len() + size as usize + 8 + 64, 0);
            let length = bytes.len() as u64;
            bytes[CHECKED_FROM..CHECKED_FROM + 8].copy_from_slice(&length.to_le_bytes());
            let checksum = crc32fast::hash(&bytes[CHECKED_FROM..]);
            bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
            match MachineState::from_bytes(&bytes) {
                Ok(state) => assert!(accepted && state.to_bytes() == bytes),
                Err(error) => {
                    assert!(!accepted && matches!(error, DecodeError::TooSmall { least: 4096, .. }), "{error}");
                }
            }
        }
    }
}
