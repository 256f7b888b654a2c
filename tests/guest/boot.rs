//! What these tests share: the image, a booted guest, its agent, patience.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use offshoot::backing::FileImage;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::qemu::*;
use offshoot::page::ByteSize;
use offshoot::{DiskName, Tree, VmName};

use crate::guest_image::{COMMAND_LINE, GuestImage, GuestTools, READY, program};

/// Nothing takes so long on a machine that works, be it slow.
pub const LONG: Duration = Duration::from_secs(120);

/// What guests are made of, or `None` with a loud word where something is missing.
pub fn tools() -> Option<GuestTools> {
    let missing = match GuestTools::find() {
        Ok(tools) if program("qemu-system-x86_64").is_some() => return Some(tools),
        Ok(_) => "qemu-system-x86_64 (package qemu-system-x86)".to_owned(),
        Err(missing) => missing.to_string(),
    };
    let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "OFFSHOOT_REQUIRE=all, but missing: {missing}");
    eprintln!("SKIPPED: {missing}");
    None
}

/// The image, built once for all runs.
pub fn image() -> Option<GuestImage> {
    Some(tools()?.cached(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap())
}

/// Boots the guest from the image: ready, and with an agent.
pub fn boot(tree: &Tree, image: &GuestImage) -> QemuVm {
    let disk =
        Disk::over_image(tree, Arc::new(FileImage::open(&image.disk, None).unwrap()), Access::ReadWrite).unwrap();
    let kernel = Kernel {
        image: image.kernel.clone(),
        initrd: Some(image.initramfs.clone()),
        command_line: COMMAND_LINE.to_owned(),
    };
    let deadlines = Deadlines { start: LONG, command: LONG, save: LONG, load: LONG };
    let spec = QemuSpec {
        // It has random numbers of its own, which the kernel's generator begins with.
        cpu: Some("max".into()),
        // With one processor QEMU's translator, before release 8.1, leaves out the barriers between the guest and the devices' thread, and a
        // notification of a virtio ring may be lost: the guest waits for what is there, until the next comes.
        cpus: 2,
        kernel: Some(kernel),
        nic: Nic::User,
        deadlines,
        ..QemuSpec::new(ByteSize::mib(192))
    };
    let vm =
        QemuVm::launch(tree, VmName::new("parent").unwrap(), spec, vec![(DiskName::new("root"), disk)], None).unwrap();
    until("the guest is ready", || {
        assert!(vm.ended().is_none(), "QEMU has ended: {:?}", vm.ended());
        std::fs::read_to_string(vm.console()).is_ok_and(|said| said.contains(READY))
    });
    vm
}

/// Waits for it; a hang is a failure.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The agent of a VM. One at a time.
pub struct Agent(AgentClient);

impl Agent {
    pub fn of(vm: &QemuVm) -> Self {
        Self(AgentClient::connect(&vm.agent_socket()).unwrap())
    }

    /// Asks for this, words parted by spaces.
    pub fn ask(&mut self, command: &str) -> String {
        self.try_ask(command).unwrap()
    }

    pub fn try_ask(&mut self, command: &str) -> Result<String, AgentError> {
        let words: Vec<_> = command.split(' ').collect();
        self.0.ask(&words, LONG)
    }

    /// How often the guest's kernel has reseeded because it was forked.
    pub fn reseeds(&mut self) -> u64 {
        self.ask("reseeds").split(' ').next().unwrap().parse().unwrap()
    }
}

/// A guest at an instant after its boot, and of what. Its wall clock was set to 2001, and a generator in a program was used.
pub struct Booted {
    pub point: QemuPoint,
    /// The generator's first number.
    pub drawn: String,
}

pub const YEAR_2001: u64 = 1_000_000_000;

impl Booted {
    /// The one that other tests of this process have now, or a new one.
    pub fn shared() -> Option<Arc<Self>> {
        static ONE: Mutex<Weak<Booted>> = Mutex::new(Weak::new());
        let mut one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(booted) = one.upgrade() {
            return Some(booted);
        }
        let image = image()?;
        let tree = Tree::default();
        let mut vm = boot(&tree, &image);
        let mut agent = Agent::of(&vm);
        agent.ask(&format!("clock {YEAR_2001} 0"));
        let drawn = agent.ask("prng");
        // A fork alone is no reason to reseed: the guest that goes on has its generation id still.
        drop(vm.fork(AfterFork::Continue).unwrap());
        let mut agent = Agent::of(&vm);
        assert_eq!(agent.reseeds(), 0, "a guest that goes on was never cloned");
        let point = vm.fork(AfterFork::Freeze).unwrap();
        let booted = Arc::new(Self { point, drawn });
        *one = Arc::downgrade(&booted);
        Some(booted)
    }
}

/// A directory of one test's, gone with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("offshoot-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}
