//! The job: a guest is booted, forked while it runs, cloned, and clones are forked again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use offshoot::backing::FileImage;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::qemu::{AfterFork, AgentClient, AtBirth, Kernel, QemuClone, QemuPoint, QemuSpec, QemuVm};
use offshoot::{BoxError, CloneSpec, DiskName, Tree, VmName};

use crate::args::Output;
use crate::guard;
use crate::guest_image::{COMMAND_LINE, GuestTools, program};
use crate::memory::ProcessMemory;
use crate::options::{Afterwards, Options};
use crate::report::{Report, Row};

/// Longer than any boot that goes on.
const BOOT: Duration = Duration::from_secs(300);
/// Longer than any answer of an agent.
const ANSWER: Duration = Duration::from_secs(60);

/// Whether the guard is gone, and everything is to end.
#[derive(Clone, Default)]
struct Alone(Arc<AtomicBool>);

impl Alone {
    /// Watches for it, for as long as this process lives.
    fn watch() -> Self {
        let alone = Self::default();
        let told = alone.clone();
        std::thread::spawn(move || {
            // An input that cannot be read is an input that has ended.
            let _ended = guard::until_alone();
            told.0.store(true, Ordering::Relaxed);
        });
        alone
    }

    fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<(), BoxError> {
        if self.is() { Err("interrupted: everything is cleaned up".into()) } else { Ok(()) }
    }
}

/// Where consoles and sockets are. One that the user named stays, with the consoles in it.
struct Place {
    path: PathBuf,
    is_ours: bool,
}

impl Place {
    fn new(named: Option<&Path>) -> std::io::Result<Self> {
        let path = named
            .map_or_else(|| std::env::temp_dir().join(format!("qemu-clones-{}", std::process::id())), Path::to_owned);
        fs::create_dir_all(&path)?;
        Ok(Self { path: path.canonicalize()?, is_ours: named.is_none() })
    }

    fn console(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.console"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_ours {
            // It is a temporary directory like any other if this fails.
            let _gone = fs::remove_dir_all(&self.path);
        }
    }
}

/// What is booted.
struct Guest {
    kernel: Option<Kernel>,
    disk: Option<PathBuf>,
    ready: String,
}

impl Guest {
    fn of(options: &Options) -> Result<Self, BoxError> {
        if program("qemu-system-x86_64").is_none() {
            return Err("qemu-system-x86_64 is missing: apt install qemu-system-x86".into());
        }
        let (own, ready) = (&options.own, options.own.ready().to_owned());
        if own.is_given() {
            let kernel = own.kernel.clone().map(|image| Kernel {
                image,
                initrd: own.initrd.clone(),
                command_line: own.append.clone().unwrap_or_else(|| "console=ttyS0 root=/dev/vda".into()),
            });
            return Ok(Self { kernel, disk: own.disk.clone(), ready });
        }
        let image = GuestTools::find()?.cached(&std::env::temp_dir())?;
        let kernel =
            Kernel { image: image.kernel, initrd: Some(image.initramfs), command_line: COMMAND_LINE.to_owned() };
        Ok(Self { kernel: Some(kernel), disk: Some(image.disk), ready })
    }
}

/// A clone that runs, and where it came from.
struct Born {
    vm: QemuVm,
    generation: u32,
}

