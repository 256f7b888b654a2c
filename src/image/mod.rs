//! Images: pages that cannot change.
//!
//! [`Source`] is what an overlay reads through to: a raw file ([`FileImage`](crate::backing::FileImage)), or any sealed image of a backing. It has
//! no method that writes, and the overlay holds nothing else of it.

mod lineage;

pub(crate) use lineage::Lineage;

use crate::error::SpaceError;
use crate::page::{ByteOffset, ByteSize};

/// A read-only array of bytes that never changes while anybody holds it.
///
/// Implement it to put your own base under a disk. The contract: `read` of the same bytes gives the same bytes for as
/// long as the value lives; any number of threads read at once.
pub trait Source: Send + Sync + 'static {
    /// Its length.
    fn len(&self) -> ByteSize;

    /// Whether it holds nothing.
    fn is_empty(&self) -> bool {
        self.len() == ByteSize::ZERO
    }

    /// Fills `buf` from `at`.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] past the end; [`SpaceError::Image`] where the medium fails or has become shorter.
    /// On an error the content of `buf` is unspecified.
    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError>;
}
