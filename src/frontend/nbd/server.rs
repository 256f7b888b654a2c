//! The server: listens, lets clients in up to a limit, and knows who is there so that it can end.
//!
//! One thread accepts, one reads each client. Must not know the protocol.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, PipeWriter, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::connection::{self, Common};
use super::export::{AddError, Export, ExportName, Exports};
use super::limits::{Budget, ServerLimits};
use super::socket::{Endpoint, Listener, Socket};
use crate::sys::wait::wait_readable;

/// How long accepting rests where the process has no descriptor or thread for one more client.
const REST: Duration = Duration::from_millis(50);
/// How long [`Server`]'s drop waits for replies to be taken.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It cannot listen there.
    #[error("cannot listen at {endpoint:?}: {error}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// Limits under which no request could ever be served.
    #[error("limits that serve nobody: {0}")]
    Limits(&'static str),
    /// There is no thread, or no descriptor, for it.
    #[error("no thread or descriptor for the server: {0}")]
    Resources(#[source] io::Error),
}

/// A server of exports to any number of clients, on threads of its own. Dropping it shuts it down.
///
/// ```
/// use std::sync::Arc;
/// use offshoot::{Tree, disk::{Access, Disk}, page::SectorCount, frontend::nbd::*};
/// let at = std::env::temp_dir().join(format!("offshoot-doc-{}.sock", std::process::id()));
/// let server = Server::start(&[Endpoint::unix(&at)], ServerLimits::default())?;
/// let disk = Disk::blank(&Tree::default(), SectorCount::new(2048), Access::ReadWrite)?;
/// server.add(ExportName::new("root")?, Export::new(Arc::new(disk)))?;
/// // nbdinfo "nbd+unix:///root?socket=…"
/// server.shutdown(std::time::Duration::from_secs(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    tcp: Vec<SocketAddr>,
    wake: PipeWriter,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    common: Common,
    clients: Mutex<Clients>,
    left: Condvar,
}

#[derive(Default)]
struct Clients {
    next: u64,
    there: HashMap<u64, Arc<Client>>,
}

struct Client {
    socket: Socket,
    export: OnceLock<Arc<Export>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("common", &self.common).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens, and serves nothing yet: exports are added while it runs.
    ///
    /// # Errors
    /// [`StartError`]. Nothing listens then, and no socket file is left.
    pub fn start(endpoints: &[Endpoint], limits: ServerLimits) -> Result<Self, StartError> {
        if limits.request.get() > u32::MAX.into() || limits.request.get() < 64 << 10 {
            return Err(StartError::Limits("`request` is from 64 KiB to 4 GiB less one byte"));
        }
        if limits.in_flight < limits.request {
            return Err(StartError::Limits("`in_flight` is as much as the longest `request` at least"));
        }
        if [limits.clients, limits.requests_per_client, limits.workers_per_client].contains(&0) {
            return Err(StartError::Limits("clients, requests and workers are one at least"));
        }
        if limits.handshake.is_zero() || limits.patience.is_zero() {
            return Err(StartError::Limits("times are not zero"));
        }
        let listen = |endpoint: &Endpoint| {
            Listener::bind(endpoint).map_err(|error| StartError::Listen { endpoint: endpoint.clone(), error })
        };
        let listeners = endpoints.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        let tcp = listeners.iter().filter_map(Listener::address).collect();
        let (woken, wake) = io::pipe().map_err(StartError::Resources)?;
        let common = Common { exports: Exports::default(), limits, budget: Budget::new(limits.in_flight) };
        let shared = Arc::new(Shared { common, clients: Mutex::default(), left: Condvar::new() });
        let accepting = {
            let shared = shared.clone();
            let accept = move || accept(&shared, &listeners, &woken);
            thread::Builder::new().name("nbd-accept".into()).spawn(accept).map_err(StartError::Resources)?
        };
        Ok(Self { shared, tcp, wake, accepting: Some(accepting) })
    }

