//! Ctrl-C ends a process at once, and only unsafe code can have it otherwise. So an example that has something to clean up runs in a process that
//! Ctrl-C does not reach, and ends when its standard input does: when the guard is gone, by whatever way.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// Runs this program again with this argument added, in a process of its own that Ctrl-C does not reach, and waits for it.
pub fn run_behind(argument: &str) -> io::Result<ExitCode> {
    let mut behind = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg(argument)
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()?;
    // Waiting would close the input, which is to stay open for as long as this process lives.
    let _open = behind.stdin.take();
    let status = behind.wait()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Behind a guard: returns when the guard is gone.
pub fn until_alone() -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
