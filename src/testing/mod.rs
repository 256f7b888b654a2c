//! For tests, yours as well as ours (feature `testing`): a model that is too simple to be wrong, a conformance suite for backings
//! and base images, failures on demand, and a host that is as full as a test says.
//!
//! Whoever writes a [`Backing`](crate::backing::Backing) of their own runs the suite against it; it panics at the first rule that
//! is broken, and says which.
//!
//! ```
//! # struct MyBacking;
//! # type MyHeap = offshoot::backing::Heap;
//! // In your tests: `MyHeap` is your type.
//! offshoot::testing::conformance::backing::<MyHeap>();
//! // And for an image of your own, with what it must hold:
//! let image = offshoot::testing::ByteSource::new(vec![7; 5000]);
//! offshoot::testing::conformance::source(&image, &[7; 5000]);
//! ```
//!
//! Nothing here is compiled into a crate that does not ask for it. Must not be used by anything else in `src/`.

pub mod conformance;
#[cfg(unix)]
pub mod crash;
mod dice;
#[cfg(unix)]
pub mod faults;
mod guest;
mod host;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod live;
mod model;
mod pair;
mod skip;

pub use dice::Dice;
pub use guest::{Scripted, ScriptedGuest, Trouble};
pub use host::FakeHost;
pub use model::{ByteSource, Flat};
pub use skip::skip;
