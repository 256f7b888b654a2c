//! Many clones alive at once: each has run, has written, and reads nobody else's writes; and all of it is given back.
//!
//! How much they hold and how long they take is in the figures `many`, `many-kvm` and `memory-kvm`.
#![cfg(target_os = "linux")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use offshoot::backing::Mapped;
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageSize, SECTOR_SIZE, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::testing::ScriptedGuest;
use offshoot::{CloneSpec, DiskName, ForkPoint, Limits, Tree, TreeUsage, Vm, VmName};

const PAGE: u64 = 4096;

/// These tests count what the process holds: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn mappings() -> u64 {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count() as u64
}

/// A fork point of a VM with RAM of `len`, whose every 1,000th page begins with its number, and a disk.
fn point(tree: &Tree, len: ByteSize) -> ForkPoint<Mapped> {
    let layout = RamLayout::flat(len, PageSize::KIB_4).unwrap();
    let disk = Disk::blank(tree, SectorCount::new(1 << 27), Access::ReadWrite).unwrap();
    disk.write(Lba::new(1), &[1; SECTOR_SIZE as usize]).unwrap();
    let name = VmName::new("parent").unwrap();
    let vm: Vm<Mapped> = Vm::new(tree, name, layout, vec![(DiskName::new("root"), disk)]).unwrap();
    (0..len.get() / PAGE).step_by(1000).for_each(|page| {
        vm.ram().store(GuestAddress::new(page * PAGE), page).unwrap();
    });
    vm.start().unwrap();
    let point = vm.fork(&mut ScriptedGuest::running(1)).unwrap();
    point.teardown().wait();
    point
}

/// The pages that clone `n` writes: one of its own among all clones, and one that all write.
fn own(n: u64, len: ByteSize) -> [GuestAddress; 2] {
    [GuestAddress::new((n * 7919 + 1) % (len.get() / PAGE) * PAGE), GuestAddress::new(5000 * PAGE)]
}

