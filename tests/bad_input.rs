//! Bad input and used-up resources: each is a typed error that names what was wrong or which limit was met, and nothing is changed or lost.
//!
//! What takes a whole process's resources away is done in a child process: this test binary again, under a lowered limit.

mod common;

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use common::{PAGE, RAM_PAGES, assert_empty, get, off, put, running};
use offshoot::backing::{Backing, FileImage, Heap};
use offshoot::disk::{Access, Disk, DiskError};
use offshoot::image::Source;
use offshoot::page::{
    ByteOffset, ByteSize, Geometry, GeometryError, Gfn, GuestAddress, Lba, PageCount, PageSize, SectorCount,
};
use offshoot::ram::{LayoutError, RamError, RamLayout, RamRegion};
use offshoot::testing::{Dice, conformance};
use offshoot::{
    Admission, BuildError, CloneSpec, DiskName, ForkError, HostCheck, ImageError, Limits, SpaceError, Tree, Vm, VmName,
    VmStatus,
};

on_every_backing! {
    addresses_outside_of_ram,
    disks_that_cannot_be,
    a_base_that_shrinks,
}

fn region(start: u64, len: u64) -> RamRegion {
    RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) }
}

#[test]
fn regions_that_cannot_be() {
    let layout = |regions: &[RamRegion]| RamLayout::new(regions, PageSize::KIB_4);
    let (page, top) = (PAGE, u64::MAX - PAGE + 1);
    let far = |n| region(n * 2 * page, page);
    assert!(matches!(layout(&[]), Err(LayoutError::Count { count: 0, .. })));
    let many: Vec<_> = (0..=RamLayout::MAX_REGIONS).map(far).collect();
    assert!(matches!(layout(&many), Err(LayoutError::Count { limit: RamLayout::MAX_REGIONS, .. })));
    assert!(layout(&many[1..]).is_ok());
    for (regions, at_fault) in [
        (vec![region(0, page), region(page * 4, 0)], "empty"),
        (vec![region(0, 0)], "empty"),
        (vec![region(1, page)], "not aligned"),
        (vec![region(page, page + 1)], "not aligned"),
        (vec![region(0, 1)], "not aligned"),
        (vec![region(top, page)], "past the last"),
        (vec![region(page, top)], "past the last"),
        (vec![region(0, 2 * page), region(page, page)], "overlap"),
        (vec![region(page, page), region(0, 8 * page)], "overlap"),
        (vec![region(0, page), region(0, page)], "overlap"),
        (vec![region(0, 1 << 62), region(1 << 62, 1 << 62)], "over the limit"),
    ] {
        let error = layout(&regions).expect_err(at_fault);
        assert!(error.to_string().contains(at_fault), "{error} should say {at_fault}");
    }
    // Regions that only touch are no overlap, in any order.
    assert!(layout(&[region(page, page), region(0, page)]).is_ok());
    // What is aligned for small pages is not for large ones.
    assert!(matches!(RamLayout::new(&[region(PAGE, 2 << 20)], PageSize::MIB_2), Err(LayoutError::Misaligned { .. })));
}

#[test]
fn page_sizes_that_cannot_be() {
    for bytes in [0, 1, 512, 2048, 4095, 4097, 12_288, 3 << 20, 4 << 20, u64::MAX] {
        let error = PageSize::new(ByteSize::new(bytes)).expect_err("not a page size");
        assert!(error.to_string().contains(&bytes.to_string()), "{error}");
    }
    // One that can be, on a backing that does not have it: the message says which backing does.
    let size = PageSize::new(ByteSize::kib(64)).expect("a page size");
    let geometry = Geometry::new(ByteSize::kib(128), size).expect("a shape");
    let error = <Heap>::create(&Tree::default(), geometry, None).expect_err("pages of 4 KiB only");
    assert!(matches!(error, SpaceError::PageSize { .. }) && error.to_string().contains("AnyPage"), "{error}");
}

