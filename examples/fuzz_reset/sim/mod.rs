//! The simulator backend: a RISC-V instruction-set simulator (`rvsim`) over RAM on the engine's heap, which knows itself what was written.

mod program;

use std::sync::Arc;

use offshoot::backing::Heap;
use offshoot::page::{ByteSize, PageCount, PageSet, PageSize};
use offshoot::ram::{Ram, RamLayout};
use offshoot::{BoxError, DeviceState, Guest, Rewind, StateObject, Vm};
use rvsim::{CpuError, CpuState, Interp};

use crate::common::sim_memory::{Countdown, GuestMemory};
use crate::guest::{Bell, gap};
use crate::machine::{Cpu, Hypervisor, Timed};

/// The simulator. It has no state of its own.
pub struct Simulator;

/// One simulated vCPU.
pub struct SimCpu(CpuState);

/// Its registers at a cut.
#[derive(Debug)]
struct SimState(CpuState);

/// More instructions than any input takes: a guest that needs them hangs.
const PATIENCE: u32 = 1_000_000;

impl Hypervisor for Simulator {
    type Ram = Heap;
    type Cpu = SimCpu;

    const NAME: &'static str = "sim";

    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError> {
        Ok(RamLayout::flat(ram, PageSize::KIB_4)?)
    }

    fn firmware(&self, _: ByteSize) -> Vec<(u64, Vec<u8>)> {
        vec![program::code()]
    }

    fn power_on(&self, vm: &Vm<Heap>) -> Result<SimCpu, BoxError> {
        Ok(SimCpu(program::entry(gap(vm.ram().layout().geometry().len()))))
    }

    fn restore(&self, _: &Vm<Heap>, state: &DeviceState) -> Result<SimCpu, BoxError> {
        let SimState(cpu) = state.object().ok_or("the state was not saved by this simulator")?;
        Ok(SimCpu(cpu.clone()))
    }

    fn reset(&self, vm: &Vm<Heap>, cpu: &mut Timed<SimCpu>, _: &PageSet) -> Result<PageCount, BoxError> {
        Ok(vm.reset(cpu)?)
    }
}

impl Guest for SimCpu {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_object(Arc::new(SimState(self.0.clone()))))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Rewind for SimCpu {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        let SimState(cpu) = state.object().ok_or("the state was not saved by this simulator")?;
        self.0.clone_from(cpu);
        Ok(())
    }
}

impl Cpu<Heap> for SimCpu {
    fn run(&mut self, ram: &Ram<Heap>) -> Result<Bell, BoxError> {
        let mut memory = GuestMemory::new(ram.view()?);
        let (end, at) = Interp::new(&mut self.0, &mut memory, &mut Countdown::new(PATIENCE)).run();
        match end {
            CpuError::Ecall => {
                let number = self.0.x[program::BELL];
                Ok(Bell::from_number(number).ok_or_else(|| format!("the guest rang bell {number:#x}"))?)
            }
            fault => {
                let refused = memory.refused().map(|error| format!(": {error}")).unwrap_or_default();
                Err(format!("{fault:?} at {:#x} in {at:?}{refused}", self.0.pc).into())
            }
        }
    }

    fn differs(&mut self, from: &DeviceState) -> Result<Option<String>, BoxError> {
        let from: &SimState = from.object().ok_or("the state was not saved by this simulator")?;
        let same = SimState(self.0.clone()).encode() == from.encode();
        Ok((!same).then(|| "registers".to_owned()))
    }
}

impl StateObject for SimState {
    fn encode(&self) -> Vec<u8> {
        self.0.x.iter().chain([&self.0.pc]).flat_map(|word| word.to_le_bytes()).collect()
    }
}
