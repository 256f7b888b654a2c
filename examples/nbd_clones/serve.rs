//! The example itself: options, the clones, the server, and the check.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use offshoot::backing::{FileImage, Heap};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{DIRTY_BITMAP, Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteSize, PageSize, SECTOR_SIZE, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::{AtRest, CloneSpec, DeviceState, DiskName, ForkPoint, Tree, Vm, VmName};

use crate::client::{BLOCK_STATUS, Chunk, Client};
use crate::guard;

/// The disk of those who have no image.
pub const BLANK: ByteSize = ByteSize::mib(64);
/// What a check writes to each clone.
pub const BLOCK: u32 = 64 << 10;

const USAGE: &str = "usage: nbd_clones [--image FILE] [--clones N] [--store DIR] [--socket PATH] [--check | --until-eof]
  --image FILE   the raw image that all clones begin with; without it, 64 MiB of zeroes
  --clones N     how many (4)
  --store DIR    keep the clones in this directory: they are there again when it is next served (feature `store`)
  --socket PATH  where to listen (nbd_clones.sock)
  --check        write distinct data to every clone over NBD, verify all of them and the image, and exit; with --store, kill the
                 server in between. It writes to clones that are there: not for a store that is in use
  --until-eof    end when standard input does, for scripts; otherwise at Ctrl-C";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    Interrupted,
    EndOfInput,
    Checked,
}

struct Options {
    image: Option<PathBuf>,
    clones: u32,
    store: Option<PathBuf>,
    socket: PathBuf,
    until: Until,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let socket = "nbd_clones.sock".into();
        let mut options = Self { image: None, clones: 4, store: None, socket, until: Until::Interrupted };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--image" => options.image = Some(value()?.into()),
                "--clones" => options.clones = value()?.parse().map_err(|e| format!("--clones: {e}"))?,
                "--store" => options.store = Some(value()?.into()),
                "--socket" => options.socket = value()?.into(),
                "--check" | "--once" => options.until = Until::Checked,
                "--until-eof" => options.until = Until::EndOfInput,
                _ => return Err(format!("not understood: {arg}")),
            }
        }
        Ok(options)
    }
}

pub fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let outcome = match options.until {
        Until::Interrupted => guard::run_behind("--until-eof").map_err(Into::into),
        Until::EndOfInput | Until::Checked => run(&options).map(|()| ExitCode::SUCCESS),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nbd_clones: {error}");
            ExitCode::FAILURE
        }
    }
}

pub fn name(clone: u32) -> String {
    format!("clone-{clone}")
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    match &options.store {
        None => {
            // A clone lives for as long as somebody has it; its disk is what the server has.
            let point = template(options.image.as_deref())?;
            let spawn = |_| point.spawn(CloneSpec::default());
            let clones = (0..options.clones).map(spawn).collect::<Result<Vec<_>, _>>()?;
            let export = |clone: &Vm<Heap>| {
                let disk = clone.disk("root").expect("the template has one");
                Export::new(disk.clone()).described(format!("disk of {}", clone.identity().name))
            };
            serve(options, clones.iter().map(export).collect::<Result<Vec<_>, _>>()?)
        }
        #[cfg(feature = "store")]
        Some(dir) => {
            let image = options.image.as_deref();
            if options.until == Until::Checked {
                return crate::durable::check(dir, image, options.clones, &options.socket);
            }
            serve(options, crate::durable::exports(dir, image, options.clones)?)
        }
        #[cfg(not(feature = "store"))]
        Some(_) => Err("--store needs feature `store`".into()),
    }
}

fn serve(options: &Options, exports: Vec<Export>) -> Result<(), Box<dyn Error>> {
    let server = Server::start(&[Endpoint::unix(&options.socket)], ServerLimits::default())?;
    for (export, number) in exports.into_iter().zip(0..) {
        server.add(ExportName::new(name(number))?, export)?;
    }
    let socket = options.socket.display();
    println!("{} clones of one image, as nbd+unix:///clone-N?socket={socket}", options.clones);
    match options.until {
        Until::Checked => check(&options.socket, options.clones)?,
        Until::EndOfInput | Until::Interrupted => guard::until_alone()?,
    }
    server.shutdown(Duration::from_secs(5));
    if options.until == Until::Checked && options.socket.exists() {
        return Err("the socket file was left behind".into());
    }
    Ok(())
}

/// A VM that never runs, with the image as its disk, frozen: any number of clones begin from it.
fn template(image: Option<&Path>) -> Result<ForkPoint<Heap>, Box<dyn Error>> {
    let tree = Tree::default();
    let disk = match image {
        Some(path) => Disk::over_image(&tree, Arc::new(FileImage::open(path, None)?), Access::ReadWrite)?,
        None => Disk::blank(&tree, SectorCount::new(BLANK.get() / SECTOR_SIZE), Access::ReadWrite)?,
    };
    // The smallest RAM there is: this VM has nothing but a disk.
    let ram = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4)?;
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("template")?, ram, vec![(DiskName::new("root"), disk)])?;
    vm.start()?;
    Ok(vm.freeze(&mut AtRest(DeviceState::from_bytes(Vec::new())))?)
}

/// What no other clone gets.
pub fn block(clone: u32) -> Vec<u8> {
    (0..BLOCK).map(|at| (at % 241) as u8 ^ clone as u8 ^ 0x55).collect()
}

/// Writes to each clone what no other gets, and reads everything back.
fn check(socket: &Path, clones: u32) -> Result<(), Box<dyn Error>> {
    let mut before = Vec::new();
    for clone in 0..clones {
        let mut client = Client::open(socket, &name(clone), &[])?;
        let size = client.size.min(u64::from(BLOCK) * 4);
        before.push(client.read(0, size as u32)?);
        client.write(u64::from(clone % 3) * u64::from(BLOCK), &block(clone))?;
        client.flush()?;
        client.disconnect()?;
    }
    for clone in 0..clones {
        let mut client = Client::open(socket, &name(clone), &[DIRTY_BITMAP])?;
        let at = clone % 3 * BLOCK;
        let mut want = before[clone as usize].clone();
        if want != before[0] {
            return Err(format!("{} did not begin as the others", name(clone)).into());
        }
        want[at as usize..(at + BLOCK) as usize].copy_from_slice(&block(clone));
        if client.read(0, want.len() as u32)? != want {
            return Err(format!("{} does not hold what was written to it", name(clone)).into());
        }
        let status = client.call(0, BLOCK_STATUS, 0, want.len() as u32, &[])?;
        let [Chunk::Status { extents, .. }] = &status.chunks[..] else { return Err("no block status".into()) };
        let dirty: u32 = extents.iter().filter(|(_, flags)| *flags == 1).map(|(len, _)| len).sum();
        if dirty != BLOCK {
            return Err(format!("{} has {dirty} dirty bytes, and {BLOCK} were written", name(clone)).into());
        }
        client.disconnect()?;
    }
    println!("{clones} clones checked: each holds its own data, and nobody else's");
    Ok(())
}
