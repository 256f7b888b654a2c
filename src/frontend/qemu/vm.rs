//! A QEMU guest and its engine's VM as one thing: launched, watched, forked.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::QemuError;
use super::command::{MemoryView, NIC, Role};
use super::family::{Directory, Exports, Family};
use super::guest::Forking;
use super::parked::Parked;
use super::point::QemuPoint;
use super::process::{Qemu, Start};
use super::spec::QemuSpec;
use super::version::QemuVersion;
use crate::backing::{Backing, Mapped};
use crate::disk::Disk;
use crate::page::{ByteSize, GuestAddress};
use crate::{DiskName, ForkError, Tree, Vm, VmName};

/// What becomes of a VM that is forked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AfterFork {
    /// It stands still for good, and its process is ended.
    Freeze,
    /// It runs on.
    Continue,
}

/// Whether a network card has its cable in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkState {
    /// Nothing comes in or goes out, and the guest knows.
    #[default]
    Down,
    /// Connected.
    Up,
}

/// A guest in an unmodified QEMU process. Dropping it kills the process, and removes its sockets and files.
///
/// Its RAM is a memory file of the engine's, its disks are served by this process, and its console goes to a file. Until the first fork
/// [`Vm::ram`] of [`vm`](Self::vm) is the guest's memory itself; after it, it is that of the last fork point, and
/// [`read_ram`](Self::read_ram) reads the guest's.
pub struct QemuVm {
    /// First, so that nobody uses what goes after it.
    pub(super) process: Option<Qemu>,
    pub(super) vm: Vm<Mapped>,
    pub(super) exports: Exports,
    pub(super) spec: Arc<QemuSpec>,
    console: PathBuf,
    home: Directory,
}

/// The files of a VM that stay while its processes come and go.
pub(super) struct Home {
    pub(super) directory: Directory,
    pub(super) console: PathBuf,
}

impl Home {
    pub(super) fn create(family: &Arc<Family>, console: Option<&Path>) -> Result<Self, QemuError> {
        let directory = family.place()?;
        let console = console.map_or_else(|| directory.join("console"), Path::to_owned);
        Ok(Self { directory, console })
    }
}

impl QemuVm {
    /// Boots a machine with these disks. `console` is the file that its serial console is appended to; one in the VM's own directory,
    /// which goes with it, unless given.
    ///
    /// # Errors
    /// [`QemuError`]; nothing is left behind.
    pub fn launch(
        tree: &Tree,
        name: VmName,
        spec: QemuSpec,
        disks: Vec<(DiskName, Disk)>,
        console: Option<&Path>,
    ) -> Result<Self, QemuError> {
        Parked::new(tree, name, spec, disks, console)?.launch()
    }

    pub(super) fn assemble(
        vm: Vm<Mapped>,
        exports: Exports,
        spec: Arc<QemuSpec>,
        home: Home,
        process: Qemu,
    ) -> Result<Self, QemuError> {
        let Home { directory, console } = home;
        let this = Self { process: Some(process), vm, exports, spec, console, home: directory };
        this.publish_agent()?;
        Ok(this)
    }

    /// Has the path of the agent's socket lead to the process that there is now.
    fn publish_agent(&self) -> Result<(), QemuError> {
        self.prepare_agent(self.process()?)?;
        self.switch_agent()
    }

    /// Makes the path to a process's agent, beside the one that is used. All of this that can fail for want of room.
    fn prepare_agent(&self, process: &Qemu) -> Result<(), QemuError> {
        let fresh = self.home.join("agent.new");
        // One that was prepared for a fork which then failed.
        let _none = fs::remove_file(&fresh);
        symlink(process.agent(), &fresh).map_err(QemuError::files("the agent's socket"))
    }

    fn switch_agent(&self) -> Result<(), QemuError> {
        let (link, fresh) = (self.home.join("agent"), self.home.join("agent.new"));
        fs::rename(&fresh, &link).map_err(QemuError::files("the agent's socket"))
    }

    pub(super) fn process(&self) -> Result<&Qemu, QemuError> {
        self.process.as_ref().ok_or(QemuError::NoProcess("the VM is frozen, or its process was lost in a fork"))
    }

    /// The engine's VM: identity, disks, status.
    pub fn vm(&self) -> &Vm<Mapped> {
        &self.vm
    }

    /// What the machine is made of.
    pub fn spec(&self) -> &QemuSpec {
        &self.spec
    }

    /// The process. Another one after the first fork.
    ///
    /// # Errors
    /// [`QemuError::NoProcess`].
    pub fn pid(&self) -> Result<u32, QemuError> {
        Ok(self.process()?.pid())
    }

    /// Which QEMU it is.
    ///
    /// # Errors
    /// [`QemuError::NoProcess`].
    pub fn version(&self) -> Result<QemuVersion, QemuError> {
        Ok(self.process()?.version())
    }

    /// The file that the serial console is appended to.
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// The Unix socket behind the guest's port [`AGENT_PORT`](super::AGENT_PORT). One client at a time; a fork that goes on in another
    /// process hangs up on it.
    pub fn agent_socket(&self) -> PathBuf {
        self.home.join("agent")
    }

    /// How the process ended, with what it said last; `None` while it lives, or where there is none.
    pub fn ended(&self) -> Option<String> {
        self.process.as_ref().and_then(Qemu::ended)
    }

