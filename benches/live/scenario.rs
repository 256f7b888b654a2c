//! The guest of the live bench, and what is measured of its forks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use offshoot::backing::Mapped;
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::{Ram, RamLayout};
use offshoot::{BoxError, DeviceState, ForkPoint, Guest, Limits, LivePolicy, Tree, Vm, VmName};

const PAGE: u64 = 4096;
const RAM: ByteSize = ByteSize::gib(1);
const DIRTY: u64 = 30 << 20;
const RATE: u64 = 100 << 20;

/// A writer thread that can be parked, as a vCPU can.
struct Writer {
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    wanted: AtomicBool,
    parked: Mutex<bool>,
    changed: Condvar,
    stop: AtomicBool,
    rate: AtomicU64,
}

impl Guest for Writer {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.gate.wanted.store(true, Ordering::SeqCst);
        let mut parked = self.gate.parked.lock().unwrap();
        while !*parked {
            parked = self.gate.changed.wait(parked).unwrap();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(vec![0; 64]))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.gate.wanted.store(false, Ordering::SeqCst);
        *self.gate.parked.lock().unwrap() = false;
        self.gate.changed.notify_all();
        Ok(())
    }
}

impl Gate {
    /// Where the writer stands while it is paused.
    fn pass(&self) {
        if self.wanted.load(Ordering::Relaxed) {
            let mut parked = self.parked.lock().unwrap();
            *parked = true;
            self.changed.notify_all();
            while *parked && !self.stop.load(Ordering::Relaxed) {
                parked = self.changed.wait(parked).unwrap();
            }
        }
    }

    /// Writes page after page of the last quarter at the rate asked for.
    fn write(&self, ram: &Ram<Mapped>, pages: u64) {
        let (mut start, mut done, mut page, mut rate) = (Instant::now(), 0u64, 0u64, 0);
        while !self.stop.load(Ordering::Relaxed) {
            self.pass();
            if rate != self.rate.load(Ordering::Relaxed) {
                (rate, start, done) = (self.rate.load(Ordering::Relaxed), Instant::now(), 0);
            }
            let due = (start.elapsed().as_secs_f64() * rate as f64) as u64 / PAGE;
            // What a pause has held up is not made up for.
            done = done.max(due.saturating_sub(256));
            if done < due {
                page = (page + 1) % (pages / 4);
                ram.store(GuestAddress::new((pages * 3 / 4 + page) * PAGE + 64), done).unwrap();
                done += 1;
            } else {
                thread::yield_now();
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spread {
    Together,
    /// Every so many pages one.
    Every(u64),
}

fn dirty(ram: &Ram<Mapped>, spread: Spread, run: u64) {
    let pages = RAM.get() / PAGE;
    for n in 0..DIRTY / PAGE {
        let page = match spread {
            Spread::Together => (run * 1000 + n) % (pages / 2),
            // The same pages each time, or the layers would soon need more mappings than there are.
            Spread::Every(step) => n * step % pages,
        };
        ram.store(GuestAddress::new(page * PAGE), run << 32 | n).unwrap();
    }
}

fn percentile(sorted: &[Duration], p: usize) -> Duration {
    sorted[(sorted.len() * p / 100).min(sorted.len() - 1)]
}

type Fork = fn(&Vm<Mapped>, &mut Writer) -> ForkPoint<Mapped>;

fn measure(name: &str, fork: Fork, spread: Option<Spread>, rate: u64, runs: u64) {
    let limits = Limits { mappings_per_vm: 40_000, merge_over_mappings: 40_000, ..Limits::default() };
    let layout = RamLayout::flat(RAM, PageSize::KIB_4).unwrap();
    let vm: Vm<Mapped> = Vm::new(&Tree::new(limits), VmName::new("bench").unwrap(), layout, vec![]).unwrap();
    let pages = RAM.get() / PAGE;
    let touch = |vm: &Vm<Mapped>| {
        (0..pages).for_each(|page| {
            vm.ram().load::<u8>(GuestAddress::new(page * PAGE)).unwrap();
        });
    };
    (0..pages).for_each(|page| vm.ram().store(GuestAddress::new(page * PAGE), 1u8).unwrap());
    let gate = Arc::new(Gate::default());
    let mut guest = Writer { gate: gate.clone() };
    vm.start().unwrap();
    let (mut cuts, mut stops, mut rounds, mut last) = (vec![], vec![], 0, 0);
    thread::scope(|scope| {
        let (ram, writer) = (vm.ram().clone(), gate.clone());
        scope.spawn(move || writer.write(&ram, pages));
        vm.fork(&mut guest).unwrap();
        touch(&vm);
        fork(&vm, &mut guest);
        gate.rate.store(rate, Ordering::Relaxed);
        for run in 0..runs {
            touch(&vm);
            if let Some(spread) = spread {
                dirty(vm.ram(), spread, run);
            }
            let point = fork(&vm, &mut guest);
            let timings = point.timings();
            cuts.push(timings.cut);
            stops.push(timings.stopped());
            if let Some(precopy) = timings.precopy {
                rounds += precopy.rounds().len();
                last += precopy.last.pages.get();
            }
        }
        gate.stop.store(true, Ordering::Relaxed);
        guest.resume().unwrap();
    });
    cuts.sort();
    stops.sort();
    println!(
        "{name:44} cut p50 {:>9.1?} p99 {:>9.1?} max {:>9.1?} | stopped p50 {:>9.1?} p99 {:>9.1?} | {:.1} rounds, {} pages in the pause",
        percentile(&cuts, 50),
        percentile(&cuts, 99),
        percentile(&cuts, 100),
        percentile(&stops, 50),
        percentile(&stops, 99),
        rounds as f64 / runs as f64,
        last / runs,
    );
}

/// All cases.
pub fn run() {
    let runs = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(100);
    let live: Fork = |vm, guest| vm.fork_live(guest, &LivePolicy::default()).unwrap();
    let stop: Fork = |vm, guest| vm.fork(guest).unwrap();
    for (name, spread) in
        [("together", Spread::Together), ("every 8th", Spread::Every(8)), ("every 24th", Spread::Every(24))]
    {
        measure(&format!("stop and copy, 30 MiB {name}"), stop, Some(spread), RATE, runs);
        measure(&format!("live, 30 MiB {name}"), live, Some(spread), RATE, runs);
    }
    measure("stop and copy, nothing dirty", stop, None, 0, runs);
    measure("live, nothing dirty", live, None, 0, runs);
}
