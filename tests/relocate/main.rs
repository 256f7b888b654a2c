//! Forks that move RAM to other addresses, without a hypervisor: what holds through them, and that every failing step leaves the VM where
//! it was with nothing left behind.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

#[path = "../common/mod.rs"]
mod common;

mod alone;
#[cfg(feature = "vm-memory")]
mod leased;
mod lives;
mod passive;

use std::panic::{AssertUnwindSafe, catch_unwind};

use offshoot::backing::AddressHole;
use offshoot::page::ByteSize;
use offshoot::{AtRest, CloneSpec, DeviceState, ForkError, SpaceError, SpawnError, Tree, VmStatus};
use passive::{Fail, WAYS, Way, base, check, layout, move_by, passive, stamp, vm};

#[test]
fn a_vm_moves_at_each_fork_and_every_point_is_right() {
    let tree = Tree::default();
    let parent = vm(&tree);
    let mut guest = passive(Fail::Nothing);
    let mut points = Vec::new();
    let mut bases = vec![base(&parent)];
    for n in 1..=6 {
        stamp(&parent, n);
        let point = match n {
            // Between moves, forks in place keep the address.
            3 | 5 => parent.fork(&mut guest).unwrap(),
            2 | 6 => move_by(Way::Live, &parent, &mut guest).unwrap(),
            _ => move_by(Way::Stopped, &parent, &mut guest).unwrap(),
        };
        assert!(guest.running);
        let moved = !matches!(n, 3 | 5);
        assert_eq!(base(&parent) != *bases.last().unwrap(), moved);
        assert!(!moved || !point.timings().relocate.is_zero(), "its stage is in the account");
        bases.push(base(&parent));
        check(&parent, n);
        points.push(point);
    }
    stamp(&parent, 7);
    parent.reset(&mut AtRest(DeviceState::from_bytes([7]))).unwrap();
    check(&parent, 6);
    drop(parent);
    for (point, n) in points.iter().zip(1..) {
        point.teardown().wait();
        point.validate().unwrap();
        check(&point.spawn(CloneSpec::default()).unwrap(), n);
    }
    drop((points, guest));
    assert_eq!(tree.usage(), Tree::default().usage());
}

#[test]
fn every_failing_step_leaves_the_vm_where_it_was() {
    for fail in [Fail::Pause, Fail::Save, Fail::NextHole, Fail::Relocate, Fail::Panic, Fail::Taken(u32::MAX)] {
        // As a first fork, and as a later one.
        for (forks_before, way) in [0, 1].into_iter().flat_map(|before| WAYS.map(|way| (before, way))) {
            let tree = Tree::default();
            let parent = vm(&tree);
            let mut guest = passive(Fail::Nothing);
            stamp(&parent, 1);
            for _ in 0..forks_before {
                parent.fork_relocating(&mut guest).unwrap().teardown().wait();
            }
            stamp(&parent, 2);
            guest.fail = fail;
            let (before, usage) = (base(&parent), tree.usage());
            let failed = catch_unwind(AssertUnwindSafe(|| move_by(way, &parent, &mut guest)));
            match (fail, failed) {
                (Fail::Panic, Err(_))
                | (Fail::Pause, Ok(Err(ForkError::Pause(_))))
                | (Fail::Save, Ok(Err(ForkError::Save(_))))
                | (Fail::NextHole, Ok(Err(ForkError::Hole(_))))
                | (Fail::Relocate, Ok(Err(ForkError::Relocate(_))))
                | (Fail::Taken(_), Ok(Err(ForkError::Cut(SpaceError::HoleTaken)))) => {}
                (fail, other) => panic!("{fail:?} gave {other:?}"),
            }
            assert!(guest.running);
            assert_eq!((parent.status(), base(&parent)), (VmStatus::Running, before), "{fail:?}, {way:?}");
            let now = tree.usage();
            assert_eq!((now.vms, now.fork_points, now.images), (usage.vms, usage.fork_points, usage.images));
            check(&parent, 2);
            // And it can be forked either way afterwards.
            guest.fail = Fail::Nothing;
            stamp(&parent, 3);
            let moved = move_by(way, &parent, &mut guest).unwrap();
            stamp(&parent, 4);
            let stayed = parent.fork(&mut guest).unwrap();
            for (point, n) in [(&moved, 3), (&stayed, 4)] {
                point.teardown().wait();
                check(&point.spawn(CloneSpec::default()).unwrap(), n);
            }
        }
    }
}

#[test]
fn a_guest_that_cannot_resume_stands_paused_at_its_new_place() {
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Resume);
    stamp(&parent, 1);
    let before = base(&parent);
    assert!(matches!(parent.fork_relocating(&mut guest), Err(ForkError::Resume(_))));
    assert_eq!(parent.status(), VmStatus::Paused);
    assert_ne!(base(&parent), before);
    check(&parent, 1);
}

#[test]
fn a_hole_that_is_taken_is_left_for_another() {
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Taken(3));
    stamp(&parent, 1);
    let point = parent.fork_relocating(&mut guest).unwrap();
    assert_eq!(guest.decoys.len(), 3);
    guest.decoys.iter().for_each(|decoy| decoy.validate().unwrap());
    check(&parent, 1);
    let hole = AddressHole::pick(layout().geometry().len()).unwrap();
    let first = point.spawn_into(&hole, CloneSpec::default()).unwrap();
    assert!(!hole.was_lost());
    let taken = point.spawn_into(&hole, CloneSpec::default());
    assert!(matches!(taken, Err(SpawnError::Space(SpaceError::HoleTaken))), "{taken:?}");
    assert!(hole.was_lost());
    let other = AddressHole::pick(ByteSize::mib(4)).unwrap();
    let wrong = point.spawn_into(&other, CloneSpec::default());
    assert!(matches!(wrong, Err(SpawnError::Space(SpaceError::HoleLength { .. }))), "{wrong:?}");
    check(&first, 1);
}

/// The contract says that nobody writes there. Whoever does all the same, once the old view was torn down, reaches nothing.
#[test]
fn old_addresses_that_are_kept_are_cut_off_from_the_fork_point() {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
    let parent = vm(&Tree::default());
    let mut guest = passive(Fail::Nothing);
    stamp(&parent, 1);
    let stale = parent.ram().place().unwrap();
    let point = parent.fork_relocating(&mut guest).unwrap();
    point.teardown().wait();
    let at = (stale.host_ranges().next().unwrap().host.addr().get() + 0x3000) as u64;
    memory.write_all_at(&[99], at).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).unwrap();
    assert_eq!(byte, [99]);
    check(&parent, 1);
    check(&point.spawn(CloneSpec::default()).unwrap(), 1);
}
