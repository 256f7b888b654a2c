//! Power cuts on demand: a folder in memory that records every call, and the states of it that a cut could leave behind.
//!
//! A [`Recorder`] is a [`Folder`](crate::store::Folder) for [`DiskDir::over`](crate::store::DiskDir::over). Its [`Log`] replays what was done up to any
//! call, with any part of what was not synced lost: each unsynced write sector by sector, each new length, hole and name on its own, in any
//! combination. A test opens each state with the code that ships and looks at what it finds.
//!
//! ```
//! use offshoot::testing::crash::{Recorder, Tearing};
//! use offshoot::{Tree, backing::Backing, page::*, store::DiskDir};
//! let recorder = Recorder::new();
//! let dir = DiskDir::over(recorder.folder(), &Tree::default());
//! let disk = dir.create(Geometry::new(ByteSize::kib(64), PageSize::KIB_4)?, None)?;
//! disk.write(ByteOffset::new(100), b"durable")?;
//! disk.flush()?;
//! let acknowledged = recorder.log().len();
//! for state in recorder.log().states_at(acknowledged, Tearing::Sectors, 1, 64) {
//!     let dir = DiskDir::over(state.folder(), &Tree::default());
//!     let mut found = [0; 7];
//!     dir.open_disk(disk.id(), None)?.read(ByteOffset::new(100), &mut found)?;
//!     assert_eq!(&found, b"durable");
//! }
//! # Ok::<(), offshoot::SpaceError>(())
//! ```

mod content;
mod log;
mod recorder;

pub use log::{Log, SyncOf, Tearing};
pub use recorder::{Fault, Recorder};
