//! A page fault served over userfaultfd, beside a handler that has a flat buffer, and beside a private mapping's own fault. Linux.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use offshoot::backing::{Heap, Mapped};
use offshoot::frontend::uffd::{End, FaultService, Stop, serve};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, PageCount};

use self::vmm::{EVENT_REMOVE, MISSING, Memory, Uffd, Vmm};
use super::bare::{View, filled_memfd};
use super::options::Effort;
use super::report::{Baseline, Goal, Outcome, Report, Row, Skip, Unit};
use super::sample::{Random, Round, timed};
use super::subject::{PAGE, cut, empty, fill};

#[allow(dead_code, reason = "the tests that share it use more of it")]
#[path = "../../tests/uffd/vmm.rs"]
mod vmm;

/// Pages touched in one sample, scattered over all of them.
const TOUCHED: u64 = 1000;
const PAGES: u64 = 16384;

/// The first write to a page, by who gives it: each way ends with a private copy.
pub fn faults(effort: &Effort, report: &mut Report) -> Outcome {
    Uffd::with(EVENT_REMOVE).map_err(|error| Skip::new(format!("no userfaultfd: {error}")))?;
    let len = ByteSize::new(PAGES * PAGE);
    let heap: Heap = empty(len)?;
    fill(&heap)?;
    let heap = Arc::new(cut(&heap)?);
    let mapped: Mapped = empty(len)?;
    fill(&mapped)?;
    let mapped = Arc::new(cut(&mapped)?);
    let mut buffer = vec![0; len.get() as usize];
    heap.read(ByteOffset::ZERO, &mut buffer)?;
    let file = filled_memfd(len)?;
    let with = |workers, window| FaultService { workers, window: PageCount::new(window), ..FaultService::default() };

    let servers = [
        ("heap image", heap.clone() as Arc<dyn Source>, with(1, 1)),
        ("mapped image", mapped, with(1, 1)),
        ("heap image, 2 workers", heap.clone(), with(2, 1)),
        ("heap image, 16 pages at once", heap, with(1, 16)),
    ];
    for (order, case) in [(Order::Scattered, "scattered"), (Order::Ascending, "one after the other")] {
        let mut round = Round::new(effort);
        for (_, image, service) in &servers {
            round.probe(move || served(&**image, service, order));
        }
        round.probe(|| by_hand(&buffer, order));
        round.probe(|| {
            let view = View::private(&file, len).expect("a mapping");
            let pages = order.pages();
            timed(|| pages.iter().for_each(|&page| view.touch(page))).0 / TOUCHED as f64
        });
        let stats = round.run_all();
        let (bare, native) = (stats[servers.len()], stats[servers.len() + 1]);
        for ((name, ..), stats) in servers.iter().zip(&stats) {
            let (case, unit) = (format!("{case}: {name}"), Unit::Microseconds);
            let goal = if name.contains(',') { Goal::None } else { Goal::Ratio(1.25) };
            let baseline = Some(Baseline::new("bare UFFDIO_COPY from a buffer", bare));
            report.row(&Row { case, unit, stats: *stats, baseline, goal });
        }
        let baseline = Some(Baseline::new("bare UFFDIO_COPY from a buffer", bare));
        let case = format!("{case}: a private mapping's own fault");
        report.row(&Row { case, unit: Unit::Microseconds, stats: native, baseline, goal: Goal::None });
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Order {
    Scattered,
    Ascending,
}

impl Order {
    fn pages(self) -> Vec<u64> {
        let mut random = Random::new(5);
        match self {
            // One of each 16, so that no page is touched twice and no window helps.
            Self::Scattered => (0..TOUCHED).map(|n| n * 16 + random.next() % 16).collect(),
            Self::Ascending => (0..TOUCHED).collect(),
        }
    }
}

/// Mean time of a first write, in nanoseconds.
fn touch(memory: &Memory, order: Order) -> f64 {
    let pages = order.pages();
    // The hand-shake is not in the time.
    memory.read((PAGES - 1) as usize * PAGE as usize);
    timed(|| pages.iter().for_each(|&page| memory.write((page * PAGE) as usize, 1))).0 / TOUCHED as f64
}

fn served(image: &dyn Source, service: &FaultService, order: Order) -> f64 {
    let (ours, theirs) = UnixStream::pair().expect("a socket");
    let stop = Stop::new().expect("a pipe");
    let vmm = Vmm::new(&[(PAGES as usize, 0)], EVENT_REMOVE, MISSING);
    vmm.shake_hands(&theirs);
    std::thread::scope(|scope| {
        let service = scope.spawn(|| serve(&ours, image, service, &stop));
        let time = touch(vmm.memory(), order);
        stop.stop();
        let served = service.join().expect("a service");
        assert!(matches!(served.end, End::Stopped), "{}", served.end);
        time
    })
}

/// What a handler costs that does nothing but read a fault and copy from a buffer.
fn by_hand(buffer: &[u8], order: Order) -> f64 {
    let vmm = Vmm::new(&[(PAGES as usize, 0)], EVENT_REMOVE, MISSING);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| {
            let base = vmm.memory().base();
            while !over.load(Ordering::Relaxed) {
                vmm.uffd.wait();
                while let Some(at) = vmm.uffd.next_fault() {
                    let from = (at - base) as usize & !(PAGE as usize - 1);
                    vmm.uffd.copy(at & !(PAGE - 1), &buffer[from..][..PAGE as usize]).expect("a page that is missing");
                }
            }
        });
        let time = touch(vmm.memory(), order);
        over.store(true, Ordering::Relaxed);
        // One more fault wakes it.
        vmm.memory().read((PAGES - 2) as usize * PAGE as usize);
        handler.join().expect("a handler");
        time
    })
}
