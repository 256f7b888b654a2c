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
    pub mod disk;
    pub mod heap;
    pub mod options;
    pub mod report;
    pub mod sample;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod shells;
    pub mod subject;
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub mod tiny_guest;
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

const FIGURES: &[Figure] = &[
    Figure { name: "heap-fork", what: "heap face: fork of a space with a few dirty pages", run: figures::heap::fork },
    Figure { name: "heap-read", what: "heap face: random 8-byte reads", run: figures::heap::read },
    Figure { name: "disk", what: "disk face: 4 KiB requests in one process", run: figures::disk::requests },
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    Figure { name: "shell-pause", what: "KVM: the parent's pause in a first fork", run: figures::shells::pause },
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    Figure { name: "shell-spawn", what: "KVM: a clone to its first instruction", run: figures::shells::spawn },
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
