//! Capture and restore of whole KVM machines, with tiny guests in real mode, 32-bit PAE paging and 64-bit long mode.
//!
//! The oracle is the guest itself: it mixes registers, vector registers, debug registers, MSRs and RAM into each value
//! that it sends to a port, so parent and clone must send the same values from the same instruction pointers.
//! Where `/dev/kvm` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]

use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::frontend::kvm::{
    AnonymousRam, Clock, DecodeError, Devices, Difference, DirtyLog, Irqchips, KvmCall, KvmError, KvmHost, KvmMachine,
    KvmSupport, MachinePlan, MachineState, MsrIndex, Part, Pit, SlotNumber, Target, VcpuCount, VcpuIndex, VmBuilder,
    finish_exit,
};
use offshoot::page::{ByteOffset, ByteSize, GuestAddress};

const RAM_SIZE: ByteSize = ByteSize::mib(2);
const RAM_BYTES: usize = 2 << 20;

/// 64-bit: mixes a counter into r9, debug registers, XMM0/1, YMM2's upper half, KERNEL_GS_BASE and RAM; sends r9b.
const LONG_MODE_AVX: &[u8] = &[
    0x49, 0xff, 0xc0, // inc r8
    0x4d, 0x69, 0xc9, 0x2d, 0xf4, 0x51, 0x58, // imul r9, r9, 0x5851f42d
    0x4d, 0x01, 0xc1, // add r9, r8
    0x41, 0x0f, 0x23, 0xc1, // mov dr0, r9
    0x41, 0x0f, 0x23, 0xc8, // mov dr1, r8
    0x66, 0x49, 0x0f, 0x6e, 0xc1, // movq xmm0, r9
    0x66, 0x0f, 0xd4, 0xc8, // paddq xmm1, xmm0
    0xc4, 0xe3, 0x6d, 0x18, 0xd1, 0x01, // vinsertf128 ymm2, ymm2, xmm1, 1
    0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, KERNEL_GS_BASE
    0x44, 0x89, 0xc8, // mov eax, r9d
    0x44, 0x89, 0xc2, // mov edx, r8d
    0x0f, 0x30, // wrmsr
    0x4c, 0x89, 0x0c, 0x25, 0x00, 0x80, 0x00, 0x00, // mov [0x8000], r9
    0x44, 0x88, 0xc8, // mov al, r9b
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xc0, // jmp start
];

/// The same with XMM1 only moved, for hosts that interpret guests and know no vector arithmetic.
const LONG_MODE_MOVES: &[u8] = &[
    0x49, 0xff, 0xc0, // inc r8
    0x4d, 0x69, 0xc9, 0x2d, 0xf4, 0x51, 0x58, // imul r9, r9, 0x5851f42d
    0xf3, 0x0f, 0x7f, 0x0c, 0x25, 0x20, 0x80, 0x00, 0x00, // movdqu [0x8020], xmm1
    0x4c, 0x03, 0x0c, 0x25, 0x20, 0x80, 0x00, 0x00, // add r9, [0x8020]
    0x4d, 0x01, 0xc1, // add r9, r8
    0x4c, 0x89, 0x0c, 0x25, 0x10, 0x80, 0x00, 0x00, // mov [0x8010], r9
    0x4c, 0x89, 0x04, 0x25, 0x18, 0x80, 0x00, 0x00, // mov [0x8018], r8
    0xf3, 0x0f, 0x6f, 0x0c, 0x25, 0x10, 0x80, 0x00, 0x00, // movdqu xmm1, [0x8010]
    0x41, 0x0f, 0x23, 0xc1, // mov dr0, r9
    0x41, 0x0f, 0x23, 0xc8, // mov dr1, r8
    0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, KERNEL_GS_BASE
    0x44, 0x89, 0xc8, // mov eax, r9d
    0x44, 0x89, 0xc2, // mov edx, r8d
    0x0f, 0x30, // wrmsr
    0x44, 0x88, 0xc8, // mov al, r9b
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xad, // jmp start
];

