//! Reading and writing guest RAM by offset, from safe code.
//!
//! Owns the bounds checks between a guest-supplied offset and the copies of [`volatile`]. An access
//! out of range is an error, never a panic: a guest may name any address. It must not know guest-physical layout.
#![allow(unsafe_code)] // The copies take raw pointers, which the checks here make valid.

use super::mapping::Mapping;
use super::volatile::{self, Word};
use crate::page::{ByteOffset, GeometryError, PageRange};

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
    #[cfg(test)]
    pub(crate) fn store<T: Word>(&self, at: ByteOffset, value: T) -> Result<(), GeometryError> {
        let dst = self.bytes(at, size_of::<T>())?;
        // SAFETY: as in `write`.
        unsafe { volatile::store(dst, value) };
        Ok(())
    }
}
