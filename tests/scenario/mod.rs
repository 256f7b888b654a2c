//! A short life of a family of VMs, one engine call a step, in which one thing goes wrong.
//!
//! A step that fails must have changed nothing; it is then done again and must work, and the rest goes on. The models are
//! updated only after the engine has said that it did something.

mod steps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use offshoot::backing::{Backing, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, GuestAddress, Lba, PageCount, PageSize};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::testing::{ByteSource, Dice, Flat, ScriptedGuest, Trouble};
use offshoot::{BoxError, ForkPoint, Limits, Teardown, Tree, TreeUsage, Vm, VmStatus};

pub const PAGE: u64 = 4096;
/// Not a length that anything else in a process has.
pub const RAM_PAGES: u64 = 23;
const DISK_PAGES: u64 = 9;

/// What goes wrong: the n-th of something, from 1.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// A system call.
    Call(u64, Refusal),
    /// A page on the heap, and every later one.
    HeapPage(u64),
    /// A call of the embedder's.
    Embedder(u64, Trouble),
    /// A read of the base image.
    BaseRead(u64),
}

/// A VM and its model.
pub struct Actor<B: Backing> {
    pub vm: Vm<B>,
    pub guest: ScriptedGuest,
    pub ram: Flat,
    pub disk: Flat,
}

pub struct Point<B: Backing> {
    pub point: ForkPoint<B>,
    pub ram: Flat,
    pub disk: Flat,
}

pub struct Stage<B: Backing> {
    pub tree: Tree,
    pub base: Arc<ByteSource>,
    pub actors: Vec<Actor<B>>,
    pub points: Vec<Point<B>>,
    /// The guest of a step that has no VM yet.
    pub hook: ScriptedGuest,
    fault: Fault,
    teardowns: Vec<Teardown>,
    /// How many of the things that can go wrong there were.
    met: u64,
    failures: u64,
    /// Whether it has gone wrong, noticed or not.
    went_off: bool,
}

/// What came of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// How many of the things that were to go wrong there were.
    pub met: u64,
    /// Steps that failed, by an error or a panic.
    pub failures: u64,
}

