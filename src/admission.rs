//! Who is let in: whether this process and this host have room for one more clone, layer or machine.
//!
//! A refusal must come before the machine thrashes, and asking must cost next to nothing. So nothing is asked of the system for one
//! clone: what the engine holds it counts itself, in one [`Meter`] for each limit, and what everybody else holds is looked up now and
//! then ([`HostView`]). A look sets each meter's *ceiling*; until the next one, whatever is let in counts against that ceiling, so a
//! burst between two looks cannot overrun it. Admission is a compare-and-swap on a counter, and nobody waits for anybody.
//!
//! ```text
//!   ceiling = counted at the look + (limit - held by the process at the look - spare)
//! ```
//!
//! Must not know what a VM, a layer or a page is, nor where the figures come from.

use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use parking_lot::Mutex;

use crate::page::ByteSize;

/// When one more is refused, for want of room in this process or on this host. Part of [`Limits`](crate::Limits).
///
/// What everybody holds is looked at every 100 ms at most, by a thread of its own; what is let in between is counted. Before a
/// refusal it is looked at again, unless that was done within 10 ms, or ten times what a look takes. Trees of one process learn of
/// each other by those looks only, so VMs that come in bursts belong into one [`Tree`](crate::Tree).
///
/// ```
/// use offshoot::{Admission, Limits, page::ByteSize};
/// // Each clone will write some 20 MiB, and a KVM machine with one vCPU will be made for it.
/// let admission = Admission {
///     private_per_clone: ByteSize::mib(20),
///     descriptors_per_clone: 2,
///     mappings_per_clone: 1,
///     ..Admission::default()
/// };
/// let limits = Limits { vms: 10_000, admission, ..Limits::default() };
/// # assert_eq!(offshoot::Tree::new(limits).usage().vms, 0);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Admission {
    /// Whether the process and the host are looked at.
    pub host: HostCheck,
    /// Memory mappings that are to stay free in this process, of `vm.max_map_count`.
    pub spare_mappings: u64,
    /// Descriptors that are to stay free in this process, of the soft `RLIMIT_NOFILE`.
    pub spare_descriptors: u64,
    /// Memory that is to stay available, on the host and in the process's memory cgroup.
    pub spare_memory: ByteSize,
    /// What one clone is expected to write in its life. As long as the process has not grown by it, it is set aside. What else
    /// the process comes to hold while there are clones is taken for what they wrote.
    pub private_per_clone: ByteSize,
    /// Mappings that the embedder makes for each clone, such as one for each vCPU.
    pub mappings_per_clone: u64,
    /// Descriptors that the embedder opens for each clone, such as a machine's and its vCPUs'.
    pub descriptors_per_clone: u64,
}

/// Whether admission looks at the host.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum HostCheck {
    /// It does.
    #[default]
    On,
    /// It does not: the kernel's own refusals are all there is, and the kernel does not refuse memory, it kills.
    Off,
}

impl Default for Admission {
    /// On, with 1,024 mappings, 64 descriptors and 128 MiB left free, and nothing expected of a clone.
    fn default() -> Self {
        Self {
            host: HostCheck::On,
            spare_mappings: 1024,
            spare_descriptors: 64,
            spare_memory: ByteSize::mib(128),
            private_per_clone: ByteSize::ZERO,
            mappings_per_clone: 0,
            descriptors_per_clone: 0,
        }
    }
}

