//! A QEMU guest as a fork sees it: stopped, drained, saved, and gone on in whichever process.
//!
//! The first parent shares its memory file, and QEMU cannot map its memory anew. So it goes on in a successor, which was started ahead
//! and maps the same file privately: it is loaded before the cut is committed, when everything can still be undone, and the old process
//! is ended after it. A clone has private pages over a sealed file: they are copied out, and it goes on as it is.

use std::time::{Duration, Instant};

use super::QemuError;
use super::command::MemoryView;
use super::family::Exports;
use super::private_pages::Gathered;
use super::process::Qemu;
use super::stream;
use super::vm::AfterFork;
use crate::backing::{Deferred, Mapped};
use crate::frontend::nbd::Drained;
use crate::page::{ByteSize, PageCount};
use crate::{BoxError, DeviceState, ForkTimings, Guest, Vm};

/// What a fork of a QEMU guest cost, stage by stage. What the guest loses is [`ForkTimings::stopped`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct QemuForkTimings {
    /// Before the pause: starting the process that the first parent goes on in. Nothing for a clone.
    pub successor: Duration,
    /// QEMU's stop, with the drain and flush of its disks. In [`ForkTimings::pause`].
    pub stop: Duration,
    /// Draining the exports. In [`ForkTimings::save`].
    pub drain: Duration,
    /// Finding and copying a clone's own pages. In [`ForkTimings::save`].
    pub gather: Duration,
    /// QEMU's saving of its state. In [`ForkTimings::save`].
    pub save: Duration,
    /// Loading it into the successor. In [`ForkTimings::save`].
    pub load: Duration,
    /// How long the saved state is.
    pub state: ByteSize,
    /// Pages that a clone had of its own.
    pub private: PageCount,
    /// Those of them that differed from what it was cloned of.
    pub changed: PageCount,
    /// The engine's account; `pause`, `save` and `resume` of it are the stages above, and running on.
    pub engine: ForkTimings,
}

/// The guest of one fork.
pub(super) struct Forking<'a> {
    vm: &'a Vm<Mapped>,
    exports: &'a Exports,
    process: &'a mut Option<Qemu>,
    successor: Option<Qemu>,
    after: AfterFork,
    drained: Vec<Drained>,
    pub(super) timings: QemuForkTimings,
}

const GONE: QemuError = QemuError::NoProcess("it was lost in a fork");

impl<'a> Forking<'a> {
    pub(super) fn new(
        vm: &'a Vm<Mapped>,
        exports: &'a Exports,
        process: &'a mut Option<Qemu>,
        successor: Option<Qemu>,
        after: AfterFork,
    ) -> Self {
        Self { vm, exports, process, successor, after, drained: Vec::new(), timings: QemuForkTimings::default() }
    }

    fn process(&self) -> Result<&Qemu, QemuError> {
        self.process.as_ref().ok_or(GONE)
    }

    fn drain(&mut self) {
        let clock = Instant::now();
        if self.drained.is_empty() {
            self.drained = self.exports.drain();
        }
        self.timings.drain += clock.elapsed();
    }

    fn save_all(&mut self) -> Result<Vec<u8>, QemuError> {
        let limit = self.vm.tree().limits().device_state;
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
        let process = self.process.as_ref().ok_or(GONE)?;
        // Here and not in the pause, which a guest that stands still already does not have.
        process.check_jobs()?;
        match process.view() {
            MemoryView::Shared => {
                let state = process.save(limit)?;
                self.timings.save = lap();
                if let Some(successor) = &self.successor {
                    successor.load(&state)?;
                    self.timings.load = lap();
                }
                Ok(state)
            }
            MemoryView::Private => {
                let Gathered { private, changed } = process.outside()?.gather(self.vm.ram().space())?;
                (self.timings.private, self.timings.changed) = (private, changed);
                self.timings.gather = lap();
                let devices = process.save_devices(limit)?;
                let loaded = self.vm.device_state().ok_or(GONE)?;
                let state = stream::join(&loaded.encode(), &devices)?;
                self.timings.save = lap();
                Ok(state)
            }
        }
    }
}

impl Guest for Forking<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        let clock = Instant::now();
        let process = self.process()?;
        if let Err(error) = process.stop() {
            // It may have stopped all the same, with its answer late: it is to run on.
            if let Err(error) = process.run() {
                tracing::error!(%error, "a guest that could not be stopped does not run on either");
            }
            return Err(error.into());
        }
        self.timings.stop = clock.elapsed();
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let state = self.save_all()?;
        // Not earlier: QEMU flushes its disks once more when it saves, which changes nothing of them.
        self.drain();
        self.timings.state = ByteSize::new(state.len() as u64);
        Ok(DeviceState::from_bytes(state))
    }

    fn committed(&mut self) -> Deferred {
        let old = match (self.after, self.successor.take()) {
            (AfterFork::Continue, None) => return Deferred::default(),
            (AfterFork::Continue, Some(successor)) => self.process.replace(successor),
            (AfterFork::Freeze, _) => self.process.take(),
        };
        old.map_or_else(Deferred::default, |old| Deferred::costly(old).named("old process"))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.drained.clear();
        Ok(self.process()?.run()?)
    }
}
