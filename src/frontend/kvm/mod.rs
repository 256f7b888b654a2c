//! Fork of whole KVM machines: capture and restore of every vCPU and every device that the kernel emulates, and memory
//! slots over a clone's RAM. Linux on x86-64, feature `kvm`.
//!
//! It knows `kvm-ioctls` descriptors that the embedder made, and nothing of the engine's images, overlays and forks:
//! a [`MachineState`] is opaque to them.
//!
//! | file | what it owns |
//! |---|---|
//! | `host.rs` | [`KvmHost`]: what is asked of the host once |
//! | `support.rs` | [`KvmSupport`]: which calls this host lacks, by name |
//! | `build.rs` | [`VmBuilder`]: the order of creation that is fast |
//! | `shell.rs` | [`Shell`]: a machine made ahead of need, over a hole in the address space |
//! | `shell_pool.rs` | [`ShellPool`]: shells in store, refilled in the background |
//! | `ram.rs` | [`RamSlot`]: guest memory that keeps its host memory alive |
//! | `dirty.rs` | the pages that a guest wrote, from KVM's log |
//! | `prefault.rs` | [`prefault_second_level`]: page tables of the guest's, filled ahead |
//! | `exit.rs` | [`finish_exit`]: bringing a vCPU to rest |
//! | `machine.rs` | [`MachinePlan`], [`MachineState`]: the order between vCPUs and chips |
//! | `vcpu.rs`, `core.rs`, `msr.rs`, `chips.rs` | one vCPU, its registers, the machine's devices |
//! | `encode.rs`, `decode.rs` | the stable bytes |
//! | `diff.rs` | where two states differ, by name |
//! | `count.rs` | numbers of vCPUs and of shells |
//! | `call.rs`, `error.rs` | names of calls, errors with advice |
//!
//! # A clone from nothing to its first instruction
//!
//! From a `state` that [`MachineState::capture`] read, once per fork point:
//!
//! ```no_run
//! use offshoot::frontend::kvm::{AnonymousRam, DirtyLog, KvmHost, MachineState, SlotNumber, VmBuilder};
//! use offshoot::page::{ByteSize, GuestAddress};
//!
//! # fn first_exit(state: &MachineState) -> Result<(), Box<dyn std::error::Error>> {
//! let host = KvmHost::open()?;                        // once per process
//! let ram = AnonymousRam::new(ByteSize::mib(1))?;     // a clone's RAM
//! let mut clone = VmBuilder::new(&host)?
//!     .ram(SlotNumber::new(0), GuestAddress::new(0), ram, DirtyLog::Off)?
//!     .devices(state.devices())?
//!     .vcpus(state.vcpu_count())?;
//! clone.restore(&host, state)?;
//! let first_exit = clone.vcpus_mut()[0].run()?;
//! # let _ = first_exit;
//! # Ok(())
//! # }
//! ```

mod build;
mod call;
mod chips;
mod core;
mod count;
mod decode;
mod diff;
mod dirty;
mod encode;
mod error;
mod exit;
mod host;
mod machine;
mod msr;
mod prefault;
mod ram;
mod shell;
mod shell_pool;
mod support;
mod vcpu;

pub use build::{KvmMachine, VmBuilder, VmWithDevices};
pub use call::KvmCall;
pub use chips::{Clock, Devices, Irqchips, Pit};
pub use count::{ShellCount, VcpuCount};
pub use diff::{Difference, Part};
pub use encode::{FORMAT_VERSION, MAX_ENCODED_SIZE};
pub use error::{DecodeError, KvmError};
pub use exit::finish_exit;
pub use host::KvmHost;
pub use machine::{MachinePlan, MachineState, Omission};
pub use msr::{MsrIndex, MsrPlan};
pub use prefault::{SecondLevel, prefault_second_level};
pub use ram::{AnonymousRam, DirtyLog, HostMemory, RamSlot, SlotNumber};
pub use shell::{Shell, ShellError, ShellShape};
pub use shell_pool::{PoolLimits, PoolStats, ShellPool};
pub use support::{KvmSupport, MissingCall};
pub use vcpu::{Target, VcpuIndex};

type Errno = kvm_ioctls::Error;

/// Turns a refused call on the machine into an error that names it.
fn machine_error(call: KvmCall) -> impl Fn(Errno) -> KvmError {
    move |errno| KvmError::Machine { call, source: std::io::Error::from_raw_os_error(errno.errno()) }
}

/// Turns a refused call on a vCPU into an error that names both.
fn vcpu_error(call: KvmCall, vcpu: VcpuIndex) -> impl Fn(Errno) -> KvmError {
    move |errno| KvmError::Vcpu { call, vcpu, source: std::io::Error::from_raw_os_error(errno.errno()) }
}

/// The same for the calls that `sys` issues.
fn io_error(call: KvmCall, vcpu: VcpuIndex) -> impl Fn(std::io::Error) -> KvmError {
    move |source| KvmError::Vcpu { call, vcpu, source }
}
