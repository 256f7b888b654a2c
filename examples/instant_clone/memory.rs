//! What all clones together take: what the engine counts, beside what the kernel says of this process.

use offshoot::backing::Backing;
use offshoot::page::ByteSize;
use offshoot::{BoxError, Tree, Vm};

use crate::guest::PAGE;

/// Memory of all clones at the time when the parent is gone.
#[derive(Clone, Copy, Debug)]
pub struct MemoryReport {
    /// The whole process, each page counted once; `None` where the kernel does not tell.
    pub resident: Option<ByteSize>,
    /// Pages of RAM and disk that more than one VM may read, each counted once.
    pub shared: ByteSize,
    /// Pages of RAM and disk that one VM alone has.
    pub private: ByteSize,
    /// The engine's tables for those.
    pub tables: ByteSize,
    /// What each VM's RAM as a full copy would take.
    pub full_copies: ByteSize,
    /// How many VMs these are.
    pub vms: u64,
}

impl MemoryReport {
    pub fn measure<'a, R: Backing>(
        vms: impl Iterator<Item = &'a Vm<R>>,
        tree: &Tree,
        ram: ByteSize,
    ) -> Result<Self, BoxError> {
        let (mut count, mut ram_private, mut disk_private, mut tables) = (0, 0, 0, 0);
        for vm in vms {
            let usage = vm.usage()?;
            count += 1;
            ram_private += usage.ram.private.get() * PAGE as u64;
            tables += usage.ram.table_bytes.get();
            for (_, disk) in usage.disks {
                disk_private += disk.private.get() * PAGE as u64;
                tables += disk.table_bytes.get();
            }
        }
        // RAM of a simulated guest lies on the heap as disks do, that of a KVM guest in memory files.
        let heap = tree.usage().heap_pages.get() * PAGE as u64;
        let files = tree.memory_file_bytes().get();
        let private_on_heap = if tree.usage().memory_files == 0 { ram_private + disk_private } else { disk_private };
        Ok(Self {
            resident: resident(files),
            shared: ByteSize::new(heap.saturating_sub(private_on_heap) + files),
            private: ByteSize::new(ram_private + disk_private),
            tables: ByteSize::new(tables),
            full_copies: ByteSize::new(count * ram.get()),
            vms: count,
        })
    }

    pub fn private_of_each(&self) -> ByteSize {
        ByteSize::new(self.private.get() / self.vms.max(1))
    }
}

/// The proportional set size: a page that many mappings share counts once in all, where the resident set size would count
/// it for each. Memory files count whole, with the pages that no clone has looked at yet.
fn resident(files: u64) -> Option<ByteSize> {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let kib = |key: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(ByteSize::new((kib("Pss:")? - kib("Pss_Shmem:")?) * 1024 + files))
}
