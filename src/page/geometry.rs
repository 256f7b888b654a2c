//! The shape of one space: its page size and its length, and the checks that keep every access inside it.
//!
//! Pure arithmetic. Every offset that a guest or a caller names goes through [`Geometry::check`] or
//! [`Geometry::check_pages`] once, at the face, so that the code below may index without asking again.

use super::{ByteOffset, ByteSize, PageCount, PageIndex, PageRange};

/// Size of a page: a power of two from 4 KiB to 2 MiB. The granule of sharing: a first write copies this much.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageSize {
    shift: u32,
}

/// A size or a range that cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// Not a power of two within the limits.
    #[error("page size {0} is not a power of two from 4096 to 2097152 bytes")]
    PageSize(ByteSize),
    /// A space of no bytes.
    #[error("a space must hold at least one page")]
    Empty,
    /// A length that is not a whole number of pages.
    #[error("length {len} is not a multiple of the page size {page_size}")]
    Misaligned {
        /// The length asked for.
        len: ByteSize,
        /// The page size it must be a multiple of.
        page_size: ByteSize,
    },
    /// More than [`Geometry::MAX_LEN`].
    #[error("length {len} is over the limit of {limit}")]
    TooLarge {
        /// The length asked for.
        len: ByteSize,
        /// The limit.
        limit: ByteSize,
    },
    /// An access that ends past the end.
    #[error("{len} at offset {at} end past the end of a space of {space}")]
    OutOfRange {
        /// Where the access starts.
        at: ByteOffset,
        /// How long it is.
        len: ByteSize,
        /// How long the space is.
        space: ByteSize,
    },
}

impl PageSize {
    /// 4 KiB, the default.
    pub const KIB_4: Self = Self { shift: 12 };
    /// 2 MiB, the largest.
    pub const MIB_2: Self = Self { shift: 21 };

    /// Checks a page size.
    ///
    /// # Errors
    /// [`GeometryError::PageSize`] unless it is a power of two from 4 KiB to 2 MiB.
    pub const fn new(size: ByteSize) -> Result<Self, GeometryError> {
        let bytes = size.get();
        if bytes.is_power_of_two() && bytes >= 1 << 12 && bytes <= 1 << 21 {
            Ok(Self { shift: bytes.trailing_zeros() })
        } else {
            Err(GeometryError::PageSize(size))
        }
    }

    /// In bytes.
    #[inline]
    pub const fn bytes(self) -> ByteSize {
        ByteSize::new(1 << self.shift)
    }

    /// The base-2 logarithm of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        self.shift
    }

    /// The page that holds a byte; drops the position within it.
    #[inline]
    pub const fn page_of(self, at: ByteOffset) -> PageIndex {
        PageIndex::new(at.get() >> self.shift)
    }

    /// The first byte of a page. A page past the end of the number space saturates.
    #[inline]
    pub const fn start_of(self, page: PageIndex) -> ByteOffset {
        ByteOffset::new(page.get().saturating_mul(1 << self.shift))
    }

    /// This many pages in bytes. Saturates.
    #[inline]
    pub const fn size_of(self, count: PageCount) -> ByteSize {
        ByteSize::new(count.get().saturating_mul(1 << self.shift))
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self::KIB_4
    }
}

/// A space's page size and length.
///
/// ```
/// use offshoot::page::{ByteOffset, ByteSize, Geometry, PageSize};
/// let geometry = Geometry::new(ByteSize::mib(1), PageSize::KIB_4)?;
/// assert_eq!(geometry.pages().get(), 256);
/// assert!(geometry.check(ByteOffset::new(1 << 20), ByteSize::new(1)).is_err());
/// # Ok::<(), offshoot::page::GeometryError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    page_size: PageSize,
    pages: PageCount,
}

impl Geometry {
    /// The longest space: 64 TiB, half of what an x86-64 process can map.
    pub const MAX_LEN: ByteSize = ByteSize::gib(64 << 10);

    /// Checks a length against a page size.
    ///
    /// # Errors
    /// [`GeometryError::Empty`], [`GeometryError::TooLarge`] or [`GeometryError::Misaligned`].
    pub const fn new(len: ByteSize, page_size: PageSize) -> Result<Self, GeometryError> {
        if len.get() == 0 {
            return Err(GeometryError::Empty);
        }
        if len.get() > Self::MAX_LEN.get() {
            return Err(GeometryError::TooLarge { len, limit: Self::MAX_LEN });
        }
        if !len.get().is_multiple_of(page_size.bytes().get()) {
            return Err(GeometryError::Misaligned { len, page_size: page_size.bytes() });
        }
        Ok(Self { page_size, pages: PageCount::new(len.get() >> page_size.shift()) })
    }

    /// The page size.
    #[inline]
    pub const fn page_size(self) -> PageSize {
        self.page_size
    }

    /// How many pages there are.
    #[inline]
    pub const fn pages(self) -> PageCount {
        self.pages
    }

    /// The length in bytes.
    #[inline]
    pub const fn len(self) -> ByteSize {
        self.page_size.size_of(self.pages)
    }

    /// Never: a space holds at least one page. Here because `len` is.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// All pages.
    #[inline]
    pub const fn all(self) -> PageRange {
        PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(self.pages.get()))
    }

    /// Checks that `len` bytes from `at` lie inside.
    ///
    /// # Errors
    /// [`GeometryError::OutOfRange`].
    #[inline]
    pub const fn check(self, at: ByteOffset, len: ByteSize) -> Result<(), GeometryError> {
        match at.checked_add(len) {
            Some(end) if end.get() <= self.len().get() => Ok(()),
            _ => Err(GeometryError::OutOfRange { at, len, space: self.len() }),
        }
    }

    /// Checks that a range of pages lies inside.
    ///
    /// # Errors
    /// [`GeometryError::OutOfRange`].
    #[inline]
    pub const fn check_pages(self, range: PageRange) -> Result<(), GeometryError> {
        if range.end().get() <= self.pages.get() {
            return Ok(());
        }
        Err(GeometryError::OutOfRange {
            at: self.page_size.start_of(range.start()),
            len: self.page_size.size_of(range.count()),
            space: self.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_outside_the_limits_are_named() {
        for bad in [0, 1, 4095, 4097, 2048, 12288, 4 << 20, u64::MAX] {
            assert_eq!(PageSize::new(ByteSize::new(bad)), Err(GeometryError::PageSize(ByteSize::new(bad))));
        }
        assert_eq!(PageSize::new(ByteSize::mib(2)), Ok(PageSize::MIB_2));
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let page = PageSize::KIB_4;
        assert_eq!(Geometry::new(ByteSize::ZERO, page), Err(GeometryError::Empty));
        assert!(matches!(Geometry::new(ByteSize::new(4097), page), Err(GeometryError::Misaligned { .. })));
        assert!(matches!(Geometry::new(ByteSize::new(u64::MAX), page), Err(GeometryError::TooLarge { .. })));
    }

    #[test]
    fn an_access_may_touch_the_end_and_not_pass_it() {
        let g = Geometry::new(ByteSize::kib(8), PageSize::KIB_4).unwrap();
        assert_eq!(g.check(ByteOffset::new(8192), ByteSize::ZERO), Ok(()));
        assert!(g.check(ByteOffset::new(8192), ByteSize::new(1)).is_err());
        assert!(g.check(ByteOffset::new(u64::MAX), ByteSize::new(2)).is_err());
        assert!(g.check_pages(PageRange::from_bounds(PageIndex::new(1), PageIndex::new(3))).is_err());
    }
}
