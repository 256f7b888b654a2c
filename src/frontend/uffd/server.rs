//! The server: listens at one socket file, and serves every VMM that connects from one image, each on threads of its own.
//!
//! Must not know the protocol.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::counts::{Counters, FaultCounts};
use super::options::{FaultService, ServerLimits};
use super::service::{End, Served, serve_counted};
use super::stop::Stop;
use crate::frontend::socket_file::{SocketFile, SocketMode, bind_file};
use crate::image::Source;
use crate::sys::wait::wait_readable;

/// How long accepting rests where the process has no descriptor or thread for one more VMM.
const REST: Duration = Duration::from_millis(50);

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It cannot listen there.
    #[error("cannot listen at {}: {error}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// Limits under which nobody could be served.
    #[error("limits that serve nobody: {0}")]
    Limits(&'static str),
    /// There is no thread, or no descriptor, for it.
    #[error("no thread or descriptor for the server: {0}")]
    Resources(#[source] io::Error),
}

/// Who is told of each VMM that is no longer served.
type Notice = dyn Fn(&Served) + Send + Sync;

/// A server of one image to any number of VMMs. Dropping it shuts it down.
///
/// ```
/// use std::sync::Arc;
/// use offshoot::{backing::{Backing, Heap}, frontend::uffd::*, page::*, Tree};
/// let ram: Heap = Heap::create(&Tree::default(), Geometry::new(ByteSize::mib(1), PageSize::KIB_4)?, None)?;
/// let at = std::env::temp_dir().join(format!("offshoot-uffd-doc-{}.sock", std::process::id()));
/// // A fork point's `ram()` in its place, and `at` as the `backend_path` of Firecracker's snapshot/load.
/// let server = Server::start(&at, SocketMode::OWNER, Arc::new(ram.origin()), ServerLimits::default(), |served| {
///     if !matches!(served.end, End::Exited) {
///         eprintln!("VMM {:?} is not served any more: {}", served.pid, served.end); // and should be ended
///     }
/// })?;
/// assert_eq!(server.vmms(), 0);
/// server.shutdown();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    image: Arc<dyn Source>,
    service: FaultService,
    most: u64,
    notice: Box<Notice>,
    stop: Stop,
    vmms: Mutex<Vmms>,
    left: Condvar,
}

#[derive(Default)]
struct Vmms {
    next: u64,
    there: HashMap<u64, Arc<Counters>>,
    /// Of those that have left.
    counts: FaultCounts,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("service", &self.service).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens at a socket file and serves who comes from `image`; calls `notice` for each VMM that is no longer served, on the thread that
    /// served it. The socket is all there is of access control: whoever connects can read the whole image.
    ///
    /// # Errors
    /// [`StartError`]. Nothing listens then, and no socket file is left.
    pub fn start(
        path: &Path,
        mode: SocketMode,
        image: Arc<dyn Source>,
        limits: ServerLimits,
        notice: impl Fn(&Served) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        if limits.vmms == 0 {
            return Err(StartError::Limits("`vmms` is one at least"));
        }
        if let Some(problem) = limits.service.problem() {
            return Err(StartError::Limits(problem));
        }
        let bound = bind_file(path, mode).and_then(|(listener, file)| {
            listener.set_nonblocking(true)?;
            Ok((listener, file))
        });
        let (listener, file) = bound.map_err(|error| StartError::Listen { path: path.to_owned(), error })?;
        let shared = Arc::new(Shared {
            image,
            service: limits.service,
            most: limits.vmms,
            notice: Box::new(notice),
            stop: Stop::new().map_err(StartError::Resources)?,
            vmms: Mutex::default(),
            left: Condvar::new(),
        });
        let accepting = {
            let shared = shared.clone();
            let accept = move || accept(&shared, &listener, file);
            thread::Builder::new().name("uffd-accept".into()).spawn(accept).map_err(StartError::Resources)?
        };
        Ok(Self { shared, accepting: Some(accepting) })
    }

    /// VMMs that are served now.
    pub fn vmms(&self) -> u64 {
        self.shared.vmms.lock().there.len() as u64
    }

    /// What was done for all VMMs so far.
    pub fn counts(&self) -> FaultCounts {
        let vmms = self.shared.vmms.lock();
        let mut counts = vmms.counts;
        vmms.there.values().for_each(|counters| counts += counters.now());
        counts
    }

    /// Ends: lets nobody in, and answers no more faults. A VMM that lives on stops at the first page that it has not touched before, so end
    /// them first. Nothing reads the image when it returns, and the socket file is gone.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.stop.stop();
        if accepting.join().is_err() {
            tracing::error!("the accepting thread has panicked");
        }
        let mut vmms = self.shared.vmms.lock();
        self.shared.left.wait_while(&mut vmms, |vmms| !vmms.there.is_empty());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, _file: SocketFile) {
    let fds = [shared.stop.as_fd(), listener.as_fd()];
    loop {
        let ready = match wait_readable(&fds, None) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::warn!(%error, "cannot wait for VMMs");
                thread::sleep(REST);
                continue;
            }
        };
        if ready[0] {
            return;
        }
        let welcomed = match listener.accept() {
            Ok((socket, _)) => welcome(shared, socket),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = welcomed {
            tracing::warn!(%error, "a VMM was not let in");
            // Most likely no descriptor or thread is left, and the VMM still waits: do not spin.
            if wait_readable(&fds[..1], Some(REST)).is_ok_and(|ready| ready[0]) {
                return;
            }
        }
    }
}

fn welcome(shared: &Arc<Shared>, socket: UnixStream) -> io::Result<()> {
    let counters = Arc::<Counters>::default();
    let seat = {
        let mut vmms = shared.vmms.lock();
        if vmms.there.len() as u64 >= shared.most {
            tracing::warn!(limit = shared.most, "one VMM too many: raise ServerLimits::vmms");
            return Ok(());
        }
        let number = vmms.next;
        vmms.next += 1;
        vmms.there.insert(number, counters.clone());
        Seat { shared: shared.clone(), number }
    };
    let serve = move || {
        let shared = &seat.shared;
        // The image is the embedder's code: a panic in it ends one VMM's service, and is told like any other end.
        let served = catch_unwind(AssertUnwindSafe(|| {
            serve_counted(&socket, &*shared.image, &shared.service, &shared.stop, &counters)
        }));
        let served = served.unwrap_or_else(|_| Served { end: End::Panicked, pid: None, counts: counters.now() });
        tracing::debug!(end = %served.end, pid = served.pid, "a VMM is not served any more");
        (shared.notice)(&served);
        drop(socket);
        drop(seat);
    };
    thread::Builder::new().name("uffd-vmm".into()).spawn(serve).map(|_| ())
}

/// A VMM's place in the list; given back on drop, by whatever way its thread ends.
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut vmms = self.shared.vmms.lock();
        if let Some(counters) = vmms.there.remove(&self.number) {
            vmms.counts += counters.now();
        }
        self.shared.left.notify_all();
    }
}
