//! What the command line says.

use std::ffi::OsString;

use offshoot::page::ByteSize;

use crate::check::Coverage;
use crate::common::args::Args;
use crate::common::program::{self, Common};
use crate::guest::{LEAST_RAM, MAX_LANES};

const HELP: &str = "\
Forks a running virtual machine into many running clones, lets them diverge, and checks every one.

Usage: instant_clone [options]

  --backend kvm|sim  what executes the guests; KVM where /dev/kvm works, else a RISC-V simulator
  --ram SIZE         RAM of each VM, such as 512M or 2G (default 1G)
  --clones N         clones made from the one fork of the parent (default 1000)
  --depth N          how deep clones are forked again (default 3; 1: not at all)
  --vcpus N          vCPUs of each VM, 1 to 4 (default 1)
  --check full       compare every page and sector of every VM, not only those that a relative wrote and a sample
  --seed N           what is forked again, sampled and put on the disk follows from it (default 1)
  --json             print the report as one JSON object
  --help             print this

Exits with 0 if every clone held what it must, with 1 if not or if something failed, with 2 for bad options.";

/// The options of one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    pub common: Common,
    pub ram: ByteSize,
    pub clones: u32,
    pub depth: u32,
    pub vcpus: u32,
    pub coverage: Coverage,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            common: Common::default(),
            ram: ByteSize::gib(1),
            clones: 1000,
            depth: 3,
            vcpus: 1,
            coverage: Coverage::Written,
        }
    }
}

impl program::Options for Options {
    const HELP: &'static str = HELP;

    fn common(&mut self) -> &mut Common {
        &mut self.common
    }

    fn read(&mut self, name: &str, args: &mut Args<impl Iterator<Item = OsString>>) -> Result<(), String> {
        match name {
            "--ram" => self.ram = args.size(LEAST_RAM, ByteSize::gib(1024))?,
            "--clones" => self.clones = args.number(1, 100_000)? as u32,
            "--depth" => self.depth = args.number(1, 1000)? as u32,
            "--vcpus" => self.vcpus = args.number(1, MAX_LANES.into())? as u32,
            "--check" => match args.value()?.as_str() {
                "full" => self.coverage = Coverage::Full,
                "written" => self.coverage = Coverage::Written,
                other => return Err(format!("--check {other}: full or written")),
            },
            _ => return args.unknown(),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::args::{Backend, Output};
    use crate::common::program::Command;

    fn parsed(line: &str) -> Result<Command<Options>, String> {
        program::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn good_lines_are_understood() {
        let Ok(Command::Run(options)) = parsed("--ram 512M --clones=7 --check full --json --backend sim --seed 0")
        else {
            panic!("not understood")
        };
        let expected = Options {
            common: Common { backend: Some(Backend::Sim), seed: 0, output: Output::Json, ..Common::default() },
            ram: ByteSize::mib(512),
            clones: 7,
            coverage: Coverage::Full,
            ..Options::default()
        };
        assert_eq!(options, expected);
        assert!(parsed("--ram nonsense --help").is_err() && matches!(parsed("--help"), Ok(Command::Help)));
    }

    #[test]
    fn bad_lines_are_refused() {
        for line in [
            "--ram",
            "--ram 1",
            "--ram 4097K",
            "--ram 2T",
            "--ram 99999999999999999999",
            "--ram 1Gi",
            "--ram -1",
            "--clones 0",
            "--clones x",
            "--clones 100001",
            "--depth 0",
            "--vcpus 5",
            "--backend xen",
            "--check some",
            "--json=yes",
            "extra",
            "--seed",
            "--ram ¼G",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
