//! Socket files of servers.
//!
//! A socket file appears at its path with its permissions set: it is bound in a directory that only this user may enter, and
//! then moved. A file that nobody listens at any more is replaced, one that somebody does is left alone. Must not know who listens.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Permission bits of a socket file: who may write to it may connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketMode(u32);

impl SocketMode {
    /// This user alone.
    pub const OWNER: Self = Self(0o600);
    /// This user and the file's group.
    pub const GROUP: Self = Self(0o660);

    /// Bits as chmod(1) takes them; those beyond 0o777 are dropped.
    pub const fn new(bits: u32) -> Self {
        Self(bits & 0o777)
    }
}

/// A socket file of our own: removed on drop, unless another one has come to its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|at| (at.dev(), at.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a socket file is left behind");
        }
    }
}

/// Listens at `path`, for those whom `mode` lets connect.
///
/// # Errors
/// `AddrInUse` where somebody listens there, `AlreadyExists` where there is something else; those of the system.
pub(crate) fn bind_file(path: &Path, mode: SocketMode) -> io::Result<(UnixListener, SocketFile)> {
    // A longer path could be bound by its hidden name, and nobody could connect to it.
    std::os::unix::net::SocketAddr::from_pathname(path)?;
    refuse_what_is_used(path)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let private = private_directory(directory)?;
    let hidden = private.join("s");
    let bound = (|| {
        let listener = UnixListener::bind(&hidden)?;
        fs::set_permissions(&hidden, fs::Permissions::from_mode(mode.0))?;
        let at = fs::symlink_metadata(&hidden)?;
        fs::rename(&hidden, path)?;
        Ok((listener, SocketFile { path: path.to_owned(), device: at.dev(), inode: at.ino() }))
    })();
    if bound.is_err() {
        // It may not even be there; the first error is the one to tell.
        let _gone = fs::remove_file(&hidden);
    }
    fs::remove_dir(&private)?;
    bound
}

/// A path may be taken where there is nothing, or a socket that was left behind.
fn refuse_what_is_used(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(at) if !at.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is not a socket"))
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens at this socket")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(error),
        },
    }
}

fn private_directory(parent: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        // Short: a socket's path has some 100 bytes.
        let name = format!(".n{:x}.{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path),
        }
    }
}
