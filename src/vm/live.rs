//! The live fork: a VM that has diverged is forked without copying its pages inside the pause.
//!
//! Owns the policy: how many rounds, when few enough pages are left, how long the pause may be and what happens if it would be longer.
//! The cut itself is the transaction of every [fork](super::fork), with RAM's cut prepared ahead. Must not know how written pages
//! are found.

use std::time::{Duration, Instant};

use tracing::{debug_span, warn};

use super::fork::{Afterwards, Route};
use super::timings::{Fallback, PrecopyEnd, PrecopyRound, PrecopyTimings};
use super::{ForkError, ForkPoint, Guest, Vm};
use crate::backing::{Backing, Begun, Mapped, MappedCut, NoCut, Onward, PauseBound, Precopy, Round};
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
pub enum Moment {
    /// A round's pages are protected, and not copied.
    Protected(usize),
    /// They are copied.
    Copied(usize),
}

/// What tests do at each [`Moment`].
pub(crate) type Seam<'s> = &'s mut dyn FnMut(Moment, &mut Precopy<'_>);

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

    pub(crate) fn fork_live_at(
        &self,
        guest: &mut (impl Guest + ?Sized),
        policy: &LivePolicy,
        seam: Seam<'_>,
    ) -> Result<ForkPoint<Mapped>, ForkError> {
        self.cut_all("fork_live", guest, CopiedAhead::new(policy, seam, Onward::Here), Afterwards::RunOn)
    }
}

/// RAM's cut is prepared by a pre-copy. As a route of its own, RAM goes on where it is.
struct CopiedAhead<'a, 's> {
    policy: &'s LivePolicy,
    seam: Seam<'s>,
    onward: Onward,
    report: PrecopyTimings,
    /// Unless there is nothing to copy, or no way to know what is written meanwhile.
    precopy: Option<Precopy<'a>>,
}

impl<'a, G: Guest + ?Sized> Route<'a, Mapped, G> for CopiedAhead<'a, '_> {
    fn prepare(&mut self, vm: &'a Vm<Mapped>, _: &mut G) -> Result<(), ForkError> {
        self.copy_ahead(vm)
    }

    fn cut(&mut self, vm: &'a Vm<Mapped>, _: &mut G) -> Result<MappedCut<'a>, ForkError> {
        match self.last_round(vm)? {
            Some(cut) => Ok(cut),
            None => Ok(vm.ram().space().cut()?),
        }
    }

    fn precopied(&self) -> Option<PrecopyTimings> {
        Some(self.report)
    }
}

impl<'a, 's> CopiedAhead<'a, 's> {
    fn new(policy: &'s LivePolicy, seam: Seam<'s>, onward: Onward) -> Self {
        let report = PrecopyTimings::new(PrecopyEnd::NotNeeded);
        Self { policy, seam, onward, report, precopy: None }
    }

    /// Everything before the pause.
    fn copy_ahead(&mut self, vm: &'a Vm<Mapped>) -> Result<(), ForkError> {
        let (start, name) = (Instant::now(), &vm.identity().name);
        let _span = debug_span!("precopy", vm = %name).entered();
        match vm.ram().space().precopy(self.onward)? {
            Begun::NothingToCopy => {}
            Begun::Unwatched { why, pause, pages } => {
                let why = fallback(&why);
                warn!(vm = %name, %why, "a live fork falls back: pages are copied inside the pause");
                self.report.estimate = pause;
                self.report.end = self.policy.judge(pause, pages, PrecopyEnd::Fallback(why))?;
            }
            Begun::Watching(precopy) => self.rounds(vm, precopy)?,
        }
        self.report.total = start.elapsed();
        Ok(())
    }

    /// The last round and the cut, where there was anything to copy ahead.
    fn last_round(&mut self, vm: &Vm<Mapped>) -> Result<Option<MappedCut<'a>>, ForkError> {
        let Some(precopy) = &mut self.precopy else { return Ok(None) };
        let (policy, report) = (self.policy, &mut self.report);
        let _span = debug_span!("last round").entered();
        let live = precopy.cut(policy.bound()).map_err(|no| match no {
            NoCut::TooLong(estimate, pages) => ForkError::PauseTooLong { estimate, limit: policy.max_pause, pages },
            NoCut::Space(error) => error.into(),
        })?;
        report.last = account(vm, live.last);
        report.estimate = live.estimate;
        report.end = policy.judge(live.estimate, live.last.pages, report.end)?;
        report.last.note();
        Ok(Some(live.cut))
    }

    /// Copies in rounds until few enough pages are left.
    fn rounds(&mut self, vm: &Vm<Mapped>, precopy: Precopy<'a>) -> Result<(), ForkError> {
        // Undone, if it fails, with everything else.
        let precopy = self.precopy.insert(precopy);
        let (policy, report) = (self.policy, &mut self.report);
        report.end = PrecopyEnd::RoundsUsedUp;
        let mut left = PageCount::ZERO;
        for round in 0..policy.max_rounds.min(PrecopyTimings::MAX_ROUNDS) as usize {
            let _span = debug_span!("round", round).entered();
            let found = precopy.look()?;
            (self.seam)(Moment::Protected(round), precopy);
            left = found.count();
            let done = account(vm, precopy.copy(found)?);
            (self.seam)(Moment::Copied(round), precopy);
            done.note();
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
}

fn account(vm: &Vm<Mapped>, round: Round) -> PrecopyRound {
    let bytes = vm.ram().layout().geometry().page_size().size_of(round.pages);
    PrecopyRound { pages: round.pages, bytes, scan: round.scan, copy: round.copy }
}

fn fallback(why: &UffdError) -> Fallback {
    match why {
        UffdError::NotPermitted => Fallback::NotPermitted,
        UffdError::Taken => Fallback::Taken,
        UffdError::Unsupported | UffdError::Sys(_) => Fallback::Kernel,
    }
}

mod relocating;
#[cfg(test)]
mod tests;
