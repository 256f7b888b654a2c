//! Durable disks out to other tools: whole, and as deltas over several layers, from live clones and from a store that was opened again; and
//! what a copy of a nearly empty disk reads.

#![cfg(unix)]

#[path = "formats/workbench.rs"]
mod workbench;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use offshoot::backing::{Backing, Cut, Heap, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::formats::{
    BackingName, ClusterSize, Delta, DiskSource, ExportFormat, Format, ImportPolicy, ImportedImage, export,
    export_delta, keep_going,
};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, Lba, PageIndex, PageRange, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::store::{DiskDir, Durable};
use offshoot::testing::{Dice, ScriptedGuest};
use offshoot::{DiskName, ForkPoint, SpaceError, Tree, Vm, VmName};
use workbench::{Content, Scratch, image_bytes, qemu_img, tools};

const SECTORS: u64 = 16 << 11;

/// Writes, zeroes and discards all over the disk.
fn change(disk: &Disk, dice: &mut Dice, content: &mut Content) {
    for _ in 0..12 {
        let lba = dice.below(SECTORS - 600);
        let count = 1 + dice.below(500);
        match dice.below(4) {
            0 => disk.discard(Lba::new(lba), SectorCount::new(count)),
            1 => disk.write_zeroes(Lba::new(lba), SectorCount::new(count)),
            _ => disk.write(Lba::new(lba), &content.sparse(count * 512)),
        }
        .expect("room");
    }
}

fn fork(vm: &Vm<Heap>) -> ForkPoint<Heap> {
    vm.fork(&mut ScriptedGuest::running(1)).expect("a fork")
}

#[test]
fn a_durable_disk_of_many_layers_is_exported_whole_and_as_deltas() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("durable");
    let dir = scratch.path("store");
    std::fs::create_dir(&dir).expect("room");
    let tree = Tree::default();
    let store = DiskDir::open(&dir, &tree).expect("a folder");
    let geometry = Geometry::new(ByteSize::new(SECTORS * 512), PageSize::KIB_4).expect("a size");
    let durable = store.create(geometry, None).expect("room");
    let id = durable.id();
    let disk = Disk::over(durable, SectorCount::new(SECTORS), Access::ReadWrite).expect("a disk");
    let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).expect("a layout");
    let disks = vec![(DiskName::new("d"), disk)];
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent").expect("a name"), layout, disks).expect("a VM");
    vm.start().expect("it is off");

    let (mut dice, mut content) = (workbench::dice(), Content::new());
    let mut points = Vec::new();
    for _ in 0..5 {
        change(vm.disk("d").expect("there"), &mut dice, &mut content);
        points.push(fork(&vm));
    }
    let disks: Vec<_> = points.iter().map(|point| point.disk("d").expect("there")).collect();
    let wants: Vec<_> = disks.iter().map(|disk| image_bytes(&DiskSource::new(disk))).collect();
    for (i, want) in wants.iter().enumerate() {
        std::fs::write(scratch.path(&format!("want{i}.raw")), want).expect("room");
    }
    let compare = |file: &str, format: &str, want: usize| {
        let want = format!("want{want}.raw");
        qemu_img(&scratch, &["compare", "-f", format, "-F", "raw", file, &want]);
        qemu_img(&scratch, &["compare", "-f", "raw", "-F", format, &want, file]);
        if format != "raw" {
            qemu_img(&scratch, &["check", "-q", "-f", format, file]);
        }
    };
    // Whole, in each format.
    for (format, name) in [(ExportFormat::Raw, "raw"), (ExportFormat::default(), "qcow2"), (ExportFormat::Vmdk, "vmdk")]
    {
        export(&DiskSource::new(disks[4]), &scratch.path("whole"), &format, &mut keep_going).expect("room");
        compare("whole", name, 4);
    }
    // One delta over all the layers between, and a chain of one for each, in clusters of three sizes.
    export(&DiskSource::new(disks[0]), &scratch.path("d0"), &ExportFormat::default(), &mut keep_going).expect("room");
    let delta = |to: usize, from: usize, file: &str, under: &str, cluster: u64| {
        let delta = Delta::of_disks(disks[to], disks[from]).expect("relatives");
        let backing = BackingName { name: under.into(), format: Format::Qcow2 };
        let cluster = ClusterSize::new(ByteSize::kib(cluster)).expect("a size");
        export_delta(&delta, &backing, &scratch.path(file), cluster, &mut keep_going).expect("room");
    };
    for cluster in [4, 64, 2048] {
        delta(4, 0, "far", "d0", cluster);
        compare("far", "qcow2", 4);
    }
    for (i, cluster) in (1..5).zip([4, 64, 2048, 8]) {
        delta(i, i - 1, &format!("d{i}"), &format!("d{}", i - 1), cluster);
        compare(&format!("d{i}"), "qcow2", i);
    }
    let chain = ImportedImage::open(scratch.path("d4"), Format::Qcow2, &ImportPolicy::under(scratch.dir()));
    let chain = chain.expect("a chain of ours");
    assert!(chain.files().len() == 5 && image_bytes(&chain) == wants[4]);

    // A store that is opened again, after the disk went on.
    change(vm.disk("d").expect("there"), &mut dice, &mut content);
    vm.disk("d").expect("there").flush().expect("a medium");
    let mut last = vec![0; wants[0].len()];
    vm.disk("d").expect("there").read(Lba::ZERO, &mut last).expect("all of it");
    std::fs::write(scratch.path("want5.raw"), &last).expect("room");
    drop((points, vm, store));
    let store = DiskDir::open(&dir, &Tree::default()).expect("it is there");
    let again: Durable = store.open_disk(id, None).expect("it was flushed");
    let before = again.origin();
    let (image, _) = again.cut().expect("nobody has it").commit();
    export(&image, &scratch.path("again"), &ExportFormat::default(), &mut keep_going).expect("room");
    compare("again", "qcow2", 5);
    assert_eq!(image_bytes(&before), wants[4], "its origin is the last fork point");
    let delta = Delta::of_images(&image, &before).expect("relatives");
    let backing = BackingName { name: "d4".into(), format: Format::Qcow2 };
    let cluster = ClusterSize::default();
    export_delta(&delta, &backing, &scratch.path("d5"), cluster, &mut keep_going).expect("room");
    compare("d5", "qcow2", 5);
}