type Step<B> = (&'static str, fn(&mut Stage<B>) -> Result<(), BoxError>);

/// Plays the scenario with one fault; everything that must hold is checked on the way, and that nothing is left after it.
pub fn play<B: Backing>(fault: Fault) -> Report {
    let heap_pages = if let Fault::HeapPage(n) = fault { PageCount::new(n - 1) } else { PageCount::new(u64::MAX) };
    let mut stage = Stage::<B> {
        tree: Tree::new(Limits { heap_pages, ..Limits::default() }),
        base: Arc::new(ByteSource::new(Dice::new(5).bytes(5 * PAGE + 100))),
        actors: Vec::new(),
        points: Vec::new(),
        hook: ScriptedGuest::paused(0),
        fault,
        teardowns: Vec::new(),
        met: 0,
        failures: 0,
        went_off: false,
    };
    for (name, step) in steps::all() {
        if !stage.attempt(name, step) {
            break;
        }
    }
    stage.end()
}

impl<B: Backing> Stage<B> {
    /// Does one step; whether the scenario goes on.
    fn attempt(&mut self, name: &str, step: fn(&mut Self) -> Result<(), BoxError>) -> bool {
        let went = self.armed(|stage| catch_unwind(AssertUnwindSafe(|| step(stage))));
        self.teardowns.extend(self.points.iter().map(|point| point.point.teardown().clone()));
        let went = match went {
            Ok(went) => went.map_err(|error| error.to_string()),
            Err(panic) => {
                // Only a panic that was ordered is part of the play.
                assert!(panic.is::<offshoot::testing::Scripted>(), "{name} panicked on its own with {:?}", self.fault);
                Err("panic".into())
            }
        };
        if let Err(error) = went {
            assert!(!matches!(self.fault, Fault::None), "{name} failed with nothing wrong: {error}");
            self.failures += 1;
            self.check(&format!("after {name} failed with {:?}: {error}", self.fault));
            if matches!(self.fault, Fault::HeapPage(_)) {
                return false;
            }
            self.fault = Fault::None;
            step(self).unwrap_or_else(|error| panic!("{name} must work the second time: {error}"));
        }
        self.check(&format!("after {name} with {:?}", self.fault));
        true
    }

    /// Runs a step with what is left of the plan, and takes off what it used up.
    fn armed<T>(&mut self, step: impl FnOnce(&mut Self) -> T) -> T {
        let pages = self.tree.usage().heap_pages.get();
        let calls = match self.fault {
            Fault::Call(_, how) if self.went_off => Some(fail_nth_call(0, how)),
            Fault::Call(n, how) => Some(fail_nth_call(n, how)),
            _ => None,
        };
        let embedder = match self.fault {
            Fault::Embedder(..) if self.went_off => (0, Trouble::Error),
            Fault::Embedder(n, trouble) => (n, trouble),
            _ => (0, Trouble::Error),
        };
        self.hook.fail_nth_call(embedder.0, embedder.1);
        if let Fault::BaseRead(n) = self.fault {
            self.base.fail_after(n - 1);
        }
        let result = step(self);
        let used = match self.fault {
            Fault::None => 0,
            Fault::Call(..) => calls.as_ref().map_or(0, |plan| plan.calls_seen()),
            Fault::HeapPage(_) => self.tree.usage().heap_pages.get().saturating_sub(pages),
            Fault::Embedder(..) => self.hook.calls_seen(),
            Fault::BaseRead(n) => n - 1 - self.base.reads_left().min(n - 1),
        };
        drop(calls);
        self.base.fail_after(u64::MAX);
        self.hook.fail_nth_call(0, Trouble::Error);
        self.met += used;
        self.fault = match self.fault {
            Fault::Call(n, how) if used < n => Fault::Call(n - used, how),
            Fault::Embedder(n, trouble) if used < n => Fault::Embedder(n - used, trouble),
            // A base read that fails does not count itself.
            Fault::BaseRead(n) if used < n => Fault::BaseRead(n - used),
            other => {
                self.went_off |= used > 0;
                other
            }
        };
        result
    }

    pub fn went_off(&self) -> bool {
        self.went_off
    }

    pub fn actor(&mut self, at: usize) -> &mut Actor<B> {
        &mut self.actors[at]
    }

    /// Calls something with a guest whose calls count against the plan.
    pub fn with_guest<T>(&mut self, at: usize, call: impl FnOnce(&Vm<B>, &mut ScriptedGuest) -> T) -> T {
        let actor = &mut self.actors[at];
        // One plan for all guests: it is lent to whose turn it is.
        self.hook.register = actor.guest.register;
        self.hook.set_runs(actor.guest.runs());
        let result = catch_unwind(AssertUnwindSafe(|| call(&actor.vm, &mut self.hook)));
        actor.guest.register = self.hook.register;
        actor.guest.set_runs(self.hook.runs());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn check(&self, when: &str) {
        for (at, actor) in self.actors.iter().enumerate() {
            actor.check(&format!("VM {at}, {when}"));
        }
        for (at, point) in self.points.iter().enumerate() {
            let mut found = vec![0xa5; (RAM_PAGES * PAGE) as usize];
            point.point.ram().read(ByteOffset::ZERO, &mut found).expect("an image can be read");
            assert_eq!(point.ram.first_difference(&found), None, "RAM of fork point {at}, {when}");
            let mut found = vec![0xa5; (DISK_PAGES * PAGE) as usize];
            point.point.disk("d").expect("it has a disk").read(Lba::ZERO, &mut found).expect("an image can be read");
            assert_eq!(point.disk.first_difference(&found), None, "disk of fork point {at}, {when}");
            point.point.validate().unwrap_or_else(|wrong| panic!("fork point {at}, {when}: {wrong}"));
        }
        assert_eq!(self.tree.usage().vms, self.actors.len() as u64, "{when}");
    }

    fn end(self) -> Report {
        let Self { tree, actors, points, teardowns, met, failures, .. } = self;
        let origins: Vec<_> = actors.iter().filter_map(|actor| actor.vm.origin()).collect();
        let more: Vec<_> = origins.iter().map(|point| point.teardown().clone()).collect();
        drop((actors, points, origins));
        for teardown in teardowns.iter().chain(&more) {
            teardown.wait();
        }
        drop(teardowns);
        assert_eq!(tree.usage(), TreeUsage::default(), "left behind");
        assert_eq!(tree.memory_file_bytes(), ByteSize::ZERO, "left behind");
        Report { met, failures }
    }
}

impl<B: Backing> Actor<B> {
    pub fn ram_now(&self) -> Vec<u8> {
        let mut found = vec![0xa5; (RAM_PAGES * PAGE) as usize];
        self.vm.ram().read(GuestAddress::ZERO, &mut found).expect("RAM can be read");
        found
    }

    fn check(&self, when: &str) {
        assert_eq!(self.vm.status() == VmStatus::Running, self.guest.runs(), "{when}: {:?}", self.vm.status());
        assert_ne!(self.vm.status(), VmStatus::Busy, "{when}");
        assert_eq!(self.ram.first_difference(&self.ram_now()), None, "RAM of {when}");
        let mut found = vec![0xa5; (DISK_PAGES * PAGE) as usize];
        self.vm.disk("d").expect("it has a disk").read(Lba::ZERO, &mut found).expect("the disk can be read");
        assert_eq!(self.disk.first_difference(&found), None, "disk of {when}");
        self.vm.validate().unwrap_or_else(|wrong| panic!("{when}: {wrong}"));
        // A reset goes by the fork point for device state, and by the spaces for memory: they must be one.
        let lies_on = self.vm.ram().space().origin();
        match self.vm.origin() {
            Some(point) => assert!(point.ram().same(&lies_on), "{when}: its fork point is not what its RAM lies on"),
            None => assert_eq!(lies_on.depth(), 0, "{when}: it was cut, and has no fork point"),
        }
    }
}

pub fn shape(pages: u64) -> Geometry {
    Geometry::new(ByteSize::new(pages * PAGE), PageSize::KIB_4).expect("a valid shape")
}
