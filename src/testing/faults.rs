//! Failures on demand: the n-th system call that the engine makes on this thread fails.
//!
//! A test runs its scenario once for each `n` until one run makes fewer than `n` calls; after each it looks at what is left.
//!
//! ```
//! use offshoot::testing::faults::{self, Refusal};
//! use offshoot::{Tree, backing::{Backing, Heap}, page::*};
//! let geometry = Geometry::new(ByteSize::kib(64), PageSize::KIB_4)?;
//! let plan = faults::fail_nth_call(1, Refusal::OutOfMemory);
//! // The heap makes no system calls of its own, so nothing fails here.
//! let heap: Heap = Heap::create(&Tree::default(), geometry, None)?;
//! assert_eq!(plan.calls_seen(), 0);
//! # Ok::<(), offshoot::SpaceError>(())
//! ```

use rustix::io::Errno;

use crate::sys::fault::plan;

/// How a system call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// `ENOMEM`: no memory, or no mapping, is left.
    OutOfMemory,
    /// `EMFILE`: no descriptor is left.
    OutOfDescriptors,
    /// `ENOSPC`: the file system behind a memory file is full.
    NoSpace,
    /// `EIO`: the medium failed.
    Io,
    /// `ENOSYS`: this kernel does not have it.
    Unsupported,
    /// `EINTR`: a signal came first; the engine must try again.
    Interrupted,
}

/// A plan for this thread; dropping it ends the plan.
#[must_use = "the plan ends when this is dropped"]
pub struct Plan {
    _armed: plan::Guard,
}

/// Makes the `n`-th of the engine's system calls from now on this thread (from 1) fail once; with 0 none fails, and calls are counted.
/// Replaces an earlier plan of this thread.
pub fn fail_nth_call(n: u64, how: Refusal) -> Plan {
    let errno = match how {
        Refusal::OutOfMemory => Errno::NOMEM,
        Refusal::OutOfDescriptors => Errno::MFILE,
        Refusal::NoSpace => Errno::NOSPC,
        Refusal::Io => Errno::IO,
        Refusal::Unsupported => Errno::NOSYS,
        Refusal::Interrupted => Errno::INTR,
    };
    Plan { _armed: plan::arm(n, errno) }
}

impl Plan {
    /// How many calls this thread has made since the plan was armed. Fewer than `n`: every `n` has been tried.
    pub fn calls_seen(&self) -> u64 {
        plan::calls_seen()
    }
}
