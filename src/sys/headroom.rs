//! How much of what a process may have is left: descriptors and memory mappings.
//!
//! Owns the counting. It reads /proc (proc(5)), which costs by what the process holds: for threads that nobody waits for. Safe code.

use std::fs;

/// What is held of something, and how much may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Headroom {
    pub(crate) held: u64,
    pub(crate) limit: u64,
}

impl Headroom {
    /// Whether `more` can be had and `spare` left.
    pub(crate) fn allows(self, more: u64, spare: u64) -> bool {
        self.held.saturating_add(more).saturating_add(spare) <= self.limit
    }
}

/// Open descriptors against the soft RLIMIT_NOFILE; `None` where /proc cannot be read.
pub(crate) fn descriptors() -> Option<Headroom> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let soft = line.split_whitespace().next()?;
    let limit = if soft == "unlimited" { u64::MAX } else { soft.parse().ok()? };
    // One of them is the directory being read.
    let held = fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    Some(Headroom { held, limit })
}

/// Memory mappings against vm.max_map_count; `None` where /proc cannot be read.
pub(crate) fn mappings() -> Option<Headroom> {
    super::error::mapping_limit().map(|(held, limit)| Headroom { held, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_counted_here() {
        for room in [descriptors().unwrap(), mappings().unwrap()] {
            assert!(room.held > 0 && room.held < room.limit, "{room:?}");
            assert!(!room.allows(room.limit, 0) && room.allows(1, 0));
        }
    }
}
