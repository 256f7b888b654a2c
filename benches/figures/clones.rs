//! A clone of a durable disk of 64 GiB in 10,000 extents: in memory, under a name of its own, in the store of clones; and what others make.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use offshoot::backing::{Backing, Sealed};
use offshoot::page::ByteSize;
use offshoot::store::{CloneName, CloneStore, DiskDir, Job, StoreOptions};

use super::options::Effort;
use super::place::{Place, everywhere};
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Round, Stats, timed};
use super::store::Page;
use super::subject::{PAGE, at, cut, geometry, tree};
use super::tools;

const EXTENTS: u64 = 10_000;
/// From one extent to the next.
const APART: u64 = 6 << 20;
const LEN: ByteSize = ByteSize::gib(64);

pub fn clones(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, clones_in)
}

fn clones_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let page: Page = [0x77; PAGE as usize];
    let path = |name: &str| place.path().join(name);
    std::fs::create_dir(path("dir"))?;
    let dir = DiskDir::open(path("dir"), &tree())?;
    let disk = dir.create(geometry(LEN)?, None)?;
    (0..EXTENTS).try_for_each(|n| disk.write(at(n * APART / PAGE), &page))?;
    let image = cut(&disk)?;
    // The first clone freezes its parent.
    image.spawn()?.flush()?;
    let store = CloneStore::open(path("store"), StoreOptions::default().tree(&tree()))?;
    let source = CloneName::new("source")?;
    store.create_empty(&source, LEN)?;
    let written = store.open_disk(&source)?;
    (0..EXTENTS).try_for_each(|n| written.write(at(n * APART / PAGE), &page))?;
    written.flush()?;
    drop(written);
    // The same as a golden image is kept: one sealed layer, and no disk of its own.
    let (flat, image_name) = (CloneName::new("flat")?, CloneName::new("image")?);
    store.clone_disk(&source, &flat)?;
    store.flatten(&flat, &Job::new())?;
    store.snapshot(&flat, &image_name)?;

    let serial = Cell::new(0u64);
    let fresh = |what: &str| {
        serial.set(serial.get() + 1);
        format!("{what}-{}", serial.get())
    };
    let mut round = Round::new(effort);
    round.probe(|| timed(|| image.spawn().expect("room for a clone")).0);
    round.probe(|| {
        timed(|| {
            let clone = image.spawn().expect("room for a clone");
            clone.flush().expect("room on the medium");
            clone
        })
        .0
    });
    for from in [&image_name, &source] {
        let (store, fresh) = (&store, &fresh);
        round.probe(move || {
            let name = CloneName::new(fresh("clone")).expect("a good name");
            timed(|| store.clone_disk(from, &name).expect("room for a clone")).0
        });
    }
    round.probe(|| {
        File::create_new(path(&fresh("entry"))).expect("a new file");
        timed(|| File::open(place.path()).and_then(|dir| dir.sync_all()).expect("a sync of the directory")).0
    });
    round.probe(|| {
        let path = path(&fresh("plain"));
        timed(|| {
            let file = File::create_new(&path).expect("a new file");
            file.write_all_at(&[1; 8192], 0).expect("room on the medium");
            file.sync_data().expect("a sync");
            File::open(place.path()).and_then(|dir| dir.sync_all()).expect("a sync of the directory");
            file
        })
        .0
    });
    let [spawn, durable, of_image, of_disk, sync, plain] = round.run();
    let mut row = |case: &str, stats: Stats, baseline: Option<(&str, Stats)>, goal: Goal| {
        let baseline = baseline.map(|(name, stats)| Baseline::new(name, stats));
        report.row(&Row { case: format!("{}: {case}", place.name), unit: Unit::Microseconds, stats, baseline, goal });
    };
    row("a clone in memory", spawn, None, Goal::Median(100.0));
    let most = Goal::Median(100.0 + sync.p50 / 1e3);
    row("a clone with a durable head", durable, Some(("one sync of the directory", sync)), most);
    row("the same", durable, Some(("a file of 8 KiB, synced with its directory", plain)), Goal::None);
    row("in the store, a clone of an image", of_image, Some(("one sync of the directory", sync)), most);
    row("in the store, a clone of a disk", of_disk, Some(("one sync of the directory", sync)), most);

    // One that is missing does not take the other's row away.
    let mut skips = Vec::new();
    match qemu_create(place) {
        Ok([create, start]) => {
            let case = "qemu-img create -b, process and all, no sync";
            row(case, create, Some(("qemu-img --version", start)), Goal::None);
        }
        Err(skip) => skips.push(skip),
    }
    // A file system of the caller's that can share extents, where this one cannot.
    let elsewhere = std::env::var_os("OFFSHOOT_REFLINK_DIR").map(PathBuf::from);
    match reflink(elsewhere.as_deref().unwrap_or(place.path())) {
        Ok(stats) => row("a reflink of such a file, synced", stats, None, Goal::None),
        Err(skip) => skips.push(skip),
    }
    skips.iter().for_each(|skip| report.skipped(skip));
    Ok(())
}

