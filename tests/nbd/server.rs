//! The server itself: sockets, clients that come and go, exports that do, and its end.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use offshoot::Tree;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Endpoint, Export, ExportName, Server, ServerLimits, SocketMode, StartError};
use offshoot::page::{ByteSize, Lba, SectorCount};

use super::client::*;
use super::{Served, blank, socket_path, until};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_hundred_clients_on_ten_exports() {
    let served = Served::with(&[]);
    let disks: Vec<_> = (0..10).map(|_| blank(1024)).collect();
    disks.iter().enumerate().for_each(|(at, disk)| drop(served.add(&at.to_string(), disk)));
    thread::scope(|threads| {
        for number in 0..100u64 {
            let served = &served;
            threads.spawn(move || {
                let mut client = served.open(&(number % 10).to_string());
                let at = number / 10 * 4096;
                for round in 0..20u8 {
                    client.write(at, &[round ^ number as u8; 4096]).unwrap();
                    assert_eq!(client.read(at, 4096).unwrap(), [round ^ number as u8; 4096]);
                }
                client.flush().unwrap();
                client.disconnect().unwrap();
            });
        }
    });
    for (at, disk) in disks.iter().enumerate() {
        for slot in 0..10 {
            let mut seen = [0; 4096];
            disk.read(Lba::new(slot * 8), &mut seen).unwrap();
            assert_eq!(seen, [19 ^ (slot * 10 + at as u64) as u8; 4096]);
        }
    }
    until("all have left", || served.server.clients() == 0);
}

#[test]
fn one_client_too_many_is_told_so_and_hung_up_on() {
    let served = Served::start(ServerLimits { clients: 2, ..ServerLimits::default() });
    served.add("d", &blank(8));
    let (first, _second) = (served.open("d"), served.open("d"));
    let refused = Client::open(&served.path, "d", &[]).err().expect("one too many").to_string();
    assert!(refused.contains("as many clients as it takes") && refused.contains("0x80000002"), "{refused}");
    // Whatever it asks, and for as long as it likes to ask, within a second.
    let mut third = Client::connect(&served.path).unwrap();
    for option in [OPT_LIST, OPT_STRUCTURED_REPLY, OPT_INFO, OPT_GO, 4711] {
        let answers = third.option(option, &info_request("d", &[])).unwrap();
        assert!(answers.len() == 1 && answers[0].0 == 0x8000_0002, "{option}: {answers:?}");
    }
    assert_eq!(third.option(OPT_ABORT, &[]).unwrap()[0].0, REP_ACK);
    assert!(third.is_over());
    // The old way has no errors.
    let mut old = Client::connect(&served.path).unwrap();
    old.send(&option_bytes(OPT_EXPORT_NAME, b"d")).unwrap();
    assert!(old.is_over());
    // Those who say nothing hold up nobody that has a place, and are hung up on.
    let mut silent: Vec<_> = (0..30).map(|_| UnixStream::connect(&served.path).unwrap()).collect();
    let mut greeting = Vec::new();
    silent.pop().unwrap().read_to_end(&mut greeting).unwrap();
    assert!(greeting.is_empty(), "too many wait: this one is not even greeted");
    drop(silent);
    first.disconnect().unwrap();
    until("its place is free", || served.server.clients() == 1);
    served.open("d").read(0, 512).unwrap();
}

#[test]
fn bytes_in_flight_are_limited() {
    let limits = ServerLimits {
        request: ByteSize::kib(128),
        in_flight: ByteSize::kib(256),
        patience: Duration::from_millis(20),
        ..ServerLimits::default()
    };
    let served = Served::start(limits);
    let export = served.add("d", &blank(1024));
    let mut client = served.open("d");
    // Held, requests keep what they have reserved: two fit.
    let drained = export.drain();
    let held = [(); 2].map(|()| client.request(0, READ, 0, 128 << 10, &[]).unwrap());
    let third = client.request(0, READ, 0, 128 << 10, &[]).unwrap();
    let write = client.request(0, WRITE, 0, 128 << 10, &[7; 128 << 10]).unwrap();
    for refused in [third, write] {
        let reply = client.reply().unwrap();
        assert_eq!((reply.cookie, reply.error), (refused, ENOMEM));
    }
    drop(drained);
    for _ in held {
        let reply = client.reply().unwrap();
        assert!(held.contains(&reply.cookie));
        assert!(reply.bytes(0, 128 << 10).iter().all(|byte| *byte == 0), "the refused write was not done");
    }
    client.write(0, &[7; 128 << 10]).unwrap();
}

