//! What the command line says.

use std::ffi::OsString;

use offshoot::page::ByteSize;

use crate::check::Coverage;
use crate::guest::{LEAST_RAM, MAX_LANES, PAGE};

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

/// What executes the guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    Sim,
    Kvm,
}

/// How the report is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    Text,
    Json,
}

/// Whether the run is to fail: not in the help, for testing the check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    FlipOneByte,
}

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
    let mut args = args.map(|arg| arg.into_string().map_err(|arg| format!("{} is not text", arg.display())));
    while let Some(arg) = args.next().transpose()? {
        let (name, attached) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let flag = |attached: &Option<String>| match attached {
            Some(_) => Err(format!("{name} takes no value")),
            None => Ok(()),
        };
        let mut value = || match attached.clone() {
            Some(value) => Ok(value),
            None => args.next().unwrap_or_else(|| Err(format!("{name} needs a value"))),
        };
        match name {
            "--help" | "-h" => return flag(&attached).map(|()| Command::Help),
            "--json" => flag(&attached).map(|()| options.output = Output::Json)?,
            "--inject-fault" => flag(&attached).map(|()| options.fault = Fault::FlipOneByte)?,
            "--backend" => options.backend = Some(backend(&value()?)?),
            "--ram" => options.ram = ram(&value()?)?,
            "--clones" => options.clones = number(name, &value()?, 1, 100_000)? as u32,
            "--depth" => options.depth = number(name, &value()?, 1, 1000)? as u32,
            "--vcpus" => options.vcpus = number(name, &value()?, 1, MAX_LANES.into())? as u32,
            "--seed" => options.seed = number(name, &value()?, 0, u64::MAX)?,
            "--check" => match value()?.as_str() {
                "full" => options.coverage = Coverage::Full,
                "written" => options.coverage = Coverage::Written,
                other => return Err(format!("--check {other}: full or written")),
            },
            _ => return Err(format!("there is no option {arg}")),
        }
    }
    Ok(Command::Run(options))
}

fn backend(name: &str) -> Result<Backend, String> {
    match name {
        "sim" => Ok(Backend::Sim),
        "kvm" => Ok(Backend::Kvm),
        _ => Err(format!("--backend {name}: kvm or sim")),
    }
}

fn number(name: &str, text: &str, least: u64, most: u64) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("{name} {text}: a number from {least} to {most}"))
}

/// A number of bytes, or of KiB, MiB, GiB or TiB with K, M, G or T after it.
fn size(text: &str) -> Option<ByteSize> {
    let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit);
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(ByteSize::new)
}

fn ram(text: &str) -> Result<ByteSize, String> {
    let most = ByteSize::gib(1024);
    let size = size(text).ok_or_else(|| format!("--ram {text}: a size such as 512M or 1G"))?;
    if size < LEAST_RAM || size > most || !size.get().is_multiple_of(PAGE as u64) {
        return Err(format!("--ram {text}: from 4M to 1T, in whole pages of 4K"));
    }
    Ok(size)
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
