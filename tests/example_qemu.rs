//! The example of QEMU clones as a user runs it: its report, and that an interrupt leaves nothing behind.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../examples/common/guest_image/mod.rs"]
mod guest_image;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use offshoot::frontend::qemu::Value;
use offshoot::testing::skip;

use guest_image::{GuestTools, program};

/// Only a hang takes so long.
const LONG: Duration = Duration::from_secs(300);

/// Whether there is what the example needs; otherwise it is said aloud, or is a failure.
fn is_possible() -> bool {
    let missing = match GuestTools::find() {
        Ok(_) if program("qemu-system-x86_64").is_some() => return true,
        Ok(_) => "qemu-system-x86_64 (package qemu-system-x86)".to_owned(),
        Err(missing) => missing.to_string(),
    };
    skip(missing);
    false
}

/// The example, built by cargo in the profile of this test.
fn example(args: &[&str]) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--example", "qemu_clones"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo can be run").success());
    let tests = std::env::current_exe().unwrap();
    let mut command = Command::new(tests.parent().unwrap().with_file_name("examples").join("qemu_clones"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn runs(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// What is in a directory, the consoles left out.
fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_none_or(|extension| extension != "console")).collect()
}

#[test]
fn clones_of_two_generations_are_told_of() {
    if !is_possible() {
        return;
    }
    let output = example(&["--clones", "2", "--generations=2", "--ram", "192M", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = String::from_utf8(output.stdout).unwrap().parse().unwrap();
    let guests = report["guests"].as_array().unwrap();
    let names: Vec<_> = guests.iter().map(|guest| guest["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["parent", "clone-1-1", "clone-1-2", "clone-2-1", "clone-2-2"]);
    for guest in guests {
        let bytes = |key: &str| guest[key].as_u64().unwrap();
        assert!(bytes("ram_resident") > bytes("ram_proportional"), "it shares: {guest}");
        assert!(bytes("ram_private") > 0 && bytes("own_proportional") > 0, "{guest}");
        until("the process has ended", || !runs(bytes("pid")));
        assert!(!Path::new(guest["agent"].as_str().unwrap()).exists(), "its socket is left");
    }
    let stages = report["stages"].as_array().unwrap();
    let count = |name: &str| stages.iter().find(|stage| stage["stage"] == name).map(|stage| stage["n"].as_u64());
    for (name, n) in [("boot", 1), ("fork_cut", 2), ("fork_gather", 1), ("clone", 4), ("first_answer", 4)] {
        assert_eq!(count(name), Some(Some(n)), "{name}: {stages:?}");
    }
    for stage in stages {
        let [p50, p99, max] = ["p50_us", "p99_us", "max_us"].map(|key| stage[key].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{stage}");
    }
}

/// The example in a directory of its own, killed if the test fails.
struct Kept {
    child: Child,
    dir: PathBuf,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It may have ended, and the directory may be gone.
        let _killed = self.child.kill();
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

fn interrupted(name: &str, when: impl FnOnce(&mut Kept) -> Vec<u64>) {
    let dir = std::env::temp_dir().join(format!("qemu-test-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let args = ["--clones", "2", "--ram", "192M", "--keep", "--json", "--dir", dir.to_str().unwrap()];
    let mut kept = Kept { child: example(&args).spawn().unwrap(), dir };
    let processes = when(&mut kept);
    let pid = kept.child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    const SIGINT: i32 = 2;
    assert_eq!(kept.child.wait().unwrap().signal(), Some(SIGINT));
    until("the processes have ended", || !processes.iter().any(|pid| runs(*pid)));
    until("sockets and files are gone", || leftovers(&kept.dir).is_empty());
}

#[test]
fn an_interrupt_ends_clones_that_were_kept_and_leaves_only_their_consoles() {
    if !is_possible() {
        return;
    }
    interrupted("kept", |kept| {
        let mut line = String::new();
        BufReader::new(kept.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let report: Value = line.parse().unwrap();
        let processes: Vec<_> =
            report["guests"].as_array().unwrap().iter().map(|guest| guest["pid"].as_u64().unwrap()).collect();
        assert!(processes.len() == 3 && processes.iter().all(|pid| runs(*pid)), "{processes:?}");
        assert!(!leftovers(&kept.dir).is_empty(), "there is nothing to clean up");
        processes
    });
}

#[test]
fn an_interrupt_in_the_middle_of_a_boot_leaves_nothing() {
    if !is_possible() {
        return;
    }
    interrupted("booting", |kept| {
        let console = kept.dir.join("parent.console");
        until("the parent is started", || console.exists());
        Vec::new()
    });
}

#[test]
fn what_is_missing_is_named() {
    if program("qemu-system-x86_64").is_none() {
        return;
    }
    let output = example(&["--disk", "no/such.img"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("no/such.img"), "{said}");
}
