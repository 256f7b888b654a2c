//! Deep lines of fork points whose layers are merged in the background, while their VMs are forked, spawned, reset and compared.
//!
//! Nothing here waits for time to pass: a merge that must be done is waited for by `ForkPoint::teardown`, and otherwise it may come whenever it
//! likes. What a process holds is counted, so these tests take turns.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;

use offshoot::backing::{Backing, Heap, Mapped, Sealed};
use offshoot::page::{ByteOffset, ByteSize, Geometry, GuestAddress, PageIndex, PageRange, PageSize};
use offshoot::ram::RamLayout;
use offshoot::testing::{Dice, Flat};
use offshoot::{
    AtRest, CloneSpec, DeviceState, ForkError, ForkPoint, Limits, SpaceError, Teardown, Tree, TreeUsage, Vm, VmName,
    VmStatus,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 200;

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rest() -> AtRest {
    AtRest(DeviceState::from_bytes(vec![]))
}

fn geometry() -> Geometry {
    Geometry::new(ByteSize::new(PAGES * PAGE), PageSize::KIB_4).unwrap()
}

fn running<B: Backing>(tree: &Tree) -> Vm<B> {
    let layout = RamLayout::flat(geometry().len(), PageSize::KIB_4).unwrap();
    let vm = Vm::new(tree, VmName::new("root").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    vm
}

fn spawned<B: Backing>(point: &ForkPoint<B>) -> Vm<B> {
    let vm = point.spawn(CloneSpec::default()).unwrap();
    vm.start().unwrap();
    vm
}

fn at(page: u64) -> GuestAddress {
    GuestAddress::new(page * PAGE)
}

fn bytes<B: Backing>(vm: &Vm<B>) -> Vec<u8> {
    let mut bytes = vec![0; geometry().len().get() as usize];
    vm.ram().read(GuestAddress::ZERO, &mut bytes).unwrap();
    bytes
}

/// Descriptors and mappings of layers in this process.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let ours = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    let files = ours.filter(|to| to.to_string_lossy().contains("memfd:offshoot")).count();
    (files, maps.lines().filter(|line| line.contains("memfd:offshoot")).count())
}

fn wait(teardowns: &mut Vec<Teardown>) {
    for teardown in teardowns.drain(..) {
        teardown.wait();
    }
}

struct Actor<B: Backing> {
    vm: Vm<B>,
    model: Flat,
    origin: Flat,
}

/// Random lives of a family whose merges come when they come, against full copies.
fn family<B: Backing>(limits: Limits, seed: u64, steps: u64) {
    let _turn = turn();
    let before = held();
    let tree = Tree::new(limits);
    let mut dice = Dice::new(seed);
    let mut teardowns: Vec<Teardown> = Vec::new();
    let first = running::<B>(&tree);
    let empty = Flat::new(geometry(), &[]);
    let point = first.fork(&mut rest()).unwrap();
    let mut points = vec![(point, empty.clone())];
    let mut actors = vec![Actor { vm: first, model: empty.clone(), origin: empty }];
    for _ in 0..steps {
        let who = dice.below(actors.len() as u64) as usize;
        let which = dice.below(points.len() as u64) as usize;
        let actor = &mut actors[who];
        match dice.below(10) {
            0..=2 => {
                for _ in 0..dice.below(8) {
                    let (page, byte) = (dice.below(PAGES), dice.below(256) as u8);
                    actor.vm.ram().store(at(page), byte).unwrap();
                    actor.model.write(ByteOffset::new(page * PAGE), &[byte]);
                }
            }
            3 => {
                let start = dice.below(PAGES);
                let end = (start + dice.below(9)).min(PAGES);
                let range = PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
                actor.vm.ram().space().zero(range).unwrap();
                actor.model.zero(range);
            }
            4..=5 => {
                let point = actor.vm.fork(&mut rest()).unwrap();
                actor.origin = actor.model.clone();
                teardowns.push(point.teardown().clone());
                points.push((point, actor.model.clone()));
            }
            6 => {
                let (point, model) = &points[which];
                actors.push(Actor { vm: spawned(point), model: model.clone(), origin: model.clone() });
            }
            7 => {
                actor.vm.reset(&mut rest()).unwrap();
                actor.model = actor.origin.clone();
                assert!(bytes(&actor.vm) == actor.model.bytes());
            }
            8 => {
                let (a, b) = (&points[which], &points[dice.below(points.len() as u64) as usize]);
                let diff = a.0.diff(&b.0).unwrap().ram;
                for page in geometry().all().iter() {
                    assert!(diff.contains(page) || a.1.page(page) == b.1.page(page), "{page:?} missed");
                }
            }
            _ => {
                wait(&mut teardowns);
                actors.iter().for_each(|actor| {
                    assert!(bytes(&actor.vm) == actor.model.bytes());
                    actor.vm.validate().unwrap();
                });
                for (point, model) in &points {
                    point.validate().unwrap();
                    let clone = spawned(point);
                    assert!(bytes(&clone) == model.bytes());
                }
            }
        }
        if points.len() > 6 {
            points.swap_remove(dice.below(6) as usize);
        }
        if actors.len() > 4 {
            actors.swap_remove(dice.below(4) as usize);
        }
    }
    drop((actors, points));
    wait(&mut teardowns);
    assert_eq!(tree.usage(), TreeUsage::default());
    assert_eq!(held(), before);
}

#[test]
fn families_keep_their_bytes_whatever_is_merged() {
    let limits = Limits { merge_over_layers: 3, merge_over_mappings: 24, ..Limits::default() };
    for seed in 0..3 {
        family::<Mapped>(limits, seed, 250);
        family::<Mapped>(Limits { mappings_per_vm: 20, ..limits }, seed, 250);
        family::<Heap>(limits, seed, 250);
    }
}

#[test]
fn merges_run_beside_forks_spawns_and_resets() {
    let _turn = turn();
    let before = held();
    let tree = Tree::new(Limits { merge_over_layers: 2, merge_over_mappings: 12, ..Limits::default() });
    let mut teardowns = Vec::new();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                // Few at a time, so that images and clones of many ages are alive at once.
                let (to, from) = mpsc::sync_channel::<(ForkPoint<Mapped>, Vec<u8>)>(4);
                scope.spawn(move || {
                    for (point, model) in from {
                        let clone = spawned(&point);
                        assert!(bytes(&clone) == model);
                        (0..PAGES).step_by(7).for_each(|page| clone.ram().store(at(page), 255u8).unwrap());
                        clone.reset(&mut rest()).unwrap();
                        assert!(bytes(&clone) == model);
                        let deeper = clone.fork(&mut rest()).unwrap();
                        assert!(deeper.diff(&point).unwrap().ram.is_empty());
                        deeper.teardown().wait();
                    }
                });
                to
            })
            .collect();
        let vm = running::<Mapped>(&tree);
        let mut model = bytes(&vm);
        let mut dice = Dice::new(5);
        for level in 0..150u64 {
            for _ in 0..6 {
                let page = dice.below(PAGES);
                vm.ram().store(at(page), level as u8).unwrap();
                model[(page * PAGE) as usize] = level as u8;
            }
            let point = vm.fork(&mut rest()).unwrap();
            teardowns.push(point.teardown().clone());
            readers[level as usize % readers.len()].send((point, model.clone())).unwrap();
        }
    });
    wait(&mut teardowns);
    assert_eq!(tree.usage(), TreeUsage::default());
    assert_eq!(held(), before);
}