    /// Offers one more disk.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, name: ExportName, export: Export) -> Result<Arc<Export>, AddError> {
        self.shared.common.exports.add(name, export)
    }

    /// Takes an export away and hangs up on its clients, once what they have asked for is done. Nothing touches its disk through this
    /// server when it returns; replies may still be on their way. `None` where there is none of this name.
    pub fn remove(&self, name: &ExportName) -> Option<Arc<Export>> {
        let export = self.shared.common.exports.remove(name)?;
        for client in self.shared.clients.lock().there.values() {
            if client.export.get().is_some_and(|its| Arc::ptr_eq(its, &export)) {
                client.socket.shut(Shutdown::Read);
            }
        }
        Some(export)
    }

    /// An export by name.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        self.shared.common.exports.get(name)
    }

    /// The names of all exports, in order.
    pub fn names(&self) -> Vec<ExportName> {
        self.shared.common.exports.names()
    }

    /// Where it listens on TCP, with the ports it was given.
    pub fn tcp_addresses(&self) -> &[SocketAddr] {
        &self.tcp
    }

    /// How many clients are connected now.
    pub fn clients(&self) -> u64 {
        self.shared.clients.lock().there.len() as u64
    }

    /// Ends: lets nobody in, has requests that are being executed end, answers later ones with ESHUTDOWN, and hangs up. Clients that do not
    /// take their replies within `grace` lose them. Nothing touches any disk when it returns, and socket files are gone.
    pub fn shutdown(mut self, grace: Duration) {
        self.end(grace);
    }

    fn end(&mut self, grace: Duration) {
        let Some(accepting) = self.accepting.take() else { return };
        // The other end is held by the thread that is waited for next: writing cannot fail but for that thread's panic.
        let _woken = self.wake.write_all(&[0]);
        if accepting.join().is_err() {
            tracing::error!("the accepting thread has panicked");
        }
        self.shared.common.exports.close();
        let mut clients = self.shared.clients.lock();
        clients.there.values().for_each(|client| client.socket.shut(Shutdown::Read));
        self.shared.left.wait_while_for(&mut clients, |clients| !clients.there.is_empty(), grace);
        clients.there.values().for_each(|client| client.socket.shut(Shutdown::Both));
        self.shared.left.wait_while(&mut clients, |clients| !clients.there.is_empty());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(DROP_GRACE);
    }
}

/// How long a client that there is no room for may take to hear so.
const TURNED_AWAY: Duration = Duration::from_secs(1);
/// How many of them wait to hear it. More are hung up on.
const MOST_TURNED_AWAY: usize = 16;

/// Clients that there is no room for: one thread tells them so, one after the other. `None` where there is no thread for it.
fn turn_away(limits: ServerLimits) -> Option<SyncSender<Socket>> {
    let (sender, waiting) = mpsc::sync_channel::<Socket>(MOST_TURNED_AWAY);
    let tell = move || {
        for socket in waiting {
            if let Err(error) = connection::turn_away(&limits, &socket, TURNED_AWAY) {
                tracing::debug!(%error, "a client that there is no room for was lost");
            }
            socket.shut(Shutdown::Both);
        }
    };
    // It holds nothing of the server, and ends with the last of those who wait.
    let spawned = thread::Builder::new().name("nbd-full".into()).spawn(tell);
    spawned
        .map(|_| sender)
        .inspect_err(|error| tracing::warn!(%error, "clients are hung up on where there is no room"))
        .ok()
}

fn accept(shared: &Arc<Shared>, listeners: &[Listener], woken: &io::PipeReader) {
    // Made when the first client is one too many.
    let mut full = None;
    let mut fds = vec![woken.as_fd()];
    fds.extend(listeners.iter().map(AsFd::as_fd));
    loop {
        let ready = match wait_readable(&fds, None) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::warn!(%error, "cannot wait for clients");
                thread::sleep(REST);
                continue;
            }
        };
        if ready[0] {
            return;
        }
        for (listener, _) in listeners.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            let turned_away = |socket| {
                let limits = shared.common.limits;
                if let Some(waiting) = full.get_or_insert_with(|| turn_away(limits)) {
                    // Dropped where too many wait: it is hung up on.
                    let _hung_up_on = waiting.try_send(socket);
                }
            };
            let accepted = listener.accept();
            let welcomed = accepted.and_then(|socket| socket.map_or(Ok(()), |it| welcome(shared, it, turned_away)));
            if let Err(error) = welcomed {
                tracing::warn!(%error, "a client was not let in");
                // Most likely no descriptor or thread is left, and the client still waits: do not spin.
                let resting = wait_readable(&fds[..1], Some(REST));
                if resting.is_ok_and(|ready| ready[0]) {
                    return;
                }
            }
        }
    }
}

fn welcome(shared: &Arc<Shared>, socket: Socket, turn_away: impl FnOnce(Socket)) -> io::Result<()> {
    let (client, seat) = {
        let mut clients = shared.clients.lock();
        if clients.there.len() as u64 >= shared.common.limits.clients {
            tracing::warn!(limit = shared.common.limits.clients, "one client too many: raise ServerLimits::clients");
            turn_away(socket);
            return Ok(());
        }
        let client = Arc::new(Client { socket, export: OnceLock::new() });
        let number = clients.next;
        clients.next += 1;
        clients.there.insert(number, client.clone());
        (client, Seat { shared: shared.clone(), number })
    };
    let serve = move || {
        let agreed = |agreed: &super::negotiation::Agreed| {
            let _first = client.export.set(agreed.export.clone());
        };
        if let Err(error) = connection::serve(&seat.shared.common, &client.socket, agreed) {
            tracing::debug!(%error, "a client was lost");
        }
        client.socket.shut(Shutdown::Both);
        // Who waits for the seat finds nothing of the client left.
        drop(client);
        drop(seat);
    };
    thread::Builder::new().name("nbd-client".into()).spawn(serve).map(|_| ())
}

/// A client's place in the list; given back on drop, by whatever way its thread ends.
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.clients.lock().there.remove(&self.number);
        self.shared.left.notify_all();
    }
}