/// Counts what is read of an image.
struct Counted<S>(S, AtomicU64);

impl<S: Source> Source for Counted<S> {
    fn len(&self) -> ByteSize {
        self.0.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        // Relaxed: one thread copies.
        self.1.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.0.read(at, buf)
    }

    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        self.0.next_data(at)
    }
}

/// A disk of `len` with three spots of data, a zeroed part over one of them, and a base of which a part is covered.
fn nearly_empty<B: Backing>(len: ByteSize, base: Option<std::sync::Arc<dyn Source>>) -> B::Sealed {
    let geometry = Geometry::new(len, PageSize::KIB_4).expect("a size");
    let space = B::create(&Tree::default(), geometry, base).expect("room");
    space.write(ByteOffset::new(0), &[1; 100]).expect("room");
    space.write(ByteOffset::new(len.get() / 2 + 12345), &vec![2; 1 << 20]).expect("room");
    // Kept apart from the fork point's image: a second layer.
    let _first = space.cut().expect("nobody has it").commit();
    let middle = PageIndex::new(len.get() / 2 / 4096 + 100);
    space.zero(PageRange::from_bounds(middle, PageIndex::new(middle.get() + 50))).expect("room");
    space.write(ByteOffset::new(len.get() - 4096), &[3; 4096]).expect("room");
    space.cut().expect("nobody has it").commit().0
}

