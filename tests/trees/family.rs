//! Forks, clones and what is made of fork points; who descends from whom is kept by number.

use std::cell::RefCell;

use super::ways::{Busy, Hands};
use super::{Contents, Course, Goes, Line, Machine, Origin, Point, Way, Ways, World};
use offshoot::backing::Backing;
use offshoot::page::{PageCount, PageRange, PageSet};
use offshoot::testing::faults::fail_nth_call;
use offshoot::testing::{Flat, ScriptedGuest, Trouble};
use offshoot::{CloneSpec, CommitError, ForkError, ForkPoint, ResetError, SpaceError, SpawnError, VmStatus};

impl Goes {
    fn tell(self, guest: &mut ScriptedGuest) {
        let n = match self {
            Self::Well => 0,
            Self::Wrong(n) => n,
        };
        guest.fail_nth_call(n, Trouble::Error);
    }
}

impl<B: Ways> World<B> {
    pub fn cut(&mut self, vm: usize, goes: Goes, becomes: VmStatus) {
        let at = vm % self.vms.len();
        let machine = &mut self.vms[at];
        goes.tell(&mut machine.guest);
        let before = machine.status;
        let frozen = becomes == VmStatus::Frozen;
        let result = if frozen { machine.vm.freeze(&mut machine.guest) } else { machine.vm.fork(&mut machine.guest) };
        self.saw(match &result {
            Ok(_) if frozen => "frozen",
            Ok(_) if before == VmStatus::Paused => "forked while paused",
            Ok(_) => "forked while running",
            Err(ForkError::IllegalState(_)) => "cut illegal",
            Err(ForkError::Resume(_)) => "not resumed",
            Err(_) => "cut undone",
        });
        let left = if frozen { VmStatus::Frozen } else { before };
        let expected = Expected { left, leaves: Leaves::Nothing, may_strand: false };
        self.after_cut(at, result, expected, |error| {
            matches!(error, ForkError::Pause(_) | ForkError::Save(_)) && matches!(goes, Goes::Wrong(_))
        });
    }

    /// A fork in a way that only some backings have, while the guest goes on writing.
    pub fn fork_by(&mut self, vm: usize, goes: Goes, course: &Course) {
        let at = vm % self.vms.len();
        let Machine { vm, guest, now, status: before, settled, .. } = &mut self.vms[at];
        let before = *before;
        goes.tell(guest);
        let hands = RefCell::new(Hands { vm, now, course, moments: 0, wrote: 0 });
        let plan = course.refused.map(|(n, how)| fail_nth_call(n, how));
        let result = B::fork_by(vm, &mut Busy { guest, hands: &hands });
        drop(plan);
        let wrote = hands.into_inner().wrote > 0;
        let Some(result) = result else {
            guest.fail_nth_call(0, Trouble::Error);
            return;
        };
        let first = settled.is_none();
        self.saw(match (&result, course.way) {
            (Ok(_), _) if first => "first fork in another way",
            (Ok(_), Way::Live) if wrote => "forked live, and written meanwhile",
            (Ok(_), Way::LiveMoving) if wrote => "moved live, and written meanwhile",
            (Ok(_), Way::Live) => "forked live",
            (Ok(_), Way::LiveMoving) => "moved live",
            (Ok(_), Way::Moving) => "moved",
            (Err(ForkError::IllegalState(_)), _) => "cut illegal",
            (Err(ForkError::Resume(_)), _) => "not resumed where it went",
            (Err(ForkError::PauseTooLong { .. }), _) => "given up",
            (Err(ForkError::Hole(_)), _) => "no hole",
            (Err(ForkError::Relocate(_)), _) => "not moved",
            (Err(ForkError::Cut(_)), _) => "refused by the system",
            (Err(_), _) => "cut undone",
        });
        let leaves = match course.way {
            _ if course.refused.is_some() => Leaves::Anything,
            Way::Live => Leaves::Copied,
            Way::Moving | Way::LiveMoving => Leaves::Nothing,
        };
        // Undone for one reason, and then not resumed.
        let may_strand = matches!(goes, Goes::Wrong(_)) && (course.refused.is_some() || course.gives_up);
        self.after_cut(at, result, Expected { left: before, leaves, may_strand }, |error| match error {
            ForkError::Pause(_) | ForkError::Save(_) | ForkError::Relocate(_) => matches!(goes, Goes::Wrong(_)),
            ForkError::Hole(_) => matches!(goes, Goes::Wrong(_)) || course.refused.is_some(),
            ForkError::PauseTooLong { .. } => course.gives_up && course.way != Way::Moving,
            ForkError::Cut(_) => course.refused.is_some(),
            _ => false,
        });
    }

