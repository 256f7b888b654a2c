//! Running other people's clients: whether they are here, and what they said.

#![allow(dead_code, reason = "each test that includes this file uses some of it")]

use std::path::Path;
use std::process::{Command, Output};

/// Where programs are: mke2fs is in a folder that not everybody searches. The system's own come first: nbdsh needs the system's Python.
pub fn path() -> String {
    format!("/usr/bin:{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Whether all of these are installed; loud where not.
pub fn have(tools: &[&str]) -> bool {
    let path = path();
    let found = |tool: &&&str| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    let missing: Vec<_> = tools.iter().filter(|tool| !found(tool)).collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "OFFSHOOT_REQUIRE=all, but these are missing: {missing:?}");
    eprintln!("SKIPPED: {missing:?} missing");
    false
}

/// Runs a tool that must go well; returns what it printed.
#[track_caller]
pub fn run(tool: &str, args: &[&str]) -> String {
    said(Command::new(tool).env("PATH", path()).args(args))
}

/// fio on an export, in `dir`, because it leaves files where it runs.
#[track_caller]
pub fn fio(dir: &Path, uri: &str, name: &str, more: &[&str]) -> String {
    let (uri, name) = (format!("--uri={uri}"), format!("--name={name}"));
    let mut command = Command::new("fio");
    command.env("PATH", path()).current_dir(dir);
    command.args(["--ioengine=nbd", &uri, &name, "--thread", "--group_reporting", "--verify_fatal=1"]);
    said(command.args(more))
}

#[track_caller]
fn said(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{out}\n{errors}");
    out.into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of plain letters")
}
