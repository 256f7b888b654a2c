//! Live forks from outside: guests that write through every fork, everything that a fork does beside RAM, random lives against a
//! model, and KVM.
//!
//! Nothing here waits for time to pass: writers stop at a gate, and a fork's rounds need no help to find what they wrote.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use common::lives::{Model, bytes, flat_vm, rest};
use offshoot::backing::Mapped;
use offshoot::disk::{Access, Disk};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageCount, PageSize, SectorCount};
use offshoot::ram::{Ram, RamLayout};
use offshoot::testing::Dice;
use offshoot::{
    BoxError, CloneSpec, DeviceState, DiskName, ForkError, Guest, LivePolicy, OnExceeded, PrecopyEnd, Tree, Vm, VmName,
    VmStatus,
};

const PAGE: u64 = 4096;

fn at(page: u64) -> GuestAddress {
    GuestAddress::new(page * PAGE)
}

fn ram_vm(pages: u64) -> Vm<Mapped> {
    flat_vm(ByteSize::new(pages * PAGE), PageSize::KIB_4)
}

/// A guest whose every step does what a test says.
struct Scripted<'a> {
    pause: &'a mut dyn FnMut() -> Result<(), BoxError>,
    save: &'a mut dyn FnMut() -> Result<(), BoxError>,
    resume: &'a mut dyn FnMut() -> Result<(), BoxError>,
}

impl Guest for Scripted<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        (self.pause)()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        (self.save)().map(|()| DeviceState::from_bytes(vec![3]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        (self.resume)()
    }
}

#[test]
fn the_fork_point_is_the_instant_of_the_pause_in_ram_and_on_disks() {
    let tree = Tree::default();
    let disk = Disk::blank(&tree, SectorCount::new(128), Access::ReadWrite).unwrap();
    let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
    let vm: Vm<Mapped> =
        Vm::new(&tree, VmName::new("vm").unwrap(), layout, vec![(DiskName::new("root"), disk)]).unwrap();
    vm.start().unwrap();
    for round in 1..=3u64 {
        // The first is the VM's first fork: nothing is copied then.
        (0..40).for_each(|page| vm.ram().store(at(page), round).unwrap());
        let disk = vm.disk("root").unwrap();
        disk.write(Lba::new(0), &[1; 512]).unwrap();
        let point = vm
            .fork_live(
                &mut Scripted {
                    // The last instructions before the guest stands still, and the first after.
                    pause: &mut || {
                        (30..50).for_each(|page| vm.ram().store(at(page), 100 + round).unwrap());
                        disk.write(Lba::new(0), &[100 + round as u8; 512]).unwrap();
                        Ok(())
                    },
                    save: &mut || Ok(()),
                    resume: &mut || {
                        (0..60).for_each(|page| vm.ram().store(at(page), 200 + round).unwrap());
                        disk.write(Lba::new(0), &[200 + round as u8; 512]).unwrap();
                        Ok(())
                    },
                },
                &LivePolicy::default(),
            )
            .unwrap();
        let clone = point.spawn(CloneSpec::default()).unwrap();
        let word = |page| clone.ram().load::<u64>(at(page)).unwrap();
        assert!((0..30).all(|page| word(page) == round));
        assert!((30..50).all(|page| word(page) == 100 + round));
        assert!((50..60).all(|page| word(page) == if round == 1 { 0 } else { 200 + round - 1 }));
        let mut sector = [0; 512];
        clone.disk("root").unwrap().read(Lba::new(0), &mut sector).unwrap();
        assert_eq!(sector, [100 + round as u8; 512]);
        let precopy = point.timings().precopy.unwrap();
        assert_eq!(precopy.end, if round == 1 { PrecopyEnd::NotNeeded } else { PrecopyEnd::Converged });
        assert!(point.timings().stopped() + precopy.total <= point.timings().total);
        vm.validate().unwrap();
    }
}