/// 32-bit: mixes a counter into esi, DR2, SYSENTER_ESP and RAM; sends esi's low byte.
const PROTECTED_MODE: &[u8] = &[
    0x43, // inc ebx
    0x69, 0xf6, 0x2d, 0xf4, 0x51, 0x58, // imul esi, esi, 0x5851f42d
    0x01, 0xde, // add esi, ebx
    0x0f, 0x23, 0xd6, // mov dr2, esi
    0xb9, 0x75, 0x01, 0x00, 0x00, // mov ecx, SYSENTER_ESP
    0x89, 0xf0, // mov eax, esi
    0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0x89, 0x35, 0x00, 0x90, 0x00, 0x00, // mov [0x9000], esi
    0x89, 0xf0, // mov eax, esi
    0xe6, 0x11, // out 0x11, al
    0xeb, 0xdd, // jmp start
];

/// Real mode, interrupts off: sends 0..=3, then lets an interrupt in, then sends 0x99.
const WAITING: &[u8] = &[
    0xe6, 0x30, // out 0x30, al
    0x43, // inc bx
    0x88, 0xd8, // mov al, bl
    0x80, 0xfb, 0x04, // cmp bl, 4
    0x72, 0xf6, // jb start
    0xb9, 0x00, 0x04, // mov cx, 0x400
    0xfb, // sti
    0x84, 0xd2, // wait: test dl, dl
    0x75, 0x03, // jnz came
    0x49, // dec cx
    0x75, 0xf9, // jnz wait
    0xfa, // came: cli
    0xb0, 0x99, // mov al, 0x99
    0xe6, 0x31, // out 0x31, al
    0xeb, 0xe4, // jmp start
];

/// Real mode: halts; once woken sends how many interrupts came.
const HALTING: &[u8] = &[
    0xfb, // sti
    0xf4, // hlt
    0x88, 0xd0, // mov al, dl
    0xe6, 0x23, // out 0x23, al
    0xeb, 0xfa, // jmp back to the mov
];

/// Real mode interrupt handler: counts in dx and sends the count.
const HANDLER: &[u8] = &[0x42, 0x88, 0xd0, 0xe6, 0x22, 0xcf];

const TWO: VcpuCount = VcpuCount::new(2);
const CODE: u64 = 0x6000;
const PROTECTED_CODE: u64 = 0x7000;
const HANDLER_AT: u16 = 0x7800;
const VECTOR: u8 = 0x40;
/// Above 15: such a line reaches the IOAPIC only, not the PICs.
const LINE: u32 = 20;

