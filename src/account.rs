//! What a fork tree holds, counted as it is made and dropped, and the limits that hold it.
//!
//! A [`Ledger`] is shared by a VM, its clones and their fork points. Whatever is charged to it gives itself back on drop, so the
//! totals are exact and a leak is a number that does not return to where it was. Counters only: no locks, no
//! knowledge of what a page or a layer is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use crate::admission::Pass;
use crate::admission::{Admission, AdmissionError, Gate, HostView, Needs};
use crate::page::{ByteSize, PageCount};
use crate::sys::headroom::ThisHost;

/// Limits on one fork tree. Reaching one is an error that names it; nothing is changed by the call that failed.
///
/// ```
/// use offshoot::{Limits, page::PageCount};
/// let limits = Limits { heap_pages: PageCount::new(1000), ..Limits::default() };
/// assert!(limits.mappings_per_vm >= 1);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Pages that the heap backing may hold, all relatives together.
    pub heap_pages: PageCount,
    /// Kernel mappings that one VM's RAM may be made of; the process as a whole may have `vm.max_map_count`. An image in more pieces is
    /// gathered in the background, and a spawn that comes before waits for it. A fork is refused where not even one piece of all that was
    /// ever written would do.
    pub mappings_per_vm: u64,
    /// Sealed layers, each a descriptor, that one image of mapped RAM may lie on. Refused at the fork.
    pub layers_per_image: u32,
    /// Layers of an image over which the smaller half of them is merged in the background, while VMs run.
    pub merge_over_layers: u32,
    /// Kernel mappings of an image over which its smallest pieces are gathered in the background, gaps between them included. Each
    /// costs a spawn about 1.6 µs; gathering copies pages, the more the fewer pieces are to be left.
    pub merge_over_mappings: u64,
    /// Forks between a VM and its first ancestor. Refused at the fork, never at a read.
    pub depth: u32,
    /// Bytes of device state that one fork point may carry. State kept as an object is the embedder's own memory, and is not limited.
    pub device_state: ByteSize,
    /// VMs alive at once, clones and parents.
    pub vms: u64,
    /// What must stay free in this process and on this host.
    pub admission: Admission,
}

impl Default for Limits {
    /// No bound on heap pages, depth or VMs, 8,192 mappings a VM, 256 layers an image; merging over 32 layers or 2,048 mappings; 256 MiB
    /// of device state, and admission as it is by default.
    fn default() -> Self {
        Self {
            heap_pages: PageCount::new(u64::MAX),
            mappings_per_vm: 8192,
            layers_per_image: 256,
            merge_over_layers: 32,
            merge_over_mappings: 2048,
            depth: u32::MAX,
            device_state: ByteSize::mib(256),
            vms: u64::MAX,
            admission: Admission::default(),
        }
    }
}

/// What one space (a VM's RAM, or one disk) holds, in pages of its own page size. Every page is counted once:
/// `private + shared + zero` is the whole space.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Pages written since this VM's last fork point: nobody else reads them.
    pub private: PageCount,
    /// Pages read from sealed layers or the base image.
    pub shared: PageCount,
    /// Pages that read as zeroes and take no memory: discarded, or never written with nothing below.
    pub zero: PageCount,
    /// Bytes of the tables that this VM alone has made since its last fork point.
    pub table_bytes: ByteSize,
    /// Sealed layers that hold the shared pages.
    pub layers: u32,
    /// Fork points between this space and its first ancestor.
    pub depth: u32,
}

/// What a whole fork tree holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TreeUsage {
    /// VMs alive.
    pub vms: u64,
    /// Fork points that somebody still names.
    pub fork_points: u64,
    /// Sealed images (one per space and cut) that somebody still names.
    pub images: u64,
    /// Sealed memory files alive.
    pub memory_files: u64,
    /// Pages alive on the heap, private and shared together.
    pub heap_pages: PageCount,
    /// Kernel mappings that clones alive were spawned with, and those of second views that pages are copied back from; those counted for the
    /// embedder included.
    pub clone_mappings: u64,
    /// Descriptors of sealed memory files, and those counted for the embedder of clones alive.
    pub descriptors: u64,
    /// What clones alive are expected to write in all: [`Admission::private_per_clone`] each.
    pub expected: ByteSize,
}

