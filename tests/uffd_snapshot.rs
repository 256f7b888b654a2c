//! A snapshot's directory as a VMM takes it: RAM opened for reading and mapped privately, by another process.
#![cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#![allow(unsafe_code)] // Files are mapped as a VMM does.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use memmap2::{MmapMut, MmapOptions};
use offshoot::backing::Mapped;
use offshoot::frontend::uffd::{MemoryFile, SnapshotDir, SnapshotError};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::Dice;
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{AtRest, CloneSpec, DeviceState, ForkPoint, Tree, Vm, VmName};

const PAGE: usize = 4096;
const PAGES: usize = 512;
/// RAM has a hole in its addresses; the file has none.
const LOW: u64 = (PAGES / 2 * PAGE) as u64;
const HIGH: u64 = 1 << 32;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-snapshot-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.0);
    }
}

/// Half of RAM is zeroes.
fn content() -> Vec<u8> {
    let mut dice = Dice::new(31);
    let mut bytes = vec![0; PAGES * PAGE];
    for page in (0..PAGES).step_by(2) {
        bytes[page * PAGE..][..PAGE].copy_from_slice(&dice.bytes(PAGE as u64));
    }
    bytes
}

fn address(page: usize) -> GuestAddress {
    let at = (page * PAGE) as u64;
    GuestAddress::new(if at < LOW { at } else { HIGH + at - LOW })
}

fn parent(tree: &Tree) -> Vm<Mapped> {
    let region = |start, len| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) };
    let layout = RamLayout::new(&[region(0, LOW), region(HIGH, LOW)], PageSize::KIB_4).unwrap();
    let vm: Vm<Mapped> = Vm::new(tree, VmName::new("parent").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    for (page, bytes) in content().chunks(PAGE).enumerate().step_by(2) {
        vm.ram().write(address(page), bytes).unwrap();
    }
    vm
}

fn fork(vm: &Vm<Mapped>) -> ForkPoint<Mapped> {
    vm.fork(&mut AtRest(DeviceState::from_bytes(vec![]))).unwrap()
}

fn ram_of(vm: &Vm<Mapped>) -> Vec<u8> {
    let mut all = vec![0; PAGES * PAGE];
    all.chunks_mut(PAGE).enumerate().for_each(|(page, bytes)| vm.ram().read(address(page), bytes).unwrap());
    all
}

fn map_as_a_vmm(memory: &Path) -> MmapMut {
    let file = File::open(memory).unwrap();
    // SAFETY: a private mapping of a file that nobody changes.
    unsafe { MmapOptions::new().map_copy(&file) }.unwrap()
}

/// A figure of /proc/self/smaps for the mapping at an address, in bytes.
fn smaps(at: *const u8, names: &[&str]) -> u64 {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", at.addr());
    let lines = text.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    let of = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        names.contains(&name).then(|| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10)
    };
    lines.take_while(|line| !line.starts_with("VmFlags")).filter_map(of).sum()
}

#[test]
#[ignore = "the other process of a test"]
fn in_another_process() {
    let Some(memory) = std::env::var_os("OFFSHOOT_SNAPSHOT_MEMORY") else { return };
    let mut map = map_as_a_vmm(Path::new(&memory));
    assert!(map[..] == content()[..], "byte for byte");
    if std::env::var_os("OFFSHOOT_SNAPSHOT_SHARED").is_some() {
        // The parent's process has all of them mapped as well.
        assert_eq!(smaps(map.as_ptr(), &["Shared_Clean", "Shared_Dirty"]), (PAGES * PAGE) as u64);
    }
    assert_eq!(smaps(map.as_ptr(), &["Anonymous"]), 0);
    for page in [0, 1, 400] {
        map[page * PAGE] ^= 0xFF;
    }
    assert_eq!(smaps(map.as_ptr(), &["Anonymous"]), 3 * PAGE as u64);
    std::process::exit(23);
}

/// Whether another process finds the content there and can write it without anybody noticing.
fn taken_elsewhere(memory: &Path, env: &[(&str, &str)]) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "in_another_process", "--ignored", "--quiet"]).env("OFFSHOOT_SNAPSHOT_MEMORY", memory);
    command.envs(env.iter().copied()).output().unwrap().status.code() == Some(23)
}