/// An overlay over a qcow2 file with the same extents, and a process that does nothing.
fn qemu_create(place: &Place) -> Result<[Stats; 2], Skip> {
    let [raw, base, overlay] = ["raw", "base.qcow2", "overlay.qcow2"].map(|name| place.path().join(name));
    drop(sparse_file(&raw)?);
    tools::run("qemu-img", &["convert", "-q", "-O", "qcow2", tools::text(&raw), tools::text(&base)])?;
    let create = tools::a_few(|| {
        std::fs::remove_file(&overlay).ok();
        let (time, done) = timed(|| tools::qcow2_over(&overlay, &base, "qcow2"));
        done.map(|()| time)
    })?;
    let start = tools::a_few(|| {
        let (time, done) = timed(|| tools::run("qemu-img", &["--version"]));
        done.map(|()| time)
    })?;
    Ok([create, start])
}

fn sparse_file(path: &Path) -> Result<File, Skip> {
    let file = File::create_new(path)?;
    file.set_len(LEN.get())?;
    (0..EXTENTS).try_for_each(|n| file.write_all_at(&[0x77; PAGE as usize], n * APART))?;
    file.sync_all()?;
    Ok(file)
}

/// A file that shares all extents with another, durable.
#[cfg(target_os = "linux")]
fn reflink(directory: &Path) -> Result<Stats, Skip> {
    let [empty, from, to] = ["empty", "from", "to"].map(|name| directory.join(format!("offshoot-reflink-{name}")));
    let _gone = [Gone(&empty), Gone(&from), Gone(&to)];
    let share = |from: &File, to: &File| {
        rustix::fs::ioctl_ficlone(to, from).map_err(|error| {
            let place = directory.display();
            Skip::new(format!("a reflink in {place}: {error}: name another directory in OFFSHOOT_REFLINK_DIR"))
        })
    };
    // Asked with a file of nothing, before the large one is made.
    share(&File::create_new(&empty)?, &File::create_new(&to)?)?;
    let from = sparse_file(&from)?;
    let clone = || -> Result<f64, Skip> {
        std::fs::remove_file(&to).ok();
        let (time, done) = timed(|| -> Outcome {
            let to = File::create_new(&to)?;
            share(&from, &to)?;
            to.sync_data()?;
            Ok(File::open(directory)?.sync_all()?)
        });
        done.map(|()| time)
    };
    tools::a_few(clone)
}

#[cfg(not(target_os = "linux"))]
fn reflink(_: &Path) -> Result<Stats, Skip> {
    Err(Skip::new("a reflink is made on Linux only here"))
}

/// A file that goes with the value.
#[cfg(target_os = "linux")]
struct Gone<'a>(&'a Path);

#[cfg(target_os = "linux")]
impl Drop for Gone<'_> {
    fn drop(&mut self) {
        std::fs::remove_file(self.0).ok();
    }
}
