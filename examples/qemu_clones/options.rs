//! What the command line says.

use std::ffi::OsString;
use std::path::PathBuf;

use offshoot::frontend::qemu::Accelerator;
use offshoot::page::ByteSize;

use crate::args::{Args, Output};
use crate::guest_image::READY;

pub const HELP: &str = "\
Boots a Linux guest in QEMU once, and forks it into running clones.

Usage: qemu_clones [options]

  --clones N        clones of each generation (default 4)
  --generations N   how often the first clone is forked again (default 1: not at all)
  --ram SIZE        RAM of each guest (default 256M)
  --vcpus N         processors of each guest (default 2: with one, QEMU's translator before 8.1 may lose a device's notification)
  --accel tcg|kvm   what executes the guests (default tcg, which works everywhere)
  --dir DIR         where consoles and sockets go (default: a new directory in the system's temporary one)
  --keep            leave the clones running until Ctrl-C
  --json            print the report as one JSON object

A guest of your own, instead of one made of Debian's kernel and busybox:
  --kernel FILE     the kernel
  --initrd FILE     its initial RAM file system
  --append TEXT     its command line
  --disk FILE       a raw disk image, which is only read
  --ready TEXT      what it says on its serial console when it is to be forked (default: login:)

Exits with 0 if all clones ran, with 1 if something failed, with 2 for bad options. Needs qemu-system-x86_64, and for the guest of its own a kernel
with its modules, busybox, a C compiler and mke2fs:

  apt install qemu-system-x86 linux-image-amd64 busybox-static gcc e2fsprogs";

/// Given to the process that does the work: not in the help.
pub const BEHIND_GUARD: &str = "--behind-guard";

/// Which of the two processes this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The one that Ctrl-C ends.
    Guard,
    /// The one that does the work, and ends when the other has.
    Behind,
}

/// What becomes of the clones when all is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Afterwards {
    End,
    Keep,
}

/// A guest of the user's own.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct OwnGuest {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub append: Option<String>,
    pub disk: Option<PathBuf>,
    pub ready: Option<String>,
}

impl OwnGuest {
    /// Whether there is one.
    pub fn is_given(&self) -> bool {
        self.kernel.is_some() || self.disk.is_some()
    }

    /// What a guest says when it is to be forked.
    pub fn ready(&self) -> &str {
        self.ready.as_deref().unwrap_or(if self.is_given() { "login:" } else { READY })
    }
}

/// The options of one run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    pub clones: u32,
    pub generations: u32,
    pub ram: ByteSize,
    pub vcpus: u32,
    pub accelerator: Accelerator,
    pub dir: Option<PathBuf>,
    pub own: OwnGuest,
    pub afterwards: Afterwards,
    pub output: Output,
    pub role: Role,
}

/// What the user wants.
#[derive(Debug)]
pub enum Command {
    Run(Options),
    Help,
}

/// Reads the command line, without the program's name. An error says what is wrong with it.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let mut options = Options {
        clones: 4,
        generations: 1,
        ram: ByteSize::mib(256),
        vcpus: 2,
        accelerator: Accelerator::Tcg,
        dir: None,
        own: OwnGuest::default(),
        afterwards: Afterwards::End,
        output: Output::Text,
        role: Role::Guard,
    };
    let mut args = Args::new(args);
    while let Some(name) = args.next_name()? {
        match name.as_str() {
            "--help" | "-h" => return args.flag().map(|()| Command::Help),
            "--clones" => options.clones = args.number(1, 1000)? as u32,
            "--generations" => options.generations = args.number(1, 100)? as u32,
            "--ram" => options.ram = args.size(ByteSize::mib(64), ByteSize::gib(64))?,
            "--vcpus" => options.vcpus = args.number(1, 64)? as u32,
            "--accel" => match args.value()?.as_str() {
                "tcg" => options.accelerator = Accelerator::Tcg,
                "kvm" => options.accelerator = Accelerator::Kvm,
                other => return Err(format!("--accel {other}: tcg or kvm")),
            },
            "--dir" => options.dir = Some(args.value()?.into()),
            "--kernel" => options.own.kernel = Some(args.value()?.into()),
            "--initrd" => options.own.initrd = Some(args.value()?.into()),
            "--append" => options.own.append = Some(args.value()?),
            "--disk" => options.own.disk = Some(args.value()?.into()),
            "--ready" => options.own.ready = Some(args.value()?),
            "--keep" => args.flag().map(|()| options.afterwards = Afterwards::Keep)?,
            "--json" => args.flag().map(|()| options.output = Output::Json)?,
            BEHIND_GUARD => args.flag().map(|()| options.role = Role::Behind)?,
            _ => return Err(format!("there is no option {name}")),
        }
    }
    let own = &options.own;
    if own.kernel.is_none() && (own.initrd.is_some() || own.append.is_some()) {
        return Err("--initrd and --append go with --kernel".into());
    }
    if !own.is_given() && own.ready.is_some() {
        return Err("--ready goes with --kernel or --disk".into());
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
        let Ok(Command::Run(options)) = parsed("--clones=20 --ram 512M --generations 3 --kernel k --append a=b --json")
        else {
            panic!("not understood")
        };
        assert_eq!((options.clones, options.generations, options.ram), (20, 3, ByteSize::mib(512)));
        assert_eq!((options.own.ready(), options.own.append.as_deref()), ("login:", Some("a=b")));
        assert_eq!((options.output, options.role), (Output::Json, Role::Guard));
        assert!(matches!(parsed("--help"), Ok(Command::Help)));
    }

    #[test]
    fn bad_lines_are_refused() {
        for line in
            ["--clones 0", "--clones", "--ram 1M", "--accel xen", "--initrd i", "--ready x", "--what", "--keep=1"]
        {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