#[test]
fn a_vmm_maps_the_fork_points_own_file() {
    let (tree, folder) = (Tree::default(), Folder::new("own"));
    let vm = parent(&tree);
    let point = fork(&vm);
    point.teardown().wait();
    assert!(ram_of(&vm) == content());
    let snapshot = SnapshotDir::create(&folder.0.join("s"), &point, b"registers", MemoryFile::Sealed).unwrap();
    assert_eq!(fs::read(snapshot.state()).unwrap(), b"registers");
    let before = tree.memory_file_bytes();
    assert!(taken_elsewhere(&snapshot.memory(), &[("OFFSHOOT_SNAPSHOT_SHARED", "1")]));
    assert_eq!(tree.memory_file_bytes(), before, "nothing was copied");
    // The parent writes on, and the file does not change.
    vm.ram().write(address(0), &[0xAB; 64]).unwrap();
    assert!(taken_elsewhere(&snapshot.memory(), &[]));
    // Nobody writes it, not even by opening it anew.
    if let Ok(file) = File::options().write(true).open(snapshot.memory()) {
        assert!(file.write_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err());
        // SAFETY: refused, and private to this test if it were not.
        assert!(unsafe { MmapMut::map_mut(&file) }.is_err());
    }
    assert!(ram_of(&point.spawn(CloneSpec::default()).unwrap()) == content());
    // It outlives the point, not the value.
    drop((vm, point));
    assert!(taken_elsewhere(&snapshot.memory(), &[]));
    let (memory, state) = (snapshot.memory(), snapshot.state());
    drop(snapshot);
    assert!(fs::symlink_metadata(memory).is_err() && state.exists());
}

#[test]
fn several_layers_are_refused_or_gathered() {
    let (tree, folder) = (Tree::default(), Folder::new("layers"));
    let vm = parent(&tree);
    let first = fork(&vm);
    let clone = first.spawn(CloneSpec::default()).unwrap();
    clone.start().unwrap();
    let put = |byte: &[u8]| clone.ram().write(address(6), byte).unwrap();
    put(&[9; PAGE]);
    fork(&clone);
    put(&content()[6 * PAGE..][..PAGE]);
    let second = fork(&clone);
    let refused = SnapshotDir::create(&folder.0.join("refused"), &second, b"", MemoryFile::Sealed);
    assert!(matches!(refused, Err(SnapshotError::Layered)));
    assert!(!folder.0.join("refused").exists(), "nothing is left");
    let flat = SnapshotDir::create(&folder.0.join("flat"), &second, b"", MemoryFile::Flattened).unwrap();
    assert!(taken_elsewhere(&flat.memory(), &[]));
    let copied = SnapshotDir::create(&folder.0.join("copied"), &second, b"", MemoryFile::Copied).unwrap();
    assert!(taken_elsewhere(&copied.memory(), &[]));
    let memory = copied.memory();
    drop((vm, first, clone, second, copied));
    assert!(taken_elsewhere(&memory, &[]), "it outlives everything");
    let stat = fs::metadata(&memory).unwrap();
    assert_eq!((stat.len(), stat.mode() & 0o777), ((PAGES * PAGE) as u64, 0o600));
    assert!(stat.blocks() * 512 <= (PAGES * PAGE * 5 / 8) as u64, "zeroes are holes");
    let existing = SnapshotDir::create(&folder.0.join("flat"), &fork(&parent(&tree)), b"", MemoryFile::Sealed);
    assert!(
        matches!(existing, Err(SnapshotError::Io { error, .. }) if error.kind() == std::io::ErrorKind::AlreadyExists)
    );
    assert!(taken_elsewhere(&flat.memory(), &[]), "and what was there is untouched");
}

#[test]
fn a_failing_call_leaves_nothing() {
    let (tree, folder) = (Tree::default(), Folder::new("faults"));
    let vm = parent(&tree);
    let first = fork(&vm);
    let clone = first.spawn(CloneSpec::default()).unwrap();
    clone.start().unwrap();
    clone.ram().write(address(7), &[1]).unwrap();
    let second = fork(&clone);
    first.teardown().wait();
    second.teardown().wait();
    let usage = tree.usage();
    for (point, memory) in
        [(&first, MemoryFile::Sealed), (&second, MemoryFile::Flattened), (&second, MemoryFile::Copied)]
    {
        for n in 1.. {
            let plan = fail_nth_call(n, Refusal::OutOfDescriptors);
            let made = SnapshotDir::create(&folder.0.join("s"), point, b"state", memory);
            let seen = plan.calls_seen();
            drop(plan);
            if seen < n {
                drop(made.unwrap());
                fs::remove_dir_all(folder.0.join("s")).unwrap();
                break;
            }
            assert!(matches!(made, Err(SnapshotError::Space(_))), "{memory:?}, call {n}: {made:?}");
            assert!(!folder.0.join("s").exists());
        }
        assert_eq!(tree.usage(), usage);
    }
}
