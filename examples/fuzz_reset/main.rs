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
//! | `../common/` | what it shares with other examples: assemblers, the command line |

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

use std::process::ExitCode;

use offshoot::BoxError;

use common::program;
use options::Options;
use report::Report;

fn main() -> ExitCode {
    program::main(run)
}

/// Runs on the backend that was asked for, or else on KVM where it works and in the simulator where it does not.
fn run(options: &Options) -> Result<Report, BoxError> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if let Some(kvm) = program::kvm_or_simulator(options.common.backend, kvm::Kvm::open)? {
        return fuzz::run(&kvm, options);
    }
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    program::simulator_only(options.common.backend)?;
    fuzz::run(&sim::Simulator, options)
}
