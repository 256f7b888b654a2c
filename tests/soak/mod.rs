//! A soak: vCPU threads that stamp pages, a guest that really stops them, forks, clones with vCPUs of their own, and
//! readers that check every page they see.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use offshoot::backing::Backing;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, PageSize};
use offshoot::ram::{Ram, RamLayout};
use offshoot::testing::Dice;
use offshoot::{BoxError, CloneSpec, DeviceState, ForkPoint, Guest, Limits, Tree, TreeUsage, Vm, VmName};

const PAGE: u64 = 4096;
pub const WORDS: u64 = PAGE / 8;
/// Few enough that writers meet on the same tables, many enough to cross them.
const SPACE_PAGES: u64 = 192;
const VCPUS: u64 = 3;

/// What a page says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub page: u64,
    pub tag: u64,
    pub sequence: u64,
}

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// The words do not belong together.
    Torn,
    /// It is whole, and another page's.
    Page { found: u64 },
}

/// Page checks that this run is to make.
pub fn wanted_checks() -> u64 {
    match std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse::<u64>().ok()) {
        Some(millions) => millions * 1_000_000,
        None => 12_000,
    }
}

fn mix(word: u64, at: u64) -> u64 {
    let x = (word ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ x >> 29
}

/// The whole page: every word is worked out from the stamp and its place, so no part of another page fits.
fn page_of(stamp: Stamp) -> Vec<u8> {
    let seed = mix(mix(stamp.tag, stamp.page), stamp.sequence);
    let mut bytes = Vec::with_capacity(PAGE as usize);
    for word in [stamp.page, stamp.tag, stamp.sequence, seed] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    for at in 4..WORDS {
        bytes.extend_from_slice(&seed.wrapping_add(at.wrapping_mul(0x2545_f491_4f6c_dd1d)).to_ne_bytes());
    }
    bytes
}

fn check_page(bytes: &[u8], page: u64) -> Result<Stamp, Wrong> {
    let word = |at: usize| u64::from_ne_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
    let stamp = Stamp { page: word(0), tag: word(1), sequence: word(2) };
    if bytes != page_of(stamp) {
        return Err(Wrong::Torn);
    }
    if stamp.page != page { Err(Wrong::Page { found: stamp.page }) } else { Ok(stamp) }
}

fn put_stamp<B: Backing>(ram: &Ram<B>, stamp: Stamp) {
    ram.write(GuestAddress::new(stamp.page * PAGE), &page_of(stamp)).expect("RAM can be written");
}

pub fn stamp_page<B: Backing>(vm: &Vm<B>, stamp: Stamp) {
    put_stamp(vm.ram(), stamp);
}

pub fn read_stamp<B: Backing>(vm: &Vm<B>, page: u64) -> Result<Stamp, Wrong> {
    let mut bytes = vec![0; PAGE as usize];
    vm.ram().read(GuestAddress::new(page * PAGE), &mut bytes).expect("RAM can be read");
    check_page(&bytes, page)
}

/// vCPU threads of one VM. Each holds the gate shared while it writes one page, and owns every `VCPUS`-th page, so that a page
/// is always one writer's.
struct Vcpus {
    gate: Arc<RwLock<()>>,
    stop: Arc<AtomicBool>,
    /// For each page, the sequence it must have been given at the least.
    written: Arc<Vec<AtomicU64>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Vcpus {
    fn start<B: Backing>(ram: &Arc<Ram<B>>, tag: u64, floor: &[u64]) -> Self {
        let gate = Arc::new(RwLock::new(()));
        let stop = Arc::new(AtomicBool::new(false));
        let written: Arc<Vec<_>> = Arc::new(floor.iter().copied().map(AtomicU64::new).collect());
        let threads = (0..VCPUS).map(|vcpu| {
            let (ram, gate, stop, written) = (ram.clone(), gate.clone(), stop.clone(), written.clone());
            std::thread::spawn(move || {
                let mut dice = Dice::new(tag * 31 + vcpu);
                while !stop.load(Ordering::Acquire) {
                    let page = dice.below(SPACE_PAGES / VCPUS) * VCPUS + vcpu;
                    // The boundary between two pages is where a pause takes hold.
                    let boundary = gate.read().expect("no thread panics with it");
                    let sequence = written[page as usize].load(Ordering::Relaxed) + 1;
                    put_stamp(&ram, Stamp { page, tag, sequence });
                    written[page as usize].store(sequence, Ordering::Release);
                    drop(boundary);
                }
            })
        });
        Self { threads: threads.collect(), gate, stop, written }
    }

    fn floor(&self) -> Vec<u64> {
        self.written.iter().map(|sequence| sequence.load(Ordering::Acquire)).collect()
    }

    fn join(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads {
            thread.join().expect("a vCPU's writes all work");
        }
        self.written.iter().map(|sequence| sequence.load(Ordering::Acquire)).collect()
    }
}

/// A guest whose pause stops its vCPUs, at a boundary, until it is resumed; what they have written by then is its device state.
struct Stopping<'a> {
    vcpus: &'a Vcpus,
    held: Option<std::sync::RwLockWriteGuard<'a, ()>>,
}

impl Guest for Stopping<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.held = Some(self.vcpus.gate.write().map_err(|_| "a vCPU has panicked")?);
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(self.held.is_some(), "saved while paused");
        Ok(DeviceState::from_bytes(self.vcpus.floor().iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<_>>()))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.held = None;
        Ok(())
    }
}

