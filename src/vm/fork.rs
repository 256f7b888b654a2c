//! The fork: one cut of RAM, all disks and device state, as a transaction.
//!
//! The steps, in order; whatever fails, everything before it is undone and the guest runs on, unchanged:
//! 1. *pause*: the embedder stops the vCPUs and drains I/O.
//! 2. *save*: the embedder reads device state. Before the cut, because it may read guest memory and the cut locks it.
//! 3. *flush*: disks make their metadata durable.
//! 4. *cut*: each space is locked and sealed; nobody can write any of them until all are, so the cut is one instant for the engine
//!    whatever the embedder's pause was worth.
//! 5. *move*, if RAM goes on elsewhere: the embedder takes its guest there ([`relocate`](super::relocate)).
//! 6. *commit*: cannot fail. The fork point exists.
//! 7. *resume*: the guest runs on, over fresh overlays. What was put off is torn down after it.
//!
//! Where RAM goes on is a [`Route`]; everything else is the same for all of them. Must not know what the spaces are made of.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use tracing::{Span, debug, debug_span};

use super::timings::Stopwatch;
use super::{
    BoxError, Busy, DeviceState, ForkPoint, ForkTimings, Guest, IllegalState, PrecopyTimings, Teardown, Vm, VmStatus,
    point::PointParts,
};
use crate::backing::{Backing, Cut, Deferred};
use crate::disk::DiskImage;
use crate::error::SpaceError;
use crate::gate::{FreezeGate, Shut};
use crate::page::{ByteSize, PageCount};
use crate::ram::Ram;