#[test]
fn an_embedders_failure_undoes_the_fork() {
    let vm = ram_vm(256);
    let policy = LivePolicy::default();
    (0..100).for_each(|page| vm.ram().store(at(page), 1u64).unwrap());
    vm.fork(&mut rest()).unwrap();
    for step in 0..6u64 {
        (0..50).for_each(|page| vm.ram().store(at(page), step).unwrap());
        let (before, dirty) = (bytes(&vm), vm.dirty().unwrap());
        let fail = |here: bool| if here { Err(BoxError::from("no")) } else { Ok(()) };
        let forked = vm.fork_live(
            &mut Scripted {
                pause: &mut || fail(step % 3 == 0),
                save: &mut || fail(step % 3 == 1),
                resume: &mut || fail(step % 3 == 2),
            },
            &policy,
        );
        assert!(bytes(&vm) == before);
        vm.validate().unwrap();
        match step % 3 {
            0 => assert!(matches!(forked, Err(ForkError::Pause(_)))),
            1 => assert!(matches!(forked, Err(ForkError::Save(_)))),
            _ => {
                // The cut was made: it is the origin.
                assert!(matches!(forked, Err(ForkError::Resume(_))));
                assert_eq!(vm.status(), VmStatus::Paused);
                assert!(vm.dirty().unwrap().ram.is_empty());
                let clone = vm.origin().unwrap().spawn(CloneSpec::default()).unwrap();
                assert!(bytes(&clone) == before);
                vm.start().unwrap();
                continue;
            }
        }
        assert_eq!(vm.status(), VmStatus::Running);
        assert_eq!(vm.dirty().unwrap(), dirty);
    }
    // A panic of the embedder's is taken back the same way.
    vm.ram().store(at(7), 9u64).unwrap();
    let dirty = vm.dirty().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut guest = Scripted { pause: &mut || Ok(()), save: &mut || panic!("embedder"), resume: &mut || Ok(()) };
        vm.fork_live(&mut guest, &policy)
    }));
    assert!(panicked.is_err());
    assert_eq!((vm.status(), vm.dirty().unwrap()), (VmStatus::Running, dirty));
    vm.validate().unwrap();
}

/// Where writers stand while their VM is paused.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Not zero: writers are asked to come to the gate.
    wanted: AtomicU64,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    over: bool,
    waiting: usize,
    running: usize,
}

impl Gate {
    /// Where a writer may be stopped; `false` once all is over.
    fn pass(&self) -> bool {
        if self.wanted.load(Ordering::Acquire) == 0 {
            return true;
        }
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        self.changed.notify_all();
        while state.closed && !state.over {
            state = self.changed.wait(state).unwrap();
        }
        state.waiting -= 1;
        !state.over
    }

