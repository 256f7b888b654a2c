//! The devices that the kernel emulates for the whole machine: both PICs, the IOAPIC, the interval timer, the
//! paravirtual clock.
//!
//! It knows nothing of vCPUs.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::call::KvmCall;
use super::error::KvmError;
use super::machine_error;

/// Where the interrupt controllers live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchips {
    /// `KVM_CREATE_IRQCHIP` was called: both PICs, the IOAPIC and a LAPIC per vCPU are the kernel's.
    InKernel,
    /// The VMM emulates them, or there are none: the embedder keeps their state.
    Absent,
}

/// Where the interval timer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pit {
    /// `KVM_CREATE_PIT2` was called.
    InKernel,
    /// There is none in the kernel.
    Absent,
}

/// Whether the paravirtual clock is part of the machine.
///
/// Every KVM machine has one, at no cost while the guest does not use it; leave it out only for guests that never will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Captured, and set before a clone runs. A clone's clock goes on from the instant of the capture.
    Kept,
    /// Not looked at: a clone's clock starts at zero.
    Left,
}

/// Which in-kernel devices a machine has. The kernel cannot be asked, so the embedder says it.
///
/// ```
/// use offshoot::frontend::kvm::{Clock, Devices, Irqchips, Pit};
///
/// assert_eq!(Devices::FULL.irqchips, Irqchips::InKernel);
/// let small = Devices { clock: Clock::Kept, ..Devices::NONE };
/// assert_eq!(small.pit, Pit::Absent);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Interrupt controllers.
    pub irqchips: Irqchips,
    /// Interval timer.
    pub pit: Pit,
    /// Paravirtual clock.
    pub clock: Clock,
}

impl Devices {
    /// What a PC needs: everything.
    pub const FULL: Self = Self { irqchips: Irqchips::InKernel, pit: Pit::InKernel, clock: Clock::Kept };
    /// Nothing: a guest that only computes.
    pub const NONE: Self = Self { irqchips: Irqchips::Absent, pit: Pit::Absent, clock: Clock::Left };
}

/// The chips in the order in which they are captured and loaded.
const CHIP_IDS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of the kernel's devices.
#[derive(Clone)]
pub(super) struct ChipState {
    pub(super) irqchips: Option<Box<[kvm_irqchip; 3]>>,
    pub(super) pit: Option<kvm_pit_state2>,
    pub(super) clock: Option<kvm_clock_data>,
}

impl ChipState {
    pub(super) fn capture(vm: &VmFd, devices: Devices) -> Result<Self, KvmError> {
        let clock = match devices.clock {
            Clock::Kept => Some(vm.get_clock().map_err(machine_error(KvmCall::GetClock))?),
            Clock::Left => None,
        };
        let irqchips = match devices.irqchips {
            Irqchips::InKernel => {
                let mut chips = Box::new(CHIP_IDS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }));
                for chip in chips.iter_mut() {
                    vm.get_irqchip(chip).map_err(machine_error(KvmCall::GetIrqchip))?;
                }
                Some(chips)
            }
            Irqchips::Absent => None,
        };
        let pit = match devices.pit {
            Pit::InKernel => Some(vm.get_pit2().map_err(machine_error(KvmCall::GetPit2))?),
            Pit::Absent => None,
        };
        Ok(Self { irqchips, pit, clock })
    }

    /// Loads everything. The LAPICs must be loaded before: the IOAPIC hands an undelivered interrupt on to them.
    pub(super) fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in self.irqchips.iter().flat_map(|chips| chips.iter()) {
            vm.set_irqchip(chip).map_err(machine_error(KvmCall::SetIrqchip))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(machine_error(KvmCall::SetPit2))?;
        }
        if let Some(clock) = &self.clock {
            // Only the value: the flags that a capture reports are not accepted back, and with the real time in it the
            // clock would jump ahead by the age of the capture, while the time stamp counter does not.
            let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            vm.set_clock(&clock).map_err(machine_error(KvmCall::SetClock))?;
        }
        Ok(())
    }

    pub(super) fn devices(&self) -> Devices {
        Devices {
            irqchips: if self.irqchips.is_some() { Irqchips::InKernel } else { Irqchips::Absent },
            pit: if self.pit.is_some() { Pit::InKernel } else { Pit::Absent },
            clock: if self.clock.is_some() { Clock::Kept } else { Clock::Left },
        }
    }
}
