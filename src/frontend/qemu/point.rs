//! A QEMU guest at one instant, and the clones made from it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;

use super::QemuError;
use super::command::{MemoryView, NIC, Role};
use super::family::{Exports, Family};
use super::guest::QemuForkTimings;
use super::process::{Qemu, Start};
use super::spec::{Nic, QemuSpec};
use super::vm::{Home, LinkState, QemuVm};
use crate::backing::{Mapped, MappedImage, Sealed};
use crate::{CloneSpec, ForkPoint};

/// Whether a clone runs when it is handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AtBirth {
    /// It runs.
    #[default]
    Running,
    /// It stands at the parent's instant until [`QemuVm::cont`].
    Paused,
}

/// What a clone shall be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct QemuClone {
    /// Who it is.
    pub identity: CloneSpec,
    /// The file that its serial console is appended to; one in its own directory, which goes with it, unless given.
    pub console: Option<PathBuf>,
    /// The cable of its network card, out unless asked for: until it has been customized, it has its parent's address.
    pub link: LinkState,
    /// Whether it runs.
    pub at_birth: AtBirth,
}

/// What a clone cost, stage by stage.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct QemuSpawnTimings {
    /// The engine's part: RAM, overlays of the disks, identity, exports; for the first clone of a point that was made by a clone, its flat
    /// memory file too.
    pub engine: Duration,
    /// QEMU's start, up to its first word.
    pub start: Duration,
    /// Loading the state.
    pub load: Duration,
    /// Until it runs.
    pub run: Duration,
}

/// A QEMU guest at one instant. Cloning this handle costs one reference.
#[derive(Clone, Debug)]
pub struct QemuPoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    point: ForkPoint<Mapped>,
    family: Arc<Family>,
    spec: Arc<QemuSpec>,
    timings: QemuForkTimings,
    /// RAM in one file, once a clone needed it.
    flat: Mutex<Option<MappedImage>>,
}

/// A clone whose process is started and waits: all that is left is loading its state.
#[derive(Debug)]
pub struct QemuShell {
    process: Qemu,
    vm: crate::Vm<Mapped>,
    exports: Exports,
    home: Home,
    point: QemuPoint,
    clone: (LinkState, AtBirth),
    timings: QemuSpawnTimings,
}

impl QemuPoint {
    pub(super) fn new(
        point: ForkPoint<Mapped>,
        family: Arc<Family>,
        spec: Arc<QemuSpec>,
        timings: QemuForkTimings,
    ) -> Self {
        Self(Arc::new(Inner { point, family, spec, timings, flat: Mutex::default() }))
    }

    /// The engine's fork point.
    pub fn point(&self) -> &ForkPoint<Mapped> {
        &self.0.point
    }

    /// What the fork cost.
    pub fn timings(&self) -> QemuForkTimings {
        self.0.timings
    }

    /// Spawns a clone in a process of its own.
    ///
    /// # Errors
    /// [`QemuError`]; nothing of the clone is left then.
    pub fn spawn(&self, clone: QemuClone) -> Result<QemuVm, QemuError> {
        Ok(self.shell(clone)?.enter()?.0)
    }

    /// Starts the process of a clone, ahead of need.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn shell(&self, clone: QemuClone) -> Result<QemuShell, QemuError> {
        let inner = &self.0;
        let begun = Instant::now();
        let vm = inner.point.spawn(clone.identity)?;
        let exports = Exports::serve(&inner.family, vm.disks())?;
        let home = Home::create(&inner.family, clone.console.as_deref())?;
        let memory = self.memory()?;
        let engine = begun.elapsed();
        let process = Qemu::start(Start {
            spec: &inner.spec,
            identity: vm.identity(),
            memory,
            view: MemoryView::Private,
            role: Role::Incoming,
            exports: &exports,
            console: &home.console,
        })?;
        let timings = QemuSpawnTimings { engine, start: begun.elapsed() - engine, ..QemuSpawnTimings::default() };
        Ok(QemuShell { process, vm, exports, home, point: self.clone(), clone: (clone.link, clone.at_birth), timings })
    }

    /// RAM in one file. A point of the first parent has it; of a clone's it is made once, and all its clones share it.
    fn memory(&self) -> Result<std::os::fd::OwnedFd, QemuError> {
        if let Some(file) = self.0.point.ram().whole_file()? {
            return Ok(file);
        }
        let mut flat = self.0.flat.lock();
        let image = match &mut *flat {
            Some(image) => image,
            none => none.insert(self.0.point.ram().flatten()?),
        };
        image.whole_file()?.ok_or(QemuError::NoProcess("a flat image has no file"))
    }
}

impl QemuShell {
    /// Loads the state, and has the clone run if it is to.
    ///
    /// # Errors
    /// As [`QemuPoint::spawn`].
    pub fn enter(self) -> Result<(QemuVm, QemuSpawnTimings), QemuError> {
        let Self { process, vm, exports, home, point, clone: (link, at_birth), mut timings } = self;
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
        process.load(&point.0.point.device_state().encode())?;
        timings.load = lap();
        if point.0.spec.nic != Nic::None {
            // The state has the parent's, whatever that was.
            let up = link == LinkState::Up;
            process.tell("set the link", "set_link", json!({ "name": NIC, "up": up }))?;
        }
        let this = QemuVm::assemble(vm, exports, point.0.spec.clone(), home, process)?;
        if at_birth == AtBirth::Running {
            this.cont()?;
        }
        timings.run = lap();
        Ok((this, timings))
    }
}

impl std::fmt::Debug for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Home").field("console", &self.console).finish_non_exhaustive()
    }
}
