//! Random 4 KiB requests through NBD: a clone's disk, against qemu-nbd on a qcow2 overlay and nbdkit on a raw file.
//!
//! One client for all, small and pipelined, so that what differs is the server: fio spends more on a request than any of them. Files of the
//! others lie in memory where the system has a folder for that; an overlay there is as warm as ours.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use offshoot::backing::Heap;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteSize, Lba, PageSize, SECTOR_SIZE, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::{CloneSpec, DiskName, Vm, VmName};

use self::client::{Client, OPT_GO, READ, WRITE, info_request, request_bytes};
use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{Idle, PAGE, needs_memory, tree};

#[path = "../../examples/nbd_clones/client.rs"]
mod client;

/// Requests of one sample.
const REQUESTS: usize = 2000;
/// How long another server may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn requests(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::mib(512));
    needs_memory(ByteSize::new(4 * len.get()))?;
    let dir = Folder::new()?;
    let (_clones, _server) = ours(&dir.0, len)?;
    let theirs = [qemu_nbd(&dir.0, len), nbdkit(&dir.0, len)];
    for (kind, verb) in [(READ, "read"), (WRITE, "write")] {
        for depth in [1, 16] {
            let mut round = Round::new(effort);
            let mut probe = |socket: PathBuf, export: &'static str| -> Outcome {
                let mut pump = Pump::connect(&socket, export, len)?;
                round.probe(move || pump.run(kind, depth).expect("a server that answers"));
                Ok(())
            };
            probe(dir.0.join("ours"), "clone")?;
            for other in theirs.iter().flatten() {
                probe(other.socket.clone(), "")?;
            }
            let stats = round.run_all();
            let mut others = stats[1..].iter();
            for other in &theirs {
                let case = format!("{verb}, {depth} in flight");
                match other {
                    Ok(other) => report.row(&Row {
                        case,
                        unit: Unit::Microseconds,
                        stats: stats[0],
                        baseline: Some(Baseline::new(other.name, *others.next().expect("one for each"))),
                        goal: Goal::Ratio(other.goal),
                    }),
                    Err(missing) => report.row(&Row {
                        case: format!("{case} ({})", missing.reason),
                        unit: Unit::Microseconds,
                        stats: stats[0],
                        baseline: None,
                        goal: Goal::None,
                    }),
                }
            }
        }
    }
    Ok(())
}

/// A folder that goes with its value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Skip> {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = parent.join(format!("offshoot-nbd-figure-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.0);
    }
}

/// A clone of a full disk, half of it its own, as an export.
fn ours(dir: &Path, len: ByteSize) -> Result<(Vec<Vm<Heap>>, Server), Skip> {
    let tree = tree();
    let disk = Disk::blank(&tree, SectorCount::new(len.get() / SECTOR_SIZE), Access::ReadWrite)?;
    let piece = vec![0x77; 1 << 20];
    let at = |offset: u64| Lba::new(offset / SECTOR_SIZE);
    (0..len.get()).step_by(piece.len()).try_for_each(|offset| disk.write(at(offset), &piece))?;
    let ram = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4)?;
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent")?, ram, vec![(DiskName::new("root"), disk)])?;
    vm.start()?;
    let clone = vm.fork(&mut Idle)?.spawn(CloneSpec::default())?;
    let disk = clone.disk("root").expect("the parent's disk").clone();
    (0..len.get()).step_by(2 * piece.len()).try_for_each(|offset| disk.write(at(offset), &piece))?;
    let server = Server::start(&[Endpoint::unix(dir.join("ours"))], ServerLimits::default())?;
    server.add(ExportName::new("clone")?, Export::new(disk))?;
    Ok((vec![vm, clone], server))
}

/// Somebody else's server; killed with the value.
struct Theirs {
    name: &'static str,
    /// Ours in its time, at most.
    goal: f64,
    socket: PathBuf,
    process: Child,
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn raw_file(path: &Path, len: ByteSize) -> Result<(), Skip> {
    let mut file = File::create(path)?;
    let piece = vec![0x77; 1 << 20];
    (0..len.get()).step_by(piece.len()).try_for_each(|_| file.write_all(&piece))?;
    Ok(())
}

fn run(tool: &'static str, args: &[&str]) -> Outcome {
    let done = Command::new(tool).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match done {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Skip::new(format!("{tool}: {status}"))),
        Err(_) => Err(Skip::new(format!("{tool} is missing"))),
    }
}

