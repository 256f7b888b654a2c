//! Images that other tools wrote, read back; images that we write, held against `qemu-img` and `qemu-io`.
//!
//! Where these are missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail. Content is random and sparse;
//! OFFSHOOT_SEED repeats a run.

#![cfg(unix)]

#[path = "formats/workbench.rs"]
mod workbench;

use std::sync::Arc;

use offshoot::backing::{Backing, Heap, Page4K, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::formats::{
    BackingName, ClusterSize, Delta, DiskSource, ExportFormat, Format, ImportPolicy, ImportedImage, export,
    export_delta, keep_going,
};
use offshoot::image::Source;
use offshoot::page::{ByteSize, Lba, PageSize, SectorCount};
use offshoot::testing::ScriptedGuest;
use offshoot::{DiskName, Limits, Tree, Vm, VmName};
use workbench::{Content, Scratch, image_bytes, qemu_img, qemu_io, tools};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn clusters(size: u64) -> ExportFormat {
    ExportFormat::Qcow2(ClusterSize::new(ByteSize::new(size)).expect("a cluster size"))
}

/// Opens, compares every byte, and copies it in all the ways there are.
fn check_import(scratch: &Scratch, name: &str, format: Format, policy: &ImportPolicy, want: &[u8]) {
    let image =
        ImportedImage::open(scratch.path(name), format, policy).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(image.len().get(), want.len() as u64, "{name}");
    assert!(image_bytes(&image) == want, "{name}: read in place");
    // Reads that keep to no boundary.
    let mut dice = workbench::dice();
    for _ in 0..50 {
        let at = dice.below(want.len() as u64) as usize;
        let len = dice.below((want.len() - at).min(300_000) as u64) as usize;
        let mut bytes = vec![1; len];
        image.read(offshoot::page::ByteOffset::new(at as u64), &mut bytes).expect("inside");
        assert!(bytes == want[at..at + len], "{name}: {len} at {at}");
    }
    let space: Heap<Page4K> = image.into_space(&Tree::default(), PageSize::KIB_4, &mut keep_going).expect("room");
    let pages = want.chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64;
    assert_eq!(space.usage().expect("the heap tells").private.get(), pages, "{name}: only data takes memory");
    let mut bytes = vec![0; want.len()];
    space.read(offshoot::page::ByteOffset::ZERO, &mut bytes).expect("all of it");
    assert!(bytes == want, "{name}: in a space");

    let mut last = 0;
    let out = scratch.path("copy.raw");
    let mut watch = |progress: offshoot::frontend::formats::Progress| {
        assert!(progress.done.get() > last && progress.total.get() == want.len() as u64);
        last = progress.done.get();
        std::ops::ControlFlow::Continue(())
    };
    image.convert(&out, &ExportFormat::Raw, &mut watch).expect("room");
    assert_eq!(last, want.len() as u64, "progress ends at the end");
    assert!(std::fs::read(&out).expect("written") == want, "{name}: as raw");
}

#[test]
fn qcow2_of_every_shape_is_read_as_it_was_written() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("qcow2-in");
    let mut content = Content::new();
    let shapes: &[(&str, &[&str])] = &[
        ("cluster_size=512", &[]),
        ("cluster_size=512", &["-c"]),
        ("cluster_size=4k", &["-c"]),
        ("cluster_size=64k", &[]),
        ("cluster_size=64k", &["-c"]),
        ("cluster_size=2M", &[]),
        ("cluster_size=2M", &["-c"]),
        ("compat=0.10", &[]),
        ("compat=0.10,cluster_size=1k", &["-c"]),
        ("refcount_bits=1", &[]),
        ("refcount_bits=64,cluster_size=8k", &[]),
        ("preallocation=metadata", &[]),
        ("preallocation=falloc,cluster_size=16k", &[]),
        ("preallocation=full", &["-S", "0"]),
        ("lazy_refcounts=on", &[]),
    ];
    for (i, (options, flags)) in shapes.iter().enumerate() {
        let size = [3 * MIB + 512, 5 * MIB + 17 * 512, 64 * KIB, 4 * MIB][i % 4];
        let want = content.sparse(size);
        std::fs::write(scratch.path("model.raw"), &want).expect("room");
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        args.extend_from_slice(flags);
        args.extend_from_slice(&["model.raw", "in.qcow2"]);
        qemu_img(&scratch, &args);
        println!("{options} {flags:?} {size}");
        check_import(&scratch, "in.qcow2", Format::Qcow2, &ImportPolicy::default(), &want);
    }
}

