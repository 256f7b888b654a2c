//! Memory for many pages at once, which starts where a page of memory does: the system copies into it faster than across the boundaries.

use super::super::record::BLOCK;
use crate::page::PageCount;

/// Room for so many pages.
pub(super) struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    pub(super) fn new(pages: PageCount) -> Self {
        let len = pages.get() as usize * BLOCK;
        let memory = vec![0; len + BLOCK];
        // Where nothing can be said of addresses, the boundary is anywhere.
        let start = memory.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { memory, start, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_at_a_page() {
        for count in [0, 1, 100] {
            let mut buffer = PageBuffer::new(PageCount::new(count));
            buffer.bytes_mut().fill(7);
            assert_eq!(buffer.bytes(), vec![7; count as usize * BLOCK]);
            assert_eq!(buffer.bytes().as_ptr().align_offset(BLOCK), 0);
        }
    }
}
