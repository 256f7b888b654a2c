//! The live fork: a VM that has diverged is forked without copying its pages inside the pause.
//!
//! Owns the policy: how many rounds, when few enough pages are left, how long the pause may be and what happens if it would be longer.
//! The cut itself is the transaction of every [fork](super::fork), with RAM's cut prepared ahead. Must not know how written pages
//! are found.

use std::time::Duration;

use tracing::{debug, debug_span, warn};

use super::fork::{Afterwards, RamCut, Started};
use super::timings::{Fallback, PrecopyEnd, PrecopyRound, PrecopyTimings};
use super::{ForkError, ForkPoint, Guest, Vm};
use crate::backing::{Backing, Begun, Mapped, NoCut, PauseBound, Precopy, Round};
use crate::page::PageCount;
use crate::sys::uffd::UffdError;

/// How far a live fork goes to keep its pause short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LivePolicy {
    /// Rounds of copying while the guest runs; at most [`PrecopyTimings::MAX_ROUNDS`].
    pub max_rounds: u32,
    /// A round that found no more pages than this is the last before the pause.
    pub target: PageCount,
    /// The longest that the engine may take over RAM inside the pause, by its own estimate from what it measured in the rounds. The
    /// embedder's pause, save and resume, and disks, are not in it.
    pub max_pause: Duration,
    /// What to do if it would take longer.
    pub on_exceeded: OnExceeded,
}

/// What a live fork does whose pause would be too long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnExceeded {
    /// Copies what is left inside the pause all the same, and says so in [`PrecopyTimings::end`].
    StopAndCopy,
    /// Gives up with [`ForkError::PauseTooLong`]: the VM runs on as if nothing had been tried.
    GiveUp,
}

impl Default for LivePolicy {
    /// Eight rounds, 256 pages, 5 ms, stop and copy.
    fn default() -> Self {
        Self {
            max_rounds: 8,
            target: PageCount::new(256),
            max_pause: Duration::from_millis(5),
            on_exceeded: OnExceeded::StopAndCopy,
        }
    }
}

impl LivePolicy {
    fn bound(&self) -> PauseBound {
        match self.on_exceeded {
            OnExceeded::StopAndCopy => PauseBound::None,
            OnExceeded::GiveUp => PauseBound::AtMost(self.max_pause),
        }
    }

    /// What an estimate means for the fork.
    fn judge(&self, estimate: Duration, pages: PageCount, end: PrecopyEnd) -> Result<PrecopyEnd, ForkError> {
        if estimate <= self.max_pause {
            return Ok(end);
        }
        match self.on_exceeded {
            OnExceeded::StopAndCopy if matches!(end, PrecopyEnd::Fallback(_)) => Ok(end),
            OnExceeded::StopAndCopy => Ok(PrecopyEnd::StoppedAndCopied),
            OnExceeded::GiveUp => Err(ForkError::PauseTooLong { estimate, limit: self.max_pause, pages }),
        }
    }
}

/// A moment between two steps of a pre-copy, for tests to write at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Moment {
    /// A round's pages are protected, and not copied.
    Protected(usize),
    /// They are copied.
    Copied(usize),
}