    /// What a cut did to a VM, or did not.
    fn after_cut(
        &mut self,
        at: usize,
        result: Result<ForkPoint<B>, ForkError>,
        expected: Expected,
        may_fail: impl Fn(&ForkError) -> bool,
    ) {
        let id = self.fresh_id();
        let Expected { left, leaves, may_strand } = expected;
        let machine = &mut self.vms[at];
        machine.guest.fail_nth_call(0, Trouble::Error);
        let before = machine.status;
        let line = match &machine.origin {
            None => Line { family: id, ancestors: Vec::new() },
            Some(origin) => origin.line.followed_by(origin.id),
        };
        let known = Origin { id, at: machine.now.clone(), line };
        let legal = matches!(before, VmStatus::Running | VmStatus::Paused);
        let cut = match result {
            Ok(point) => {
                assert!(legal, "a VM that is {before:?} was cut");
                machine.status = left;
                Some(point)
            }
            Err(ForkError::IllegalState(error)) => {
                assert!(!legal && error.status == before, "{error}");
                None
            }
            // The cut was made; only nobody was handed it.
            Err(ForkError::Resume(_)) => {
                assert!(legal && left != VmStatus::Frozen && !machine.guest.runs());
                let point = machine.vm.origin().expect("the cut is the VM's origin");
                machine.status = VmStatus::Paused;
                self.teardowns.push(point.teardown().clone());
                machine.origin = Some(known.clone());
                machine.settle(leaves);
                None
            }
            Err(error) => {
                assert!(legal && may_fail(&error), "{error}");
                let runs = machine.guest.runs();
                if may_strand && before == VmStatus::Running && !runs {
                    machine.status = VmStatus::Paused;
                } else {
                    assert_eq!(runs, before == VmStatus::Running, "an undone fork leaves the guest as it was");
                }
                None
            }
        };
        if let Some(point) = cut {
            machine.origin = Some(known.clone());
            machine.settle(leaves);
            self.teardowns.push(point.teardown().clone());
            self.points.push(Point { point, known });
        }
        self.vms[at].check();
        self.thin_out();
    }

    pub fn spawn(&mut self, point: usize, goes: Goes) {
        if self.points.is_empty() {
            return;
        }
        let from = &self.points[point % self.points.len()];
        let clone = from.point.spawn_with(CloneSpec::default(), |clone| {
            assert_eq!(clone.status(), VmStatus::Busy, "nobody runs a clone that is being customized");
            if matches!(goes, Goes::Wrong(_)) { Err("told to fail".into()) } else { Ok(()) }
        });
        match clone {
            Ok(vm) => {
                let guest = ScriptedGuest::loaded(&vm.device_state().expect("a clone has state to be loaded with"));
                let now = from.known.at.clone();
                let (origin, settled) = (Some(from.known.clone()), Some(now.clone()));
                let machine = Machine { vm, guest, now, status: VmStatus::Paused, origin, settled };
                machine.check();
                self.vms.push(machine);
            }
            Err(SpawnError::Customize(_)) => {
                assert!(matches!(goes, Goes::Wrong(_)));
                self.saw("clone refused by its hook");
            }
            Err(error) => panic!("{error}"),
        }
        self.thin_out();
    }

    fn two(&self, a: usize, b: usize) -> Option<(&Point<B>, &Point<B>)> {
        let count = self.points.len();
        (count > 0).then(|| (&self.points[a % count], &self.points[b % count]))
    }

