//! Fork running virtual machines: RAM, disks and device state cut at one instant, and any number of clones that share
//! every page with their parent until one of them writes.

mod account;
pub mod backing;
pub mod disk;
mod error;
pub mod image;
mod overlay;
pub mod page;
pub mod ram;
mod sync;

pub use account::{Limits, TreeUsage, Usage};
pub use backing::Tree;
pub use error::{ImageError, SpaceError, SystemError};
