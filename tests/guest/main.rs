//! Stock Linux in unmodified QEMU, forked: who its clones are, how they are made so before anyone can reach them, and whether a workload that
//! writes to memory, page cache and disk all the time can tell that it was forked.
//!
//! Where a tool is missing its test says so and passes, unless OFFSHOOT_REQUIRE=all is set: then it fails.
#![cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]

mod boot;
#[path = "../../examples/common/guest_image/mod.rs"]
mod guest_image;
mod identity;
mod image;
mod prep;
mod standing;
mod workload;
