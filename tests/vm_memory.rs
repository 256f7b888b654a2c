//! A parent and its clones, seen and changed through vm-memory as a rust-vmm VMM and its devices do.
#![cfg(all(feature = "vm-memory", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::collections::BTreeSet;
use std::io::Cursor;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use offshoot::backing::Mapped;
use offshoot::frontend::vm_memory::{KeepAlive, KeptMemory, lease};
use offshoot::page::{ByteSize, PageSize};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::{AtRest, CloneSpec, DeviceState, ForkPoint, Tree, Vm, VmName};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, Permissions,
};

const PAGE: u64 = 4096;
/// Two regions that touch, and one above a PCI gap.
const REGIONS: [(u64, u64); 3] = [(0, 64 * PAGE), (64 * PAGE, 64 * PAGE), (1 << 32, 32 * PAGE)];
/// Where the first two touch.
const SEAM: u64 = 64 * PAGE;
/// Where the hole begins.
const GAP: u64 = 128 * PAGE;
const HIGH: u64 = 1 << 32;
/// Past the last region.
const END: u64 = HIGH + 32 * PAGE;

/// A guest without vCPUs: the devices of these tests stand still whenever it forks.
fn idle() -> AtRest {
    AtRest(DeviceState::from_bytes([]))
}

fn parent() -> Vm<Mapped> {
    let region = |(start, len)| RamRegion { start: offshoot::page::GuestAddress::new(start), len: ByteSize::new(len) };
    let layout = RamLayout::new(&REGIONS.map(region), PageSize::KIB_4).unwrap();
    let vm = Vm::new(&Tree::default(), VmName::new("parent").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    vm
}

fn spawn(point: &ForkPoint<Mapped>) -> Vm<Mapped> {
    let clone = point.spawn(CloneSpec::default()).unwrap();
    clone.start().unwrap();
    clone
}

fn memory(vm: &Vm<Mapped>) -> KeptMemory {
    lease(vm.ram()).unwrap().guest_memory().unwrap()
}

/// A word by way of the engine.
fn engine(vm: &Vm<Mapped>, at: u64) -> u64 {
    vm.ram().load(offshoot::page::GuestAddress::new(at)).unwrap()
}

fn word(memory: &impl GuestMemory, at: u64) -> u64 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

fn put(memory: &impl GuestMemory, at: u64, value: u64) {
    memory.write_obj(value, GuestAddress(at)).unwrap();
}

#[test]
fn parent_and_clones_go_their_own_ways() {
    let vm = parent();
    let parent = memory(&vm);
    // Unaligned, across the two regions that touch, above the gap, and the very last word.
    let places = [0, 0x1003, SEAM - 3, HIGH, END - 8];
    places.iter().for_each(|&at| put(&parent, at, at ^ 0xaaaa));
    let point = vm.fork(&mut idle()).unwrap();
    let clones = [spawn(&point), spawn(&point)];
    let [a, b] = [memory(&clones[0]), memory(&clones[1])];
    for (n, &at) in places.iter().enumerate() {
        for memory in [&parent, &a, &b] {
            assert_eq!(word(memory, at), at ^ 0xaaaa);
        }
        put(&a, at, n as u64 + 100);
        assert_eq!([word(&parent, at), word(&b, at)], [at ^ 0xaaaa; 2], "a clone's write is its own");
        put(&parent, at, n as u64 + 300);
        b.store(n as u32 + 200, GuestAddress(at & !7), Ordering::Release).unwrap();
        assert_eq!(b.load::<u32>(GuestAddress(at & !7), Ordering::Acquire).unwrap(), n as u32 + 200);
        assert_eq!((word(&a, at), word(&parent, at)), (n as u64 + 100, n as u64 + 300));
        assert_eq!((engine(&clones[0], at), engine(&vm, at)), (n as u64 + 100, n as u64 + 300));
    }
    // And the other way: what the engine writes, vm-memory reads.
    clones[1].ram().store(offshoot::page::GuestAddress::new(0x2000), 77_u64).unwrap();
    assert_eq!((word(&b, 0x2000), word(&a, 0x2000)), (77, 0));
}

#[test]
fn regions_are_those_of_the_layout() {
    let vm = parent();
    let memory = memory(&vm);
    assert_eq!(memory.num_regions(), 3);
    assert_eq!(memory.last_addr(), GuestAddress(END - 1));
    for (region, range) in memory.iter().zip(vm.ram().host_ranges()) {
        assert_eq!((region.start_addr().0, region.len()), (range.guest.get(), range.len.get()));
        assert_eq!(region.get_host_address(MemoryRegionAddress(0)).unwrap(), range.host.as_ptr());
        assert_eq!((region.file_offset().is_some(), region.is_hugetlbfs()), (false, Some(false)));
        assert!(!region.owned());
    }
    let text = format!("{:?}", lease(vm.ram()).unwrap());
    assert!(text.contains("GuestAddress(0x100000000): ByteSize(0x20000)"), "{text}");
}

#[test]
fn holes_and_ends_are_errors() {
    let vm = parent();
    let memory = memory(&vm);
    for at in [GAP, HIGH - 8, END, u64::MAX] {
        let at = GuestAddress(at);
        assert!(matches!(memory.read_obj::<u8>(at), Err(GuestMemoryError::InvalidGuestAddress(_))), "{at:?}");
        assert!(memory.write_obj(1_u8, at).is_err());
        assert!(memory.load::<u64>(at, Ordering::Relaxed).is_err());
        assert!(memory.get_host_address(at).is_err());
        assert!(memory.find_region(at).is_none());
    }
    // What begins in RAM and runs into a hole is done in part, and says so.
    for end in [GAP, END] {
        let partial = memory.write_slice(&[7; 16], GuestAddress(end - 4));
        assert!(matches!(partial, Err(GuestMemoryError::PartialBuffer { expected: 16, completed: 4 })));
        assert_eq!(word(&memory, end - 8), 0x0707_0707 << 32);
        assert!(!GuestMemory::check_range(&memory, GuestAddress(end - 4), 16, Permissions::ReadWrite));
    }
    assert!(GuestMemory::check_range(&memory, GuestAddress(SEAM - 4), 16, Permissions::ReadWrite));
    // Atomic accesses are aligned and lie in one region.
    assert!(memory.store(1_u64, GuestAddress(SEAM - 4), Ordering::Relaxed).is_err());
    assert!(memory.store(1_u64, GuestAddress(12), Ordering::Relaxed).is_err());
}

#[test]
fn slices_run_across_regions_that_touch() {
    let vm = parent();
    let parent = memory(&vm);
    let pattern: Vec<u8> = (0..3 * PAGE).map(|n| (n % 251) as u8).collect();
    let at = GuestAddress(SEAM - PAGE - 5);
    parent.write_slice(&pattern, at).unwrap();
    let clone = spawn(&vm.fork(&mut idle()).unwrap());
    let memory = memory(&clone);
    let mut read = vec![0; pattern.len()];
    memory.read_slice(&mut read, at).unwrap();
    assert_eq!(read, pattern);
    let lens: Vec<usize> =
        GuestMemoryBackend::get_slices(&memory, at, pattern.len()).map(|s| s.unwrap().len()).collect();
    assert_eq!(lens, [PAGE as usize + 5, 2 * PAGE as usize - 5]);

    // Streams, as block and network devices have them.
    let mut out = Vec::new();
    memory.write_all_volatile_to(at, &mut out, pattern.len()).unwrap();
    assert_eq!(out, pattern);
    let reversed: Vec<u8> = pattern.iter().rev().copied().collect();
    memory.read_exact_volatile_from(at, &mut Cursor::new(&reversed), reversed.len()).unwrap();
    clone.ram().read(offshoot::page::GuestAddress::new(at.0), &mut read).unwrap();
    assert_eq!(read, reversed);
    parent.read_slice(&mut read, at).unwrap();
    assert_eq!(read, pattern);
}

#[test]
fn one_object_works_through_forks_and_resets() {
    let vm = parent();
    let parent = memory(&vm);
    let hosts = |memory: &KeptMemory| {
        memory.iter().map(|r| r.get_host_address(MemoryRegionAddress(0)).unwrap().addr()).collect::<Vec<_>>()
    };
    let homes = hosts(&parent);
    put(&parent, 0, 1);
    let first = vm.fork(&mut idle()).unwrap();
    put(&parent, 0, 2);
    put(&parent, HIGH, 20);

    let clone = spawn(&first);
    let own = memory(&clone);
    assert_eq!((word(&own, 0), word(&own, HIGH)), (1, 0));
    put(&own, 0, 3);
    put(&own, SEAM, 30);
    let second = clone.fork(&mut idle()).unwrap();
    assert_eq!((word(&own, 0), word(&own, SEAM)), (3, 30), "its own fork changes nothing");
    put(&own, 0, 4);
    put(&own, GAP - 8, 40);
    let third = clone.fork(&mut idle()).unwrap();
    put(&own, 0, 5);

    for (point, want) in [(&first, [1, 0, 0]), (&second, [3, 30, 0]), (&third, [4, 30, 40])] {
        let memory = memory(&spawn(point));
        assert_eq!([word(&memory, 0), word(&memory, SEAM), word(&memory, GAP - 8)], want);
        assert_eq!(word(&memory, HIGH), 0);
    }

    put(&own, GAP - 8, 50);
    clone.reset(&mut idle()).unwrap();
    assert_eq!([word(&own, 0), word(&own, SEAM), word(&own, GAP - 8)], [4, 30, 40], "back at the third");
    assert_eq!((engine(&clone, 0), engine(&clone, GAP - 8)), (4, 40));
    put(&own, 0, 6);
    assert_eq!((engine(&clone, 0), word(&memory(&clone), 0)), (6, 6));

    assert_eq!((word(&parent, 0), word(&parent, HIGH)), (2, 20));
    vm.reset(&mut idle()).unwrap();
    assert_eq!((word(&parent, 0), word(&parent, HIGH)), (1, 0));
    assert_eq!(hosts(&parent), homes);
    assert_eq!(hosts(&own), hosts(&memory(&clone)));
    clone.validate().unwrap();
}

#[test]
fn a_frozen_vms_memory_never_reaches_its_fork_point() {
    let vm = parent();
    let parent = memory(&vm);
    put(&parent, 0, 1);
    let point = vm.freeze(&mut idle()).unwrap();
    put(&parent, 0, 2);
    assert_eq!(word(&memory(&spawn(&point)), 0), 1);
}

#[test]
fn memory_outlives_its_vm() {
    let vm = parent();
    let unforked = memory(&vm);
    put(&unforked, HIGH, 8);
    drop(vm);
    assert_eq!(word(&unforked, HIGH), 8);
    put(&unforked, HIGH, 9);

    let vm = parent();
    let kept = memory(&vm);
    put(&kept, 0, 1);
    let clone = spawn(&vm.fork(&mut idle()).unwrap());
    let (a, b) = (memory(&clone), memory(&clone));
    put(&a, SEAM, 2);
    let tree = vm.tree().clone();
    drop((vm, clone));
    assert_eq!(tree.usage().vms, 0);
    for (n, memory) in [kept, a, b.clone(), b].into_iter().enumerate() {
        assert_eq!((word(&memory, 0), word(&memory, SEAM)), (1, if n == 0 { 0 } else { 2 }));
        put(&memory, HIGH, n as u64);
        assert_eq!(word(&memory, HIGH), n as u64);
    }
}

/// A device of the kind that virtio has: takes descriptors (address, length) from a ring and fills what they name.
fn serve<M: GuestMemoryBackend>(memory: &M, ring: GuestAddress, fill: u8) -> Result<u16, GuestMemoryError> {
    let produced: u16 = memory.load(ring, Ordering::Acquire)?;
    for n in 0..u64::from(produced) {
        let entry = ring.unchecked_add(16 + n * 16);
        let (at, len): (u64, u64) = (memory.read_obj(entry)?, memory.read_obj(entry.unchecked_add(8))?);
        for slice in memory.get_slices(GuestAddress(at), len as usize) {
            let slice = slice?;
            slice.write_slice(&vec![fill; slice.len()], 0)?;
        }
    }
    memory.store(produced, ring.unchecked_add(2), Ordering::Release)?;
    Ok(produced)
}

/// The same as the new trait has it, which knows permissions.
fn sum<M: GuestMemory>(memory: &M, at: GuestAddress, len: usize) -> Result<u64, GuestMemoryError> {
    let mut total = 0;
    for slice in memory.get_slices(at, len, Permissions::Read)? {
        let slice = slice?;
        let mut bytes = vec![0_u8; slice.len()];
        slice.copy_to(&mut bytes);
        total += bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    }
    Ok(total)
}

/// A device that holds on to its memory, as those of vm-virtio do.
struct Device<S: GuestAddressSpace> {
    space: S,
    ring: GuestAddress,
}

impl<S: GuestAddressSpace> Device<S> {
    fn kick(&self) -> u16 {
        let memory = self.space.memory();
        let produced: u16 = memory.load(self.ring, Ordering::Acquire).unwrap();
        memory.store(produced, self.ring.checked_add(2).unwrap(), Ordering::Release).unwrap();
        produced
    }
}

#[test]
fn devices_written_for_vm_memory_serve_clones() {
    let ring = GuestAddress(0x3000);
    let vm = parent();
    let parent = memory(&vm);
    for (n, (at, len)) in [(HIGH, 100_u64), (SEAM - 10, 20)].into_iter().enumerate() {
        put(&parent, ring.0 + 16 + n as u64 * 16, at);
        put(&parent, ring.0 + 24 + n as u64 * 16, len);
    }
    parent.store(2_u16, ring, Ordering::Release).unwrap();
    let point = vm.fork(&mut idle()).unwrap();
    let clones = [spawn(&point), spawn(&point)].map(|clone| memory(&clone));
    for (fill, clone) in (1..).zip(&clones) {
        assert_eq!(serve(clone, ring, fill).unwrap(), 2);
    }
    for (fill, clone) in (1..).zip(&clones) {
        assert_eq!(sum(clone, GuestAddress(HIGH), 200).unwrap(), fill * 100);
        assert_eq!(sum(clone, GuestAddress(SEAM - 50), 100).unwrap(), fill * 20);
    }
    assert_eq!((sum(&parent, GuestAddress(HIGH), 200).unwrap(), word(&parent, ring.0)), (0, 2));

    let [a, b] = clones;
    assert_eq!(Device { space: &a, ring }.kick(), 2);
    assert_eq!(Device { space: Rc::new(b), ring }.kick(), 2);
    let shared = Device { space: Arc::new(a), ring };
    let other = Device { space: shared.space.clone(), ring };
    std::thread::spawn(move || assert_eq!(other.kick(), 2)).join().unwrap();
    assert_eq!(shared.kick(), 2);
}

#[test]
fn device_threads_of_siblings_never_meet() {
    const ROUNDS: u64 = 200;
    let vm = parent();
    let point = vm.fork(&mut idle()).unwrap();
    std::thread::scope(|scope| {
        for own in 1..=4_u64 {
            let point = &point;
            scope.spawn(move || {
                let clone = spawn(point);
                let memory = Arc::new(memory(&clone));
                for round in 0..ROUNDS {
                    for (page, at) in [SEAM - PAGE, SEAM, HIGH].into_iter().enumerate() {
                        memory.write_obj([own, round, page as u64, at], GuestAddress(at + 8)).unwrap();
                    }
                    if round % 50 == 49 {
                        clone.fork(&mut idle()).unwrap();
                    }
                    for (page, at) in [SEAM - PAGE, SEAM, HIGH].into_iter().enumerate() {
                        let read: [u64; 4] = memory.read_obj(GuestAddress(at + 8)).unwrap();
                        assert_eq!(read, [own, round, page as u64, at]);
                    }
                }
            });
        }
    });
    assert_eq!(word(&memory(&vm), SEAM + 8), 0);
}

/// Which pages were written; its own slice, and shared by its clones.
#[derive(Clone, Debug, Default)]
struct Marks {
    pages: Arc<Mutex<BTreeSet<usize>>>,
    from: usize,
}

impl Marks {
    fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.pages.lock().unwrap()).into_iter().collect()
    }
}

