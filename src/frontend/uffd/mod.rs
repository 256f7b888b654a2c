//! RAM for VMMs that have their page faults served: a server over userfaultfd, with Firecracker's hand-shake.
//!
//! A [`Server`] listens on a Unix socket. A VMM that restores a snapshot connects, sends one JSON message that says where its memory lies
//! and a userfaultfd, and from then on each page that its guest touches first is put there from an image: any
//! [`Source`](crate::image::Source), so any fork point's RAM and any file. [`serve`] is one VMM on the calling thread.
//!
//! A page gets the image's bytes once. When it faults again, it was dropped (by a balloon, say), and reads as zeroes, as memory that a
//! process gives back does. That rule needs one bit a page, and no word from the VMM beyond the fault itself.
//!
//! `docs/hypervisors.md` says what is tested. Inside: `map` is where memory lies, `handshake` how a VMM tells, `served` which pages have
//! had their bytes, `service` the faults of one VMM, `server` threads and sockets.
//!
//! Locks of one VMM: `seat` (who reads events) is taken before `order` (nobody puts pages while events are read), never after it.

mod counts;
mod handshake;
mod map;
mod options;
mod served;
mod server;
mod service;
mod snapshot;
mod stop;

pub use crate::frontend::socket_file::SocketMode;
pub use crate::sys::foreign_uffd::VmmAddress;
pub use counts::FaultCounts;
pub use handshake::HandshakeError;
pub use map::{MapError, MemoryMap, MemoryRegion};
pub use options::{FaultService, ServerLimits, Unreadable};
pub use server::{Server, StartError};
pub use service::{End, Served, serve};
pub use snapshot::{MemoryFile, SnapshotDir, SnapshotError};
pub use stop::Stop;
