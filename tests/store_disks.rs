//! Durable disks as users hold them: in a directory, under a VM on any RAM, through kills, locks, damage and many queues.

#![cfg(unix)]

mod durable;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use durable::{PAGE, geometry, pages, read_all};
use offshoot::backing::{Backing, Cut, Heap, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, Lba, PageCount, PageIndex, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::store::{DiskDir, Durable, DurableImage};
use offshoot::testing::crash::Recorder;
use offshoot::testing::{ByteSource, Dice, ScriptedGuest};
use offshoot::{CloneSpec, DiskName, SpaceError, StoreError, Tree, Vm, VmName};

struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for the test");
        Self(path)
    }

    fn dir(&self) -> DiskDir {
        DiskDir::open(&self.0, &Tree::default()).expect("it is there")
    }

    fn files(&self, suffix: &str) -> Vec<PathBuf> {
        let files = std::fs::read_dir(&self.0).expect("it is there").map(|file| file.expect("an entry").path());
        files.filter(|file| file.extension().is_some_and(|found| found == suffix)).collect()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn store_error<T>(result: Result<T, SpaceError>) -> StoreError {
    match result {
        Err(SpaceError::Store(error)) => error,
        Err(error) => panic!("not an error of the store: {error}"),
        Ok(_) => panic!("it must be refused"),
    }
}

fn cut(disk: &Durable) -> DurableImage {
    disk.cut().expect("it can be cut").commit().0
}

fn forked_vm<B: Backing>() {
    let temp = Temp::new(&format!("vm-{}", std::any::type_name::<B>().len()));
    let tree = Tree::default();
    let dir = DiskDir::open(&temp.0, &tree).unwrap();
    let durable = dir.create(geometry(256), None).unwrap();
    let disk = Disk::over(durable, SectorCount::new(2048), Access::ReadWrite).unwrap();
    let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
    let vm: Vm<B> = Vm::new(&tree, VmName::new("vm").unwrap(), layout, vec![(DiskName::new("root"), disk)]).unwrap();
    let mut guest = ScriptedGuest::running(1);
    vm.start().unwrap();
    vm.ram().store(GuestAddress::ZERO, 7u64).unwrap();
    let root = vm.disk("root").unwrap();
    root.write(Lba::new(5), &[5; 512]).unwrap();
    let point = vm.fork(&mut guest).unwrap();
    root.write(Lba::new(5), &[6; 512]).unwrap();
    root.flush().unwrap();
    let clone = point.spawn(CloneSpec::default()).unwrap();
    clone.disk("root").unwrap().write(Lba::new(9), &[9; 512]).unwrap();
    clone.disk("root").unwrap().flush().unwrap();
    let ids = [&vm, &clone].map(|vm| vm.disk("root").unwrap().backing::<Durable>().unwrap().id());
    assert!(clone.disk("root").unwrap().backing::<Heap>().is_none());
    drop((clone, point, vm));
    for (id, expect) in ids.into_iter().zip([(6, 0), (5, 9)]) {
        let disk = dir.open_disk(id, None).unwrap();
        let all = read_all(&disk).unwrap();
        assert_eq!((all[5 * 512], all[9 * 512]), expect);
    }
}

#[test]
fn a_vm_on_the_heap_forks_with_its_durable_disk() {
    forked_vm::<Heap>();
}

#[cfg(target_os = "linux")]
#[test]
fn a_vm_on_mapped_memory_forks_with_its_durable_disk() {
    forked_vm::<offshoot::backing::Mapped>();
}

/// While a VM stands paused, its files are all that a copy needs, though the guest never flushed.
#[test]
fn a_copy_of_the_files_taken_at_a_pause_has_every_write() {
    let (temp, copy) = (Temp::new("pause"), Temp::new("pause-copy"));
    let disk = temp.dir().create(geometry(64), None).unwrap();
    disk.write(ByteOffset::new(10_000), &[7; 9000]).unwrap();
    disk.zero(pages(3, 1)).unwrap();
    let point = disk.cut().unwrap();
    for file in std::fs::read_dir(&temp.0).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.0.join(file.file_name())).unwrap();
    }
    drop(point.commit());
    let again = copy.dir().open_disk(disk.id(), None).unwrap();
    assert!(read_all(&again).unwrap() == read_all(&disk).unwrap());
}

