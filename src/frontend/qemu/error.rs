//! What goes wrong with a guest that is a QEMU process.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::qmp::QmpError;
use super::stream::StreamError;
use super::version::VersionError;
use crate::frontend::nbd::StartError;
use crate::ram::{LayoutError, RamError};
use crate::{BuildError, ForkError, IllegalState, SpaceError, SpawnError};

/// Why a QEMU guest could not be launched, forked or spawned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The specification asks for what cannot work; says why.
    #[error("this machine cannot be forked: {0}")]
    Unsupported(String),
    /// A release that is not known.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// The program could not be started.
    #[error("{} could not be started: {error}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// QEMU failed in one of our commands; what it said on its standard error is told.
    #[error("QEMU failed to {doing}: {error}{}", said(.stderr))]
    Qemu {
        /// What it was to do.
        doing: &'static str,
        /// What the control socket said.
        #[source]
        error: QmpError,
        /// The last of its standard error.
        stderr: String,
    },
    /// QEMU's part of saving or loading its state failed.
    #[error("QEMU failed to {doing}: {reason}{}", said(.stderr))]
    State {
        /// What it was to do.
        doing: &'static str,
        /// Why it did not.
        reason: String,
        /// The last of its standard error.
        stderr: String,
    },
    /// A step took too long.
    #[error("QEMU did not {doing} within {patience:?}: raise the deadline if the host is slow")]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        patience: Duration,
    },
    /// A saved state that is not what QEMU writes.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// There is no process: the VM is frozen, or its process was lost.
    #[error("there is no QEMU process: {0}")]
    NoProcess(&'static str),
    /// A directory, socket or file of the guest's.
    #[error("{what}: {error}")]
    Files {
        /// What it is.
        what: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The server of disks.
    #[error(transparent)]
    Disks(#[from] StartError),
    /// The amount of RAM.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The engine could not make the VM.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The engine could not fork it. The guest runs on, except after [`ForkError::Resume`].
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The engine could not make the clone.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// RAM or a disk.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// A guest address.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A call that the VM's status does not allow.
    #[error(transparent)]
    Status(#[from] IllegalState),
}

fn said(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        said => format!("; it said: {said}"),
    }
}

impl QemuError {
    pub(super) fn files(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Files { what, error }
    }
}
