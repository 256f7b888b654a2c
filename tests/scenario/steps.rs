//! The steps, in order. Each changes its models last.

use super::{Actor, DISK_PAGES, PAGE, Point, RAM_PAGES, Stage, Step, shape};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use offshoot::backing::{Backing, Sealed};
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteOffset, Gfn, GuestAddress, Lba, PageCount, PageIndex, PageRange, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::testing::{Dice, Flat, ScriptedGuest};
use offshoot::{BoxError, CloneSpec, CommitError, DiskName, ForkError, ForkPoint, Guest, ResetError, Vm, VmName};

type Went = Result<(), BoxError>;

pub fn all<B: Backing>() -> Vec<Step<B>> {
    vec![
        ("build", build),
        ("write before any fork", |stage| stage.write(0, 1, 3)),
        ("reset to nothing written", |stage| stage.discard(0, 2, 1)),
        ("fork", |stage| stage.fork(0)),
        ("parent writes on", |stage| stage.write(0, 2, 4)),
        ("spawn", |stage| stage.spawn(0)),
        ("spawn again", |stage| stage.spawn(0)),
        ("clone writes", |stage| stage.write(1, 3, 5)),
        ("clone discards", |stage| stage.discard(1, 7, 2)),
        ("clone zeroes sectors", zero_sectors),
        ("second clone writes", |stage| stage.write(2, 4, 2)),
        ("start the clone", |stage| stage.start(1)),
        ("fork of the clone", |stage| stage.fork(1)),
        ("spawn of the clone", |stage| stage.spawn(1)),
        ("grandchild writes", |stage| stage.write(3, 5, 3)),
        ("reset of the second clone", |stage| stage.reset(2)),
        ("flatten", flatten),
        ("spawn of the flattened", |stage| stage.spawn(2)),
        ("write over the flattened", |stage| stage.write(4, 6, 2)),
        ("parent forks again", |stage| stage.fork(0)),
        ("merge", merge),
        ("spawn of the merged", |stage| stage.spawn(4)),
        ("pause the clone", pause),
        ("commit of the grandchild", commit),
        ("reset of the clone", |stage| stage.reset(1)),
        ("freeze of the second clone", freeze),
        ("diff", diff),
        ("delete the parent", |stage| stage.delete(0)),
        ("write after the parent is gone", |stage| stage.write(0, 7, 6)),
        ("fork after the parent is gone", |stage| stage.fork(0)),
    ]
}

fn build<B: Backing>(stage: &mut Stage<B>) -> Went {
    let disk = Disk::over(
        B::create(&stage.tree, shape(DISK_PAGES), Some(stage.base.clone()))?,
        SectorCount::new(DISK_PAGES * 8),
        Access::ReadWrite,
    )?;
    let layout = RamLayout::flat(shape(RAM_PAGES).len(), shape(1).page_size())?;
    let vm = Vm::new(&stage.tree, VmName::new("parent")?, layout, vec![(DiskName::new("d"), disk)])?;
    vm.start()?;
    let base = Dice::new(5).bytes(5 * PAGE + 100);
    let (ram, disk) = (Flat::new(shape(RAM_PAGES), &[]), Flat::new(shape(DISK_PAGES), &base));
    stage.actors.push(Actor { vm, guest: ScriptedGuest::running(1), ram, disk });
    Ok(())
}

fn zero_sectors<B: Backing>(stage: &mut Stage<B>) -> Went {
    let actor = stage.actor(1);
    let disk = actor.vm.disk("d").expect("it has one");
    // From within a page of the base to within another.
    disk.write_zeroes(Lba::new(3), SectorCount::new(20))?;
    actor.disk.write(ByteOffset::new(3 * 512), &[0; 20 * 512]);
    Ok(())
}

fn flatten<B: Backing>(stage: &mut Stage<B>) -> Went {
    let from = &stage.points[1];
    let point = from.point.flatten()?;
    let (ram, disk) = (from.ram.clone(), from.disk.clone());
    stage.points.push(Point { point, ram, disk });
    Ok(())
}

fn merge<B: Backing>(stage: &mut Stage<B>) -> Went {
    let (from, onto) = (&stage.points[1], &stage.points[0]);
    let point = from.point.merge_onto(&onto.point)?;
    let (ram, disk) = (from.ram.clone(), from.disk.clone());
    stage.points.push(Point { point, ram, disk });
    Ok(())
}

fn diff<B: Backing>(stage: &mut Stage<B>) -> Went {
    let (a, b) = (&stage.points[0], &stage.points[1]);
    let diff = a.point.diff(&b.point)?;
    for page in a.ram.changed(&b.ram).pages() {
        assert!(diff.ram.contains(page), "{page:?} differs, and is not named");
    }
    Ok(())
}

fn pause<B: Backing>(stage: &mut Stage<B>) -> Went {
    stage.with_guest(1, |vm, guest| {
        guest.pause()?;
        Ok(vm.pause()?)
    })
}

