//! Fork running virtual machines: RAM, disks and device state cut at one instant, and any number of clones that share
//! every page with their parent until one of them writes.

mod account;
pub mod backing;
pub mod disk;
mod error;
pub mod frontend;
pub mod image;
mod overlay;
pub mod page;
pub mod ram;
mod sync;
mod sys;
mod vm;

pub use account::{Limits, TreeUsage, Usage};
pub use backing::Tree;
pub use error::{ImageError, SpaceError, SystemError};
pub use vm::{
    BoxError, BuildError, CloneSpec, CommitError, Config, DeviceState, DiskName, ForkError, ForkPoint, ForkTimings,
    GenerationId, Guest, Identity, IdentityError, IllegalState, MacAddress, PointDiff, ResetError, Rewind, SpawnError,
    StateObject, Teardown, Uuid, Vm, VmName, VmStatus, VmUsage,
};
