//! Interrupts that wait, in the LAPIC of a running vCPU or for a halted one, reach the clone.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
    kvm_mp_state, kvm_regs,
};
use offshoot::frontend::kvm::{Devices, KvmHost, VcpuCount};

use crate::assert_same_but_for_time;
use crate::common::machine::{kvm_host, start_in_real_mode};
use crate::guest::{Exit, Guest, TWO};
use crate::programs::{HALTING, HANDLER, WAITING};

const CODE: u64 = 0x6000;
const HANDLER_AT: u16 = 0x7800;
const VECTOR: u8 = 0x40;
/// Above 15: such a line reaches the IOAPIC only, not the PICs.
const LINE: u32 = 20;

/// A one-vCPU guest in real mode at [`CODE`], with LAPIC, IOAPIC and a handler for one interrupt.
pub fn real_mode_guest(host: &KvmHost, code: &[u8], vcpus: VcpuCount) -> Guest {
    let mut guest = Guest::parent(host, Devices::FULL, vcpus);
    guest.write(CODE, code);
    guest.write(u64::from(HANDLER_AT), HANDLER);
    guest.write(u64::from(VECTOR) * 4, &HANDLER_AT.to_le_bytes());
    let mut state = [0i8; 512];
    let mut put = |at: usize, bytes: &[u8]| bytes.iter().zip(at..).for_each(|(byte, at)| state[at] = *byte as i8);
    put(0, &0xfec0_0000u64.to_le_bytes()); // base address
    for pin in 0..24 {
        let masked = 1u64 << 16;
        put(24 + pin * 8, &masked.to_le_bytes());
    }
    put(24 + LINE as usize * 8, &u64::from(VECTOR).to_le_bytes()); // edge, to APIC 0
    let chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, chip: kvm_irqchip__bindgen_ty_1 { dummy: state }, pad: 0 };
    guest.machine.vm().set_irqchip(&chip).unwrap();
    let vcpu = guest.vcpu(0);
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf1] |= 1; // software enable
    vcpu.set_lapic(&lapic).unwrap();
    start_in_real_mode(vcpu, CODE);
    guest
}

fn raise_line(guest: &Guest) {
    guest.machine.vm().set_irq_line(LINE, true).unwrap();
    guest.machine.vm().set_irq_line(LINE, false).unwrap();
}

fn lapic_has_pending(guest: &Guest) -> bool {
    let lapic = guest.machine.vcpus()[0].get_lapic().unwrap();
    let vector = usize::from(VECTOR);
    lapic.regs[0x200 + vector / 32 * 0x10 + vector % 32 / 8] as u8 >> (vector % 8) & 1 == 1
}

#[test]
fn a_pending_interrupt_survives() {
    let Some(host) = kvm_host() else { return };
    let mut parent = real_mode_guest(&host, WAITING, VcpuCount::ONE);
    let plan = parent.plan(&host, Devices::FULL);
    parent.trace(0, 2);
    raise_line(&parent);
    let state = parent.capture(&plan);
    assert!(lapic_has_pending(&parent), "the interrupt must wait in the LAPIC for this test to mean anything");
    let mut clone = Guest::clone_of(&host, &state, &parent.copy_ram());
    assert!(lapic_has_pending(&clone));
    assert_same_but_for_time(&state, &clone.capture(&plan));
    // How far the guest's waiting loop gets before the interrupt is let in is the host's to decide, at each run.
    let at_any_turn = |mut trace: Vec<Exit>| {
        trace.iter_mut().for_each(|(.., regs)| regs.rcx = 0);
        trace
    };
    let expected = at_any_turn(parent.trace(0, 6));
    assert_eq!(expected, at_any_turn(clone.trace(0, 6)));
    let ports: Vec<_> = expected.iter().map(|(port, ..)| *port).collect();
    assert!(ports.contains(&0x22), "the handler never ran: {ports:x?}");
}

#[test]
fn a_halted_vcpu_stays_halted_until_its_interrupt() {
    let Some(host) = kvm_host() else { return };
    // The second vCPU was never started: that must survive as well.
    let mut parent = real_mode_guest(&host, HALTING, TWO);
    parent.vcpu(1).set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED }).unwrap();
    let plan = parent.plan(&host, Devices::FULL);
    // As the kernel leaves a vCPU that executed the `hlt`: behind it, interrupts on, halted.
    let vcpu = parent.vcpu(0);
    vcpu.set_regs(&kvm_regs { rip: CODE + 2, rflags: 0x202, rsp: 0x5000, ..Default::default() }).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
    let state = parent.capture(&plan);
    let mut clone = Guest::clone_of(&host, &state, &parent.copy_ram());
    let mp_state = |position: usize| clone.machine.vcpus()[position].get_mp_state().unwrap().mp_state;
    assert_eq!((mp_state(0), mp_state(1)), (KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED));
    raise_line(&clone);
    raise_line(&parent);
    let found = clone.trace(0, 3);
    assert_eq!(found, parent.trace(0, 3));
    // Had it not been halted, it would have reported zero interrupts first.
    assert_eq!((found[0].0, found[1].0, found[1].1[0]), (0x22, 0x23, 1));
}
