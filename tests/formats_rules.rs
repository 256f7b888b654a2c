//! What an import refuses, each with the rule that it names; and exports that fail, which leave nothing.
//!
//! Hostile images are made of a good one by changing bytes, with the field's offset from QEMU's description of the format.

#![cfg(unix)]

#[path = "formats/workbench.rs"]
mod workbench;

use std::ops::ControlFlow;
use std::os::unix::fs::symlink;

use offshoot::SpaceError;
use offshoot::frontend::formats::{
    BackingName, ClusterSize, Delta, ExportFormat, Format, FormatError, ImportPolicy, ImportedImage, References, Rule,
    export, export_delta, keep_going,
};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize};
use workbench::{Content, Scratch, qemu_img, tools};

const MIB: u64 = 1 << 20;

fn qcow2(scratch: &Scratch) -> Vec<u8> {
    std::fs::write(scratch.path("good.raw"), Content::new().sparse(MIB)).expect("room");
    let source = ImportedImage::open(scratch.path("good.raw"), Format::Raw, &ImportPolicy::default()).expect("raw");
    export(&source, &scratch.path("good.qcow2"), &ExportFormat::default(), &mut keep_going).expect("room");
    std::fs::read(scratch.path("good.qcow2")).expect("written")
}

/// The rule by which this file is refused.
fn refused(scratch: &Scratch, bytes: &[u8], format: Format, policy: &ImportPolicy) -> Rule {
    std::fs::write(scratch.path("bad"), bytes).expect("room");
    let error = ImportedImage::open(scratch.path("bad"), format, policy).expect_err("it is to be refused");
    error.rule().unwrap_or_else(|| panic!("not by a rule: {error}")).clone()
}

#[test]
fn headers_that_cannot_be_are_refused_by_their_rule() {
    let scratch = Scratch::new("headers");
    let good = qcow2(&scratch);
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        refused(&scratch, &bad, Format::Qcow2, &ImportPolicy::default())
    };
    let malformed = |rule: &Rule| matches!(rule, Rule::Malformed(_));
    let table = |rule: &Rule, name: &str| matches!(rule, Rule::Table { table, .. } if *table == name);
    assert_eq!(with(0, b"QFI\0"), Rule::NotThisFormat(Format::Qcow2));
    assert_eq!(with(4, &4u32.to_be_bytes()), Rule::Version(4));
    assert!(malformed(&with(20, &8u32.to_be_bytes())) && malformed(&with(20, &63u32.to_be_bytes())), "cluster size");
    assert_eq!(with(24, &0u64.to_be_bytes()), Rule::Empty);
    assert!(malformed(&with(24, &(1u64 << 40).to_be_bytes())), "more than its L1 table covers");
    assert_eq!(with(32, &1u32.to_be_bytes()), Rule::Encrypted);
    assert_eq!(with(32, &2u32.to_be_bytes()), Rule::Encrypted);
    assert!(table(&with(36, &u32::MAX.to_be_bytes()), "L1 table"), "longer than any may be");
    assert!(table(&with(36, &100_000u32.to_be_bytes()), "L1 table"), "longer than the file");
    assert!(table(&with(40, &(1u64 << 62).to_be_bytes()), "L1 table"), "outside the file");
    assert!(table(&with(40, &513u64.to_be_bytes()), "L1 table"), "unaligned");
    assert!(table(&with(48, &(1u64 << 50).to_be_bytes()), "refcount table"));
    assert!(malformed(&with(60, &u32::MAX.to_be_bytes())), "snapshots");
    assert_eq!(with(72, &1u64.to_be_bytes()), Rule::Dirty);
    assert_eq!(with(72, &2u64.to_be_bytes()), Rule::Corrupt);
    assert_eq!(with(72, &8u64.to_be_bytes()), Rule::Features(8));
    assert_eq!(with(72, &16u64.to_be_bytes()), Rule::Features(16));
    assert_eq!(with(72, &(1u64 << 63).to_be_bytes()), Rule::Features(1 << 63));
    assert!(malformed(&with(72, &4u64.to_be_bytes())), "external data without a name");
    assert!(malformed(&with(96, &7u32.to_be_bytes())), "refcount order");
    assert!(malformed(&with(100, &u32::MAX.to_be_bytes())), "header length");
    assert!(malformed(&with(104, &[0, 0, 0, 7, 255, 255, 255, 255])), "extension length");
    // A backing name behind the first cluster, where a guest could have written it.
    assert!(malformed(&with(8, &[0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 9])), "name outside the first cluster");
    let limit = ImportPolicy { virtual_size: ByteSize::kib(512), ..ImportPolicy::default() };
    let rule = refused(&scratch, &good, Format::Qcow2, &limit);
    assert_eq!(rule, Rule::VirtualSize { size: ByteSize::mib(1), limit: ByteSize::kib(512) });
    for len in [0, 3, 71] {
        let rule = refused(&scratch, &good[..len], Format::Qcow2, &ImportPolicy::default());
        assert_eq!(rule, Rule::NotThisFormat(Format::Qcow2));
    }
}

