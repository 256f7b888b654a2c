//! Whoever holds RAM's addresses for rust-vmm code keeps it where it is.

use offshoot::frontend::vm_memory::lease;
use offshoot::page::GuestAddress;
use offshoot::{CloneSpec, ForkError, SpaceError, Tree, VmStatus};
use vm_memory::Bytes;

use crate::passive::{Fail, HIGH, Passive, REGION, WAYS, base, check, move_by, passive, stamp, vm};

#[test]
fn a_vm_whose_addresses_are_leased_is_not_moved() {
    let at = |at| vm_memory::GuestAddress(at);
    // As a first fork, whose old view writes the file that is sealed, and as a later one.
    for forks_before in [0, 1] {
        let parent = vm(&Tree::default());
        let mut guest = passive(Fail::Nothing);
        stamp(&parent, 1);
        for _ in 0..forks_before {
            parent.fork_relocating(&mut guest).unwrap().teardown().wait();
        }
        stamp(&parent, 2);
        let home = base(&parent);
        // Whatever it is asked, it fails: it is asked nothing.
        guest.fail = Fail::NextHole;
        let refused = |guest: &mut Passive| {
            for way in WAYS {
                let refused = move_by(way, &parent, guest);
                assert!(matches!(refused, Err(ForkError::Cut(SpaceError::Leased))), "{refused:?}");
                assert_eq!((guest.running, base(&parent), parent.status()), (true, home, VmStatus::Running));
                check(&parent, 2);
            }
        };
        let leased = lease(parent.ram()).unwrap();
        refused(&mut guest);
        let memory = leased.guest_memory().unwrap();
        refused(&mut guest);
        // One region is enough.
        let (_, region) = memory.remove_region(at(HIGH), REGION.get()).unwrap();
        drop(memory);
        refused(&mut guest);
        drop(region);
        // One that was taken since: the guest is paused by then, and nothing is sealed.
        let taken = std::sync::Arc::new(std::sync::Mutex::new(None));
        guest.fail = Fail::Nothing;
        guest.on_pause = Some({
            let (ram, taken) = (parent.ram().clone(), taken.clone());
            Box::new(move || *taken.lock().unwrap() = Some(lease(&ram).unwrap().guest_memory().unwrap()))
        });
        refused(&mut guest);
        guest.on_pause = None;
        let memory = taken.lock().unwrap().take().unwrap();
        memory.write_obj(77u8, at(0x7000)).unwrap();
        assert_eq!(parent.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 77);
        // In place it can be forked as ever, and the lease goes on working.
        if forks_before == 1 {
            parent.fork(&mut guest).unwrap();
            memory.write_obj(78u8, at(0x7000)).unwrap();
        }
        drop(memory);
        let point = parent.fork_relocating(&mut guest).unwrap();
        assert_ne!(base(&parent), home);
        check(&parent, 2);
        // New ones, at the new place, are as good as any.
        let memory = lease(parent.ram()).unwrap().guest_memory().unwrap();
        memory.write_obj(79u8, at(0x7000)).unwrap();
        assert_eq!(parent.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 79);
        let clone = point.spawn(CloneSpec::default()).unwrap();
        assert_eq!(clone.ram().load::<u8>(GuestAddress::new(0x7000)).unwrap(), 77 + forks_before);
        check(&clone, 2);
    }
}
