//! What the tests of image formats stand on: a directory that goes away, the tools, and random sparse content.

#![allow(dead_code, reason = "each test that includes this file uses some of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

use offshoot::image::Source;
use offshoot::page::ByteOffset;
use offshoot::testing::Dice;

/// A directory of this test's own, removed when it ends.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("offshoot-formats-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        Self(dir)
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Unfinished files that are lying about.
    pub fn parts(&self) -> usize {
        let entries = std::fs::read_dir(&self.0).expect("the directory").flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".part")).count()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether the tools are here. Says so where they are not, and fails where that is a failure.
pub fn tools() -> bool {
    let here = |tool| Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if here("qemu-img") && here("qemu-io") {
        return true;
    }
    let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "OFFSHOOT_REQUIRE=all, but qemu-img or qemu-io (package qemu-utils) is missing");
    println!("skipped: qemu-img or qemu-io (package qemu-utils) is missing");
    false
}

fn run(scratch: &Scratch, tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).current_dir(scratch.dir()).output().expect("the tool runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {text}{errors}");
    text
}

pub fn qemu_img(scratch: &Scratch, args: &[&str]) -> String {
    run(scratch, "qemu-img", args)
}

/// Runs commands on a qcow2 file. A pattern that is not there is a failure.
pub fn qemu_io(scratch: &Scratch, image: &str, commands: &[&str]) {
    qemu_io_on(scratch, "qcow2", image, commands);
}

/// The same, on a file of this format.
pub fn qemu_io_on(scratch: &Scratch, format: &str, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(image);
    let text = run(scratch, "qemu-io", &args);
    assert!(!text.contains("failed"), "{commands:?}: {text}");
    let done = commands.iter().filter(|command| !command.starts_with("discard")).count();
    assert!(text.matches("ops;").count() >= done, "{commands:?}: {text}");
}

pub fn dice() -> Dice {
    let seed = std::env::var("OFFSHOOT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20261122);
    println!("OFFSHOOT_SEED={seed}");
    Dice::new(seed)
}

/// Disks of random runs of data, repeated bytes and zeroes, at all alignments.
pub struct Content(Dice);

impl Content {
    pub fn new() -> Self {
        Self(dice())
    }

    pub fn sparse(&mut self, len: u64) -> Vec<u8> {
        let dice = &mut self.0;
        let mut disk = vec![0; len as usize];
        let mut at = 0;
        while at < len {
            let most = [700, 5000, 70_000, 600_000][dice.below(4) as usize];
            let run = (1 + dice.below(most)).min(len - at);
            let range = at as usize..(at + run) as usize;
            match dice.below(4) {
                0 => disk[range].copy_from_slice(&dice.bytes(run)),
                // Compresses well.
                1 => disk[range].fill(dice.below(256) as u8),
                _ => {}
            }
            at += run;
        }
        disk
    }
}

pub fn image_bytes(image: &dyn Source) -> Vec<u8> {
    let mut bytes = vec![0; image.len().get() as usize];
    image.read(ByteOffset::ZERO, &mut bytes).expect("it can be read");
    bytes
}
