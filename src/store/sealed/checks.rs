//! The checksums of a layer's pages that were needed so far.
//!
//! Looked up without a lock and without a reference count, since a read asks for them at each page. Must not know where they are read from.

use std::fmt;

use super::{CHECKS, Parts};
use crate::sync::OnceLock;

/// One block of them.
pub(super) type Checks = [u32; CHECKS as usize];

/// Blocks in a group: the checksums of 4 GiB.
const GROUP: u64 = 1024;

type Group = Box<[OnceLock<Box<Checks>>]>;

/// Blocks by number. Costs 16 bytes for each 4 GiB of data, 16 KiB for each of those that is touched, and 4 bytes for each page of the blocks kept.
pub(super) struct CheckTable(Box<[OnceLock<Group>]>);

impl CheckTable {
    pub(super) fn new(parts: Parts) -> Self {
        Self((0..parts.check_blocks().div_ceil(GROUP)).map(|_| OnceLock::new()).collect())
    }

    #[inline]
    pub(super) fn get(&self, number: u64) -> Option<&Checks> {
        let group = self.0[(number / GROUP) as usize].get()?;
        group[(number % GROUP) as usize].get().map(|checks| &**checks)
    }

    /// Keeps a block that was read. Where two did so at once, the first stays; they say the same.
    pub(super) fn keep(&self, number: u64, checks: Box<Checks>) -> &Checks {
        let group = self.0[(number / GROUP) as usize].get_or_init(|| (0..GROUP).map(|_| OnceLock::new()).collect());
        group[(number % GROUP) as usize].get_or_init(|| checks)
    }
}

impl fmt::Debug for CheckTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckTable").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_kept_apart_and_the_first_stays() {
        let table = CheckTable::new(Parts { data_pages: (GROUP + 1) * CHECKS, extents: 1 });
        for number in [0, GROUP - 1, GROUP] {
            assert!(table.get(number).is_none());
            table.keep(number, Box::new([number as u32; CHECKS as usize]));
            table.keep(number, Box::new([77; CHECKS as usize]));
        }
        for number in [0, GROUP - 1, GROUP] {
            assert_eq!(table.get(number).map(|checks| checks[9]), Some(number as u32));
        }
        assert!(table.get(1).is_none());
    }
}