    /// One command of QMP, for whatever this crate has no call for. Commands that stop, run, save or load the guest are this crate's own:
    /// given here, they are not noticed, and the next fork may fail.
    ///
    /// # Errors
    /// [`QemuError::Qemu`] with QEMU's reason; [`QemuError::NoProcess`].
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        self.process()?.tell("do what it was asked to", command, arguments)
    }

    /// Stops the guest where it stands.
    ///
    /// # Errors
    /// [`QemuError::Status`] unless it runs; otherwise QEMU's.
    pub fn stop(&self) -> Result<(), QemuError> {
        self.vm.pause()?;
        self.process().and_then(Qemu::stop).inspect_err(|_| {
            // It was paused just above.
            let _runs = self.vm.start();
        })
    }

    /// Runs the guest on.
    ///
    /// # Errors
    /// [`QemuError::Status`] unless it stands still; otherwise QEMU's.
    pub fn cont(&self) -> Result<(), QemuError> {
        // Asked first, so that a VM that may not run does not: the engine is told what then became of it.
        self.vm.start()?;
        self.process().and_then(Qemu::run).inspect_err(|_| {
            let _paused = self.vm.pause();
        })
    }

    /// Puts the network cable in, or takes it out.
    ///
    /// # Errors
    /// QEMU's: there may be no card.
    pub fn set_link(&self, link: LinkState) -> Result<(), QemuError> {
        let up = link == LinkState::Up;
        self.process()?.tell("set the link", "set_link", json!({ "name": NIC, "up": up })).map(drop)
    }

    /// Reads guest memory as it is now, from outside the process. What the guest writes meanwhile may arrive old or new.
    ///
    /// # Errors
    /// [`QemuError::Ram`] where that is no RAM; [`QemuError::Files`] where the process's memory cannot be read.
    pub fn read_ram(&self, at: GuestAddress, buf: &mut [u8]) -> Result<(), QemuError> {
        let at = self.vm.ram().locate(at, ByteSize::new(buf.len() as u64))?;
        self.process()?.outside()?.read(at, buf)
    }

    /// Forks the guest: RAM, disks and devices at one instant.
    ///
    /// The guest stands still for some milliseconds, most of them QEMU's. A first parent goes on in another process, which has the same
    /// identity, disks and console; a clone goes on in its own. A VM that is paused is cut where it stands, and stays paused.
    ///
    /// # Errors
    /// [`QemuError`]. The guest runs on as it was, and nothing is left behind; after [`ForkError::Resume`] there was a fork, which is
    /// [`Vm::origin`], and no process: [`revive`](Self::revive) starts one. A first parent that is paused, and whose fork failed in QEMU's saving,
    /// may have to run before it can be forked.
    pub fn fork(&mut self, after: AfterFork) -> Result<QemuPoint, QemuError> {
        let begun = Instant::now();
        let first = self.process()?.view() == MemoryView::Shared;
        let successor = if first && after == AfterFork::Continue { Some(self.successor()?) } else { None };
        // Before the fork, which a failure here must not take back.
        successor.as_ref().map_or(Ok(()), |successor| self.prepare_agent(successor))?;
        let ahead = if successor.is_some() { begun.elapsed() } else { Duration::ZERO };
        let mut guest = Forking::new(&self.vm, &self.exports, &mut self.process, successor, after);
        let forked = match after {
            AfterFork::Freeze => self.vm.freeze(&mut guest),
            AfterFork::Continue => self.vm.fork(&mut guest),
        };
        let mut timings = guest.timings;
        drop(guest);
        timings.successor = ahead;
        if let Err(ForkError::Resume(_)) = &forked {
            // What does not run on is of no use; the fork point is there.
            self.process = None;
        }
        let point = forked?;
        if after == AfterFork::Continue
            && first
            && let Err(error) = self.switch_agent()
        {
            tracing::error!(%error, "the guest was forked, and its agent's socket has no path any more");
        }
        timings.engine = point.timings();
        Ok(QemuPoint::new(point, self.exports.family().clone(), self.spec.clone(), timings))
    }

    /// The process that the first parent goes on in: it waits for a state, over the same memory file.
    fn successor(&self) -> Result<Qemu, QemuError> {
        let memory = self.vm.ram().space().own_file()?.ok_or(QemuError::NoProcess("the memory was cut"))?;
        self.start_incoming(memory)
    }

    fn start_incoming(&self, memory: std::os::fd::OwnedFd) -> Result<Qemu, QemuError> {
        Qemu::start(Start {
            spec: &self.spec,
            identity: self.vm.identity(),
            memory,
            view: MemoryView::Private,
            role: Role::Incoming,
            exports: &self.exports,
            console: &self.console,
        })
    }

    /// Starts a process for a VM that lost its own in a fork ([`ForkError::Resume`]), at that fork point, which is where it stands.
    ///
    /// # Errors
    /// [`QemuError::Status`] unless the VM stands paused without a process; otherwise QEMU's.
    pub fn revive(&mut self) -> Result<(), QemuError> {
        if self.process.is_some() {
            return Err(QemuError::Unsupported("the VM has a process".into()));
        }
        let point = self.vm.origin().ok_or(QemuError::NoProcess("the VM was never forked"))?;
        let image = self.vm.ram().space().origin();
        let memory = match image.whole_file()? {
            Some(memory) => memory,
            None => {
                let flat = crate::backing::Sealed::flatten(&image)?;
                flat.whole_file()?.ok_or(QemuError::NoProcess("a flat image has no file"))?
            }
        };
        let process = self.start_incoming(memory)?;
        process.load(&point.device_state().encode())?;
        self.process = Some(process);
        self.publish_agent()?;
        self.cont()
    }
}

impl fmt::Debug for QemuVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuVm").field("vm", &self.vm).field("process", &self.process).finish_non_exhaustive()
    }
}
