//! Two vCPUs in two modes: 64-bit long mode and 32-bit protected mode, with as much vector work and paging as this host runs.

use std::sync::OnceLock;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuExit;
use offshoot::frontend::kvm::{Devices, KvmHost, VcpuCount};

use crate::guest::{Guest, TWO};
use crate::programs::{LONG_MODE_AVX, LONG_MODE_MOVES, PROTECTED_MODE};

const CODE: u64 = 0x6000;
const PROTECTED_CODE: u64 = 0x7000;

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
pub fn host_has_avx(host: &KvmHost) -> bool {
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
pub fn mixed_guest(host: &KvmHost, devices: Devices) -> Guest {
    let mut guest = Guest::parent(host, devices, TWO);
    enter_long_mode(host, &mut guest, long_mode_program(host));
    enter_protected_mode(&mut guest, paging(host));
    guest
}