#[test]
fn an_external_data_file_is_read_where_the_policy_allows_it() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("data-file");
    let want = Content::new().sparse(3 * MIB + 512);
    std::fs::write(scratch.path("model.raw"), &want).expect("room");
    let options = "data_file=data.bin";
    qemu_img(&scratch, &["convert", "-f", "raw", "-O", "qcow2", "-o", options, "model.raw", "in.qcow2"]);
    check_import(&scratch, "in.qcow2", Format::Qcow2, &ImportPolicy::under(scratch.dir()), &want);
    let refused = ImportedImage::open(scratch.path("in.qcow2"), Format::Qcow2, &ImportPolicy::default());
    let rule = offshoot::frontend::formats::Rule::Reference("data.bin".into());
    assert_eq!(refused.expect_err("no file is allowed").rule(), Some(&rule));
}

#[test]
fn a_chain_reads_as_qemu_flattens_it() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("chain");
    let mut content = Content::new();
    std::fs::write(scratch.path("base.raw"), content.sparse(MIB + 512)).expect("room");
    qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a.qcow2", "3M"]);
    // Zero clusters, discarded ones, and data, on clusters that differ in size from layer to layer.
    qemu_io(&scratch, "a.qcow2", &["write -P 0x11 64k 100k", "write -z 256k 128k", "write -P 0x12 2900k 64k"]);
    let options = "cluster_size=4k";
    qemu_img(
        &scratch,
        &["create", "-q", "-f", "qcow2", "-o", options, "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "2M"],
    );
    qemu_io(&scratch, "b.qcow2", &["write -P 0x21 100k 9k", "discard 300k 64k", "write -z 64k 8k"]);
    // Longer again: what a.qcow2 has beyond b.qcow2's end must not come back.
    qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "c.qcow2", "4M"]);
    qemu_io(&scratch, "c.qcow2", &["write -P 0x31 1M 1k"]);
    qemu_img(&scratch, &["convert", "-f", "qcow2", "-O", "raw", "c.qcow2", "flat.raw"]);
    let want = std::fs::read(scratch.path("flat.raw")).expect("written");
    let policy = ImportPolicy::under(scratch.dir());
    check_import(&scratch, "c.qcow2", Format::Qcow2, &policy, &want);
    let image = ImportedImage::open(scratch.path("c.qcow2"), Format::Qcow2, &policy).expect("as above");
    let names: Vec<_> = image.files().map(|path| path.file_name().expect("a name").to_owned()).collect();
    assert_eq!(names, ["c.qcow2", "b.qcow2", "a.qcow2", "base.raw"]);
}

#[test]
fn flat_vmdk_is_read_as_it_was_written() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("vmdk-in");
    let mut content = Content::new();
    for kind in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        let want = content.sparse(3 * MIB + 512);
        std::fs::write(scratch.path("model.raw"), &want).expect("room");
        let options = format!("subformat={kind}");
        qemu_img(&scratch, &["convert", "-f", "raw", "-O", "vmdk", "-o", &options, "model.raw", "in.vmdk"]);
        check_import(&scratch, "in.vmdk", Format::Vmdk, &ImportPolicy::under(scratch.dir()), &want);
        let error = ImportedImage::open(scratch.path("in.vmdk"), Format::Vmdk, &ImportPolicy::default());
        let rule = error.expect_err("an extent is a file that the policy does not allow");
        assert!(matches!(rule.rule(), Some(offshoot::frontend::formats::Rule::Reference(_))), "{rule}");
    }
}

#[test]
fn sparse_vmdk_is_read_as_it_was_written() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("vmdk-sparse");
    let mut content = Content::new();
    for (size, options) in [
        (3 * MIB + 512, "subformat=monolithicSparse"),
        (40 * MIB + 7 * 512, "subformat=monolithicSparse,zeroed_grain=on"),
        (64 * KIB, "subformat=monolithicSparse,compat6=on"),
    ] {
        let mut want = content.sparse(size);
        std::fs::write(scratch.path("model.raw"), &want).expect("room");
        qemu_img(&scratch, &["convert", "-f", "raw", "-O", "vmdk", "-o", options, "model.raw", "in.vmdk"]);
        check_import(&scratch, "in.vmdk", Format::Vmdk, &ImportPolicy::default(), &want);
        if options.contains("zeroed_grain") {
            // Grains of zeroes where there was data: an entry of their own.
            workbench::qemu_io_on(&scratch, "vmdk", "in.vmdk", &["write -z 1M 2M", "write -P 0x17 20M 100k"]);
            want[MIB as usize..3 * MIB as usize].fill(0);
            want[20 * MIB as usize..][..100 * KIB as usize].fill(0x17);
            check_import(&scratch, "in.vmdk", Format::Vmdk, &ImportPolicy::default(), &want);
        }
    }
}