fn start(name: &'static str, goal: f64, socket: PathBuf, tool: &str, args: &[&str]) -> Result<Theirs, Skip> {
    let process = Command::new(tool).args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let process = process.map_err(|_| Skip::new(format!("{tool} is missing")))?;
    let theirs = Theirs { name, goal, socket, process };
    let begun = Instant::now();
    while UnixStream::connect(&theirs.socket).is_err() {
        if begun.elapsed() > PATIENCE {
            return Err(Skip::new(format!("{tool} does not listen")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(theirs)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of plain letters")
}

/// An overlay of which half is written, like ours.
fn qemu_nbd(dir: &Path, len: ByteSize) -> Result<Theirs, Skip> {
    let (base, overlay, socket) = (dir.join("base.raw"), dir.join("overlay.qcow2"), dir.join("qemu"));
    raw_file(&base, len)?;
    run("qemu-img", &["create", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&overlay)])?;
    let mut writes = Vec::new();
    for mib in (0..len.get() >> 20).step_by(2) {
        writes.extend(["-c".to_string(), format!("write -q -P 0x77 {mib}M 1M")]);
    }
    writes.push(text(&overlay).into());
    run("qemu-io", &writes.iter().map(String::as_str).collect::<Vec<_>>())?;
    let args = ["-t", "-e", "16", "-f", "qcow2", "--cache=writeback", "-k", text(&socket), text(&overlay)];
    // 1.5 times its speed.
    start("qemu-nbd, qcow2 overlay", 0.667, socket.clone(), "qemu-nbd", &args)
}

fn nbdkit(dir: &Path, len: ByteSize) -> Result<Theirs, Skip> {
    let (file, socket) = (dir.join("kit.raw"), dir.join("nbdkit"));
    raw_file(&file, len)?;
    // 0.9 times its speed.
    start("nbdkit, raw file", 1.11, socket.clone(), "nbdkit", &["-f", "-U", text(&socket), "file", text(&file)])
}

/// A client that keeps so many requests of one page in flight, and spends as little as it can on each.
struct Pump {
    stream: UnixStream,
    random: Random,
    pages: u64,
    input: Vec<u8>,
}

impl Pump {
    fn connect(socket: &Path, export: &str, len: ByteSize) -> Result<Self, Skip> {
        let mut client = Client::connect(socket)?;
        // Simple replies: as short as replies are, from every server.
        let told = client.option(OPT_GO, &info_request(export, &[]))?;
        if told.last().is_none_or(|(kind, _)| kind >> 31 == 1) {
            return Err(Skip::new("a server has no such export"));
        }
        let client::Stream::Unix(stream) = client.into_stream() else { return Err(Skip::new("not a Unix socket")) };
        Ok(Self { stream, random: Random::new(31), pages: len.get() / PAGE, input: vec![0; 1 << 17] })
    }

    /// Mean time of a request, in nanoseconds.
    fn run(&mut self, kind: u16, depth: usize) -> std::io::Result<f64> {
        let (time, done) = timed(|| self.pump(kind, depth));
        done.map(|()| time / REQUESTS as f64)
    }

    fn pump(&mut self, kind: u16, depth: usize) -> std::io::Result<()> {
        let reply = if kind == READ { 16 + PAGE as usize } else { 16 };
        let payload = [0x5a; PAGE as usize];
        let (mut sent, mut received, mut held) = (0, 0, 0);
        let mut output = Vec::with_capacity(depth * (28 + payload.len()));
        while received < REQUESTS {
            output.clear();
            while sent < REQUESTS && sent - received < depth {
                let offset = self.random.next() % self.pages * PAGE;
                output.extend(request_bytes(0, kind, sent as u64, offset, PAGE as u32));
                if kind == WRITE {
                    output.extend_from_slice(&payload);
                }
                sent += 1;
            }
            self.stream.write_all(&output)?;
            while held < reply {
                match self.stream.read(&mut self.input[held..])? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    read => held += read,
                }
            }
            let whole = held / reply;
            for reply in self.input[..whole * reply].chunks_exact(reply) {
                assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a request has failed");
            }
            received += whole;
            self.input.copy_within(whole * reply..held, 0);
            held -= whole * reply;
        }
        Ok(())
    }
}
