//! Capture and restore of whole KVM machines, with tiny guests in real mode, 32-bit PAE paging and 64-bit long mode.
//!
//! The oracle is the guest itself: it mixes registers, vector registers, debug registers, MSRs and RAM into each value
//! that it sends to a port, so parent and clone must send the same values from the same instruction pointers.
//! Where `/dev/kvm` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]

#[path = "../common/mod.rs"]
mod common;

mod bytes;
mod guest;
mod interrupts;
mod modes;
mod programs;

use std::sync::Arc;

use common::machine::kvm_host;
use guest::{Guest, TWO};
use modes::mixed_guest;
use offshoot::frontend::kvm::{
    Clock, Devices, Difference, KvmCall, KvmError, KvmSupport, MachineState, MsrIndex, Part, Pit, Target, VcpuCount,
    VcpuIndex,
};

/// What may differ between a capture and a capture of its clone: what counts time by itself.
fn runs_by_itself(difference: &Difference) -> bool {
    matches!(difference.part, Part::Msr(MsrIndex::TSC) | Part::Clock | Part::Pit | Part::LapicTimer)
}

fn assert_same_but_for_time(one: &MachineState, two: &MachineState) {
    let differences = one.differences(two);
    let unexpected: Vec<_> = differences.iter().filter(|difference| !runs_by_itself(difference)).collect();
    assert!(unexpected.is_empty(), "differ: {unexpected:?}");
}

#[test]
fn two_vcpus_in_different_modes_go_on_from_the_same_instruction() {
    let Some(host) = kvm_host() else { return };
    for devices in [Devices::NONE, Devices::FULL, Devices { pit: Pit::Absent, clock: Clock::Left, ..Devices::FULL }] {
        let mut parent = mixed_guest(&host, devices);
        let plan = parent.plan(&host, devices);
        parent.trace(0, 5);
        parent.trace(1, 7);
        let state = parent.capture(&plan);
        assert_eq!(state.devices(), devices);
        let ram = parent.copy_ram();
        let mut clone = Guest::clone_of(&host, &state, &ram);
        assert_same_but_for_time(&state, &clone.capture(&state.plan(&host)));
        for position in [0, 1] {
            let (expected, found) = (parent.trace(position, 20), clone.trace(position, 20));
            assert_eq!(expected, found, "vCPU {position} with {devices:?}");
        }
        assert!(parent.copy_ram() == clone.copy_ram());
        // After equal runs everything that the guest changed is equal again, on both sides.
        assert_same_but_for_time(&parent.capture(&plan), &clone.capture(&plan));
    }
}

#[test]
fn the_guest_really_changes_what_is_compared() {
    let Some(host) = kvm_host() else { return };
    let mut guest = mixed_guest(&host, Devices::FULL);
    let plan = guest.plan(&host, Devices::FULL);
    guest.trace(0, 1);
    guest.trace(1, 1);
    let before = guest.capture(&plan);
    guest.trace(0, 1);
    guest.trace(1, 1);
    let differences = before.differences(&guest.capture(&plan));
    for (position, msr) in [(0, MsrIndex::new(0xc000_0102)), (1, MsrIndex::new(0x175))] {
        for part in [Part::Registers, Part::DebugRegisters, Part::Msr(msr)] {
            let expected = Difference { vcpu: Some(VcpuIndex::new(position)), part };
            assert!(differences.contains(&expected), "{expected} is missing from {differences:?}");
        }
    }
    assert!(differences.contains(&Difference { vcpu: Some(VcpuIndex::new(0)), part: Part::Xsave }));
}

