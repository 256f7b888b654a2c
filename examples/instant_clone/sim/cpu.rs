//! One simulated vCPU: batches of instructions over one view of RAM, and a look at the doorbell in between.
//!
//! The view holds the lock of the VM's RAM, so it is dropped after each batch: a fork can cut then, between any two
//! instructions of the guest.

use offshoot::BoxError;
use offshoot::backing::Heap;
use rvsim::{CpuError, CpuState, Interp};

use super::program::{BELL, STEP};
use crate::board::Seat;
use crate::common::sim_memory::{Countdown, GuestMemory};
use crate::guest::Bell;
use crate::hypervisor::Cpu;

/// Instructions in one batch: some 50 microseconds, which is what a pause waits for at most.
const BATCH: u32 = 2000;

/// One simulated vCPU.
pub struct SimCpu {
    state: CpuState,
    has_run: bool,
}

impl SimCpu {
    pub fn new(state: CpuState) -> Self {
        Self { state, has_run: false }
    }

    pub fn state(&self) -> &CpuState {
        &self.state
    }

    /// Executes up to `instructions`; tells the bell that ended it early.
    fn batch(&mut self, seat: &Seat<Heap>, instructions: u32) -> Result<Option<Bell>, BoxError> {
        let mut memory = GuestMemory::new(seat.ram().view()?);
        let mut clock = Countdown::new(instructions);
        let (end, at) = Interp::new(&mut self.state, &mut memory, &mut clock).run();
        match end {
            CpuError::QuotaExceeded => Ok(None),
            CpuError::Ecall => {
                let number = self.state.x[BELL];
                Ok(Some(Bell::from_number(number).ok_or_else(|| format!("the guest rang bell {number}"))?))
            }
            fault => {
                let refused = memory.refused().map(|error| format!(": {error}")).unwrap_or_default();
                Err(format!("{fault:?} at {:#x} in {at:?}{refused}", self.state.pc).into())
            }
        }
    }
}

impl Cpu<Heap> for SimCpu {
    fn run(&mut self, seat: &Seat<Heap>) -> Result<(), BoxError> {
        while !seat.must_stop() {
            // The very first batch is one instruction, so that the time of that one is known.
            let size = if self.has_run { BATCH } else { 1 };
            let bell = self.batch(seat, size)?;
            if !std::mem::replace(&mut self.has_run, true) {
                seat.executed();
            }
            if let Some(bell) = bell {
                seat.ring(bell)?;
            }
        }
        Ok(())
    }

    fn steps(&self) -> Result<u32, BoxError> {
        Ok(self.state.x[STEP])
    }
}
