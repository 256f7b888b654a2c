//! The table of figures: what this library claims, measured beside what a user would do without it, in one run.
//!
//! ```text
//! cargo bench --bench figures                     a table
//! cargo bench --bench figures -- --json           one JSON object per line
//! cargo bench --bench figures -- --quick          smaller sizes, fewer samples: for CI
//! cargo bench --bench figures -- heap             only figures whose name contains "heap"
//! cargo bench --bench figures -- --list           the names
//! ```
//!
//! Absolute times belong to the machine; ratios are the point. Subject and baseline are sampled in turn (A B A B …), so that whatever
//! else the machine does hits both alike, and compared by their medians. A figure that cannot run here says so in a row of its own.
//!
//! To add one: write a `fn(&Effort, &mut Report) -> Outcome` in a module below, sample with [`figures::sample::Round`], hand rows to the
//! report, and name it in [`FIGURES`].

mod figures {
    pub mod alloc;
    #[cfg(target_os = "linux")]
    pub mod bare;
    #[cfg(target_os = "linux")]
    pub mod checks;
    #[cfg(all(feature = "store", unix))]
    pub mod clones;
    pub mod disk;
    pub mod heap;
    #[cfg(all(feature = "imago", unix))]
    pub mod images;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod kvm;
    #[cfg(unix)]
    pub mod layers;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod live;
    #[cfg(target_os = "linux")]
    pub mod many;
    #[cfg(target_os = "linux")]
    pub mod mapped;
    #[cfg(all(feature = "nbd", unix))]
    pub mod nbd;
    pub mod options;
    #[cfg(unix)]
    pub mod place;
    #[cfg(target_os = "linux")]
    pub mod prefault;
    #[cfg(target_os = "linux")]
    pub mod process;
    #[cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]
    pub mod qemu;
    #[cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]
    pub mod qemu_guest;
    pub mod report;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod reset;
    pub mod sample;
    #[cfg(all(feature = "store", target_os = "linux"))]
    pub mod saved;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod shells;
    #[cfg(target_os = "linux")]
    #[allow(dead_code, unused_imports, reason = "the tests that share it use more of it")]
    #[path = "../../tests/soak/mod.rs"]
    pub mod soak;
    pub mod spawn;
    #[cfg(unix)]
    pub mod stacks;
    #[cfg(unix)]
    pub mod store;
    pub mod subject;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod tiny_guest;
    #[cfg(unix)]
    pub mod tools;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod toucher;
    pub mod tree;
    pub mod trees;
    #[cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub mod uffd;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod writer;
}

use std::process::ExitCode;

use figures::options::{Effort, Mode, Options};
use figures::report::{Outcome, Report};

#[global_allocator]
static ALLOCATOR: figures::alloc::Counting = figures::alloc::Counting;

/// One figure, or a family that shares its set-up.
struct Figure {
    name: &'static str,
    what: &'static str,
    run: fn(&Effort, &mut Report) -> Outcome,
}

/// A figure of the mapped backing: skipped, aloud, where there is none.
#[cfg(target_os = "linux")]
macro_rules! linux {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(target_os = "linux"))]
macro_rules! linux {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("the mapped backing is Linux only"))
    };
}

/// A figure of durable disks: skipped, aloud, where there are none.
#[cfg(unix)]
macro_rules! unix {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(unix))]
macro_rules! unix {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("durable disks are for Unix only"))
    };
}

/// A figure of the store of clones: skipped, aloud, where there is none.
#[cfg(all(feature = "store", unix))]
macro_rules! clones {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(feature = "store", unix)))]
macro_rules! clones {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("the clone store is a feature, and Unix only"))
    };
}

/// A figure with a hypervisor: skipped, aloud, where there is none.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
macro_rules! kvm {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
macro_rules! kvm {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("KVM is for Linux on x86-64 here"))
    };
}

/// A figure of the NBD server: skipped, aloud, where there is none.
#[cfg(all(feature = "nbd", unix))]
macro_rules! nbd {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(feature = "nbd", unix)))]
macro_rules! nbd {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("the NBD server is a feature, and Unix only"))
    };
}

/// A figure of QEMU guests: skipped, aloud, where there are none.
#[cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]
macro_rules! qemu {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(feature = "qemu", target_os = "linux", target_arch = "x86_64")))]
macro_rules! qemu {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("guests in QEMU are a feature, for Linux on x86-64"))
    };
}

/// A figure of the page-fault server: skipped, aloud, where there is none.
#[cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
macro_rules! uffd {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
macro_rules! uffd {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("the page-fault server is a feature, and Linux only"))
    };
}

/// A figure of disk images: skipped, aloud, where there are none.
#[cfg(all(feature = "imago", unix))]
macro_rules! imago {
    ($($path:tt)*) => { figures::$($path)* };
}
#[cfg(not(all(feature = "imago", unix)))]
macro_rules! imago {
    ($($path:tt)*) => {
        |_, _| Err(figures::report::Skip::new("disk images of other tools are a feature, and Unix only"))
    };
}

