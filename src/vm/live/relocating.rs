//! The live fork that moves: the pages written since the last fork are copied while the guest runs, and it goes on in a machine made ahead of
//! need.
//!
//! Joins two routes that each know their part: [`CopiedAhead`] copies and makes the cut, [`IntoHole`] finds the place and takes the guest
//! there. Must not know how either does it.

use super::{CopiedAhead, LivePolicy, Onward, Seam};
use crate::backing::{Deferred, Mapped, MappedCut};
use crate::ram::Ram;
use crate::vm::fork::{Afterwards, Route};
use crate::vm::relocate::IntoHole;
use crate::vm::{DeviceState, ForkError, ForkPoint, PrecopyTimings, Relocate, Vm};

impl Vm<Mapped> {
    /// Forks the running VM as [`Vm::fork_live`] does, and lets it run on at other host addresses as [`Vm::fork_relocating`] does: for a VM
    /// with KVM attached that has written much since its last fork, and whose devices can take up new addresses.
    ///
    /// What was written is in the new layer by then, so the new view maps all layers and nothing private is left behind: the memory that
    /// [`Vm::fork_live`] keeps goes with the old view. Inside the pause are the last round, one mapping for each extent of the layers
    /// (about 1.5 µs each, counted in [`LivePolicy::max_pause`]), and the guest's move. The price afterwards: the guest's accesses fault in
    /// again, as in a clone.
    ///
    /// # Contract
    /// As [`Vm::fork_live`]'s and [`Relocate`]'s.
    ///
    /// # Errors
    /// [`ForkError`], as both. The VM runs on where it was, unchanged, and nothing is left behind.
    pub fn fork_live_relocating(
        &self,
        guest: &mut (impl Relocate + ?Sized),
        policy: &LivePolicy,
    ) -> Result<ForkPoint<Mapped>, ForkError> {
        self.fork_live_relocating_at(guest, policy, &mut |_, _| {})
    }

    pub(crate) fn fork_live_relocating_at(
        &self,
        guest: &mut (impl Relocate + ?Sized),
        policy: &LivePolicy,
        seam: Seam<'_>,
    ) -> Result<ForkPoint<Mapped>, ForkError> {
        let live = CopiedAhead::new(policy, seam, Onward::Elsewhere);
        self.cut_all("fork_live_relocating", guest, AheadIntoHole { live, hole: IntoHole::new() }, Afterwards::RunOn)
    }
}

/// RAM's cut is prepared by a pre-copy, and RAM goes on in a hole.
struct AheadIntoHole<'a, 's> {
    live: CopiedAhead<'a, 's>,
    hole: IntoHole,
}

impl<'a, G: Relocate + ?Sized> Route<'a, Mapped, G> for AheadIntoHole<'a, '_> {
    fn prepare(&mut self, vm: &'a Vm<Mapped>, guest: &mut G) -> Result<(), ForkError> {
        // Before anything is copied: having no hole is found out for nothing.
        self.hole.prepare(vm, guest)?;
        self.live.copy_ahead(vm)
    }

    fn cut(&mut self, vm: &'a Vm<Mapped>, guest: &mut G) -> Result<MappedCut<'a>, ForkError> {
        match self.live.last_round(vm)? {
            Some(cut) => cut.go_elsewhere(|image| self.hole.place(image, guest)),
            None => self.hole.cut(vm, guest),
        }
    }

    fn precopied(&self) -> Option<PrecopyTimings> {
        Some(self.live.report)
    }

    fn relocate(
        &mut self,
        ram: &Ram<Mapped>,
        cut: &MappedCut<'_>,
        guest: &mut G,
        device: &DeviceState,
    ) -> Result<Deferred, ForkError> {
        self.hole.relocate(ram, cut, guest, device)
    }
}
