//! One QEMU process and what it is told: start, stop, save, load, run.
//!
//! Every step has a deadline, and every error has what the process said on its standard error. Must not know forks or engines: it is
//! given a memory file and exports.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::QemuError;
use super::command::{MemoryView, Role, Wiring, arguments};
use super::family::{Directory, Exports};
use super::private_pages::{MappedFile, Outside};
use super::qmp::{Qmp, QmpError};
use super::spec::{Deadlines, QemuSpec};
use super::version::QemuVersion;
use crate::Identity;
use crate::page::ByteSize;
use crate::sys::child::ChildProcess;
use crate::sys::wait::wait_readable;

/// How long a process that has failed may take to end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A QEMU process. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub(super) struct Qemu {
    child: ChildProcess,
    qmp: Mutex<Qmp>,
    version: QemuVersion,
    view: MemoryView,
    file: MappedFile,
    ram: ByteSize,
    deadlines: Deadlines,
    /// What it saved since it ran last: QEMU does not save a guest twice that has not run in between.
    saved: Mutex<Option<Vec<u8>>>,
    /// Last: it is removed when the process has ended.
    place: Directory,
}

/// What a new process is given.
pub(super) struct Start<'a> {
    pub(super) spec: &'a QemuSpec,
    pub(super) identity: &'a Identity,
    pub(super) memory: OwnedFd,
    pub(super) view: MemoryView,
    pub(super) role: Role,
    pub(super) exports: &'a Exports,
    pub(super) console: &'a Path,
}

impl Qemu {
    /// Starts a process and waits for its first word. The guest stands still.
    pub(super) fn start(start: Start<'_>) -> Result<Self, QemuError> {
        let Start { spec, identity, memory, view, role, exports, console } = start;
        let place = exports.family().place()?;
        let (ours, theirs) = UnixStream::pair().map_err(QemuError::files("a control socket"))?;
        let theirs = OwnedFd::from(theirs);
        let file = MappedFile::of(&memory)?;
        let wiring = Wiring {
            identity,
            memory: &format!("/proc/self/fd/{}", memory.as_raw_fd()),
            view,
            role,
            control: &format!("fd={}", theirs.as_raw_fd()),
            disks: &exports.family().socket(),
            exports: exports.iter().map(|(name, _)| name.as_str()).collect(),
            console,
            agent: &place.join("agent"),
        };
        let mut command = Command::new(&spec.program);
        command.args(arguments(spec, &wiring));
        let child = ChildProcess::start(command, vec![memory, theirs])
            .map_err(|error| QemuError::Start { program: spec.program.clone(), error })?;
        let greeted = Qmp::greet(ours, spec.deadlines.start).map_err(|error| failed(&child, "start", error))?;
        Self::meet(child, greeted, place, spec, view, file)
    }

    /// Takes over a process that somebody else has started as told by [`Parked`](super::Parked).
    pub(super) fn adopt(
        process: u32,
        control: UnixStream,
        place: Directory,
        spec: &QemuSpec,
        file: MappedFile,
    ) -> Result<Self, QemuError> {
        // It listens before its machine is made, and answers after.
        let greeted = Qmp::greet(control, spec.deadlines.start).map_err(|error| QemuError::Qemu {
            doing: "start",
            error,
            stderr: String::new(),
        })?;
        // Before it is ours: another process is left alone.
        Outside::open(process, file, spec.ram)?;
        let child = ChildProcess::adopt(process).map_err(QemuError::files("the process that is to be attached"))?;
        Self::meet(child, greeted, place, spec, MemoryView::Shared, file)
    }

    fn meet(
        child: ChildProcess,
        (qmp, greeting): (Qmp, Value),
        place: Directory,
        spec: &QemuSpec,
        view: MemoryView,
        file: MappedFile,
    ) -> Result<Self, QemuError> {
        let version = QemuVersion::of_greeting(&greeting)?;
        let (ram, deadlines) = (spec.ram, spec.deadlines);
        let qemu =
            Self { child, qmp: Mutex::new(qmp), version, view, file, ram, deadlines, saved: Mutex::default(), place };
        qemu.prepare()?;
        Ok(qemu)
    }

