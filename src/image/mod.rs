//! Images: pages that cannot change.
//!
//! [`Source`] is what an overlay reads through to: a raw file ([`FileImage`](crate::backing::FileImage)), or any sealed image of a backing. It has
//! no method that writes, and the overlay holds nothing else of it.

mod lineage;

pub(crate) use lineage::Lineage;

use std::ops::Range;

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

    /// The first bytes at or after `at` that may be other than zeroes, as far as that is known without reading any: where they begin and where
    /// they end. `None` where only zeroes follow. Whoever copies an image reads these and nothing between them, so a large image that is
    /// nearly empty costs by its data.
    ///
    /// The range is not empty, begins at `at` or later and ends in the image; what follows its end may be data too. An image that cannot tell
    /// says that all is data. Costs by what is skipped and found, in the units of the image's tables.
    ///
    /// ```
    /// use offshoot::{Tree, backing::{Backing, Cut, Heap}, image::Source, page::*};
    /// let disk: Heap = Heap::create(&Tree::default(), Geometry::new(ByteSize::gib(1 << 10), PageSize::KIB_4)?, None)?;
    /// disk.write(ByteOffset::new(5 << 30), &[7; 100])?;
    /// let (image, _) = disk.cut()?.commit();
    /// let found = image.next_data(ByteOffset::ZERO)?.expect("what was written");
    /// assert_eq!((found.start.get(), found.end.get()), (5 << 30, (5 << 30) + 4096));
    /// assert_eq!(image.next_data(found.end)?, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Source::read`].
    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        let end = ByteOffset::new(self.len().get());
        Ok((at < end).then_some(at..end))
    }
}