#[test]
fn a_second_writer_is_refused_and_readers_of_a_parent_are_not() {
    let temp = Temp::new("locks");
    let disk = temp.dir().create(geometry(64), None).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
    disk.flush().unwrap();
    // A directory opened again is what another process would have: locks belong to open files.
    let other = temp.dir();
    assert!(matches!(store_error(other.open_disk(disk.id(), None)), StoreError::InUse { .. }));
    assert!(matches!(store_error(other.open_image(disk.id(), None)), StoreError::InUse { .. }));
    let image = cut(&disk);
    let clone = image.spawn().unwrap();
    clone.write(ByteOffset::new(9000), &[2; 512]).unwrap();
    clone.flush().unwrap();
    let id = clone.id();
    drop(clone);
    // The parent is held by this disk, and shared by the clone in the other.
    let elsewhere = other.open_disk(id, None).unwrap();
    assert!(matches!(store_error(temp.dir().open_disk(id, None)), StoreError::InUse { .. }));
    assert_eq!(read_all(&elsewhere).unwrap()[9000], 2);
    drop(elsewhere);
    drop(temp.dir().open_disk(id, None).unwrap());
}

#[test]
fn a_parent_is_never_written_again() {
    let temp = Temp::new("parent");
    let disk = temp.dir().create(geometry(64), None).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 4096]).unwrap();
    let image = cut(&disk);
    let parent = temp.0.join(format!("{}.overlay", image.layer().unwrap().unwrap().id));
    let clone = image.spawn().unwrap();
    clone.write(ByteOffset::ZERO, &[2; 512]).unwrap();
    clone.flush().unwrap();
    let before = std::fs::read(&parent).unwrap();
    let id = disk.id();
    drop((disk, image, clone));
    // The disk's head still names the layer; it has a child, so the disk goes on beside it.
    let disk = temp.dir().open_disk(id, None).unwrap();
    disk.write(ByteOffset::ZERO, &[3; 512]).unwrap();
    disk.zero(pages(0, 64)).unwrap();
    disk.flush().unwrap();
    disk.reset().unwrap();
    disk.flush().unwrap();
    assert!(std::fs::read(&parent).unwrap() == before);
}

#[test]
fn what_is_missing_is_named() {
    let temp = Temp::new("missing");
    let disk = temp.dir().create(geometry(64), None).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
    let image = cut(&disk);
    let parent = image.layer().unwrap().unwrap().id;
    disk.write(ByteOffset::ZERO, &[2; 512]).unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop((disk, image));
    let path = temp.0.join(format!("{parent}.overlay"));
    std::fs::rename(&path, temp.0.join("away")).unwrap();
    let error = store_error(temp.dir().open_disk(id, None));
    assert!(matches!(&error, StoreError::Missing { file } if file.contains(&parent.to_string())), "{error}");
    assert_eq!(temp.dir().disks().unwrap(), [id], "it can be listed all the same");
    std::fs::rename(temp.0.join("away"), &path).unwrap();
    assert_eq!(read_all(&temp.dir().open_disk(id, None).unwrap()).unwrap()[0], 2);
}

#[test]
fn the_base_must_be_the_one_that_it_was_made_over() {
    let temp = Temp::new("base");
    let base = |len: usize| Some(Arc::new(ByteSource::new(vec![9; len])) as Arc<dyn Source>);
    let disk = temp.dir().create(geometry(8), base(5000)).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop(disk);
    for wrong in [None, base(4999), base(8192)] {
        assert!(matches!(store_error(temp.dir().open_disk(id, wrong)), StoreError::Chain { .. }));
    }
    let all = read_all(&temp.dir().open_disk(id, base(5000)).unwrap()).unwrap();
    assert_eq!((all[0], all[600], all[4999], all[5000]), (1, 9, 9, 0));
}

