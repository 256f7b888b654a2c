//! Shells in store: a bounded number of one shape, made by a thread of the pool's own.
//!
//! The thread belongs to the pool and ends with it. One lock guards the shelf; it is held to take a shell off or put one on,
//! never while one is built. Building competes with a fork that is under way for processors and for the lock on the address space
//! (0.1 ms of a fork became 1 to 2), so the thread waits until half of the shelf is empty and nobody has taken a shell for a moment; an
//! empty shelf is filled at once. Admission is checked where a shell is built: a process short of
//! descriptors, mappings or memory gets an error that names the limit, and not a fork that fails half-way. Must not know what shells are
//! used for, but for [`ShellPool::spawn`], which is what they are mostly used for.

use std::collections::VecDeque;
use std::fmt;
use std::mem::take;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::build::KvmMachine;
use super::count::ShellCount;
use super::machine::MachineState;
use super::shell::{Shell, ShellError, ShellShape};
use crate::admission::{Admission, Gate, Needs, Pass};
use crate::backing::{AddressHole, Mapped};
use crate::error::SpaceError;
use crate::page::ByteSize;
use crate::sys::headroom::ThisHost;
use crate::{BoxError, CloneSpec, ForkPoint, SpawnError, Vm};

/// What a pool may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolLimits {
    /// Shells kept ready. The thread starts to refill when half of them are gone.
    pub ready: ShellCount,
    /// How long nobody must have taken a shell before the thread builds the next, unless none is left.
    pub quiet: Duration,
    /// Shells that exist at once: ready, or taken and not yet entered.
    pub alive: ShellCount,
    /// Descriptors that a new shell must leave free in this process.
    pub spare_descriptors: u64,
    /// Memory mappings that a new shell must leave free in this process.
    pub spare_mappings: u64,
    /// Memory that a new shell must leave available, on this host and in this process's cgroup.
    pub spare_memory: ByteSize,
}

impl Default for PoolLimits {
    /// 8 ready, 2 ms of quiet, 64 alive; left free is what [`Admission`] leaves: 64 descriptors, 1,024 mappings and 128 MiB.
    fn default() -> Self {
        let Admission { spare_descriptors, spare_mappings, spare_memory, .. } = Admission::default();
        let quiet = Duration::from_millis(2);
        Self {
            ready: ShellCount::new(8),
            quiet,
            alive: ShellCount::new(64),
            spare_descriptors,
            spare_mappings,
            spare_memory,
        }
    }
}

/// What a pool has done, and what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolStats {
    /// On the shelf.
    pub ready: ShellCount,
    /// On the shelf, or taken and not yet entered.
    pub alive: ShellCount,
    /// Built since the pool was made.
    pub built: ShellCount,
    /// Builds that failed or were refused.
    pub failed: ShellCount,
    /// Taken off the shelf.
    pub taken: ShellCount,
    /// Built on the caller's time, because the shelf was empty.
    pub built_on_demand: ShellCount,
    /// Became machines.
    pub entered: ShellCount,
    /// Dropped without becoming one, those drained included.
    pub discarded: ShellCount,
    /// Of those, how many because something else was mapped in their hole.
    pub holes_lost: ShellCount,
}

/// A bounded store of shells of one shape.
///
/// A shell is not free while it waits: two descriptors and a mapping with one vCPU, kernel memory for its slots (some 2 MiB a GiB of RAM
/// where KVM has no hardware paging), and a share of every first write to a shared page anywhere in the process, of which the kernel tells each
/// machine in turn. Keep as many as come in one burst, and no more.
///
/// ```no_run
/// use offshoot::frontend::kvm::{MachineState, PoolLimits, ShellCount, ShellPool, ShellShape};
/// # fn example(shape: ShellShape, point: &offshoot::ForkPoint<offshoot::backing::Mapped>) -> Result<(), Box<dyn std::error::Error>> {
/// let pool = ShellPool::new(shape, PoolLimits { ready: ShellCount::new(4), ..PoolLimits::default() })?;
/// let state: &MachineState = point.device_state().object().expect("saved by this front end");
/// let (clone, mut machine) = pool.spawn(point, state, Default::default())?;
/// clone.start()?;
/// let first_exit = machine.vcpus_mut()[0].run()?;
/// # Ok(()) }
/// ```
pub struct ShellPool {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    shape: ShellShape,
    limits: PoolLimits,
    gate: Arc<Gate>,
    shelf: Mutex<Shelf>,
    /// The thread waits here for something to do.
    work: Condvar,
    /// Others wait here for the thread to be done.
    filled: Condvar,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Shelf {
    ready: VecDeque<Shell>,
    /// How many are to be ready; none once drained.
    target: ShellCount,
    /// Filled up to the target, or failed at it, since it was last woken.
    rested: bool,
    failed: Option<ShellError>,
    /// Before this nothing is built, unless the shelf is empty.
    quiet_until: Option<Instant>,
    stopping: bool,
}

impl Shelf {
    fn count(&self) -> ShellCount {
        ShellCount::new(self.ready.len() as u64)
    }