/// Why there is no room for one more. Nothing was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdmissionError {
    /// The tree's limit on VMs.
    #[error("{held} VMs are alive in this tree and {limit} may be: drop clones, or raise Limits::vms")]
    Vms {
        /// VMs alive.
        held: u64,
        /// The limit.
        limit: u64,
    },
    /// Memory mappings would become short.
    #[error(
        "{needed} memory mappings are needed and {spare} are to stay free, but {held} of {limit} are in use in this process: drop clones or \
         machines, flatten fork points of many extents, raise vm.max_map_count, or have fewer of them spare"
    )]
    Mappings {
        /// What is needed.
        needed: u64,
        /// What is to stay free.
        spare: u64,
        /// What the process has.
        held: u64,
        /// vm.max_map_count.
        limit: u64,
    },
    /// Descriptors would become short.
    #[error(
        "{needed} descriptors are needed and {spare} are to stay free, but {held} of {limit} are in use in this process: drop fork points or \
         machines, raise RLIMIT_NOFILE, or have fewer of them spare"
    )]
    Descriptors {
        /// What is needed.
        needed: u64,
        /// What is to stay free.
        spare: u64,
        /// What the process has open.
        held: u64,
        /// The soft RLIMIT_NOFILE.
        limit: u64,
    },
    /// Memory would become short.
    #[error(
        "{needed} of memory are expected to be needed, {owed} to be written yet by clones that are alive, and {spare} are to stay \
         free, but {available} are available ({limit}): drop clones, give the host or the cgroup more, or lower \
         Admission::private_per_clone or spare_memory"
    )]
    Memory {
        /// What the clone is expected to write.
        needed: ByteSize,
        /// What clones that are alive are expected to write and have not written.
        owed: ByteSize,
        /// What is to stay free.
        spare: ByteSize,
        /// What is available.
        available: ByteSize,
        /// Whose limit it is.
        limit: MemoryLimit,
    },
}

/// Where memory is short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryLimit {
    /// MemAvailable of /proc/meminfo.
    Host,
    /// The memory cgroup that the process is in, or one above it.
    Cgroup,
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "MemAvailable of /proc/meminfo",
            Self::Cgroup => "the memory cgroup's limit",
        })
    }
}

/// What is held of something, and how much may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Headroom {
    pub(crate) held: u64,
    pub(crate) limit: u64,
}

/// What one look finds. `None`: not known here, and not limited.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct HostSample {
    /// Memory mappings of this process.
    pub(crate) mappings: Option<Headroom>,
    /// Open descriptors of this process.
    pub(crate) descriptors: Option<Headroom>,
    /// Memory that can be had without swapping, where there is least.
    pub(crate) available: Option<(ByteSize, MemoryLimit)>,
    /// Memory of this process that belongs to no file: private pages of clones among it.
    pub(crate) anonymous: Option<ByteSize>,
}

/// Where the figures come from.
pub(crate) trait HostView: Send + Sync + fmt::Debug {
    /// Time that never goes back, from any start.
    fn now(&self) -> Duration;
    /// A look. May cost by what the process holds.
    fn look(&self) -> HostSample;
    /// Whether looks that nobody must wait for may have a thread of their own.
    fn may_be_asked_aside(&self) -> bool {
        true
    }
}

/// What is limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Limited {
    Memory,
    Mappings,
    Descriptors,
}

const ALL: [Limited; 3] = [Limited::Memory, Limited::Mappings, Limited::Descriptors];

/// What one thing to be made needs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Needs {
    /// Expected to be written.
    pub(crate) memory: ByteSize,
    pub(crate) mappings: u64,
    pub(crate) descriptors: u64,
}

impl Needs {
    fn of(&self, what: Limited) -> i64 {
        signed(match what {
            Limited::Memory => self.memory.get(),
            Limited::Mappings => self.mappings,
            Limited::Descriptors => self.descriptors,
        })
    }
}

/// No ceiling, and the most that one thing can need. Far from where sums would wrap.
const OPEN: i64 = i64::MAX / 4;

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(OPEN).min(OPEN)
}

/// What is counted, and up to where. On a cache line of its own: threads that spawn side by side write it.
#[repr(align(64))]
#[derive(Debug)]
struct Meter {
    counted: AtomicI64,
    ceiling: AtomicI64,
    /// Of what is counted: taken over by others, with whom the next look finds it.
    handed_over: AtomicI64,
}

/// A meter before a look.
#[derive(Clone, Copy, Default, Debug)]
struct Mark {
    counted: i64,
    handed_over: i64,
}

impl Meter {
    fn new() -> Self {
        Self { counted: AtomicI64::new(0), ceiling: AtomicI64::new(OPEN), handed_over: AtomicI64::new(0) }
    }

    fn counted(&self) -> i64 {
        self.counted.load(Ordering::Relaxed)
    }

    fn add(&self, amount: i64) {
        self.counted.fetch_add(amount, Ordering::Relaxed);
    }

