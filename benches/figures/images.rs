//! Disk images in and out, whole, against `qemu-img convert` of the same image; and a large disk with little in it.
//!
//! Files lie in memory where the system has a folder for that: what differs is the program. Ours syncs what it wrote and renames it, `qemu-img` does
//! neither.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use offshoot::backing::{Backing, Cut, Heap};
use offshoot::frontend::formats::{ExportFormat, Format, ImportPolicy, ImportedImage, export, keep_going};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, PageSize};
use offshoot::store::DiskDir;

use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{geometry, needs_memory, size_name, tree};

const MIB: u64 = 1 << 20;

struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Skip> {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = parent.join(format!("offshoot-images-figure-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(args: &[&str], from: &Path, to: &Path) -> Outcome {
    let mut command = Command::new("qemu-img");
    let done = command.arg("convert").args(args).args([from, to]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match done {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Skip::new(format!("qemu-img convert {args:?}: {status}"))),
        Err(_) => Err(Skip::new("qemu-img is missing")),
    }
}

/// Every second mebibyte random, half of it text-like enough to compress.
fn raw_image(path: &Path, len: u64) -> Outcome {
    let file = File::create(path)?;
    file.set_len(len)?;
    let mut random = Random::new(77);
    let mut piece = vec![0; MIB as usize];
    for at in (0..len).step_by(2 * MIB as usize) {
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        piece[..MIB as usize / 2].iter_mut().for_each(|byte| *byte = b"abcdefgh"[(*byte & 7) as usize]);
        file.write_all_at(&piece, at)?;
    }
    Ok(())
}

/// Whole images: each way, each format.
pub fn convert(effort: &Effort, report: &mut Report) -> Outcome {
    let len = effort.pick(64 * MIB, 512 * MIB);
    needs_memory(ByteSize::new(6 * len))?;
    let folder = Folder::new()?;
    let raw = folder.path("in.raw");
    raw_image(&raw, len)?;
    for (name, args) in [
        ("in.qcow2", &["-f", "raw", "-O", "qcow2"][..]),
        ("packed.qcow2", &["-f", "raw", "-O", "qcow2", "-c"]),
        ("in.vmdk", &["-f", "raw", "-O", "vmdk"]),
    ] {
        qemu_img(args, &raw, &folder.path(name))?;
    }
    let cases = [
        ("qcow2 to raw", "in.qcow2", Format::Qcow2, ExportFormat::Raw, "raw"),
        ("compressed qcow2 to raw", "packed.qcow2", Format::Qcow2, ExportFormat::Raw, "raw"),
        ("VMDK to raw", "in.vmdk", Format::Vmdk, ExportFormat::Raw, "raw"),
        ("raw to qcow2", "in.raw", Format::Raw, ExportFormat::default(), "qcow2"),
        ("raw to VMDK", "in.raw", Format::Raw, ExportFormat::Vmdk, "vmdk"),
    ];
    let policy = ImportPolicy::default();
    for (what, file, format, to, theirs) in cases {
        let (file, out) = (folder.path(file), folder.path("out"));
        let mut round = Round::new(effort);
        round.probe(|| {
            let copy = || -> Result<(), offshoot::frontend::formats::FormatError> {
                ImportedImage::open(&file, format, &policy)?.convert(&out, &to, &mut keep_going)
            };
            let (time, done) = timed(copy);
            done.expect("room for a copy");
            time
        });
        round.probe(|| {
            let (time, done) = timed(|| qemu_img(&["-f", format.name(), "-O", theirs], &file, &out));
            done.expect("it could a moment ago");
            time
        });
        let [ours, others] = round.run();
        report.row(&Row {
            case: format!("{what}, {} half full", size_name(ByteSize::new(len))),
            unit: Unit::Milliseconds,
            stats: ours,
            baseline: Some(Baseline::new("qemu-img convert", others)),
            goal: Goal::None,
        });
    }
    disks(effort, report, &folder, len)
}

/// From an image into a disk in memory, and out of it again.
fn disks(effort: &Effort, report: &mut Report, folder: &Folder, len: u64) -> Outcome {
    let (file, out) = (folder.path("in.qcow2"), folder.path("out"));
    let image = ImportedImage::open(&file, Format::Qcow2, &ImportPolicy::default()).map_err(skip)?;
    let tree = tree();
    let space: Heap = image.into_space(&tree, PageSize::KIB_4, &mut keep_going).map_err(skip)?;
    let (sealed, _) = space.cut()?.commit();
    let mut round = Round::new(effort);
    round.probe(|| {
        let fill = || image.into_space::<Heap>(&tree, PageSize::KIB_4, &mut keep_going).expect("room for a copy");
        timed(fill).0
    });
    round.probe(|| {
        timed(|| export(&sealed, &out, &ExportFormat::default(), &mut keep_going).expect("room for a copy")).0
    });
    round.probe(|| timed(|| qemu_img(&["-f", "qcow2", "-O", "raw"], &file, &out).expect("as before")).0);
    round.probe(|| {
        timed(|| qemu_img(&["-f", "raw", "-O", "qcow2"], &folder.path("in.raw"), &out).expect("as before")).0
    });
    let [import, written, to_raw, to_qcow2] = round.run();
    let size = size_name(ByteSize::new(len));
    for (case, stats, name, baseline) in [
        ("qcow2 into a disk in memory", import, "qemu-img convert to raw", to_raw),
        ("a disk in memory to qcow2", written, "qemu-img convert from raw", to_qcow2),
    ] {
        report.row(&Row {
            case: format!("{case}, {size} half full"),
            unit: Unit::Milliseconds,
            stats,
            baseline: Some(Baseline::new(name, baseline)),
            goal: Goal::None,
        });
    }
    Ok(())
}

fn skip(error: offshoot::frontend::formats::FormatError) -> Skip {
    Skip::new(error.to_string())
}

/// 64 GiB with 1,000 spots of 64 KiB: to be paid for by the spots.
pub fn nearly_empty(effort: &Effort, report: &mut Report) -> Outcome {
    const SPOTS: u64 = 1000;
    let len = ByteSize::gib(64);
    needs_memory(ByteSize::gib(1))?;
    let folder = Folder::new()?;
    let store = folder.path("store");
    fs::create_dir(&store)?;
    let disk = DiskDir::open(&store, &tree())?.create(geometry(len)?, None)?;
    let raw = File::create(folder.path("in.raw"))?;
    raw.set_len(len.get())?;
    let (mut random, mut spot) = (Random::new(78), vec![0; 64 << 10]);
    for _ in 0..SPOTS {
        spot.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
        let at = random.next() % (len.get() / spot.len() as u64) * spot.len() as u64;
        disk.write(ByteOffset::new(at), &spot)?;
        raw.write_all_at(&spot, at)?;
    }
    let (sealed, _) = disk.cut()?.commit();
    let (out, raw) = (folder.path("out"), folder.path("in.raw"));
    // Skips here where it is missing.
    qemu_img(&["-f", "raw", "-O", "raw"], &raw, &out)?;
    for (format, name) in [(ExportFormat::default(), "qcow2"), (ExportFormat::Raw, "raw")] {
        let mut round = Round::new(effort);
        round.probe(|| timed(|| export(&sealed, &out, &format, &mut keep_going).expect("room for a copy")).0);
        round.probe(|| timed(|| qemu_img(&["-f", "raw", "-O", name], &raw, &out).expect("qemu-img is there")).0);
        let [ours, others] = round.run();
        report.row(&Row {
            case: format!("a durable disk of 64 GiB to {name}, 1,000 spots of 64 KiB in it"),
            unit: Unit::Milliseconds,
            stats: ours,
            baseline: Some(Baseline::new("qemu-img convert of a sparse file", others)),
            goal: Goal::None,
        });
    }
    // Reading it all, as a copy that knows nothing would: from a part of it.
    let part = ByteSize::gib(effort.pick(1, 4));
    let mut buf = vec![0; 2 << 20];
    let mut round = Round::new(effort);
    round.probe(|| {
        let read = |at: u64| sealed.read(ByteOffset::new(at), &mut buf).expect("inside");
        let (time, ()) = timed(|| (0..part.get()).step_by(2 << 20).for_each(read));
        time * (len.get() / part.get()) as f64
    });
    let [all] = round.run();
    report.row(&Row {
        case: "the same disk, only read, holes too".into(),
        unit: Unit::Milliseconds,
        stats: all,
        baseline: None,
        goal: Goal::None,
    });
    Ok(())
}