#[test]
fn a_thousand_levels_take_a_few_descriptors() {
    let _turn = turn();
    let before = held();
    let tree = Tree::new(Limits { merge_over_layers: 6, layers_per_image: 8, ..Limits::default() });
    let mut vm = running::<Mapped>(&tree);
    for level in 0..1000u64 {
        vm.ram().store(at(level * 7 % PAGES), level as u8).unwrap();
        let point = vm.fork(&mut rest()).unwrap();
        // With a limit so close, the next fork must not come before the merge.
        point.teardown().wait();
        vm = spawned(&point);
        if level % 50 == 0 {
            let (files, mappings) = held();
            assert!(files <= 8 + before.0, "{files} descriptors at level {level}");
            assert!(mappings as u64 <= PAGES + before.1 as u64, "{mappings} mappings at level {level}");
        }
    }
    assert_eq!(vm.origin().unwrap().depth(), 1000);
    for page in 0..PAGES {
        let last = (0..1000).rev().find(|level| level * 7 % PAGES == page).unwrap_or(0);
        assert_eq!(vm.ram().load::<u8>(at(page)).unwrap(), last as u8);
    }
    drop(vm);
    assert_eq!((tree.usage(), held()), (TreeUsage::default(), before));
}

#[test]
fn more_layers_than_the_limit_are_refused_at_the_fork() {
    let _turn = turn();
    let tree = Tree::new(Limits { layers_per_image: 1, ..Limits::default() });
    let vm = running::<Mapped>(&tree);
    let point = vm.fork(&mut rest()).unwrap();
    point.teardown().wait();
    vm.ram().store(at(3), 1u8).unwrap();
    let (usage, model) = (tree.usage(), bytes(&vm));
    match vm.fork(&mut rest()) {
        Err(ForkError::Cut(error @ SpaceError::LayerLimit { layers: 2, limit: 1 })) => {
            assert!(error.to_string().contains("Limits::layers_per_image"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let untouched = (tree.usage(), vm.status(), vm.dirty().unwrap().ram.count().get());
    assert_eq!(untouched, (usage, VmStatus::Running, 1));
    assert!(bytes(&vm) == model && vm.origin().unwrap().ram().same(point.ram()));
    vm.validate().unwrap();
    // What hides all that lies below is one layer again.
    (0..PAGES).for_each(|page| vm.ram().store(at(page), 9u8).unwrap());
    let whole = vm.fork(&mut rest()).unwrap();
    assert_eq!(spawned(&whole).usage().unwrap().ram.layers, 1);
}
