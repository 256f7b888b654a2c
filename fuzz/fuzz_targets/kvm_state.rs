//! Reading an encoded KVM machine from anybody.
//!
//! Oracle: decoding never panics, never holds more memory at once than a small multiple of the bytes given, and whatever it accepts
//! encodes to the very same bytes. Each input is tried as it is, and once more with magic, version, length
//! and checksum put right, so that the checksum does not hide the fields behind it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::frontend::kvm::MachineState;
use offshoot_fuzz::peak::{self, Peak};

#[global_allocator]
static ALLOCATOR: Peak = Peak;

/// Memory per input byte: a vCPU takes 700 bytes at least, and its XSAVE area is as large as the host's, 11 KiB with AMX.
const MULTIPLE: usize = 32;
/// And for the smallest inputs.
const FIXED: usize = 64 << 10;
/// Where the fields lie; see `src/frontend/kvm/encode.rs`.
const CHECKSUM: std::ops::Range<usize> = 12..16;
const LENGTH: std::ops::Range<usize> = 16..24;

fn check(bytes: &[u8]) {
    let (state, peak) = peak::during(|| MachineState::from_bytes(bytes));
    let limit = FIXED + MULTIPLE * bytes.len();
    assert!(peak <= limit, "{peak} bytes held for {} given", bytes.len());
    if let Ok(state) = state {
        assert!(state.to_bytes() == bytes, "accepted, and encoded to other bytes");
        let (_, _, _) = (state.omissions(), state.devices(), format!("{state:?}"));
    }
}

fuzz_target!(|input: &[u8]| {
    check(input);
    if input.len() >= LENGTH.end {
        let mut repaired = input.to_vec();
        repaired[..8].copy_from_slice(b"OFFSKVM\0");
        repaired[8..12].copy_from_slice(&1u32.to_le_bytes());
        repaired[LENGTH].copy_from_slice(&(input.len() as u64).to_le_bytes());
        let checksum = crc32fast::hash(&repaired[LENGTH.start..]);
        repaired[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        check(&repaired);
    }
});
