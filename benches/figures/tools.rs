//! Other people's programs that figures stand beside: run once, or kept as servers. Must not know what is compared.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::report::{Outcome, Skip};
use super::sample::Stats;

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes between one read of `qemu-img bench` and the next: scattered, and all different for as long as the image has pages.
const PAGES_APART: u64 = 4099 * 4096;
/// The same for writes and clusters.
const CLUSTERS_APART: u64 = 257 * 65536;

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of plain letters")
}

/// Runs a program to its end.
pub fn run(tool: &'static str, args: &[&str]) -> Outcome {
    output(tool, args).map(drop)
}

fn output(tool: &'static str, args: &[&str]) -> Result<String, Skip> {
    let done = Command::new(tool).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output();
    match done {
        Ok(done) if done.status.success() => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        Ok(done) => Err(Skip::new(format!("{tool}: {}", done.status))),
        Err(_) => Err(Skip::new(format!("{tool} is missing"))),
    }
}

/// A qcow2 file over another file; its clusters have 64 KiB.
pub fn qcow2_over(path: &Path, below: &Path, format: &str) -> Outcome {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(below), "-F", format, text(path)])
}

/// Requests of `qemu-img bench`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Requests {
    /// Reads of one page, all over the image.
    Reads(u64),
    /// Writes of one page, each in a cluster of its own.
    Writes(u64),
    /// Writes of whole clusters, one out of so many, from a given one on.
    Clusters { first: u64, every: u64, count: u64 },
}

/// The time of a request to a qcow2 file, one after the other, by QEMU's own measure and in its process: nanoseconds.
pub fn qemu_bench(path: &Path, requests: Requests) -> Result<f64, Skip> {
    let (size, step, first, count) = match requests {
        Requests::Reads(count) => (4096, PAGES_APART, 0, count),
        Requests::Writes(count) => (4096, CLUSTERS_APART, 0, count),
        Requests::Clusters { first, every, count } => (65536, every * 65536, first * 65536, count),
    };
    let [size, step, first, number] = [size, step, first, count].map(|number| number.to_string());
    let mut args = vec!["bench", "-f", "qcow2", "-d", "1", "-s", &size, "-S", &step, "-o", &first, "-c", &number];
    if !matches!(requests, Requests::Reads(_)) {
        args.push("-w");
    }
    args.push(text(path));
    let said = output("qemu-img", &args)?;
    let seconds = said.split("Run completed in ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let seconds: f64 = seconds.ok_or_else(|| Skip::new("qemu-img bench does not tell its time"))?;
    Ok(seconds * 1e9 / count as f64)
}

/// The same thing a few times.
pub fn a_few(mut sample: impl FnMut() -> Result<f64, Skip>) -> Result<Stats, Skip> {
    Ok(Stats::of((0..5).map(|_| sample()).collect::<Result<_, _>>()?))
}

/// A server that listens on a Unix socket; killed with the value.
pub struct Server {
    pub socket: PathBuf,
    process: Child,
}

impl Server {
    pub fn start(socket: PathBuf, tool: &str, args: &[&str]) -> Result<Self, Skip> {
        let process = Command::new(tool).args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = process.map_err(|_| Skip::new(format!("{tool} is missing")))?;
        let server = Self { socket, process };
        let begun = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            if begun.elapsed() > PATIENCE {
                return Err(Skip::new(format!("{tool} does not listen")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}