    fn has_room_for(&self, need: i64) -> bool {
        self.counted().saturating_add(need) <= self.ceiling.load(Ordering::Relaxed)
    }

    /// Counts `need` unless that would pass the ceiling. In one step: of two threads at the last place one gets it.
    fn take(&self, need: i64) -> bool {
        let take = |counted: i64| {
            let sum = counted.saturating_add(need);
            (sum <= self.ceiling.load(Ordering::Relaxed)).then_some(sum)
        };
        self.counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn mark(&self) -> Mark {
        Mark { counted: self.counted(), handed_over: self.handed_over.swap(0, Ordering::Relaxed) }
    }

    /// After a look: there is `room` besides what is counted. What came or went meanwhile may be in it or not, so the lesser count holds.
    fn set_ceiling(&self, mark: Mark, room: i64) {
        let counted = mark.counted.min(self.counted()) - mark.handed_over;
        self.ceiling.store(counted.saturating_add(room), Ordering::Relaxed);
        self.add(-mark.handed_over);
    }
}

/// The least time between two looks.
const EVERY: Duration = Duration::from_millis(100);
/// The same before a refusal, which should not rest on what is past.
const BEFORE_A_REFUSAL: Duration = Duration::from_millis(10);
/// Looks take one part in so many of the time at most; and of the time of those who are refused.
const SHARE: u32 = 100;
const SHARE_OF_REFUSALS: u32 = 10;

/// What clones were expected to write when a look became due. It may be made a little later, when the next clones have been let in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Nothing,
    Something,
}

/// The last look.
#[derive(Debug, Default)]
struct Seen {
    sample: HostSample,
    /// What was counted then, by [`ALL`].
    counted: [i64; 3],
    /// Of the memory that is expected to be written, what was not yet.
    owed: i64,
    /// What the process holds besides what clones wrote: what it held when nothing was expected of any, or less, where it was seen with less.
    base: Option<ByteSize>,
    /// When the next is due, before a refusal.
    again: Duration,
}

/// The meters, and the view that sets their ceilings.
#[derive(Debug)]
pub(crate) struct Gate {
    rules: Admission,
    view: Arc<dyn HostView>,
    first: Once,
    /// When the next look is due, in nanoseconds of the view's time.
    due: AtomicU64,
    meters: [Meter; 3],
    /// Held during a look, and to word a refusal. Whoever is let in takes no lock.
    seen: Mutex<Seen>,
}

impl Gate {
    pub(crate) fn new(rules: Admission, view: Arc<dyn HostView>) -> Arc<Self> {
        let (first, due, seen) = (Once::new(), AtomicU64::new(0), Mutex::default());
        Arc::new(Self { rules, view, first, due, meters: [(); 3].map(|()| Meter::new()), seen })
    }

    pub(crate) fn rules(&self) -> &Admission {
        &self.rules
    }

    fn meter(&self, what: Limited) -> &Meter {
        &self.meters[what as usize]
    }

    /// What is counted now.
    pub(crate) fn counted(&self) -> Needs {
        let read = |what| u64::try_from(self.meter(what).counted()).unwrap_or(0);
        Needs {
            memory: ByteSize::new(read(Limited::Memory)),
            mappings: read(Limited::Mappings),
            descriptors: read(Limited::Descriptors),
        }
    }

    /// Whether there is room for `needs`, of which nothing is counted.
    pub(crate) fn check(self: &Arc<Self>, needs: Needs) -> Result<(), AdmissionError> {
        if self.rules.host == HostCheck::Off {
            return Ok(());
        }
        self.ask(needs, || match ALL.into_iter().find(|&what| !self.fits(what, needs, Meter::has_room_for)) {
            Some(short) => Err(short),
            None => Ok(()),
        })
    }

    /// Counts `needs` if there is room: for a holder that gives it back.
    pub(crate) fn take(self: &Arc<Self>, needs: Needs) -> Result<(), AdmissionError> {
        if self.rules.host == HostCheck::Off {
            self.count(needs);
            return Ok(());
        }
        self.ask(needs, || {
            for (taken, what) in ALL.into_iter().enumerate() {
                if !self.fits(what, needs, Meter::take) {
                    ALL[..taken].iter().for_each(|&what| self.meter(what).add(-needs.of(what)));
                    return Err(what);
                }
            }
            Ok(())
        })
    }