pub fn run(options: &Options) -> Result<(), BoxError> {
    let alone = Alone::watch();
    let guest = Guest::of(options)?;
    let place = Place::new(options.dir.as_deref())?;
    let mut report = Report::new(options);
    let mut parent = boot(options, &guest, &place, &alone, &mut report)?;
    let mut clones: Vec<Born> = Vec::new();
    for generation in 1..=options.generations {
        // The first clone of the last generation has run, and written, since it was born.
        let last = clones.iter_mut().find(|born| born.generation + 1 == generation);
        let source = last.map_or(&mut parent, |born| &mut born.vm);
        let point = source.fork(AfterFork::Continue)?;
        report.forked(generation, &point.timings());
        let bar = bar(format!("generation {generation}"), options.clones.into());
        for number in 1..=options.clones {
            alone.check()?;
            let name = format!("clone-{generation}-{number}");
            clones.push(Born { vm: spawn(&point, &name, options, &place, &mut report)?, generation });
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    report.memory.push(Row::new("parent", 0, &parent, &place.console("parent"), ProcessMemory::of(parent.pid()?)?));
    for born in &clones {
        let name = born.vm.vm().identity().name.to_string();
        let memory = ProcessMemory::of(born.vm.pid()?)?;
        report.memory.push(Row::new(&name, born.generation, &born.vm, &place.console(&name), memory));
    }
    match options.output {
        Output::Text => print!("{}", report.text()),
        Output::Json => println!("{}", report.json()),
    }
    if options.afterwards == Afterwards::Keep {
        eprintln!(
            "{} guests run, with their consoles in {}. Ctrl-C ends them.",
            clones.len() + 1,
            place.path.display()
        );
        while !alone.is() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

fn bar(what: String, steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:16} {bar:40} {pos}/{len} {elapsed}");
    // Shown at a terminal, and nowhere else.
    let bar = ProgressBar::new(steps).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Boots the parent, and waits until it says that it is ready.
fn boot(
    options: &Options,
    guest: &Guest,
    place: &Place,
    alone: &Alone,
    report: &mut Report,
) -> Result<QemuVm, BoxError> {
    let tree = Tree::default();
    let disks = match &guest.disk {
        None => Vec::new(),
        Some(path) => {
            let image = FileImage::open(path, None).map_err(|error| format!("{}: {error}", path.display()))?;
            vec![(DiskName::new("root"), Disk::over_image(&tree, Arc::new(image), Access::ReadWrite)?)]
        }
    };
    let spec = QemuSpec {
        cpus: options.vcpus,
        accelerator: options.accelerator,
        kernel: guest.kernel.clone(),
        directory: Some(place.path.clone()),
        ..QemuSpec::new(options.ram)
    };
    let (begun, console) = (Instant::now(), place.console("parent"));
    let parent = QemuVm::launch(&tree, VmName::new("parent")?, spec, disks, Some(&console))?;
    let spinner = ProgressBar::new_spinner().with_message("booting the parent");
    loop {
        alone.check()?;
        // A console need not be text.
        let said = fs::read(&console).unwrap_or_default();
        if String::from_utf8_lossy(&said).contains(&guest.ready) {
            break;
        }
        if let Some(reason) = parent.ended() {
            return Err(format!("the parent has ended: {reason}").into());
        }
        if begun.elapsed() > BOOT {
            let said = String::from_utf8_lossy(&said).into_owned();
            let last: Vec<_> = said.lines().rev().take(5).collect();
            return Err(format!("the parent did not say `{}` within {BOOT:?}; last: {last:?}", guest.ready).into());
        }
        spinner.tick();
        std::thread::sleep(Duration::from_millis(2));
    }
    spinner.finish_and_clear();
    report.stages.add("boot", begun.elapsed());
    Ok(parent)
}

/// Spawns one clone, and tells it who it is.
fn spawn(
    point: &QemuPoint,
    name: &str,
    options: &Options,
    place: &Place,
    report: &mut Report,
) -> Result<QemuVm, BoxError> {
    let begun = Instant::now();
    let clone = QemuClone {
        identity: CloneSpec { name: Some(VmName::new(name)?), ..CloneSpec::default() },
        console: Some(place.console(name)),
        at_birth: AtBirth::Running,
        ..QemuClone::default()
    };
    let (vm, timings) = point.shell(clone)?.enter()?;
    report.spawned(&timings, begun.elapsed());
    if !options.own.is_given() {
        let mut agent = AgentClient::connect(&vm.agent_socket())?;
        agent.ask(&["hostname", name], ANSWER)?;
        report.stages.add("first_answer", begun.elapsed());
        let uuid = vm.vm().identity().uuid.to_string().replace('-', "");
        agent.ask(&["machine-id", &uuid], ANSWER)?;
    }
    Ok(vm)
}