fn addresses_outside_of_ram<B: Backing>() {
    let tree = Tree::default();
    let layout = RamLayout::new(&[region(2 * PAGE, 2 * PAGE), region(8 * PAGE, PAGE)], PageSize::KIB_4).expect("valid");
    let vm = Vm::<B>::new(&tree, VmName::new("v").expect("a name"), layout, vec![]).expect("a VM");
    let ram = vm.ram();
    for (start, len) in [(2 * PAGE, 2 * PAGE), (8 * PAGE, PAGE)] {
        ram.write(GuestAddress::new(start), &vec![0x5a; len as usize]).expect("all of a region");
    }
    let outside = [
        (0, 1),
        (2 * PAGE - 1, 1),
        (2 * PAGE - 1, 2),
        (4 * PAGE - 1, 2),
        (4 * PAGE, 1),
        (8 * PAGE - 8, 8),
        (9 * PAGE, 1),
        (9 * PAGE - 7, 8),
        (2 * PAGE, 7 * PAGE),
        (u64::MAX, 1),
        (u64::MAX - 7, 8),
        (1 << 63, 8),
    ];
    for (at, len) in outside {
        let (at, mut bytes) = (GuestAddress::new(at), vec![0x11; len as usize]);
        assert!(matches!(ram.write(at, &bytes), Err(RamError::Hole { .. })), "write of {len} at {at:?}");
        assert!(matches!(ram.read(at, &mut bytes), Err(RamError::Hole { .. })), "read of {len} at {at:?}");
    }
    assert!(matches!(ram.load::<u64>(GuestAddress::new(4 * PAGE - 4)), Err(RamError::Hole { .. })));
    assert!(matches!(ram.store(GuestAddress::new(4 * PAGE - 1), 1u16), Err(RamError::Hole { .. })));
    for (first, count) in [(0, 1), (1, 2), (3, 2), (4, 1), (8, 2), (2, u64::MAX), (u64::MAX, 1), (u64::MAX >> 12, 1)] {
        let refused = ram.discard(Gfn::new(first), PageCount::new(count));
        assert!(matches!(refused, Err(RamError::Hole { .. })), "discard of {count} at {first}: {refused:?}");
    }
    for (start, len) in [(2 * PAGE, 2 * PAGE), (8 * PAGE, PAGE)] {
        let mut found = vec![0; len as usize];
        ram.read(GuestAddress::new(start), &mut found).expect("all of a region");
        assert!(found.iter().all(|byte| *byte == 0x5a), "a refused access changes nothing");
    }
}

fn disks_that_cannot_be<B: Backing>() {
    let tree = Tree::default();
    assert!(matches!(Disk::blank(&tree, SectorCount::ZERO, Access::ReadWrite), Err(DiskError::Empty)));
    for huge in [u64::MAX, u64::MAX / 512, 1 << 40] {
        match Disk::blank(&tree, SectorCount::new(huge), Access::ReadWrite) {
            Err(DiskError::Space(SpaceError::Geometry(GeometryError::TooLarge { .. }))) => {}
            result => panic!("{huge} sectors: {result:?}"),
        }
    }
    let space = || B::create(&tree, Geometry::new(ByteSize::new(2 * PAGE), PageSize::KIB_4).expect("a shape"), None);
    let short = Disk::over(space().expect("a space"), SectorCount::new(17), Access::ReadWrite);
    assert!(matches!(short, Err(DiskError::Space(SpaceError::Geometry(_)))), "{short:?}");
    let disk = Disk::over(space().expect("a space"), SectorCount::new(15), Access::ReadWrite).expect("it fits");
    disk.write(Lba::ZERO, &[0x77; 15 * 512]).expect("all of it");
    for (lba, count) in [(15, 1), (14, 2), (0, 16), (u64::MAX, 1), (u64::MAX / 512, 8), (1 << 55, 1)] {
        let (at, sectors) = (Lba::new(lba), SectorCount::new(count));
        let mut bytes = vec![1; (count * 512) as usize];
        for refused in [
            disk.write(at, &bytes),
            disk.read(at, &mut bytes),
            disk.discard(at, sectors),
            disk.write_zeroes(at, sectors),
            disk.discard(at, SectorCount::new(u64::MAX)),
        ] {
            assert!(matches!(refused, Err(DiskError::OutOfRange { .. })), "{count} at {lba}: {refused:?}");
        }
    }
    for len in [1, 511, 513, 15 * 512 + 1] {
        assert!(matches!(disk.write(Lba::ZERO, &vec![1; len]), Err(DiskError::Misaligned(_))));
        assert!(matches!(disk.read(Lba::ZERO, &mut vec![1; len]), Err(DiskError::Misaligned(_))));
    }
    let mut found = [0; 15 * 512];
    disk.read(Lba::ZERO, &mut found).expect("all of it");
    assert!(found.iter().all(|byte| *byte == 0x77), "a refused request changes nothing");
    let read_only = Disk::over(space().expect("a space"), SectorCount::new(16), Access::ReadOnly).expect("it fits");
    for refused in [
        read_only.write(Lba::ZERO, &[1; 512]),
        read_only.discard(Lba::ZERO, SectorCount::new(8)),
        read_only.write_zeroes(Lba::ZERO, SectorCount::new(1)),
    ] {
        assert!(matches!(refused, Err(DiskError::ReadOnly)), "{refused:?}");
    }
    drop((disk, read_only));
    assert_empty(&tree);
}