    /// The same for a holder of its own.
    #[cfg(any(test, all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    pub(crate) fn pass(self: &Arc<Self>, needs: Needs) -> Result<Pass, AdmissionError> {
        self.take(needs)?;
        Ok(Pass { gate: self.clone(), needs })
    }

    /// Counts what is there already, room or not.
    pub(crate) fn count(&self, needs: Needs) {
        ALL.into_iter().filter(|&what| needs.of(what) != 0).for_each(|what| self.meter(what).add(needs.of(what)));
    }

    pub(crate) fn give_back(&self, needs: Needs) {
        ALL.into_iter().filter(|&what| needs.of(what) != 0).for_each(|what| self.meter(what).add(-needs.of(what)));
    }

    fn fits(&self, what: Limited, needs: Needs, how: fn(&Meter, i64) -> bool) -> bool {
        match (what, needs.of(what)) {
            // Whatever it is, it will take some.
            (Limited::Memory, 0) => self.meter(what).has_room_for(0),
            (_, 0) => true,
            (_, need) => how(self.meter(what), need),
        }
    }

    fn expected(&self) -> Expected {
        if self.meter(Limited::Memory).counted() > 0 { Expected::Something } else { Expected::Nothing }
    }

    /// Asks by what was seen last, and before it says no, looks again.
    fn ask(self: &Arc<Self>, needs: Needs, room: impl Fn() -> Result<(), Limited>) -> Result<(), AdmissionError> {
        self.first.call_once(|| self.look(&mut self.seen.lock(), Expected::Nothing));
        self.look_if_due();
        if room().is_ok() {
            return Ok(());
        }
        let mut seen = self.seen.lock();
        if self.view.now() >= seen.again {
            self.look(&mut seen, self.expected());
        }
        room().map_err(|short| self.word(&seen, short, needs))
    }

    /// Has the host looked at where that is due, by whoever comes first; others go on with the last look. The one who comes first does not
    /// wait either, for a look costs by what the process holds.
    fn look_if_due(self: &Arc<Self>) {
        let due = self.due.load(Ordering::Relaxed);
        let now = nanoseconds(self.view.now());
        let later = now.saturating_add(nanoseconds(EVERY));
        if now < due || self.due.compare_exchange(due, later, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        let expected = self.expected();
        if !self.view.may_be_asked_aside() {
            return self.look(&mut self.seen.lock(), expected);
        }
        let gate = self.clone();
        let look = move || gate.look(&mut gate.seen.lock(), expected);
        if let Err(error) = std::thread::Builder::new().name("offshoot-host".into()).spawn(look) {
            tracing::warn!(%error, "admission goes on with an old look at the host");
        }
    }

    /// Looks, and sets the ceilings.
    fn look(&self, seen: &mut Seen, expected: Expected) {
        let start = self.view.now();
        let marks = ALL.map(|what| self.meter(what).mark());
        let sample = self.view.look();
        let rules = &self.rules;
        let free = |room: Option<Headroom>, spare: u64| {
            room.map_or(OPEN, |room| signed(room.limit) - signed(room.held) - signed(spare))
        };
        let grown = sample.anonymous.map_or(0, |now| {
            let base = match expected {
                Expected::Nothing => now,
                Expected::Something => seen.base.map_or(now, |base| base.min(now)),
            };
            seen.base = Some(base);
            signed(now.get().saturating_sub(base.get()))
        });
        seen.owed = (marks[Limited::Memory as usize].counted - grown).max(0);
        let available = sample
            .available
            .map_or(OPEN, |(available, _)| signed(available.get()) - signed(rules.spare_memory.get()) - seen.owed);
        let room =
            [available, free(sample.mappings, rules.spare_mappings), free(sample.descriptors, rules.spare_descriptors)];
        for ((what, mark), room) in ALL.into_iter().zip(marks).zip(room) {
            self.meter(what).set_ceiling(mark, room);
        }
        seen.counted = marks.map(|mark| mark.counted - mark.handed_over);
        seen.sample = sample;
        let end = self.view.now();
        let took = end.saturating_sub(start);
        seen.again = end + BEFORE_A_REFUSAL.max(took.saturating_mul(SHARE_OF_REFUSALS));
        self.due.store(nanoseconds(end + EVERY.max(took.saturating_mul(SHARE))), Ordering::Relaxed);
    }

    /// What is short, as of now.
    fn word(&self, seen: &Seen, short: Limited, needs: Needs) -> AdmissionError {
        let since = self.meter(short).counted() - seen.counted[short as usize];
        let held = |room: Option<Headroom>| {
            let Headroom { held, limit } = room.unwrap_or(Headroom { held: 0, limit: 0 });
            (u64::try_from(signed(held) + since).unwrap_or(0), limit)
        };
        match short {
            Limited::Memory => {
                let (available, limit) = seen.sample.available.unwrap_or((ByteSize::ZERO, MemoryLimit::Host));
                let owed = ByteSize::new(u64::try_from(seen.owed + since).unwrap_or(0));
                AdmissionError::Memory { needed: needs.memory, owed, spare: self.rules.spare_memory, available, limit }
            }
            Limited::Mappings => {
                let (held, limit) = held(seen.sample.mappings);
                AdmissionError::Mappings { needed: needs.mappings, spare: self.rules.spare_mappings, held, limit }
            }
            Limited::Descriptors => {
                let (held, limit) = held(seen.sample.descriptors);
                let (needed, spare) = (needs.descriptors, self.rules.spare_descriptors);
                AdmissionError::Descriptors { needed, spare, held, limit }
            }
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What was let in, counted until it is dropped.
#[cfg(any(test, all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    needs: Needs,
}

#[cfg(any(test, all(feature = "kvm", target_os = "linux", target_arch = "x86_64")))]
impl Pass {
    /// Leaves what was let in to somebody who does not count it: it counts until the next look, which finds it there.
    pub(crate) fn hand_over(mut self) {
        let needs = std::mem::take(&mut self.needs);
        for what in ALL {
            self.gate.meter(what).handed_over.fetch_add(needs.of(what), Ordering::Relaxed);
        }
    }
}

#[cfg(any(test, all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.give_back(self.needs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    const TWO: Needs = Needs { memory: ByteSize::ZERO, mappings: 1, descriptors: 2 };

    #[test]
    fn what_was_handed_over_counts_until_it_is_seen() {
        let host = FakeHost::new();
        host.set_descriptors(0, 10);
        let gate = Gate::new(Admission { spare_descriptors: 0, ..Admission::default() }, host.clone());
        let passes: Vec<_> = (0..3).map(|_| gate.pass(TWO).unwrap()).collect();
        passes.into_iter().for_each(Pass::hand_over);
        // Six are out, and no look has found them yet: none is given away twice.
        let more: Vec<_> = (0..2).map(|_| gate.pass(TWO).unwrap()).collect();
        assert!(matches!(gate.pass(TWO), Err(AdmissionError::Descriptors { needed: 2, held: 10, .. })));
        host.set_descriptors(10, 10);
        host.pass_time(EVERY);
        assert!(gate.pass(TWO).is_err());
        assert_eq!(gate.counted().descriptors, 4, "the six are the host's now");
        drop(more);
        host.set_descriptors(6, 10);
        host.pass_time(EVERY);
        assert!(gate.pass(TWO).is_ok());
        assert_eq!(gate.counted(), Needs::default());
    }

    #[test]
    fn a_refusal_takes_nothing() {
        let host = FakeHost::new();
        host.set_descriptors(0, 100);
        host.set_mappings(0, 2000);
        let gate = Gate::new(Admission { spare_descriptors: 99, ..Admission::default() }, host);
        let needs = Needs { memory: ByteSize::mib(1), ..TWO };
        assert!(matches!(gate.take(needs), Err(AdmissionError::Descriptors { .. })));
        assert!(matches!(gate.check(needs), Err(AdmissionError::Descriptors { .. })));
        assert_eq!(gate.counted(), Needs::default());
    }
}
