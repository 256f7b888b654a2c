//! What the kernel says an address range costs: the check on our own accounts.
//!
//! Owns the parsing of /proc/self/smaps (proc(5)), in safe code. Slow, since the kernel describes every mapping of
//! the process: for tests and reports, never for polling.

use std::fs::File;
use std::io::{BufRead, BufReader};

use rustix::io::Errno;

use super::error::SysError;
use super::fault::Call;
use super::mapping::Mapping;
use crate::page::ByteSize;

/// Memory of one address range, as the kernel counts it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct MemoryUse {
    /// Kernel mappings that lie in the range, wholly or in part.
    pub(crate) mappings: u64,
    /// Resident in this process.
    pub(crate) resident: ByteSize,
    /// Resident, each page divided by how often it is mapped.
    pub(crate) proportional: ByteSize,
    /// Mapped here and nowhere else, and never written since read from its file.
    pub(crate) private_clean: ByteSize,
    /// Mapped here and nowhere else, and written. Includes pages of a file that nobody else maps.
    pub(crate) private_dirty: ByteSize,
    /// Mapped more than once, not written.
    pub(crate) shared_clean: ByteSize,
    /// Mapped more than once, written.
    pub(crate) shared_dirty: ByteSize,
    /// Not of a file: the pages whose sharing was broken.
    pub(crate) anonymous: ByteSize,
    /// Swapped out.
    pub(crate) swapped: ByteSize,
}

impl Mapping {
    /// What this mapping costs, summed over its kernel mappings. Walks all page tables of the process: milliseconds.
    ///
    /// # Errors
    /// No /proc, or one that reads otherwise than proc(5) says.
    pub(crate) fn memory_use(&self) -> Result<MemoryUse, SysError> {
        let start = self.base().addr().get() as u64;
        let unreadable =
            |error: std::io::Error| SysError::new(Call::Open, Errno::from_io_error(&error).unwrap_or(Errno::IO));
        let file = File::open("/proc/self/smaps").map_err(unreadable)?;
        sum(BufReader::new(file), start, start.saturating_add(self.len().get())).map_err(unreadable)
    }
}

/// Sums the entries that meet `start..end`.
fn sum(smaps: impl BufRead, start: u64, end: u64) -> std::io::Result<MemoryUse> {
    let mut total = MemoryUse::default();
    let mut inside = false;
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        if let Some((from, to)) = addresses(first) {
            inside = from < end && start < to;
            total.mappings += u64::from(inside);
        } else if inside {
            let field = match first {
                "Rss:" => &mut total.resident,
                "Pss:" => &mut total.proportional,
                "Private_Clean:" => &mut total.private_clean,
                "Private_Dirty:" => &mut total.private_dirty,
                "Shared_Clean:" => &mut total.shared_clean,
                "Shared_Dirty:" => &mut total.shared_dirty,
                "Anonymous:" => &mut total.anonymous,
                "Swap:" => &mut total.swapped,
                _ => continue,
            };
            let kib = second.parse().map_err(|_| std::io::ErrorKind::InvalidData)?;
            *field = ByteSize::new(field.get().saturating_add(ByteSize::kib(kib).get()));
        }
    }
    Ok(total)
}

/// The first word of an entry's head, `7f00-7f10`; `None` for the fields below it.
fn addresses(word: &str) -> Option<(u64, u64)> {
    let (from, to) = word.split_once('-')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageIndex, PageRange};
    use crate::sys::mapping::{PAGE, Placement, Populate};
    use crate::sys::memfd::Memfd;

    #[test]
    fn entries_outside_the_range_do_not_count() {
        let text = "1000-3000 rw-p 00000000 00:01 7   /memfd:a (deleted)\nSize:   8 kB\nRss:   8 kB\nAnonymous:   4 kB\n\
                    VmFlags: rd wr\n3000-4000 rw-p 00000000 00:01 8\nRss:   4 kB\nPrivate_Dirty:   4 kB\n";
        let total = sum(text.as_bytes(), 0x1000, 0x3000).unwrap();
        assert_eq!((total.mappings, total.resident, total.anonymous), (1, ByteSize::kib(8), ByteSize::kib(4)));
        assert_eq!(total.private_dirty, ByteSize::ZERO);
        assert_eq!(sum(text.as_bytes(), 0x2000, 0x3001).unwrap().resident, ByteSize::kib(12));
        assert!(sum("1-2 r\nRss: much kB\n".as_bytes(), 0, 9).is_err());
    }

    #[test]
    fn broken_sharing_is_anonymous_memory() {
        let len = ByteSize::mib(1);
        let file = Memfd::create("offshoot-test", len).unwrap().seal_all().unwrap();
        let [a, b] = [(); 2].map(|()| Mapping::map_private(&file, len, Placement::Anywhere).unwrap());
        for mapping in [&a, &b] {
            mapping.populate(mapping.geometry().all(), Populate::Read).unwrap();
        }
        PageRange::from_bounds(PageIndex::new(3), PageIndex::new(10))
            .iter()
            .for_each(|page| a.store(PAGE.start_of(page), 1_u8).unwrap());
        let (used, other) = (a.memory_use().unwrap(), b.memory_use().unwrap());
        assert_eq!((used.mappings, used.resident, used.anonymous), (1, len, ByteSize::kib(28)));
        assert_eq!((other.anonymous, other.resident), (ByteSize::ZERO, len));
    }
}