#[test]
fn machines_that_cannot_be() {
    let tree = Tree::default();
    let blank = || Disk::blank(&tree, SectorCount::new(8), Access::ReadWrite).expect("a disk");
    let build = |disks| {
        let layout = RamLayout::flat(ByteSize::new(PAGE), PageSize::KIB_4).expect("a layout");
        Vm::<Heap>::new(&tree, VmName::new("v").expect("a name"), layout, disks)
    };
    let twice = build(vec![(DiskName::new("a"), blank()), (DiskName::new("a"), blank())]);
    assert!(matches!(twice, Err(BuildError::DuplicateDisk(name)) if name.as_str() == "a"));
    let many = (0..=Vm::<Heap>::MAX_DISKS).map(|n| (DiskName::new(n.to_string()), blank())).collect();
    assert!(matches!(build(many), Err(BuildError::TooManyDisks { limit: Vm::<Heap>::MAX_DISKS, .. })));
    for name in ["", "a\nb", "\u{7f}", &"x".repeat(256)] {
        assert!(VmName::new(name).is_err(), "{name:?}");
    }
    assert_empty(&tree);
}

/// A file of its own for one test, gone afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).expect("the temporary folder can be written");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

#[test]
fn file_images_conform() {
    let bytes = Dice::new(4).bytes(3 * PAGE + 777);
    let file = Scratch::new("conform", &bytes);
    conformance::source(&FileImage::open(&file.0, None).expect("it is there"), &bytes);
    let part = FileImage::open(&file.0, Some(ByteSize::new(5000))).expect("it holds more than that");
    conformance::source(&part, &bytes[..5000]);
    let opened = FileImage::from_file(File::open(&file.0).expect("it is there"), None).expect("a file");
    conformance::source(&opened, &bytes);
    let empty = Scratch::new("empty", &[]);
    conformance::source(&FileImage::open(&empty.0, None).expect("it is there"), &[]);
}

#[cfg(target_os = "linux")]
#[test]
fn sealed_memory_files_are_mapped_and_conform() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use std::io::Write;
    let bytes = Dice::new(6).bytes(3 * PAGE + 5);
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memory file");
    let mut file = File::from(fd);
    file.write_all(&bytes).expect("it can be written");
    let open = FileImage::from_file(file.try_clone().expect("a second handle"), None).expect("a file");
    assert!(!open.is_mapped(), "it could still shrink");
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).expect("nobody maps it");
    let sealed = FileImage::from_file(file, None).expect("a file");
    assert!(sealed.is_mapped());
    conformance::source(&sealed, &bytes);
    conformance::source(&open, &bytes);
}

