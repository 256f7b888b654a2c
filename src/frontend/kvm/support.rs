//! Which calls this host lacks, found by trying each on a scratch machine.
//!
//! It knows what a capture needs; it captures nothing.

use std::fmt;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_config,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd, VmFd};

use super::call::KvmCall;
use super::chips::Irqchips;
use super::error::KvmError;
use super::host::KvmHost;
use super::machine_error;
use super::msr::{MsrIndex, MsrValues};
use super::vcpu::VcpuIndex;
use crate::sys::kvm::{XsaveArea, get_sregs2, set_sregs2};

/// A call that this host refuses or does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingCall {
    call: KvmCall,
    said: String,
}

impl MissingCall {
    /// Which call.
    pub fn call(&self) -> KvmCall {
        self.call
    }

    /// What the host said.
    pub fn said(&self) -> &str {
        &self.said
    }
}

impl fmt::Display for MissingCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.call, self.said, self.call.advice())
    }
}

/// What this host can and cannot do of what a capture and a restore need.
///
/// ```no_run
/// use offshoot::frontend::kvm::{KvmHost, KvmSupport};
///
/// let support = KvmSupport::probe(&*KvmHost::open()?)?;
/// for missing in support.missing() {
///     eprintln!("this host lacks {missing}");
/// }
/// # Ok::<(), offshoot::frontend::kvm::KvmError>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvmSupport {
    missing: Vec<MissingCall>,
    refused: Vec<MsrIndex>,
}

impl KvmSupport {
    /// Tries every call on a scratch machine with all in-kernel devices and one vCPU with the host's whole CPUID.
    /// Some 40 calls; a few ms. Not needed before a capture, which names what it lacks by itself.
    ///
    /// # Errors
    /// Only if not even a scratch machine can be made.
    pub fn probe(host: &KvmHost) -> Result<Self, KvmError> {
        let vm = host.kvm().create_vm().map_err(machine_error(KvmCall::CreateVm))?;
        let mut probe = Probe { missing: Vec::new() };
        probe.errno(KvmCall::CreateIrqchip, vm.create_irq_chip());
        probe.errno(KvmCall::CreatePit2, vm.create_pit2(kvm_pit_config::default()));
        let vcpu = vm.create_vcpu(0).map_err(machine_error(KvmCall::CreateVcpu))?;
        probe.errno(KvmCall::SetCpuid2, vcpu.set_cpuid2(host.supported_cpuid()));
        probe.vcpu(host, &vcpu);
        probe.machine(&vm);
        let index = VcpuIndex::new(0);
        let refused = match MsrValues::capture(host.msrs(), &vcpu, index, Irqchips::InKernel) {
            Ok(values) => {
                if let Err(error) = values.load(&vcpu, index) {
                    probe.note(KvmCall::SetMsrs, error.to_string());
                }
                values.refused
            }
            Err(error) => {
                probe.note(KvmCall::GetMsrs, error.to_string());
                Vec::new()
            }
        };
        Ok(Self { missing: probe.missing, refused })
    }

    /// The calls that this host refuses, in the order in which they were tried.
    pub fn missing(&self) -> &[MissingCall] {
        &self.missing
    }

    /// The registers that this host lists as worth saving and then refuses to read.
    pub fn refused_msrs(&self) -> &[MsrIndex] {
        &self.refused
    }
}

struct Probe {
    missing: Vec<MissingCall>,
}

impl Probe {
    fn note(&mut self, call: KvmCall, said: String) {
        self.missing.push(MissingCall { call, said });
    }

    fn io<T>(&mut self, call: KvmCall, result: std::io::Result<T>) -> Option<T> {
        result.map_err(|error| self.note(call, error.to_string())).ok()
    }

    fn errno<T>(&mut self, call: KvmCall, result: Result<T, kvm_ioctls::Error>) -> Option<T> {
        self.io(call, result.map_err(|errno| std::io::Error::from_raw_os_error(errno.errno())))
    }

    /// Reads each part of a vCPU and writes it back.
    fn vcpu(&mut self, host: &KvmHost, vcpu: &VcpuFd) {
        if let Some(khz) = self.errno(KvmCall::GetTscKhz, vcpu.get_tsc_khz()) {
            self.errno(KvmCall::SetTscKhz, vcpu.set_tsc_khz(khz));
        }
        if let Some(state) = self.errno(KvmCall::GetMpState, vcpu.get_mp_state()) {
            self.errno(KvmCall::SetMpState, vcpu.set_mp_state(state));
        }
        if let Some(sregs) = self.errno(KvmCall::GetSregs, vcpu.get_sregs()) {
            self.errno(KvmCall::SetSregs, vcpu.set_sregs(&sregs));
        }
        if let Some(sregs) = self.io(KvmCall::GetSregs2, get_sregs2(vcpu)) {
            self.io(KvmCall::SetSregs2, set_sregs2(vcpu, &sregs));
        }
        if let Some(regs) = self.errno(KvmCall::GetRegs, vcpu.get_regs()) {
            self.errno(KvmCall::SetRegs, vcpu.set_regs(&regs));
        }
        if let Some(debug) = self.errno(KvmCall::GetDebugRegs, vcpu.get_debug_regs()) {
            self.errno(KvmCall::SetDebugRegs, vcpu.set_debug_regs(&debug));
        }
        if let Some(xcrs) = self.errno(KvmCall::GetXcrs, vcpu.get_xcrs()) {
            self.errno(KvmCall::SetXcrs, vcpu.set_xcrs(&xcrs));
        }
        if let Some(area) = self.io(KvmCall::GetXsave2, XsaveArea::read(vcpu, host.xsave_size())) {
            self.io(KvmCall::SetXsave, area.write(vcpu));
        }
        if let Some(lapic) = self.errno(KvmCall::GetLapic, vcpu.get_lapic()) {
            self.errno(KvmCall::SetLapic, vcpu.set_lapic(&lapic));
        }
        if let Some(events) = self.errno(KvmCall::GetVcpuEvents, vcpu.get_vcpu_events()) {
            self.errno(KvmCall::SetVcpuEvents, vcpu.set_vcpu_events(&events));
        }
        let mut nested = KvmNestedStateBuffer::empty();
        if self.errno(KvmCall::GetNestedState, vcpu.nested_state(&mut nested)).is_some() {
            self.errno(KvmCall::SetNestedState, vcpu.set_nested_state(&nested));
        }
    }

    fn machine(&mut self, vm: &VmFd) {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            if self.errno(KvmCall::GetIrqchip, vm.get_irqchip(&mut chip)).is_some() {
                self.errno(KvmCall::SetIrqchip, vm.set_irqchip(&chip));
            }
        }
        if let Some(pit) = self.errno(KvmCall::GetPit2, vm.get_pit2()) {
            self.errno(KvmCall::SetPit2, vm.set_pit2(&pit));
        }
        if let Some(clock) = self.errno(KvmCall::GetClock, vm.get_clock()) {
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            self.errno(KvmCall::SetClock, vm.set_clock(&clock));
        }
    }
}
