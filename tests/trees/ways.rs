//! The ways to fork that only some backings have, and what a guest does to its memory while one is under way.

use std::cell::RefCell;
use std::time::Duration;

use super::io::place_of_page;
use super::{Contents, HIGH_PAGES, LOW_PAGES, PAGE, pages};
use offshoot::backing::{AnyPage, Backing, Heap};
use offshoot::page::{ByteOffset, Gfn, PageCount, PageSet};
use offshoot::testing::faults::Refusal;
use offshoot::testing::{Dice, ScriptedGuest};
use offshoot::{BoxError, DeviceState, ForkError, ForkPoint, Guest, ResetError, Vm};

/// A way to fork beside the plain one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Live,
    Moving,
    LiveMoving,
}

/// How one of them goes.
#[derive(Clone, Debug)]
pub struct Course {
    pub way: Way,
    /// Rounds that are allowed.
    pub rounds: u32,
    /// Whether no pause is short enough.
    pub gives_up: bool,
    /// The n-th system call of the engine's fails in this way.
    pub refused: Option<(u64, Refusal)>,
    pub writes: Vec<Write>,
}

/// A page that the guest writes or discards while the fork is under way.
#[derive(Clone, Debug)]
pub struct Write {
    /// At which of its moments, counted through; the last is the pause.
    pub moment: u64,
    pub page: u64,
    pub len: u64,
    pub seed: u64,
    pub discards: bool,
}

/// The guest of such a fork: writes at the moments it is told to, to memory and to its model.
pub struct Busy<'a, 'h, B: Backing> {
    pub guest: &'a mut ScriptedGuest,
    /// Shared by the pause and by what comes between the rounds.
    pub hands: &'a RefCell<Hands<'h, B>>,
}

pub struct Hands<'a, B: Backing> {
    pub vm: &'a Vm<B>,
    pub now: &'a mut Contents,
    pub course: &'a Course,
    pub moments: u64,
    /// How many of its writes came while the fork was under way.
    pub wrote: u64,
}

/// The moment of the pause.
const PAUSE: u64 = u64::MAX;

impl<B: Backing> Hands<'_, B> {
    /// The next moment between two rounds.
    pub fn between(&mut self) {
        self.at(self.moments);
        self.moments += 1;
    }

    fn at(&mut self, moment: u64) {
        const LAST: u64 = 5;
        for write in self.course.writes.iter().filter(|write| write.moment.min(LAST) == moment.min(LAST)) {
            let page = write.page % (LOW_PAGES + HIGH_PAGES);
            let (address, len) = (place_of_page(page), 1 + write.len % PAGE);
            self.wrote += 1;
            if write.discards {
                // A call that is told to fail may be this one's.
                match self.vm.ram().discard(Gfn::new(address.get() / PAGE), PageCount::new(1)) {
                    Ok(()) => self.now.ram.zero(pages(page, 1)),
                    Err(error) => assert!(self.course.refused.is_some(), "{error}"),
                }
                continue;
            }
            let data = if write.seed % 5 == 0 { vec![0; PAGE as usize] } else { Dice::new(write.seed).bytes(len) };
            self.vm.ram().write(address, &data).expect("RAM can be written while its VM is forked");
            self.now.ram.write(ByteOffset::new(page * PAGE), &data);
        }
    }
}

impl<B: Backing> Guest for Busy<'_, '_, B> {
    fn pause(&mut self) -> Result<(), BoxError> {
        // Its last instructions.
        let hands = &mut *self.hands.borrow_mut();
        hands.at(PAUSE);
        self.guest.register += 1;
        hands.now.register += 1;
        self.guest.pause()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.guest.save()
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.guest.resume()
    }
}

/// What of this a backing can do.
pub trait Ways: Backing {
    /// `None` where it has no such fork.
    fn fork_by(_: &Vm<Self>, _: &mut Busy<'_, '_, Self>) -> Option<Result<ForkPoint<Self>, ForkError>> {
        None
    }

    /// A reset that copies back the pages that are listed. `None` where there is no such reset.
    fn reset_copying(_: &Vm<Self>, _: &mut ScriptedGuest, _: &PageSet) -> Option<Result<PageCount, ResetError>> {
        None
    }
}

impl Ways for Heap {}
impl Ways for Heap<AnyPage> {}

#[cfg(target_os = "linux")]
mod mapped {
    use super::*;
    use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
    use offshoot::testing::live::{fork_live, fork_live_relocating};
    use offshoot::{LivePolicy, OnExceeded, Relocate};

    impl Relocate for Busy<'_, '_, Mapped> {
        fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
            self.guest.call()?;
            Ok(AddressHole::pick(super::super::layout().geometry().len())?)
        }

        fn relocate(&mut self, _: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
            self.guest.call()?;
            Ok(Deferred::default())
        }
    }

    impl Ways for Mapped {
        fn fork_by(vm: &Vm<Self>, guest: &mut Busy<'_, '_, Self>) -> Option<Result<ForkPoint<Self>, ForkError>> {
            let hands = guest.hands;
            let course = hands.borrow().course;
            let policy = LivePolicy { max_rounds: course.rounds, target: PageCount::ZERO, ..LivePolicy::default() };
            let policy = match course.gives_up {
                true => LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..policy },
                // Nothing here takes so long, however busy the machine is.
                false => LivePolicy { max_pause: Duration::from_secs(100), ..policy },
            };
            let mut between = |_| hands.borrow_mut().between();
            Some(match course.way {
                Way::Live => fork_live(vm, guest, &policy, &mut between),
                Way::Moving => vm.fork_relocating(guest),
                Way::LiveMoving => fork_live_relocating(vm, guest, &policy, &mut between),
            })
        }

        fn reset_copying(
            vm: &Vm<Self>,
            guest: &mut ScriptedGuest,
            listed: &PageSet,
        ) -> Option<Result<PageCount, ResetError>> {
            Some(vm.reset_copying(guest, listed))
        }
    }
}
