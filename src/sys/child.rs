//! A child process that ends when its owner does: started with chosen descriptors, watched by a thread of its own.
//!
//! The kernel's parent-death signal goes off when the *thread* that started the child ends, so the child is started by the thread
//! that reads its standard error and lives exactly as long as it. It is named by a descriptor, which cannot come to mean another process.
//! Must not know what the program is.
#![allow(unsafe_code)] // What a child does between fork and exec is unsafe code by nature.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::{Errno, FdFlags};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};

use super::fault::{Call, check};
use super::wait::wait_readable;

/// How much of what a child says on its standard error is kept: the last of it.
const KEPT: usize = 16 << 10;
/// How long the end of a killed process is waited for that is not our child.
const ADOPTED: Duration = Duration::from_secs(10);

/// A running child, or one that has ended. Dropping it kills the child and waits for it.
pub(crate) struct ChildProcess {
    pid: u32,
    handle: OwnedFd,
    end: Arc<End>,
    keeper: Option<JoinHandle<()>>,
    /// Not a child: there is no keeper that waits for it.
    adopted: bool,
}

/// What is known of the child by its keeper.
#[derive(Default)]
struct End {
    said: Mutex<Vec<u8>>,
    status: Mutex<Option<ExitStatus>>,
}

impl ChildProcess {
    /// Starts a child that has `inherited` open, each under the number that it has here, and nothing on its standard input. About 1 ms.
    ///
    /// # Errors
    /// No such program, or no room for a process, a thread or a descriptor.
    pub(crate) fn start(command: Command, inherited: Vec<OwnedFd>) -> io::Result<Self> {
        check(Call::Spawn)?;
        let end = Arc::new(End::default());
        let (started, starting) = mpsc::sync_channel(1);
        let keeper = {
            let end = end.clone();
            let keep = move || keep(command, inherited, &started, &end);
            thread::Builder::new().name("child-keeper".into()).stack_size(256 << 10).spawn(keep)?
        };
        match starting.recv() {
            Ok(Ok((pid, handle))) => Ok(Self { pid, handle, end, keeper: Some(keeper), adopted: false }),
            Ok(Err(error)) => Err(error),
            Err(mpsc::RecvError) => Err(io::Error::other("the thread that was to start a child has panicked")),
        }
    }

    /// Takes a process that is there already and is nobody's to keep here: its end is noticed, what it says is not known.
    ///
    /// # Errors
    /// No such process.
    pub(crate) fn adopt(pid: u32) -> io::Result<Self> {
        check(Call::Spawn)?;
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        let handle = pidfd_open(raw, PidfdFlags::empty())?;
        Ok(Self { pid, handle, end: Arc::default(), keeper: None, adopted: true })
    }

    /// Its number, which means it as long as this lives and it has not been waited for.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that can be read once it has ended.
    pub(crate) fn handle(&self) -> &OwnedFd {
        &self.handle
    }

    /// Waits for its end, `patience` at most; says whether it has ended.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<bool> {
        Ok(wait_readable(&[self.handle.as_fd()], Some(patience))?[0])
    }

    /// The last 16 KiB that it said on its standard error.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&self.end.said.lock()).into_owned()
    }

    /// How it ended, once that is known.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        *self.end.status.lock()
    }

    /// Kills it and waits until nothing of it is left: no mapping, no descriptor.
    pub(crate) fn end(&mut self) {
        let keeper = self.keeper.take();
        if keeper.is_none() && !std::mem::take(&mut self.adopted) {
            return;
        }
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            // ESRCH: it was waited for already.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, %error, "a child could not be killed"),
        }
        match keeper.map(JoinHandle::join) {
            Some(Ok(())) => {}
            Some(Err(_)) => tracing::error!(pid = self.pid, "the keeper of a child has panicked"),
            // Killed, it ends whatever it was doing.
            None => drop(wait_readable(&[self.handle.as_fd()], Some(ADOPTED))),
        }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for ChildProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildProcess").field("pid", &self.pid).field("status", &self.status()).finish_non_exhaustive()
    }
}

type Started = io::Result<(u32, OwnedFd)>;

/// The keeper: starts the child, says so, and stays until it has ended.
fn keep(command: Command, inherited: Vec<OwnedFd>, started: &mpsc::SyncSender<Started>, end: &End) {
    let (mut child, handle, own) = match begin(command, inherited) {
        Ok(begun) => begun,
        Err(error) => {
            // Whoever waits for the answer is still there: it holds the other end until it has one.
            let _told = started.send(Err(error));
            return;
        }
    };
    let _told = started.send(Ok((child.id(), handle)));
    if let Err(error) = listen(&mut child, &own, &end.said) {
        tracing::warn!(pid = child.id(), %error, "what a child says is lost");
    }
    match child.wait() {
        Ok(status) => *end.status.lock() = Some(status),
        Err(error) => tracing::error!(pid = child.id(), %error, "a child could not be waited for"),
    }
}

