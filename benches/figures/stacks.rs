//! Reads through a stack of 64 durable layers against a stack of one, and what others pay: the system for 64 files, QEMU for a chain of qcow2 files.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use offshoot::backing::{Backing, Sealed};
use offshoot::page::ByteSize;
use offshoot::store::{DiskDir, Durable, Job};

use super::options::Effort;
use super::place::{Place, everywhere};
use super::report::{Goal, Outcome, Report, Skip};
use super::sample::{Random, Round, Stats};
use super::store::{Page, mean, row};
use super::subject::{PAGE, at, cut, geometry, needs_memory, tree};
use super::tools::{self, Requests};

const LAYERS: u64 = 64;

/// Where the data of a stack lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Data {
    /// In the lowest layer; those above hold a page each.
    Lowest,
    /// Each page in another layer than its neighbours: the worst for whoever has a file for each.
    Everywhere,
}

/// How its layers are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Overlays,
    Sealed,
}

pub fn depth(effort: &Effort, report: &mut Report) -> Outcome {
    everywhere(effort, report, depth_in)
}

fn depth_in(effort: &Effort, report: &mut Report, place: &Place) -> Outcome {
    let len = effort.pick(ByteSize::mib(64), ByteSize::mib(512));
    needs_memory(ByteSize::new(7 * len.get()))?;
    let pages = len.get() / PAGE;
    let one = stack(place, len, 1, Data::Everywhere, Form::Overlays)?;
    let lowest = stack(place, len, LAYERS, Data::Lowest, Form::Overlays)?;
    let many = stack(place, len, LAYERS, Data::Everywhere, Form::Overlays)?;
    let one_sealed = stack(place, len, 1, Data::Everywhere, Form::Sealed)?;
    let many_sealed = stack(place, len, LAYERS, Data::Everywhere, Form::Sealed)?;
    let plain = files(place, len, 1)?;
    let sparse = files(place, len, LAYERS)?;
    let mut round = Round::new(effort);
    for disk in [&one, &lowest, &many, &one_sealed, &many_sealed] {
        let (mut random, mut buf): (_, Page) = (Random::new(5), [0; PAGE as usize]);
        let mut read = move |index| disk.read(at(index), &mut buf).expect("inside the disk");
        round.probe(move || mean(&mut random, pages, &mut read));
    }
    for files in [&plain, &sparse] {
        let (mut random, mut buf): (_, Page) = (Random::new(5), [0; PAGE as usize]);
        let mut read = move |index: u64| {
            let file = &files[(index % files.len() as u64) as usize];
            file.read_exact_at(&mut buf, index * PAGE).expect("inside the file");
        };
        round.probe(move || mean(&mut random, pages, &mut read));
    }
    let [one, lowest, many, one_sealed, many_sealed, plain, sparse] = round.run();
    let goal = Goal::Ratio(1.05);
    row(report, place, "64 layers, data in the lowest", lowest, "1 layer", one, goal);
    row(report, place, "64 layers, data in all", many, "1 layer", one, goal);
    row(report, place, "64 layers, data in all", many, "pread of 64 sparse files", sparse, Goal::Ratio(1.11));
    row(report, place, "64 sealed layers, data in all", many_sealed, "1 sealed layer", one_sealed, goal);
    row(report, place, "pread of 64 sparse files", sparse, "pread of one file", plain, Goal::None);
    for (data, case) in
        [(Data::Lowest, "qcow2: 64 files, data in the lowest"), (Data::Everywhere, "qcow2: 64 files, data in all")]
    {
        let read = |layers| {
            let top = qcow2_chain(place, len, layers, data)?;
            tools::a_few(|| tools::qemu_bench(&top, Requests::Reads(effort.pick(2000, 20_000))))
        };
        let (many, one): (Stats, Stats) = (read(LAYERS)?, read(1)?);
        row(report, place, case, many, "qemu-img bench, 1 file", one, Goal::None);
    }
    Ok(())
}

/// A folder of its own for each stack.
fn folder(place: &Place) -> Result<PathBuf, Skip> {
    let number = std::fs::read_dir(place.path())?.count();
    let path = place.path().join(format!("stack-{number}"));
    std::fs::create_dir(&path)?;
    Ok(path)
}

/// A clone that has written nothing over so many layers.
fn stack(place: &Place, len: ByteSize, layers: u64, data: Data, form: Form) -> Result<Durable, Skip> {
    let path = folder(place)?;
    let page: Page = [0x77; PAGE as usize];
    let pages = len.get() / PAGE;
    let dir = DiskDir::open(&path, &tree())?;
    let disk = dir.create(geometry(len)?, None)?;
    for layer in 0..layers {
        match data {
            Data::Lowest if layer == 0 => (0..pages).try_for_each(|index| disk.write(at(index), &page))?,
            Data::Lowest => disk.write(at(layer), &page)?,
            Data::Everywhere => {
                (layer..pages).step_by(layers as usize).try_for_each(|index| disk.write(at(index), &page))?;
            }
        }
        let image = cut(&disk)?;
        if form == Form::Sealed {
            image.seal(&Job::new())?;
        }
    }
    if form == Form::Overlays {
        return Ok(disk.origin().spawn()?);
    }
    // Only what is opened anew reads the sealed files.
    disk.flush()?;
    let id = disk.id();
    drop(disk);
    Ok(dir.open_disk(id, None)?)
}

/// So many files, each page in one of them and holes elsewhere.
fn files(place: &Place, len: ByteSize, count: u64) -> Result<Vec<File>, Skip> {
    let path = folder(place)?;
    let page: Page = [0x77; PAGE as usize];
    let one = |n: u64| {
        let path = path.join(n.to_string());
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        (n..len.get() / PAGE).step_by(count as usize).try_for_each(|at| file.write_all_at(&page, at * PAGE))?;
        file.set_len(len.get())?;
        Ok(file)
    };
    (0..count).map(one).collect()
}

/// The topmost of so many qcow2 files; data lie by clusters of 64 KiB.
fn qcow2_chain(place: &Place, len: ByteSize, layers: u64, data: Data) -> Result<PathBuf, Skip> {
    let path = folder(place)?;
    let name = |layer: u64| path.join(format!("{layer}.qcow2"));
    let clusters = len.get() / 65536;
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", tools::text(&name(0)), &len.get().to_string()])?;
    let write = |file: &Path, first, every, count| tools::qemu_bench(file, Requests::Clusters { first, every, count });
    for layer in 0..layers {
        if layer > 0 {
            tools::qcow2_over(&name(layer), &name(layer - 1), "qcow2")?;
        }
        match data {
            Data::Lowest if layer == 0 => write(&name(0), 0, 1, clusters)?,
            Data::Lowest => write(&name(layer), layer, 1, 1)?,
            Data::Everywhere => write(&name(layer), layer, layers, clusters / layers)?,
        };
    }
    Ok(name(layers - 1))
}
