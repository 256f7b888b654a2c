//! A small Linux guest made of what the machine has installed: the kernel package's own kernel and modules, busybox, and one program of ours
//! (`guest/`), compiled here. An initramfs that loads the drivers, an ext4 root disk, the kernel; the same bytes each time.
//!
//! Must not know how a guest is run: it makes files.

#![allow(dead_code, reason = "each user takes some of it")]

mod cpio;
mod kernel;
mod modules;

use std::fmt::{self, Display, Formatter};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::Archive;
pub use kernel::KernelImage;
use modules::ModuleTree;

/// What the guest says on its serial console when all is there.
pub const READY: &str = "offshoot-guest ready";

/// The kernel's command line for a guest that goes on to its root disk. What it leaves out costs a translated guest seconds: self-tests, probes
/// of keyboards and of UARTs that are not there, grace periods.
pub const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda quiet panic=-1 cryptomgr.notests rcupdate.rcu_expedited=1 i8042.noaux i8042.nokbd \
                                8250.nr_uarts=1";

/// The guest's one program.
const SOURCES: &[(&str, &str)] = &[
    ("guest.h", include_str!("../../../guest/guest.h")),
    ("record.h", include_str!("../../../guest/record.h")),
    ("media.h", include_str!("../../../guest/media.h")),
    ("main.c", include_str!("../../../guest/main.c")),
    ("files.c", include_str!("../../../guest/files.c")),
    ("init.c", include_str!("../../../guest/init.c")),
    ("agent.c", include_str!("../../../guest/agent.c")),
    ("identity.c", include_str!("../../../guest/identity.c")),
    ("record.c", include_str!("../../../guest/record.c")),
    ("media.c", include_str!("../../../guest/media.c")),
    ("workload.c", include_str!("../../../guest/workload.c")),
    ("check.c", include_str!("../../../guest/check.c")),
];

/// The drivers of the guest's devices, and ext4. Those that a kernel has built in are not loaded.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "qemu_fw_cfg", "ext4"];

/// Modules that others ask for by what they do: loaded first, where the kernel has them as modules.
const WANTED: &[&str] = &["crc32c_generic"];

/// Of every file and of the file system: a build at another time gives the same bytes.
const EPOCH: u64 = 1_700_000_000;

/// What cannot be had on this machine.
#[derive(Debug)]
pub struct Missing(pub Vec<String>);

impl Display for Missing {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        write!(out, "missing for a Linux guest: {}", self.0.join("; "))
    }
}

impl std::error::Error for Missing {}

/// What an image is made of.
#[derive(Debug)]
pub struct GuestTools {
    kernel: KernelImage,
    modules: ModuleTree,
    busybox: PathBuf,
    cc: PathBuf,
    mke2fs: PathBuf,
}

/// The files of a guest.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// What QEMU's `-kernel` takes: unpacked where that can be done, which saves a translated guest half of its boot.
    pub kernel: PathBuf,
    /// Drivers, and the way to the disk.
    pub initramfs: PathBuf,
    /// An ext4 file system, raw.
    pub disk: PathBuf,
    /// The guest's program, which the host can run too: `program check FILE SLOTS FLOOR`.
    pub program: PathBuf,
    /// The kernel's release.
    pub release: String,
}

impl GuestTools {
    /// Finds all of it: the newest kernel in `/boot` whose modules are installed, or the one that `OFFSHOOT_GUEST_KERNEL` names.
    pub fn find() -> Result<Self, Missing> {
        let mut missing = Vec::new();
        let kernel = kernel::find().map_err(|reason| missing.push(reason)).ok();
        let mut tool = |name: &str, package: &str| {
            let found = program(name);
            if found.is_none() {
                missing.push(format!("{name} (package {package})"));
            }
            found
        };
        let found = (tool("busybox", "busybox-static"), tool("cc", "gcc"), tool("mke2fs", "e2fsprogs"));
        match (kernel, found) {
            (Some((kernel, modules)), (Some(busybox), Some(cc), Some(mke2fs))) => {
                Ok(Self { kernel, modules, busybox, cc, mke2fs })
            }
            _ => Err(Missing(missing)),
        }
    }

    /// The image in a directory under `parent` that is named for what it is made of: built once, by whoever comes first.
    pub fn cached(&self, parent: &Path) -> io::Result<GuestImage> {
        let mut hasher = DefaultHasher::new();
        (SOURCES, MODULES, WANTED, EPOCH).hash(&mut hasher);
        for path in [self.kernel.path(), &self.busybox] {
            let of = fs::metadata(path)?;
            (path, of.len(), of.modified()?).hash(&mut hasher);
        }
        let dir = parent.join(format!("guest-{:016x}", hasher.finish()));
        if !dir.is_dir() {
            let begun = parent.join(format!("guest-begun-{}", std::process::id()));
            self.build(&begun)?;
            // Whoever was faster has made the same.
            if fs::rename(&begun, &dir).is_err() {
                fs::remove_dir_all(&begun)?;
            }
        }
        Ok(self.image_in(&dir))
    }

