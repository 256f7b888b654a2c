//! What a parent and all its clones have in common on this host: one private directory, and one server of their disks.
//!
//! Each process has a directory of its own below, named by a number. Everything is removed when the last of the family is dropped.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::QemuError;
use crate::disk::Disk;
use crate::frontend::nbd::{Drained, Endpoint, Export, ExportName, Server, ServerLimits};
use crate::{DiskName, IdentityError};

/// The longest path of a socket, less what we put below the directory.
const LONGEST: usize = 80;

/// See the module.
#[derive(Debug)]
pub(super) struct Family {
    /// Before the directory, where its socket lies.
    server: Server,
    directory: Directory,
    next: AtomicU64,
}

/// A directory that is removed with all that is in it; before the family's, which it keeps.
#[derive(Debug)]
pub(super) struct Directory(PathBuf, Option<Arc<Family>>);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a guest's directory is left behind");
        }
    }
}

impl Directory {
    fn create(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path).map(|()| Self(path, None))
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Family {
    pub(super) fn create(parent: Option<&Path>) -> Result<Arc<Self>, QemuError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let directory = loop {
            // Relaxed: only uniqueness is asked of it.
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            match Directory::create(parent.join(format!("offshoot-{}-{number}", std::process::id()))) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => break made.map_err(QemuError::files("the directory for guests"))?,
            }
        };
        if directory.0.as_os_str().len() > LONGEST {
            let error =
                io::Error::new(io::ErrorKind::InvalidFilename, "too long for sockets in it: set QemuSpec::directory");
            return Err(QemuError::files("the directory for guests")(error));
        }
        // A client for each disk of each clone, and twice that while a process takes over.
        let limits = ServerLimits { clients: 1 << 16, ..ServerLimits::default() };
        let server = Server::start(&[Endpoint::unix(directory.join("disks"))], limits)?;
        Ok(Arc::new(Self { server, directory, next: AtomicU64::new(0) }))
    }

    /// Where the disks are served.
    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("disks")
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A directory for one more process.
    pub(super) fn place(self: &Arc<Self>) -> Result<Directory, QemuError> {
        let path = self.directory.join(&self.number().to_string());
        let mut place = Directory::create(path).map_err(QemuError::files("a guest's directory"))?;
        place.1 = Some(self.clone());
        Ok(place)
    }
}

/// The disks of one VM, served until this is dropped.
#[derive(Debug)]
pub(super) struct Exports {
    family: Arc<Family>,
    exports: Vec<(ExportName, Arc<Export>)>,
}

impl Exports {
    pub(super) fn serve<'a>(
        family: &Arc<Family>,
        disks: impl Iterator<Item = (&'a DiskName, &'a Arc<Disk>)>,
    ) -> Result<Self, QemuError> {
        let number = family.number();
        let mut exports = Self { family: family.clone(), exports: Vec::new() };
        for (at, (_, disk)) in disks.enumerate() {
            let refused = |why: String| QemuError::Unsupported(format!("a disk cannot be served: {why}"));
            let name = ExportName::new(format!("{number}/{at}")).map_err(|error| refused(error.to_string()))?;
            let export = family.server.add(name.clone(), Export::new(disk.clone()));
            exports.exports.push((name, export.map_err(|error| refused(error.to_string()))?));
        }
        Ok(exports)
    }

    pub(super) fn family(&self) -> &Arc<Family> {
        &self.family
    }

    /// Each disk's export, in the order of the disks.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&ExportName, &Arc<Export>)> {
        self.exports.iter().map(|(name, export)| (name, export))
    }

    /// Lets the requests under way end and holds all others.
    pub(super) fn drain(&self) -> Vec<Drained> {
        self.exports.iter().map(|(_, export)| export.drain()).collect()
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        for (name, _) in &self.exports {
            self.family.server.remove(name);
        }
    }
}

impl From<IdentityError> for QemuError {
    fn from(error: IdentityError) -> Self {
        Self::Build(error.into())
    }
}
