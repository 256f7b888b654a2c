//! The NBD server, asked by other people's clients: libnbd, nbdkit, qemu-img and qemu-io, fio.
//!
//! Where a tool is missing its test says so and passes, unless OFFSHOOT_REQUIRE=all is set: then it fails.
#![cfg(all(feature = "nbd", target_os = "linux"))]

#[path = "nbd/tools.rs"]
mod tools;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use offshoot::backing::Heap;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Drained, Endpoint, Export, ExportName, Server, ServerLimits};
use offshoot::page::{ByteSize, Lba, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, Guest, Tree, Vm, VmName};
use tools::{fio, have, path, run, text};

/// A folder of its own, with a server's socket in it; gone with the value.
struct Bench {
    dir: PathBuf,
    server: Server,
    vm: Vm<Heap>,
    guest: Remote,
}

/// A guest all of whose I/O comes through its export.
struct Remote {
    export: Arc<Export>,
    drained: Option<Drained>,
}

impl Guest for Remote {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.drained = Some(self.export.drain());
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(*b""))
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.drained = None;
        Ok(())
    }
}

impl Bench {
    /// A VM with one disk of this size, exported as `d`.
    fn new(size: ByteSize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("offshoot-tools-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let tree = Tree::default();
        let disk = Disk::blank(&tree, SectorCount::new(size.get() / 512), Access::ReadWrite).unwrap();
        let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).unwrap();
        let disks = vec![(DiskName::new("d"), disk)];
        let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent").unwrap(), layout, disks).unwrap();
        vm.start().unwrap();
        let server = Server::start(&[Endpoint::unix(dir.join("s"))], ServerLimits::default()).unwrap();
        let export = server.add(ExportName::new("d").unwrap(), Export::new(vm.disk("d").unwrap().clone())).unwrap();
        Self { dir, server, vm, guest: Remote { export, drained: None } }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.dir.join("s").display())
    }

    /// A clone of this instant, exported under `name`.
    fn clone_as(&mut self, name: &str) -> Vm<Heap> {
        let clone = self.vm.fork(&mut self.guest).unwrap().spawn(CloneSpec::default()).unwrap();
        let disk = clone.disk("d").unwrap().clone();
        self.server.add(ExportName::new(name).unwrap(), Export::new(disk)).unwrap();
        clone
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(8));
    bench.vm.disk("d").unwrap().write(Lba::new(2048), &[1; 8192]).unwrap();
    let _clone = bench.clone_as("clone");
    let disk = bench.server.get("clone").unwrap().disk().clone();
    disk.write(Lba::new(4096), &[2; 4096]).unwrap();
    let read_only = Export::new(disk).read_only().described("for nbdinfo").unwrap();
    bench.server.add(ExportName::new("ro").unwrap(), read_only).unwrap();

    let json = run("nbdinfo", &["--json", &bench.uri("d")]).split_whitespace().collect::<String>();
    for said in [
        "\"protocol\":\"newstyle-fixed\"",
        "\"structured\":true",
        "\"export-size\":8388608",
        "\"is_read_only\":false",
        "\"can_cache\":true",
        "\"can_df\":true",
        "\"can_fast_zero\":true",
        "\"can_flush\":true",
        "\"can_fua\":true",
        "\"can_multi_conn\":true",
        "\"can_trim\":true",
        "\"can_zero\":true",
        "\"block_size_minimum\":512",
        "\"block_size_preferred\":4096",
        "\"block_size_maximum\":33554432",
        "\"base:allocation\"",
        "\"qemu:dirty-bitmap:origin\"",
    ] {
        assert!(json.contains(said), "{said} is not in {json}");
    }
    let list = run("nbdinfo", &["--list", &bench.uri("")]);
    for name in ["export=\"d\"", "export=\"clone\"", "export=\"ro\"", "for nbdinfo", "is_read_only: true"] {
        assert!(list.contains(name), "{name} is not in {list}");
    }
    let map = |args: &[&str]| -> Vec<Vec<u64>> {
        let lines = run("nbdinfo", args);
        let numbers = |line: &str| line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        lines.lines().map(numbers).collect()
    };
    let clone = bench.uri("clone");
    let (mib, whole) = (1 << 20, 8 << 20);
    assert_eq!(
        map(&["--map", &clone]),
        [
            vec![0, mib, 3],
            vec![mib, 8192, 0],
            vec![mib + 8192, mib - 8192, 3],
            vec![2 * mib, 4096, 0],
            vec![2 * mib + 4096, whole - 2 * mib - 4096, 3]
        ]
    );
    let dirty = map(&["--map=qemu:dirty-bitmap:origin", &clone]);
    assert_eq!(
        dirty,
        [vec![0, 2 * mib, 0], vec![2 * mib, 4096, 1], vec![2 * mib + 4096, whole - 2 * mib - 4096, 0]],
        "the fork's image is not dirty"
    );
}

