//! What the command line says.

use std::ffi::OsString;

use offshoot::page::ByteSize;

use crate::common::args::Args;
use crate::common::program::{self, Common};
use crate::guest::LEAST_RAM;

const HELP: &str = "\
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
    pub common: Common,
    pub inputs: u32,
    pub ram: ByteSize,
    /// Every so many resets all is compared.
    pub check_every: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { common: Common::default(), inputs: 2000, ram: ByteSize::mib(64), check_every: 64 }
    }
}

impl program::Options for Options {
    const HELP: &'static str = HELP;

    fn common(&mut self) -> &mut Common {
        &mut self.common
    }

    fn read(&mut self, name: &str, args: &mut Args<impl Iterator<Item = OsString>>) -> Result<(), String> {
        match name {
            "--inputs" => self.inputs = args.number(1, 100_000_000)? as u32,
            "--ram" => self.ram = args.size(LEAST_RAM, ByteSize::gib(4))?,
            "--check" => match args.value()?.as_str() {
                "full" => self.check_every = 1,
                "sampled" => self.check_every = Self::default().check_every,
                other => return Err(format!("--check {other}: full or sampled")),
            },
            _ => return args.unknown(),
        }
        Ok(())
    }
}
