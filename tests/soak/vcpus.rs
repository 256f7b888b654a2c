//! Threads that stand for vCPUs: they stamp pages until they are told to stop, and a guest that really stops them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;

use offshoot::testing::Dice;
use offshoot::{BoxError, DeviceState, Guest, Vm};
// Not std's: its slow paths come compiled, and ThreadSanitizer does not see what they order.
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::SPACE_PAGES;
use super::stamp::{PAGE, PLACES, Stamp, salted};
use super::subject::{Access, Subject, Typed, Words};

const WRITERS: u64 = 2;
/// Pages that a thread writes before it lets a pause in.
const STEP: u64 = 4;

/// What is known of the pages of one VM.
pub struct Known {
    /// Its tag.
    pub own: u64,
    /// The words of all pages as they were when it was spawned.
    pub inherited: Vec<u64>,
    /// Those of now, or of a moment ago: a page's is set once the page is written.
    written: Vec<AtomicU64>,
}

impl Known {
    pub fn written(&self, page: u64) -> u64 {
        self.written[page as usize].load(Ordering::Acquire)
    }
}

/// Stamps a page.
pub fn put(access: &impl Words, word: u64) {
    let page = Stamp::of(word).page;
    for (place, at) in PLACES.into_iter().enumerate() {
        access.store(page * PAGE + at, salted(word, place));
        // In order, so that a reader who comes from the other end finds words that grow no older.
        fence(Ordering::Release);
    }
}

/// The words of a page, read from the last place to the first.
#[inline]
pub fn get(access: &impl Words, page: u64) -> [u64; PLACES.len()] {
    let mut words = [0; PLACES.len()];
    for place in (0..PLACES.len()).rev() {
        words[place] = access.load(page * PAGE + PLACES[place]);
        fence(Ordering::Acquire);
    }
    words
}

/// The vCPU threads of one VM. Each owns every `WRITERS`-th page, so that a page is always one writer's, and holds the gate while it
/// writes some.
pub struct Vcpus<S: Subject> {
    gate: Arc<RwLock<S::Access>>,
    stop: Arc<AtomicBool>,
    pub known: Arc<Known>,
    threads: Vec<JoinHandle<()>>,
}

impl<S: Subject> Vcpus<S> {
    /// Starts them over pages that read as `inherited`.
    pub fn start(vm: &Vm<S>, own: u64, inherited: Vec<u64>) -> Self {
        let gate = Arc::new(RwLock::new(S::access(vm)));
        let stop = Arc::new(AtomicBool::new(false));
        let written = inherited.iter().copied().map(AtomicU64::new).collect();
        let known = Arc::new(Known { own, inherited, written });
        let threads = (0..WRITERS).map(|vcpu| {
            let (gate, stop, known, typed) = (gate.clone(), stop.clone(), known.clone(), Typed(vm.ram().clone()));
            std::thread::spawn(move || {
                let mut dice = Dice::new(own * 31 + vcpu);
                while !stop.load(Ordering::Acquire) {
                    // Between two such steps is where a pause takes hold.
                    let access = gate.read();
                    let held = access.hold();
                    for _ in 0..STEP {
                        let page = dice.below(SPACE_PAGES / WRITERS) * WRITERS + vcpu;
                        let sequence = Stamp::of(known.written(page)).sequence + 1;
                        let word = Stamp { page, tag: own, sequence }.word();
                        match vcpu {
                            0 => put(&held, word),
                            _ => put(&typed, word),
                        }
                        known.written[page as usize].store(word, Ordering::Release);
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { gate, stop, known, threads }
    }

    /// Access for a reader, who keeps a pause waiting as long as he holds it.
    pub fn reach(&self) -> RwLockReadGuard<'_, S::Access> {
        self.gate.read()
    }

    fn words(&self) -> Vec<u64> {
        (0..SPACE_PAGES).map(|page| self.known.written(page)).collect()
    }

    /// Ends them; gives what each page was written with last.
    pub fn join(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Release);
        let words = || (0..SPACE_PAGES).map(|page| self.known.written(page)).collect();
        self.threads.into_iter().for_each(|thread| thread.join().expect("a vCPU's writes all work"));
        words()
    }
}

/// A guest whose pause stops its vCPUs, and readers with them, until it is resumed; what they have written by then is its device state.
pub struct Stopping<'a, S: Subject> {
    vcpus: &'a Vcpus<S>,
    held: Option<RwLockWriteGuard<'a, S::Access>>,
}

impl<'a, S: Subject> Stopping<'a, S> {
    pub fn new(vcpus: &'a Vcpus<S>) -> Self {
        Self { vcpus, held: None }
    }

    /// RAM has moved. While paused.
    pub fn now_reached_by(&mut self, access: S::Access) {
        **self.held.as_mut().expect("moved while paused") = access;
    }
}

impl<S: Subject> Guest for Stopping<'_, S> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.held = Some(self.vcpus.gate.write());
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(self.held.is_some(), "saved while paused");
        Ok(DeviceState::from_bytes(self.vcpus.words().iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.held = None;
        Ok(())
    }
}

/// The words of all pages at a fork point, as its guest saved them.
pub fn saved(state: &DeviceState) -> Vec<u64> {
    let bytes = state.encode();
    let (words, []) = bytes.as_chunks::<8>() else { panic!("whole words were saved") };
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}