#[test]
fn nbdsh_tries_every_command_flag_and_breach() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new(ByteSize::mib(40));
    let script = r#"
import errno, os
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:origin")
h.connect_uri(os.environ["URI"])
assert h.get_structured_replies_negotiated()
size = h.get_size()
assert size == 40 << 20

def refused(want, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == want, (call.__name__, str(error)[:200])
    else:
        assert False, ("granted", call.__name__)

h.pwrite(b"a" * 4096, 512, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 512, nbd.CMD_FLAG_DF) == b"a" * 4096
h.flush()
h.cache(1 << 20, 0)
h.trim(8192, 0, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == bytearray(8192)
h.pwrite(b"b" * 8192, 0)
h.zero(512, 512, nbd.CMD_FLAG_FAST_ZERO)
h.zero(1024, 2048, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 0) == b"b" * 512 + bytearray(512) + b"b" * 1024 + bytearray(1024) + b"b" * 1024
refused(errno.EOPNOTSUPP, h.zero, 4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)

for call in (h.trim, h.zero, h.cache):
    refused(errno.EINVAL, call, 0, 0)
    refused(errno.EINVAL, call, 512, 1)
    refused(errno.EINVAL, call, 100, 0)
refused(errno.EINVAL, h.pread, 512, size)
refused(errno.EINVAL, h.pread, 1024, size - 512)
refused(errno.EINVAL, h.pread, (32 << 20) + 512, 0)
refused(errno.EOVERFLOW, h.pread, (32 << 20) + 512, 0, nbd.CMD_FLAG_DF)
refused(errno.EINVAL, h.pread, 512, 1)
refused(errno.ENOSPC, h.pwrite, b"c" * 512, size)
refused(errno.ENOSPC, h.pwrite, b"c" * 1024, size - 512)
refused(errno.EINVAL, h.pwrite, b"c" * 100, 0)
refused(errno.EINVAL, h.pwrite, b"c" * ((32 << 20) + 512), 0)
refused(errno.ENOSPC, h.zero, 512, size)
refused(errno.EINVAL, h.trim, 512, size)
refused(errno.EINVAL, h.cache, 512, size)
refused(errno.EINVAL, h.block_status, 512, size, lambda *args: None)
assert h.pread(32 << 20, 0)[:512] == b"b" * 512

seen = {}
def told(name, offset, entries, error):
    seen[name] = list(entries)
h.block_status(size, 0, told)
assert seen == {"base:allocation": [8192, 0, size - 8192, 3], "qemu:dirty-bitmap:origin": [8192, 1, size - 8192, 0]}, seen
refused(errno.EINVAL, h.block_status, size, 4096, told)
h.block_status(size - 4096, 4096, told, nbd.CMD_FLAG_REQ_ONE)
assert seen == {"base:allocation": [4096, 0], "qemu:dirty-bitmap:origin": [4096, 1]}, seen

# Many at once, and replies as they come.
buffers = [nbd.Buffer.from_bytearray(bytearray([at]) * (65536 * (1 + at % 4))) for at in range(1, 40)]
cookies = [h.aio_pwrite(buffer, at << 18) for at, buffer in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]

# A second connection sees it, and may flush for the first.
other = nbd.NBD()
other.connect_uri(os.environ["URI"])
assert other.can_multi_conn()
other.flush()
assert other.pread(65536, 0) == bytearray([1]) * 65536

# Without structured replies, and by the old way to name an export.
for configure in (lambda old: old.set_request_structured_replies(False), lambda old: old.set_full_info(True),
                  lambda old: old.set_handshake_flags(0), lambda old: old.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)):
    old = nbd.NBD()
    configure(old)
    old.connect_uri(os.environ["URI"])
    assert old.pread(512, 1 << 18) == bytearray([2]) * 512
    old.set_strict_mode(0)
    refused(errno.EINVAL, old.pread, 512, size)
    assert old.pread(512, 1 << 18) == bytearray([2]) * 512
    old.shutdown()
h.shutdown()
"#;
    let output =
        Command::new("nbdsh").env("PATH", path()).env("URI", bench.uri("d")).arg("-c").arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Options one by one, and an export that may only be read.
#[test]
fn nbdsh_tries_every_option_and_a_read_only_export() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new(ByteSize::mib(1));
    let disk = bench.vm.disk("d").unwrap().clone();
    disk.write(Lba::ZERO, &[7; 4096]).unwrap();
    let read_only = Export::new(disk).read_only().described("may be read").unwrap();
    bench.server.add(ExportName::new("ro").unwrap(), read_only).unwrap();
    let script = r#"
import errno, os

def refused(want, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert want is None or error.errnum == want, (call.__name__, str(error)[:200])
    else:
        assert False, ("granted", call.__name__)

def negotiating(export):
    new = nbd.NBD()
    new.set_opt_mode(True)
    new.set_full_info(True)
    new.set_export_name(export)
    new.connect_unix(os.environ["SOCKET"])
    return new

a = negotiating("ro")
found = {}
a.opt_list(lambda name, words: found.__setitem__(name, words))
assert found == {"d": "", "ro": "may be read"}, found
contexts = []
a.opt_list_meta_context(lambda name: contexts.append(name))
assert sorted(contexts) == ["base:allocation", "qemu:dirty-bitmap:origin"], contexts
a.opt_info()
assert a.is_read_only() and a.get_size() == 1 << 20 and a.get_export_description() == "may be read"
assert a.get_canonical_export_name() == "ro"
assert a.get_block_size(nbd.SIZE_MINIMUM) == 512 and a.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
# One that is not there, and on with one that is.
a.set_export_name("no such")
refused(errno.ENOENT, a.opt_info)
refused(errno.ENOENT, a.opt_go)
a.set_export_name("ro")
a.add_meta_context("base:allocation")
a.opt_go()
assert a.can_meta_context("base:allocation") and not a.can_meta_context("qemu:dirty-bitmap:origin")
assert a.pread(4096, 0) == b"\x07" * 4096
a.set_strict_mode(0)
for call, args in ((a.pwrite, (b"x" * 512, 0)), (a.trim, (4096, 0)), (a.zero, (4096, 0))):
    refused(errno.EPERM, call, *args)
a.flush()
a.cache(4096, 0)
assert a.pread(4096, 0) == b"\x07" * 4096
# Offsets at the end of the number space, lengths that wrap round it.
for offset in ((1 << 63) - 512, (1 << 64) - 512, (1 << 64) - 1):
    refused(errno.EINVAL, a.pread, 512, offset)
    refused(errno.EINVAL, a.cache, 512, offset)
    refused(errno.EINVAL, a.block_status, 4096, offset, lambda *told: 0)
a.shutdown()
# ABORT, and a server that goes on for others.
b = negotiating("d")
b.opt_abort()
c = negotiating("d")
c.opt_go()
c.set_strict_mode(0)
for offset in ((1 << 63) - 512, (1 << 64) - 512, (1 << 64) - 1):
    for call, args in ((c.pwrite, (b"x" * 512, offset)), (c.trim, (512, offset)), (c.zero, (512, offset))):
        refused(None, call, *args)
assert c.pread(4096, 0) == b"\x07" * 4096
c.shutdown()
"#;
    let socket = bench.file("s");
    let output =
        Command::new("nbdsh").env("PATH", path()).env("SOCKET", socket).arg("-c").arg(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn nbdcopy_there_and_back_loses_nothing() {
    if !have(&["nbdcopy", "nbdkit"]) {
        return;
    }
    let bench = Bench::new(ByteSize::mib(64));
    let uri = bench.uri("d");
    // The plug-in makes the content up, and checks what is written back to it.
    for (seed, options) in
        [(1, ""), (2, "--connections=1 --requests=1"), (3, "--request-size=1048576"), (4, "--allocated")]
    {
        let both = format!("nbdcopy {options} \"$uri\" '{uri}' && nbdcopy {options} '{uri}' \"$uri\"");
        let number = format!("seed={seed}");
        run(
            "nbdkit",
            &["--exit-with-parent", "-U", "-", "sparse-random", "size=64M", &number, "percent=20", "--run", &both],
        );
        // What it made up is sparse, and so is what was made of it; `--allocated` asks for the contrary.
        let totals = run("nbdinfo", &["--map", "--totals", &uri]);
        assert_eq!(totals.contains("hole,zero"), seed != 4, "{totals}");
    }
}

#[test]
fn qemu_reads_and_writes_what_it_meant_to() {
    if !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(16));
    let uri = bench.uri("d");
    let io = |uri: &str, commands: &[&str]| {
        let mut args = vec!["-f", "raw"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        args.push(uri);
        let said = run("qemu-io", &args);
        assert!(!said.contains("verification failed") && !said.contains("failed:"), "{said}");
    };
    io(
        &uri,
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 512 512",
            "write -z 64k 64k",
            "write -z -u 256k 4k",
            "discard 512k 64k",
            "write -f -P 0x33 15M 1M",
            "aio_write -P 0x44 4M 2M",
            "aio_write -P 0x55 6M 64k",
            "aio_flush",
            "flush",
        ],
    );
    let clone = bench.clone_as("clone");
    io(&uri, &["write -P 0x66 0 16M"]);
    io(
        &bench.uri("clone"),
        &[
            "read -P 0x11 0 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1k 63k",
            "read -P 0 64k 64k",
            "read -P 0x11 128k 128k",
            "read -P 0 256k 4k",
            "read -P 0 512k 64k",
            "read -P 0 1M 3M",
            "read -P 0x44 4M 2M",
            "read -P 0x55 6M 64k",
            "read -P 0x33 15M 1M",
        ],
    );
    let clone_uri = bench.uri("clone");
    let (raw, qcow2) = (bench.file("out.raw"), bench.file("out.qcow2"));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &clone_uri, text(&raw)]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &clone_uri, text(&qcow2)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &clone_uri]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), &clone_uri]);
    let mut all = vec![0; 16 << 20];
    clone.disk("d").unwrap().read(Lba::ZERO, &mut all).unwrap();
    assert!(fs::read(&raw).unwrap() == all);
    // And back in, over what is there.
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", text(&qcow2), &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &clone_uri]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &clone_uri]);
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
}

