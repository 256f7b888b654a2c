//! Trees of VMs beside their models: what `model.rs` drives with proptest.
//!
//! A model VM is plain bytes, copied whole at every fork, and a list of which fork points it comes from. Each operation is
//! done to both; whether it is legal is worked out from the model alone, and the engine must agree.

mod check;
mod family;
mod io;
mod ways;

pub use ways::{Course, Way, Ways, Write};

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use offshoot::backing::Backing;
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, Geometry, GuestAddress, PageCount, PageSize, SectorCount};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::{ByteSource, Dice, Flat, ScriptedGuest};
use offshoot::{DiskName, ForkPoint, Limits, Teardown, Tree, Vm, VmName, VmStatus};

/// The most VMs, and the most fork points that the world itself names.
const CROWD: usize = 7;
pub const PAGE: u64 = 4096;
/// RAM: five pages, a hole, six pages.
pub const LOW_PAGES: u64 = 5;
pub const HIGH_PAGES: u64 = 6;
pub const HIGH: u64 = 1 << 32;
/// Nine pages and a piece that ends within a sector.
const IMAGE_BYTES: u64 = 9 * PAGE + 700;
/// Ends within a page.
const BLANK_SECTORS: u64 = 61;

/// One step. Whom it concerns is an index modulo what is alive.
#[derive(Clone, Debug)]
pub enum Op {
    WriteRam { vm: usize, at: u64, len: u64, seed: u64 },
    DiscardRam { vm: usize, first: u64, count: u64 },
    WriteDisk { vm: usize, disk: usize, lba: u64, count: u64, seed: u64 },
    Discard { vm: usize, disk: usize, lba: u64, count: u64 },
    WriteZeroes { vm: usize, disk: usize, lba: u64, count: u64 },
    WriteBack { vm: usize, page: u64 },
    Power { vm: usize, to: Power },
    Fork { vm: usize, goes: Goes },
    ForkBy { vm: usize, goes: Goes, course: Course },
    Freeze { vm: usize, goes: Goes },
    Spawn { point: usize, goes: Goes },
    Reset { vm: usize, goes: Goes },
    ResetCopying { vm: usize, goes: Goes, first: u64, count: u64 },
    Diff { a: usize, b: usize },
    Flatten { point: usize },
    Merge { point: usize, onto: usize },
    Commit { clone: usize, into: usize },
    DropVm { vm: usize },
    DropPoint { point: usize },
}

#[derive(Clone, Copy, Debug)]
pub enum Power {
    Start,
    Pause,
    Off,
}

/// Whether the embedder's side goes well, or its n-th call fails.
#[derive(Clone, Copy, Debug)]
pub enum Goes {
    Well,
    Wrong(u64),
}

/// RAM and disks as bytes, and the register of the guest.
#[derive(Clone)]
pub struct Contents {
    pub ram: Flat,
    pub disks: [Flat; 2],
    pub register: u64,
}

pub struct Machine<B: Backing> {
    pub vm: Vm<B>,
    pub guest: ScriptedGuest,
    pub now: Contents,
    pub status: VmStatus,
    pub origin: Option<Origin>,
    /// RAM and disks as they were when nothing of them was private: what was written since may be, even if a fork has copied it.
    pub settled: Option<Contents>,
}

/// What a VM remembers of the fork point that it lies on.
#[derive(Clone)]
pub struct Origin {
    pub id: u64,
    pub at: Contents,
    pub line: Line,
}

/// Which fork points a fork point comes from, itself not included, and its family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    pub family: u64,
    pub ancestors: Vec<u64>,
}

pub struct Point<B: Backing> {
    pub point: ForkPoint<B>,
    pub known: Origin,
}

pub struct World<B: Backing> {
    pub tree: Tree,
    pub vms: Vec<Machine<B>>,
    pub points: Vec<Point<B>>,
    /// Work that forks put off: waited for before anything is counted.
    pub teardowns: Vec<Teardown>,
    pub names: u64,
    /// Which outcomes came up: a run that never commits proves nothing about commits.
    pub seen: Seen,
}

pub type Seen = Rc<RefCell<BTreeSet<&'static str>>>;

pub const DISKS: [&str; 2] = ["image", "blank"];

fn geometry(len: u64) -> Geometry {
    Geometry::new(ByteSize::new(len.next_multiple_of(PAGE)), PageSize::KIB_4).expect("a valid shape")
}

pub fn layout() -> RamLayout {
    let region = |start, pages: u64| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(pages * PAGE) };
    RamLayout::new(&[region(0, LOW_PAGES), region(HIGH, HIGH_PAGES)], PageSize::KIB_4).expect("a valid layout")
}