#[test]
fn what_we_write_is_what_qemu_reads() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("out");
    let mut content = Content::new();
    let formats = [
        (ExportFormat::Raw, "raw"),
        (clusters(4 * KIB), "qcow2"),
        (clusters(64 * KIB), "qcow2"),
        (clusters(2 * MIB), "qcow2"),
        (ExportFormat::Vmdk, "vmdk"),
    ];
    for size in [512, 64 * KIB, 5 * MIB + 512, 40 * MIB + 7 * 512] {
        let want = content.sparse(size);
        std::fs::write(scratch.path("model.raw"), &want).expect("room");
        let source = ImportedImage::open(scratch.path("model.raw"), Format::Raw, &ImportPolicy::default());
        let source = source.expect("a raw image");
        for (format, name) in &formats {
            println!("{size} as {format:?}");
            export(&source, &scratch.path("out"), format, &mut keep_going).expect("room");
            if *name != "raw" {
                qemu_img(&scratch, &["check", "-q", "-f", name, "out"]);
            }
            qemu_img(&scratch, &["compare", "-f", "raw", "-F", name, "model.raw", "out"]);
            qemu_img(&scratch, &["compare", "-f", name, "-F", "raw", "out", "model.raw"]);
            assert_eq!(scratch.parts(), 0, "nothing but the target is left");
            let written = [Format::Raw, Format::Qcow2, Format::Vmdk].into_iter().find(|format| format.name() == *name);
            // A VMDK counts in sectors, and so does every size here.
            check_import(&scratch, "out", written.expect("known"), &ImportPolicy::default(), &want);
        }
    }
}

/// Many refcount blocks, and a table of more than one cluster of them, at the smallest clusters that are written.
#[test]
fn refcounts_of_a_long_file_add_up() {
    if !tools() {
        return;
    }
    struct Stripes;
    impl Source for Stripes {
        fn len(&self) -> ByteSize {
            ByteSize::mib(96)
        }
        fn read(&self, at: offshoot::page::ByteOffset, buf: &mut [u8]) -> Result<(), offshoot::SpaceError> {
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = ((at.get() + i as u64) >> 12) as u8 | 1;
            }
            Ok(())
        }
    }
    let scratch = Scratch::new("refcounts");
    export(&Stripes, &scratch.path("out"), &clusters(4 * KIB), &mut keep_going).expect("room");
    qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "out"]);
    qemu_io(&scratch, "out", &["read -P 0x01 0 4k", "read -P 0x05 16k 4k", "write -P 7 1M 64k", "read -P 7 1M 64k"]);
    qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "out"]);
}