const FIGURES: &[Figure] = &[
    Figure { name: "spawn", what: "a clone's RAM, 64 GiB disk and state, engine only", run: figures::spawn::spawn },
    Figure { name: "parallel", what: "two threads that spawn from one fork point", run: figures::spawn::parallel },
    Figure { name: "many", what: "thousands of mapped clones alive, each having written", run: linux!(many::engine) },
    Figure { name: "many-kvm", what: "hundreds of KVM machines in one process", run: kvm!(many::machines) },
    Figure { name: "memory-kvm", what: "memory of an idle KVM clone, all in", run: kvm!(many::idle_machines) },
    Figure { name: "prefault", what: "first touches of a clone, mapped ahead or not", run: linux!(prefault::prefault) },
    Figure { name: "pause", what: "mapped face: cutting a resident parent", run: linux!(mapped::pause) },
    Figure { name: "refork", what: "mapped face: cutting a clone that has written", run: linux!(mapped::refork) },
    Figure { name: "first-write", what: "mapped face: breaking sharing", run: linux!(mapped::first_write) },
    Figure { name: "reset", what: "mapped face: dropping what a clone wrote", run: linux!(mapped::reset) },
    Figure { name: "reset-vcpu", what: "KVM: a machine back at its fork point, in place", run: kvm!(reset::vcpu) },
    Figure { name: "memory", what: "engine memory of an idle clone", run: figures::spawn::memory },
    Figure {
        name: "kvm",
        what: "a clone from nothing to its first guest instruction",
        run: kvm!(kvm::first_instruction),
    },
    Figure { name: "shell-pause", what: "KVM: the parent's pause in a first fork", run: kvm!(shells::pause) },
    Figure { name: "shell-spawn", what: "KVM: a clone in a shell to its first instruction", run: kvm!(shells::spawn) },
    Figure { name: "live", what: "the parent's pause in a re-fork, its guest writing on", run: kvm!(live::live) },
    Figure { name: "live-kvm", what: "the same, the guest writing from a vCPU", run: kvm!(live::live_kvm) },
    Figure { name: "heap-fork", what: "heap face: fork of a space with a few dirty pages", run: figures::heap::fork },
    Figure { name: "heap-read", what: "heap face: random 8-byte reads", run: figures::heap::read },
    Figure { name: "disk", what: "disk face: random 4 KiB requests in one process", run: figures::disk::requests },
    Figure { name: "durable", what: "durable disks: random 4 KiB requests", run: unix!(store::requests) },
    Figure { name: "durable-depth", what: "durable disks: reads through 64 layers", run: unix!(stacks::depth) },
    Figure { name: "durable-clone", what: "durable disks: a clone of 64 GiB", run: clones!(clones::clones) },
    Figure { name: "durable-layer", what: "durable disks: verifying and sealing a layer", run: unix!(layers::layers) },
    Figure { name: "durable-open", what: "durable disks: opening one, and its memory", run: unix!(layers::open) },
    Figure { name: "saved", what: "a whole VM to files and back", run: linux!(saved::saved) },
    Figure { name: "depth", what: "a thousand levels deep: fork, read, spawn", run: figures::trees::depth },
    Figure { name: "siblings", what: "a spawn among ten thousand siblings", run: figures::trees::siblings },
    Figure { name: "scattered", what: "mapped face: every 8th page dirty", run: linux!(trees::scattered) },
    Figure { name: "checks", what: "wrong pages, writers running through every fork", run: linux!(checks::checks) },
    Figure { name: "uffd", what: "a page fault of a VMM, served over userfaultfd", run: uffd!(uffd::faults) },
    Figure { name: "convert", what: "disk images of other tools, in and out", run: imago!(images::convert) },
    Figure { name: "convert-sparse", what: "a large disk with little in it, out", run: imago!(images::nearly_empty) },
    Figure { name: "nbd", what: "random 4 KiB requests of a client through NBD", run: nbd!(nbd::requests) },
    Figure {
        name: "qemu",
        what: "Debian guests in QEMU: forks, clones, their memory and disks",
        run: qemu!(qemu::qemu),
    },
    Figure { name: "images", what: "heap face: whole-image operations", run: figures::tree::images },
];

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong}\nusage: figures [--json] [--quick] [--list] [NAME]");
            return ExitCode::from(2);
        }
    };
    let chosen = FIGURES.iter().filter(|figure| figure.name.contains(options.name.as_str()));
    if options.mode == Mode::List {
        chosen.for_each(|figure| println!("{:<14} {}", figure.name, figure.what));
        return ExitCode::SUCCESS;
    }
    let mut report = Report::new(options.mode);
    let mut any = false;
    for figure in chosen {
        any = true;
        report.begin(figure.name, figure.what);
        if let Err(skip) = (figure.run)(&options.effort, &mut report) {
            report.skipped(&skip);
        }
    }
    if !any {
        eprintln!("no figure's name contains {:?}: see --list", options.name);
        return ExitCode::from(2);
    }
    report.finish();
    ExitCode::SUCCESS
}
