//! VMs with RAM and disks of every kind, to be saved and brought back, and flat copies to compare them with.
#![allow(dead_code)] // Each test uses a part of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use offshoot::backing::Backing;
use offshoot::disk::{Access, Disk};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, Lba, PageSize, SectorCount};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::store::{CloneName, CloneStore, DiskDir, Folder, Job, Problem, StoreOptions};
use offshoot::testing::{ByteSource, Dice};
use offshoot::{AtRest, CloneSpec, DeviceState, DiskName, ForkPoint, Reading, Tree, Vm, VmName};

pub const PAGE: u64 = 4096;

pub fn name(text: &str) -> CloneName {
    CloneName::new(text).expect("a good name")
}

/// A directory that goes with its owner.
pub struct Temp(pub PathBuf);

impl Temp {
    pub fn new(what: &str) -> Self {
        // The same test runs on several backings at once.
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("offshoot-saved-{what}-{}-{serial}", std::process::id()));
        std::fs::remove_dir_all(&path).ok();
        Self(path)
    }

    /// The names in it that end so.
    pub fn files(&self, suffix: &str) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the directory is there");
        let names = entries.map(|entry| entry.expect("it can be read").file_name().into_string().expect("text"));
        let mut names: Vec<_> = names.filter(|name| name.ends_with(suffix)).collect();
        names.sort();
        names
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

pub fn open(temp: &Temp) -> CloneStore {
    CloneStore::open(&temp.0, StoreOptions::default()).expect("it opens")
}

pub fn over(folder: Arc<dyn Folder>) -> CloneStore {
    CloneStore::over(folder, StoreOptions::default()).expect("it opens")
}

pub fn threads(count: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("threads")
}

pub fn problems(store: &CloneStore) -> Vec<Problem> {
    store.check(&threads(1), &Job::new()).expect("a check works")
}

/// RAM in three regions with holes between them: 10, 3 and 19 pages.
pub fn layout(size: PageSize) -> RamLayout {
    let page = size.bytes().get();
    let region = |start, pages| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(pages * page) };
    RamLayout::new(&[region(0, 10), region(16 << 20, 3), region(4 << 30, 19)], size).expect("a layout")
}

/// All that a fork point says.
#[derive(Clone, PartialEq, Eq)]
pub struct Flat {
    pub layout: RamLayout,
    pub ram: Vec<u8>,
    pub disks: Vec<(String, Access, Vec<u8>)>,
    pub state: Vec<u8>,
}

impl std::fmt::Debug for Flat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum =
            |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        write!(f, "Flat(RAM {:x}, state {:x}", sum(&self.ram), sum(&self.state))?;
        self.disks.iter().try_for_each(|(name, _, bytes)| write!(f, ", {name} {:x}", sum(bytes)))?;
        f.write_str(")")
    }
}

pub fn flat<B: Backing>(point: &ForkPoint<B>) -> Result<Flat, offshoot::SpaceError> {
    let mut ram = vec![0xa5; point.ram().len().get() as usize];
    point.ram().read(ByteOffset::ZERO, &mut ram)?;
    let mut disks = Vec::new();
    for (name, disk) in point.disks() {
        let mut bytes = vec![0xa5; disk.capacity().byte_size().expect("it is small").get() as usize];
        disk.read(Lba::new(0), &mut bytes).map_err(|error| match error {
            offshoot::disk::DiskError::Space(error) => error,
            other => panic!("{other}"),
        })?;
        disks.push((name.to_string(), disk.access(), bytes));
    }
    let state = point.device_state().encode().to_vec();
    Ok(Flat { layout: point.ram_layout().clone(), ram, disks, state })
}

/// A running VM, and where its disk lies that is none of the store's.
pub struct Machine<B: Backing> {
    pub vm: Vm<B>,
    pub guest: AtRest,
    tree: Tree,
}