fn costs_by_its_data<S: Sealed>(name: &str, image: S, data: u64) {
    let scratch = Scratch::new(name);
    let copy = |format: ExportFormat, granule: u64| {
        let counted = Counted(image.clone(), AtomicU64::new(0));
        let mut calls = 0;
        let mut watch = |_| {
            calls += 1;
            std::ops::ControlFlow::Continue(())
        };
        export(&counted, &scratch.path("out"), &format, &mut watch).expect("room");
        let read = counted.1.into_inner();
        // Four runs, each rounded to granules at both ends.
        assert!(read >= data && read <= data + 8 * granule, "{name}: {read} bytes read for {data}");
        assert!(calls < 40, "{name}: {calls} pieces");
    };
    copy(ExportFormat::Raw, 4096);
    let mut spot = vec![0; 4096];
    use std::os::unix::fs::FileExt;
    let out = std::fs::File::open(scratch.path("out")).expect("written");
    for at in [0, image.len().get() / 2 + 4096, image.len().get() / 2 + 150 * 4096, image.len().get() - 4096] {
        let mut want = vec![0; 4096];
        image.read(ByteOffset::new(at), &mut want).expect("inside");
        out.read_exact_at(&mut spot, at).expect("inside");
        assert!(spot == want, "{name}: at {at:#x}");
    }
    copy(ExportFormat::default(), 64 << 10);
    if tools() {
        std::fs::rename(scratch.path("out"), scratch.path("out.qcow2")).expect("the same folder");
        copy(ExportFormat::Raw, 4096);
        qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "out.qcow2"]);
        qemu_img(&scratch, &["compare", "-f", "qcow2", "-F", "raw", "out.qcow2", "out"]);
    }
}

#[test]
fn a_nearly_empty_terabyte_costs_by_its_data() {
    let (tib, data) = (ByteSize::gib(1 << 10), 4096 + (1 << 20) + 4096 - 50 * 4096 + 4096);
    costs_by_its_data("sparse-heap", nearly_empty::<Heap>(tib, None), data);
    costs_by_its_data("sparse-durable", nearly_empty::<Durable>(tib, None), data);
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    costs_by_its_data("sparse-mapped", nearly_empty::<offshoot::backing::Mapped>(ByteSize::gib(8), None), data);
}

/// What the base is known not to hold is not read through the overlay either.
#[test]
fn a_disk_over_a_sparse_image_costs_by_both() {
    let scratch = Scratch::new("sparse-base");
    let base = nearly_empty::<Heap>(ByteSize::gib(16), None);
    export(&base, &scratch.path("base.qcow2"), &ExportFormat::default(), &mut keep_going).expect("room");
    let opened = ImportedImage::open(scratch.path("base.qcow2"), Format::Qcow2, &ImportPolicy::default());
    let base = std::sync::Arc::new(opened.expect("ours"));
    // Of the base there are 1 MiB and two clusters; over it lie as much, elsewhere, and two pages that it has too.
    let image = nearly_empty::<Heap>(ByteSize::gib(64), Some(base.clone()));
    let counted = Counted(image.clone(), AtomicU64::new(0));
    export(&counted, &scratch.path("out"), &ExportFormat::default(), &mut keep_going).expect("room");
    let read = counted.1.into_inner();
    assert!((2 << 20..4 << 20).contains(&read), "{read} bytes read");
    let out = ImportedImage::open(scratch.path("out"), Format::Qcow2, &ImportPolicy::default()).expect("ours");
    let gib = 1 << 30;
    for at in [0, 8 * gib, 16 * gib - (1 << 20), 32 * gib, 64 * gib - (2 << 20)] {
        let (mut found, mut want) = (vec![9; 2 << 20], vec![8; 2 << 20]);
        out.read(ByteOffset::new(at), &mut found).expect("inside");
        image.read(ByteOffset::new(at), &mut want).expect("inside");
        assert!(found == want, "at {at:#x}");
    }
}
