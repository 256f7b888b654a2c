//! Unmodified QEMU processes as guests: launched, forked in full, and cloned.
//!
//! RAM of the parent is a memory file of the engine's, which QEMU maps shared; its disks are exports of [`nbd`](super::nbd). A fork
//! stops QEMU, has it save its devices, and cuts RAM and all disks at that instant. A clone is a QEMU process over the sealed file, mapped
//! privately, with overlays of the disks, that goes on from the parent's next instruction. `docs/qemu.md` has the stages and what they
//! cost, and what is refused and why.
//!
//! ```no_run
//! use offshoot::disk::{Access, Disk};
//! use offshoot::frontend::qemu::*;
//! use offshoot::page::{ByteSize, SectorCount};
//! use offshoot::{DiskName, Tree, VmName};
//!
//! let tree = Tree::default();
//! let disk = Disk::blank(&tree, SectorCount::new(1 << 20), Access::ReadWrite)?;
//! let kernel = Kernel { image: "/boot/vmlinuz".into(), initrd: None, command_line: "console=ttyS0 root=/dev/vda".into() };
//! let spec = QemuSpec { kernel: Some(kernel), nic: Nic::User, ..QemuSpec::new(ByteSize::mib(512)) };
//! let mut parent = QemuVm::launch(&tree, VmName::new("web")?, spec, vec![(DiskName::new("root"), disk)], None)?;
//! // … once it has booted:
//! let point = parent.fork(AfterFork::Continue)?;
//! println!("stood still for {:?}", point.timings().engine.stopped());
//! let clones = (0..20).map(|_| point.spawn(QemuClone::default())).collect::<Result<Vec<_>, _>>()?;
//! for clone in &clones {
//!     println!("{} is process {}, its agent at {}", clone.vm().identity().name, clone.pid()?, clone.agent_socket().display());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Inside: `spec` and `command` know arguments, `qmp` and `version` the control socket, `stream` saved states, `private_pages` another
//! process's memory, `process` one QEMU, `family` directories and exports; `guest`, `vm` and `point` are the engine's side;
//! `agent` is the host's end of an agent in the guest, and `prep` customizes a clone through it before anyone can reach it.

mod agent;
mod command;
mod error;
mod family;
mod guest;
mod parked;
mod point;
mod prep;
mod private_pages;
mod process;
mod qmp;
mod spec;
mod stream;
mod version;
mod vm;

pub use agent::{AgentClient, AgentError};
pub use command::AGENT_PORT;
pub use error::QemuError;
pub use guest::QemuForkTimings;
pub use parked::Parked;
pub use point::{AtBirth, QemuClone, QemuPoint, QemuShell, QemuSpawnTimings};
pub use prep::{Prep, PrepError};
pub use qmp::QmpError;
/// What QMP is made of.
pub use serde_json::{Value, json};
pub use spec::{Accelerator, Board, Deadlines, Kernel, Nic, QemuSpec};
pub use stream::StreamError;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub use stream::fuzz as fuzz_stream;
pub use version::{QemuVersion, VersionError};
pub use vm::{AfterFork, LinkState, QemuVm};
