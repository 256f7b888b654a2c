//! A running virtual machine is forked into a thousand running clones, which run on from the same instruction, diverge and
//! outlive it; then every one of them is checked.
//!
//! ```text
//! cargo run --release --example instant_clone
//! ```
//!
//! It is also a small VMM that shows how the engine is embedded. To read in this order:
//!
//! | file | what it shows |
//! |---|---|
//! | `machine.rs` | **the embedding**: a VM with vCPU threads, pause, save, resume, fork, clone |
//! | `hypervisor.rs` | what the machine needs of whatever executes guests |
//! | `kvm/` | that, for KVM with the engine's RAM mapped into the guest |
//! | `sim/` | the same for a RISC-V simulator over the engine's RAM |
//! | `board.rs`, `disk.rs` | the devices: a doorbell and a disk |
//! | `guest.rs` | what guests do, and what their pages look like |
//! | `scenario.rs` | the job, step by step |
//! | `model.rs`, `witness.rs`, `check.rs` | how it is known that nothing leaked |
//! | `../common/` | what it shares with other examples: assemblers, the command line |

mod board;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod disk;
mod guest;
mod hypervisor;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod machine;
mod memory;
mod model;
mod options;
mod pool;
mod report;
mod scenario;
mod sim;
mod witness;

use std::process::ExitCode;
use std::sync::Arc;

use offshoot::BoxError;

use common::program;
use options::Options;
use report::Report;

fn main() -> ExitCode {
    program::main(run)
}

/// Runs the job on the backend that was asked for, or else on KVM where it works and in the simulator where it does not.
fn run(options: &Options) -> Result<Report, BoxError> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if let Some(kvm) = program::kvm_or_simulator(options.common.backend, open_kvm)? {
        if options.common.backend.is_none() {
            eprintln!("guests run under KVM");
        }
        return scenario::run(kvm, options);
    }
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    program::simulator_only(options.common.backend)?;
    scenario::run(Arc::new(sim::Simulator), options)
}

/// KVM, once a clone has run on it.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn open_kvm() -> Result<Arc<kvm::Kvm>, BoxError> {
    let kvm = Arc::new(kvm::Kvm::open()?);
    scenario::try_out(&kvm).map(|()| kvm)
}
