//! VMs of RAM alone that live at random, and a model that says what they must read as.

use std::fmt::Display;

use offshoot::backing::Mapped;
use offshoot::page::{ByteOffset, ByteSize, Gfn, GuestAddress, PageCount, PageIndex, PageRange, PageSize};
use offshoot::ram::RamLayout;
use offshoot::testing::{Dice, Flat};
use offshoot::{AtRest, DeviceState, Limits, Tree, Vm, VmName};

/// A guest that stands still and has no state.
pub fn rest() -> AtRest {
    AtRest(DeviceState::from_bytes([]))
}

/// A VM with RAM from address 0 and nothing else, its guest running.
pub fn flat_vm(len: ByteSize, page: PageSize) -> Vm<Mapped> {
    let tree = Tree::new(Limits { mappings_per_vm: 30_000, ..Limits::default() });
    let layout = RamLayout::flat(len, page).expect("a layout");
    let vm = Vm::new(&tree, VmName::new("vm").expect("a name"), layout, vec![]).expect("a VM");
    vm.start().expect("it is off");
    vm
}

/// All that such a VM's RAM holds.
pub fn bytes(vm: &Vm<Mapped>) -> Vec<u8> {
    let mut bytes = vec![0; vm.ram().layout().geometry().len().get() as usize];
    vm.ram().read(GuestAddress::ZERO, &mut bytes).expect("RAM can be read");
    bytes
}

/// What one VM must read as, and what its fork point does.
pub struct Model {
    now: Flat,
    origin: Option<Flat>,
}

impl Model {
    /// Of a VM that was never forked, or of a clone that has done nothing yet.
    pub fn of(vm: &Vm<Mapped>) -> Self {
        let now = Flat::new(vm.ram().layout().geometry(), &bytes(vm));
        Self { origin: vm.origin().map(|_| now.clone()), now }
    }

    /// Writes and discards here and there.
    pub fn scribble(&mut self, vm: &Vm<Mapped>, dice: &mut Dice) {
        let geometry = vm.ram().layout().geometry();
        for _ in 0..dice.below(30) {
            let len = 1 + dice.below(8000);
            let at = dice.below(geometry.len().get() - len);
            let data = if dice.below(4) == 0 { vec![0; len as usize] } else { dice.bytes(len) };
            vm.ram().write(GuestAddress::new(at), &data).expect("RAM can be written");
            self.now.write(ByteOffset::new(at), &data);
        }
        if dice.below(2) == 0 {
            let first = dice.below(geometry.pages().get() - 4);
            let range = PageRange::new(PageIndex::new(first), PageCount::new(1 + dice.below(4))).expect("a range");
            vm.ram().discard(Gfn::new(first), range.count()).expect("RAM can be discarded");
            self.now.zero(range);
        }
    }

    /// The VM was forked: what it is now is its origin. Returns what clones must read as.
    pub fn forked(&mut self) -> Flat {
        self.origin.insert(self.now.clone()).clone()
    }

    /// Whether there is a fork point to go back to.
    pub fn has_origin(&self) -> bool {
        self.origin.is_some()
    }

    /// Resets the VM, which has a fork point.
    pub fn reset(&mut self, vm: &Vm<Mapped>) {
        vm.reset(&mut rest()).expect("it can be reset");
        self.now = self.origin.clone().expect("a fork point");
    }

    /// The VM reads as it must, is sound, and names everything dirty that differs from its origin.
    #[track_caller]
    pub fn check(&self, vm: &Vm<Mapped>, when: impl Display) {
        assert_eq!(self.now.first_difference(&bytes(vm)), None, "{when}");
        vm.validate().unwrap_or_else(|wrong| panic!("{when}: {wrong}"));
        if let Some(origin) = &self.origin {
            let (dirty, changed) = (vm.dirty().expect("pages can be found").ram, self.now.changed(origin));
            assert!(changed.difference(&dirty).is_empty(), "{when}");
        }
    }
}
