//! Forks that move RAM among those that do not: each kind goes on from what the others left, and what was undone leaves nothing.

use std::time::Duration;

use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::testing::{Dice, Flat, skip};
use offshoot::{
    BoxError, CloneSpec, DeviceState, ForkError, ForkPoint, Guest, LivePolicy, OnExceeded, PrecopyEnd, Relocate, Vm,
};

use crate::common::lives::{Model, bytes, flat_vm, rest};
use crate::passive::{Way, base, move_by};

/// A guest over any RAM, which may refuse to move.
struct Mover<'a> {
    len: ByteSize,
    refuse: bool,
    pause: &'a mut dyn FnMut(),
}

impl Guest for Mover<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        (self.pause)();
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes([]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Relocate for Mover<'_> {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        Ok(AddressHole::pick(self.len)?)
    }

    fn relocate(&mut self, _: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
        if self.refuse { Err("refused".into()) } else { Ok(Deferred::default()) }
    }
}

/// Everything that a pre-copy found, where the kernel lets it.
fn copied(point: &ForkPoint<Mapped>) -> Option<u64> {
    let precopy = point.timings().precopy.unwrap();
    let rounds: u64 = precopy.rounds().iter().map(|round| round.pages.get()).sum();
    (!matches!(precopy.end, PrecopyEnd::Fallback(_))).then(|| rounds + precopy.last.pages.get())
}

#[test]
fn write_protection_goes_with_the_old_place_and_stays_if_it_is_kept() {
    let vm = flat_vm(ByteSize::mib(1), PageSize::KIB_4);
    let touch = |pages: std::ops::Range<u64>, value: u8| {
        pages.for_each(|page| vm.ram().store(GuestAddress::new(page * 4096), value).unwrap());
    };
    let mut mover = Mover { len: ByteSize::mib(1), refuse: false, pause: &mut || {} };
    let live = |guest: &mut Mover<'_>| vm.fork_live(guest, &LivePolicy::default()).unwrap();
    vm.fork(&mut mover).unwrap();
    touch(0..100, 1);
    let Some(found) = copied(&live(&mut mover)) else {
        return skip("no write protection here");
    };
    assert_eq!((found, vm.ram().usage().unwrap().private.get()), (100, 100), "its pages stay private");
    // Undone: only what is written since is found.
    touch(100..103, 2);
    mover.refuse = true;
    assert!(matches!(vm.fork_relocating(&mut mover), Err(ForkError::Relocate(_))));
    vm.validate().unwrap();
    assert_eq!(vm.dirty().unwrap().ram.count().get(), 3);
    assert_eq!(copied(&live(&mut mover)), Some(3));
    // Moved: the pages of both live forks are read from their layers, and nothing is private.
    touch(50..52, 3);
    let before = bytes(&vm);
    mover.refuse = false;
    let point = vm.fork_relocating(&mut mover).unwrap();
    point.teardown().wait();
    vm.validate().unwrap();
    assert!(bytes(&vm) == before && bytes(&point.spawn(CloneSpec::default()).unwrap()) == before);
    assert!(vm.ram().usage().unwrap().private.is_zero() && vm.dirty().unwrap().ram.is_empty());
    // And the new place is watched from its first live fork on.
    touch(200..205, 4);
    assert_eq!(copied(&live(&mut mover)), Some(5));
    touch(201..203, 5);
    assert_eq!(copied(&live(&mut mover)), Some(2));
    vm.reset(&mut rest()).unwrap();
    vm.validate().unwrap();

    // Both at once: given up or refused, it is where it was and goes by what it knew; done, nothing private is left behind.
    touch(10..14, 6);
    let (home, before) = (base(&vm), bytes(&vm));
    let none = LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..LivePolicy::default() };
    assert!(matches!(vm.fork_live_relocating(&mut mover, &none), Err(ForkError::PauseTooLong { .. })));
    mover.refuse = true;
    assert!(matches!(move_by(Way::Live, &vm, &mut mover), Err(ForkError::Relocate(_))));
    assert_eq!((base(&vm), vm.dirty().unwrap().ram.count().get()), (home, 4));
    vm.validate().unwrap();
    mover.refuse = false;
    let point = move_by(Way::Live, &vm, &mut mover).unwrap();
    assert_eq!((base(&vm) == home, copied(&point)), (false, Some(4)));
    point.teardown().wait();
    assert!(vm.ram().usage().unwrap().private.is_zero() && vm.dirty().unwrap().ram.is_empty());
    assert!(bytes(&vm) == before && bytes(&point.spawn(CloneSpec::default()).unwrap()) == before);
    vm.validate().unwrap();
}