/// A bit of the map rots: the disk is refused and marked, and can be read but for the part that cannot be told.
#[test]
fn a_damaged_map_is_found_marked_and_read_around() {
    let recorder = Recorder::new();
    let dir = || DiskDir::over(recorder.folder(), &Tree::default());
    // Two blocks of the map: 15,360 pages each.
    let disk = dir().create(geometry(20_000), None).unwrap();
    disk.write(ByteOffset::new(3 * PAGE), &[3; 512]).unwrap();
    disk.write(ByteOffset::new(16_000 * PAGE), &[4; 512]).unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    let layer = cut(&disk).layer().unwrap().unwrap().id;
    drop(disk);
    let name = format!("{layer}.overlay");
    assert!(recorder.flip(&name, ByteOffset::new(8192 + 40), 3));
    let error = store_error(dir().open_disk(id, None));
    assert!(matches!(error, StoreError::Damaged { at, .. } if at.get() == 8192), "{error}");
    assert!(matches!(store_error(dir().open_disk(id, None)), StoreError::MarkedCorrupt { .. }));
    let image = dir().open_image(id, None).unwrap();
    let mut sector = [0; 512];
    let error = store_error(image.read(ByteOffset::new(3 * PAGE), &mut sector));
    assert!(matches!(error, StoreError::DamagedPage { page, .. } if page.get() == 3), "{error}");
    assert_eq!(sector, [0; 512]);
    image.read(ByteOffset::new(16_000 * PAGE), &mut sector).unwrap();
    assert_eq!(sector, [4; 512]);
    // One copy of a record that rots is not missed.
    assert!(recorder.flip(&name, ByteOffset::new(8192 + 40), 3));
    assert!(recorder.flip(&format!("{id}.disk"), ByteOffset::new(70), 0));
    let image = dir().open_image(id, None).unwrap();
    image.read(ByteOffset::new(3 * PAGE), &mut sector).unwrap();
    assert_eq!(sector, [3; 512]);
}

/// What is not understood is kept as it is, and decides what may be done.
#[test]
fn unknown_features_are_kept_and_obeyed() {
    let recorder = Recorder::new();
    let dir = || DiskDir::over(recorder.folder(), &Tree::default());
    let disk = dir().create(geometry(8), None).unwrap();
    disk.write(ByteOffset::ZERO, &[1; 512]).unwrap();
    disk.flush().unwrap();
    let (id, layer) = (disk.id(), cut(&disk).layer().unwrap().unwrap().id);
    drop(disk);
    let name = format!("{layer}.overlay");
    let plain = recorder.content(&name).unwrap();
    let with = |at: usize, value: u8| {
        let mut bytes = plain.clone();
        for copy in [0, 4096] {
            bytes[copy + at] = value;
            bytes[copy + 12..copy + 16].fill(0);
            let crc = crc32fast::hash(&bytes[copy..copy + 4096]);
            bytes[copy + 12..copy + 16].copy_from_slice(&crc.to_le_bytes());
        }
        recorder.place(&name, &bytes);
        bytes
    };
    with(24, 1);
    assert!(matches!(store_error(dir().open_disk(id, None)), StoreError::Unknown { features: 1, what: "read", .. }));
    assert!(dir().open_image(id, None).is_err());
    with(8, 2);
    assert!(matches!(store_error(dir().open_disk(id, None)), StoreError::Unknown { version: 2, .. }));
    with(32, 4);
    assert!(matches!(store_error(dir().open_disk(id, None)), StoreError::Unknown { features: 4, what: "write", .. }));
    dir().open_image(id, None).unwrap();
    // A feature that may be ignored, and bytes of a later version's: an open changes nothing, a freeze only what it must.
    let bytes = {
        with(40, 8);
        let mut bytes = recorder.content(&name).unwrap();
        for copy in [0, 4096] {
            bytes[copy + 3000] = 77;
            bytes[copy + 12..copy + 16].fill(0);
            let crc = crc32fast::hash(&bytes[copy..copy + 4096]);
            bytes[copy + 12..copy + 16].copy_from_slice(&crc.to_le_bytes());
        }
        recorder.place(&name, &bytes);
        bytes
    };
    let disk = dir().open_disk(id, None).unwrap();
    assert!(recorder.content(&name).unwrap() == bytes, "opening changed the file");
    let clone = cut(&disk).spawn().unwrap();
    clone.flush().unwrap();
    let frozen = recorder.content(&name).unwrap();
    let changed: Vec<_> = (0..4096).filter(|at| frozen[*at] != bytes[*at]).collect();
    // Checksum, generation, state.
    assert!(changed.iter().all(|at| (12..24).contains(at) || (108..112).contains(at)), "{changed:?}");
    assert_eq!((frozen[40], frozen[3000]), (8, 77));
}

