//! A server over a durable disk, killed between and during acknowledged flushes: whatever it acknowledged is there when the disk is opened again.
//!
//! The server is this program, started again as its own child. Its disk is forked now and then, so that a kill meets layers too. Each sector
//! carries the number of its last write; the model knows, for each, which was acknowledged to be durable and which may have come after.
#![cfg(all(feature = "nbd", target_os = "linux"))]

#[path = "../examples/nbd_clones/client.rs"]
mod client;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use client::{Client, FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES};
use offshoot::backing::{Backing, Heap};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Drained, Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::store::{DiskDir, DiskId};
use offshoot::testing::Dice;
use offshoot::{BoxError, DeviceState, DiskName, Guest, Tree, Vm, VmName};

const VICTIM: &str = "OFFSHOOT_NBD_VICTIM";
const SECTORS: u64 = 512;

struct Remote(Arc<Export>, Option<Drained>);

impl Guest for Remote {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.1 = Some(self.0.drain());
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(*b""))
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.1 = None;
        Ok(())
    }
}

/// The child of the test below: serves the disk, forks it for each line it is sent, until it is killed.
#[test]
fn victim() {
    let Ok(told) = std::env::var(VICTIM) else { return };
    let (dir, id) = told.rsplit_once('=').unwrap();
    let dir = Path::new(dir);
    let tree = Tree::default();
    let store = DiskDir::open(dir.join("store"), &tree).unwrap();
    let durable = store.open_disk(DiskId::parse(id).unwrap(), None).unwrap();
    let disk = Disk::over(durable, SectorCount::new(SECTORS), Access::ReadWrite).unwrap();
    let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).unwrap();
    let disks = vec![(DiskName::new("d"), disk)];
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("victim").unwrap(), layout, disks).unwrap();
    vm.start().unwrap();
    let server = Server::start(&[Endpoint::unix(dir.join("s"))], ServerLimits::default()).unwrap();
    let disk = vm.disk("d").unwrap().clone();
    let mut guest = Remote(server.add(ExportName::new("d").unwrap(), Export::new(disk)).unwrap(), None);
    println!("\nserving");
    for line in std::io::stdin().lines() {
        line.unwrap();
        vm.fork(&mut guest).unwrap();
        println!("\nforked");
    }
}

/// What one sector may hold: the write that is durable, and those that came after it, in order.
struct Sector {
    versions: Vec<u64>,
    /// A write of it is under way: no other is begun, so that their order is known.
    busy: bool,
    /// How many of `versions` were acknowledged.
    answered: usize,
}

struct Model(Vec<Sector>);

enum Sent {
    Change {
        sectors: std::ops::Range<usize>,
        durable: bool,
    },
    /// How many versions of each sector had been answered when it was sent.
    Flush(Vec<u64>),
}

impl Model {
    fn new() -> Self {
        Self((0..SECTORS).map(|_| Sector { versions: vec![0], busy: false, answered: 1 }).collect())
    }

    fn begin(&mut self, sectors: std::ops::Range<usize>, stamp: u64) {
        for sector in &mut self.0[sectors] {
            sector.busy = true;
            sector.versions.push(stamp);
        }
    }

    /// The newest answered write of each sector: what a flush that is sent now covers.
    fn covered(&self) -> Vec<u64> {
        self.0.iter().map(|sector| sector.versions[sector.answered - 1]).collect()
    }

    fn acknowledged(&mut self, sent: Sent) {
        match sent {
            Sent::Change { sectors, durable } => {
                for sector in &mut self.0[sectors] {
                    sector.busy = false;
                    sector.answered = sector.versions.len();
                    if durable {
                        sector.from(sector.versions[sector.answered - 1]);
                    }
                }
            }
            Sent::Flush(covered) => self.0.iter_mut().zip(covered).for_each(|(sector, version)| sector.from(version)),
        }
    }
}

impl Sector {
    /// Nothing older than this write may be found any more.
    fn from(&mut self, version: u64) {
        // A later one may be known to be durable already.
        if let Some(at) = self.versions.iter().rposition(|known| *known == version) {
            self.versions.drain(..at);
            self.answered -= at;
        }
    }
}

struct Victim {
    child: Child,
    said: std::io::Lines<BufReader<ChildStdout>>,
}

impl Victim {
    fn start(dir: &Path, id: DiskId) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "victim", "--nocapture", "--quiet"]).env(VICTIM, format!("{}={id}", dir.display()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut victim = Self { child, said };
        victim.hear("serving");
        victim
    }

    fn hear(&mut self, word: &str) {
        while self.said.next().expect("it lives").unwrap() != word {}
    }

    fn fork(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        self.hear("forked");
    }
}

struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_a_killed_server_acknowledged_is_there() {
    let temp = Temp(std::env::temp_dir().join(format!("offshoot-nbd-kill-{}", std::process::id())));
    std::fs::create_dir_all(temp.0.join("store")).unwrap();
    let open = || DiskDir::open(temp.0.join("store"), &Tree::default()).unwrap();
    let id = {
        let disk = open().create(Geometry::new(ByteSize::new(SECTORS * 512), PageSize::KIB_4).unwrap(), None).unwrap();
        disk.flush().unwrap();
        disk.id()
    };
    let seed = std::env::var("OFFSHOOT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    println!("OFFSHOOT_SEED={seed}");
    let (mut dice, mut model, mut stamp) = (Dice::new(seed), Model::new(), 0);
    let (mut lost, mut kept) = (0, 0);
    for _ in 0..12 {
        let mut victim = Victim::start(&temp.0, id);
        // Two connections: a flush on one covers what was answered on the other.
        let mut clients: Vec<_> = (0..2).map(|_| Client::open(&temp.0.join("s"), "d", &[]).unwrap()).collect();
        let mut sent: [HashMap<u64, Sent>; 2] = Default::default();
        for step in 0..30 + dice.below(60) {
            let at = dice.below(2) as usize;
            stamp += 1;
            send(&mut clients[at], &mut sent[at], &mut model, &mut dice, stamp);
            // Replies come in any order; some are waited for, so that there are always requests under way.
            for (client, sent) in clients.iter_mut().zip(&mut sent) {
                while sent.len() > 4 {
                    let reply = client.reply().unwrap();
                    assert_eq!(reply.error, 0);
                    model.acknowledged(sent.remove(&reply.cookie).expect("a request that was sent"));
                }
            }
            if step % 25 == 24 {
                victim.fork();
            }
        }
        victim.child.kill().unwrap();
        victim.child.wait().unwrap();
        // What it said before it died counts as well.
        for (client, sent) in clients.iter_mut().zip(&mut sent) {
            while let Ok(reply) = client.reply() {
                assert_eq!(reply.error, 0);
                model.acknowledged(sent.remove(&reply.cookie).expect("a request that was sent"));
            }
        }
        let disk = open().open_disk(id, None).unwrap();
        Backing::validate(&disk).unwrap();
        let mut found = vec![0; (SECTORS * 512) as usize];
        disk.read(ByteOffset::ZERO, &mut found).unwrap();
        for (at, (sector, bytes)) in model.0.iter_mut().zip(found.chunks_exact(512)).enumerate() {
            let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes == version.to_le_bytes().repeat(64), "sector {at} is torn");
            let known = sector.versions.iter().any(|known| stamp_of(*known) == version);
            assert!(known, "sector {at} holds write {version}, and may hold {:?}", sector.versions);
            if stamp_of(*sector.versions.last().unwrap()) == version {
                kept += 1
            } else {
                lost += 1
            }
            *sector = Sector { versions: vec![version], busy: false, answered: 1 };
        }
    }
    // Were a flush nothing, as many promises would be broken: the test can tell.
    assert!(lost > 0, "no kill came between a write and its flush");
    println!("{kept} sectors with their last write, {lost} with an older one that was all that was promised");
}

/// Zeroes are a write of their own, so that the model can tell them apart; on the disk they are the number 0.
const ZEROES: u64 = 1 << 63;

fn stamp_of(version: u64) -> u64 {
    if version & ZEROES == 0 { version } else { 0 }
}

fn send(client: &mut Client, sent: &mut HashMap<u64, Sent>, model: &mut Model, dice: &mut Dice, stamp: u64) {
    if dice.below(8) == 0 {
        let covered = model.covered();
        let cookie = client.request(0, FLUSH, 0, 0, &[]).unwrap();
        sent.insert(cookie, Sent::Flush(covered));
        return;
    }
    let zeroes = dice.below(5) == 0;
    // Zeroes of whole pages, which become holes; writes of any sectors.
    let (first, count) = match zeroes {
        true => (dice.below(SECTORS / 8 - 2) * 8, 8 * (1 + dice.below(2))),
        false => (dice.below(SECTORS - 16), 1 + dice.below(16)),
    };
    let sectors = first as usize..(first + count) as usize;
    if model.0[sectors.clone()].iter().any(|sector| sector.busy) {
        return;
    }
    let durable = dice.below(4) == 0;
    let flags = if durable { FUA } else { 0 };
    let (offset, len) = (first * 512, (count * 512) as u32);
    model.begin(sectors.clone(), if zeroes { stamp | ZEROES } else { stamp });
    let cookie = match (zeroes, dice.below(2)) {
        (true, 0) => client.request(flags, TRIM, offset, len, &[]),
        (true, _) => client.request(flags, WRITE_ZEROES, offset, len, &[]),
        (false, _) => client.request(flags, WRITE, offset, len, &stamp.to_le_bytes().repeat(64 * count as usize)),
    };
    sent.insert(cookie.unwrap(), Sent::Change { sectors, durable });
}