#[test]
fn tables_that_lead_astray_are_refused() {
    let scratch = Scratch::new("tables");
    let good = qcow2(&scratch);
    let l1 = u64::from_be_bytes(good[40..48].try_into().expect("8 bytes")) as usize;
    let l2 = (u64::from_be_bytes(good[l1..l1 + 8].try_into().expect("8 bytes")) & 0xff_ffff_ffff_fe00) as usize;
    // An L2 table that stands twice in the L1 table would multiply its data.
    let mut bad = good.clone();
    bad[36..40].copy_from_slice(&2u32.to_be_bytes());
    bad.copy_within(l1..l1 + 8, l1 + 8);
    assert!(matches!(refused(&scratch, &bad, Format::Qcow2, &ImportPolicy::default()), Rule::Malformed(_)));
    let mut bad = good.clone();
    bad[l1..l1 + 8].copy_from_slice(&(1u64 << 40).to_be_bytes());
    let rule = refused(&scratch, &bad, Format::Qcow2, &ImportPolicy::default());
    assert!(matches!(rule, Rule::Table { table: "L2 table", .. }));
    // A cluster past the end is found when it is read, and is no zeroes.
    let mut bad = good.clone();
    bad[l2..l2 + 8].copy_from_slice(&((1u64 << 40) | (1 << 63)).to_be_bytes());
    std::fs::write(scratch.path("bad"), &bad).expect("room");
    let image = ImportedImage::open(scratch.path("bad"), Format::Qcow2, &ImportPolicy::default()).expect("until read");
    let error = image.read(ByteOffset::ZERO, &mut [0; 512]).expect_err("the data is not there");
    assert!(error.to_string().contains("past the end of a file"), "{error}");
    let copied = image.convert(&scratch.path("out.raw"), &ExportFormat::Raw, &mut keep_going);
    copied.expect_err("nor can it be copied");
    assert!(!scratch.path("out.raw").exists() && scratch.parts() == 0, "a failed copy leaves nothing");
    // Outside: an error, and not a panic.
    assert!(matches!(image.read(ByteOffset::new(MIB), &mut [0; 1]), Err(SpaceError::Geometry(_))));
    // A table that is cut off: its clusters would read as never written.
    let mut bad = good.clone();
    let cluster = bad.len().next_multiple_of(1 << 16);
    bad.resize(cluster, 0);
    bad[l1..l1 + 8].copy_from_slice(&(cluster as u64 | (1 << 63)).to_be_bytes());
    bad.extend_from_within(l2..l2 + 4);
    let rule = refused(&scratch, &bad, Format::Qcow2, &ImportPolicy::default());
    assert!(matches!(rule, Rule::Table { table: "L2 table", .. }), "{rule:?}");
}

