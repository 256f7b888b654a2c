//! The simulator backend: a RISC-V instruction-set simulator from the registry (`rvsim`) over a VM whose RAM is ours.
//!
//! Needs nothing of the host: this is what runs where there is no KVM. RAM lives on the engine's heap backing.

mod cpu;
mod program;

use std::sync::Arc;

use offshoot::backing::Heap;
use offshoot::page::{ByteSize, PageSize};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, DeviceState, StateObject, Vm};
use rvsim::CpuState;

use crate::guest::{CODE, Lane, PAGE};
use crate::hypervisor::Hypervisor;
use cpu::SimCpu;

/// The simulator. It has no state of its own.
pub struct Simulator;

/// The registers of all vCPUs at a cut. Clones take them as they are, without decoding anything.
#[derive(Debug)]
struct SimState(Vec<CpuState>);

impl Hypervisor for Simulator {
    type Ram = Heap;
    type Cpu = SimCpu;
    type Chassis = ();

    const NAME: &'static str = "sim";

    fn layout(&self, ram: ByteSize) -> Result<RamLayout, BoxError> {
        if ram > ByteSize::gib(4) {
            return Err(
                "the simulated processor has 32-bit addresses: --ram can be at most 4G with --backend sim".into()
            );
        }
        Ok(RamLayout::flat(ram, PageSize::KIB_4)?)
    }

    fn firmware(&self, _: ByteSize) -> Vec<(u64, Vec<u8>)> {
        vec![(CODE / PAGE as u64, program::assemble())]
    }

    fn power_on(&self, _: &Vm<Heap>, lanes: &[Lane]) -> Result<((), Vec<SimCpu>), BoxError> {
        Ok(((), lanes.iter().map(|lane| SimCpu::new(program::entry(lane))).collect()))
    }

    fn save(&self, (): &(), cpus: &mut [&mut SimCpu]) -> Result<DeviceState, BoxError> {
        let state = SimState(cpus.iter().map(|cpu| cpu.state().clone()).collect());
        Ok(DeviceState::from_object(Arc::new(state)))
    }

    fn restore(&self, _: &Vm<Heap>, state: &DeviceState) -> Result<((), Vec<SimCpu>), BoxError> {
        let SimState(cpus) = state.object().ok_or("the state was not saved by this simulator")?;
        Ok(((), cpus.iter().cloned().map(SimCpu::new).collect()))
    }
}

impl StateObject for SimState {
    fn encode(&self) -> Vec<u8> {
        let words = self.0.iter().flat_map(|cpu| cpu.x.iter().copied().chain([cpu.pc]));
        words.flat_map(u32::to_le_bytes).collect()
    }
}