/// The counters of one fork tree.
#[derive(Debug)]
pub(crate) struct Ledger {
    limits: Limits,
    gate: Arc<Gate>,
    vms: AtomicU64,
    fork_points: AtomicU64,
    images: AtomicU64,
    memory_files: AtomicU64,
    heap_pages: AtomicU64,
    /// Who can say how much memory the sealed files take. Touched when a file is made, and by polls.
    files: Mutex<Vec<Weak<dyn Allocated>>>,
}

/// Something whose memory the kernel allocates page by page, and can count.
pub(crate) trait Allocated: Send + Sync + std::fmt::Debug {
    fn allocated(&self) -> ByteSize;
}

/// A thing that a [`Ledger`] counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Item {
    Vm,
    ForkPoint,
    Image,
    MemoryFile,
    HeapPage,
}

/// One counted thing; gives itself back on drop.
#[derive(Debug)]
pub(crate) struct Charge {
    ledger: Arc<Ledger>,
    item: Item,
}

/// A VM that was let in, and what it takes; gives itself back on drop.
#[derive(Debug)]
pub(crate) struct Seat {
    ledger: Arc<Ledger>,
    needs: Needs,
}

/// What a memory file takes.
const FILE: Needs = Needs { memory: ByteSize::ZERO, mappings: 0, descriptors: 1 };

impl Ledger {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Self::on(limits, Arc::new(ThisHost::default()))
    }

    /// The counters of a tree on a host that is looked at in this way.
    pub(crate) fn on(limits: Limits, host: Arc<dyn HostView>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            gate: Gate::new(limits.admission, host),
            vms: AtomicU64::new(0),
            fork_points: AtomicU64::new(0),
            images: AtomicU64::new(0),
            memory_files: AtomicU64::new(0),
            heap_pages: AtomicU64::new(0),
            files: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    fn counter(&self, item: Item) -> &AtomicU64 {
        match item {
            Item::Vm => &self.vms,
            Item::ForkPoint => &self.fork_points,
            Item::Image => &self.images,
            Item::MemoryFile => &self.memory_files,
            Item::HeapPage => &self.heap_pages,
        }
    }

    pub(crate) fn charge(self: &Arc<Self>, item: Item) -> Charge {
        self.counter(item).fetch_add(1, Ordering::Relaxed);
        if item == Item::MemoryFile {
            self.gate.count(FILE);
        }
        Charge { ledger: self.clone(), item }
    }

    /// Charges a heap page, or `None` at the limit.
    pub(crate) fn charge_heap_page(self: &Arc<Self>) -> Option<Charge> {
        take_one(&self.heap_pages, self.limits.heap_pages.get()).ok()?;
        Some(Charge { ledger: self.clone(), item: Item::HeapPage })
    }

    /// Lets a VM in that takes `needs`.
    ///
    /// # Errors
    /// [`AdmissionError`], with nothing counted.
    pub(crate) fn admit_vm(self: &Arc<Self>, needs: Needs) -> Result<Seat, AdmissionError> {
        let limit = self.limits.vms;
        take_one(&self.vms, limit).map_err(|held| AdmissionError::Vms { held, limit })?;
        if let Err(refused) = self.gate.take(needs) {
            self.vms.fetch_sub(1, Ordering::Relaxed);
            return Err(refused);
        }
        Ok(Seat { ledger: self.clone(), needs })
    }

    /// What a clone takes whose spaces are made of `mappings` kernel mappings and that is made ready to write `ready`.
    pub(crate) fn needs_of_clone(&self, mappings: u64, ready: ByteSize) -> Needs {
        let rules = self.gate.rules();
        Needs {
            memory: rules.private_per_clone.max(ready),
            mappings: mappings.saturating_add(rules.mappings_per_clone),
            descriptors: rules.descriptors_per_clone,
        }
    }

    /// Whether there is room for one more memory file.
    ///
    /// # Errors
    /// [`AdmissionError`].
    pub(crate) fn check_room_for_file(&self) -> Result<(), AdmissionError> {
        self.gate.check(FILE)
    }

    /// Lets a view of a clone in beside the one that it was spawned with.
    ///
    /// # Errors
    /// [`AdmissionError`], with nothing counted.
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn admit_view(&self, mappings: u64) -> Result<Pass, AdmissionError> {
        self.gate.pass(Needs { memory: ByteSize::ZERO, mappings, descriptors: 0 })
    }

    /// Remembers a memory file for [`Ledger::file_bytes`]; forgets those that are gone.
    pub(crate) fn register_file(&self, file: Weak<dyn Allocated>) {
        let mut files = self.files.lock();
        // Room for as many again keeps the forgetting at a constant cost a file, however many are left.
        if files.len() == files.capacity() {
            files.retain(|file| file.strong_count() > 0);
            let left = files.len();
            files.reserve(left + 1);
        }
        files.push(file);
    }

    pub(crate) fn file_bytes(&self) -> ByteSize {
        let files: Vec<_> = self.files.lock().iter().filter_map(Weak::upgrade).collect();
        ByteSize::new(files.iter().map(|file| file.allocated().get()).sum())
    }

    pub(crate) fn usage(&self) -> TreeUsage {
        let read = |item| self.counter(item).load(Ordering::Relaxed);
        let counted = self.gate.counted();
        TreeUsage {
            vms: read(Item::Vm),
            fork_points: read(Item::ForkPoint),
            images: read(Item::Image),
            memory_files: read(Item::MemoryFile),
            heap_pages: PageCount::new(read(Item::HeapPage)),
            clone_mappings: counted.mappings,
            descriptors: counted.descriptors,
            expected: counted.memory,
        }
    }
}