/// The host, or `None` with a loud word where there is none.
fn host() -> Option<Arc<KvmHost>> {
    match KvmHost::open() {
        Ok(host) => Some(host),
        Err(error) => {
            let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
            assert!(!required, "OFFSHOOT_REQUIRE=all, but KVM is missing: {error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// A port, what was written to it, and the registers after.
type Exit = (u16, Vec<u8>, kvm_regs);

/// A machine with its RAM.
struct Guest {
    ram: Arc<AnonymousRam>,
    machine: KvmMachine,
}

impl Guest {
    fn new(host: &KvmHost, devices: Devices, vcpus: VcpuCount) -> Self {
        let ram = AnonymousRam::new(RAM_SIZE).unwrap();
        let memory: Arc<AnonymousRam> = Arc::clone(&ram);
        let machine = VmBuilder::new(host)
            .and_then(|vm| vm.ram(SlotNumber::new(0), GuestAddress::ZERO, memory, DirtyLog::Off))
            .and_then(|vm| vm.devices(devices))
            .and_then(|vm| vm.vcpus(vcpus))
            .unwrap();
        Self { ram, machine }
    }

    /// A parent: CPUID set, every vCPU runnable.
    fn parent(host: &KvmHost, devices: Devices, vcpus: VcpuCount) -> Self {
        let guest = Self::new(host, devices, vcpus);
        for (id, vcpu) in guest.machine.vcpus().iter().enumerate() {
            vcpu.set_cpuid2(&cpuid(host, id as u32)).unwrap();
            if devices.irqchips == Irqchips::InKernel {
                vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
            }
        }
        guest
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write(ByteOffset::new(at), bytes).unwrap();
    }

    fn plan(&self, host: &Arc<KvmHost>, devices: Devices) -> MachinePlan {
        MachinePlan::read(host, self.machine.vcpus(), devices).unwrap()
    }

    fn capture(&mut self, plan: &MachinePlan) -> MachineState {
        for (position, vcpu) in self.machine.vcpus_mut().iter_mut().enumerate() {
            finish_exit(vcpu, VcpuIndex::new(position as u32), |exit| panic!("unexpected exit {exit:?}")).unwrap();
        }
        self.machine.capture(plan).unwrap()
    }

    /// A clone on a brand-new VM with a copy of the RAM.
    fn clone_of(host: &KvmHost, state: &MachineState, ram: &[u8]) -> Self {
        let mut clone = Self::new(host, state.devices(), state.vcpu_count());
        clone.write(0, ram);
        clone.machine.restore(host, state).unwrap();
        clone
    }

    fn copy_ram(&self) -> Vec<u8> {
        let mut copy = vec![0; RAM_BYTES];
        self.ram.read(ByteOffset::ZERO, &mut copy).unwrap();
        copy
    }

    fn vcpu(&mut self, position: usize) -> &mut VcpuFd {
        &mut self.machine.vcpus_mut()[position]
    }

    /// Runs one vCPU for a number of port writes, with the registers at each.
    fn trace(&mut self, position: usize, writes: usize) -> Vec<Exit> {
        let vcpu = self.vcpu(position);
        (0..writes)
            .map(|_| {
                let (port, data) = match vcpu.run().unwrap() {
                    VcpuExit::IoOut(port, data) => (port, data.to_vec()),
                    exit => panic!("unexpected exit {exit:?}"),
                };
                (port, data, vcpu.get_regs().unwrap())
            })
            .collect()
    }
}

fn cpuid(host: &KvmHost, apic_id: u32) -> CpuId {
    let mut cpuid = host.supported_cpuid().clone();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | apic_id << 24,
            0xb | 0x1f => leaf.edx = apic_id,
            _ => {}
        }
    }
    cpuid
}

fn host_has(host: &KvmHost, bit_of_leaf_1_ecx: u32) -> bool {
    host.supported_cpuid().as_slice().iter().any(|leaf| leaf.function == 1 && leaf.ecx >> bit_of_leaf_1_ecx & 1 == 1)
}

fn flat_segment(code: kvm_segment, kind: u8) -> kvm_segment {
    kvm_segment { type_: kind, limit: u32::MAX, present: 1, s: 1, g: 1, base: 0, ..code }
}

fn set_data_segments(sregs: &mut kvm_sregs) {
    let data = flat_segment(kvm_segment { selector: 0x10, db: 1, ..Default::default() }, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
}

/// XSAVE and AVX.
fn host_has_avx(host: &KvmHost) -> bool {
    host_has(host, 26) && host_has(host, 28)
}

/// The long-mode program with the most vector work that this host runs: some interpret guests and know little of it.
fn long_mode_program(host: &KvmHost) -> &'static [u8] {
    static PROGRAM: OnceLock<&[u8]> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut guest = Guest::parent(host, Devices::NONE, VcpuCount::ONE);
        enter_long_mode(host, &mut guest, LONG_MODE_AVX);
        if host_has_avx(host) && matches!(guest.vcpu(0).run(), Ok(VcpuExit::IoOut(..))) {
            return LONG_MODE_AVX;
        }
        eprintln!("SKIPPED: this host runs no AVX instruction; the guests only move vector registers");
        LONG_MODE_MOVES
    })
}

