//! Committing a clone back into the VM that it was forked from.
//!
//! Legal where nothing would be lost: the VM has not changed since the fork point that the clone was spawned from. What the
//! clone wrote becomes the VM's own writes; the clone is gone. RAM and disks go through the same erased spaces.

use super::{IllegalState, Vm, VmStatus};
use crate::backing::Backing;
use crate::disk::AnySpace;
use crate::error::SpaceError;
use crate::page::{PageRange, is_zero};

/// Why a clone was not committed. Both VMs are as they were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// One of the two is not paused or off.
    #[error(transparent)]
    IllegalState(#[from] IllegalState),
    /// The clone does not come from this VM's last fork point.
    #[error("the clone was not spawned from this VM's last fork point: only such a clone can be committed")]
    NotAChild,
    /// The VM has written since the fork point.
    #[error("this VM has written since the fork point: committing would lose that")]
    Diverged,
    /// A space refused.
    #[error("the commit failed and was undone: {0}")]
    Space(#[from] SpaceError),
}

impl<B: Backing> Vm<B> {
    /// Makes what `clone` wrote this VM's own, RAM and disks. Both must be paused or off; the embedder loads the clone's device
    /// state itself. Costs by what the clone wrote.
    ///
    /// # Errors
    /// [`CommitError`], with the clone given back. Nothing is changed then.
    pub fn commit(&self, clone: Self) -> Result<(), Box<(CommitError, Self)>> {
        match self.try_commit(&clone) {
            Ok(()) => Ok(()),
            Err(error) => Err(Box::new((error, clone))),
        }
    }

    fn try_commit(&self, clone: &Self) -> Result<(), CommitError> {
        let still = [VmStatus::Paused, VmStatus::Off];
        let _busy = self.begin("commit", "paused or off", &still)?;
        let _clone_busy = clone.begin("commit", "paused or off", &still)?;
        let pairs = self.spaces_with(clone).ok_or(CommitError::NotAChild)?;
        if !pairs.iter().all(|(own, theirs)| own.origin().same(&*theirs.origin())) {
            return Err(CommitError::NotAChild);
        }
        for (own, _) in &pairs {
            if !own.dirty()?.is_empty() {
                return Err(CommitError::Diverged);
            }
        }
        for (done, (own, theirs)) in pairs.iter().enumerate() {
            if let Err(error) = take_over(*own, *theirs) {
                // Nothing had been written since the origin, so going back to it undoes exactly this call. The first error is the one
                // to tell, and every space is tried.
                for (own, _) in &pairs[..=done] {
                    if let Err(error) = own.reset() {
                        tracing::error!(%error, "a space could not be put back after a failed commit");
                    }
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The spaces of both VMs, side by side; `None` where they have different disks.
    fn spaces_with<'a>(&'a self, clone: &'a Self) -> Option<Vec<(&'a dyn AnySpace, &'a dyn AnySpace)>> {
        let mut pairs: Vec<(&dyn AnySpace, &dyn AnySpace)> = vec![(self.ram.space(), clone.ram.space())];
        for (name, disk) in &self.disks {
            pairs.push((disk.space(), clone.disk(name.as_str())?.space()));
        }
        (self.disks.len() == clone.disks.len()).then_some(pairs)
    }
}

/// Writes the pages that `from` has changed since their common origin into `to`.
fn take_over(to: &dyn AnySpace, from: &dyn AnySpace) -> Result<(), SpaceError> {
    let size = to.geometry().page_size();
    let mut bytes = vec![0; size.bytes().get() as usize];
    for page in from.dirty()?.pages() {
        let at = size.start_of(page);
        from.read(at, &mut bytes)?;
        if is_zero(&bytes) {
            to.zero(PageRange::one(page))?;
        } else {
            to.write(at, &bytes)?;
        }
    }
    Ok(())
}