/// Counts one more unless there are `limit`; the error says how many there are. In one step: of two threads at the last one, one gets it,
/// never both and never neither.
fn take_one(counter: &AtomicU64, limit: u64) -> Result<u64, u64> {
    let take = |held: u64| (held < limit).then_some(held + 1);
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.ledger.gate.give_back(self.needs);
        self.ledger.counter(Item::Vm).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.item == Item::MemoryFile {
            self.ledger.gate.give_back(FILE);
        }
        self.ledger.counter(self.item).fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_at_the_limit_get_all_of_it() {
        let ledger = Ledger::new(Limits { heap_pages: PageCount::new(1), ..Limits::default() });
        for _ in 0..200 {
            let start = std::sync::Barrier::new(2);
            let charge = || {
                start.wait();
                ledger.charge_heap_page()
            };
            let got =
                std::thread::scope(|scope| [scope.spawn(charge), scope.spawn(charge)].map(|it| it.join().unwrap()));
            assert_eq!(got.iter().flatten().count(), 1);
        }
    }

    #[derive(Debug)]
    struct File;

    impl Allocated for File {
        fn allocated(&self) -> ByteSize {
            ByteSize::kib(4)
        }
    }

    #[test]
    fn files_that_are_gone_are_forgotten_now_and_then() {
        let ledger = Ledger::new(Limits::default());
        let register = || {
            let file: Arc<dyn Allocated> = Arc::new(File);
            ledger.register_file(Arc::downgrade(&file));
            file
        };
        let kept: Vec<_> = (0..64).map(|_| register()).collect();
        (0..10_000).for_each(|_| drop(register()));
        assert_eq!(ledger.file_bytes(), ByteSize::kib(4 * kept.len() as u64));
        assert!(ledger.files.lock().capacity() < 1000);
    }

    #[test]
    fn charges_return_and_the_limit_holds() {
        let ledger = Ledger::new(Limits { heap_pages: PageCount::new(2), ..Limits::default() });
        let first = ledger.charge_heap_page();
        let second = ledger.charge_heap_page();
        assert!(first.is_some() && second.is_some() && ledger.charge_heap_page().is_none());
        assert_eq!(ledger.usage().heap_pages.get(), 2);
        drop(first);
        assert!(ledger.charge_heap_page().is_some());
        drop(second);
        assert_eq!(ledger.usage(), TreeUsage::default());
    }
}
