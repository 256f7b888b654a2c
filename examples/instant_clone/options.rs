//! What the command line says.

use std::ffi::OsString;

use offshoot::page::ByteSize;

use crate::check::Coverage;
use crate::common::args::{Args, Backend, Fault, Output};
use crate::guest::{LEAST_RAM, MAX_LANES};

pub const HELP: &str = "\
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
    pub backend: Option<Backend>,
    pub ram: ByteSize,
    pub clones: u32,
    pub depth: u32,
    pub vcpus: u32,
    pub coverage: Coverage,
    pub seed: u64,
    pub output: Output,
    pub fault: Fault,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: None,
            ram: ByteSize::gib(1),
            clones: 1000,
            depth: 3,
            vcpus: 1,
            coverage: Coverage::Written,
            seed: 1,
            output: Output::Text,
            fault: Fault::None,
        }
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
            "--ram" => options.ram = args.size(LEAST_RAM, ByteSize::gib(1024))?,
            "--clones" => options.clones = args.number(1, 100_000)? as u32,
            "--depth" => options.depth = args.number(1, 1000)? as u32,
            "--vcpus" => options.vcpus = args.number(1, MAX_LANES.into())? as u32,
            "--seed" => options.seed = args.number(0, u64::MAX)?,
            "--check" => match args.value()?.as_str() {
                "full" => options.coverage = Coverage::Full,
                "written" => options.coverage = Coverage::Written,
                other => return Err(format!("--check {other}: full or written")),
            },
            _ => return Err(format!("there is no option {name}")),
        }
    }
    Ok(Command::Run(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn good_lines_are_understood() {
        let Ok(Command::Run(options)) = parsed("--ram 512M --clones=7 --check full --json --backend sim --seed 0")
        else {
            panic!("not understood")
        };
        let expected = Options {
            backend: Some(Backend::Sim),
            ram: ByteSize::mib(512),
            clones: 7,
            coverage: Coverage::Full,
            seed: 0,
            output: Output::Json,
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