impl WithBitmapSlice<'_> for Marks {
    type S = Self;
}

impl BitmapSlice for Marks {}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let page = |at| (self.from + at) / PAGE as usize;
        self.pages.lock().unwrap().extend(page(offset)..=page(offset + len.max(1) - 1));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.lock().unwrap().contains(&((self.from + offset) / PAGE as usize))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { pages: self.pages.clone(), from: self.from + offset }
    }
}

impl NewBitmap for Marks {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

/// Writes, and checks that exactly the pages written are marked; `marks` are those of the region at `SEAM`.
fn marked<B: Bitmap>(memory: &GuestMemoryMmap<B>, marks: &Marks) {
    marks.take();
    word(memory, SEAM + 5 * PAGE);
    assert!(marks.take().is_empty(), "reading marks nothing");
    put(memory, SEAM + 3 * PAGE - 4, 1);
    memory.store(1_u32, GuestAddress(SEAM + 7 * PAGE), Ordering::Relaxed).unwrap();
    memory.write_slice(&[1; 20], GuestAddress(SEAM - 10)).unwrap();
    put(memory, HIGH + 9 * PAGE, 1);
    let region = memory.find_region(GuestAddress(SEAM)).unwrap();
    assert!(region.get_mmap().bitmap().dirty_at(7 * PAGE as usize));
    assert!(GuestMemoryRegion::bitmap(region).slice_at(PAGE as usize).dirty_at(6 * PAGE as usize));
    let slice = region.get_slice(MemoryRegionAddress(8 * PAGE), 2 * PAGE as usize).unwrap();
    assert!(!slice.bitmap().dirty_at(0));
    slice.write_obj(5_u8, PAGE as usize).unwrap();
    assert!(slice.bitmap().dirty_at(PAGE as usize));
    // A caller that writes through a host pointer says so itself.
    region.get_mmap().bitmap().mark_dirty(11 * PAGE as usize, 1);
    assert_eq!(marks.take(), [0, 2, 3, 7, 9, 11]);
}

#[test]
fn bitmaps_mark_what_is_written() {
    let vm = parent();
    let clone = spawn(&vm.fork(&mut idle()).unwrap());
    let lease = || lease(clone.ram()).unwrap();
    let mut lens = Vec::new();
    let kept = lease().guest_memory_with(|len| {
        lens.push(len.get());
        Marks::default()
    });
    let kept: KeptMemory<Marks> = kept.unwrap();
    assert_eq!(lens, REGIONS.map(|(_, len)| len));
    let seam = |memory: &KeptMemory<Marks>| memory.find_region(GuestAddress(SEAM)).unwrap().get_mmap();
    // Through `KeepAlive`, as through the bitmap itself.
    marked(&kept, seam(&kept).bitmap());
    clone.fork(&mut idle()).unwrap();
    marked(&kept, seam(&kept).bitmap());
    clone.reset(&mut idle()).unwrap();
    marked(&kept, seam(&kept).bitmap());

    // The types that VMMs name which are not generic.
    let mut all = Vec::new();
    let leaked: GuestMemoryMmap<Option<Marks>> = lease()
        .leak(|_| {
            all.push(Marks::default());
            all.last().cloned()
        })
        .unwrap();
    marked(&leaked, &all[1]);
    assert_eq!(seam(&kept).bitmap().take(), [0_usize; 0], "each object has its own marks");
    drop(clone);
    marked(&leaked, &all[1]);
    marked(&kept, seam(&kept).bitmap());
}

#[test]
fn memory_can_be_plugged_in_and_out() {
    let vm = parent();
    let clone = spawn(&vm.fork(&mut idle()).unwrap());
    let memory: KeptMemory<Marks> = lease(clone.ram()).unwrap().guest_memory_with(|_| Marks::default()).unwrap();
    let plugged = GuestRegionMmap::<KeepAlive<Marks>>::from_range(GuestAddress(GAP), 0x4000, None).unwrap();
    let larger = memory.insert_region(Arc::new(plugged)).unwrap();
    larger.write_slice(&[3; 64], GuestAddress(GAP - 32)).unwrap();
    assert_eq!(engine(&clone, GAP - 8), 0x0303_0303_0303_0303);
    assert_eq!(word(&larger, GAP + 24), 0x0303_0303_0303_0303);
    assert!(larger.find_region(GuestAddress(GAP)).unwrap().get_mmap().bitmap().dirty_at(0));
    let (smaller, taken) = larger.remove_region(GuestAddress(HIGH), 32 * PAGE).unwrap();
    assert!(smaller.read_obj::<u8>(GuestAddress(HIGH)).is_err());
    drop((memory, larger, smaller, clone));
    taken.write_obj(1_u64, MemoryRegionAddress(0)).unwrap();
    assert_eq!(taken.read_obj::<u64>(MemoryRegionAddress(0)).unwrap(), 1);
}
