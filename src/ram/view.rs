//! Guest memory on the heap backing with its lock taken once: the inner loop of a simulator.
//!
//! Only the heap has this: a mapped VM's CPUs use host pointers.

use super::layout::Placed;
use super::{Ram, RamError, RamLayout};
use crate::backing::{Heap, HeapView, PageBody, Word};
use crate::page::{ByteOffset, ByteSize, GuestAddress};

/// Access to guest memory for a batch of instructions. See [`HeapView`] for how long it may be held.
pub struct RamView<'a, B: PageBody> {
    layout: &'a RamLayout,
    /// The longest run of addresses, where nearly all accesses go: looked at first.
    longest: Placed,
    view: HeapView<'a, B>,
}

impl<B: PageBody> Ram<Heap<B>> {
    /// Takes the lock of the space for many accesses.
    ///
    /// # Errors
    /// [`RamError::Frozen`].
    ///
    /// ```
    /// use offshoot::{Tree, backing::Heap, page::*, ram::*};
    /// let ram: Ram<Heap> = Ram::create(&Tree::default(), RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?)?;
    /// let view = ram.view()?;
    /// for word in 0..100 {
    ///     view.store(GuestAddress::new(word * 4), word as u32)?;
    /// }
    /// assert_eq!(view.load::<u64>(GuestAddress::new(0))?, 1 << 32);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn view(&self) -> Result<RamView<'_, B>, RamError> {
        // The gate before the space, as a freeze takes them; once the view is held, a freeze waits for it.
        let _open = self.gate().enter().ok_or(RamError::Frozen)?;
        let view = self.space.view();
        Ok(RamView { layout: &self.layout, longest: self.layout.longest_span(), view })
    }
}

impl<B: PageBody> RamView<'_, B> {
    #[inline(always)]
    fn locate_word<T: Word>(&self, at: GuestAddress) -> Result<ByteOffset, RamError> {
        let size = ByteSize::new(T::SIZE as u64);
        match self.longest.locate(at, size) {
            Some(offset) => Ok(offset),
            None => self.locate_elsewhere(at, size),
        }
    }

    #[cold]
    fn locate_elsewhere(&self, at: GuestAddress, len: ByteSize) -> Result<ByteOffset, RamError> {
        self.layout.locate(at, len)
    }

    /// Loads one word.
    ///
    /// # Errors
    /// As [`Ram::read`].
    #[inline(always)]
    pub fn load<T: Word>(&self, at: GuestAddress) -> Result<T, RamError> {
        Ok(self.view.load(self.locate_word::<T>(at)?)?)
    }

    /// Stores one word.
    ///
    /// # Errors
    /// As [`Ram::write`].
    #[inline]
    pub fn store<T: Word>(&self, at: GuestAddress, value: T) -> Result<(), RamError> {
        Ok(self.view.store(self.locate_word::<T>(at)?, value)?)
    }

    /// Fills `buf` from guest memory.
    ///
    /// # Errors
    /// As [`Ram::read`].
    pub fn read(&self, at: GuestAddress, buf: &mut [u8]) -> Result<(), RamError> {
        Ok(self.view.read(self.layout.locate(at, ByteSize::new(buf.len() as u64))?, buf)?)
    }

    /// Writes `data` to guest memory.
    ///
    /// # Errors
    /// As [`Ram::write`].
    pub fn write(&self, at: GuestAddress, data: &[u8]) -> Result<(), RamError> {
        Ok(self.view.write(self.layout.locate(at, ByteSize::new(data.len() as u64))?, data)?)
    }

    /// Stores `new` if the word holds `expected`, in one sequentially consistent step; says what the word held.
    ///
    /// # Errors
    /// As [`HeapView::compare_exchange`], and [`RamError::Hole`].
    pub fn compare_exchange<T: Word>(&self, at: GuestAddress, expected: T, new: T) -> Result<T, RamError> {
        let offset = self.layout.locate(at, ByteSize::new(T::SIZE as u64))?;
        Ok(self.view.compare_exchange(offset, expected, new)?)
    }
}
