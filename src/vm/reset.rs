//! Back to the fork point in place: RAM, disks and device state, without a new VM.
//!
//! The inner loop of a fuzzer, and what a pool calls refresh. Identity is kept.

use super::{BoxError, IllegalState, Rewind, Vm, VmStatus};
use crate::backing::Backing;
use crate::error::SpaceError;
use crate::page::{PageCount, PageSet};

/// Why a VM could not be reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The VM's status does not allow it.
    #[error(transparent)]
    IllegalState(#[from] IllegalState),
    /// It has no fork point to go back to.
    #[error("this VM was never forked and is no clone: there is nothing to go back to")]
    NoOrigin,
    /// The embedder could not pause the guest, which runs on as it was.
    #[error("the guest could not be paused, and runs on: {0}")]
    Pause(#[source] BoxError),
    /// A space could not be reset. The VM is paused; spaces before it are reset: reset again, or drop the VM.
    #[error("a space could not be reset, and the VM stands paused: {0}")]
    Space(#[from] SpaceError),
    /// The embedder could not load device state or resume. The VM is paused.
    #[error("the guest could not be loaded or resumed, and stands paused: {0}")]
    Load(#[source] BoxError),
}

impl<B: Backing> Vm<B> {
    /// Drops everything written since the fork point, in place, and loads its device state; returns how many pages of RAM and disks that were.
    ///
    /// A VM that was running runs on from the fork point; one that was paused stays paused. Costs by what was
    /// written.
    ///
    /// # Errors
    /// [`ResetError`].
    pub fn reset(&self, guest: &mut (impl Rewind + ?Sized)) -> Result<PageCount, ResetError> {
        self.reset_by(guest, |ram| ram.reset())
    }

    fn reset_by(
        &self,
        guest: &mut (impl Rewind + ?Sized),
        reset_ram: impl FnOnce(&B) -> Result<PageCount, SpaceError>,
    ) -> Result<PageCount, ResetError> {
        let mut busy = self.begin("reset", "running or paused", &[VmStatus::Running, VmStatus::Paused])?;
        let origin = self.origin().ok_or(ResetError::NoOrigin)?;
        if busy.before == VmStatus::Running {
            guest.pause().map_err(ResetError::Pause)?;
        }
        let was = std::mem::replace(&mut busy.after, VmStatus::Paused);
        let mut pages = reset_ram(self.ram.space())?;
        for (_, disk) in &self.disks {
            pages = pages.saturating_add(disk.space().reset()?);
        }
        guest.load(origin.device_state()).map_err(ResetError::Load)?;
        if was == VmStatus::Running {
            guest.resume().map_err(ResetError::Load)?;
        }
        busy.after = was;
        Ok(pages)
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
impl Vm<crate::backing::Mapped> {
    /// As [`Vm::reset`], for a caller that knows which pages of RAM were written (a simulator, or KVM's dirty log): nothing
    /// has to be looked for, so the cost is that of the pages listed, however much the guest has touched.
    ///
    /// `dirty` must name every page written or zeroed since the fork point: what it leaves out may stay as it is.
    ///
    /// # Errors
    /// As [`Vm::reset`].
    pub fn reset_listed(&self, guest: &mut (impl Rewind + ?Sized), dirty: &PageSet) -> Result<PageCount, ResetError> {
        self.reset_by(guest, |ram| ram.reset_listed(dirty))
    }
    /// As [`reset_listed`](Self::reset_listed), but copies the fork point's bytes back over the pages instead of dropping them. A fuzzer's
    /// inner loop: the next run's writes to the same pages cost no fault.
    ///
    /// The pages stay this VM's own, and count as written (memory, [`usage`](crate::Vm::usage), the next fork) until a plain [`reset`](Self::reset) or a fork:
    /// see [`Mapped::reset_copying`](crate::backing::Mapped::reset_copying). Disks are reset as ever.
    ///
    /// # Errors
    /// As [`Vm::reset`]. Where the pages cannot be copied ([`SpaceError::MappingLimit`]), they are as they were: reset them in another way.
    pub fn reset_copying(&self, guest: &mut (impl Rewind + ?Sized), dirty: &PageSet) -> Result<PageCount, ResetError> {
        self.reset_by(guest, |ram| ram.reset_copying(dirty))
    }
}