    pub fn diff(&mut self, a: usize, b: usize) {
        let Some((a, b)) = self.two(a, b) else { return };
        match a.point.diff(&b.point) {
            Ok(diff) => {
                assert_eq!(a.known.line.family, b.known.line.family, "strangers were compared");
                if !diff.ram.is_empty() {
                    self.saw("diff of relatives");
                }
                check_between(&a.known.at.ram, &b.known.at.ram, &diff.ram);
                for (at, (_, pages)) in diff.disks.iter().enumerate() {
                    check_between(&a.known.at.disks[at], &b.known.at.disks[at], pages);
                }
            }
            Err(SpaceError::Unrelated(_)) => {
                assert_ne!(a.known.line.family, b.known.line.family);
                self.saw("diff of strangers");
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub fn flatten(&mut self, point: usize) {
        if self.points.is_empty() {
            return;
        }
        let id = self.fresh_id();
        let from = &self.points[point % self.points.len()];
        let flat = from.point.flatten().expect("nothing hinders it");
        let line = Line { family: id, ancestors: Vec::new() };
        let known = Origin { id, at: from.known.at.clone(), line };
        self.points.push(Point { point: flat, known });
        self.thin_out();
    }

    pub fn merge(&mut self, point: usize, onto: usize) {
        let id = self.fresh_id();
        let Some((from, onto)) = self.two(point, onto) else { return };
        let legal = from.known.line.ancestors.contains(&onto.known.id);
        match from.point.merge_onto(&onto.point) {
            Ok(merged) => {
                assert!(legal, "merged onto something that is no ancestor");
                assert_eq!(merged.depth(), onto.point.depth() + 1);
                let line = onto.known.line.followed_by(onto.known.id);
                let mut at = from.known.at.clone();
                at.ram.rewrite(&from.known.at.ram.touched(&onto.known.at.ram));
                for (disk, was) in at.disks.iter_mut().zip(&onto.known.at.disks) {
                    disk.rewrite(&disk.touched(was));
                }
                let known = Origin { id, at, line };
                self.saw("merged");
                self.points.push(Point { point: merged, known });
            }
            Err(SpaceError::Unrelated(_)) => {
                assert!(!legal, "an ancestor was refused");
                self.saw("not merged");
            }
            Err(error) => panic!("{error}"),
        }
        self.thin_out();
    }

    pub fn commit(&mut self, clone: usize, into: usize) {
        let count = self.vms.len();
        let (clone, into) = (clone % count, into % count);
        if clone == into {
            return;
        }
        let clone = self.vms.remove(clone);
        // Removing it has moved those after it.
        let into = into % self.vms.len();
        let target = &mut self.vms[into];
        let still = |machine: &Machine<B>| matches!(machine.status, VmStatus::Paused | VmStatus::Off);
        let id = |machine: &Machine<B>| machine.origin.as_ref().map(|origin| origin.id);
        let (both_still, child) = (still(target) && still(&clone), id(target).is_some() && id(target) == id(&clone));
        let origin = target.origin.as_ref().map(|origin| &origin.at);
        let differs =
            origin.is_some_and(|origin| target.now.pairs(origin).any(|(now, was)| !now.changed(was).is_empty()));
        let wrote =
            origin.is_some_and(|origin| target.now.pairs(origin).any(|(now, was)| !now.touched(was).is_empty()));
        let Machine { vm, guest, now, status, origin, settled } = clone;
        match target.vm.commit(vm) {
            Ok(()) => {
                assert!(both_still && child && !differs, "a commit lost something");
                target.now.ram.take_over(&now.ram);
                target.now.disks.iter_mut().zip(&now.disks).for_each(|(to, from)| to.take_over(from));
                target.guest.register = now.register;
                target.now.register = now.register;
                self.seen.borrow_mut().insert("committed");
            }
            Err(failed) => {
                let (error, vm) = *failed;
                self.seen.borrow_mut().insert(match error {
                    CommitError::IllegalState(_) => "commit illegal",
                    CommitError::NotAChild => "commit of no child",
                    _ => "commit into a diverged VM",
                });
                match error {
                    CommitError::IllegalState(_) => assert!(!both_still, "{error}"),
                    CommitError::NotAChild => assert!(both_still && !child, "{error}"),
                    CommitError::Diverged => assert!(both_still && child && wrote, "{error}"),
                    error => panic!("{error}"),
                }
                self.vms.push(Machine { vm, guest, now, status, origin, settled });
            }
        }
        self.vms[into].check();
    }
}

/// What is to come of a cut.
struct Expected {
    /// The VM's status if it is made.
    left: VmStatus,
    leaves: Leaves,
    /// Whether the guest may stand still if it is undone, because it cannot be resumed either.
    may_strand: bool,
}

/// What a fork leaves private to its parent, unless it was the first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaves {
    Nothing,
    /// The pages of RAM that were copied.
    Copied,
    /// A call failed that might have been one that lays layers over pages: they stay private then.
    Anything,
}

impl<B: Backing> Machine<B> {
    fn settle(&mut self, leaves: Leaves) {
        match (&mut self.settled, leaves) {
            (Some(_), Leaves::Anything) => {}
            (Some(settled), Leaves::Copied) => settled.disks.clone_from(&self.now.disks),
            (settled, _) => *settled = Some(self.now.clone()),
        }
    }

    /// By dropping what was written; says how it came out.
    pub fn reset(&mut self, goes: Goes) -> &'static str {
        goes.tell(&mut self.guest);
        let result = self.vm.reset(&mut self.guest);
        self.is_reset(result)
    }

    fn is_reset(&mut self, result: Result<PageCount, ResetError>) -> &'static str {
        self.guest.fail_nth_call(0, Trouble::Error);
        let legal = matches!(self.status, VmStatus::Running | VmStatus::Paused);
        match (result, &self.origin) {
            (Ok(_), Some(origin)) => {
                assert!(legal, "a VM that is {:?} was reset", self.status);
                assert_eq!(self.guest.register, origin.at.register, "the guest was loaded with its fork point's state");
                self.now = origin.at.clone();
                "reset done"
            }
            (Err(ResetError::IllegalState(_)), _) => {
                assert!(!legal);
                "reset illegal"
            }
            (Err(ResetError::NoOrigin), None) => {
                assert!(legal);
                "reset to nothing"
            }
            (Err(ResetError::Pause(_)), _) => {
                assert!(legal && self.guest.runs(), "it runs on as it was");
                "reset not paused"
            }
            // Memory went back before the embedder failed; the guest's own state is its business.
            (Err(ResetError::Load(_)), Some(origin)) => {
                assert!(legal && !self.guest.runs());
                self.status = VmStatus::Paused;
                self.guest.register = origin.at.register;
                self.now = origin.at.clone();
                "reset not loaded"
            }
            (result, _) => panic!("reset: {result:?}"),
        }
    }
}

