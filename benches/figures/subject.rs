//! What is measured: spaces and VMs of a given size, filled, and a guest that does nothing. Must not measure.

use offshoot::backing::{Backing, Cut};
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteOffset, ByteSize, Geometry, Lba, PageIndex, PageSize, SECTOR_SIZE, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, ForkPoint, Guest, Limits, Tree, Vm, VmName};

use super::report::{Outcome, Skip};
use super::sample::Random;

pub const PAGE: u64 = 4096;

/// A tree that no number of samples exhausts.
pub fn tree() -> Tree {
    Tree::new(Limits { depth: u32::MAX - 1, ..Limits::default() })
}

/// "64 MiB", "8 GiB".
pub fn size_name(size: ByteSize) -> String {
    let mib = size.get() >> 20;
    if mib >= 1024 && mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

pub fn geometry(len: ByteSize) -> Result<Geometry, Skip> {
    Ok(Geometry::new(len, PageSize::KIB_4)?)
}

/// The first byte of a page.
pub fn at(page: u64) -> ByteOffset {
    PageSize::KIB_4.start_of(PageIndex::new(page))
}

/// A space of `len`, nothing written.
pub fn empty<B: Backing>(len: ByteSize) -> Result<B, Skip> {
    Ok(B::create(&tree(), geometry(len)?, None)?)
}

/// Writes every page of a space, each with other bytes.
pub fn fill<B: Backing>(space: &B) -> Result<(), Skip> {
    let mut random = Random::new(1);
    let mut page = [0; PAGE as usize];
    for index in 0..space.geometry().pages().get() {
        for chunk in page.as_chunks_mut::<8>().0 {
            *chunk = random.next().to_ne_bytes();
        }
        space.write(at(index), &page)?;
    }
    Ok(())
}

/// Cuts a space and does at once what the cut put off.
pub fn cut<B: Backing>(space: &B) -> Result<B::Sealed, Skip> {
    let (image, deferred) = space.cut()?.commit();
    drop(deferred);
    Ok(image)
}

/// A guest that has nothing to stop and little to save: the engine's own cost.
pub struct Idle;

impl Guest for Idle {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(vec![0x11; 16 << 10]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A running VM: RAM of `len` all written, a disk of 64 GiB with some sectors written.
pub fn running<B: Backing>(len: ByteSize) -> Result<Vm<B>, Skip> {
    let tree = tree();
    let disk = Disk::blank(&tree, SectorCount::new(ByteSize::gib(64).get() / SECTOR_SIZE), Access::ReadWrite)?;
    for step in 0..256 {
        disk.write(Lba::new(step << 19), &[3; SECTOR_SIZE as usize])?;
    }
    let layout = RamLayout::flat(len, PageSize::KIB_4)?;
    let vm = Vm::new(&tree, VmName::new("parent")?, layout, vec![(DiskName::new("root"), disk)])?;
    fill(vm.ram().space())?;
    vm.start()?;
    Ok(vm)
}

/// A fork point of such a VM, which is gone.
pub fn fork_point<B: Backing>(len: ByteSize) -> Result<ForkPoint<B>, Skip> {
    let point = running(len)?.fork(&mut Idle)?;
    point.teardown().wait();
    Ok(point)
}

pub fn spawned<B: Backing>(point: &ForkPoint<B>, count: u64) -> Result<Vec<Vm<B>>, Skip> {
    (0..count).map(|_| Ok(point.spawn(CloneSpec::default())?)).collect()
}

/// Says no where a figure of this size would push the machine out of memory.
///
/// # Errors
/// [`Skip`], which says how much is missing.
pub fn needs_memory(len: ByteSize) -> Outcome {
    let Ok(meminfo) = std::fs::read_to_string("/proc/meminfo") else { return Ok(()) };
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    let (needed, available) = (len.get() + (1 << 30), kib.map_or(u64::MAX, |kib| kib * 1024));
    if needed <= available {
        return Ok(());
    }
    Err(Skip::new(format!("needs {needed} bytes of free memory, and {available} are available: try --quick")))
}
