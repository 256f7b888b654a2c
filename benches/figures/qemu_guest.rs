//! What figures of QEMU guests stand on: a booted guest, a QEMU that knows nothing of us, and what the kernel says that each of them holds. Must
//! not measure time.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot::backing::FileImage;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::qemu::{AgentClient, Deadlines, Kernel, Nic, QemuSpec, QemuVm, json};
use offshoot::page::ByteSize;
use offshoot::{DiskName, VmName};

use super::report::{Outcome, Skip};
use super::subject::tree;
use super::tools::text;
use guest_image::{COMMAND_LINE, GuestImage, GuestTools, READY, program};

#[path = "../../examples/common/guest_image/mod.rs"]
mod guest_image;

/// Longer than any boot or answer on a machine that works, be it slow.
const PATIENCE: Duration = Duration::from_secs(300);
/// The disk that requests go to.
const DATA: ByteSize = ByteSize::mib(64);
/// What it begins with is the program that makes the requests.
const PROGRAM: u64 = 1 << 20;

/// What guests are booted of.
pub struct Images {
    guest: GuestImage,
    data: PathBuf,
}

impl Images {
    /// Makes them: the data disk here, the guest's once for all runs.
    pub fn make(dir: &Path) -> Result<Self, Skip> {
        if program("qemu-system-x86_64").is_none() {
            return Err(Skip::new("qemu-system-x86_64 is missing (package qemu-system-x86)"));
        }
        let guest = GuestTools::find()?.cached(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
        let (source, program, data) = (dir.join("io.c"), dir.join("io"), dir.join("data.raw"));
        fs::write(&source, include_str!("qemu_io.c"))?;
        super::tools::run("cc", &["-static", "-s", "-O2", "-o", text(&program), text(&source)])?;
        let mut bytes = fs::read(&program)?;
        if bytes.len() as u64 > PROGRAM {
            return Err(Skip::new(format!("the guest's program has {} bytes, over 1 MiB", bytes.len())));
        }
        bytes.resize(DATA.get() as usize, 0x77);
        fs::write(&data, bytes)?;
        Ok(Self { guest, data })
    }

    /// Starts a guest that boots.
    pub fn launch(&self, ram: ByteSize) -> Result<Booting, Skip> {
        let tree = tree();
        let disk = |path: &Path| -> Result<Disk, Skip> {
            Ok(Disk::over_image(&tree, Arc::new(FileImage::open(path, None)?), Access::ReadWrite)?)
        };
        let disks = vec![(DiskName::new("root"), disk(&self.guest.disk)?), (DiskName::new("data"), disk(&self.data)?)];
        let kernel = Kernel {
            image: self.guest.kernel.clone(),
            initrd: Some(self.guest.initramfs.clone()),
            command_line: COMMAND_LINE.to_owned(),
        };
        let deadlines = Deadlines { start: PATIENCE, command: PATIENCE, save: PATIENCE, load: PATIENCE };
        let spec =
            QemuSpec { cpu: Some("max".into()), kernel: Some(kernel), nic: Nic::User, deadlines, ..QemuSpec::new(ram) };
        Ok(Booting(QemuVm::launch(&tree, VmName::new("parent")?, spec, disks, None)?))
    }
}

/// A guest on its way up.
pub struct Booting(QemuVm);

impl Booting {
    /// Waits until its agent answers.
    pub fn ready(self) -> Result<QemuVm, Skip> {
        let vm = self.0;
        let begun = Instant::now();
        while !fs::read(vm.console()).is_ok_and(|said| String::from_utf8_lossy(&said).contains(READY)) {
            if let Some(end) = vm.ended() {
                return Err(Skip::new(format!("a guest's QEMU has ended: {end}")));
            }
            if begun.elapsed() > PATIENCE {
                return Err(Skip::new("a guest does not boot"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(vm)
    }
}

/// Runs this in a guest's shell.
pub fn in_guest(agent: &Path, script: &str) -> Result<String, Skip> {
    let seconds = PATIENCE.as_secs().to_string();
    Ok(AgentClient::connect(agent)?.ask(&["run", &seconds, script], PATIENCE)?)
}

/// Takes the program off the data disk: clones have it from here on.
pub fn install(vm: &QemuVm) -> Outcome {
    in_guest(&vm.agent_socket(), "dd if=/dev/vdb of=/tmp/io bs=64k count=16 2>&1 && chmod 755 /tmp/io").map(drop)
}

/// Random requests of a guest to its data disk: nanoseconds of one.
pub fn requests(agent: &Path, verb: &str, requests: usize, workers: usize) -> Result<f64, Skip> {
    let said = in_guest(agent, &format!("/tmp/io /dev/vdb {verb} {requests} {workers}"))?;
    said.trim().parse().map_err(|_| Skip::new(format!("the guest's program said {said:?}")))
}

/// What a QEMU process holds, in bytes.
#[derive(Clone, Copy, Default)]
pub struct Held {
    /// Of the guest's RAM, mapped into the process.
    pub ram: f64,
    /// Of that, pages of its own over the file.
    pub ram_own: f64,
    /// All the rest: what others map too is divided by how many do.
    pub own: f64,
    /// What the file of the guest's RAM takes, however many map it.
    pub file: f64,
}

impl Held {
    pub fn by(pid: u32) -> Result<Self, Skip> {
        let mut held = Self::default();
        let mut in_ram = false;
        for line in BufReader::new(File::open(format!("/proc/{pid}/smaps"))?).lines() {
            let line = line?;
            let mut words = line.split_whitespace();
            match (words.next().and_then(|word| word.strip_suffix(':')), words.next()) {
                (Some(key), Some(kib)) => {
                    let bytes = || kib.parse::<f64>().map_or(0.0, |kib| kib * 1024.0);
                    match (in_ram, key) {
                        (true, "Rss") => held.ram += bytes(),
                        (true, "Anonymous") => held.ram_own += bytes(),
                        (false, "Pss") => held.own += bytes(),
                        _ => {}
                    }
                }
                _ => in_ram = line.contains("/memfd:"),
            }
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")) {
                held.file = fs::metadata(&path)?.blocks() as f64 * 512.0;
            }
        }
        Ok(held)
    }

    /// What it takes beside its file.
    pub fn beside_the_file(&self) -> f64 {
        self.ram_own + self.own
    }
}

/// Has all of a guest's RAM in memory, and in its process's page tables: QEMU's own mapping is read from outside.
pub fn make_resident(pid: u32) -> Outcome {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut piece = vec![0; 1 << 20];
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().filter(|line| line.contains("/memfd:")) {
        let bounds = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let parse = |text: &str| u64::from_str_radix(text, 16).ok();
        let Some((Some(start), Some(end))) = bounds.map(|(start, end)| (parse(start), parse(end))) else {
            return Err(Skip::new("/proc/PID/maps is not as proc(5) says"));
        };
        for at in (start..end).step_by(piece.len()) {
            let len = piece.len().min((end - at) as usize);
            memory.read_exact_at(&mut piece[..len], at)?;
        }
    }
    Ok(())
}

/// A QEMU resumed without us: the arguments of one of our clones, its memory file and its saved state, and disks in QEMU's own block layer.
pub struct Bare {
    process: Child,
    pub agent: PathBuf,
}

/// What one is made of.
pub struct BareKit<'a> {
    /// A clone of ours that lives.
    pub like: &'a QemuVm,
    /// Its point's state, in a file.
    pub state: &'a Path,
    pub dir: &'a Path,
    /// A qcow2 file for each disk.
    pub overlays: &'a [PathBuf],
}

impl Bare {
    /// Starts one, and returns when its guest runs.
    pub fn start(kit: &BareKit<'_>) -> Result<Self, Skip> {
        let (control, agent) = (kit.dir.join("bare-control"), kit.dir.join("bare-agent"));
        for stale in [&control, &agent] {
            fs::remove_file(stale)
                .or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
        }
        let listener = UnixListener::bind(&control)?;
        let mut command = bare_command(kit, &control, &agent)?;
        command.stdin(File::open(kit.state)?).stdout(Stdio::null()).stderr(Stdio::inherit());
        let process = command.spawn()?;
        let bare = Self { process, agent };
        // A QEMU that ends before it connects has said why; this would wait for ever, and a figure has no use for that.
        let (stream, _) = listener.accept()?;
        bare.load(stream)?;
        Ok(bare)
    }

    /// Has it load the state, which is its standard input, and run: it was saved by a guest that stood still, which it would do too.
    fn load(&self, mut stream: UnixStream) -> Outcome {
        stream.set_read_timeout(Some(PATIENCE))?;
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        let commands = [
            json!({ "execute": "qmp_capabilities" }),
            json!({ "execute": "migrate-set-capabilities", "arguments": capabilities }),
            json!({ "execute": "migrate-incoming", "arguments": { "uri": "fd:0" } }),
        ];
        // All in one, so that it never waits for us.
        stream.write_all((commands.map(|command| command.to_string()).join("\n") + "\n").as_bytes())?;
        for line in BufReader::new(stream.try_clone()?).lines() {
            let line = line?;
            if line.contains("\"completed\"") {
                stream.write_all(b"{\"execute\": \"cont\"}\n")?;
            }
            if line.contains("\"RESUME\"") {
                return Ok(());
            }
            if line.contains("\"error\"") || line.contains("\"failed\"") {
                return Err(Skip::new(format!("a bare QEMU does not resume: {line}")));
            }
        }
        Err(Skip::new("a bare QEMU has ended"))
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn bare_command(kit: &BareKit<'_>, control: &Path, agent: &Path) -> Result<Command, Skip> {
    let pid = kit.like.pid()?;
    let line = String::from_utf8(fs::read(format!("/proc/{pid}/cmdline"))?)?;
    let mut words = line.trim_end_matches('\0').split('\0');
    let mut command = Command::new(words.next().unwrap_or_default());
    let mut overlays = kit.overlays.iter();
    let mut changed = 0;
    for word in words {
        let mut path = |option: &str, path: &Path| {
            changed += 1;
            format!("{option}{}", text(path))
        };
        let word = match word {
            // It runs as soon as it can.
            "-S" => continue,
            word if word.starts_with("socket,id=control,") => path("socket,id=control,path=", control),
            word if word.starts_with("socket,id=agent,") => path("socket,id=agent,server=on,wait=off,path=", agent),
            word if word.starts_with("file,id=console,") => {
                path("file,id=console,append=on,path=", &kit.dir.join("bare-console"))
            }
            word if word.starts_with("memory-backend-file,") => {
                word.replace("/proc/self/fd/", &format!("/proc/{pid}/fd/"))
            }
            word if word.contains("\"driver\":\"nbd\"") => {
                let at = kit.overlays.len() - overlays.len();
                let overlay = overlays.next().ok_or_else(|| Skip::new("more disks than overlays"))?;
                let file = json!({ "driver": "file", "filename": text(overlay) });
                let node = json!({
                    "driver": "qcow2", "node-name": format!("disk{at}"), "discard": "unmap", "file": file,
                });
                node.to_string()
            }
            word => word.to_owned(),
        };
        command.arg(word);
    }
    if changed != 3 || overlays.len() != 0 {
        return Err(Skip::new("a clone's arguments are not what this figure knows: see frontend/qemu/command.rs"));
    }
    Ok(command)
}