fn sequences(state: &DeviceState) -> Vec<u64> {
    let bytes = state.encode();
    let (words, []) = bytes.as_chunks::<8>() else { panic!("whole words were saved") };
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// Checks a fork point against the sequences that its guest had reached: exactly those, nothing torn, nothing newer.
fn check_point<B: Backing>(point: &ForkPoint<B>, tags: &[u64]) -> u64 {
    let want = sequences(point.device_state());
    let mut bytes = vec![0; PAGE as usize];
    for page in 0..SPACE_PAGES {
        point.ram().read(ByteOffset::new(page * PAGE), &mut bytes).expect("an image can be read");
        let stamp = check_page(&bytes, page).unwrap_or_else(|wrong| panic!("fork point, page {page}: {wrong:?}"));
        assert_eq!(stamp.sequence, want[page as usize], "page {page} of a fork point is not of its instant");
        assert!(tags.contains(&stamp.tag), "page {page} of a fork point is VM {}'s", stamp.tag);
    }
    SPACE_PAGES
}

/// Checks a VM that runs: a page that reads whole is its own or its fork point's, and never older than it must be. Pages that are
/// being written right now may read torn; those are read again.
fn check_running<B: Backing>(ram: &Ram<B>, vcpus: &Vcpus, tags: &[u64], checks: u64, dice: &mut Dice) {
    let mut bytes = vec![0; PAGE as usize];
    for _ in 0..checks {
        let page = dice.below(SPACE_PAGES);
        let floor = vcpus.written[page as usize].load(Ordering::Acquire);
        // Between two writes of its owner; the others write on.
        let stamp = loop {
            ram.read(GuestAddress::new(page * PAGE), &mut bytes).expect("RAM can be read");
            match check_page(&bytes, page) {
                Ok(stamp) => break stamp,
                Err(Wrong::Page { found }) => panic!("page {page} shows page {found}"),
                // A reader that races with the writer of the same page sees some order of bytes.
                Err(Wrong::Torn) if vcpus.written[page as usize].load(Ordering::Acquire) != floor => {}
                Err(Wrong::Torn) => std::thread::yield_now(),
            }
        };
        assert!(tags.contains(&stamp.tag), "page {page} is VM {}'s, only {tags:?} may be seen", stamp.tag);
        assert!(stamp.sequence >= floor, "page {page} went back from {floor} to {}", stamp.sequence);
    }
}

/// One round: a parent under writers is forked again and again while its clones write, are forked themselves, and are read. Returns
/// the number of page checks, at least `wanted`.
pub fn soak<B: Backing>(round: u64, wanted: u64) -> u64 {
    const CLONES: u64 = 2;
    let tree = Tree::new(Limits::default());
    let layout = RamLayout::flat(ByteSize::new(SPACE_PAGES * PAGE), PageSize::KIB_4).expect("a layout");
    let vm = Vm::<B>::new(&tree, VmName::new("parent").expect("a name"), layout, vec![]).expect("a VM");
    let tag = |n: u64| round * 1_000_000 + 1 + n;
    for page in 0..SPACE_PAGES {
        stamp_page(&vm, Stamp { page, tag: tag(0), sequence: 1 });
    }
    vm.start().expect("it is off");
    let checks = AtomicU64::new(0);
    let count = |n: u64| checks.fetch_add(n, Ordering::Relaxed);
    let vcpus = Vcpus::start(vm.ram(), tag(0), &[1; SPACE_PAGES as usize]);
    let mut teardowns = Vec::new();
    let mut generation = 0;
    while checks.load(Ordering::Relaxed) < wanted {
        generation += 1;
        let point = vm.fork(&mut Stopping { vcpus: &vcpus, held: None }).expect("it runs");
        teardowns.push(point.teardown().clone());
        std::thread::scope(|scope| {
            for clone in 0..CLONES {
                let (point, count) = (&point, &count);
                let own = tag(generation * 100 + clone);
                scope.spawn(move || {
                    let clone = point.spawn(CloneSpec::default()).expect("a clone");
                    clone.start().expect("it is paused");
                    let vcpus = Vcpus::start(clone.ram(), own, &sequences(point.device_state()));
                    let mut dice = Dice::new(own);
                    check_running(clone.ram(), &vcpus, &[tag(0), own], SPACE_PAGES, &mut dice);
                    count(SPACE_PAGES);
                    let deeper = clone.fork(&mut Stopping { vcpus: &vcpus, held: None }).expect("it runs");
                    check_running(clone.ram(), &vcpus, &[tag(0), own], SPACE_PAGES, &mut dice);
                    count(SPACE_PAGES + check_point(&deeper, &[tag(0), own]));
                    let last = vcpus.join();
                    clone.validate().unwrap_or_else(|wrong| panic!("{wrong}"));
                    // At rest, every page is exactly what its writer wrote last.
                    for page in 0..SPACE_PAGES {
                        let stamp =
                            read_stamp(&clone, page).unwrap_or_else(|wrong| panic!("at rest, page {page}: {wrong:?}"));
                        assert_eq!(stamp.sequence, last[page as usize], "a write to page {page} was lost");
                    }
                    drop(clone);
                    count(SPACE_PAGES + check_point(&deeper, &[tag(0), own]));
                    deeper.teardown().wait();
                });
            }
            // The parent runs on under its own readers.
            check_running(vm.ram(), &vcpus, &[tag(0)], 2 * SPACE_PAGES, &mut Dice::new(generation));
            count(2 * SPACE_PAGES);
        });
        // After all that its clones did.
        count(check_point(&point, &[tag(0)]));
    }
    vcpus.join();
    vm.validate().unwrap_or_else(|wrong| panic!("{wrong}"));
    drop(vm);
    for teardown in teardowns {
        teardown.wait();
    }
    assert_eq!(tree.usage(), TreeUsage::default(), "something is left");
    checks.into_inner()
}
