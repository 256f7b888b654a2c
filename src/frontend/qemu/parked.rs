//! A machine whose memory and disks are there, and whose QEMU is not yet: to be launched, or to be attached to one that somebody else starts.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::QemuError;
use super::command::{MemoryView, Role, Wiring, arguments};
use super::family::{Directory, Exports, Family};
use super::private_pages::MappedFile;
use super::process::{Qemu, Start};
use super::spec::QemuSpec;
use super::vm::{Home, QemuVm};
use crate::backing::Mapped;
use crate::disk::Disk;
use crate::{DiskName, Tree, Vm, VmName};

/// A machine that waits for its QEMU, for those who start the process themselves: in a jail, under another user's supervision.
///
/// Start the program with [`arguments`](Self::arguments) by whatever means, connect to [`control_socket`](Self::control_socket), and
/// [`attach`](Self::attach). The process must be of this user and outside of other pid namespaces: it opens the memory file through
/// `/proc`. From its first fork on, the guest goes on in processes that this crate starts.
#[derive(Debug)]
pub struct Parked {
    vm: Vm<Mapped>,
    spec: QemuSpec,
    exports: Exports,
    home: Home,
    place: Directory,
    memory: OwnedFd,
}

impl Parked {
    /// Makes memory, serves the disks. See [`QemuVm::launch`].
    ///
    /// # Errors
    /// [`QemuError`]; nothing is left behind.
    pub fn new(
        tree: &Tree,
        name: VmName,
        spec: QemuSpec,
        disks: Vec<(DiskName, Disk)>,
        console: Option<&Path>,
    ) -> Result<Self, QemuError> {
        spec.check()?;
        let vm: Vm<Mapped> = Vm::new(tree, name, spec.layout()?, disks)?;
        let family = Family::create(spec.directory.as_deref())?;
        let exports = Exports::serve(&family, vm.disks())?;
        let home = Home::create(&family, console)?;
        let place = family.place()?;
        let memory = vm.ram().space().own_file()?.ok_or(QemuError::NoProcess("the memory was cut"))?;
        Ok(Self { vm, spec, exports, home, place, memory })
    }

    /// Starts the program, and has the guest boot.
    pub(super) fn launch(self) -> Result<QemuVm, QemuError> {
        let process = Qemu::start(Start {
            spec: &self.spec,
            identity: self.vm.identity(),
            memory: self.memory,
            view: MemoryView::Shared,
            role: Role::Boot,
            exports: &self.exports,
            console: &self.home.console,
        })?;
        let this = QemuVm::assemble(self.vm, self.exports, Arc::new(self.spec), self.home, process)?;
        this.cont()?;
        Ok(this)
    }

    /// What the program is to be started with. It waits with the guest standing still.
    pub fn arguments(&self) -> Vec<OsString> {
        let control = self.control_socket();
        let wiring = Wiring {
            identity: self.vm.identity(),
            memory: &format!("/proc/{}/fd/{}", std::process::id(), self.memory.as_raw_fd()),
            view: MemoryView::Shared,
            role: Role::Boot,
            control: &format!("path={},server=on,wait=off", control.to_string_lossy().replace(',', ",,")),
            disks: &self.exports.family().socket(),
            exports: self.exports.iter().map(|(name, _)| name.as_str()).collect(),
            console: &self.home.console,
            agent: &self.place.join("agent"),
        };
        arguments(&self.spec, &wiring)
    }

    /// Where the program listens for QMP.
    pub fn control_socket(&self) -> PathBuf {
        self.place.join("control")
    }

    /// The machine's VM.
    pub fn vm(&self) -> &Vm<Mapped> {
        &self.vm
    }

    /// Takes over the process, which runs the guest from now on and ends with the VM.
    ///
    /// # Errors
    /// [`QemuError::Files`] where the process does not have this memory file; otherwise QEMU's. The process is left alone if it is not the
    /// right one, and killed if it fails later.
    pub fn attach(self, process: u32, control: UnixStream) -> Result<QemuVm, QemuError> {
        let file = MappedFile::of(&self.memory)?;
        let process = Qemu::adopt(process, control, self.place, &self.spec, file)?;
        let this = QemuVm::assemble(self.vm, self.exports, Arc::new(self.spec), self.home, process)?;
        this.cont()?;
        Ok(this)
    }
}
