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

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use offshoot::BoxError;

use common::args::{Backend, Output};
use options::{Command, HELP, Options};
use report::Report;

const FAILED: u8 = 1;
const BAD_OPTIONS: u8 = 2;

fn main() -> ExitCode {
    let options = match options::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("error: {wrong}\n\n{HELP}");
            return ExitCode::from(BAD_OPTIONS);
        }
    };
    let report = match run(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let text = match options.output {
        Output::Text => report.text(),
        Output::Json => report.json() + "\n",
    };
    if let Err(error) = std::io::stdout().write_all(text.as_bytes()) {
        eprintln!("error: the report could not be written: {error}");
        return ExitCode::from(FAILED);
    }
    for violation in &report.findings.examples {
        eprintln!("violation: {violation}");
    }
    if report.findings.violations == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// Runs the job on the backend that was asked for, or else on KVM where it works and in the simulator where it does not.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn run(options: &Options) -> Result<Report, BoxError> {
    let kvm = || {
        let kvm = Arc::new(kvm::Kvm::open()?);
        scenario::try_out(&kvm).map(|()| kvm)
    };
    match options.backend {
        Some(Backend::Sim) => scenario::run(Arc::new(sim::Simulator), options),
        Some(Backend::Kvm) => scenario::run(kvm()?, options),
        None => match kvm() {
            Ok(kvm) => {
                eprintln!("guests run under KVM");
                scenario::run(kvm, options)
            }
            Err(why) => {
                eprintln!("KVM does not work here ({why}): guests run in the simulator");
                scenario::run(Arc::new(sim::Simulator), options)
            }
        },
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn run(options: &Options) -> Result<Report, BoxError> {
    if options.backend == Some(Backend::Kvm) {
        return Err("the KVM guest is for Linux on x86-64: use --backend sim".into());
    }
    scenario::run(Arc::new(sim::Simulator), options)
}