/// Puts vCPU 0 into long mode at [`CODE`], with AVX enabled where the host has it.
fn enter_long_mode(host: &KvmHost, guest: &mut Guest, program: &[u8]) {
    let avx = host_has_avx(host);
    guest.write(CODE, program);
    guest.write(0x1000, &(0x2000u64 | 3).to_le_bytes()); // PML4
    guest.write(0x2000, &(0x3000u64 | 3).to_le_bytes()); // PDPT
    guest.write(0x3000, &0x83u64.to_le_bytes()); // PD: 2 MiB at 0
    let vcpu = guest.vcpu(0);
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = flat_segment(kvm_segment { selector: 8, l: 1, ..Default::default() }, 11);
    set_data_segments(&mut sregs);
    (sregs.cr0, sregs.cr3, sregs.efer) = (0x8005_0033, 0x1000, 0x500);
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | if avx { 1 << 18 } else { 0 };
    vcpu.set_sregs(&sregs).unwrap();
    if avx {
        let mut xcrs = vcpu.get_xcrs().unwrap();
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs).unwrap();
    }
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, rsp: 0x5000, r9: 0x1234_5678_9abc, ..Default::default() }).unwrap();
}

/// How vCPU 1 sees memory.
#[derive(Clone, Copy)]
enum Paging {
    Pae,
    Flat,
}

/// PAE paging where this host runs it. Hosts that interpret guests may drop the paging bit of such a guest.
fn paging(host: &KvmHost) -> Paging {
    static PAGING: OnceLock<Paging> = OnceLock::new();
    *PAGING.get_or_init(|| {
        let mut guest = Guest::parent(host, Devices::NONE, TWO);
        enter_protected_mode(&mut guest, Paging::Pae);
        if matches!(guest.vcpu(1).run(), Ok(VcpuExit::IoOut(..))) {
            return Paging::Pae;
        }
        eprintln!("SKIPPED: this host runs no guest in PAE paging; vCPU 1 runs in flat protected mode");
        Paging::Flat
    })
}

/// Puts vCPU 1 into 32-bit protected mode at [`PROTECTED_CODE`].
fn enter_protected_mode(guest: &mut Guest, paging: Paging) {
    guest.write(PROTECTED_CODE, PROTECTED_MODE);
    guest.write(0x4000, &(0x5000u64 | 1).to_le_bytes()); // page-directory pointers
    guest.write(0x5000, &0x83u64.to_le_bytes()); // PD: 2 MiB at 0
    let vcpu = guest.vcpu(1);
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = flat_segment(kvm_segment { selector: 8, db: 1, ..Default::default() }, 11);
    set_data_segments(&mut sregs);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = match paging {
        Paging::Pae => (0x8005_0033, 0x4000, 1 << 5 | 1 << 9, 0),
        Paging::Flat => (0x0005_0033, 0, 1 << 9, 0),
    };
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: PROTECTED_CODE, rflags: 2, rsp: 0x4ff0, rsi: 77, ..Default::default() }).unwrap();
}

/// A two-vCPU guest, one in long mode, one in 32-bit protected mode.
fn mixed_guest(host: &KvmHost, devices: Devices) -> Guest {
    let mut guest = Guest::parent(host, devices, TWO);
    enter_long_mode(host, &mut guest, long_mode_program(host));
    enter_protected_mode(&mut guest, paging(host));
    guest
}

/// A one-vCPU guest in real mode at [`CODE`], with LAPIC, IOAPIC and a handler for one interrupt.
fn real_mode_guest(host: &KvmHost, code: &[u8], vcpus: VcpuCount) -> Guest {
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
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, rsp: 0x5000, ..Default::default() }).unwrap();
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
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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
fn a_pending_interrupt_survives() {
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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

#[test]
fn an_exit_is_finished_before_the_cut() {
    let Some(host) = host() else { return };
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
fn bytes_round_trip_and_a_decoded_state_runs() {
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
    if !host_has_avx(&host) {
        eprintln!("SKIPPED: guests of this host have no AVX");
        return;
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
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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

#[test]
fn mistakes_are_named() {
    let Some(host) = host() else { return };
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
    let Some(host) = host() else { return };
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
