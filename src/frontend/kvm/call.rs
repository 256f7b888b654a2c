//! The names of the KVM calls that this front end issues, and what to do when a host refuses one.
//!
//! Pure data: it issues nothing.

use std::fmt;

macro_rules! calls {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $advice:literal;)*) => {
        /// One KVM call, by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum KvmCall {
            $($(#[$doc])* $variant,)*
        }

        impl KvmCall {
            /// The name in the kernel's header.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What to do when a host refuses the call.
            pub const fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)* }
            }
        }
    };
}

const _: () = assert!(size_of::<KvmCall>() == 1);

calls! {
    /// Opening the device.
    Open = "open(/dev/kvm)", "check that the device exists and that this user may read and write it";
    /// Feature query.
    CheckExtension = "KVM_CHECK_EXTENSION", "this host's KVM is too old for this front end";
    /// New machine.
    CreateVm = "KVM_CREATE_VM", "check the limits on open files and locked memory";
    /// New vCPU.
    CreateVcpu = "KVM_CREATE_VCPU", "create vCPUs after the interrupt chips, with ids below the host's limit";
    /// Interrupt chips.
    CreateIrqchip = "KVM_CREATE_IRQCHIP", "create it once, before the vCPUs";
    /// Interval timer.
    CreatePit2 = "KVM_CREATE_PIT2", "create it once, after the interrupt chips";
    /// Where Intel hosts keep three pages of their own.
    SetTssAddr = "KVM_SET_TSS_ADDR", "choose three pages below 4 GiB that hold no guest RAM";
    /// Guest memory.
    SetUserMemoryRegion = "KVM_SET_USER_MEMORY_REGION",
        "check that address and size are whole pages, that the slot number is below the host's limit and that no two slots overlap";
    /// The pages that the guest wrote.
    GetDirtyLog = "KVM_GET_DIRTY_LOG", "register the slot with DirtyLog::On";
    /// The list of MSRs worth saving.
    GetMsrIndexList = "KVM_GET_MSR_INDEX_LIST", "this host lists more MSRs than the bindings hold: update kvm-bindings";
    /// What a guest may be told about its processor.
    GetSupportedCpuid = "KVM_GET_SUPPORTED_CPUID", "this host lists more entries than the bindings hold: update kvm-bindings";
    /// What a guest is told about its processor.
    GetCpuid2 = "KVM_GET_CPUID2", "capture only vCPUs whose CPUID was set";
    /// The opposite.
    SetCpuid2 = "KVM_SET_CPUID2", "restore on a host with the same processor features, onto a vCPU that never ran";
    /// Frequency of the guest's time stamp counter.
    GetTscKhz = "KVM_GET_TSC_KHZ", "this host's time stamp counter is not stable";
    /// The opposite.
    SetTscKhz = "KVM_SET_TSC_KHZ", "this host cannot scale the time stamp counter: restore where the frequency is the same";
    /// General registers.
    GetRegs = "KVM_GET_REGS", "pause the vCPU first";
    /// The opposite.
    SetRegs = "KVM_SET_REGS", "pause the vCPU first";
    /// Special registers.
    GetSregs = "KVM_GET_SREGS", "pause the vCPU first";
    /// The opposite.
    SetSregs = "KVM_SET_SREGS", "set the captured CPUID first; a control bit that the host lacks is refused";
    /// Special registers and PAE page-directory pointers.
    GetSregs2 = "KVM_GET_SREGS2", "this host cannot report a PAE guest's page-directory pointers: capture it in another paging mode";
    /// The opposite.
    SetSregs2 = "KVM_SET_SREGS2", "restore a PAE guest on a host with KVM_CAP_SREGS2";
    /// Debug registers.
    GetDebugRegs = "KVM_GET_DEBUGREGS", "pause the vCPU first";
    /// The opposite.
    SetDebugRegs = "KVM_SET_DEBUGREGS", "the captured DR6 or DR7 has bits that the host does not know";
    /// Extended control registers.
    GetXcrs = "KVM_GET_XCRS", "this host lacks XSAVE";
    /// The opposite.
    SetXcrs = "KVM_SET_XCRS", "restore on a host whose processor has the captured vector features";
    /// Vector and floating-point state.
    GetXsave = "KVM_GET_XSAVE", "pause the vCPU first";
    /// The same, of any size.
    GetXsave2 = "KVM_GET_XSAVE2", "pause the vCPU first";
    /// The opposite.
    SetXsave = "KVM_SET_XSAVE", "restore on a host whose processor has the captured vector features";
    /// Model-specific registers.
    GetMsrs = "KVM_GET_MSRS", "pause the vCPU first";
    /// The opposite.
    SetMsrs = "KVM_SET_MSRS", "register the guest's RAM first (some registers name a guest page), on a host with the same features";
    /// Local interrupt controller.
    GetLapic = "KVM_GET_LAPIC", "say that the machine has no in-kernel interrupt chips";
    /// The opposite.
    SetLapic = "KVM_SET_LAPIC", "create the interrupt chips in the new VM before its vCPUs";
    /// Pending and injected exceptions, interrupts and NMIs.
    GetVcpuEvents = "KVM_GET_VCPU_EVENTS", "pause the vCPU first";
    /// The opposite.
    SetVcpuEvents = "KVM_SET_VCPU_EVENTS", "the captured events need a feature that this host lacks";
    /// Running, halted or waiting to start.
    GetMpState = "KVM_GET_MP_STATE", "pause the vCPU first";
    /// The opposite.
    SetMpState = "KVM_SET_MP_STATE", "create the interrupt chips in the new VM before its vCPUs";
    /// What a guest hypervisor keeps in KVM.
    GetNestedState = "KVM_GET_NESTED_STATE", "hide VMX and SVM from the guest's CPUID, or shut its guests down before capture";
    /// The opposite.
    SetNestedState = "KVM_SET_NESTED_STATE", "restore on a host with nested virtualization";
    /// One interrupt chip.
    GetIrqchip = "KVM_GET_IRQCHIP", "say that the machine has no in-kernel interrupt chips";
    /// The opposite.
    SetIrqchip = "KVM_SET_IRQCHIP", "create the interrupt chips in the new VM before its vCPUs";
    /// Interval timer.
    GetPit2 = "KVM_GET_PIT2", "say that the machine has no in-kernel interval timer";
    /// The opposite.
    SetPit2 = "KVM_SET_PIT2", "create the interval timer in the new VM";
    /// Paravirtual clock.
    GetClock = "KVM_GET_CLOCK", "say that the machine has no paravirtual clock";
    /// The opposite.
    SetClock = "KVM_SET_CLOCK", "say that the machine has no paravirtual clock";
    /// Filling second-level page tables ahead.
    PreFaultMemory = "KVM_PRE_FAULT_MEMORY", "name only pages that are RAM of this machine";
    /// Running the guest.
    Run = "KVM_RUN", "look at the exit that the vCPU reported last";
}

impl fmt::Display for KvmCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
