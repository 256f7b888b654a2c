//! Reading and writing guest RAM by offset, from safe code.
//!
//! Owns the bounds checks between a guest-supplied offset and the copies of [`volatile`]. An access
//! out of range is an error, never a panic: a guest may name any address. It must not know guest-physical layout.
#![allow(unsafe_code)] // The copies take raw pointers, which the checks here make valid.

use super::mapping::{Mapping, PAGE};
use super::volatile::{self, Word};
use crate::page::{ByteOffset, GeometryError, PageRange};

/// Why a compare-and-exchange did not store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum ExchangeError<T: std::fmt::Debug> {
    /// Not inside the mapping.
    #[error(transparent)]
    Range(GeometryError),
    /// Not a multiple of the word's size: the processor does not do these atomically.
    #[error("an atomic access must be aligned to its size")]
    Misaligned,
    /// The word holds this instead of what was expected.
    #[error("the word holds another value ({0:?})")]
    Differs(T),
}

impl Mapping {
    /// Copies bytes out of guest memory. Others may write meanwhile: bytes arrive old or new, in no order.
    ///
    /// # Errors
    /// Out of range: nothing was copied.
    #[inline]
    pub(crate) fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), GeometryError> {
        let src = self.bytes(at, buf.len())?;
        // SAFETY: `bytes` checked the range, which stays mapped while `self` is borrowed.
        unsafe { volatile::copy_in(src, buf) };
        Ok(())
    }

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// Out of range: nothing was copied.
    #[inline]
    pub(crate) fn write(&self, at: ByteOffset, buf: &[u8]) -> Result<(), GeometryError> {
        let dst = self.bytes(at, buf.len())?;
        // SAFETY: as in `read`; the mapping is writable.
        unsafe { volatile::copy_out(buf, dst) };
        Ok(())
    }

    /// Writes zeroes over pages. In a private view that breaks their sharing.
    ///
    /// # Errors
    /// Out of range: nothing was written.
    pub(crate) fn zero(&self, range: PageRange) -> Result<(), GeometryError> {
        let (dst, len) = self.span(range)?;
        // SAFETY: as in `write`.
        unsafe { volatile::fill_zero(dst, len) };
        Ok(())
    }

    /// Writes zeroes over bytes.
    ///
    /// # Errors
    /// Out of range: nothing was written.
    pub(crate) fn zero_bytes(&self, at: ByteOffset, len: usize) -> Result<(), GeometryError> {
        let dst = self.bytes(at, len)?;
        // SAFETY: as in `write`.
        unsafe { volatile::fill_zero(dst, len) };
        Ok(())
    }

    /// Copies pages to the same place of another mapping.
    ///
    /// # Errors
    /// Out of range in either: nothing was copied.
    pub(crate) fn copy_pages_to(&self, range: PageRange, target: &Self) -> Result<(), GeometryError> {
        let (src, len) = self.span(range)?;
        let (dst, _) = target.span(range)?;
        let mut page = [0; 4096];
        for offset in (0..len).step_by(page.len()) {
            // SAFETY: both spans were checked, are whole pages, and stay mapped while both are borrowed.
            unsafe {
                volatile::copy_in(src.add(offset), &mut page);
                volatile::copy_out(&page, dst.add(offset));
            }
        }
        debug_assert!(len.is_multiple_of(PAGE.bytes().get() as usize));
        Ok(())
    }

    /// Loads a word: one relaxed atomic access if aligned to its size, byte by byte otherwise. In the host's byte
    /// order.
    ///
    /// # Errors
    /// Out of range.
    #[inline]
    pub(crate) fn load<T: Word>(&self, at: ByteOffset) -> Result<T, GeometryError> {
        let src = self.bytes(at, size_of::<T>())?;
        // SAFETY: as in `read`.
        Ok(unsafe { volatile::load(src) })
    }

    /// Stores a word, as [`load`](Self::load) loads it.
    ///
    /// # Errors
    /// Out of range: nothing was stored.
    #[inline]
    pub(crate) fn store<T: Word>(&self, at: ByteOffset, value: T) -> Result<(), GeometryError> {
        let dst = self.bytes(at, size_of::<T>())?;
        // SAFETY: as in `write`.
        unsafe { volatile::store(dst, value) };
        Ok(())
    }

    /// Stores `new` if the word holds `expected`, in one sequentially consistent step. For simulators' atomic
    /// instructions.
    ///
    /// # Errors
    /// [`ExchangeError`]: nothing was stored.
    #[inline]
    pub(crate) fn compare_exchange<T: Word>(
        &self,
        at: ByteOffset,
        expected: T,
        new: T,
    ) -> Result<(), ExchangeError<T>> {
        let dst = self.bytes(at, size_of::<T>()).map_err(ExchangeError::Range)?;
        if !dst.addr().is_multiple_of(size_of::<T>()) {
            return Err(ExchangeError::Misaligned);
        }
        // SAFETY: as in `write`, and aligned.
        unsafe { volatile::compare_exchange(dst, expected, new) }.map_err(ExchangeError::Differs)
    }
}