#[test]
fn many_clones_of_one_state_are_alike() {
    let Some(host) = kvm_host() else { return };
    let mut parent = mixed_guest(&host, Devices::FULL);
    let plan = parent.plan(&host, Devices::FULL);
    parent.trace(0, 3);
    let state = Arc::new(parent.capture(&plan));
    let ram = parent.copy_ram();
    drop(parent);
    let traces: Vec<_> = (0..4).map(|_| Guest::clone_of(&host, &state, &ram).trace(0, 5)).collect();
    assert!(traces.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_machine_that_ran_on_is_reset_in_place() {
    let Some(host) = kvm_host() else { return };
    for devices in [Devices::NONE, Devices::FULL] {
        let mut guest = mixed_guest(&host, devices);
        let plan = guest.plan(&host, devices);
        // Nothing ran yet: most of the state is what a fresh vCPU has, and all of it must be written back.
        let state = guest.capture(&plan);
        let ram = guest.copy_ram();
        let first = (guest.trace(0, 10), guest.trace(1, 10));
        for _ in 0..2 {
            guest.capture(&plan);
            guest.write(0, &ram);
            guest.machine.load(&host, &state, Target::Used).unwrap();
            assert_same_but_for_time(&state, &guest.capture(&plan));
            assert_eq!((guest.trace(0, 10), guest.trace(1, 10)), first);
        }
    }
}

#[test]
fn a_warm_shell_takes_its_state_later() {
    let Some(host) = kvm_host() else { return };
    let mut parent = mixed_guest(&host, Devices::FULL);
    let plan = parent.plan(&host, Devices::FULL);
    parent.trace(0, 3);
    let early = parent.capture(&plan);
    let mut shell = Guest::new(&host, early.devices(), early.vcpu_count());
    early.prepare(&host, shell.machine.vcpus()).unwrap();
    parent.trace(0, 3);
    let late = parent.capture(&plan);
    shell.write(0, &parent.copy_ram());
    shell.machine.load(&host, &late, Target::Fresh).unwrap();
    assert_eq!(parent.trace(0, 9), shell.trace(0, 9));
}

#[test]
fn an_exit_is_finished_before_the_cut() {
    let Some(host) = kvm_host() else { return };
    let mut parent = mixed_guest(&host, Devices::NONE);
    let plan = parent.plan(&host, Devices::NONE);
    let at_exit = parent.trace(0, 1)[0].2.rip;
    let state = parent.capture(&plan);
    let after = parent.vcpu(0).get_regs().unwrap().rip;
    assert!(after >= at_exit, "{at_exit:#x} to {after:#x}");
    let mut clone = Guest::clone_of(&host, &state, &parent.copy_ram());
    // The very next port write is a new one: the counter went up.
    assert_eq!(clone.trace(0, 1)[0].2.r8, 2);
}

#[test]
fn mistakes_are_named() {
    let Some(host) = kvm_host() else { return };
    let mut parent = Guest::parent(&host, Devices::FULL, TWO);
    let plan = parent.plan(&host, Devices::FULL);
    let state = parent.machine.capture(&plan).unwrap();
    let (vm, vcpus) = parent.machine.parts_mut();
    let error = MachineState::capture(&plan, vm, &mut vcpus[..1]).unwrap_err();
    assert!(matches!(error, KvmError::VcpuCount { expected, given } if (expected, given) == (TWO, VcpuCount::ONE)));
    // A machine without the chips cannot take the LAPIC.
    let mut bare = Guest::new(&host, Devices::NONE, TWO);
    let error = bare.machine.restore(&host, &state).unwrap_err();
    assert_eq!(error.call(), Some(KvmCall::SetLapic), "{error}");
    let error = bare.machine.capture(&plan).unwrap_err();
    assert!(error.call().is_some(), "{error}");
}

#[test]
fn the_host_says_what_it_lacks() {
    let Some(host) = kvm_host() else { return };
    let support = KvmSupport::probe(&host).unwrap();
    for missing in support.missing() {
        eprintln!("this host lacks {missing}");
    }
    for msr in support.refused_msrs() {
        eprintln!("this host refuses to read {msr}");
    }
    // Without these nothing works, and every test above would have failed.
    let needed = [KvmCall::GetRegs, KvmCall::SetSregs, KvmCall::SetCpuid2, KvmCall::SetXsave, KvmCall::SetMpState];
    assert!(support.missing().iter().all(|missing| !needed.contains(&missing.call())));
}
