//! The integer types: each names one unit, and none converts into another without saying so.
//!
//! Arithmetic is by named checked methods, because every one of these can come from a guest or a file.

/// Size of a disk sector in bytes: the unit of [`Lba`] and [`SectorCount`].
pub const SECTOR_SIZE: u64 = 512;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $suffix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The first index, the empty count, the zero size.
            pub const ZERO: Self = Self(0);

            /// Wraps a raw number of this unit.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number of this unit.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!("{}", $suffix), self.0)
            }
        }
    };
}

unit!(
    /// Index of a page within one space (all of a VM's RAM, or one disk), from 0.
    PageIndex,
    ""
);
unit!(
    /// A number of pages.
    PageCount,
    " pages"
);
unit!(
    /// A number of bytes.
    ByteSize,
    " bytes"
);
unit!(
    /// A byte position within one space, from its start.
    ByteOffset,
    ""
);
unit!(
    /// Guest frame number: a guest-physical address divided by the page size.
    Gfn,
    ""
);
unit!(
    /// A guest-physical address in bytes.
    GuestAddress,
    ""
);
unit!(
    /// Logical block address of a disk, in sectors of [`SECTOR_SIZE`] bytes.
    Lba,
    ""
);
unit!(
    /// A number of sectors of [`SECTOR_SIZE`] bytes.
    SectorCount,
    " sectors"
);

impl PageIndex {
    /// The index `count` pages further on, or `None` past the end of the number space.
    #[inline]
    pub const fn checked_add(self, count: PageCount) -> Option<Self> {
        match self.0.checked_add(count.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// How many pages lie from `start` up to this index; `None` if this index comes before it.
    #[inline]
    pub const fn distance_from(self, start: Self) -> Option<PageCount> {
        match self.0.checked_sub(start.0) {
            Some(n) => Some(PageCount(n)),
            None => None,
        }
    }
}

impl PageCount {
    /// The sum, or `None` on overflow.
    #[inline]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The sum, stuck at the largest count: for accounting, where a wrong huge number beats a panic.
    #[inline]
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, stuck at zero.
    #[inline]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// Whether this counts no page.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl ByteSize {
    /// `n` KiB. Saturates at the largest size.
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB. Saturates at the largest size.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB. Saturates at the largest size.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The sum, or `None` on overflow.
    #[inline]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl ByteOffset {
    /// The offset `size` bytes further on, or `None` past the end of the number space.
    #[inline]
    pub const fn checked_add(self, size: ByteSize) -> Option<Self> {
        match self.0.checked_add(size.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl GuestAddress {
    /// The address `size` bytes further on, or `None` past the end of the number space.
    #[inline]
    pub const fn checked_add(self, size: ByteSize) -> Option<Self> {
        match self.0.checked_add(size.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// How many bytes lie from `start` up to this address; `None` if this address comes before it.
    #[inline]
    pub const fn distance_from(self, start: Self) -> Option<ByteSize> {
        match self.0.checked_sub(start.0) {
            Some(n) => Some(ByteSize(n)),
            None => None,
        }
    }
}

impl Lba {
    /// The byte position of this sector, or `None` past the end of the number space.
    #[inline]
    pub const fn byte_offset(self) -> Option<ByteOffset> {
        match self.0.checked_mul(SECTOR_SIZE) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }
}

impl SectorCount {
    /// This many sectors in bytes, or `None` on overflow.
    #[inline]
    pub const fn byte_size(self) -> Option<ByteSize> {
        match self.0.checked_mul(SECTOR_SIZE) {
            Some(bytes) => Some(ByteSize(bytes)),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_refuses_to_wrap() {
        assert_eq!(PageIndex::new(u64::MAX).checked_add(PageCount::new(1)), None);
        assert_eq!(Lba::new(u64::MAX).byte_offset(), None);
        assert_eq!(SectorCount::new(8).byte_size(), Some(ByteSize::kib(4)));
        assert_eq!(GuestAddress::new(1).distance_from(GuestAddress::new(2)), None);
        assert_eq!(ByteSize::gib(u64::MAX), ByteSize::new(u64::MAX));
    }
}