    fn is_full(&self) -> bool {
        self.count() >= self.target
    }
}

#[derive(Default)]
struct Counters {
    alive: AtomicU64,
    built: AtomicU64,
    failed: AtomicU64,
    taken: AtomicU64,
    built_on_demand: AtomicU64,
    entered: AtomicU64,
    discarded: AtomicU64,
    holes_lost: AtomicU64,
}

/// One more of something. Relaxed: the figures are independent of each other and of everything else.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A shell's place in the accounts of its pool; gives itself back on drop.
pub(super) struct Ticket {
    counters: Arc<Counters>,
    hole: Option<AddressHole>,
    /// What the shell takes.
    pass: Option<Pass>,
    entered: bool,
}

impl Ticket {
    fn issue(counters: &Arc<Counters>, limit: ShellCount) -> Result<Self, ShellError> {
        let ticket = Self { counters: Arc::clone(counters), hole: None, pass: None, entered: false };
        // Counted first and given back by the drop, so that two threads at the limit cannot both pass it.
        if counters.alive.fetch_add(1, Ordering::Relaxed) < limit.get() {
            return Ok(ticket);
        }
        Err(ShellError::ShellLimit { limit })
    }

    pub(super) fn entered(mut self) {
        self.entered = true;
        // The machine has it now, and nobody says when that goes.
        if let Some(pass) = self.pass.take() {
            pass.hand_over();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.counters.alive.fetch_sub(1, Ordering::Relaxed);
        // A ticket without a hole never had a shell.
        let Some(hole) = &self.hole else { return };
        count(if self.entered { &self.counters.entered } else { &self.counters.discarded });
        if hole.was_lost() {
            count(&self.counters.holes_lost);
        }
    }
}

impl Shared {
    /// Checks admission and builds one. Takes no lock.
    fn build(&self) -> Result<Shell, ShellError> {
        let built = self.try_build();
        count(if built.is_ok() { &self.counters.built } else { &self.counters.failed });
        built
    }

    fn try_build(&self) -> Result<Shell, ShellError> {
        let mut ticket = Ticket::issue(&self.counters, self.limits.alive)?;
        let needs =
            Needs { memory: ByteSize::ZERO, mappings: self.shape.mappings(), descriptors: self.shape.descriptors() };
        ticket.pass = Some(self.gate.pass(needs)?);
        let shell = Shell::build(&self.shape)?;
        ticket.hole = Some(shell.hole().clone());
        Ok(shell.with_ticket(ticket))
    }

    /// The pool's thread.
    fn refill(&self) {
        let mut shelf = self.shelf.lock();
        while !shelf.stopping {
            if shelf.rested || shelf.is_full() {
                shelf.rested = true;
                self.filled.notify_all();
                self.work.wait(&mut shelf);
                continue;
            }
            if let Some(until) = shelf.quiet_until.filter(|until| !shelf.ready.is_empty() && Instant::now() < *until) {
                self.work.wait_until(&mut shelf, until);
                continue;
            }
            drop(shelf);
            let built = self.build();
            shelf = self.shelf.lock();
            match built {
                // Drained meanwhile: too late for the shelf.
                Ok(shell) if shelf.is_full() => {
                    parking_lot::MutexGuard::unlocked(&mut shelf, || drop(shell));
                }
                Ok(shell) => {
                    shelf.ready.push_back(shell);
                    // What an earlier try met is made good.
                    shelf.failed = None;
                }
                Err(error) => {
                    tracing::warn!(%error, "a shell could not be made ahead of need");
                    shelf.failed = Some(error);
                    // Not again until somebody takes one: what was short now will be short in a microsecond.
                    shelf.rested = true;
                }
            }
        }
    }

