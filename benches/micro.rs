//! Micro-benchmarks for people who change the engine: what one operation costs, and how it grows. `cargo bench --bench micro`.
//!
//! The figures that are promised, beside their baselines, are in `figures.rs`. These have no goals; criterion compares a run with the
//! one before it.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use offshoot::backing::{Backing, Cut, Heap, Sealed};
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageSize};
use offshoot::ram::RamLayout;
use offshoot::{AtRest, CloneSpec, DeviceState, ForkPoint, Limits, Tree, Vm, VmName};

/// A guest with nothing to stop and nothing to save.
fn idle() -> AtRest {
    AtRest(DeviceState::from_bytes([]))
}

fn at(page: u64) -> ByteOffset {
    PageSize::KIB_4.start_of(PageIndex::new(page))
}

fn tree() -> Tree {
    Tree::new(Limits { depth: u32::MAX - 1, ..Limits::default() })
}

/// A space with every page written.
fn filled<B: Backing>(mib: u64) -> B {
    let geometry = Geometry::new(ByteSize::mib(mib), PageSize::KIB_4).expect("whole pages");
    let space = B::create(&tree(), geometry, None).expect("memory for a space");
    for page in 0..geometry.pages().get() {
        space.write(at(page), &[page as u8 | 1; 4096]).expect("memory for a page");
    }
    space
}

fn cut<B: Backing>(space: &B) -> B::Sealed {
    let (image, deferred) = space.cut().expect("nobody else uses it").commit();
    drop(deferred);
    image
}

fn point<B: Backing>(mib: u64) -> ForkPoint<B> {
    let layout = RamLayout::flat(ByteSize::mib(mib), PageSize::KIB_4).expect("whole pages");
    let vm: Vm<B> = Vm::new(&tree(), VmName::new("parent").expect("a name"), layout, vec![]).expect("memory for a VM");
    for page in 0..mib << 8 {
        vm.ram().space().write(at(page), &[page as u8 | 1; 4096]).expect("memory for a page");
    }
    vm.start().expect("a VM that was off");
    vm.fork(&mut idle()).expect("a running VM")
}

fn clone_of<B: Backing>(point: &ForkPoint<B>) -> Vm<B> {
    point.spawn(CloneSpec::default()).expect("room for a clone")
}

fn fork(c: &mut Criterion) {
    let mut group = c.benchmark_group("heap fork, 4 pages written before each");
    for mib in [1, 64, 512] {
        let space: Heap = filled(mib);
        let pages = space.geometry().pages().get();
        group.bench_function(BenchmarkId::new("MiB", mib), |b| {
            b.iter_batched(
                || (0..4).for_each(|n| space.write(at(n * 7919 % pages), &[1; 8]).expect("a page")),
                |()| space.cut().expect("nobody else uses it").commit(),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn spawn_on<B: Backing>(c: &mut Criterion, backing: &str) {
    let mut group = c.benchmark_group(format!("{backing} spawn"));
    for mib in [1, 64, 512] {
        let point = point::<B>(mib);
        group.bench_function(BenchmarkId::new("MiB", mib), |b| b.iter_with_large_drop(|| clone_of(&point)));
    }
    let family = point::<B>(1);
    for siblings in [1, 100, 1000] {
        let alive: Vec<_> = (0..siblings).map(|_| clone_of(&family)).collect();
        group.bench_function(BenchmarkId::new("siblings", siblings), |b| b.iter_with_large_drop(|| clone_of(&family)));
        drop(alive);
    }
    let mut tip = family;
    for depth in 1..=64 {
        if [1, 8, 64].contains(&depth) {
            group.bench_function(BenchmarkId::new("depth", depth), |b| b.iter_with_large_drop(|| clone_of(&tip)));
        }
        let clone = clone_of(&tip);
        clone.ram().space().write(at(depth), &[2; 8]).expect("a page");
        clone.start().expect("a paused clone");
        tip = clone.fork(&mut idle()).expect("a running clone");
    }
    group.finish();
}

fn break_sharing_on<B: Backing>(c: &mut Criterion, backing: &str) {
    let image = cut(&filled::<B>(64));
    c.bench_function(&format!("{backing} first write to each of 256 shared pages"), |b| {
        b.iter_batched(
            || image.spawn().expect("room for a clone"),
            |clone| {
                (0..256).for_each(|page| clone.write(at(page), &[1; 8]).expect("a page"));
                clone
            },
            BatchSize::PerIteration,
        );
    });
}

fn reset_on<B: Backing>(c: &mut Criterion, backing: &str) {
    let mut group = c.benchmark_group(format!("{backing} reset"));
    let clone = cut(&filled::<B>(64)).spawn().expect("room for a clone");
    for dirty in [1, 64, 1024] {
        group.bench_function(BenchmarkId::new("dirty pages", dirty), |b| {
            b.iter_batched(
                || (0..dirty).for_each(|page| clone.write(at(page * 16), &[1; 8]).expect("a page")),
                |()| clone.reset().expect("nobody else uses it"),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Addresses that visit every page in an order without locality.
fn addresses(pages: u64) -> impl Iterator<Item = u64> {
    (0..4096).map(move |n: u64| n.wrapping_mul(0x9e37_79b9) % pages * 4096 + n % 512 * 8)
}

fn access(c: &mut Criterion) {
    let mib = 64;
    let space = cut(&filled::<Heap>(mib)).spawn().expect("room for a clone");
    let pages = space.geometry().pages().get();
    let mut flat = vec![1u8; (mib << 20) as usize];
    let mut group = c.benchmark_group("4,096 random words");
    group.throughput(Throughput::Elements(4096));
    group.bench_function("read, Vec<u8>", |b| {
        b.iter(|| addresses(pages).map(|at| u64::from(flat[at as usize])).sum::<u64>());
    });
    group.bench_function("read, heap view", |b| {
        let view = space.view();
        b.iter(|| {
            addresses(pages).map(|at| view.load::<u64>(ByteOffset::new(at)).expect("inside")).fold(0, u64::wrapping_add)
        });
    });
    group.bench_function("write, Vec<u8>", |b| {
        b.iter(|| addresses(pages).for_each(|at| black_box(&mut flat)[at as usize] = at as u8));
    });
    group.bench_function("write, heap view, pages its own", |b| {
        let view = space.view();
        b.iter(|| addresses(pages).for_each(|at| view.store(ByteOffset::new(at), at).expect("inside")));
    });
    group.finish();
}

/// Asking what is shared: what a pool does with every clone, often.
fn usage_on<B: Backing>(c: &mut Criterion, backing: &str) {
    let clone = cut(&filled::<B>(64)).spawn().expect("room for a clone");
    (0..64).for_each(|page| clone.write(at(page * 16), &[1; 8]).expect("a page"));
    c.bench_function(&format!("{backing} usage, 64 of 16,384 pages private"), |b| {
        b.iter(|| clone.usage().expect("counts"))
    });
}

fn on<B: Backing>(c: &mut Criterion, backing: &str) {
    spawn_on::<B>(c, backing);
    break_sharing_on::<B>(c, backing);
    reset_on::<B>(c, backing);
    usage_on::<B>(c, backing);
}

fn backings(c: &mut Criterion) {
    on::<Heap>(c, "heap");
    #[cfg(target_os = "linux")]
    on::<offshoot::backing::Mapped>(c, "mapped");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(1)).warm_up_time(std::time::Duration::from_millis(300));
    targets = fork, access, backings
}
criterion_main!(benches);
