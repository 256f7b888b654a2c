//! A Linux guest in an unmodified QEMU is booted once, and forked into running clones: RAM, disk and devices, with no boot.
//!
//! ```text
//! cargo run --release --example qemu_clones -- --clones 20 --keep
//! ```
//!
//! The guest is made of what the machine has installed (`../common/guest_image`), or is the caller's own: a kernel, an initrd, a raw disk image.
//! Each VM has its serial console in a file and its agent on a socket. Ends with a table of how long everything took, and of the memory that
//! sharing saved. Ctrl-C leaves no process, socket or file behind.
//!
//! | file | what it shows |
//! |---|---|
//! | `run.rs` | **the embedding**: launch, wait, fork, spawn, customize, fork a clone again |
//! | `memory.rs` | what the kernel says each QEMU process holds |
//! | `report.rs` | the tables |

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../common/args.rs"]
#[allow(dead_code, reason = "other examples use the rest")]
mod args;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../common/guard.rs"]
mod guard;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../common/guest_image/mod.rs"]
mod guest_image;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod memory;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod options;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod report;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod run;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> std::process::ExitCode {
    use options::{Command, HELP, Role};
    use std::process::ExitCode;

    let options = match options::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("error: {wrong}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let outcome = match options.role {
        Role::Guard => guard::run_behind(options::BEHIND_GUARD).map_err(Into::into),
        Role::Behind => run::run(&options).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    eprintln!("qemu_clones is for Linux on x86-64");
}