/// Why there is no fork point. Except for [`ForkError::Resume`], the VM is as it was before the call; a guest that was paused for it
/// and could not be resumed leaves the VM [`VmStatus::Paused`] whatever the error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// The VM's status does not allow it.
    #[error(transparent)]
    IllegalState(#[from] IllegalState),
    /// The embedder could not pause the guest.
    #[error("the guest could not be paused, and runs on: {0}")]
    Pause(#[source] BoxError),
    /// The embedder could not save device state.
    #[error("device state could not be saved, and the guest runs on: {0}")]
    Save(#[source] BoxError),
    /// More device state than [`Limits::device_state`](crate::Limits::device_state).
    #[error("device state of {size} is over the limit of {limit}: raise Limits::device_state")]
    StateTooBig {
        /// How much there is.
        size: ByteSize,
        /// The limit.
        limit: ByteSize,
    },
    /// The embedder had no addresses for RAM to go to.
    #[error("there is no place for RAM to go to, and the guest runs on: {0}")]
    Hole(#[source] BoxError),
    /// The embedder could not take its guest to RAM's new place.
    #[error("the guest could not be moved, and runs on at its old place: {0}")]
    Relocate(#[source] BoxError),
    /// A space could not be flushed or cut.
    #[error("the cut failed and was undone: {0}")]
    Cut(#[from] SpaceError),
    /// A live fork's pause would have been longer than its policy allows, which was to give up then.
    #[error(
        "the pause would last {estimate:?} for {pages} pages still to copy, the policy allows {limit:?}: fork when the guest writes \
         less, allow more rounds or a longer pause, or let the policy stop and copy"
    )]
    PauseTooLong {
        /// How long it would have been.
        estimate: Duration,
        /// The limit: `LivePolicy::max_pause`.
        limit: Duration,
        /// Pages that were left to copy.
        pages: PageCount,
    },
    /// The embedder could not resume the guest: the VM is [`VmStatus::Paused`], its content unchanged, and the cut that was made is its
    /// [`Vm::origin`]. Call the guest's `resume` again, then [`Vm::start`].
    #[error("the guest could not be resumed, and stands paused: {0}")]
    Resume(#[source] BoxError),
}

/// A guest that this fork paused, and the status of its VM; resumed on drop unless that was done.
struct PausedGuest<'a, 'g, B: Backing, G: Guest + ?Sized> {
    busy: &'g mut Busy<'a, B>,
    guest: &'g mut G,
    resume: bool,
}

impl<B: Backing, G: Guest + ?Sized> PausedGuest<'_, '_, B, G> {
    /// Runs the guest on. Unless that goes well, by an error or a panic, the VM stands paused afterwards.
    fn resume(&mut self) -> Result<(), BoxError> {
        if std::mem::take(&mut self.resume) {
            let runs = std::mem::replace(&mut self.busy.after, VmStatus::Paused);
            self.guest.resume()?;
            self.busy.after = runs;
        }
        Ok(())
    }
}

impl<B: Backing, G: Guest + ?Sized> Drop for PausedGuest<'_, '_, B, G> {
    fn drop(&mut self) {
        // Reached on an error or a panic of the embedder's: the guest must run on. If it cannot, the caller already has an error.
        if let Err(error) = self.resume() {
            tracing::error!(%error, "guest could not be resumed after a failed fork");
        }
    }
}

impl<B: Backing> Vm<B> {
    /// Forks the running VM: cuts RAM, disks and device state at one instant and lets it run on.
    ///
    /// A VM that is paused is cut where it stands and stays paused. The guest stands still for
    /// [`ForkTimings::stopped`], which does not grow with RAM; for the mapped backing it grows with the pages written since the last fork.
    ///
    /// # Errors
    /// [`ForkError`]. The VM runs on, unchanged, and nothing is left behind.
    pub fn fork(&self, guest: &mut (impl Guest + ?Sized)) -> Result<ForkPoint<B>, ForkError> {
        self.cut_all("fork", guest, InPlace, Afterwards::RunOn)
    }

    /// Freezes the VM: cuts it as [`Vm::fork`] does and leaves it stopped for good. Any number of clones start from the fork point and the
    /// frozen VM never grows.
    ///
    /// # Errors
    /// [`ForkError`]; a VM frozen already is [`ForkError::IllegalState`]: its fork point is [`Vm::origin`].
    pub fn freeze(&self, guest: &mut (impl Guest + ?Sized)) -> Result<ForkPoint<B>, ForkError> {
        self.cut_all("freeze", guest, InPlace, Afterwards::StayFrozen)
    }

    /// The transaction, for the public function of that name.
    pub(super) fn cut_all<'a, G: Guest + ?Sized>(
        &'a self,
        call: &'static str,
        guest: &mut G,
        route: impl Route<'a, B, G>,
        afterwards: Afterwards,
    ) -> Result<ForkPoint<B>, ForkError> {
        let span = debug_span!("fork", vm = %self.identity.name, call);
        let forked = span.in_scope(|| self.transaction(call, guest, route, afterwards, &span));
        if let Err(error) = &forked {
            span.in_scope(|| debug!(%error, "not forked"));
        }
        forked
    }

    fn transaction<'a, G: Guest + ?Sized>(
        &'a self,
        call: &'static str,
        guest: &mut G,
        route: impl Route<'a, B, G>,
        afterwards: Afterwards,
        span: &Span,
    ) -> Result<ForkPoint<B>, ForkError> {
        let mut clock = Stopwatch::start();
        let mut timings = ForkTimings::default();
        let mut busy = self.begin(call, "running or paused", &[VmStatus::Running, VmStatus::Paused])?;
        // Dropped before the VM is free for others.
        let mut route = route;

        debug_span!("prepare").in_scope(|| route.prepare(self, guest))?;
        timings.prepare = clock.lap();

        let was_running = busy.before == VmStatus::Running;
        if was_running {
            debug_span!("pause").in_scope(|| guest.pause()).map_err(ForkError::Pause)?;
        }
        let mut guest = PausedGuest { busy: &mut busy, guest, resume: was_running };
        timings.pause = clock.lap();

        let device = debug_span!("save").in_scope(|| guest.guest.save()).map_err(ForkError::Save)?;
        self.check_state(&device)?;
        timings.save = clock.lap();

        debug_span!("flush").in_scope(|| self.flush_all())?;
        timings.flush = clock.lap();

        let (parts, mut deferred) = {
            let _span = debug_span!("cut").entered();
            // A freeze waits for the writes that are under way, and lets in no other until it is undone.
            let gates = match afterwards {
                Afterwards::StayFrozen => self.gates().map(FreezeGate::shut).collect(),
                Afterwards::RunOn => Vec::new(),
            };
            // Every lock is taken and every fallible step done before anything is kept; an early return drops the
            // cuts made so far, and a dropped cut is undone.
            let ram = route.cut(self, guest.guest)?;
            timings.precopy = route.precopied();
            let disks: Vec<_> = self.disks.iter().map(|(_, disk)| disk.space().cut()).collect::<Result<_, _>>()?;
            timings.cut = clock.lap();
            let left_behind = route.relocate(&self.ram, &ram, guest.guest, &device)?;
            timings.relocate = clock.lap();
            let (ram, ram_deferred) = ram.commit();
            // In this order: what the guest left behind may still have the old view of RAM in use.
            let mut deferred = vec![left_behind, ram_deferred];
            let mut images = Vec::with_capacity(disks.len());
            for (cut, (name, disk)) in disks.into_iter().zip(&self.disks) {
                let (image, later) = cut.commit();
                deferred.push(later);
                images.push((name.clone(), DiskImage::new(image, disk)));
            }
            gates.into_iter().for_each(Shut::close);
            let layout = self.ram.layout().clone();
            let (parent, clones) = (self.identity.name.clone(), self.clones.clone());
            (PointParts { layout, ram, disks: images, device, parent, clones }, deferred)
        };
        timings.cut += clock.lap();

        // A panic is held back until the fork point is in place: the cut is made.
        let resumed = catch_unwind(AssertUnwindSafe(|| {
            if afterwards == Afterwards::StayFrozen {
                guest.resume = false;
                guest.busy.after = VmStatus::Frozen;
            }
            deferred.insert(0, guest.guest.committed());
            debug_span!("resume").in_scope(|| guest.resume())
        }));
        timings.resume = clock.lap();
        timings.total = clock.total();
        timings.note();
        let point = ForkPoint::new(self.tree.clone(), parts, timings, Teardown::run(deferred, span));
        // The spaces lie on this cut now, so it is the VM's origin even where the guest could not be resumed: a reset that went
        // by an older one would load that one's device state over this one's memory.
        // The origin that it replaces may be the last name of many pages: let go of it outside the lock.
        let replaced = self.life.lock().origin.replace(point.clone());
        drop(replaced);
        match resumed {
            Ok(Ok(())) => Ok(point),
            // It may have run a little before it failed, so the cut cannot be undone; its content is unchanged all the same.
            Ok(Err(error)) => Err(ForkError::Resume(error)),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The gates that a freeze closes, in the order in which the spaces are cut.
    fn gates(&self) -> impl Iterator<Item = &FreezeGate> {
        [self.ram.gate()].into_iter().chain(self.disks.iter().map(|(_, disk)| disk.gate()))
    }

    fn check_state(&self, device: &DeviceState) -> Result<(), ForkError> {
        let limit = self.tree.limits().device_state;
        match device.known_len() {
            Some(size) if size > limit => Err(ForkError::StateTooBig { size, limit }),
            _ => Ok(()),
        }
    }

    fn flush_all(&self) -> Result<(), SpaceError> {
        self.ram.space().flush()?;
        self.disks.iter().try_for_each(|(_, disk)| disk.space().flush())
    }
}

/// How RAM is cut, and where it goes on.
///
/// Dropped after the guest runs on and before the VM is free for others: what it prepared it undoes there, if it was not used.
pub(super) trait Route<'a, B: Backing, G: ?Sized> {
    /// What can be done before the guest stands still.
    fn prepare(&mut self, _vm: &'a Vm<B>, _guest: &mut G) -> Result<(), ForkError> {
        Ok(())
    }

    /// Cuts RAM of a guest that stands still.
    fn cut(&mut self, vm: &'a Vm<B>, _guest: &mut G) -> Result<B::Cut<'a>, ForkError> {
        Ok(vm.ram.space().cut()?)
    }

    /// What was copied before the cut, and in it.
    fn precopied(&self) -> Option<PrecopyTimings> {
        None
    }

    /// Takes the guest to where RAM goes on: the last step that may fail. Returns what it leaves behind.
    fn relocate(
        &mut self,
        _ram: &Ram<B>,
        _cut: &B::Cut<'_>,
        _guest: &mut G,
        _device: &DeviceState,
    ) -> Result<Deferred, ForkError> {
        Ok(Deferred::default())
    }
}

/// RAM is cut with nothing prepared, and goes on where it is.
struct InPlace;

impl<B: Backing, G: ?Sized> Route<'_, B, G> for InPlace {}

/// What becomes of the source.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Afterwards {
    RunOn,
    StayFrozen,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Heap;
    use crate::page::{GuestAddress, PageSize};
    use crate::ram::RamLayout;
    use crate::{Rewind, Tree, VmName};

    /// A guest of one register, which may refuse to resume.
    struct OneRegister {
        cpu: u8,
        stuck: bool,
    }

    impl Guest for OneRegister {
        fn pause(&mut self) -> Result<(), BoxError> {
            Ok(())
        }

        fn save(&mut self) -> Result<DeviceState, BoxError> {
            Ok(DeviceState::from_bytes(vec![self.cpu]))
        }

        fn resume(&mut self) -> Result<(), BoxError> {
            if self.stuck { Err("stuck".into()) } else { Ok(()) }
        }
    }

    impl Rewind for OneRegister {
        fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
            self.cpu = state.encode()[0];
            Ok(())
        }
    }

    /// Found by fuzzing (`vm_tree`): memory went back to the second cut, the register to the first.
    #[test]
    fn a_reset_after_a_failed_resume_goes_back_to_one_instant() {
        let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).unwrap();
        let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("vm").unwrap(), layout, vec![]).unwrap();
        let mut guest = OneRegister { cpu: 1, stuck: false };
        vm.start().unwrap();
        vm.fork(&mut guest).unwrap();
        guest.cpu = 2;
        vm.ram().store(GuestAddress::ZERO, 2u8).unwrap();
        guest.stuck = true;
        assert!(matches!(vm.fork(&mut guest), Err(ForkError::Resume(_))));
        assert_eq!(vm.status(), VmStatus::Paused);
        guest.cpu = 3;
        vm.reset(&mut guest).unwrap();
        assert_eq!((guest.cpu, vm.ram().load::<u8>(GuestAddress::ZERO).unwrap()), (2, 2));
    }
}
