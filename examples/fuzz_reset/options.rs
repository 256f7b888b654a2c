//! What the command line says.

use std::ffi::OsString;

use offshoot::page::ByteSize;

use crate::common::args::{Args, Backend, Fault, Output};
use crate::guest::LEAST_RAM;

pub const HELP: &str = "\
Runs a parser in a virtual machine on one input after the other, and resets the machine in place in between.

Usage: fuzz_reset [options]

  --backend kvm|sim  what executes the guest; KVM where /dev/kvm works, else a RISC-V simulator
  --inputs N         how many inputs (default 2000)
  --ram SIZE         RAM of the guest, such as 64M or 1G (default 64M)
  --check full       compare RAM, disk and registers with the fork point after every reset, not only every 64th
  --seed N           the inputs follow from it (default 1)
  --json             print the report as one JSON object
  --help             print this

Exits with 0 if the planted bug was found and nothing was wrong, with 1 if not or if something failed, with 2 for bad options.";

/// The options of one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    pub backend: Option<Backend>,
    pub inputs: u32,
    pub ram: ByteSize,
    /// Every so many resets all is compared.
    pub check_every: u32,
    pub seed: u64,
    pub output: Output,
    pub fault: Fault,
}

impl Default for Options {
    fn default() -> Self {
        let (ram, output, fault) = (ByteSize::mib(64), Output::Text, Fault::None);
        Self { backend: None, inputs: 2000, ram, check_every: 64, seed: 1, output, fault }
    }
}

/// What the user wants.
#[derive(Debug)]
pub enum Command {
    Run(Options),
    Help,
}

/// Reads the command line, without the program's name. An error says what is wrong with it.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let mut options = Options::default();
    let mut args = Args::new(args);
    while let Some(name) = args.next_name()? {
        match name.as_str() {
            "--help" | "-h" => return args.flag().map(|()| Command::Help),
            "--json" => args.flag().map(|()| options.output = Output::Json)?,
            "--inject-fault" => args.flag().map(|()| options.fault = Fault::FlipOneByte)?,
            "--backend" => options.backend = Some(args.backend()?),
            "--inputs" => options.inputs = args.number(1, 100_000_000)? as u32,
            "--ram" => options.ram = args.size(LEAST_RAM, ByteSize::gib(4))?,
            "--seed" => options.seed = args.number(0, u64::MAX)?,
            "--check" => match args.value()?.as_str() {
                "full" => options.check_every = 1,
                "sampled" => options.check_every = Options::default().check_every,
                other => return Err(format!("--check {other}: full or sampled")),
            },
            _ => return Err(format!("there is no option {name}")),
        }
    }
    Ok(Command::Run(options))
}