/// What tests do at each [`Moment`].
type Seam<'s> = &'s mut dyn FnMut(Moment, &mut Precopy<'_>);

impl Vm<Mapped> {
    /// Forks the running VM as [`Vm::fork`] does, with the pages written since the last fork copied while the guest runs on: in rounds, each
    /// copying what was written during the one before, and a last one inside the pause. For a VM that has written much since its last
    /// fork; one that was never forked is forked as by `fork`, which copies nothing then.
    ///
    /// The pause then grows with what the guest writes in a millisecond or two, and with the page tables in use (0.2 ms for each GiB that
    /// the guest has touched), not with what it has written. Writes take 0.5 µs longer once for each page and round; with KVM,
    /// the guest's mappings of protected pages are faulted in again.
    ///
    /// The pages stay private to the VM, with the same bytes: it holds them beside the fork point, at most once each, and the next live
    /// fork copies only what was written since this one. [`Vm::fork`] gives that memory back.
    ///
    /// Needs Linux 6.7 and leave to call userfaultfd(2), but no privilege. Without, everything is copied inside the pause, a warning is
    /// logged and [`PrecopyTimings::fallback`] tells why.
    ///
    /// # Contract
    /// As [`Guest`]'s, and: from this call on, nobody writes guest memory through pinned pages (vhost, VFIO, `O_DIRECT`, io_uring's fixed
    /// buffers), which write protection does not see. A VM with such devices is forked with [`Vm::fork`]. vCPUs, and system calls that
    /// copy, are seen. The space must not be reset or cut by others meanwhile, which is refused.
    ///
    /// # Errors
    /// [`ForkError`], [`ForkError::PauseTooLong`] among them. The VM runs on, unchanged, and nothing is left behind.
    ///
    /// ```
    /// # use offshoot::{*, backing::Mapped, page::*, ram::*};
    /// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
    /// # let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("vm")?, layout, vec![])?;
    /// # let mut guest = AtRest(DeviceState::from_bytes(vec![]));
    /// # vm.start()?;
    /// vm.fork(&mut guest)?;
    /// vm.ram().write(GuestAddress::new(0x1000), b"diverged")?;
    /// let point = vm.fork_live(&mut guest, &LivePolicy::default())?;
    /// let precopy = point.timings().precopy.unwrap();
    /// println!("{} in {} rounds, {} left for the pause", precopy.bytes(), precopy.rounds().len(), precopy.last.bytes);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fork_live(
        &self,
        guest: &mut (impl Guest + ?Sized),
        policy: &LivePolicy,
    ) -> Result<ForkPoint<Mapped>, ForkError> {
        self.fork_live_at(guest, policy, &mut |_, _| {})
    }

    fn fork_live_at(
        &self,
        guest: &mut (impl Guest + ?Sized),
        policy: &LivePolicy,
        seam: Seam<'_>,
    ) -> Result<ForkPoint<Mapped>, ForkError> {
        let mut started: Started<'_, Mapped> = self.start_cut("fork_live")?;
        let space = self.ram().space();
        let mut report = PrecopyTimings::new(PrecopyEnd::NotNeeded);
        let span = debug_span!("precopy", vm = %self.identity().name);
        // Dropped, and undone if there was no cut, when the guest runs again and before the VM is free for others.
        let mut precopy = span.in_scope(|| match space.precopy()? {
            Begun::NothingToCopy => Ok(None),
            Begun::Unwatched { why, pause, pages } => {
                let why = fallback(&why);
                warn!(vm = %self.identity().name, %why, "a live fork falls back: pages are copied inside the pause");
                report.estimate = pause;
                report.end = policy.judge(pause, pages, PrecopyEnd::Fallback(why))?;
                Ok(None)
            }
            Begun::Watching(mut precopy) => {
                self.rounds(&mut precopy, policy, &mut report, seam)?;
                Ok::<_, ForkError>(Some(precopy))
            }
        })?;
        report.total = started.clock.lap();
        self.cut_all(guest, Afterwards::RunOn, &mut started, || {
            let Some(precopy) = &mut precopy else { return Ok(RamCut { cut: space.cut()?, precopy: Some(report) }) };
            let live = precopy.cut(policy.bound()).map_err(|no| match no {
                NoCut::TooLong(estimate, pages) => ForkError::PauseTooLong { estimate, limit: policy.max_pause, pages },
                NoCut::Space(error) => error.into(),
            })?;
            report.last = self.account(live.last);
            report.estimate = live.estimate;
            report.end = policy.judge(live.estimate, live.last.pages, report.end)?;
            debug!(
                rounds = report.rounds().len(),
                bytes = report.bytes().get(),
                last_pages = report.last.pages.get(),
                end = ?report.end,
                "pre-copy done"
            );
            Ok(RamCut { cut: live.cut, precopy: Some(report) })
        })
    }

    /// Copies in rounds until few enough pages are left.
    fn rounds(
        &self,
        precopy: &mut Precopy<'_>,
        policy: &LivePolicy,
        report: &mut PrecopyTimings,
        seam: Seam<'_>,
    ) -> Result<(), ForkError> {
        report.end = PrecopyEnd::RoundsUsedUp;
        let mut left = PageCount::ZERO;
        for round in 0..policy.max_rounds.min(PrecopyTimings::MAX_ROUNDS) as usize {
            let found = precopy.look()?;
            seam(Moment::Protected(round), precopy);
            left = found.count();
            let done = self.account(precopy.copy(found)?);
            seam(Moment::Copied(round), precopy);
            debug!(round, pages = left.get(), scan = ?done.scan, copy = ?done.copy, "pre-copy round");
            report.push(done);
            if left <= policy.target {
                report.end = PrecopyEnd::Converged;
                break;
            }
        }
        // The next round is shorter than this one, so about as many pages at most will have been written by then.
        report.estimate = precopy.estimate(left);
        report.end = policy.judge(report.estimate, left, report.end)?;
        Ok(())
    }

    fn account(&self, round: Round) -> PrecopyRound {
        let bytes = self.ram().layout().geometry().page_size().size_of(round.pages);
        PrecopyRound { pages: round.pages, bytes, scan: round.scan, copy: round.copy }
    }
}

fn fallback(why: &UffdError) -> Fallback {
    match why {
        UffdError::NotPermitted => Fallback::NotPermitted,
        UffdError::Taken => Fallback::Taken,
        UffdError::Unsupported | UffdError::Sys(_) => Fallback::Kernel,
    }
}

#[cfg(test)]
mod tests;
