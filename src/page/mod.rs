//! Units and geometry: which page, how many, how large.
//!
//! Owns the integer types that cross module boundaries, and the arithmetic on them. It is pure: no I/O,
//! allocation beyond a set's own runs, no knowledge of images, overlays or guests. An index, a count, a size and
//! an address are different types, and the conversions between them are methods that either refuse or say what they drop.

mod geometry;
#[macro_use]
mod number;
mod range;
mod set;
mod zero;

pub use geometry::{Geometry, GeometryError, PageSize};
pub use number::{ByteOffset, ByteSize, Gfn, GuestAddress, Lba, PageCount, PageIndex, SECTOR_SIZE, SectorCount};
pub use range::PageRange;
pub use set::PageSet;
/// Makes an integer type of one unit, for the modules that count what this one does not know.
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) use unit;
pub(crate) use zero::is_zero;