impl<B: Ways> Machine<B> {
    /// By copying back what was written, and `more`; says whether it came to that.
    pub fn reset_copying(&mut self, goes: Goes, more: PageRange) -> bool {
        let written = self.origin.as_ref().map(|origin| self.now.ram.touched(&origin.at.ram)).unwrap_or_default();
        goes.tell(&mut self.guest);
        let listed = written.union(&PageSet::from(more.intersect(self.now.ram.geometry().all())));
        let Some(result) = B::reset_copying(&self.vm, &mut self.guest, &listed) else {
            self.guest.fail_nth_call(0, Trouble::Error);
            return false;
        };
        let done = matches!(self.is_reset(result), "reset done" | "reset not loaded");
        if done {
            // They stay private, and count as written.
            self.now.ram.rewrite(&written);
        }
        done
    }
}

impl Line {
    fn followed_by(&self, id: u64) -> Self {
        let mut line = self.clone();
        line.ancestors.push(id);
        line
    }
}

impl Contents {
    /// Its spaces beside another's.
    pub fn pairs<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (&'a Flat, &'a Flat)> {
        std::iter::once((&self.ram, &other.ram)).chain(self.disks.iter().zip(&other.disks))
    }
}

/// Every page that differs is named, and none outside the span of those that were written.
fn check_between(a: &Flat, b: &Flat, found: &PageSet) {
    let (changed, touched) = (a.changed(b), a.touched(b));
    assert!(changed.pages().all(|page| found.contains(page)), "{found:?} must name {changed:?}");
    let span = touched.pages().next().zip(touched.pages().last());
    let inside = |page| span.is_some_and(|(first, last)| first <= page && page <= last);
    assert!(found.pages().all(inside), "{found:?} names pages outside of {touched:?}");
}