    fn wake(&self, shelf: &mut Shelf) {
        shelf.rested = false;
        self.work.notify_one();
    }
}

impl ShellPool {
    /// How many shells are tried whose holes turn out to be taken.
    const TRIES: u32 = 8;

    /// A pool that begins to fill.
    ///
    /// # Errors
    /// [`ShellError::Thread`].
    pub fn new(shape: ShellShape, limits: PoolLimits) -> Result<Self, ShellError> {
        let shelf = Mutex::new(Shelf { target: limits.ready.min(limits.alive), ..Shelf::default() });
        let (work, filled, counters) = (Condvar::new(), Condvar::new(), Arc::default());
        let PoolLimits { spare_descriptors, spare_mappings, spare_memory, .. } = limits;
        let rules = Admission { spare_descriptors, spare_mappings, spare_memory, ..Admission::default() };
        let gate = Gate::new(rules, Arc::new(ThisHost::default()));
        let shared = Arc::new(Shared { shape, limits, gate, shelf, work, filled, counters });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("offshoot-shells".into()).spawn(move || theirs.refill());
        Ok(Self { shared, thread: Some(thread.map_err(ShellError::Thread)?) })
    }

    /// What its shells have in common.
    pub fn shape(&self) -> &ShellShape {
        &self.shared.shape
    }

    /// A shell off the shelf, if there is one. Waits for nobody but another taker.
    pub fn try_take(&self) -> Option<Shell> {
        let mut shelf = self.shared.shelf.lock();
        let shell = shelf.ready.pop_front();
        shelf.quiet_until = Some(Instant::now() + self.shared.limits.quiet);
        if shelf.count().get() * 2 <= shelf.target.get() {
            self.shared.wake(&mut shelf);
        }
        if shell.is_some() {
            count(&self.shared.counters.taken);
        }
        shell
    }

    /// A shell off the shelf, or one built now, on the caller's time.
    ///
    /// # Errors
    /// [`ShellError::ShellLimit`], [`ShellError::Refused`], or what building one met.
    pub fn take(&self) -> Result<Shell, ShellError> {
        if let Some(shell) = self.try_take() {
            return Ok(shell);
        }
        let shell = self.shared.build()?;
        count(&self.shared.counters.built_on_demand);
        Ok(shell)
    }

    /// Drops every shell on the shelf and makes no more until [`ShellPool::refill`]; returns how many they were. Shells that were taken are not
    /// touched, and [`ShellPool::take`] goes on to build on demand.
    pub fn drain(&self) -> ShellCount {
        // They go once the lock is free.
        let shells = {
            let mut shelf = self.shared.shelf.lock();
            shelf.target = ShellCount::ZERO;
            take(&mut shelf.ready)
        };
        ShellCount::new(shells.len() as u64)
    }

    /// Fills the shelf again, in the background: after [`ShellPool::drain`], or after what kept shells from being made is mended.
    pub fn refill(&self) {
        let mut shelf = self.shared.shelf.lock();
        shelf.target = self.shared.limits.ready.min(self.shared.limits.alive);
        self.shared.wake(&mut shelf);
    }

    /// Waits until the shelf is full.
    ///
    /// # Errors
    /// What kept the thread from filling it, once.
    pub fn wait_filled(&self) -> Result<(), ShellError> {
        let mut shelf = self.shared.shelf.lock();
        if !shelf.is_full() {
            shelf.quiet_until = None;
            self.shared.wake(&mut shelf);
        }
        while !shelf.rested {
            self.shared.filled.wait(&mut shelf);
        }
        shelf.failed.take().map_or(Ok(()), Err)
    }

