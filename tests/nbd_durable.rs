//! The NBD server over durable disks, asked by other people's clients, and forked while they write: each clone is the instant of its fork.
//!
//! Where a tool is missing its test says so and passes, unless OFFSHOOT_REQUIRE=all is set: then it fails.
#![cfg(all(feature = "nbd", target_os = "linux"))]

#[path = "../examples/nbd_clones/client.rs"]
mod client;
#[path = "nbd/tools.rs"]
mod tools;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use client::{BLOCK_STATUS, Chunk, Client};
use offshoot::backing::{Backing, Heap};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{DIRTY_BITMAP, Drained, Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteSize, Geometry, Lba, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::store::{DiskDir, DiskId, Durable};
use offshoot::testing::Dice;
use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, ForkPoint, Guest, Tree, Vm, VmName};
use tools::{fio, have, run, text};

const MIB: u64 = 1 << 20;

/// A VM whose disk lies in a directory, and its server; all gone with the value.
struct Bench {
    dir: PathBuf,
    id: DiskId,
    server: Server,
    vm: Vm<Heap>,
    guest: Remote,
}

/// A guest all of whose I/O comes through its export. Keeps what the disk held at the instant of its last fork.
struct Remote {
    disk: Arc<Disk>,
    export: Arc<Export>,
    drained: Option<Drained>,
    instant: Vec<u8>,
}

impl Guest for Remote {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.drained = Some(self.export.drain());
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.instant = bytes(&self.disk);
        Ok(DeviceState::from_bytes(*b""))
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.drained = None;
        Ok(())
    }
}

fn bytes(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0; disk.capacity().get() as usize * 512];
    disk.read(Lba::ZERO, &mut all).unwrap();
    all
}

impl Bench {
    /// A VM with one durable disk of this size, exported as `d`.
    fn new(size: ByteSize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("offshoot-nbd-durable-{}-{number}", std::process::id()));
        fs::create_dir_all(dir.join("store")).unwrap();
        let tree = Tree::default();
        let store = DiskDir::open(dir.join("store"), &tree).unwrap();
        let durable = store.create(Geometry::new(size, PageSize::KIB_4).unwrap(), None).unwrap();
        let id = durable.id();
        let disk = Disk::over(durable, SectorCount::new(size.get() / 512), Access::ReadWrite).unwrap();
        let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).unwrap();
        let disks = vec![(DiskName::new("d"), disk)];
        let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent").unwrap(), layout, disks).unwrap();
        vm.start().unwrap();
        let server = Server::start(&[Endpoint::unix(dir.join("s"))], ServerLimits::default()).unwrap();
        let disk = vm.disk("d").unwrap().clone();
        let export = server.add(ExportName::new("d").unwrap(), Export::new(disk.clone())).unwrap();
        let guest = Remote { disk, export, drained: None, instant: Vec::new() };
        Self { dir, id, server, vm, guest }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.dir.join("s").display())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn fork(&mut self) -> ForkPoint<Heap> {
        self.vm.fork(&mut self.guest).unwrap()
    }

    /// A clone of this instant, exported under `name`; and what the disk held.
    fn clone_as(&mut self, name: &str) -> (Vm<Heap>, Vec<u8>) {
        let clone = self.fork().spawn(CloneSpec::default()).unwrap();
        let export = Export::new(clone.disk("d").unwrap().clone());
        self.server.add(ExportName::new(name).unwrap(), export).unwrap();
        (clone, self.guest.instant.clone())
    }

    /// What another tool reads of an export.
    fn copied_out(&self, export: &str) -> Vec<u8> {
        let file = self.file("out.raw");
        run("nbdcopy", &[&self.uri(export), text(&file)]);
        fs::read(&file).unwrap()
    }

    /// Stops the server and opens the disk anew, as after a restart: only what is in its files is there.
    fn reopened(self) -> Vec<u8> {
        let Self { dir, id, server, vm, guest } = self;
        guest.disk.flush().unwrap();
        drop((guest, server, vm));
        let disk: Durable = DiskDir::open(dir.join("store"), &Tree::default()).unwrap().open_disk(id, None).unwrap();
        Backing::validate(&disk).unwrap();
        let mut all = vec![0; Backing::geometry(&disk).len().get() as usize];
        disk.read(offshoot::page::ByteOffset::ZERO, &mut all).unwrap();
        drop(disk);
        fs::remove_dir_all(&dir).unwrap();
        all
    }
}

