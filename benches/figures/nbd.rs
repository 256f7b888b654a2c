//! Random 4 KiB requests through NBD: a clone's durable disk, against qemu-nbd on a qcow2 overlay and nbdkit on a raw file.
//!
//! One client for all, small and pipelined, so that what differs is the server: fio spends more on a request than any of them. All files are
//! in the same place, and in the system's cache.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteOffset, ByteSize, SECTOR_SIZE, SectorCount};
use offshoot::store::{DiskDir, Durable};

use self::client::{Client, OPT_GO, READ, WRITE, info_request, request_bytes};
use super::options::Effort;
use super::place::{Place, everywhere};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{PAGE, geometry, needs_memory, tree};
use super::tools;

#[path = "../../examples/nbd_clones/client.rs"]
mod client;

/// Requests of one sample.
const REQUESTS: usize = 2000;

pub fn requests(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, requests_in)
}

fn requests_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::mib(512));
    needs_memory(ByteSize::new(5 * len.get()))?;
    let dir = place.path();
    let _server = ours(dir, len)?;
    let theirs = [qemu_nbd(dir, len), nbdkit(dir, len)];
    for (kind, verb) in [(READ, "read"), (WRITE, "write")] {
        for depth in [1, 16] {
            let mut round = Round::new(effort);
            let mut probe = |socket: &Path, export: &'static str| -> Outcome {
                let mut pump = Pump::connect(socket, export, len)?;
                round.probe(move || pump.run(kind, depth).expect("a server that answers"));
                Ok(())
            };
            probe(&dir.join("ours"), "clone")?;
            for other in theirs.iter().flatten() {
                probe(&other.server.socket, "")?;
            }
            let stats = round.run_all();
            let mut others = stats[1..].iter();
            for other in &theirs {
                let case = format!("{}: {verb}, {depth} in flight", place.name);
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

/// A clone of a full durable disk, half of it its own, as an export.
fn ours(dir: &Path, len: ByteSize) -> Result<Server, Skip> {
    let parent = DiskDir::open(dir, &tree())?.create(geometry(len)?, None)?;
    write_mebibytes(&parent, len, 1)?;
    let clone = parent.cut()?.commit().0.spawn()?;
    write_mebibytes(&clone, len, 2)?;
    clone.flush()?;
    let disk = Disk::over(clone, SectorCount::new(len.get() / SECTOR_SIZE), Access::ReadWrite)?;
    let server = Server::start(&[Endpoint::unix(dir.join("ours"))], ServerLimits::default())?;
    server.add(ExportName::new("clone")?, Export::new(disk.into()))?;
    Ok(server)
}

/// Writes every n-th of its mebibytes.
fn write_mebibytes(disk: &Durable, len: ByteSize, every: usize) -> Outcome {
    let piece = vec![0x77; 1 << 20];
    let mut offsets = (0..len.get()).step_by(every * piece.len());
    Ok(offsets.try_for_each(|offset| disk.write(ByteOffset::new(offset), &piece))?)
}

/// Somebody else's server.
struct Theirs {
    name: &'static str,
    /// Ours in its time, at most.
    goal: f64,
    server: tools::Server,
}

fn raw_file(path: &Path, len: ByteSize) -> Result<(), Skip> {
    let mut file = File::create(path)?;
    let piece = vec![0x77; 1 << 20];
    (0..len.get()).step_by(piece.len()).try_for_each(|_| file.write_all(&piece))?;
    Ok(file.sync_all()?)
}

/// An overlay of which half is written, like ours.
fn qemu_nbd(dir: &Path, len: ByteSize) -> Result<Theirs, Skip> {
    use tools::text;
    let (base, overlay, socket) = (dir.join("base.raw"), dir.join("overlay.qcow2"), dir.join("qemu"));
    raw_file(&base, len)?;
    tools::qcow2_over(&overlay, &base, "raw")?;
    let mut writes = Vec::new();
    for mib in (0..len.get() >> 20).step_by(2) {
        writes.extend(["-c".to_string(), format!("write -q -P 0x77 {mib}M 1M")]);
    }
    writes.push(text(&overlay).into());
    tools::run("qemu-io", &writes.iter().map(String::as_str).collect::<Vec<_>>())?;
    let args = ["-t", "-e", "16", "-f", "qcow2", "--cache=writeback", "-k", text(&socket), text(&overlay)];
    let server = tools::Server::start(socket.clone(), "qemu-nbd", &args)?;
    // 1.5 times its speed.
    Ok(Theirs { name: "qemu-nbd, qcow2 overlay", goal: 0.667, server })
}

fn nbdkit(dir: &Path, len: ByteSize) -> Result<Theirs, Skip> {
    use tools::text;
    let (file, socket) = (dir.join("kit.raw"), dir.join("nbdkit"));
    raw_file(&file, len)?;
    let args = ["-f", "-U", text(&socket), "file", text(&file)];
    let server = tools::Server::start(socket.clone(), "nbdkit", &args)?;
    // 0.9 times its speed.
    Ok(Theirs { name: "nbdkit, raw file", goal: 1.11, server })
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