    /// Figures. Exact once the threads that take and drop shells have come to rest.
    pub fn stats(&self) -> PoolStats {
        let ready = self.shared.shelf.lock().count();
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| ShellCount::new(counter.load(Ordering::Relaxed));
        PoolStats {
            ready,
            alive: read(&counters.alive),
            built: read(&counters.built),
            failed: read(&counters.failed),
            taken: read(&counters.taken),
            built_on_demand: read(&counters.built_on_demand),
            entered: read(&counters.entered),
            discarded: read(&counters.discarded),
            holes_lost: read(&counters.holes_lost),
        }
    }

    /// Spawns a clone of `point` into a shell and loads `state`: a VM with a machine that is ready to run. Maps RAM and restores
    /// state, and nothing else.
    ///
    /// # Errors
    /// As [`ShellPool::take`], [`ForkPoint::spawn_into`] and [`Shell::enter`]. Nothing is left behind. A hole that was taken by somebody else is
    /// no error: the shell is dropped, counted, and another is used.
    pub fn spawn(
        &self,
        point: &ForkPoint<Mapped>,
        state: &MachineState,
        spec: CloneSpec,
    ) -> Result<(Vm<Mapped>, KvmMachine), ShellError> {
        self.spawn_with(point, state, spec, |_| Ok(()))
    }

    /// The same, with a customization as in [`ForkPoint::spawn_with`].
    ///
    /// # Errors
    /// As [`ShellPool::spawn`], and [`SpawnError::Customize`].
    pub fn spawn_with(
        &self,
        point: &ForkPoint<Mapped>,
        state: &MachineState,
        spec: CloneSpec,
        customize: impl FnOnce(&Vm<Mapped>) -> Result<(), BoxError>,
    ) -> Result<(Vm<Mapped>, KvmMachine), ShellError> {
        let mut customize = Some(customize);
        let mut tries = 1;
        loop {
            let shell = self.take()?;
            // Called once: only a try that mapped RAM gets as far.
            let spawned = point.spawn_into_with(shell.hole(), spec.clone(), |clone| {
                customize.take().map_or(Ok(()), |customize| customize(clone))
            });
            match spawned {
                Ok(clone) => {
                    let machine = shell.enter(&clone.ram().place()?, state)?;
                    return Ok((clone, machine));
                }
                Err(SpawnError::Space(SpaceError::HoleTaken)) if tries < Self::TRIES => tries += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for ShellPool {
    fn drop(&mut self) {
        {
            let mut shelf = self.shared.shelf.lock();
            shelf.stopping = true;
            self.shared.work.notify_all();
        }
        if let Some(thread) = self.thread.take() {
            // It panics only if the kernel's answers break an invariant of this file; the pool is going away all the same.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for ShellPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShellPool")
            .field("shape", &self.shared.shape)
            .field("limits", &self.shared.limits)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::kvm::{Devices, MachinePlan, VcpuCount, VmBuilder};
    use crate::page::PageSize;
    use crate::ram::RamLayout;

    #[test]
    fn a_failure_that_was_made_good_is_not_told() {
        let Some(host) = crate::frontend::kvm::host::or_skip() else { return };
        let machine = VmBuilder::new(&host).unwrap().devices(Devices::NONE).unwrap().vcpus(VcpuCount::ONE).unwrap();
        machine.vcpus()[0].set_cpuid2(host.supported_cpuid()).unwrap();
        let plan = MachinePlan::read(&host, machine.vcpus(), Devices::NONE).unwrap();
        let shape = ShellShape::new(&plan, &RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap());
        let two = ShellCount::new(2);
        let pool = ShellPool::new(shape, PoolLimits { ready: two, alive: two, ..PoolLimits::default() }).unwrap();
        pool.wait_filled().unwrap();
        let taken = [pool.try_take().unwrap(), pool.try_take().unwrap()];
        // Until the thread has met the limit, and rests.
        let rests = |shelf: &Shelf| shelf.rested && shelf.failed.is_some();
        while !rests(&pool.shared.shelf.lock()) {
            std::thread::yield_now();
        }
        drop(taken);
        pool.wait_filled().unwrap();
        assert_eq!(pool.stats().ready, two);
    }
}