    /// What would only cost time in a pause.
    fn prepare(&self) -> Result<(), QemuError> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.tell("leave shared memory out of its state", "migrate-set-capabilities", capabilities)?;
        // There is nothing beside it that the saved state could disturb.
        self.tell("save without a limit", "migrate-set-parameters", json!({ "max-bandwidth": 0 }))?;
        Ok(())
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.pid()
    }

    pub(super) fn version(&self) -> QemuVersion {
        self.version
    }

    pub(super) fn view(&self) -> MemoryView {
        self.view
    }

    pub(super) fn agent(&self) -> PathBuf {
        self.place.join("agent")
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<String> {
        self.child.wait(Duration::ZERO).unwrap_or(true).then(|| {
            let status = self.child.status().map_or("ended".to_owned(), |status| status.to_string());
            format!("{status}; it said: {}", self.child.said().trim())
        })
    }

    /// Its memory from outside.
    pub(super) fn outside(&self) -> Result<Outside, QemuError> {
        Outside::open(self.child.pid(), self.file, self.ram)
    }

    /// One command.
    pub(super) fn tell(&self, doing: &'static str, command: &str, arguments: Value) -> Result<Value, QemuError> {
        let told = self.qmp.lock().execute(command, arguments, self.deadlines.command);
        told.map_err(|error| failed(&self.child, doing, error))
    }

    pub(super) fn stop(&self) -> Result<(), QemuError> {
        self.tell("stop", "stop", json!({})).map(drop)
    }

    pub(super) fn run(&self) -> Result<(), QemuError> {
        // Whatever comes of it: the guest may run.
        *self.saved.lock() = None;
        self.tell("run", "cont", json!({})).map(drop)
    }

    /// Refuses where something copies a disk behind the guest's back.
    pub(super) fn check_jobs(&self) -> Result<(), QemuError> {
        let jobs = self.tell("list its jobs", "query-jobs", json!({}))?;
        match jobs.as_array().and_then(|jobs| jobs.first()) {
            None => Ok(()),
            Some(job) => {
                let name = |key: &str| job[key].as_str().unwrap_or("?").to_owned();
                let (id, kind) = (name("id"), name("type"));
                let why = format!("the job `{id}` ({kind}) is under way: wait for it, or cancel and dismiss it");
                Err(QemuError::Unsupported(why))
            }
        }
    }

    /// The state of a guest that stands still, all but the shared memory file. Asked again before the guest has run, it is the same.
    pub(super) fn save(&self, limit: ByteSize) -> Result<Vec<u8>, QemuError> {
        if let Some(saved) = &*self.saved.lock() {
            return within(saved.clone(), limit);
        }
        match self.migrate_out(limit) {
            Ok(saved) => {
                *self.saved.lock() = Some(saved.clone());
                Ok(saved)
            }
            Err(error) => {
                self.cancel();
                Err(error)
            }
        }
    }

    /// Ends a migration that failed here, so that the guest can run on. Whoever calls has an error already.
    fn cancel(&self) {
        let mut qmp = self.qmp.lock();
        let cancelled = qmp.execute("migrate_cancel", json!({}), self.deadlines.command).and_then(|_| {
            let begun = Instant::now();
            loop {
                let left = self.deadlines.command.saturating_sub(begun.elapsed());
                let now = qmp.execute("query-migrate", json!({}), left)?;
                // Without a status there was none.
                if matches!(now["status"].as_str(), None | Some("none" | "completed" | "failed" | "cancelled")) {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        if let Err(error) = cancelled {
            tracing::warn!(%error, "a migration that failed may still be under way");
        }
    }

    fn migrate_out(&self, limit: ByteSize) -> Result<Vec<u8>, QemuError> {
        let patience = self.deadlines.save;
        let path = self.place.join("save");
        let socket = SocketFile::bind(&path)?;
        let mut qmp = self.qmp.lock();
        qmp.forget_events();
        let uri = json!({ "uri": format!("unix:{}", path.display()) });
        qmp.execute("migrate", uri, self.deadlines.command)
            .map_err(|error| failed(&self.child, "save its state", error))?;
        let begun = Instant::now();
        // The other of the two is the process's end.
        let ready = wait_readable(&[socket.0.as_fd(), self.child.handle().as_fd()], Some(patience));
        if !ready.map_err(QemuError::files("waiting for QEMU's state"))?[0] {
            return Err(match self.ended() {
                Some(reason) => self.state_failed("save its state", reason),
                None => QemuError::Timeout { doing: "save its state", patience },
            });
        }
        let (stream, _) = socket.0.accept().map_err(QemuError::files("a connection for QEMU's state"))?;
        let state = read_all(stream, limit, begun, patience)?;
        let left = patience.saturating_sub(begun.elapsed());
        let outcome = qmp.event("save its state", left, migration_end);
        match outcome.map_err(|error| failed(&self.child, "save its state", error))? {
            End::Completed => Ok(state),
            End::Failed => Err(self.state_failed("save its state", "the migration failed".into())),
        }
    }

    /// The state of the devices of a guest that stands still, without any memory.
    pub(super) fn save_devices(&self, limit: ByteSize) -> Result<Vec<u8>, QemuError> {
        let path = self.place.join("devices");
        let asked = json!({ "filename": path, "live": false });
        let told = self.qmp.lock().execute("xen-save-devices-state", asked, self.deadlines.save);
        let state = told.map_err(|error| failed(&self.child, "save its devices", error)).and_then(|_| {
            let file = fs::File::open(&path).map_err(QemuError::files("the state of QEMU's devices"))?;
            let mut state = Vec::new();
            let read = file.take(limit.get().saturating_add(1)).read_to_end(&mut state);
            read.map_err(QemuError::files("the state of QEMU's devices"))?;
            within(state, limit)
        });
        let removed = fs::remove_file(&path);
        if state.is_ok() {
            removed.map_err(QemuError::files("the state of QEMU's devices"))?;
        }
        state
    }

    /// Loads a saved state into a process that waits for one. The guest stands still afterwards.
    pub(super) fn load(&self, state: &[u8]) -> Result<(), QemuError> {
        let patience = self.deadlines.load;
        let path = self.place.join("load");
        let mut qmp = self.qmp.lock();
        qmp.forget_events();
        let uri = json!({ "uri": format!("unix:{}", path.display()) });
        let doing = "load a state";
        qmp.execute("migrate-incoming", uri, self.deadlines.command)
            .map_err(|error| failed(&self.child, doing, error))?;
        let begun = Instant::now();
        let sent = UnixStream::connect(&path).and_then(|mut stream| {
            stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
            stream.write_all(state)?;
            stream.shutdown(Shutdown::Write)
        });
        let _gone = fs::remove_file(&path);
        let outcome = qmp.event(doing, patience.saturating_sub(begun.elapsed()), migration_end);
        match outcome.map_err(|error| failed(&self.child, doing, error))? {
            // It may know the end of the state before it has read the last of it.
            End::Completed => Ok(()),
            End::Failed => {
                hear_out(&self.child);
                let sent = sent.err().map(|error| format!(" (sending it: {error})")).unwrap_or_default();
                Err(self.state_failed(doing, format!("it was refused{sent}")))
            }
        }
    }

    fn state_failed(&self, doing: &'static str, reason: String) -> QemuError {
        QemuError::State { doing, reason, stderr: self.child.said() }
    }
}

/// How a migration ended.
enum End {
    Completed,
    Failed,
}

fn migration_end(event: &super::qmp::Event) -> Option<End> {
    if event.name != "MIGRATION" {
        return None;
    }
    match event.data["status"].as_str() {
        Some("completed") => Some(End::Completed),
        Some("failed" | "cancelled") => Some(End::Failed),
        _ => None,
    }
}

fn failed(child: &ChildProcess, doing: &'static str, error: QmpError) -> QemuError {
    if matches!(error, QmpError::Closed) {
        hear_out(child);
    }
    QemuError::Qemu { doing, error, stderr: child.said() }
}

/// Waits a moment for a process that is about to end: what it said is complete then. If it stays, the error tells what there is.
fn hear_out(child: &ChildProcess) {
    let until = Instant::now() + LAST_WORDS;
    let _ended = child.wait(LAST_WORDS);
    while child.status().is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A listening socket whose file is removed on drop.
struct SocketFile(UnixListener, PathBuf);

impl SocketFile {
    fn bind(path: &Path) -> Result<Self, QemuError> {
        let listener = UnixListener::bind(path).map_err(QemuError::files("a socket for QEMU's state"))?;
        Ok(Self(listener, path.to_owned()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.1);
    }
}

fn read_all(mut stream: UnixStream, limit: ByteSize, begun: Instant, patience: Duration) -> Result<Vec<u8>, QemuError> {
    let mut state = Vec::with_capacity(512 << 10);
    let mut piece = vec![0; 256 << 10];
    loop {
        let left = patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(QemuError::Timeout { doing: "save its state", patience });
        }
        stream.set_read_timeout(Some(left)).map_err(QemuError::files("the socket for QEMU's state"))?;
        match stream.read(&mut piece) {
            Ok(0) => return Ok(state),
            Ok(read) => state.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(QemuError::Timeout { doing: "save its state", patience });
            }
            Err(error) => return Err(QemuError::files("reading QEMU's state")(error)),
        }
        state = within(state, limit)?;
    }
}

fn within(state: Vec<u8>, limit: ByteSize) -> Result<Vec<u8>, QemuError> {
    let size = ByteSize::new(state.len() as u64);
    if size > limit { Err(crate::ForkError::StateTooBig { size, limit }.into()) } else { Ok(state) }
}
