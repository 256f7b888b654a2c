//! Disks for any hypervisor: a server of the Network Block Device protocol.
//!
//! A [`Server`] offers any number of [`Export`]s, one for each disk of each clone, on Unix sockets and on TCP where asked. It needs nothing
//! of a disk but [`Disk`](crate::disk::Disk), so whatever backing a disk lies on is served alike. Exports come and
//! go while it runs. [`Export::drain`] holds an export's requests for as long as a fork takes. [`Session`] is one client without a socket.
//!
//! `docs/nbd.md` says what is offered and what the limits are. Inside: `negotiation`, `request`, `reply`, `context` and `wire` are the
//! protocol and know no sockets; `execute` and `status` are disks as requests see them; `connection`, `socket` and `server` are threads.
//!
//! Locks: the queue of a connection, its sending lock, the server's list of clients and the set of exports are never held
//! together, but for `Exports::close`, which waits at the gates with the set locked. A gate is passed with none of them held.

mod connection;
mod context;
mod execute;
mod export;
mod gate;
mod limits;
mod negotiation;
mod reply;
mod request;
mod server;
mod session;
mod socket;
mod status;
mod wire;

pub use crate::frontend::socket_file::SocketMode;
pub use context::{BASE_ALLOCATION, DIRTY_BITMAP};
pub use export::{AddError, BadName, Export, ExportName, Exports};
pub use gate::Drained;
pub use limits::ServerLimits;
pub use server::{Server, StartError};
pub use session::{Session, SessionStep};
pub use socket::Endpoint;