/// The grandchild goes back into the clone that it came from.
fn commit<B: Backing>(stage: &mut Stage<B>) -> Went {
    let clone = stage.actors.remove(3);
    match stage.actor(1).vm.commit(clone.vm) {
        Ok(()) => {
            let actor = stage.actor(1);
            (actor.ram, actor.disk) = (clone.ram, clone.disk);
            Ok(())
        }
        Err(failed) => {
            let (error, vm) = *failed;
            stage.actors.insert(3, Actor { vm, ..clone });
            // A mapping that could not be laid over the pages of an earlier fork leaves them private. They show the right
            // bytes, and the engine can no longer tell that nobody wrote them.
            if stage.went_off() && matches!(error, CommitError::Diverged) { Ok(()) } else { Err(error.into()) }
        }
    }
}

fn freeze<B: Backing>(stage: &mut Stage<B>) -> Went {
    let point = stage.with_guest(2, |vm, guest| vm.freeze(guest))?;
    stage.keep(2, point);
    let actor = stage.actor(2);
    assert!(actor.vm.ram().write(GuestAddress::ZERO, &[1]).is_err(), "a frozen VM cannot be written");
    Ok(())
}

impl<B: Backing> Stage<B> {
    fn keep(&mut self, at: usize, point: ForkPoint<B>) {
        let actor = &self.actors[at];
        self.points.push(Point { point, ram: actor.ram.clone(), disk: actor.disk.clone() });
    }

    /// A write over `pages` pages that do not begin or end at a page's edge, to RAM and to the disk.
    fn write(&mut self, at: usize, seed: u64, pages: u64) -> Went {
        let actor = self.actor(at);
        let data = Dice::new(seed).bytes(pages * PAGE - 1024);
        let to = ByteOffset::new(seed * PAGE + 512);
        actor.vm.ram().write(GuestAddress::new(to.get()), &data)?;
        actor.ram.write(to, &data);
        let to = ByteOffset::new((seed % 3) * PAGE + 512);
        actor.vm.disk("d").expect("it has one").write(Lba::new(to.get() / 512), &data)?;
        actor.disk.write(to, &data);
        Ok(())
    }

    fn discard(&mut self, at: usize, first: u64, count: u64) -> Went {
        let actor = self.actor(at);
        actor.vm.ram().discard(Gfn::new(first), PageCount::new(count))?;
        let range = PageRange::new(PageIndex::new(first), PageCount::new(count)).expect("in range");
        actor.ram.zero(range);
        Ok(())
    }

    fn start(&mut self, at: usize) -> Went {
        self.with_guest(at, |vm, guest| {
            guest.resume()?;
            Ok(vm.start()?)
        })
    }

    fn fork(&mut self, at: usize) -> Went {
        let result = self.with_guest(at, |vm, guest| vm.fork(guest));
        match result {
            Ok(point) => self.keep(at, point),
            Err(error) => {
                if let ForkError::Resume(_) = &error {
                    self.start(at)?;
                }
                return Err(error.into());
            }
        }
        // After a resume that panicked, the guest stood and was cut where it stood.
        if self.actor(at).guest.runs() { Ok(()) } else { self.start(at) }
    }

    /// With a hook that writes an identity.
    fn spawn(&mut self, from: usize) -> Went {
        let (point, hook) = (&self.points[from], &mut self.hook);
        let clone = point.point.spawn_with(CloneSpec::default(), |clone| {
            hook.call()?;
            clone.ram().write(GuestAddress::new(PAGE - 3), b"whoami")?;
            hook.call()
        })?;
        let (mut ram, disk) = (point.ram.clone(), point.disk.clone());
        ram.write(ByteOffset::new(PAGE - 3), b"whoami");
        let guest = ScriptedGuest::loaded(&clone.device_state().expect("a clone has state"));
        self.actors.push(Actor { vm: clone, guest, ram, disk });
        Ok(())
    }

    fn reset(&mut self, at: usize) -> Went {
        let runs = self.actor(at).guest.runs();
        let result = catch_unwind(AssertUnwindSafe(|| self.with_guest(at, |vm, guest| vm.reset(guest))));
        let origin = self.actor(at).vm.origin().expect("it lies on a fork point");
        let known = self.points.iter().find(|point| point.point.ram().same(origin.ram()));
        let known = known.expect("every fork point is kept");
        let (ram, disk) = (known.ram.clone(), known.disk.clone());
        let actor = self.actor(at);
        let went_back = match &result {
            Ok(Ok(_)) => {
                assert_eq!(actor.guest.runs(), runs);
                true
            }
            Ok(Err(ResetError::Pause(_))) => false,
            // All of memory went back before.
            Ok(Err(ResetError::Load(_))) => true,
            // Some spaces went back, and none halfway.
            Ok(Err(ResetError::Space(_))) => {
                if ram.first_difference(&actor.ram_now()).is_none() {
                    actor.ram = ram.clone();
                }
                false
            }
            Ok(Err(error)) => panic!("{error}"),
            // At the pause nothing had gone back, later everything.
            Err(_) => ram.first_difference(&actor.ram_now()).is_none(),
        };
        if went_back {
            (actor.ram, actor.disk) = (ram, disk);
        }
        result.unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok(())
    }

    fn delete(&mut self, at: usize) -> Went {
        drop(self.actors.remove(at));
        Ok(())
    }
}
