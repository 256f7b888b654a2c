//! A guest that parses inputs, reset in place after each: the inner loop of a fuzzer.
//!
//! ```text
//! cargo run --release --example fuzz_reset
//! ```
//!
//! | file | what it shows |
//! |---|---|
//! | `fuzz.rs` | **the loop**: run an input, reset; and the check that nothing stayed |
//! | `machine.rs` | what it needs of whatever executes the guest |
//! | `kvm/` | that, for KVM: RAM reset by the dirty log, state loaded into the machine that ran |
//! | `sim/` | the same for a RISC-V simulator |
//! | `guest.rs` | the format, the parser's contract and its planted bug |
//! | `mutator.rs` | inputs |

#[path = "../common/mod.rs"]
mod common;
mod fuzz;
mod guest;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod machine;
mod mutator;
mod options;
mod report;
mod sim;

use std::io::Write;
use std::process::ExitCode;

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
    for violation in &report.examples {
        eprintln!("violation: {violation}");
    }
    if report.found_at.is_none() {
        eprintln!("error: {} inputs did not find the planted bug", options.inputs);
    }
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// Runs on the backend that was asked for, or else on KVM where it works and in the simulator where it does not.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn run(options: &Options) -> Result<Report, BoxError> {
    match options.backend {
        Some(Backend::Sim) => fuzz::run(&sim::Simulator, options),
        Some(Backend::Kvm) => fuzz::run(&kvm::Kvm::open()?, options),
        None => match kvm::Kvm::open() {
            Ok(kvm) => fuzz::run(&kvm, options),
            Err(why) => {
                eprintln!("KVM does not work here ({why}): the guest runs in the simulator");
                fuzz::run(&sim::Simulator, options)
            }
        },
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn run(options: &Options) -> Result<Report, BoxError> {
    if options.backend == Some(Backend::Kvm) {
        return Err("the KVM guest is for Linux on x86-64: use --backend sim".into());
    }
    fuzz::run(&sim::Simulator, options)
}
