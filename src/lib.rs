//! Fork running virtual machines: RAM, disks and device state cut at one instant, and any number of clones that share
//! every page with their parent until one of them writes.
//!
//! A hypervisor or a simulator embeds this crate. It brings a guest that can be paused, saved and resumed ([`Guest`]);
//! the engine brings memory and disks that can be cut in microseconds, and clones that are born running, with no boot.
//!
//! ```
//! use offshoot::backing::Heap;
//! use offshoot::disk::{Access, Disk};
//! use offshoot::page::{ByteSize, GuestAddress, Lba, PageSize, SectorCount};
//! use offshoot::ram::RamLayout;
//! use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, Guest, Limits, Tree, Vm, VmName};
//!
//! // A machine with one register, which a real embedder's vCPUs and devices stand in for.
//! struct Machine {
//!     register: u8,
//! }
//!
//! impl Guest for Machine {
//!     fn pause(&mut self) -> Result<(), BoxError> {
//!         Ok(()) // stop the vCPU threads, drain I/O
//!     }
//!     fn save(&mut self) -> Result<DeviceState, BoxError> {
//!         Ok(DeviceState::from_bytes(vec![self.register]))
//!     }
//!     fn resume(&mut self) -> Result<(), BoxError> {
//!         Ok(())
//!     }
//! }
//!
//! // A VM with 1 GiB of RAM and a disk of 64 GiB. Nothing is allocated until it is written.
//! let tree = Tree::new(Limits::default());
//! let disk = Disk::blank(&tree, SectorCount::new(128 << 20), Access::ReadWrite)?;
//! let layout = RamLayout::flat(ByteSize::gib(1), PageSize::KIB_4)?;
//! let parent: Vm<Heap> = Vm::new(&tree, VmName::new("web")?, layout, vec![(DiskName::new("root"), disk)])?;
//! let mut machine = Machine { register: 7 };
//! parent.start()?;
//! parent.ram().store(GuestAddress::new(0x1000), 1u64)?;
//!
//! // Fork it while it runs. The parent goes on; the fork point never changes.
//! let point = parent.fork(&mut machine)?;
//! parent.ram().store(GuestAddress::new(0x1000), 2u64)?;
//!
//! // Clones start at that instant, each with an identity of its own, customized before anybody can run it.
//! let clone = point.spawn_with(CloneSpec::default(), |clone| {
//!     Ok(clone.ram().write(GuestAddress::new(0x2000), &clone.identity().mac.bytes())?)
//! })?;
//! let mut its_machine = Machine { register: clone.device_state().expect("a clone has one").encode()[0] };
//! clone.start()?;
//! assert_eq!((its_machine.register, clone.ram().load::<u64>(GuestAddress::new(0x1000))?), (7, 1));
//! clone.disk("root").expect("as its parent").write(Lba::new(0), &[9; 512])?;
//!
//! // Nobody depends on the parent, and a clone can be forked like any VM.
//! drop(parent);
//! let grandchild = clone.fork(&mut its_machine)?.spawn(CloneSpec::default())?;
//! assert_eq!(grandchild.ram().load::<u64>(GuestAddress::new(0x1000))?, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which backing
//!
//! | | [`backing::Heap`] | [`backing::Mapped`] |
//! |---|---|---|
//! | for | simulators, fuzzing, in-memory disks | hypervisors: vCPUs use host pointers |
//! | where | everywhere, safe Rust | Linux, x86-64 and AArch64 |
//! | a fork costs | one reference count, whatever was written | first: page tables moved aside; later: a copy of what was written |
//! | a first write costs | an allocation and a copy in user space | the kernel's own fault |
//!
//! # What it does not do
//!
//! It contains no hypervisor, device model or network; it does not migrate between hosts while a guest runs. What is to survive the process is kept in files: disks of
//! [`store`], and with feature `store` whole fork points (`ForkPoint::save`). Feature
//! `kvm` captures and restores KVM machines, feature `vm-memory` gives a clone's RAM to rust-vmm code, feature `nbd` serves
//! disks to hypervisors over the Network Block Device protocol, feature `qemu` forks and clones unmodified QEMU processes, feature `imago` reads and writes disk images, feature `testing`
//! has the conformance suite for backings of your own.

mod account;
mod admission;
pub mod backing;
pub mod disk;
mod error;
pub mod frontend;
mod gate;
pub mod image;
mod overlay;
pub mod page;
pub mod ram;
#[cfg(unix)]
pub mod store;
mod sync;
mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vm;

pub use account::{Limits, TreeUsage, Usage};
pub use admission::{Admission, AdmissionError, HostCheck, MemoryLimit};
pub use backing::{Prefault, Prefaulted, Tree, WorkingSet};
pub use error::{ImageError, SpaceError, StoreError, SystemError};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use vm::Relocate;
pub use vm::{
    AtRest, BoxError, BuildError, CloneSpec, CommitError, Config, DeviceState, DiskName, Fallback, ForkError,
    ForkPoint, ForkTimings, GenerationId, Guest, Identity, IdentityError, IllegalState, MacAddress, PointDiff,
    PrecopyEnd, PrecopyRound, PrecopyTimings, PutOff, ResetError, Rewind, SpawnError, StateObject, Teardown, Uuid, Vm,
    VmName, VmStatus, VmUsage,
};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use vm::{LivePolicy, OnExceeded};
#[cfg(all(feature = "store", unix))]
pub use vm::{Reading, SavedError};

/// The README's example is compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