/// Layers that name each other in a circle, and more of them than any disk has.
#[test]
fn a_chain_that_ends_in_itself_is_refused() {
    let recorder = Recorder::new();
    let dir = || DiskDir::over(recorder.folder(), &Tree::default());
    let disk = dir().create(geometry(8), None).unwrap();
    let mut layers = Vec::new();
    for round in 0..3 {
        disk.write(ByteOffset::ZERO, &[round; 512]).unwrap();
        layers.push(cut(&disk).layer().unwrap().unwrap().id);
    }
    disk.write(ByteOffset::ZERO, &[9; 512]).unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop(disk);
    let first = format!("{}.overlay", layers[0]);
    let mut bytes = recorder.content(&first).unwrap();
    for target in [layers[0], layers[2]] {
        for copy in [0, 4096] {
            bytes[copy + 64..copy + 80].copy_from_slice(&target.bytes());
            bytes[copy + 12..copy + 16].fill(0);
            let crc = crc32fast::hash(&bytes[copy..copy + 4096]);
            bytes[copy + 12..copy + 16].copy_from_slice(&crc.to_le_bytes());
        }
        recorder.place(&first, &bytes);
        let error = store_error(dir().open_disk(id, None));
        assert!(matches!(&error, StoreError::Chain { what, .. } if what.contains("cycle")), "{error}");
    }
}

/// Depth is one look-up, and opening a deep disk finds what each layer wrote.
#[test]
fn a_deep_disk_opens_as_it_was() {
    let temp = Temp::new("deep");
    let disk = temp.dir().create(geometry(128), None).unwrap();
    let mut want = vec![0; 128 * PAGE as usize];
    let mut dice = Dice::new(5);
    for round in 0..100u64 {
        let at = dice.below(127) * PAGE + 512;
        disk.write(ByteOffset::new(at), &[round as u8 + 1; 4096]).unwrap();
        want[at as usize..at as usize + 4096].fill(round as u8 + 1);
        cut(&disk);
    }
    let id = disk.id();
    assert_eq!(disk.usage().unwrap().layers, 100);
    drop(disk);
    let again = temp.dir().open_disk(id, None).unwrap();
    assert!(read_all(&again).unwrap() == want);
    assert!(again.usage().unwrap().depth >= 99);
    again.validate().unwrap();
}