/// Random lives of forks in place, live and moving, done and undone, and resets; a model says what is right.
#[test]
fn forks_of_every_kind_and_resets_agree_with_a_model() {
    let mut kinds = [0; 8];
    for (seed, page) in [(1, 4), (2, 4), (3, 4), (4, 4), (5, 16), (6, 16)] {
        let vm = flat_vm(ByteSize::kib(96 * page), PageSize::new(ByteSize::kib(page)).unwrap());
        life(&vm, &mut Dice::new(seed), 40, 2, &mut kinds);
    }
    assert!(kinds.iter().all(|&times| times > 5), "{kinds:?}");
}

fn life(vm: &Vm<Mapped>, dice: &mut Dice, steps: u32, generations: u32, kinds: &mut [u32; 8]) {
    let len = vm.ram().layout().geometry().len();
    let mut model = Model::of(vm);
    // With what each read as when it was made.
    let mut points: Vec<(ForkPoint<Mapped>, Flat)> = Vec::new();
    for step in 0..steps {
        model.scribble(vm, dice);
        let kind = dice.below(8) as usize;
        let (home, policy) = (base(vm), LivePolicy { max_rounds: dice.below(3) as u32, ..Default::default() });
        let forked = {
            // The guest's last writes are made once a live fork has copied, and RAM's next place is chosen.
            let mut pause = || model.scribble(vm, dice);
            let mut guest = Mover { len, refuse: matches!(kind, 4 | 7), pause: &mut pause };
            match kind {
                0 => Some(vm.fork(&mut guest).unwrap()),
                1 | 2 => Some(vm.fork_live(&mut guest, &policy).unwrap()),
                3 => Some(vm.fork_relocating(&mut guest).unwrap()),
                4 => {
                    assert!(matches!(vm.fork_relocating(&mut guest), Err(ForkError::Relocate(_))));
                    None
                }
                6 => Some(vm.fork_live_relocating(&mut guest, &policy).unwrap()),
                7 => {
                    let refused = vm.fork_live_relocating(&mut guest, &policy);
                    assert!(matches!(refused, Err(ForkError::Relocate(_))));
                    None
                }
                _ => None,
            }
        };
        assert_eq!(base(vm) != home, matches!(kind, 3 | 6), "step {step}");
        if kind == 5 && model.has_origin() {
            model.reset(vm);
        }
        kinds[kind] += 1;
        if let Some(point) = forked {
            assert!(vm.dirty().unwrap().ram.is_empty(), "step {step}");
            points.push((point, model.forked()));
        }
        model.check(vm, format_args!("step {step}, kind {kind}"));
        if generations > 0
            && dice.below(12) == 0
            && let Some((point, _)) = points.last()
        {
            let clone = point.spawn(CloneSpec::default()).unwrap();
            clone.start().unwrap();
            life(&clone, dice, steps / 4, generations - 1, kinds);
        }
    }
    // Whatever the VM did since, each fork point is what it was.
    for (point, model) in &points {
        point.teardown().wait();
        point.validate().unwrap();
        assert_eq!(model.first_difference(&bytes(&point.spawn(CloneSpec::default()).unwrap())), None);
    }
}