/// The classic attack: a guest that has a raw disk writes a qcow2 header to its front, which names a file of the host.
#[test]
fn a_raw_disk_that_looks_like_qcow2_stays_raw() {
    let scratch = Scratch::new("raw");
    let looks = qcow2(&scratch);
    let image = ImportedImage::open(scratch.path("good.qcow2"), Format::Raw, &ImportPolicy::default()).expect("raw");
    assert!(workbench::image_bytes(&image) == looks, "the bytes, and nothing that they say");
    export(&image, &scratch.path("out.qcow2"), &ExportFormat::default(), &mut keep_going).expect("room");
    // And as a backing file whose format is not named, where other tools would guess.
    let mut bare = looks.clone();
    let name = b"good.qcow2";
    bare[8..16].copy_from_slice(&512u64.to_be_bytes());
    bare[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    bare[512..512 + name.len()].copy_from_slice(name);
    let rule = refused(&scratch, &bare, Format::Qcow2, &ImportPolicy::under(scratch.dir()));
    assert_eq!(rule, Rule::BackingFormat { name: "good.qcow2".into(), format: String::new() });
}

/// A qcow2 of ours over `name`.
fn over(scratch: &Scratch, file: &str, name: &str, format: Format) {
    let tree = offshoot::Tree::default();
    let geometry = offshoot::page::Geometry::new(ByteSize::mib(1), offshoot::page::PageSize::KIB_4).expect("a size");
    let space: offshoot::backing::Heap = offshoot::backing::Backing::create(&tree, geometry, None).expect("room");
    let image = offshoot::backing::Backing::origin(&space);
    let delta = Delta::of_images(&image, &image).expect("itself");
    let backing = BackingName { name: name.into(), format };
    export_delta(&delta, &backing, &scratch.path(file), ClusterSize::default(), &mut keep_going).expect("room");
}

#[test]
fn files_are_opened_only_where_the_policy_says() {
    let scratch = Scratch::new("policy");
    let outside = Scratch::new("policy-outside");
    std::fs::write(outside.path("secret"), vec![9; MIB as usize]).expect("room");
    std::fs::write(scratch.path("base.raw"), vec![1; MIB as usize]).expect("room");
    symlink(outside.path("secret"), scratch.path("link.raw")).expect("a link");
    let open = |file: &str, policy: &ImportPolicy| ImportedImage::open(scratch.path(file), Format::Qcow2, policy);
    let under = ImportPolicy::under(scratch.dir());
    let files = |path| ImportPolicy { references: References::Files(vec![path]), ..ImportPolicy::default() };
    let secret = outside.path("secret").to_str().expect("UTF-8").to_owned();
    let up = format!("../{}/secret", outside.dir().file_name().expect("a name").to_str().expect("UTF-8"));
    for (name, allowed) in [("base.raw", true), ("link.raw", false), (secret.as_str(), false), (up.as_str(), false)] {
        over(&scratch, "top", name, Format::Raw);
        let rule = open("top", &ImportPolicy::default()).expect_err("nothing is allowed");
        assert_eq!(rule.rule(), Some(&Rule::Reference(name.into())));
        match open("top", &under) {
            Ok(_) => assert!(allowed, "{name}"),
            Err(error) => assert!(!allowed && error.rule() == Some(&Rule::Reference(name.into())), "{name}: {error}"),
        }
        assert!(open("top", &files(outside.path("secret"))).is_ok() != allowed, "{name}: exactly what is listed");
        assert!(open("top", &files(scratch.path("base.raw"))).is_ok() == allowed, "{name}");
    }
    // Whether a file is there is nothing that a header may find out.
    over(&scratch, "top", "/no/such/file", Format::Raw);
    assert_eq!(open("top", &under).expect_err("no").rule(), Some(&Rule::Reference("/no/such/file".into())));
    over(&scratch, "top", ".", Format::Raw);
    assert_eq!(open("top", &under).expect_err("a directory").rule(), Some(&Rule::NotAFile));
}

#[test]
fn protocols_cycles_and_long_chains_are_refused() {
    let scratch = Scratch::new("chains");
    let under = ImportPolicy::under(scratch.dir());
    let open = |file: &str, policy: &ImportPolicy| {
        let error = ImportedImage::open(scratch.path(file), Format::Qcow2, policy).expect_err("it is to be refused");
        error.rule().unwrap_or_else(|| panic!("{error}")).clone()
    };
    // Written by others: ours refuses to write them.
    for name in ["json:{\"driver\":\"null-co\"}", "nbd:localhost:10809", "nbd://h/x", "fat:/etc"] {
        over(&scratch, "top", &"x".repeat(name.len()), Format::Raw);
        let mut bytes = std::fs::read(scratch.path("top")).expect("written");
        let at = u64::from_be_bytes(bytes[8..16].try_into().expect("8 bytes")) as usize;
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(scratch.path("top"), bytes).expect("room");
        assert_eq!(open("top", &under), Rule::Protocol(name.into()));
        let backing = BackingName { name: name.into(), format: Format::Raw };
        let image = Blank(ByteSize::mib(1));
        let tree = offshoot::Tree::default();
        let geometry = offshoot::page::Geometry::new(image.0, offshoot::page::PageSize::KIB_4).expect("a size");
        let space: offshoot::backing::Heap = offshoot::backing::Backing::create(&tree, geometry, None).expect("room");
        let image = offshoot::backing::Backing::origin(&space);
        let delta = Delta::of_images(&image, &image).expect("itself");
        let written = export_delta(&delta, &backing, &scratch.path("x"), ClusterSize::default(), &mut keep_going);
        assert_eq!(written.expect_err("nor written").rule(), Some(&Rule::Protocol(name.into())));
    }
    over(&scratch, "self", "self", Format::Qcow2);
    assert_eq!(open("self", &under), Rule::Cycle);
    over(&scratch, "a", "b", Format::Qcow2);
    over(&scratch, "b", "c", Format::Qcow2);
    std::fs::hard_link(scratch.path("a"), scratch.path("c")).expect("a link");
    assert_eq!(open("a", &under), Rule::Cycle, "by another name, too");
    for i in 0..9 {
        over(&scratch, &format!("n{i}"), &format!("n{}", i + 1), Format::Qcow2);
    }
    std::fs::write(scratch.path("n9"), vec![0; MIB as usize]).expect("room");
    over(&scratch, "n8", "n9", Format::Raw);
    let few = |files| ImportPolicy { files, ..under.clone() };
    assert_eq!(open("n0", &few(9)), Rule::TooManyFiles { limit: 9 });
    ImportedImage::open(scratch.path("n0"), Format::Qcow2, &few(10)).expect("exactly as many as allowed");
}

#[test]
fn features_that_are_not_supported_are_refused_as_qemu_writes_them() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new("features");
    let features = [("extended_l2=on,cluster_size=128k", 16), ("compression_type=zstd", 8)];
    for (options, bit) in features {
        qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-o", options, "in.qcow2", "1M"]);
        let error = ImportedImage::open(scratch.path("in.qcow2"), Format::Qcow2, &ImportPolicy::default());
        assert_eq!(error.expect_err(options).rule(), Some(&Rule::Features(bit)), "{options}");
    }
    for kind in ["streamOptimized", "twoGbMaxExtentSparse"] {
        qemu_img(&scratch, &["create", "-q", "-f", "vmdk", "-o", &format!("subformat={kind}"), "in.vmdk", "1M"]);
        let error = ImportedImage::open(scratch.path("in.vmdk"), Format::Vmdk, &ImportPolicy::under(scratch.dir()));
        let error = error.expect_err(kind);
        match kind {
            "streamOptimized" => {
                assert!(matches!(error.rule(), Some(Rule::Unsupported(why)) if why.contains(kind)), "{error}")
            }
            _ => assert!(matches!(error.rule(), Some(Rule::Malformed(_))), "{error}"),
        }
    }
    qemu_img(&scratch, &["create", "-q", "-f", "vmdk", "base.vmdk", "1M"]);
    qemu_img(&scratch, &["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "link.vmdk"]);
    let error = ImportedImage::open(scratch.path("link.vmdk"), Format::Vmdk, &ImportPolicy::under(scratch.dir()));
    let error = error.expect_err("a delta link");
    assert!(matches!(error.rule(), Some(Rule::Unsupported(why)) if why.contains("delta link")), "{error}");
}

#[test]
fn features_are_named() {
    let text = Rule::Features(8 | 16 | 1 << 40).to_string();
    for part in ["zstd", "extended L2 entries", "unknown bits 0x10000000000"] {
        assert!(text.contains(part), "{text}");
    }
}

/// A file of ours whose header, tables and text are changed one by one.
#[test]
fn sparse_vmdk_that_cannot_be_is_refused_by_its_rule() {
    let scratch = Scratch::new("sparse-rules");
    std::fs::write(scratch.path("good.raw"), Content::new().sparse(MIB)).expect("room");
    let source = ImportedImage::open(scratch.path("good.raw"), Format::Raw, &ImportPolicy::default()).expect("raw");
    export(&source, &scratch.path("good.vmdk"), &ExportFormat::Vmdk, &mut keep_going).expect("room");
    let good = std::fs::read(scratch.path("good.vmdk")).expect("written");
    let changed = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let with = |at: usize, bytes: &[u8]| refused(&scratch, &changed(at, bytes), Format::Vmdk, &ImportPolicy::default());
    let malformed = |rule: &Rule| matches!(rule, Rule::Malformed(_));
    let table = |rule: &Rule, name: &str| matches!(rule, Rule::Table { table, .. } if *table == name);
    assert!(matches!(with(0, b"COWD"), Rule::Unsupported(_)));
    assert_eq!(with(4, &9u32.to_le_bytes()), Rule::Version(9));
    assert!(matches!(with(8, &(3u32 | 1 << 16).to_le_bytes()), Rule::Unsupported(_)), "compressed grains");
    assert!(matches!(with(77, &1u16.to_le_bytes()), Rule::Unsupported(_)), "compressed, it says elsewhere");
    assert_eq!(with(8, &(3u32 | 1 << 30).to_le_bytes()), Rule::Features(1 << 30));
    assert_eq!(with(12, &0u64.to_le_bytes()), Rule::Empty);
    assert!(matches!(with(12, &u64::MAX.to_le_bytes()), Rule::VirtualSize { .. }));
    assert!(table(&with(12, &(1u64 << 34).to_le_bytes()), "grain directory"), "more than its directory can cover");
    assert!(malformed(&with(20, &0u64.to_le_bytes())) && malformed(&with(20, &(1u64 << 40).to_le_bytes())));
    assert!(malformed(&with(20, &100u64.to_le_bytes())), "grains of no power of two");
    assert!(table(&with(28, &(1u64 << 60).to_le_bytes()), "descriptor"));
    assert!(table(&with(28, &0u64.to_le_bytes()), "descriptor"), "in the header");
    assert!(malformed(&with(36, &(1u64 << 40).to_le_bytes())), "a descriptor of a tebibyte");
    assert!(matches!(with(36, &0u64.to_le_bytes()), Rule::Unsupported(_)), "no descriptor");
    assert!(malformed(&with(44, &1024u32.to_le_bytes())));
    assert!(table(&with(56, &u64::MAX.to_le_bytes()), "grain directory"), "at its end, as in a stream");
    assert_eq!(with(72, &[1]), Rule::Dirty);
    assert!(malformed(&with(73, b"\n \n\n")), "sent as text");
    let limit = ImportPolicy { virtual_size: ByteSize::kib(512), ..ImportPolicy::default() };
    assert!(matches!(refused(&scratch, &good, Format::Vmdk, &limit), Rule::VirtualSize { .. }));
    // A file of holes, whose directory of 64 GiB would have to be held in memory.
    std::fs::write(scratch.path("holes"), changed(12, &(1u64 << 50).to_le_bytes())).expect("room");
    let holes = std::fs::OpenOptions::new().write(true).open(scratch.path("holes")).expect("written");
    holes.set_len(128 << 30).expect("holes take no room");
    let error =
        ImportedImage::open(scratch.path("holes"), Format::Vmdk, &ImportPolicy::default()).expect_err("no disk");
    assert!(matches!(error.rule(), Some(Rule::VirtualSize { .. })), "{error}");
    let text = String::from_utf8_lossy(&good[512..1024]).into_owned();
    let parent = 512 + text.find("parentCID=ffff").expect("ours has it") + "parentCID=".len();
    assert!(matches!(with(parent, b"12345678"), Rule::Unsupported(_)), "a delta link");
    let kind = 512 + text.find("monolithicSparse").expect("ours has it");
    assert!(malformed(&with(kind, b"monolithicSp rse")));

    let directory = u64::from_le_bytes(good[56..64].try_into().expect("8 bytes")) as usize * 512;
    assert!(table(&with(directory, &u32::MAX.to_le_bytes()), "grain table"));
    // Two tables of one disk in one place: each grain would stand for two.
    let mut twice = changed(12, &(65536u64 + 8).to_le_bytes());
    twice.copy_within(directory..directory + 4, directory + 4);
    assert!(malformed(&refused(&scratch, &twice, Format::Vmdk, &ImportPolicy::default())));
    // A grain past the end is found when it is read, and is no zeroes.
    let first = u32::from_le_bytes(good[directory..directory + 4].try_into().expect("4 bytes")) as usize * 512;
    std::fs::write(scratch.path("bad"), changed(first, &0xffff_ff00u32.to_le_bytes())).expect("room");
    let image = ImportedImage::open(scratch.path("bad"), Format::Vmdk, &ImportPolicy::default()).expect("until read");
    let error = image.read(ByteOffset::ZERO, &mut [0; 512]).expect_err("the data is not there");
    assert!(error.to_string().contains("past the end of a file"), "{error}");
}

/// A file of 64 KiB that stands for 512 MiB: every entry names the same few clusters.
#[test]
fn a_small_file_that_stands_for_much_meets_the_limit_of_the_policy() {
    let scratch = Scratch::new("amplified");
    let len = ByteSize::mib(512);
    let one = Blank(ByteSize::kib(64));
    export(&one, &scratch.path("one.qcow2"), &ExportFormat::default(), &mut keep_going).expect("room");
    let mut bytes = std::fs::read(scratch.path("one.qcow2")).expect("written");
    bytes[24..32].copy_from_slice(&len.get().to_be_bytes());
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("8 bytes")) as usize;
    let l2 = (u64::from_be_bytes(bytes[l1..l1 + 8].try_into().expect("8 bytes")) & 0xff_ffff_ffff_fe00) as usize;
    let entry: [u8; 8] = bytes[l2..l2 + 8].try_into().expect("8 bytes");
    bytes[l2..l2 + (64 << 10)].copy_from_slice(&entry.repeat(8192));
    std::fs::write(scratch.path("bomb.qcow2"), &bytes).expect("room");
    assert!(bytes.len() < 512 << 10);
    let limit = ByteSize::mib(8);
    let policy = ImportPolicy { data: limit, ..ImportPolicy::default() };
    let image = ImportedImage::open(scratch.path("bomb.qcow2"), Format::Qcow2, &policy).expect("nothing was copied");
    let mut furthest = ByteSize::ZERO;
    let mut watch = |progress: offshoot::frontend::formats::Progress| {
        furthest = progress.done;
        ControlFlow::Continue(())
    };
    let tree = offshoot::Tree::default();
    let size = offshoot::page::PageSize::KIB_4;
    let space = image.into_space::<offshoot::backing::Heap>(&tree, size, &mut watch);
    assert_eq!(space.expect_err("too much").rule(), Some(&Rule::Data { limit }));
    assert_eq!(tree.usage().heap_pages.get(), 0, "and nothing is left of it");
    assert!(furthest <= limit, "{furthest} of {limit}");
    for format in [ExportFormat::Raw, ExportFormat::default(), ExportFormat::Vmdk] {
        let error = image.convert(&scratch.path("out"), &format, &mut keep_going).expect_err("too much");
        assert_eq!(error.rule(), Some(&Rule::Data { limit }));
        assert!(error.to_string().contains("ImportPolicy::data"), "{error}");
    }
    assert!(!scratch.path("out").exists() && scratch.parts() == 0);
    let disk = offshoot::disk::Disk::blank(
        &tree,
        offshoot::page::SectorCount::new(1 << 20),
        offshoot::disk::Access::ReadWrite,
    );
    let error = image.fill(&disk.expect("a disk"), &mut keep_going).expect_err("too much");
    assert_eq!(error.rule(), Some(&Rule::Data { limit }));
    // Exactly as much as there is, is no more than it.
    let policy = ImportPolicy { data: len, ..ImportPolicy::default() };
    let image = ImportedImage::open(scratch.path("bomb.qcow2"), Format::Qcow2, &policy).expect("as before");
    image
        .convert(&scratch.path("out"), &ExportFormat::Raw, &mut |progress| {
            if progress.done > limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .expect_err("cancelled, and not for the limit");
}

#[test]
fn descriptors_of_vmdk_are_held_to_the_policy() {
    let scratch = Scratch::new("vmdk");
    std::fs::write(scratch.path("flat"), vec![3; 4096]).expect("room");
    let open = |extents: &str| {
        let text = format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n{extents}\n");
        std::fs::write(scratch.path("d.vmdk"), text).expect("room");
        ImportedImage::open(scratch.path("d.vmdk"), Format::Vmdk, &ImportPolicy::under(scratch.dir()))
    };
    let rule = |extents: &str| open(extents).expect_err(extents).rule().expect(extents).clone();
    open("RW 8 FLAT \"flat\" 0\nRW 8 ZERO").expect("a good one");
    assert_eq!(rule("RW 8 FLAT \"/etc/passwd\" 0"), Rule::Reference("/etc/passwd".into()));
    assert_eq!(rule("RW 8 FLAT \"nbd:x\" 0"), Rule::Protocol("nbd:x".into()));
    assert_eq!(rule("RW 8 FLAT \"d.vmdk\" 0"), Rule::Cycle);
    assert!(matches!(rule("RW 9 FLAT \"flat\" 0"), Rule::Truncated { .. }));
    assert!(matches!(rule("RW 8 FLAT \"flat\" 18446744073709551615"), Rule::Malformed(_)));
    assert!(matches!(rule("RW 18014398509481984 ZERO"), Rule::VirtualSize { .. }));
    assert!(matches!(rule("RW 36028797018963967 ZERO\nRW 9 ZERO"), Rule::Malformed(_)), "a sum that wraps");
    assert_eq!(rule(""), Rule::Empty);
    assert!(matches!(rule("parentFileNameHint=\"x\"\nRW 8 ZERO"), Rule::Malformed(_)), "delta links");
    let error = open("NOACCESS 8\nRW 8 ZERO");
    assert!(matches!(error.expect_err("what may not be read").rule(), Some(Rule::Malformed(_))));
}

#[derive(Debug)]
struct Blank(ByteSize);

impl Source for Blank {
    fn len(&self) -> ByteSize {
        self.0
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        if at.get() >= 3 * MIB {
            return Err(SpaceError::Unrelated("the medium fails here"));
        }
        buf.fill(1);
        Ok(())
    }
}

#[test]
fn a_cancelled_or_failed_export_leaves_what_was_there() {
    let scratch = Scratch::new("failed");
    for format in [ExportFormat::Raw, ExportFormat::default(), ExportFormat::Vmdk] {
        std::fs::write(scratch.path("out"), b"older").expect("room");
        let mut calls = 0;
        let mut watch = |_| {
            calls += 1;
            if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let error = export(&Blank(ByteSize::mib(3)), &scratch.path("out"), &format, &mut watch);
        assert!(matches!(error, Err(FormatError::Cancelled)) && calls == 2);
        let error = export(&Blank(ByteSize::mib(9)), &scratch.path("out"), &format, &mut keep_going);
        assert!(matches!(error, Err(FormatError::Space(SpaceError::Unrelated(_)))));
        assert_eq!(std::fs::read(scratch.path("out")).expect("still there"), b"older");
        let error = export(&Blank(ByteSize::ZERO), &scratch.path("out"), &ExportFormat::default(), &mut keep_going);
        assert_eq!(error.expect_err("no bytes").rule(), Some(&Rule::Empty));
        assert_eq!(scratch.parts(), 0);
    }
    let nowhere = export(&Blank(ByteSize::mib(1)), &scratch.path("no/out"), &ExportFormat::Raw, &mut keep_going);
    assert!(matches!(nowhere, Err(FormatError::Io { .. })));
    let long = export(&Blank(ByteSize::gib(4 << 10)), &scratch.path("v"), &ExportFormat::Vmdk, &mut keep_going);
    assert!(matches!(long.expect_err("over 2 TiB").rule(), Some(Rule::NotExportable(_))));
    let small = ExportFormat::Qcow2(ClusterSize::new(ByteSize::kib(4)).expect("a size"));
    let long = export(&Blank(ByteSize::gib(64 << 10)), &scratch.path("v"), &small, &mut keep_going);
    assert!(matches!(long.expect_err("too many tables").rule(), Some(Rule::NotExportable(_))));
    assert_eq!(scratch.parts(), 0);
}
