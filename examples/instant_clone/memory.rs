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
        let (mut count, mut private, mut tables) = (0, 0, 0);
        for vm in vms {
            let usage = vm.usage()?;
            count += 1;
            for space in std::iter::once(usage.ram).chain(usage.disks.into_iter().map(|(_, disk)| disk)) {
                private += space.private.get() * PAGE as u64;
                tables += space.table_bytes.get();
            }
        }
        let pages = tree.usage().heap_pages.get() * PAGE as u64;
        Ok(Self {
            resident: resident(),
            shared: ByteSize::new(pages.saturating_sub(private)),
            private: ByteSize::new(private),
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
/// it for each.
fn resident() -> Option<ByteSize> {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(ByteSize::kib(kib))
}