fn begin(mut command: Command, inherited: Vec<OwnedFd>) -> io::Result<(Child, OwnedFd, OwnedFd)> {
    let parent = std::process::id();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let prepare = move || {
        for fd in &inherited {
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above; whoever adopted this process will not end it.
        if getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs()) != Some(parent) {
            return Err(Errno::CHILD.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only fcntl(2), prctl(2) and getppid(2) are called, which are async-signal-safe; nothing is
    // allocated or locked, and the descriptors that the closure owns are open in the child as well.
    unsafe { command.pre_exec(prepare) };
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    // Not waited for yet, so the number is still its own.
    let named =
        pidfd_open(pid, PidfdFlags::empty()).and_then(|own| Ok((rustix::io::fcntl_dupfd_cloexec(&own, 0)?, own)));
    match named {
        Ok((handle, own)) => Ok((child, handle, own)),
        Err(errno) => {
            child.kill()?;
            child.wait()?;
            Err(errno.into())
        }
    }
}

/// Keeps the last of what the child says until it has ended.
fn listen(child: &mut Child, handle: &OwnedFd, said: &Mutex<Vec<u8>>) -> io::Result<()> {
    let Some(mut stderr) = child.stderr.take() else { return Ok(()) };
    rustix::io::ioctl_fionbio(&stderr, true)?;
    let mut piece = [0; 4096];
    let mut open = true;
    loop {
        let fds = [handle.as_fd(), stderr.as_fd()];
        let ended = wait_readable(&fds[..if open { 2 } else { 1 }], None)?[0];
        while open {
            match stderr.read(&mut piece) {
                Ok(0) => open = false,
                Ok(read) => {
                    let mut said = said.lock();
                    said.extend_from_slice(&piece[..read]);
                    let over = said.len().saturating_sub(KEPT);
                    said.drain(..over);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if ended {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_child_has_its_descriptors_and_what_it_says_is_kept() {
        let (read, mut write) = io::pipe().unwrap();
        write.write_all(b"through the pipe\n").unwrap();
        drop(write);
        let read = OwnedFd::from(read);
        let number = std::os::fd::AsRawFd::as_raw_fd(&read);
        let child = ChildProcess::start(shell(&format!("cat <&{number} >&2; exit 3")), vec![read]).unwrap();
        assert!(child.wait(LONG).unwrap());
        // The keeper has read all before it says how the child ended.
        while child.status().is_none() {
            thread::yield_now();
        }
        assert_eq!((child.said().as_str(), child.status().unwrap().code()), ("through the pipe\n", Some(3)));
    }

    #[test]
    fn only_the_last_of_much_is_kept() {
        let script = "i=0; while [ $i -lt 3000 ]; do echo line-$i >&2; i=$((i+1)); done";
        let child = ChildProcess::start(shell(script), vec![]).unwrap();
        assert!(child.wait(LONG).unwrap());
        while child.status().is_none() {
            thread::yield_now();
        }
        assert!(child.said().len() <= KEPT && child.said().ends_with("line-2999\n"));
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it_but_not_its_handle() {
        let mut child = thread::spawn(|| ChildProcess::start(shell("sleep 1000"), vec![]).unwrap()).join().unwrap();
        assert!(!child.wait(Duration::from_millis(20)).unwrap());
        child.end();
        assert!(child.wait(Duration::ZERO).unwrap());
        assert!(child.status().is_some_and(|status| !status.success()));
        assert!(!std::path::Path::new(&format!("/proc/{}", child.pid())).exists());
    }

    #[test]
    fn a_process_that_is_adopted_ends_with_its_handle_too() {
        let mut theirs = shell("sleep 1000").spawn().unwrap();
        let adopted = ChildProcess::adopt(theirs.id()).unwrap();
        assert!(!adopted.wait(Duration::ZERO).unwrap());
        drop(adopted);
        assert!(!theirs.wait().unwrap().success());
        assert!(ChildProcess::adopt(u32::MAX).is_err());
    }

    #[test]
    fn what_cannot_be_started_leaves_nothing() {
        assert_eq!(
            ChildProcess::start(Command::new("/no/such/program"), vec![]).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let _plan = super::super::fault::plan::arm(1, Errno::AGAIN);
        assert!(ChildProcess::start(shell("true"), vec![]).is_err());
    }
}
