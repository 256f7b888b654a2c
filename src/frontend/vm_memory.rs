//! A VM's RAM as rust-vmm's `GuestMemory`: devices, loaders and whole VMMs built on vm-memory use a clone unchanged.
//!
//! ```text
//!   Ram<Mapped> ──lease──▶ RamLease ──guest_memory──▶ GuestMemoryMmap<KeepAlive<B>>   keeps itself mapped
//!                                   ──leak──────────▶ GuestMemoryMmap<B>              stays mapped until the process exits
//!                                   ──unowned───────▶ GuestMemoryMmap<B>              unsafe: as long as the lease lives
//! ```
//!
//! Knows where the regions of RAM lie in this process; must not know how they are mapped, nor anything of forks.
//!
//! # What holds
//! - The same object goes on working through every [`Vm::fork`](crate::Vm::fork) and reset of its VM, in which devices
//!   must stand still, as [`Guest`](crate::Guest) says; memory slots registered from it stay right.
//! - What is written through vm-memory is the VM's own memory: its fork points hold it from then on, siblings never see it.
//! - Regions that touch stay two regions, as vm-memory has it: accesses run across, but `get_slice` of one region and
//!   atomic accesses do not. Holes are errors.
//! - The memory may outlive its VM. It then shows the VM's last content and can still be written.
//!
//! # What does not
//! - [`Vm::fork_relocating`](crate::Vm::fork_relocating) moves the VM away from the addresses of every lease, and is refused with
//!   [`SpaceError::Leased`] while there is one. Drop them, and what was made of them, before the call, and take new ones after it; a
//!   VM with a [`leak`](RamLease::leak)ed lease is never moved.
//! - A VM that was frozen is not protected from writes through vm-memory. Its fork point is.
//! - Regions have no `file_offset`: a clone's memory is no file that others could map, so vhost-user back ends and
//!   others that are handed descriptors cannot use it. vhost in the kernel works on addresses. What pins pages (VFIO)
//!   must let go of them before a fork or reset, which put others in their place.
//! - A bitmap sees what is written through vm-memory. What vCPUs write, only the hypervisor's log has; what
//!   [`Ram::write`] writes, neither.
//! - vm-memory's `xen` feature, which replaces its regions by others, cannot be on in the same build.

pub use crate::sys::vm_memory::{KeepAlive, KeptMemory, RamLease, VmMemoryError};

use crate::backing::Mapped;
use crate::error::SpaceError;
use crate::ram::Ram;

/// Takes a VM's RAM for vm-memory. Costs one reference a region and no system call; any number of leases may exist.
///
/// # Errors
/// [`SpaceError::System`] where the content of this RAM was lost.
///
/// ```
/// use offshoot::{*, backing::Mapped, frontend::vm_memory::lease, page::*, ram::*};
/// use vm_memory::{Bytes, GuestAddress, GuestMemory};
///
/// /// Any code over vm-memory, such as a device.
/// fn next_ticket(memory: &impl GuestMemory, at: GuestAddress) -> Result<u64, vm_memory::GuestMemoryError> {
///     let ticket: u64 = memory.read_obj(at)?;
///     memory.write_obj(ticket + 1, at)?;
///     Ok(ticket)
/// }
///
/// let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
/// let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("desk")?, layout, vec![])?;
/// let parent = lease(vm.ram())?.guest_memory()?;
/// let counter = GuestAddress(0x1000);
/// parent.write_obj(40u64, counter)?;
///
/// vm.start()?;
/// let clone = vm.fork(&mut AtRest(DeviceState::from_bytes([])))?.spawn(CloneSpec::default())?;
/// let memory = lease(clone.ram())?.guest_memory()?;
/// assert_eq!(next_ticket(&memory, counter)?, 40);
/// assert_eq!(next_ticket(&memory, counter)?, 41);
/// assert_eq!(next_ticket(&parent, counter)?, 40); // through the fork, and on its own from there
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lease(ram: &Ram<Mapped>) -> Result<RamLease, SpaceError> {
    let regions = ram.layout().regions();
    let ranges = regions.map(|(region, offset)| Ok((region.start, ram.space().lease(offset, region.len)?)));
    Ok(RamLease::new(ranges.collect::<Result<_, SpaceError>>()?))
}
