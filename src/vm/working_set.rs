//! The pages that a VM touched, for the next clone to have mapped ahead.

use super::Vm;
use crate::backing::{Backing, Prefaulted, WorkingSet};
use crate::error::SpaceError;

impl<B: Backing> Vm<B> {
    /// The pages of RAM that a clone touched since it was spawned: take it when the clone has done what clones do first, and give it to the next
    /// ones as [`CloneSpec::prefault`](crate::CloneSpec).
    ///
    /// On the mapped backing a page counts as read where the kernel has mapped it, which it does for up to 16 pages around
    /// one that is read; before Linux 6.7 pages that were only read are not known. The heap sees writes only. What a reset undid is
    /// not in it, what was only read before it is; for a VM that was cut itself, it is what was touched since its first cut, or since it was
    /// moved. Costs by the page tables in use; the guest may run.
    ///
    /// # Errors
    /// As [`Backing::working_set`].
    ///
    /// ```
    /// # use offshoot::{*, backing::Heap, page::*, ram::*};
    /// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
    /// # let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("web")?, layout, vec![])?;
    /// # vm.start()?;
    /// # let point = vm.fork(&mut AtRest(DeviceState::from_bytes([])))?;
    /// let first = point.spawn(CloneSpec::default())?;
    /// first.ram().store(GuestAddress::new(0x3000), 1u64)?; // it runs
    /// let set = first.working_set()?;
    /// assert_eq!(set.written().count().get(), 1);
    ///
    /// let spec = CloneSpec { prefault: Some(Prefault::new(set)), ..CloneSpec::default() };
    /// let next = point.spawn(spec)?;
    /// println!("{:?}", next.prefaulted());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn working_set(&self) -> Result<WorkingSet, SpaceError> {
        self.ram.space().working_set()
    }

    /// What was mapped ahead when it was spawned; `None` if nothing was asked for.
    pub fn prefaulted(&self) -> Option<Prefaulted> {
        self.prefaulted
    }
}
