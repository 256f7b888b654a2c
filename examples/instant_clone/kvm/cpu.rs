//! One KVM vCPU: it runs until it rings, then the bell is answered.
//!
//! It can stop at any bell. Besides those that ask for something, the guest rings in the middle of some pages
//! ([`Bell::Tick`]), so that it is cut there too. A VMM with signals would stop it anywhere.

use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::BoxError;
use offshoot::backing::Mapped;
use offshoot::frontend::kvm::{VcpuIndex, finish_exit};
use rustix::io::Errno;

use crate::board::Seat;
use crate::guest::Bell;
use crate::hypervisor::Cpu;

/// One KVM vCPU.
pub struct KvmCpu {
    index: VcpuIndex,
    vcpu: VcpuFd,
}

impl KvmCpu {
    pub fn new(index: VcpuIndex, vcpu: VcpuFd) -> Self {
        Self { index, vcpu }
    }

    pub fn vcpu_mut(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Executes up to the next bell; `None` if something else interrupted it.
    fn run_to_bell(&mut self) -> Result<Option<Bell>, BoxError> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) => {
                Ok(Some(Bell::from_number(port.into()).ok_or_else(|| format!("the guest rang bell {port:#x}"))?))
            }
            Ok(exit) => Err(format!("the guest stopped: {exit:?}").into()),
            Err(error) if [Errno::INTR, Errno::AGAIN].map(Errno::raw_os_error).contains(&error.errno()) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Cpu<Mapped> for KvmCpu {
    fn run(&mut self, seat: &Seat<Mapped>) -> Result<(), BoxError> {
        while !seat.must_stop() {
            if let Some(bell) = self.run_to_bell()? {
                // The first bell is as early as a VMM can know that instructions were executed.
                seat.executed();
                seat.ring(bell)?;
            }
        }
        // The kernel ends the `out` of the last bell only when it is entered again; a clone cut before that would ring twice.
        let mut unexpected = None;
        finish_exit(&mut self.vcpu, self.index, |exit| unexpected = Some(format!("one bell rang twice: {exit:?}")))?;
        unexpected.map_or(Ok(()), |what| Err(what.into()))
    }

    fn steps(&self) -> Result<u32, BoxError> {
        // The guest keeps them in ebp, see `program.rs`.
        Ok(self.vcpu.get_regs()?.rbp as u32)
    }
}