#[test]
fn a_clones_delta_reads_over_its_backing_file() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("delta");
    let mut content = Content::new();
    let base = content.sparse(8 * MIB + 512);
    std::fs::write(scratch.path("base.raw"), &base).expect("room");
    let image = ImportedImage::open(scratch.path("base.raw"), Format::Raw, &ImportPolicy::default()).expect("raw");
    let tree = Tree::new(Limits::default());
    let disk = Disk::over_image(&tree, Arc::new(image), Access::ReadWrite).expect("a disk");
    let layout = offshoot::ram::RamLayout::flat(ByteSize::kib(64), PageSize::KIB_4).expect("a layout");
    let vm: Vm<Heap> =
        Vm::new(&tree, VmName::new("parent").expect("a name"), layout, vec![(DiskName::new("d"), disk)]).expect("a VM");
    vm.start().expect("it is off");
    let mut guest = ScriptedGuest::running(1);
    let before = vm.fork(&mut guest).expect("a fork");
    let disk = vm.disk("d").expect("there");
    disk.write(Lba::new(3), &[0x5a; 512]).expect("room");
    disk.write(Lba::new(4000), &vec![0x6b; 200 * 512]).expect("room");
    // 128 KiB that had data: whole clusters that must hide it.
    disk.discard(Lba::new(1024), SectorCount::new(512)).expect("room");
    disk.write(Lba::new(16384), &[0x7c; 512]).expect("the last sector, in a page of its own");
    let after = vm.fork(&mut guest).expect("a fork");

    let delta = Delta::of_disks(after.disk("d").expect("there"), before.disk("d").expect("there")).expect("relatives");
    let whole = DiskSource::new(after.disk("d").expect("there"));
    let want = image_bytes(&whole);
    std::fs::write(scratch.path("want.raw"), &want).expect("room");
    let backing = BackingName { name: "base.raw".into(), format: Format::Raw };
    for cluster in [4 * KIB, 64 * KIB, 2 * MIB] {
        let size = ClusterSize::new(ByteSize::new(cluster)).expect("a size");
        export_delta(&delta, &backing, &scratch.path("delta.qcow2"), size, &mut keep_going).expect("room");
        qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "delta.qcow2"]);
        qemu_img(&scratch, &["compare", "-f", "qcow2", "-F", "raw", "delta.qcow2", "want.raw"]);
        qemu_img(&scratch, &["compare", "-f", "raw", "-F", "qcow2", "want.raw", "delta.qcow2"]);
        let reads = ["read -P 0x5a 1536 512", "read -P 0x6b 2000k 100k", "read -P 0 512k 256k", "read -P 0x7c 8M 512"];
        qemu_io(&scratch, "delta.qcow2", &reads);
        let policy = ImportPolicy::under(scratch.dir());
        check_import(&scratch, "delta.qcow2", Format::Qcow2, &policy, &want);
    }
    let info = qemu_img(&scratch, &["info", "--output=json", "-f", "qcow2", "delta.qcow2"]);
    assert!(
        info.contains("\"backing-filename-format\": \"raw\"") && info.contains("\"backing-filename\": \"base.raw\"")
    );
    export_delta(&delta, &backing, &scratch.path("delta.qcow2"), ClusterSize::default(), &mut keep_going)
        .expect("room");
    let len = std::fs::metadata(scratch.path("delta.qcow2")).expect("there").len();
    assert!(len <= 16 * 64 * KIB, "{len} bytes for four changes");
    // QEMU may go on writing to it.
    qemu_io(&scratch, "delta.qcow2", &["write -P 0x99 3M 100k", "read -P 0x99 3M 100k", "read -P 0x5a 1536 512"]);
    qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "delta.qcow2"]);
}

#[test]
fn an_image_of_a_backing_is_exported_as_any_source() {
    let scratch = Scratch::new("sealed");
    let want = Content::new().sparse(MIB);
    let tree = Tree::default();
    let geometry = offshoot::page::Geometry::new(ByteSize::mib(1), PageSize::KIB_4).expect("a size");
    let space = Heap::<Page4K>::create(&tree, geometry, None).expect("room");
    let first = space.origin();
    space.write(offshoot::page::ByteOffset::ZERO, &want).expect("room");
    let (image, _) = offshoot::backing::Cut::commit(space.cut().expect("a cut"));
    export(&image, &scratch.path("whole.qcow2"), &ExportFormat::default(), &mut keep_going).expect("room");
    check_import(&scratch, "whole.qcow2", Format::Qcow2, &ImportPolicy::default(), &want);
    let delta = Delta::of_images(&image, &first).expect("relatives");
    assert_eq!(delta.changed().count(), image.diff(&first).expect("relatives").count());
    // The backing file is named, not opened.
    let backing = BackingName { name: "zero.raw".into(), format: Format::Raw };
    std::fs::write(scratch.path("zero.raw"), vec![0; MIB as usize]).expect("room");
    export_delta(&delta, &backing, &scratch.path("d.qcow2"), ClusterSize::default(), &mut keep_going).expect("room");
    check_import(&scratch, "d.qcow2", Format::Qcow2, &ImportPolicy::under(scratch.dir()), &want);
}

#[test]
fn a_disk_is_filled_from_an_image() {
    let scratch = Scratch::new("fill");
    let want = Content::new().sparse(MIB + 512);
    std::fs::write(scratch.path("in.raw"), &want).expect("room");
    let image = ImportedImage::open(scratch.path("in.raw"), Format::Raw, &ImportPolicy::default()).expect("raw");
    let disk = Disk::blank(&Tree::default(), SectorCount::new(2049), Access::ReadWrite).expect("a disk");
    image.fill(&disk, &mut keep_going).expect("room");
    let mut bytes = vec![0; want.len()];
    disk.read(Lba::ZERO, &mut bytes).expect("inside");
    assert!(bytes == want);
    let short = Disk::blank(&Tree::default(), SectorCount::new(2048), Access::ReadWrite).expect("a disk");
    image.fill(&short, &mut keep_going).expect_err("one sector too few");
    assert!(short.dirty().expect("the heap tells").is_empty(), "and nothing was written");
}
