//! A state as bytes: it round-trips, damage is found, and what the host refuses of it is named.

use offshoot::frontend::kvm::{DecodeError, Devices, KvmError, MachineState, MsrIndex, VcpuCount, VcpuIndex};

use crate::assert_same_but_for_time;
use crate::common::machine::kvm_host;
use crate::guest::Guest;
use crate::interrupts::real_mode_guest;
use crate::modes::{host_has_avx, mixed_guest};
use crate::programs::WAITING;

#[test]
fn bytes_round_trip_and_a_decoded_state_runs() {
    let Some(host) = kvm_host() else { return };
    let mut parent = mixed_guest(&host, Devices::FULL);
    let plan = parent.plan(&host, Devices::FULL);
    parent.trace(0, 4);
    let state = parent.capture(&plan);
    let bytes = state.to_bytes();
    let decoded = MachineState::from_bytes(&bytes).unwrap();
    assert_eq!(state.differences(&decoded), []);
    assert!(decoded.to_bytes() == bytes);
    let mut clone = Guest::clone_of(&host, &decoded, &parent.copy_ram());
    assert_eq!(parent.trace(0, 9), clone.trace(0, 9));
}

#[test]
fn the_upper_halves_of_ymm_survive_where_the_host_has_them() {
    let Some(host) = kvm_host() else { return };
    if !host_has_avx(&host) {
        return eprintln!("SKIPPED: guests of this host have no AVX");
    }
    let mut parent = Guest::parent(&host, Devices::NONE, VcpuCount::ONE);
    let vcpu = &parent.machine.vcpus()[0];
    let mut xcrs = vcpu.get_xcrs().unwrap();
    xcrs.xcrs[0].value = 7;
    vcpu.set_xcrs(&xcrs).unwrap();
    let plan = parent.plan(&host, Devices::NONE);
    let captured = parent.machine.capture(&plan).unwrap();
    let leaves = captured.cpuid(VcpuIndex::new(0)).unwrap().as_slice().len();
    let mut bytes = captured.to_bytes();
    // Where the XSAVE area starts, by the layout in `encode.rs`; in it, the header's feature bits and YMM's upper halves.
    let area = 32 + 16 + leaves * 40 + 144 + 312 + 128 + 392 + 4;
    bytes[area + 512] |= 7;
    bytes[area + 576..area + 576 + 256].iter_mut().zip(1..).for_each(|(byte, value)| *byte = value);
    let checksum = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    let state = MachineState::from_bytes(&bytes).unwrap();
    let mut clone = Guest::clone_of(&host, &state, &parent.copy_ram());
    let again = clone.machine.capture(&plan).unwrap();
    assert_same_but_for_time(&state, &again);
}

#[test]
fn damaged_bytes_give_errors_at_every_byte() {
    let Some(host) = kvm_host() else { return };
    let mut parent = real_mode_guest(&host, WAITING, VcpuCount::ONE);
    let plan = parent.plan(&host, Devices::FULL);
    let bytes = parent.capture(&plan).to_bytes();
    for length in 0..bytes.len() {
        assert!(MachineState::from_bytes(&bytes[..length]).is_err(), "cut to {length} bytes");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(MachineState::from_bytes(&longer), Err(DecodeError::Length { .. })));
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(MachineState::from_bytes(&damaged).is_err(), "byte {at} changed");
    }
}

#[test]
fn a_register_that_the_host_refuses_is_named() {
    let Some(host) = kvm_host() else { return };
    let mut parent = Guest::parent(&host, Devices::NONE, VcpuCount::ONE);
    let plan = parent.plan(&host, Devices::NONE);
    let state = parent.machine.capture(&plan).unwrap();
    let mut bytes = state.to_bytes();
    // SYSENTER_EIP takes only canonical addresses on Intel; LSTAR does everywhere.
    let lstar: Vec<u8> = 0xc000_0082u64.to_le_bytes().into();
    let at = bytes.windows(8).position(|window| window == lstar).expect("LSTAR is always listed");
    bytes[at + 8..at + 16].copy_from_slice(&0x8000_0000_0000_0000u64.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    let damaged = MachineState::from_bytes(&bytes).unwrap();
    let mut clone = Guest::new(&host, Devices::NONE, VcpuCount::ONE);
    match clone.machine.restore(&host, &damaged) {
        Err(KvmError::MsrRefused { msr, captured, .. }) => {
            assert_eq!((msr, captured), (MsrIndex::new(0xc000_0082), 0x8000_0000_0000_0000));
        }
        other => panic!("{other:?}"),
    }
}
