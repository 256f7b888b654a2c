//! The NBD server, asked by a client written from the protocol: every option, command and flag, and whatever a client should not do.
#![cfg(all(feature = "nbd", unix))]

#[path = "../../examples/nbd_clones/client.rs"]
mod client;
mod drain;
mod hostile;
mod negotiation;
mod server;
mod transmission;
mod watched;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use client::Client;
use offshoot::Tree;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::SectorCount;
use offshoot::testing::ByteSource;

/// A server on a socket of its own.
struct Served {
    server: Server,
    path: PathBuf,
}

/// A path for a socket that nobody else takes.
fn socket_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("offshoot-nbd-{}-{number}.sock", std::process::id()))
}

impl Served {
    fn start(limits: ServerLimits) -> Self {
        let path = socket_path();
        Self { server: Server::start(&[Endpoint::unix(&path)], limits).expect("a server"), path }
    }

    fn with(disks: &[(&str, Arc<Disk>)]) -> Self {
        let served = Self::start(ServerLimits::default());
        disks.iter().for_each(|(name, disk)| drop(served.add(name, disk)));
        served
    }

    fn add(&self, name: &str, disk: &Arc<Disk>) -> Arc<Export> {
        self.server.add(ExportName::new(name).expect("a name"), Export::new(disk.clone())).expect("a free name")
    }

    fn open(&self, export: &str) -> Client {
        Client::open(&self.path, export, &[]).expect("the export is there")
    }
}

fn blank(sectors: u64) -> Arc<Disk> {
    Arc::new(Disk::blank(&Tree::default(), SectorCount::new(sectors), Access::ReadWrite).expect("a disk"))
}

/// A disk over an image of these bytes.
fn over(bytes: &[u8]) -> Arc<Disk> {
    let image = Arc::new(ByteSource::new(bytes.to_vec()));
    Arc::new(Disk::over_image(&Tree::default(), image, Access::ReadWrite).expect("a disk"))
}

/// Waits for what another thread is about to do.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed().as_secs() < 60, "still waiting: {what}");
        std::thread::yield_now();
    }
}
