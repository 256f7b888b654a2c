//! What this example asks of a hypervisor: make a machine over a VM's RAM, run its vCPUs, save them, load them into a clone.
//!
//! Everything else (threads, pausing, devices, forking) is written once, in `machine.rs` and `board.rs`, and is the
//! same for the simulator and for KVM.

use offshoot::backing::Backing;
use offshoot::page::ByteSize;
use offshoot::ram::RamLayout;
use offshoot::{BoxError, DeviceState, Vm};

use crate::board::Seat;
use crate::guest::Lane;

/// A way to execute guests.
pub trait Hypervisor: Send + Sync + Sized + 'static {
    /// What the RAM of its guests lives in.
    type Ram: Backing;
    /// One vCPU.
    type Cpu: Cpu<Self::Ram>;
    /// What a machine has besides RAM and vCPUs, and what must live as long as they run.
    type Chassis: Send;

    /// Its name in the report.
    const NAME: &'static str;

    /// Where RAM of this size lies.
    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError>;

    /// Pages that lie in RAM before a guest starts (its code and what the processor needs), by page number.
    fn firmware(&self, ram: ByteSize) -> Vec<(u64, Vec<u8>)>;

    /// A machine about to execute its first instruction, with one vCPU for each lane. Firmware and control pages are in place.
    fn power_on(&self, vm: &Vm<Self::Ram>, lanes: &[Lane]) -> Result<(Self::Chassis, Vec<Self::Cpu>), BoxError>;

    /// The state of a machine at rest.
    fn save(&self, chassis: &Self::Chassis, cpus: &mut [&mut Self::Cpu]) -> Result<DeviceState, BoxError>;

    /// A machine that runs on from where another one was saved.
    fn restore(&self, vm: &Vm<Self::Ram>, state: &DeviceState) -> Result<(Self::Chassis, Vec<Self::Cpu>), BoxError>;
}

/// One vCPU. At rest it is a value; it runs on whatever thread calls [`Cpu::run`].
pub trait Cpu<R: Backing>: Send + 'static {
    /// Executes until `seat` says stop: looks there after each batch of instructions, and hands it every bell.
    /// When this returns, nothing of this vCPU is in flight.
    fn run(&mut self, seat: &Seat<R>) -> Result<(), BoxError>;

    /// Steps completed, read from the guest's own register. At rest only.
    fn steps(&self) -> Result<u32, BoxError>;
}
