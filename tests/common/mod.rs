//! What tests of whole VMs begin with, on any backing.

#![allow(dead_code, reason = "each test that includes this file uses some of it")]

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod lives;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod machine;

use offshoot::backing::{AnyPage, Backing, Heap};
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, GuestAddress, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::testing::ScriptedGuest;
use offshoot::{BuildError, DiskName, Limits, Tree, TreeUsage, Vm, VmName};

pub const PAGE: u64 = 4096;
pub const RAM_PAGES: u64 = 16;

/// A test on every backing that this machine has.
#[macro_export]
macro_rules! on_every_backing {
    ($($test:ident),* $(,)?) => {
        mod heap {
            $(#[test] fn $test() { super::$test::<offshoot::backing::Heap>(); })*
        }
        mod any_page {
            $(#[test] fn $test() { super::$test::<$crate::common::AnyHeap>(); })*
        }
        #[cfg(target_os = "linux")]
        mod mapped {
            $(#[test] fn $test() { super::$test::<offshoot::backing::Mapped>(); })*
        }
    };
}

pub type AnyHeap = Heap<AnyPage>;

/// A VM that is off, with a disk, on a tree of its own.
pub fn off<B: Backing>(limits: Limits) -> (Tree, Vm<B>) {
    let tree = Tree::new(limits);
    let vm = off_on(&tree).expect("a VM");
    (tree, vm)
}

/// The same on a tree that is there already.
pub fn off_on<B: Backing>(tree: &Tree) -> Result<Vm<B>, BuildError> {
    let layout = RamLayout::flat(ByteSize::new(RAM_PAGES * PAGE), PageSize::KIB_4).expect("a layout");
    let disk = Disk::blank(tree, SectorCount::new(64), Access::ReadWrite).expect("a disk");
    Vm::new(tree, VmName::new("parent").expect("a name"), layout, vec![(DiskName::new("d"), disk)])
}

/// The same, with its guest running.
pub fn running<B: Backing>(limits: Limits) -> (Tree, Vm<B>, ScriptedGuest) {
    let (tree, vm) = off(limits);
    vm.start().expect("it is off");
    (tree, vm, ScriptedGuest::running(1))
}

pub fn put<B: Backing>(vm: &Vm<B>, page: u64, value: u64) {
    vm.ram().store(GuestAddress::new(page * PAGE), value).expect("RAM can be written");
}

pub fn get<B: Backing>(vm: &Vm<B>, page: u64) -> u64 {
    vm.ram().load(GuestAddress::new(page * PAGE)).expect("RAM can be read")
}

#[track_caller]
pub fn assert_empty(tree: &Tree) {
    assert_eq!(tree.usage(), TreeUsage::default(), "something is left");
}