#[test]
fn ten_thousand_clones_write_side_by_side() {
    const CLONES: u64 = 10_000;
    const THREADS: u64 = 2;
    let _alone = alone();
    let len = ByteSize::gib(1);
    let tree = Tree::new(Limits { vms: CLONES, ..Limits::default() });
    let point = point(&tree, len);
    let before = (tree.usage(), mappings());
    // By two threads at once, from one fork point.
    let mut clones: Vec<(u64, Vm<Mapped>)> = std::thread::scope(|scope| {
        let spawn = |thread| {
            let numbers = (0..CLONES).filter(move |n| n % THREADS == thread);
            let spawned = numbers.map(|n| {
                let clone = point.spawn(CloneSpec::default()).unwrap();
                clone.start().unwrap();
                own(n, len).into_iter().for_each(|at| clone.ram().store(at, n).unwrap());
                clone.disk("root").unwrap().write(Lba::new(2), &[(n % 251) as u8; SECTOR_SIZE as usize]).unwrap();
                (n, clone)
            });
            spawned.collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || spawn(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!((tree.usage().vms, tree.usage().clone_mappings), (CLONES, CLONES));
    let held = mappings() - before.1;
    assert!(held <= CLONES + 100, "{held} mappings for {CLONES} clones");
    // One too many, and it says why.
    let one_more = point.spawn(CloneSpec::default()).map(drop).unwrap_err();
    assert!(one_more.to_string().contains("Limits::vms"), "{one_more}");

    let names: std::collections::HashSet<_> = clones.iter().map(|(_, clone)| clone.identity().name.as_str()).collect();
    assert_eq!(names.len() as u64, CLONES);
    for (n, clone) in &clones {
        own(*n, len).into_iter().for_each(|at| assert_eq!(clone.ram().load::<u64>(at).unwrap(), *n));
        let neighbours = own(n + 1, len)[0];
        assert_ne!(clone.ram().load::<u64>(neighbours).unwrap(), n + 1, "clone {n} sees another's write");
        let mut sector = [0; SECTOR_SIZE as usize];
        clone.disk("root").unwrap().read(Lba::new(2), &mut sector).unwrap();
        assert_eq!(sector, [(n % 251) as u8; SECTOR_SIZE as usize]);
        clone.disk("root").unwrap().read(Lba::new(1), &mut sector).unwrap();
        assert_eq!(sector, [1; SECTOR_SIZE as usize]);
    }
    // Nobody wrote the fork point.
    let last = point.ram().clone();
    let mut word = [0; 8];
    offshoot::image::Source::read(&last, offshoot::page::ByteOffset::new(5000 * PAGE), &mut word).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 5000);
    // In two parts, so that some go while others are alive.
    clones.truncate(100);
    assert_eq!(tree.usage().clone_mappings, 100);
    let (n, clone) = &clones[99];
    assert_eq!(clone.ram().load::<u64>(own(*n, len)[0]).unwrap(), *n);
    drop(clones);
    assert_eq!(tree.usage(), before.0);
    assert!(mappings() <= before.1 + 100);
    drop((point, last));
    assert_eq!(tree.usage(), TreeUsage::default());
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
mod machines {
    use super::*;
    use crate::common::machine::{kvm_host, machine, start_in_real_mode};
    use std::sync::Arc;

    use kvm_ioctls::{VcpuExit, VcpuFd};
    use offshoot::frontend::kvm::{
        Devices, MachinePlan, SecondLevel, VcpuCount, VcpuIndex, VmBuilder, prefault_second_level,
    };
    use offshoot::page::{PageIndex, PageSet};
    use offshoot::{Admission, AtRest, DeviceState, Prefault};

    /// Real mode: counts in RAM at 0x8000 and in a page of its own, sends the count.
    const COUNTING: &[u8] = &[
        0x66, 0xff, 0x06, 0x00, 0x80, // inc dword [0x8000]
        0x66, 0xa1, 0x00, 0x80, // mov eax, [0x8000]
        0x66, 0xa3, 0x00, 0x90, // mov [0x9000], eax
        0x66, 0xe7, 0x10, // out 0x10, eax
        0xeb, 0xee, // jmp start
    ];
    const CODE: u64 = 0x6000;

    fn next_count(vcpu: &mut VcpuFd) -> u32 {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, data) => u32::from_le_bytes(data.try_into().unwrap()),
            other => panic!("the guest went astray: {other:?}"),
        }
    }

    #[test]
    fn hundreds_of_machines_run_side_by_side() {
        const MACHINES: u64 = 200;
        let _alone = alone();
        let Some(host) = kvm_host() else { return };
        let admission = Admission { descriptors_per_clone: 2, mappings_per_clone: 1, ..Admission::default() };
        let tree = Tree::new(Limits { admission, ..Limits::default() });
        let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
        let vm: Vm<Mapped> = Vm::new(&tree, VmName::new("counting").unwrap(), layout.clone(), vec![]).unwrap();
        vm.ram().write(GuestAddress::new(CODE), COUNTING).unwrap();
        vm.ram().store(GuestAddress::new(0x8000), 1000_u32).unwrap();
        let mut machine = machine(&host, vm.ram(), Devices::NONE);
        start_in_real_mode(&machine.vcpus()[0], CODE);
        let plan = MachinePlan::read(&host, machine.vcpus(), Devices::NONE).unwrap();
        let state = Arc::new(machine.capture(&plan).unwrap());
        drop(machine);
        vm.start().unwrap();
        let point = vm.fork(&mut AtRest(DeviceState::from_object(state.clone()))).unwrap();
        point.teardown().wait();
        drop(vm);

        let spawn = |spec: CloneSpec| {
            let clone = point.spawn(spec).unwrap();
            let built = VmBuilder::new(&host).unwrap().engine_ram(clone.ram()).unwrap().devices(Devices::NONE).unwrap();
            let mut machine = built.vcpus(VcpuCount::ONE).unwrap();
            machine.restore(&host, &state).unwrap();
            (machine, clone)
        };
        // The first shows what the others will touch.
        let (mut machine, clone) = spawn(CloneSpec::default());
        assert_eq!(next_count(&mut machine.vcpus_mut()[0]), 1001);
        let set = clone.working_set().unwrap();
        let written: PageSet = [8, 9].into_iter().map(PageIndex::new).collect();
        assert_eq!(set.written(), &written);
        assert!(set.read().contains(PageIndex::new(CODE / PAGE)));
        drop((machine, clone));

        let prefault = Some(Prefault::new(set.clone()));
        let mut all: Vec<_> = (0..MACHINES)
            .map(|n| {
                // Every other one with its pages mapped ahead, which no guest can tell.
                let ahead = prefault.clone().filter(|_| n % 2 == 0);
                let (mut machine, clone) = spawn(CloneSpec { prefault: ahead, ..CloneSpec::default() });
                match prefault_second_level(&machine.vcpus()[0], VcpuIndex::new(0), &layout, set.written()) {
                    Ok(SecondLevel::Filled(pages)) => assert_eq!(pages.get(), 2),
                    Ok(SecondLevel::Unsupported) => {}
                    Err(error) => panic!("{error}"),
                }
                for step in 1..=n as u32 % 5 + 1 {
                    assert_eq!(next_count(&mut machine.vcpus_mut()[0]), 1000 + step);
                }
                (machine, clone)
            })
            .collect();
        assert_eq!((tree.usage().vms, tree.usage().clone_mappings), (MACHINES, 2 * MACHINES));
        for (n, (machine, clone)) in all.iter_mut().enumerate() {
            let ran = n as u32 % 5 + 1;
            assert_eq!(clone.ram().load::<u32>(GuestAddress::new(0x9000)).unwrap(), 1000 + ran);
            assert_eq!(next_count(&mut machine.vcpus_mut()[0]), 1001 + ran, "machine {n}");
        }
        drop((all, point));
        assert_eq!(tree.usage(), TreeUsage::default());
    }
}