    fn close(&self) {
        let mut state = self.state.lock().unwrap();
        state.closed = true;
        self.wanted.store(1, Ordering::Release);
        while state.waiting < state.running {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn open(&self) {
        let mut state = self.state.lock().unwrap();
        self.wanted.store(u64::from(state.over), Ordering::Release);
        state.closed = false;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.state.lock().unwrap().over = true;
        self.wanted.store(1, Ordering::Release);
        self.changed.notify_all();
    }
}

const WRITERS: u64 = 3;
const PAGES: u64 = 2048;
/// Words of a page that a writer fills.
const WORDS: u64 = 8;

/// What a page says of itself: who wrote it, which page it is, and when. Each word of it must say the same.
fn mark(writer: u64, page: u64, turn: u64) -> u64 {
    turn << 24 | writer << 16 | page
}

/// Writes pages of its own, one after another, each with the number of its turn, which it publishes.
fn write(ram: &Ram<Mapped>, gate: &Gate, writer: u64, turn: &AtomicU64) {
    let mut dice = Dice::new(writer);
    while gate.pass() {
        let now = turn.load(Ordering::Relaxed) + 1;
        let page = dice.below(PAGES / WRITERS) * WRITERS + writer;
        for word in 0..WORDS {
            let offset = word * (PAGE / WORDS) + 8 * writer;
            ram.store(GuestAddress::new(page * PAGE + offset), mark(writer, page, now)).unwrap();
        }
        turn.store(now, Ordering::Relaxed);
    }
}

/// Checks every page of a clone; returns how many checks that were.
fn check(clone: &Vm<Mapped>, turns: &[u64]) -> u64 {
    let mut latest = [0; WRITERS as usize];
    for page in 0..PAGES {
        let writer = page % WRITERS;
        let word =
            |n: u64| clone.ram().load::<u64>(GuestAddress::new(page * PAGE + n * (PAGE / WORDS) + 8 * writer)).unwrap();
        let first = word(0);
        assert!((1..WORDS).all(|n| word(n) == first), "page {page} is torn");
        if first != 0 {
            let turn = first >> 24;
            assert_eq!(first, mark(writer, page, turn), "page {page} is foreign");
            assert!(turn <= turns[writer as usize], "page {page} is of the future");
            latest[writer as usize] = turn.max(latest[writer as usize]);
        }
    }
    // The last page that each wrote before the pause is there.
    assert_eq!(latest, *turns);
    PAGES * WORDS
}

#[test]
fn writers_run_through_every_fork_and_no_page_is_torn_or_foreign() {
    let vm = ram_vm(PAGES);
    let gate = Gate::default();
    let turns: [AtomicU64; WRITERS as usize] = Default::default();
    let now = || turns.each_ref().map(|turn| turn.load(Ordering::Relaxed));
    let mut checks = 0;
    thread::scope(|scope| {
        gate.state.lock().unwrap().running = WRITERS as usize;
        for writer in 0..WRITERS {
            let (ram, gate, turn) = (vm.ram().clone(), &gate, &turns[writer as usize]);
            scope.spawn(move || write(&ram, gate, writer, turn));
        }
        for round in 0..40u32 {
            let mut paused_at = [0; WRITERS as usize];
            let mut guest = Scripted {
                pause: &mut || {
                    gate.close();
                    paused_at = now();
                    Ok(())
                },
                save: &mut || Ok(()),
                resume: &mut || {
                    gate.open();
                    Ok(())
                },
            };
            let policy = LivePolicy { max_rounds: round % 5, target: PageCount::new(8), ..LivePolicy::default() };
            let point = match round % 8 {
                5 => vm.fork(&mut guest).unwrap(),
                6 => {
                    let policy = LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..policy };
                    let given_up = vm.fork_live(&mut guest, &policy);
                    assert!(matches!(given_up, Err(ForkError::PauseTooLong { .. })));
                    continue;
                }
                _ => vm.fork_live(&mut guest, &policy).unwrap(),
            };
            let clone = point.spawn(CloneSpec::default()).unwrap();
            checks += check(&clone, &paused_at);
        }
        gate.close();
        vm.validate().unwrap();
        checks += check(&vm, &now());
        gate.end();
    });
    assert!(checks >= 30 * PAGES * WORDS);
}

/// Random lives: writes, discards, forks of every kind, resets, clones that are forked live themselves; a model says what is right.
#[test]
fn random_lives_agree_with_a_model() {
    for (seed, size) in [(1, 4), (2, 4), (3, 4), (4, 16), (5, 16)] {
        let vm = flat_vm(ByteSize::kib(512), PageSize::new(ByteSize::kib(size)).unwrap());
        life(vm, &mut Dice::new(seed), 2);
    }
}

fn life(vm: Vm<Mapped>, dice: &mut Dice, generations: u32) {
    let mut model = Model::of(&vm);
    for step in 0..25 {
        model.scribble(&vm, dice);
        match dice.below(8) {
            0 => {
                let point = vm.fork(&mut rest()).unwrap();
                let clone = point.spawn(CloneSpec::default()).unwrap();
                assert_eq!(model.forked().first_difference(&bytes(&clone)), None);
            }
            1 if model.has_origin() => model.reset(&vm),
            2 => {
                let policy =
                    LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..Default::default() };
                let refused = vm.fork_live(&mut rest(), &policy);
                if model.has_origin() {
                    assert!(matches!(refused, Err(ForkError::PauseTooLong { .. })));
                } else {
                    model.forked();
                }
            }
            _ => {
                let policy = LivePolicy { max_rounds: dice.below(3) as u32, ..Default::default() };
                let point = {
                    let mut pause = || {
                        model.scribble(&vm, dice);
                        Ok(())
                    };
                    let mut guest = Scripted { pause: &mut pause, save: &mut || Ok(()), resume: &mut || Ok(()) };
                    vm.fork_live(&mut guest, &policy).unwrap()
                };
                let clone = point.spawn(CloneSpec::default()).unwrap();
                assert_eq!(model.forked().first_difference(&bytes(&clone)), None, "step {step}");
                if generations > 0 && dice.below(4) == 0 {
                    clone.start().unwrap();
                    life(clone, dice, generations - 1);
                }
            }
        }
        model.check(&vm, format_args!("step {step}"));
    }
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
mod kvm {
    use super::*;
    use common::machine::{kvm_host, machine, start_in_real_mode};
    use offshoot::frontend::kvm::Devices;

