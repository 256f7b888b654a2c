//! A guest without a processor, which moves, fails where a test says, and keeps account of what is asked of it; and its VM, whose memory
//! and disk tell one writing from another.

use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageSize, SectorCount};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::{
    AtRest, BoxError, CloneSpec, DeviceState, DiskName, ForkError, ForkPoint, Guest, LivePolicy, Relocate, Tree, Vm,
    VmName,
};

pub const REGION: ByteSize = ByteSize::mib(1);
pub const HIGH: u64 = 16 << 20;

/// The two ways to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Everything is copied in the pause.
    Stopped,
    /// Copied ahead.
    Live,
}

pub const WAYS: [Way; 2] = [Way::Stopped, Way::Live];

pub fn move_by(
    way: Way,
    vm: &Vm<Mapped>,
    guest: &mut (impl Relocate + ?Sized),
) -> Result<ForkPoint<Mapped>, ForkError> {
    match way {
        Way::Stopped => vm.fork_relocating(guest),
        Way::Live => vm.fork_live_relocating(guest, &LivePolicy::default()),
    }
}

/// What a guest is to fail at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fail {
    Nothing,
    Pause,
    Save,
    NextHole,
    Relocate,
    Panic,
    Resume,
    /// Each hole is taken by somebody else, so many times.
    Taken(u32),
}

/// A guest without a processor that keeps account of what is asked of it.
pub struct Passive {
    pub fail: Fail,
    pub running: bool,
    decoy: ForkPoint<Mapped>,
    pub decoys: Vec<Vm<Mapped>>,
    hole: Option<AddressHole>,
    pub places: Vec<PlacedRam>,
    pub on_pause: Option<Box<dyn FnMut()>>,
}

impl Passive {
    fn step(&self, fail: Fail) -> Result<(), BoxError> {
        if self.fail == fail { Err(format!("{fail:?} fails").into()) } else { Ok(()) }
    }
}

impl Guest for Passive {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.step(Fail::Pause)?;
        self.running = false;
        self.on_pause.iter_mut().for_each(|then| then());
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(!self.running);
        self.step(Fail::Save)?;
        Ok(DeviceState::from_bytes([7]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.step(Fail::Resume)?;
        self.running = true;
        Ok(())
    }
}

impl Relocate for Passive {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        self.step(Fail::NextHole)?;
        let hole = AddressHole::pick(layout().geometry().len())?;
        if let Fail::Taken(times @ 1..) = self.fail {
            self.fail = Fail::Taken(times - 1);
            // A clone of another VM is what lies there first.
            self.decoys.push(self.decoy.spawn_into(&hole, CloneSpec::default())?);
        }
        Ok(self.hole.insert(hole).clone())
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        assert!(!self.running);
        assert_eq!(*state.encode(), [7]);
        let hole = self.hole.take().ok_or("no hole was given")?;
        assert_eq!(ram.host_ranges().next().unwrap().host, hole.base());
        self.step(Fail::Relocate)?;
        assert!(self.fail != Fail::Panic, "a panic of the embedder's");
        self.places.push(ram.clone());
        Ok(Deferred::default())
    }
}

pub fn layout() -> RamLayout {
    let region = |start| RamRegion { start: GuestAddress::new(start), len: REGION };
    RamLayout::new(&[region(0), region(HIGH)], PageSize::KIB_4).unwrap()
}

pub fn vm(tree: &Tree) -> Vm<Mapped> {
    let disk = Disk::blank(tree, SectorCount::new(64), Access::ReadWrite).unwrap();
    let vm = Vm::new(tree, VmName::new("mover").unwrap(), layout(), vec![(DiskName::new("root"), disk)]).unwrap();
    vm.start().unwrap();
    vm
}

pub fn passive(fail: Fail) -> Passive {
    let decoy = vm(&Tree::default()).fork(&mut AtRest(DeviceState::from_bytes([]))).unwrap();
    decoy.teardown().wait();
    Passive { fail, running: true, decoy, decoys: Vec::new(), hole: None, places: Vec::new(), on_pause: None }
}

/// Writes what is told apart by `stamp` to RAM, below and above the gap, and to the disk.
pub fn stamp(vm: &Vm<Mapped>, stamp: u8) {
    for at in [0x3000, HIGH + 0x5000 + u64::from(stamp) * 4096] {
        vm.ram().store(GuestAddress::new(at), stamp).unwrap();
    }
    vm.disk("root").unwrap().write(Lba::new(3), &[stamp; 512]).unwrap();
}

pub fn check(vm: &Vm<Mapped>, stamp: u8) {
    for at in [0x3000, HIGH + 0x5000 + u64::from(stamp) * 4096] {
        assert_eq!(vm.ram().load::<u8>(GuestAddress::new(at)).unwrap(), stamp);
    }
    let mut sector = [0; 512];
    vm.disk("root").unwrap().read(Lba::new(3), &mut sector).unwrap();
    assert_eq!(sector, [stamp; 512]);
    vm.validate().unwrap();
}

pub fn base(vm: &Vm<Mapped>) -> usize {
    vm.ram().host_ranges().next().unwrap().host.addr().get()
}