/// Writers that verify what they wrote, beside one that trims, on a warm overlay. Meanwhile the disk is forked, and each clone is what the
/// disk held in that instant, for ever: read by another tool at once, and again when all is over.
#[test]
fn fio_verifies_a_durable_disk_that_is_forked_in_the_middle() {
    if !have(&["fio", "nbdcopy"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(48));
    let (uri, dir) = (bench.uri("d"), bench.dir.clone());
    // Warm: pages of a fork point below, pages of its own above.
    let warm = bench.vm.disk("d").unwrap();
    warm.write(Lba::ZERO, &vec![0x5a; 40 << 20]).unwrap();
    bench.fork();
    fio(&dir, &uri, "warm", &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=48M", "--io_size=6M"]);
    let writers = [
        "--rw=randwrite",
        "--bssplit=512/10:4k/60:64k/20:128k/10",
        "--blockalign=512",
        "--iodepth=16",
        "--size=8M",
        "--offset_increment=8M",
        "--numjobs=4",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_backlog=64",
        "--fsync=200",
        "--randseed=23",
    ];
    // In a part of the disk that nobody verifies but the clones.
    let trims = ["--rw=randtrimwrite", "--bs=4k", "--offset=32M", "--size=8M", "--io_size=16M", "--iodepth=8"];
    let mixed = ["--rw=randrw", "--bs=8k", "--offset=40M", "--size=8M", "--iodepth=4", "--verify=md5", "--loops=2"];
    let mut clones = Vec::new();
    std::thread::scope(|threads| {
        let jobs = [
            threads.spawn(|| fio(&dir, &uri, "writers", &writers)),
            threads.spawn(|| fio(&dir, &uri, "trims", &trims)),
            threads.spawn(|| fio(&dir, &uri, "mixed", &mixed)),
        ];
        let over = || jobs.iter().all(|job| job.is_finished());
        while !over() && clones.len() < 6 {
            // Between forks the writers get on, however fast forks are.
            let disk = bench.vm.disk("d").unwrap().clone();
            while !over() && disk.dirty().unwrap().count().get() < 64 {
                std::thread::yield_now();
            }
            if over() {
                break;
            }
            let name = format!("clone-{}", clones.len());
            let (clone, instant) = bench.clone_as(&name);
            if clones.is_empty() {
                assert!(bench.copied_out(&name) == instant, "{name} is the instant, while the parent is written");
            }
            clones.push((name, clone, instant));
        }
        jobs.into_iter().for_each(|job| drop(job.join().expect("fio has verified")));
    });
    println!("{} forks in the middle", clones.len());
    assert!(clones.len() >= 2, "{} forks in the middle", clones.len());
    assert!(clones.windows(2).all(|pair| pair[0].2 != pair[1].2), "they are different instants");
    // A clone is a disk of its own: written and verified, it changes no other.
    let (first, rest) = clones.split_first().unwrap();
    fio(&dir, &bench.uri(&first.0), "on-clone", &writers);
    for (name, clone, instant) in rest {
        assert!(bench.copied_out(name) == *instant && bytes(clone.disk("d").unwrap()) == *instant, "{name}");
    }
    let parent = bytes(bench.vm.disk("d").unwrap());
    assert!(bench.copied_out("d") == parent && parent != first.2);
    drop(clones);
    assert!(bench.reopened() == parent, "and it is all in the files");
}

/// A full copy of the first fork point, then for each later one a copy of nothing but its dirty extents, over NBD while the VM runs on.
#[test]
fn incremental_backups_over_the_wire_are_the_disk() {
    if !have(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(32));
    let disk = bench.vm.disk("d").unwrap().clone();
    let mut dice = Dice::new(5);
    let mut change = |spots: u64| {
        for _ in 0..spots {
            let (lba, count) = (dice.below(65_000), 1 + dice.below(200));
            match dice.below(4) {
                0 => disk.discard(Lba::new(lba), SectorCount::new(count)).unwrap(),
                1 => disk.write_zeroes(Lba::new(lba), SectorCount::new(count)).unwrap(),
                _ => disk.write(Lba::new(lba), &dice.bytes(count * 512)).unwrap(),
            }
        }
    };
    change(200);
    let mut last = bench.fork();
    let full = last.spawn(CloneSpec::default()).unwrap();
    let export = Export::new(full.disk("d").unwrap().clone()).read_only();
    bench.server.add(ExportName::new("full").unwrap(), export).unwrap();
    let backup = bench.file("backup.raw");
    run("nbdcopy", &[&bench.uri("full"), text(&backup)]);
    assert!(fs::read(&backup).unwrap() == bench.guest.instant);
    let backup = fs::File::options().read(true).write(true).open(&backup).unwrap();
    for round in 0..4 {
        change(20);
        if round == 2 {
            // Fork points in between do not matter.
            bench.fork();
            change(10);
        }
        let point = bench.fork();
        let instant = bench.guest.instant.clone();
        let clone = point.spawn(CloneSpec::default()).unwrap();
        let name = format!("round-{round}");
        let export = Export::new(clone.disk("d").unwrap().clone()).read_only();
        let export = export.since(last.disk("d").unwrap()).unwrap();
        bench.server.add(ExportName::new(name.as_str()).unwrap(), export).unwrap();
        // The VM runs on meanwhile.
        change(5);
        let mut client = Client::open(&bench.dir.join("s"), &name, &[DIRTY_BITMAP]).unwrap();
        let (mut at, mut copied) = (0, 0);
        while at < client.size {
            let len = (client.size - at).min(8 << 20) as u32;
            let status = client.call(0, BLOCK_STATUS, at, len, &[]).unwrap();
            let [Chunk::Status { extents, .. }] = &status.chunks[..] else { panic!("{status:?}") };
            for (len, dirty) in extents {
                if dirty & 1 == 1 {
                    let data = client.read(at, *len).unwrap();
                    backup.write_all_at(&data, at).unwrap();
                    copied += u64::from(*len);
                }
                at += u64::from(*len);
            }
        }
        client.disconnect().unwrap();
        assert!(copied > 0 && copied < 16 * MIB, "{copied} bytes in round {round}");
        let mut now = vec![0; instant.len()];
        backup.read_exact_at(&mut now, 0).unwrap();
        assert!(now == instant, "round {round}: the backup is the fork point");
        let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:origin", "--totals", &bench.uri(&name)]);
        assert!(map.contains(&copied.to_string()), "{copied} bytes, and nbdinfo says {map}");
        last = point;
    }
    let stranger = Disk::blank(&Tree::default(), SectorCount::new(8), Access::ReadWrite).unwrap();
    Export::new(Arc::new(stranger)).since(last.disk("d").unwrap()).expect_err("no relative");
    drop((full, last));
    let now = bytes(&disk);
    drop(disk);
    assert!(bench.reopened() == now);
}

#[test]
fn nbdcopy_and_checkwrite_agree_with_a_durable_disk() {
    if !have(&["nbdcopy", "nbdkit", "nbdinfo"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(64));
    for (seed, options) in [(1, ""), (2, "--connections=1 --requests=1"), (3, "--request-size=1048576")] {
        let (uri, number) = (bench.uri("d"), format!("seed={seed}"));
        let plugin = ["sparse-random", "size=64M", number.as_str(), "percent=15", "--run"];
        let nbdkit = |filter: &[&str], script: &str| {
            let mut args = vec!["--exit-with-parent", "-U", "-"];
            args.extend(filter);
            args.extend(plugin);
            args.push(script);
            run("nbdkit", &args);
        };
        // The plug-in makes the content up; the filter checks all that is written to it, zeroes and trims too.
        nbdkit(&[], &format!("nbdcopy {options} \"$uri\" '{uri}'"));
        nbdkit(&["--filter=checkwrite"], &format!("nbdcopy {options} '{uri}' \"$uri\""));
        let totals = run("nbdinfo", &["--map", "--totals", &uri]);
        assert!(totals.contains("hole,zero"), "what was made up is sparse, and so is what was made of it: {totals}");
        // The same, from a clone that has the parent overwritten behind its back.
        let name = format!("clone-{seed}");
        let (_clone, _) = bench.clone_as(&name);
        bench.vm.disk("d").unwrap().write(Lba::ZERO, &vec![seed as u8; 1 << 20]).unwrap();
        let clone = bench.uri(&name);
        nbdkit(&["--filter=checkwrite"], &format!("nbdcopy {options} '{clone}' \"$uri\""));
    }
}

#[test]
fn a_file_system_on_a_durable_disk_survives_its_clones() {
    if !have(&["mke2fs", "e2fsck", "debugfs", "nbdcopy"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(32));
    let (tree, image) = (bench.file("tree"), bench.file("fs.raw"));
    fs::create_dir(&tree).unwrap();
    (0..60).for_each(|at| fs::write(tree.join(format!("f{at}")), vec![at as u8; 3000 * (at + 1)]).unwrap());
    fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", text(&tree), text(&image)]);
    run("nbdcopy", &[text(&image), &bench.uri("d")]);
    let mut clones = Vec::new();
    for gone in [7, 21, 33] {
        clones.push(bench.clone_as(&format!("before-{gone}")).0);
        // Another computer changes the file system, and only what it changed is written: what differs, sector by sector.
        let before = fs::read(&image).unwrap();
        run("debugfs", &["-w", "-R", &format!("rm f{gone}"), text(&image)]);
        let after = fs::read(&image).unwrap();
        let mut client = Client::open(&bench.dir.join("s"), "d", &[]).unwrap();
        for (at, (old, new)) in before.chunks_exact(4096).zip(after.chunks_exact(4096)).enumerate() {
            if old != new {
                client.write(at as u64 * 4096, new).unwrap();
            }
        }
        client.flush().unwrap();
        client.disconnect().unwrap();
    }
    let file = bench.file("checked.raw");
    for (export, there) in
        [("before-7", [7, 21, 33].as_slice()), ("before-21", &[21, 33]), ("before-33", &[33]), ("d", &[])]
    {
        run("nbdcopy", &[&bench.uri(export), text(&file)]);
        run("e2fsck", &["-fn", text(&file)]);
        let found = run("debugfs", &["-R", "ls -p /", text(&file)]);
        for gone in [7, 21, 33] {
            assert_eq!(found.contains(&format!("/f{gone}/")), there.contains(&gone), "{export}: {found}");
        }
        let dumped = bench.file("f42");
        run("debugfs", &["-R", &format!("dump f42 {}", text(&dumped)), text(&file)]);
        assert_eq!(fs::read(&dumped).unwrap(), vec![42; 3000 * 43]);
    }
    drop(clones);
    let want = fs::read(&image).unwrap();
    assert!(bench.reopened() == want);
}