#[test]
fn fio_verifies_what_it_wrote_while_the_disk_is_forked() {
    if !have(&["fio"]) {
        return;
    }
    let mut bench = Bench::new(ByteSize::mib(32));
    let uri = bench.uri("d");
    let dir = bench.dir.clone();
    let fio = |uri: &str, name: &str, more: &[&str]| drop(fio(&dir, uri, name, more));
    // A warm disk over an image: where other people's overlays broke.
    bench.vm.disk("d").unwrap().write(Lba::ZERO, &vec![0x5a; 32 << 20]).unwrap();
    bench.vm.fork(&mut bench.guest).unwrap();
    fio(&uri, "warm", &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=32M", "--io_size=8M"]);
    let jobs = [
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
        "--randseed=11",
    ];
    std::thread::scope(|threads| {
        let writing = threads.spawn(|| fio(&uri, "jobs", &jobs));
        let mut forks = 0;
        while !writing.is_finished() {
            let clone = bench.clone_as(&format!("clone-{forks}"));
            clone.disk("d").unwrap().write(Lba::ZERO, &vec![0xee; 1 << 20]).unwrap();
            forks += 1;
            // Between forks the writers get on, however fast forks are.
            let before = bench.vm.disk("d").unwrap().dirty().unwrap().count();
            while !writing.is_finished() && bench.vm.disk("d").unwrap().dirty().unwrap().count() == before {
                std::thread::yield_now();
            }
        }
        writing.join().unwrap();
        assert!(forks > 3, "{forks} forks only");
    });
    // Once more, from what is there: whatever the forks did, the parent has all that was written to it.
    let clone = bench.clone_as("last");
    let mix = ["--rw=randtrimwrite", "--bs=4k", "--iodepth=8", "--size=32M", "--io_size=4M"];
    fio(&uri, "trims", &mix);
    let (mut mine, mut parents) = (vec![0; 32 << 20], vec![0; 32 << 20]);
    clone.disk("d").unwrap().read(Lba::ZERO, &mut mine).unwrap();
    bench.vm.disk("d").unwrap().read(Lba::ZERO, &mut parents).unwrap();
    assert!(mine != parents, "the trims hit the parent alone");
}

#[test]
fn a_file_system_survives_its_clone() {
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
    let _clone = bench.clone_as("clone");
    // The parent is changed, the clone is not.
    let changed = bench.file("changed.raw");
    run("debugfs", &["-w", "-R", "rm f7", text(&image)]);
    run("nbdcopy", &[text(&image), &bench.uri("d")]);
    for (export, there) in [("d", false), ("clone", true)] {
        run("nbdcopy", &[&bench.uri(export), text(&changed)]);
        run("e2fsck", &["-fn", text(&changed)]);
        let found = run("debugfs", &["-R", "ls -p /", text(&changed)]);
        assert_eq!(found.contains("/f7/"), there, "{export}: {found}");
        let dumped = bench.file("f42");
        run("debugfs", &["-R", &format!("dump f42 {}", text(&dumped)), text(&changed)]);
        assert_eq!(fs::read(&dumped).unwrap(), vec![42; 3000 * 43]);
    }
}