    /// Builds the image in this directory, which is made if it is missing. Takes some seconds, half of them to unpack the kernel.
    pub fn build(&self, dir: &Path) -> io::Result<GuestImage> {
        fs::create_dir_all(dir)?;
        let image = self.image_in(dir);
        self.compile(dir, &image.program)?;
        self.kernel.unpack(&image.kernel)?;
        fs::write(&image.initramfs, self.initramfs(&image.program)?)?;
        self.root_disk(dir, &image)?;
        Ok(image)
    }

    fn image_in(&self, dir: &Path) -> GuestImage {
        GuestImage {
            kernel: dir.join("kernel"),
            initramfs: dir.join("initramfs"),
            disk: dir.join("root.img"),
            program: dir.join("guest"),
            release: self.kernel.release().to_owned(),
        }
    }

    fn compile(&self, dir: &Path, program: &Path) -> io::Result<()> {
        let sources = dir.join("src");
        fs::create_dir_all(&sources)?;
        for (name, text) in SOURCES {
            fs::write(sources.join(name), text)?;
        }
        let units = SOURCES.iter().map(|(name, _)| *name).filter(|name| name.ends_with(".c"));
        let mut cc = Command::new(&self.cc);
        cc.args([
            "-static",
            "-s",
            "-O2",
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-o",
            "../guest",
        ]);
        run(cc.args(units).current_dir(&sources))?;
        fs::set_permissions(program, fs::Permissions::from_mode(0o755))
    }

    fn initramfs(&self, program: &Path) -> io::Result<Vec<u8>> {
        let mut archive = Archive::new(EPOCH);
        for dir in ["bin", "dev", "etc", "modules", "proc", "root", "run", "sys", "tmp"] {
            archive.directory(dir);
        }
        archive.character_device("dev/console", 5, 1);
        archive.file("init", 0o755, &fs::read(program)?);
        archive.file("bin/busybox", 0o755, &fs::read(&self.busybox)?);
        archive.symlink("bin/sh", "busybox");
        let mut order = String::new();
        for module in self.modules.load_order(MODULES, WANTED)? {
            let name = format!("{}.ko", module.name);
            archive.file(&format!("modules/{name}"), 0o644, &kernel::plain(&module.path)?);
            order.push_str(&name);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes());
        Ok(archive.finish())
    }

    /// The root file system: the program as `/sbin/init`, busybox under its names, and files that a clone changes.
    fn root_disk(&self, dir: &Path, image: &GuestImage) -> io::Result<()> {
        let root = dir.join("root");
        for name in ["bin", "dev", "etc", "proc", "run", "sbin", "sys", "tmp", "work"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy(&image.program, root.join("sbin/init"))?;
        fs::copy(&self.busybox, root.join("bin/busybox"))?;
        let applets = run(Command::new(&self.busybox).arg("--list"))?;
        for applet in applets.lines().filter(|&applet| applet != "busybox") {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        fs::write(root.join("etc/hostname"), "parent\n")?;
        fs::write(root.join("etc/machine-id"), "00000000000000000000000000000000\n")?;
        let disk = File::create(&image.disk)?;
        disk.set_len(DISK)?;
        let mut mke2fs = Command::new(&self.mke2fs);
        let seed = "6f666673-686f-4f74-8067-756573740001";
        let extended = format!("hash_seed={seed},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0");
        mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "guest", "-U", seed, "-E", &extended, "-d"]);
        mke2fs.arg(&root).arg(&image.disk).env("E2FSPROGS_FAKE_TIME", EPOCH.to_string());
        run(&mut mke2fs)?;
        self.settle_times(&root, &image.disk)?;
        fs::remove_dir_all(&root)
    }

    /// mke2fs takes the times of the files it copies, and that of the last change nobody can set: they are set in the image.
    fn settle_times(&self, root: &Path, disk: &Path) -> io::Result<()> {
        let debugfs = self.mke2fs.with_file_name("debugfs");
        let mut script = String::new();
        walk(root, &mut |path| {
            let inside = path.strip_prefix(root).unwrap_or(path).display().to_string();
            for field in ["atime", "ctime", "mtime", "crtime"] {
                script.push_str(&format!("set_inode_field /{inside} {field} @{EPOCH}\n"));
                script.push_str(&format!("set_inode_field /{inside} {field}_extra 0\n"));
            }
            Ok(())
        })?;
        let commands = disk.with_extension("debugfs");
        fs::write(&commands, script)?;
        let mut command = Command::new(debugfs);
        command.arg("-w").arg("-f").arg(&commands).arg(disk).env("E2FSPROGS_FAKE_TIME", EPOCH.to_string());
        run(&mut command)?;
        fs::remove_file(&commands)
    }
}

/// The size of the root disk in bytes.
const DISK: u64 = 64 << 20;

/// Everything under a directory in the order of its names, each directory after what is in it.
fn walk(dir: &Path, visit: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() && !path.is_symlink() {
            walk(&path, visit)?;
        } else {
            visit(&path)?;
        }
    }
    visit(dir)
}

/// Where a program is: by `PATH`, and where only the administrator's searches.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = format!("{}:/usr/sbin:/sbin:/usr/bin:/bin", std::env::var("PATH").unwrap_or_default());
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Runs a program and returns what it said; its error output is the error.
fn run(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{}: {}: {said}", command.get_program().display(), output.status)))
}