    /// Real mode: counts in bx, stores the count in two pages and sends its low byte.
    const COUNTING: &[u8] = &[
        0x43, // inc bx
        0x89, 0x1e, 0x00, 0x20, // mov [0x2000], bx
        0x89, 0x1e, 0x00, 0x30, // mov [0x3000], bx
        0x88, 0xd8, // mov al, bl
        0xe6, 0x10, // out 0x10, al
        0xeb, 0xf1, // jmp start
    ];

    /// A vCPU writes through a slot over the range, in kernel mode as far as userfaultfd is concerned, while live forks protect it.
    #[test]
    fn a_vcpus_writes_are_seen_through_every_round() {
        let Some(host) = kvm_host() else { return };
        let vm = ram_vm(512);
        vm.ram().write(GuestAddress::new(0x1000), COUNTING).unwrap();
        let mut machine = machine(&host, vm.ram(), Devices::NONE);
        let vcpu = &mut machine.vcpus_mut()[0];
        start_in_real_mode(vcpu, 0x1000);

        let gate = Gate::default();
        gate.state.lock().unwrap().running = 1;
        let sent = AtomicU64::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while gate.pass() {
                    let exit = vcpu.run().unwrap();
                    assert!(matches!(exit, kvm_ioctls::VcpuExit::IoOut(0x10, [_])), "{exit:?}");
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
            vm.fork(&mut rest_at(&gate)).unwrap();
            for round in 0..30u64 {
                // Nothing but the vCPU writes: each fork must wait until it has.
                let seen = sent.load(Ordering::Relaxed);
                while sent.load(Ordering::Relaxed) < seen + 2 {
                    thread::yield_now();
                }
                let mut count = 0;
                let policy =
                    LivePolicy { max_rounds: 1 + round as u32 % 4, target: PageCount::ZERO, ..Default::default() };
                let point = {
                    let mut pause = || {
                        gate.close();
                        count = sent.load(Ordering::Relaxed);
                        Ok(())
                    };
                    let mut resume = || {
                        gate.open();
                        Ok(())
                    };
                    let mut guest = Scripted { pause: &mut pause, save: &mut || Ok(()), resume: &mut resume };
                    vm.fork_live(&mut guest, &policy).unwrap()
                };
                let clone = point.spawn(CloneSpec::default()).unwrap();
                let word = |at| u64::from(clone.ram().load::<u16>(GuestAddress::new(at)).unwrap());
                assert_eq!((word(0x2000), word(0x3000)), (count & 0xffff, count & 0xffff), "round {round}");
            }
            gate.end();
        });
    }

    /// A guest that is stopped at the gate and no more.
    fn rest_at(gate: &Gate) -> impl Guest + '_ {
        struct AtGate<'a>(&'a Gate);
        impl Guest for AtGate<'_> {
            fn pause(&mut self) -> Result<(), BoxError> {
                self.0.close();
                Ok(())
            }

            fn save(&mut self) -> Result<DeviceState, BoxError> {
                Ok(DeviceState::from_bytes(vec![]))
            }

            fn resume(&mut self) -> Result<(), BoxError> {
                self.0.open();
                Ok(())
            }
        }
        AtGate(gate)
    }
}