#[test]
fn images_that_cannot_be_opened_or_read() {
    let bytes = Dice::new(7).bytes(PAGE);
    let file = Scratch::new("short", &bytes);
    match FileImage::open(&file.0, Some(ByteSize::new(PAGE + 1))) {
        Err(ImageError::TooShort { declared, found }) => assert_eq!((declared.get(), found.get()), (PAGE + 1, PAGE)),
        result => panic!("{result:?}"),
    }
    match FileImage::open(file.0.with_extension("none"), None) {
        Err(ImageError::Io(error)) => assert_eq!(error.kind(), ErrorKind::NotFound),
        result => panic!("{result:?}"),
    }
    // A folder: refused when it is opened, or when it is read.
    let folder = FileImage::open(std::env::temp_dir(), None).map_err(SpaceError::from);
    let read = folder.and_then(|image| image.read(ByteOffset::ZERO, &mut [0; 1]));
    assert!(read.is_err(), "a folder was read as an image");
    // A base longer than the space.
    let image: Arc<dyn Source> = Arc::new(FileImage::open(&file.0, None).expect("it is there"));
    let disk = Disk::over_image(&Tree::default(), image, Access::ReadWrite).expect("a disk of its length");
    assert_eq!(disk.capacity().get(), 8);
}

#[cfg(target_os = "linux")]
#[test]
fn an_image_that_nobody_may_read() {
    // Write-only by its handler, for root too: /proc/sys checks the mode bits themselves.
    let path = "/proc/sys/vm/drop_caches";
    match FileImage::open(path, None) {
        Err(ImageError::Io(error)) => assert_eq!(error.kind(), ErrorKind::PermissionDenied),
        result => panic!("{path}: {result:?}"),
    }
}

#[cfg(unix)]
#[test]
fn a_medium_that_fails() {
    use offshoot::testing::faults::{Refusal, fail_nth_call};
    let bytes = Dice::new(8).bytes(3 * PAGE);
    let file = Scratch::new("medium", &bytes);
    let tree = Tree::default();
    let image = Arc::new(FileImage::open(&file.0, None).expect("it is there"));
    let disk = Disk::over_image(&tree, image, Access::ReadWrite).expect("a disk");
    let mut found = [0; 512];
    for n in 1..=2 {
        let _plan = fail_nth_call(1, Refusal::Io);
        let result = if n == 1 { disk.read(Lba::new(8), &mut found) } else { disk.write(Lba::new(8), &found) };
        assert!(matches!(result, Err(DiskError::Space(SpaceError::Image(ImageError::Io(_))))), "{result:?}");
    }
    assert_eq!(tree.usage().heap_pages, PageCount::ZERO, "a failed write keeps no page");
    disk.read(Lba::new(8), &mut found).expect("the medium is well again");
    assert_eq!(found, bytes[PAGE as usize..][..512]);
}

fn a_base_that_shrinks<B: Backing>() {
    let bytes = Dice::new(9).bytes(4 * PAGE);
    let name = format!("shrinks-{}", std::any::type_name::<B>().replace([':', '<', '>'], "_"));
    let file = Scratch::new(&name, &bytes);
    let image: Arc<dyn Source> = Arc::new(FileImage::open(&file.0, None).expect("it is there"));
    let shape = Geometry::new(ByteSize::new(4 * PAGE), PageSize::KIB_4).expect("a shape");
    let tree = Tree::default();
    let space = B::create(&tree, shape, Some(image.clone())).expect("a space");
    File::options().write(true).open(&file.0).expect("it is there").set_len(PAGE + 10).expect("it can be cut short");
    let mut page = vec![0; PAGE as usize];
    image.read(ByteOffset::ZERO, &mut page).expect("what is left can be read");
    match image.read(ByteOffset::new(PAGE), &mut page) {
        Err(SpaceError::Image(ImageError::Shrank { opened, now })) => {
            assert_eq!(opened.get(), 4 * PAGE);
            assert!(now.get() <= PAGE + 10, "{now}");
        }
        result => panic!("{result:?}"),
    }
    // A space that copied its base does not care; one that reads through it says the same as the image.
    match space.read(ByteOffset::new(2 * PAGE), &mut page) {
        Ok(()) => assert_eq!(page, bytes[2 * PAGE as usize..3 * PAGE as usize]),
        Err(SpaceError::Image(ImageError::Shrank { .. })) => {
            let refused = space.write(ByteOffset::new(2 * PAGE + 1), b"part of a page");
            assert!(matches!(refused, Err(SpaceError::Image(ImageError::Shrank { .. }))), "{refused:?}");
            assert!(space.dirty().expect("dirty").is_empty(), "a refused write changes nothing");
            space.write(ByteOffset::new(2 * PAGE), &page).expect("a whole page needs nothing from below");
        }
        Err(error) => panic!("{error}"),
    }
    space.validate().expect("all is right");
}

