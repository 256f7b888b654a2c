//! Sockets, of either family, as far as a connection needs them; and where a server listens.
//!
//! A socket file appears at its path with its permissions set: it is bound in a directory that only this user may enter, and
//! then moved. A file that nobody listens at any more is replaced, one that somebody does is left alone.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A socket file.
    Unix {
        /// Its path. What is there must be absent, or a socket that nobody listens at.
        path: PathBuf,
        /// Who may connect.
        mode: SocketMode,
    },
    /// A TCP port; 0 takes a free one. There is no encryption and no password: whoever reaches it may read and write.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// A socket file for this user alone.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::Unix { path: path.into(), mode: SocketMode::OWNER }
    }
}

#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener, #[expect(dead_code, reason = "held for its drop")] SocketFile),
    Tcp(TcpListener),
}

/// A socket file of our own: removed on drop, unless another one has come to its place.
#[derive(Debug)]
pub(super) struct SocketFile {
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

impl Listener {
    pub(super) fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        let listener = match endpoint {
            Endpoint::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
            Endpoint::Unix { path, mode } => {
                let (listener, file) = bind_file(path, *mode)?;
                Self::Unix(listener, file)
            }
        };
        match &listener {
            Self::Unix(listener, _) => listener.set_nonblocking(true)?,
            Self::Tcp(listener) => listener.set_nonblocking(true)?,
        }
        Ok(listener)
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix(..) => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// One client that waits, if one does.
    pub(super) fn accept(&self) -> io::Result<Option<Socket>> {
        let accepted = match self {
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
        };
        match accepted {
            Ok(socket) => {
                match &socket {
                    Socket::Unix(stream) => stream.set_nonblocking(false)?,
                    Socket::Tcp(stream) => {
                        stream.set_nonblocking(false)?;
                        stream.set_nodelay(true)?;
                    }
                }
                Ok(Some(socket))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn bind_file(path: &Path, mode: SocketMode) -> io::Result<(UnixListener, SocketFile)> {
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

/// A client's socket. Shared by the thread that reads and those that reply.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Unix(stream) => (&mut &*stream).read(buf),
                Self::Tcp(stream) => (&mut &*stream).read(buf),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Everything, or an error after which nothing more may be sent.
    pub(super) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => (&mut &*stream).write_all(bytes),
            Self::Tcp(stream) => (&mut &*stream).write_all(bytes),
        }
    }

    /// How long a read may wait; `None` for ever.
    pub(super) fn read_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(patience),
            Self::Tcp(stream) => stream.set_read_timeout(patience),
        }
    }

    /// How long a write may stand still.
    pub(super) fn write_patience(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(Some(patience)),
            Self::Tcp(stream) => stream.set_write_timeout(Some(patience)),
        }
    }

    /// Ends one direction, or both. Whoever waits in it wakes up.
    pub(super) fn shut(&self, how: Shutdown) {
        // A socket that the client has closed refuses; it is shut then.
        let _closed = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}