impl<B: Backing> Machine<B> {
    /// With four disks: on the heap; over an image, read-only; durable, in the store; durable, elsewhere.
    pub fn new(store: &CloneStore, size: PageSize, state: Vec<u8>) -> Self {
        let tree = Tree::default();
        let blank = Disk::blank(&tree, SectorCount::new(61), Access::ReadWrite).expect("a disk");
        let image = Arc::new(ByteSource::new((0..20_000u32).map(|at| (at >> 4) as u8).collect()));
        let image = Disk::over_image(&tree, image, Access::ReadOnly).expect("a disk");
        let own = name("a disk of the store's");
        if store.info(&own).is_err() {
            store.create_empty(&own, ByteSize::new(24 * PAGE)).expect("a disk");
        }
        let own = store.open_disk(&own).expect("it is closed");
        let own = Disk::over(own, SectorCount::new(24 * 8), Access::ReadWrite).expect("a disk");
        let scratch = offshoot::store::Durable::create(
            &tree,
            offshoot::page::Geometry::new(ByteSize::new(8 * PAGE), PageSize::KIB_4).expect("it is small"),
            None,
        );
        let scratch = Disk::over(scratch.expect("a disk"), SectorCount::new(60), Access::ReadWrite).expect("a disk");
        let disks = [("blank", blank), ("image", image), ("own", own), ("scratch", scratch)];
        Self::with(tree, size, state, disks.map(|(name, disk)| (DiskName::new(name), disk)).into())
    }

    /// With a heap disk only: small, for tests of many steps.
    pub fn small(state: Vec<u8>) -> Self {
        let tree = Tree::default();
        let disk = Disk::blank(&tree, SectorCount::new(64), Access::ReadWrite).expect("a disk");
        Self::with(tree, PageSize::KIB_4, state, vec![(DiskName::new("disk"), disk)])
    }

    fn with(tree: Tree, size: PageSize, state: Vec<u8>, disks: Vec<(DiskName, Disk)>) -> Self {
        let vm = Vm::new(&tree, VmName::new("saved one").expect("a name"), layout(size), disks).expect("a VM");
        vm.start().expect("it is off");
        Self { vm, guest: AtRest(DeviceState::from_bytes(state)), tree }
    }

    /// A clone of a fork point, running.
    pub fn of(point: &ForkPoint<B>) -> Self {
        let vm = point.spawn(CloneSpec::default()).expect("room for a clone");
        vm.start().expect("a clone is paused");
        let state = point.device_state().clone();
        Self { tree: vm.tree().clone(), vm, guest: AtRest(state) }
    }

    /// Writes here and there, makes some zero, and changes the state.
    pub fn mess(&mut self, dice: &mut Dice) {
        let layout = self.vm.ram().layout().clone();
        let regions: Vec<_> = layout.regions().collect();
        for _ in 0..4 {
            let (region, _) = regions[dice.below(regions.len() as u64) as usize];
            let at = dice.below(region.len.get());
            let len = (dice.below(3 * PAGE) + 1).min(region.len.get() - at);
            let bytes = if dice.below(4) == 0 { vec![0; len as usize] } else { dice.bytes(len) };
            self.vm.ram().write(GuestAddress::new(region.start.get() + at), &bytes).expect("it is RAM");
        }
        for (_, disk) in self.vm.disks().filter(|(_, disk)| disk.access() == Access::ReadWrite) {
            let sectors = disk.capacity().get();
            let at = dice.below(sectors);
            let count = (dice.below(9) + 1).min(sectors - at);
            match dice.below(4) {
                0 => disk.discard(Lba::new(at), SectorCount::new(count)).expect("inside the disk"),
                _ => disk.write(Lba::new(at), &dice.bytes(count * 512)).expect("inside the disk"),
            }
        }
        let len = dice.below(100);
        self.guest.0 = DeviceState::from_bytes(dice.bytes(len));
    }

    pub fn fork(&mut self) -> ForkPoint<B> {
        self.vm.fork(&mut self.guest).expect("a fork")
    }
}

pub fn save<B: Backing>(point: &ForkPoint<B>, store: &CloneStore, text: &str) -> offshoot::store::Manifest {
    point.save(store, &name(text), &threads(2), &Job::new()).expect("it is saved")
}

pub fn load<B: Backing>(store: &CloneStore, text: &str, reading: Reading) -> ForkPoint<B> {
    ForkPoint::load(store, &name(text), reading, &threads(2), &Job::new()).expect("it comes back")
}

/// A store elsewhere, for disks that do not lie in the one that is tested.
pub fn elsewhere(temp: &Temp) -> DiskDir {
    std::fs::create_dir_all(&temp.0).expect("a directory");
    DiskDir::open(&temp.0, &Tree::default()).expect("it opens")
}