impl<B: Ways> World<B> {
    /// One VM, off, with RAM of two regions, a disk over an image and a blank one. The blank one lies on the backing under test too.
    pub fn new(seen: Seen) -> Self {
        let tree = Tree::new(Limits::default());
        let image = Dice::new(1).bytes(IMAGE_BYTES);
        let over = Disk::over_image(&tree, Arc::new(ByteSource::new(image.clone())), Access::ReadWrite);
        let space = B::create(&tree, geometry(BLANK_SECTORS * 512), None).expect("a space");
        let blank = Disk::over(space, SectorCount::new(BLANK_SECTORS), Access::ReadWrite);
        let disks = vec![
            (DiskName::new(DISKS[0]), over.expect("a disk over an image")),
            (DiskName::new(DISKS[1]), blank.expect("a blank disk")),
        ];
        let vm = Vm::new(&tree, VmName::new("root").expect("a name"), layout(), disks).expect("a VM");
        let now = Contents {
            ram: Flat::new(layout().geometry(), &[]),
            disks: [Flat::new(geometry(IMAGE_BYTES), &image), Flat::new(geometry(BLANK_SECTORS * 512), &[])],
            register: 0,
        };
        let guest = ScriptedGuest::paused(0);
        let root = Machine { vm, guest, now, status: VmStatus::Off, origin: None, settled: None };
        Self { tree, vms: vec![root], points: Vec::new(), teardowns: Vec::new(), names: 1, seen }
    }

    /// Does every step, checking after each; at the end drops all of it and looks for what is left.
    pub fn play(mut self, ops: &[Op]) {
        for (at, op) in ops.iter().enumerate() {
            self.step(op);
            self.check_books();
            if at % 6 == 5 {
                self.check_all();
            }
        }
        self.check_all();
        let Self { tree, vms, points, teardowns, .. } = self;
        drop(vms);
        drop(points);
        for teardown in &teardowns {
            teardown.wait();
        }
        assert_eq!(tree.usage(), offshoot::TreeUsage::default(), "something is left when all is dropped");
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::WriteRam { vm, at, len, seed } => self.on(vm, |m| m.write_ram(at, len, seed)),
            Op::DiscardRam { vm, first, count } => self.on(vm, |m| m.discard_ram(first, count)),
            Op::WriteDisk { vm, disk, lba, count, seed } => self.on(vm, |m| m.write_disk(disk % 2, lba, count, seed)),
            Op::Discard { vm, disk, lba, count } => self.on(vm, |m| m.discard(disk % 2, lba, count)),
            Op::WriteZeroes { vm, disk, lba, count } => self.on(vm, |m| m.write_zeroes(disk % 2, lba, count)),
            Op::WriteBack { vm, page } => self.on(vm, |m| m.write_back(page)),
            Op::Power { vm, to } => self.on(vm, |m| m.power(to)),
            Op::Fork { vm, goes } => self.cut(vm, goes, VmStatus::Running),
            Op::ForkBy { vm, goes, ref course } => self.fork_by(vm, goes, course),
            Op::Freeze { vm, goes } => self.cut(vm, goes, VmStatus::Frozen),
            Op::Spawn { point, goes } => self.spawn(point, goes),
            Op::Reset { vm, goes } => {
                let seen = self.seen.clone();
                self.on(vm, |m| {
                    seen.borrow_mut().insert(m.reset(goes));
                });
            }
            Op::ResetCopying { vm, goes, first, count } => {
                let seen = self.seen.clone();
                self.on(vm, |m| {
                    if m.reset_copying(goes, pages(first, count)) {
                        seen.borrow_mut().insert("copied back");
                    }
                });
            }
            Op::Diff { a, b } => self.diff(a, b),
            Op::Flatten { point } => self.flatten(point),
            Op::Merge { point, onto } => self.merge(point, onto),
            Op::Commit { clone, into } => self.commit(clone, into),
            Op::DropVm { vm } => {
                if self.vms.len() > 1 {
                    let at = vm % self.vms.len();
                    drop(self.vms.swap_remove(at));
                }
            }
            Op::DropPoint { point } => {
                if !self.points.is_empty() {
                    let at = point % self.points.len();
                    drop(self.points.swap_remove(at));
                }
            }
        }
    }

    /// Does something to one VM and compares all of it.
    fn on(&mut self, vm: usize, step: impl FnOnce(&mut Machine<B>)) {
        let at = vm % self.vms.len();
        step(&mut self.vms[at]);
        self.vms[at].check();
    }

    pub fn saw(&self, outcome: &'static str) {
        self.seen.borrow_mut().insert(outcome);
    }

    pub fn fresh_id(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    /// Makes room, so that a long run does not end in nothing but look-ups over a crowd.
    pub fn thin_out(&mut self) {
        while self.vms.len() > CROWD {
            self.vms.swap_remove(1);
        }
        while self.points.len() > CROWD {
            self.points.swap_remove(0);
        }
    }
}

/// As the engine counts them.
pub fn pages(first: u64, count: u64) -> offshoot::page::PageRange {
    offshoot::page::PageRange::new(offshoot::page::PageIndex::new(first), PageCount::new(count)).expect("in range")
}