/// Several queues write, discard and flush a disk that is warm: what each wrote last is what is there, also after it is opened again.
#[test]
fn many_queues_on_a_warm_overlay() {
    const QUEUES: u64 = 4;
    const PAGES: u64 = 96;
    let temp = Temp::new("queues");
    let first = temp.dir().create(geometry(PAGES), None).unwrap();
    first.write(ByteOffset::ZERO, &Dice::new(1).bytes(PAGES * PAGE)).unwrap();
    let parent = cut(&first);
    let disk = Arc::new(parent.spawn().unwrap());
    // Warm: every other page is its own already, with discarded ones among them.
    for page in (0..PAGES).step_by(2) {
        disk.write(ByteOffset::new(page * PAGE + 512), &[0xee; 1024]).unwrap();
    }
    disk.zero(pages(40, 8)).unwrap();
    disk.flush().unwrap();
    let mut want = read_all(&disk).unwrap();
    std::thread::scope(|scope| {
        let queues: Vec<_> = (0..QUEUES)
            .map(|queue| {
                let disk = disk.clone();
                scope.spawn(move || {
                    let mut dice = Dice::new(queue + 10);
                    // Each queue has a sector of every page, and one page in eight for itself.
                    let mut own = std::collections::BTreeMap::new();
                    for _ in 0..400 {
                        let page = dice.below(PAGES);
                        let at = page * PAGE + queue * 512;
                        match dice.below(10) {
                            0 => disk.flush().unwrap(),
                            1 if page % 8 == queue => {
                                disk.zero(pages(page, 1)).unwrap();
                                let now = dice.bytes(PAGE);
                                disk.write(ByteOffset::new(page * PAGE), &now).unwrap();
                                own.insert(page * PAGE, now);
                            }
                            _ if page % 8 >= QUEUES => {
                                let now = dice.bytes(512);
                                disk.write(ByteOffset::new(at), &now).unwrap();
                                own.insert(at, now);
                            }
                            _ => {
                                let mut seen = vec![0; 512];
                                disk.read(ByteOffset::new(at), &mut seen).unwrap();
                            }
                        }
                    }
                    own
                })
            })
            .collect();
        for queue in queues {
            for (at, bytes) in queue.join().unwrap() {
                want[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
    });
    assert!(read_all(&disk).unwrap() == want, "a queue's write is lost");
    disk.validate().unwrap();
    disk.flush().unwrap();
    let id = disk.id();
    drop(disk);
    assert!(read_all(&temp.dir().open_disk(id, None).unwrap()).unwrap() == want);
}

/// Queues come upon the same page at once, each with a sector of it, some of them warm and some not: whoever is first, nobody's sector is lost.
#[test]
fn first_writes_of_a_page_by_many_queues_keep_each_other() {
    const QUEUES: u64 = 4;
    const PAGES: u64 = 256;
    let first = Durable::create(&Tree::default(), geometry(PAGES), None).unwrap();
    first.write(ByteOffset::ZERO, &vec![0xbb; (PAGES * PAGE) as usize]).unwrap();
    let disk = cut(&first).spawn().unwrap();
    for page in (0..PAGES).step_by(3) {
        disk.write(ByteOffset::new(page * PAGE + 7 * 512), &[0xee; 512]).unwrap();
    }
    let together = std::sync::Barrier::new(QUEUES as usize);
    std::thread::scope(|scope| {
        for queue in 0..QUEUES {
            let (disk, together) = (&disk, &together);
            scope.spawn(move || {
                for page in 0..PAGES - 1 {
                    together.wait();
                    // Over the end of the page, so that a write meets a warm one and a cold one.
                    let at = if queue == 3 { page * PAGE + 7 * 512 + 256 } else { page * PAGE + 1024 + queue * 512 };
                    disk.write(ByteOffset::new(at), &[queue as u8 + 1; 512]).unwrap();
                }
            });
        }
    });
    let all = read_all(&disk).unwrap();
    for page in 0..(PAGES - 1) as usize {
        let page = &all[page * PAGE as usize..(page + 1) * PAGE as usize];
        assert_eq!([1024, 1536, 2048, 4095].map(|at| page[at]), [1, 2, 3, 4]);
        assert_eq!(page[512], 0xbb);
    }
    disk.validate().unwrap();
}

/// Write and discard the same pages for ever: the file holds what the disk does, and no more.
#[cfg(target_os = "linux")]
#[test]
fn the_file_does_not_grow_beyond_what_the_disk_holds() {
    let temp = Temp::new("space");
    let disk = temp.dir().create(geometry(4096), None).unwrap();
    let mut dice = Dice::new(3);
    for round in 0..30 {
        for _ in 0..20 {
            let at = dice.below(4000) * PAGE;
            disk.write(ByteOffset::new(at), &dice.bytes(8 * PAGE)).unwrap();
        }
        let first = dice.below(2000);
        disk.zero(pages(first, 1500)).unwrap();
        if round % 7 == 6 {
            disk.reset().unwrap();
        }
        disk.flush().unwrap();
        let live = disk.usage().unwrap().private.get() * PAGE;
        // The records, one block of the map in two versions, and what the file system keeps its own map of extents in.
        let held = disk.allocated().unwrap().get();
        assert!(held <= live + (64 << 10), "{held} bytes held for {live} of data");
    }
}

/// Tables cost by what was written, not by how long the disk is.
#[test]
fn memory_goes_with_the_data() {
    let size = |disk: &Durable| disk.usage().unwrap().table_bytes.get();
    let mut sizes = Vec::new();
    for gib in [1, 1024] {
        let disk = Durable::create(&Tree::default(), geometry(gib << 18), None).unwrap();
        assert_eq!(size(&disk), 0);
        for n in 0..64 {
            disk.write(ByteOffset::new(n << 20), &[1; 512]).unwrap();
        }
        sizes.push(size(&disk));
        disk.zero(disk.geometry().all()).unwrap();
        disk.flush().unwrap();
    }
    // 64 pages in two blocks of the map: index leaves, and for the long disk 16 bytes for each 60 MiB.
    assert!(sizes[0] < 256 << 10 && sizes[1] < sizes[0] + (1 << 20), "{sizes:?}");
}

#[test]
fn nothing_of_a_guests_panics_at_any_offset() {
    let disk = Durable::create(&Tree::default(), geometry(9), None).unwrap();
    let end = 9 * PAGE;
    for at in [0, 511, end - 1, end, end + 1, 1 << 40, u64::MAX - 511, u64::MAX] {
        for len in [0usize, 1, 512, 40_000] {
            let inside = at.checked_add(len as u64).is_some_and(|to| to <= end);
            assert_eq!(disk.write(ByteOffset::new(at), &vec![1; len]).is_ok(), inside);
            assert_eq!(disk.read(ByteOffset::new(at), &mut vec![1; len]).is_ok(), inside);
        }
        let range = offshoot::page::PageRange::new(PageIndex::new(at), PageCount::new(3));
        assert!(range.is_none_or(|range| disk.zero(range).is_ok() == (at == 0)));
    }
}

const VICTIM: &str = "OFFSHOOT_STORE_VICTIM";

/// The child of the test below: writes, flushes, and tells each acknowledged round, until it is killed.
#[test]
fn victim() {
    let Ok(path) = std::env::var(VICTIM) else { return };
    use std::io::Write;
    let dir = DiskDir::open(&path, &Tree::default()).unwrap();
    let id = dir.disks().unwrap()[0];
    let disk = dir.open_disk(id, None).unwrap();
    let mut first = [0; 8];
    disk.read(ByteOffset::ZERO, &mut first).unwrap();
    let mut out = std::io::stdout();
    for round in u64::from_le_bytes(first) + 1.. {
        let mut dice = Dice::new(round);
        for _ in 0..4 {
            let page = dice.below(60) + 1;
            disk.write(ByteOffset::new(page * PAGE + dice.below(8) * 512), &round.to_le_bytes().repeat(64)).unwrap();
        }
        disk.zero(pages(dice.below(60) + 1, 2)).unwrap();
        disk.write(ByteOffset::ZERO, &round.to_le_bytes()).unwrap();
        disk.flush().unwrap();
        writeln!(out, "acknowledged {round}").unwrap();
        out.flush().unwrap();
        if round % 5 == 0 {
            cut(&disk);
        }
    }
}

/// What the disk holds after `round`, played on bytes.
fn after_rounds(rounds: u64) -> Vec<u8> {
    let mut bytes = vec![0; 64 * PAGE as usize];
    for round in 1..=rounds {
        let mut dice = Dice::new(round);
        for _ in 0..4 {
            let page = dice.below(60) + 1;
            let at = (page * PAGE + dice.below(8) * 512) as usize;
            bytes[at..at + 512].copy_from_slice(&round.to_le_bytes().repeat(64));
        }
        let at = ((dice.below(60) + 1) * PAGE) as usize;
        bytes[at..at + 2 * PAGE as usize].fill(0);
        bytes[..8].copy_from_slice(&round.to_le_bytes());
    }
    bytes
}

#[test]
fn a_process_killed_at_any_point_leaves_what_it_acknowledged() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let temp = Temp::new("kill");
    let id = temp.dir().create(geometry(64), None).unwrap().id();
    let mut acknowledged = 0;
    let kills = if std::env::var("OFFSHOOT_SOAK").is_ok() { 200 } else { 12 };
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["victim", "--exact", "--nocapture"])
            .env(VICTIM, &temp.0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Killed after so many acknowledged rounds, at whatever it does then.
        let wanted = acknowledged + 1 + kill % 9;
        for line in lines.map_while(Result::ok) {
            if let Some(round) = line.strip_prefix("acknowledged ") {
                acknowledged = round.parse().unwrap();
                if acknowledged >= wanted {
                    break;
                }
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let disk = temp.dir().open_disk(id, None).unwrap();
        let found = read_all(&disk).unwrap();
        disk.validate().unwrap();
        let round = u64::from_le_bytes(found[..8].try_into().unwrap());
        assert!(round >= acknowledged, "round {acknowledged} was acknowledged, {round} is there");
        // The round after may have begun: sector by sector the disk is in one or the other. Rounds that were acknowledged and not heard of count too.
        let (now, next) = (after_rounds(round), after_rounds(round + 1));
        let before = after_rounds(round.saturating_sub(1));
        for at in (0..found.len()).step_by(512) {
            let sector = at..at + 512;
            let known = [&now, &next].iter().any(|bytes| bytes[sector.clone()] == found[sector.clone()]);
            // In a round that was not acknowledged the number may be there before the rest, and a write before the discard that came over it.
            let early = round > acknowledged && before[sector.clone()] == found[sector.clone()];
            let written_in = |round: u64| found[sector.clone()] == round.to_le_bytes().repeat(64);
            let halfway = written_in(round + 1) || round > acknowledged && written_in(round);
            assert!(
                known || early || halfway,
                "sector {} after round {round}, {acknowledged} of them acknowledged: {:x?}",
                at / 512,
                &found[sector.start..sector.start + 16]
            );
        }
        acknowledged = round.max(acknowledged);
        repair_round(&disk, &after_rounds(round));
    }
    assert!(temp.files("disk").len() == 1);
    assert!(Path::new(&temp.0).exists());
}

/// Puts the disk at the end of its round, so that the next child starts from something that is known.
fn repair_round(disk: &Durable, content: &[u8]) {
    let found = read_all(disk).unwrap();
    for page in 0..64 {
        let at = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        if found[at.clone()] != content[at.clone()] {
            disk.write(ByteOffset::new(page * PAGE), &content[at]).unwrap();
        }
    }
    disk.flush().unwrap();
}
