//! The pages that a guest wrote, from KVM's log, as the engine counts pages.
//!
//! What the log holds: every page that a vCPU wrote, and that the kernel wrote for the guest (the paravirtual clock, say). What it does
//! not hold: writes of this process, through host addresses or [`Ram::write`](crate::ram::Ram::write). It knows slots and bits, not what
//! the pages are for.

use crate::page::{PageCount, PageIndex, PageRange, PageSet};
use crate::sys::kvm::Slot;

/// A log as it was read, and what was read and not yet handed out.
#[derive(Default)]
pub(super) struct Log {
    bits: Vec<u64>,
    pending: PageSet,
}

impl Log {
    /// Reads the log of a slot, which clears it there.
    pub(super) fn fetch(&mut self, slot: &Slot, pages: PageCount) -> std::io::Result<()> {
        self.bits.resize(pages.get().div_ceil(64) as usize, 0);
        slot.read_log(&mut self.bits)?;
        let read = set_of(&self.bits);
        self.pending = if self.pending.runs().len() == 0 { read } else { self.pending.union(&read) };
        Ok(())
    }

    /// Hands out what was read.
    pub(super) fn take(&mut self) -> PageSet {
        std::mem::take(&mut self.pending)
    }
}

/// The set bits as pages. Most words of a log are zero: they are passed over eight at a time.
fn set_of(bits: &[u64]) -> PageSet {
    let mut set = PageSet::new();
    for (block, words) in bits.chunks(8).enumerate() {
        if words.iter().fold(0, |any, word| any | word) == 0 {
            continue;
        }
        for (at, &word) in words.iter().enumerate() {
            let first = (block * 8 + at) as u64 * 64;
            let mut rest = word;
            while rest != 0 {
                let start = rest.trailing_zeros();
                let len = (rest >> start).trailing_ones();
                set.push(range(first + u64::from(start), first + u64::from(start + len)));
                rest &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            }
        }
    }
    set
}

/// Appends the logged pages of a slot to a set of the space's: `first` is where the slot starts in the space, in the kernel's pages, and
/// a page of the space has `size` of them.
pub(super) fn append(to: &mut PageSet, logged: &PageSet, first: u64, size: u64) {
    for run in logged.runs() {
        let (start, end) = ((first + run.start().get()) / size, (first + run.end().get()).div_ceil(size));
        // Two runs may meet in one page of the space.
        let covered = to.runs().last().map_or(0, |last| last.end().get());
        to.push(range(start.max(covered), end.max(covered)));
    }
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        pages.into_iter().map(PageIndex::new).collect()
    }

    #[test]
    fn every_bit_is_its_page() {
        let mut words = vec![0; 20];
        assert_eq!(set_of(&words), PageSet::new());
        let pages = [0, 1, 62, 63, 64, 127, 128, 129, 511, 512, 700, 1279];
        pages.iter().for_each(|page| words[page / 64] |= 1 << (page % 64));
        assert_eq!(set_of(&words), set(pages.map(|page| page as u64)));
        assert_eq!(set_of(&[u64::MAX; 9]), set(0..576));
    }

    #[test]
    fn pages_of_the_space_may_be_larger() {
        let mut all = PageSet::new();
        append(&mut all, &set([0, 3, 4, 5, 30]), 0, 4);
        append(&mut all, &set([0, 1]), 64, 4);
        assert_eq!(all, set([0, 1, 7, 16]));
        let mut same = PageSet::new();
        append(&mut same, &set([1, 2, 9]), 10, 1);
        assert_eq!(same, set([11, 12, 19]));
    }
}