#[test]
fn the_heap_is_full() {
    let limits = Limits { heap_pages: PageCount::new(5), ..Limits::default() };
    let (tree, vm, mut guest) = running::<Heap>(limits);
    (0..5).for_each(|page| put(&vm, page, page + 1));
    let full = vm.ram().store(GuestAddress::new(5 * PAGE), 6u64);
    match &full {
        Err(RamError::Space(SpaceError::HeapLimit { limit })) => assert_eq!(limit.get(), 5),
        result => panic!("{result:?}"),
    }
    assert!(full.is_err_and(|error| error.to_string().contains("Limits::heap_pages")));
    // Whole or not at all, where only the second page finds no room.
    put(&vm, 4, 50);
    let across = vm.ram().write(GuestAddress::new(5 * PAGE - 8), &[0xff; 16]);
    assert!(matches!(across, Err(RamError::Space(SpaceError::HeapLimit { .. }))));
    let tail: u64 = vm.ram().load(GuestAddress::new(5 * PAGE - 8)).expect("RAM can be read");
    assert_eq!(tail, 0, "a write that is refused in its second page changes nothing in its first");
    // A fork needs no page, and a clone's first write does.
    let point = vm.fork(&mut guest).expect("pages are handed over");
    let clone = point.spawn(CloneSpec::default()).expect("a clone");
    assert!(clone.ram().store(GuestAddress::ZERO, 1u64).is_err());
    assert!(matches!(point.flatten(), Err(SpaceError::HeapLimit { .. })));
    assert_eq!((get(&clone, 0), get(&vm, 4), tree.usage().heap_pages.get()), (1, 50, 5));
    drop((vm, point, clone));
    assert_empty(&tree);
}

#[cfg(target_os = "linux")]
mod used_up {
    use super::*;
    use offshoot::SystemError;
    use offshoot::backing::Mapped;
    use offshoot::testing::ScriptedGuest;
    use std::process::Command;

    /// Runs one ignored test of this file in a child process, under a limit of the shell's.
    fn in_a_child(test: &str, limit: &str) {
        let exe = std::env::current_exe().expect("this test has a path");
        let script = format!("ulimit {limit} && exec \"$0\" --exact \"$1\" --ignored --nocapture --test-threads=1");
        let output = Command::new("sh").arg("-c").arg(script).arg(exe).arg(test).output().expect("a shell");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{test} under ulimit {limit}:\n{out}\n{err}");
        assert!(out.contains("1 passed"), "the child ran nothing:\n{out}");
    }

    #[test]
    fn descriptors() {
        in_a_child("used_up::child_without_descriptors", "-n 30");
    }

    /// Limits that leave it to the kernel to refuse.
    fn unchecked() -> Limits {
        Limits { admission: Admission { host: HostCheck::Off, ..Admission::default() }, ..Limits::default() }
    }

