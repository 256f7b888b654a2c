//! What this example asks of a hypervisor: a machine with one vCPU over a VM's RAM, that runs to its next bell and can be put back.

use std::time::{Duration, Instant};

use offshoot::backing::Backing;
use offshoot::page::{ByteSize, PageCount, PageSet};
use offshoot::ram::{Ram, RamLayout};
use offshoot::{BoxError, DeviceState, Guest, Rewind, Vm};

use crate::guest::Bell;

/// A way to execute guests.
pub trait Hypervisor: Sized {
    /// What the RAM of its guests lives in.
    type Ram: Backing;
    /// A machine: its one vCPU and what belongs to it.
    type Cpu: Cpu<Self::Ram>;

    /// Its name in the report.
    const NAME: &'static str;

    /// Where RAM of this size lies.
    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError>;

    /// Pages that lie in RAM before the guest starts, by page number.
    fn firmware(&self, ram: ByteSize) -> Vec<(u64, Vec<u8>)>;

    /// A machine about to execute its first instruction.
    fn power_on(&self, vm: &Vm<Self::Ram>) -> Result<Self::Cpu, BoxError>;

    /// A machine that runs on from where another one was saved.
    fn restore(&self, vm: &Vm<Self::Ram>, state: &DeviceState) -> Result<Self::Cpu, BoxError>;

    /// Puts RAM, disks and the machine back to the fork point. `by_host`: the pages that the host wrote, which no hypervisor knows of.
    fn reset(&self, vm: &Vm<Self::Ram>, cpu: &mut Timed<Self::Cpu>, by_host: &PageSet) -> Result<PageCount, BoxError>;
}

/// A machine with one vCPU. At rest between two calls.
pub trait Cpu<R: Backing>: Rewind {
    /// Executes up to the next bell.
    fn run(&mut self, ram: &Ram<R>) -> Result<Bell, BoxError>;

    /// Where its state differs from a saved one, in words; time may go on.
    fn differs(&mut self, from: &DeviceState) -> Result<Option<String>, BoxError>;
}

/// A machine, and how long its state took to load last.
pub struct Timed<C> {
    pub cpu: C,
    pub load: Duration,
}

impl<C: Guest> Guest for Timed<C> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.cpu.pause()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.cpu.save()
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.cpu.resume()
    }
}

impl<C: Rewind> Rewind for Timed<C> {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        let start = Instant::now();
        self.cpu.load(state)?;
        self.load = start.elapsed();
        Ok(())
    }
}