#[test]
fn an_export_is_removed_while_clients_use_it() {
    let disk = blank(1024);
    let served = Served::with(&[("stays", blank(8)), ("goes", disk.clone())]);
    let (mut stays, mut goes) = (served.open("stays"), served.open("goes"));
    goes.write(0, &[1; 512]).unwrap();
    let name = ExportName::new("goes").unwrap();
    let removed = served.server.remove(&name).unwrap();
    assert!(served.server.remove(&name).is_none());
    // It is hung up on, or told why first.
    if let Ok(reply) = goes.call(0, WRITE, 0, 512, &[2; 512]) {
        assert_eq!(reply.error, ESHUTDOWN);
    }
    assert!(Client::open(&served.path, "goes", &[]).is_err());
    until("its client is gone", || served.server.clients() == 1);
    drop(removed);
    until("nobody has the disk any more", || Arc::strong_count(&disk) == 1);
    stays.write(0, &[3; 512]).unwrap();
    // The name is free.
    served.add("goes", &disk);
    assert_eq!(served.open("goes").read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn ends_with_replies_sent_and_the_socket_file_gone() {
    let disk = blank(1 << 15);
    let served = Served::with(&[("d", disk.clone())]);
    let mut client = served.open("d");
    for at in 0..32 {
        client.request(0, WRITE, at * (128 << 10), 128 << 10, &[at as u8 + 1; 128 << 10]).unwrap();
    }
    let path = served.path.clone();
    let ending = thread::spawn(move || served.server.shutdown(SOON));
    let mut done = 0;
    while let Ok(reply) = client.reply() {
        assert!(matches!(reply.error, 0 | ESHUTDOWN));
        done += u64::from(reply.error == 0);
    }
    ending.join().unwrap();
    assert!(!path.exists());
    assert_eq!(Arc::strong_count(&disk), 1, "the server has let go");
    let mut written = 0;
    for at in 0..32u64 {
        let mut seen = [0; 512];
        disk.read(Lba::new(at * 256), &mut seen).unwrap();
        written += u64::from(seen[0] != 0);
    }
    assert_eq!(written, done, "done is what was answered so");
}

#[test]
fn socket_files_are_taken_over_or_left_alone() {
    let path = socket_path();
    // Left behind by somebody who died.
    drop(UnixListener::bind(&path).unwrap());
    let endpoint = Endpoint::Unix { path: path.clone(), mode: SocketMode::GROUP };
    let server = Server::start(std::slice::from_ref(&endpoint), ServerLimits::default()).unwrap();
    let at = fs::symlink_metadata(&path).unwrap();
    assert!(at.file_type().is_socket());
    assert_eq!(at.permissions().mode() & 0o777, 0o660);
    // In use.
    let error = Server::start(&[endpoint], ServerLimits::default()).unwrap_err();
    assert!(
        matches!(&error, StartError::Listen { error, .. } if error.kind() == std::io::ErrorKind::AddrInUse),
        "{error}"
    );
    assert!(Client::connect(&path).is_ok(), "the first goes on");
    // Replaced by hand: not ours to remove.
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"mine").unwrap();
    drop(server);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    // And not a socket at all.
    let error = Server::start(&[Endpoint::unix(&path)], ServerLimits::default()).unwrap_err();
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    fs::remove_file(&path).unwrap();
    let leftovers = fs::read_dir(path.parent().unwrap())
        .unwrap()
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!(".n{:x}.", std::process::id())));
    // Other tests bind at the same time; their directories go at once.
    let leftovers: Vec<_> = leftovers.map(|entry| entry.path()).collect();
    until("no directory is left", || leftovers.iter().all(|path| !path.exists()));
}

#[test]
fn tcp_where_it_was_asked_for() {
    let path = socket_path();
    let endpoints = [Endpoint::unix(&path), Endpoint::Tcp("127.0.0.1:0".parse().unwrap())];
    let server = Server::start(&endpoints, ServerLimits::default()).unwrap();
    server.add(ExportName::new("d").unwrap(), Export::new(blank(64))).unwrap();
    let [address] = *server.tcp_addresses() else { panic!("one port") };
    let mut remote = Client::greet(Stream::Tcp(TcpStream::connect(address).unwrap()), 3).unwrap();
    remote.structure().unwrap();
    remote.go("d").unwrap();
    remote.write(512, &[4; 512]).unwrap();
    remote.flush().unwrap();
    assert_eq!(Client::open(&path, "d", &[]).unwrap().read(512, 512).unwrap(), [4; 512]);
    remote.disconnect().unwrap();
    server.shutdown(SOON);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn limits_that_serve_nobody_are_refused() {
    let default = ServerLimits::default();
    for limits in [
        ServerLimits { request: ByteSize::gib(4), ..default },
        ServerLimits { request: ByteSize::kib(4), ..default },
        ServerLimits { in_flight: ByteSize::mib(1), ..default },
        ServerLimits { clients: 0, ..default },
        ServerLimits { workers_per_client: 0, ..default },
        ServerLimits { requests_per_client: 0, ..default },
        ServerLimits { patience: Duration::ZERO, ..default },
    ] {
        let path = socket_path();
        assert!(matches!(Server::start(&[Endpoint::unix(&path)], limits), Err(StartError::Limits(_))));
        assert!(!path.exists());
    }
}

#[test]
fn a_long_path_is_an_error_and_leaves_nothing() {
    let directory = socket_path();
    fs::create_dir(&directory).unwrap();
    let long = Endpoint::unix(directory.join("x".repeat(200)));
    assert!(matches!(Server::start(&[long], ServerLimits::default()), Err(StartError::Listen { .. })));
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    fs::remove_dir(&directory).unwrap();
}

#[test]
fn a_read_only_disk_is_a_read_only_export() {
    let disk = Disk::blank(&Tree::default(), SectorCount::new(8), Access::ReadOnly).unwrap();
    let served = Served::with(&[("d", Arc::new(disk))]);
    let mut client = served.open("d");
    assert_eq!(client.flags & 2, 2);
    assert_eq!(client.call(0, WRITE, 0, 512, &[1; 512]).unwrap().error, EPERM);
}