    #[test]
    #[ignore = "run by `descriptors`, in a child process"]
    fn child_without_descriptors() {
        let (tree, vm, mut guest) = running::<Mapped>(unchecked());
        put(&vm, 3, 33);
        let point = vm.fork(&mut guest).expect("there is room for one");
        let clone = point.spawn(CloneSpec::default()).expect("a clone takes no descriptor");
        put(&clone, 4, 44);
        clone.start().expect("it is paused");
        let mut clone_guest = ScriptedGuest::running(0);
        let mut hoard = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            hoard.push(file);
        }
        match clone.fork(&mut clone_guest) {
            Err(ForkError::Cut(SpaceError::System(error @ SystemError::OutOfDescriptors { .. }))) => {
                assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
            }
            result => panic!("{result:?}"),
        }
        assert!(clone_guest.runs() && clone.status() == VmStatus::Running);
        assert_eq!((get(&clone, 3), get(&clone, 4), get(&vm, 4)), (33, 44, 0));
        let none = common::off_on::<Mapped>(&tree);
        assert!(
            matches!(none, Err(BuildError::Space(SpaceError::System(SystemError::OutOfDescriptors { .. })))),
            "{none:?}"
        );
        assert!(matches!(FileImage::open("/dev/null", None), Err(ImageError::Io(_))));
        // Clones need none.
        let more: Vec<_> = (0..50).map(|_| point.spawn(CloneSpec::default()).expect("a clone")).collect();
        drop((hoard, more));
        let deeper = clone.fork(&mut clone_guest).expect("there is room again");
        assert_eq!(get(&deeper.spawn(CloneSpec::default()).expect("a clone"), 4), 44);
    }

    #[test]
    fn address_space() {
        // 12 GiB of addresses, in KiB.
        in_a_child("used_up::child_without_addresses", "-v 12582912");
    }

    #[test]
    #[ignore = "run by `address_space`, in a child process"]
    fn child_without_addresses() {
        let tree = Tree::default();
        let create = |gib| {
            let shape = Geometry::new(ByteSize::gib(gib), PageSize::KIB_4).expect("a shape");
            Mapped::create(&tree, shape, None)
        };
        match create(64) {
            Err(SpaceError::System(error @ SystemError::OutOfMemory { .. })) => {
                assert!(error.to_string().contains("RLIMIT_AS"), "{error}");
            }
            result => panic!("{result:?}"),
        }
        assert_empty(&tree);
        // Clones until there is no room: the one that does not fit leaves the others as they are.
        let parent = create(1).expect("there is room");
        parent.write(ByteOffset::new(5), b"parent").expect("RAM can be written");
        let (image, deferred) = offshoot::backing::Cut::commit(parent.cut().expect("a cut"));
        drop(deferred);
        let mut clones = Vec::new();
        let error = loop {
            match offshoot::backing::Sealed::spawn(&image) {
                Ok(clone) => clones.push(clone),
                Err(error) => break error,
            }
            assert!(clones.len() < 64, "more clones than there are addresses");
        };
        assert!(matches!(error, SpaceError::System(SystemError::OutOfMemory { .. })), "{error}");
        assert!(!clones.is_empty());
        for clone in &clones {
            let mut found = [0; 6];
            clone.read(ByteOffset::new(5), &mut found).expect("RAM can be read");
            assert_eq!(&found, b"parent");
        }
        clones.pop();
        assert!(offshoot::backing::Sealed::spawn(&image).is_ok(), "there is room again");
    }

    #[test]
    fn mappings() {
        in_a_child("used_up::child_without_mappings", "-n 512");
    }

    #[test]
    #[ignore = "run by `mappings`, in a child process: it takes every mapping the process may have"]
    fn child_without_mappings() {
        let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .expect("Linux says it")
            .trim()
            .parse()
            .expect("a number");
        if limit > 300_000 {
            offshoot::testing::skip("vm.max_map_count is so large here that filling it takes too long");
            return;
        }
        let (tree, vm, mut guest) = running::<Mapped>(unchecked());
        (0..RAM_PAGES).for_each(|page| put(&vm, page, 7));
        let point = vm.fork(&mut guest).expect("there is room");
        point.teardown().wait();
        let mut clones = Vec::with_capacity(limit);
        let error = loop {
            match point.ram().spawn_raw() {
                Ok(clone) => clones.push(clone),
                Err(error) => break error,
            }
            assert!(clones.len() <= limit, "more clones than mappings");
        };
        match &error {
            SpaceError::System(SystemError::OutOfMappings { held, limit: named, .. }) => {
                assert_eq!(*named, limit as u64);
                assert!(*held + 16 >= *named, "{error}");
            }
            error => panic!("{error}"),
        }
        assert!(error.to_string().contains("vm.max_map_count"), "{error}");
        // The parent goes on, and can be forked again once there is room.
        put(&vm, 1, 8);
        assert_eq!((get(&vm, 0), get(&vm, 1), vm.status()), (7, 8, VmStatus::Running));
        let before = tree.usage().fork_points;
        match vm.fork(&mut guest) {
            Ok(point) => drop(point),
            Err(ForkError::Cut(SpaceError::System(_))) => assert_eq!(tree.usage().fork_points, before),
            Err(error) => panic!("{error}"),
        }
        assert!(guest.runs());
        assert_eq!((get(&vm, 0), get(&vm, 1), vm.status()), (7, 8, VmStatus::Running));
        clones.clear();
        let again = vm.fork(&mut guest).expect("there is room again");
        assert_eq!(get(&again.spawn(CloneSpec::default()).expect("a clone"), 1), 8);
    }

    trait SpawnRaw {
        fn spawn_raw(&self) -> Result<Mapped, SpaceError>;
    }

    impl<S: offshoot::backing::Sealed<Live = Mapped>> SpawnRaw for S {
        fn spawn_raw(&self) -> Result<Mapped, SpaceError> {
            offshoot::backing::Sealed::spawn(self)
        }
    }

    #[test]
    fn mappings_of_one_vm() {
        let (tree, vm, mut guest) = running::<Mapped>(Limits { mappings_per_vm: 1, ..Limits::default() });
        (0..RAM_PAGES).for_each(|page| put(&vm, page, 1));
        let point = vm.fork(&mut guest).expect("one mapping is enough");
        let clone = point.spawn(CloneSpec::default()).expect("one mapping is enough");
        put(&clone, 3, 3);
        put(&clone, 9, 9);
        let mut clone_guest = ScriptedGuest::paused(0);
        match clone.fork(&mut clone_guest) {
            Err(ForkError::Cut(error @ SpaceError::MappingLimit { limit: 1, name, .. })) => {
                assert!(error.to_string().contains(name) && name.contains("mappings_per_vm"), "{error}");
            }
            result => panic!("{result:?}"),
        }
        assert_eq!((get(&clone, 3), get(&clone, 9), get(&clone, 4)), (3, 9, 1));
        assert_eq!((clone.status(), tree.usage().fork_points), (VmStatus::Paused, 1));
        // All pages in one run are one mapping.
        (0..RAM_PAGES).for_each(|page| put(&clone, page, 20 + page));
        let deeper = clone.fork(&mut clone_guest).expect("one run is one mapping");
        assert_eq!(get(&deeper.spawn(CloneSpec::default()).expect("a clone"), 9), 29);
        // With room for five, scattered pages are laid in at most five pieces, whatever lies between.
        let (_tree, vm, mut guest) = running::<Mapped>(Limits { mappings_per_vm: 5, ..Limits::default() });
        let point = vm.fork(&mut guest).expect("it runs");
        let clone = point.spawn(CloneSpec::default()).expect("a clone");
        (0..RAM_PAGES).filter(|page| page % 3 == 0).for_each(|page| put(&clone, page, page + 1));
        let scattered = clone.fork(&mut clone_guest).expect("gaps are copied along");
        let grandchild = scattered.spawn(CloneSpec::default()).expect("a clone");
        assert!(grandchild.ram().space().kernel_mappings() <= 5);
        for page in 0..RAM_PAGES {
            assert_eq!(get(&grandchild, page), if page % 3 == 0 { page + 1 } else { 0 });
        }
    }
}

#[test]
fn a_vm_that_is_off_has_no_instant_to_cut() {
    let (tree, vm) = off::<Heap>(Limits::default());
    let mut guest = offshoot::testing::ScriptedGuest::paused(0);
    assert!(matches!(vm.fork(&mut guest), Err(ForkError::IllegalState(_))));
    assert_eq!((guest.calls_seen(), vm.status(), tree.usage().images), (0, VmStatus::Off, 2));
}
