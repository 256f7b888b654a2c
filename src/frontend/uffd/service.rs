//! The faults of one VMM, from its hand-shake to its end.
//!
//! Owns the order of things: which bytes a page gets, and that what a VMM has dropped never comes back. Must not know who listens.
//!
//! A worker reads events, then answers the faults among them. The image is read with no lock held. A page is put with `order` held for
//! reading, and events are read with it held for writing: so a page is put by what is known of it, and no event that would make it wrong is read
//! in between. While an event waits to be read the kernel puts no page at all (`EAGAIN`), and so the rule holds between the VMM's
//! `madvise` and the page as well.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::counts::{Counters, FaultCounts};
use super::handshake::{HandshakeError, cannot_wait, shake_hands};
use super::map::{MemoryMap, MemoryRegion, PAGE, Place};
use super::options::{FaultService, Unreadable};
use super::served::ServedPages;
use super::stop::Stop;
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, PageCount, PageIndex, PageRange, is_zero};
use crate::sys::error::SysError;
use crate::sys::foreign_uffd::{Event, FaultKind, ForeignUffd, MOST_EVENTS, PutError, VmmAddress};
use crate::sys::peer::{Peer, Received, receive};
use crate::sys::wait::wait_readable;

/// How long a fault that could not be answered rests at first: about what the VMM's thread needs to run on.
const FIRST_REST: Duration = Duration::from_micros(50);
/// And at most, while nothing gets better.
const LONGEST_REST: Duration = Duration::from_millis(20);
/// Children of a VMM whose memory is kept from being wrong. No VMM forks that often.
const MOST_CHILDREN: usize = 16;

/// Why a VMM is no longer served.
///
/// Where the VMM lives on, its threads that touch a page which has had no bytes yet wait for ever: nothing else would give them the right ones.
/// Whoever is told of such an end should end the VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum End {
    /// The VMM has ended.
    #[error("the VMM has ended")]
    Exited,
    /// [`Stop::stop`], or the server was shut down.
    #[error("stopped")]
    Stopped,
    /// It was never served.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The image could not be read, and [`FaultService::unreadable`] or the kernel is against going on.
    #[error("the image cannot be read at {at}: {error}")]
    Unreadable {
        /// Where.
        at: ByteOffset,
        /// What it said.
        #[source]
        error: SpaceError,
    },
    /// A fault of memory that the hand-shake did not tell of.
    #[error("a fault at {0:?}, outside the regions of the hand-shake")]
    Outside(VmmAddress),
    /// The VMM has registered its memory for write protection or minor faults as well.
    #[error("a fault of write protection or of a page in the cache, at {0:?}: only missing pages are served")]
    OtherMode(VmmAddress),
    /// The VMM has moved its memory (mremap), or there is an event that nobody knows.
    #[error("an event that cannot be served: memory was moved (mremap), or the kernel is newer than this")]
    Event,
    /// The VMM forks and forks.
    #[error("more than {MOST_CHILDREN} forks of a VMM")]
    Forks,
    /// The VMM says more than the hand-shake, as with guest_memfd.
    #[error("the VMM sends more after its hand-shake: faults over the socket (guest_memfd) are not served")]
    Talks,
    /// The system refused.
    #[error(transparent)]
    System(#[from] SpaceError),
    /// A worker has panicked.
    #[error("a worker has panicked")]
    Panicked,
}

/// What became of one VMM.
#[derive(Debug)]
pub struct Served {
    /// Why it is over.
    pub end: End,
    /// The VMM's process id, where the kernel tells (Linux 6.5) and it could be seen.
    pub pid: Option<u32>,
    /// What was done for it.
    pub counts: FaultCounts,
}

/// Serves one VMM that has connected, from its hand-shake until it ends or `stop`. Uses the calling thread, and
/// [`FaultService::workers`] less one more.
///
/// The VMM's end is seen by its process where the kernel tells (Linux 6.5): old versions of Firecracker close the connection at once and live
/// on. Elsewhere a closed connection is the end.
///
/// Memory: one bit for each 4 KiB of the VMM's memory, and a window a worker.
pub fn serve(socket: &UnixStream, image: &dyn Source, service: &FaultService, stop: &Stop) -> Served {
    serve_counted(socket, image, service, stop, &Counters::default())
}

/// The same, counted where others can look on.
pub(super) fn serve_counted(
    socket: &UnixStream,
    image: &dyn Source,
    service: &FaultService,
    stop: &Stop,
    counters: &Counters,
) -> Served {
    let peer =
        Peer::of(socket).inspect_err(|error| tracing::debug!(%error, "the VMM's end is seen by its socket")).ok();
    let pid = peer.as_ref().and_then(Peer::pid);
    let end = run(socket, image, service, stop, peer, counters);
    Served { end, pid, counts: counters.now() }
}

fn run(
    socket: &UnixStream,
    image: &dyn Source,
    service: &FaultService,
    stop: &Stop,
    peer: Option<Peer>,
    counters: &Counters,
) -> End {
    let (map, uffd) = match shake_hands(socket, image.len(), service.handshake, stop) {
        Ok(agreed) => agreed,
        Err(error) => return error.into(),
    };
    let over = match Stop::new() {
        Ok(over) => over,
        Err(error) => return End::System(cannot_wait(error)),
    };
    let served = map.regions().iter().map(|region| ServedPages::none(region.pages())).collect();
    let seat = Mutex::new(Watch { socket: Some(socket), peer, children: Vec::new() });
    let (order, end) = (RwLock::new(()), OnceLock::new());
    let vmm = Vmm { uffd, map, served, image, service, stop, over, counters, seat, order, end };
    thread::scope(|scope| {
        let more = (1..service.workers).map_while(|_| {
            let worker = thread::Builder::new().name("uffd-worker".into());
            // Fewer workers than asked for are slower, not wrong.
            let refused = |error: &std::io::Error| tracing::warn!(%error, "a VMM is served by fewer workers");
            worker.spawn_scoped(scope, || vmm.work()).inspect_err(refused).ok()
        });
        let more: Vec<_> = more.collect();
        vmm.work();
        for worker in more {
            // A worker that panics has said no end; `Panicked` is what is left.
            let _panicked = worker.join();
        }
    });
    vmm.end.into_inner().unwrap_or(End::Panicked)
}

/// One VMM while it is served.
struct Vmm<'a> {
    uffd: ForeignUffd,
    map: MemoryMap,
    /// By region.
    served: Vec<ServedPages>,
    image: &'a dyn Source,
    service: &'a FaultService,
    stop: &'a Stop,
    /// Has the other workers leave.
    over: Stop,
    counters: &'a Counters,
    seat: Mutex<Watch<'a>>,
    order: RwLock<()>,
    end: OnceLock<End>,
}

/// What whoever reads events looks at beside them.
struct Watch<'a> {
    socket: Option<&'a UnixStream>,
    peer: Option<Peer>,
    /// Userfaultfds of forked children. Closed, a child's missing pages would read as zeroes, so they are kept, and it waits.
    children: Vec<OwnedFd>,
}

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Given,
    /// Not now.
    Again,
}

/// Has the others leave by whatever way a worker ends, a panic included.
struct Leaving<'a>(&'a Stop);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Vmm<'_> {
    fn work(&self) {
        let _leaving = Leaving(&self.over);
        if let Err(end) = self.answer_all() {
            // The first to end says why.
            let _later = self.end.set(end);
        }
    }

    /// Ends with an error, or because another worker has.
    fn answer_all(&self) -> Result<(), End> {
        let mut room = Vec::new();
        let mut waiting = BTreeSet::new();
        let mut rest = FIRST_REST;
        loop {
            if waiting.is_empty() {
                let mut watch = self.seat.lock();
                if !self.hear(&mut watch, None, &mut waiting)? {
                    return Ok(());
                }
            } else if let Some(mut watch) = self.seat.try_lock() {
                // What holds a fault up is most likely an event that nobody has read.
                if !self.hear(&mut watch, Some(rest), &mut waiting)? {
                    return Ok(());
                }
            } else if wait_readable(&[self.over.as_fd()], Some(rest)).map_err(cannot_wait)?[0] {
                return Ok(());
            }
            let before = waiting.len();
            let mut again = BTreeSet::new();
            for place in std::mem::take(&mut waiting) {
                if self.answer(place, &mut room)? == Answer::Again {
                    self.counters.retries.add(1);
                    again.insert(place);
                }
            }
            rest = if again.len() < before { FIRST_REST } else { (rest * 2).min(LONGEST_REST) };
            waiting = again;
        }
    }

    /// Waits for something to happen, `patience` at most, and takes faults in. `false` once another worker has ended.
    fn hear(
        &self,
        watch: &mut Watch<'_>,
        patience: Option<Duration>,
        faults: &mut BTreeSet<Place>,
    ) -> Result<bool, End> {
        let mut fds = vec![self.uffd.as_fd(), self.stop.as_fd(), self.over.as_fd()];
        fds.extend(watch.peer.as_ref().map(Peer::as_fd));
        fds.extend(watch.socket.map(AsFd::as_fd));
        let ready = wait_readable(&fds, patience).map_err(cannot_wait)?;
        if ready[2] {
            return Ok(false);
        }
        if ready[1] {
            return Err(End::Stopped);
        }
        let mut others = ready[3..].iter().copied();
        if watch.peer.is_some() && others.next() == Some(true) {
            return Err(End::Exited);
        }
        if watch.socket.is_some() && others.next() == Some(true) {
            self.hear_socket(watch)?;
        }
        if ready[0] {
            let most = if self.service.workers == 1 { MOST_EVENTS } else { 1 };
            let _nobody_puts = self.order.write();
            for event in self.uffd.read(most).map_err(SpaceError::from)? {
                self.note(event, watch, faults)?;
            }
        }
        Ok(true)
    }

    /// Nothing is to be said after the hand-shake.
    fn hear_socket(&self, watch: &mut Watch<'_>) -> Result<(), End> {
        let Some(socket) = watch.socket else { return Ok(()) };
        match receive(socket, &mut [0; 16]).map_err(SpaceError::from)? {
            Received::Nothing => Ok(()),
            Received::Bytes(..) => Err(End::Talks),
            Received::HungUp if watch.peer.is_none() => Err(End::Exited),
            Received::HungUp => {
                watch.socket = None;
                Ok(())
            }
        }
    }

    fn note(&self, event: Event, watch: &mut Watch<'_>, faults: &mut BTreeSet<Place>) -> Result<(), End> {
        match event {
            Event::Fault { at, kind: FaultKind::OtherMode } => Err(End::OtherMode(at)),
            Event::Fault { at, kind: FaultKind::Missing } => {
                self.counters.faults.add(1);
                faults.insert(self.map.place_of(at).ok_or(End::Outside(at))?);
                Ok(())
            }
            Event::Gone { start, end } => {
                for (region, pages) in self.map.pages_in(start, end) {
                    let new = self.served[region].insert(pages);
                    self.counters.dropped.add(new.get());
                }
                Ok(())
            }
            Event::Forked(child) => {
                tracing::warn!("a VMM has forked: its child's pages are not served, and who touches them waits");
                watch.children.push(child);
                if watch.children.len() > MOST_CHILDREN { Err(End::Forks) } else { Ok(()) }
            }
            Event::Moved | Event::Unknown => Err(End::Event),
        }
    }

    /// Gives a page what it is to hold.
    fn answer(&self, place: Place, room: &mut Vec<u8>) -> Result<Answer, End> {
        let (region, served) = (&self.map.regions()[place.region], &self.served[place.region]);
        let unit = region.around(place.page, PageCount::new(1));
        for bounds in [region.around(place.page, self.service.window), unit] {
            let run = served.fresh_around(place.page, bounds);
            if run.is_empty() {
                break;
            }
            room.resize(PAGE.size_of(run.count()).get() as usize, 0);
            let read = self.image.read(region.image_offset_of(run.start()), room);
            match read {
                Ok(()) => {}
                // A neighbour may be what cannot be read.
                Err(_) if bounds != unit => continue,
                Err(error) => return self.unreadable(place, unit, error),
            }
            let _no_event = self.order.read();
            // Others may have put some of them, and the VMM may have dropped some.
            let now = served.fresh_around(place.page, run);
            if now.is_empty() {
                break;
            }
            let skipped = PAGE.size_of(PageCount::new(now.start().get() - run.start().get())).get() as usize;
            let bytes = &room[skipped..][..PAGE.size_of(now.count()).get() as usize];
            return self.put(place, now, bytes);
        }
        room.clear();
        room.resize(PAGE.size_of(unit.count()).get() as usize, 0);
        let _no_event = self.order.read();
        self.put(place, unit, room)
    }

    /// Puts pages of a region, and marks those that have had their bytes. `order` is held.
    fn put(&self, place: Place, pages: PageRange, bytes: &[u8]) -> Result<Answer, End> {
        let (region, served) = (&self.map.regions()[place.region], &self.served[place.region]);
        let (mut at, mut single) = (pages.start().get(), false);
        while at < pages.end().get() {
            let from = ((at - pages.start().get()) << PAGE.shift()) as usize;
            let stretch = Stretch::of(region, &bytes[from..], single);
            let here = PageRange::from_bounds(PageIndex::new(at), PageIndex::new(at + stretch.pages.get()));
            let address = region.address_of(here.start());
            let size = PAGE.size_of(stretch.pages);
            let put = match stretch.zero {
                true => self.uffd.zero(address, size),
                false => self.uffd.copy(address, &bytes[from..][..size.get() as usize]),
            };
            let done = match put {
                Ok(done) => {
                    let counter = if stretch.zero { &self.counters.zeroes } else { &self.counters.copied };
                    counter.add(done.get() >> PAGE.shift());
                    PageCount::new(done.get() >> PAGE.shift())
                }
                // Of the first page. Who waits for it may have begun to when the page was put already.
                Err(PutError::Present) => {
                    let first = region.around(here.start(), PageCount::new(1)).count();
                    self.wake(address, first)?;
                    first
                }
                // Over the edge of a kernel mapping, or unmapped.
                Err(PutError::Unmapped) if !single && stretch.pages > region_unit(region) => {
                    single = true;
                    continue;
                }
                Err(PutError::Unmapped) => {
                    self.wake(address, stretch.pages)?;
                    at += stretch.pages.get();
                    continue;
                }
                Err(PutError::Changing | PutError::OutOfMemory) => PageCount::ZERO,
                Err(PutError::Exited) => return Err(End::Exited),
                Err(PutError::Sys(error)) => return Err(SpaceError::from(error).into()),
            };
            if done == PageCount::ZERO {
                // What was asked for may have been put before the rest was not.
                let given = (pages.start().get()..at).contains(&place.page.get());
                return Ok(if given { Answer::Given } else { Answer::Again });
            }
            served.insert(PageRange::from_bounds(here.start(), PageIndex::new(at + done.get())));
            at += done.get();
        }
        Ok(Answer::Given)
    }

    fn wake(&self, at: VmmAddress, pages: PageCount) -> Result<(), End> {
        self.uffd.wake(at, PAGE.size_of(pages)).map_err(|error| SpaceError::from(error).into())
    }

    /// The image does not give a page: nobody gets other bytes in its place.
    fn unreadable(&self, place: Place, unit: PageRange, error: SpaceError) -> Result<Answer, End> {
        let region = &self.map.regions()[place.region];
        let at = region.image_offset_of(unit.start());
        if self.service.unreadable == Unreadable::End {
            return Err(End::Unreadable { at, error });
        }
        let _no_event = self.order.read();
        let address = region.address_of(unit.start());
        match self.uffd.poison(address, PAGE.size_of(unit.count())) {
            Ok(done) => {
                tracing::error!(%at, %error, "a page of a VMM gives SIGBUS: the image cannot be read");
                let pages = PageCount::new(done.get() >> PAGE.shift());
                self.counters.poisoned.add(pages.get());
                let end = PageIndex::new(unit.start().get() + pages.get());
                self.served[place.region].insert(PageRange::from_bounds(unit.start(), end));
                Ok(Answer::Given)
            }
            Err(PutError::Present | PutError::Unmapped) => {
                self.wake(address, unit.count())?;
                Ok(Answer::Given)
            }
            Err(PutError::Changing | PutError::OutOfMemory) => Ok(Answer::Again),
            Err(PutError::Exited) => Err(End::Exited),
            Err(PutError::Sys(SysError::Unsupported { .. })) => Err(End::Unreadable { at, error }),
            Err(PutError::Sys(error)) => Err(SpaceError::from(error).into()),
        }
    }
}

/// Pages that one call puts.
struct Stretch {
    pages: PageCount,
    zero: bool,
}

/// The least that can be put in a region, in pages of 4 KiB.
fn region_unit(region: &MemoryRegion) -> PageCount {
    PageCount::new(region.page_size.bytes().get() >> PAGE.shift())
}

impl Stretch {
    /// As many of the pages at the start of `bytes` as are all zero or all not; one unit where `single`. Huge pages have no zero page.
    fn of(region: &MemoryRegion, bytes: &[u8], single: bool) -> Self {
        let unit = region_unit(region);
        if unit.get() > 1 {
            let all = (bytes.len() >> PAGE.shift()) as u64;
            return Self { pages: PageCount::new(if single { unit.get().min(all) } else { all }), zero: false };
        }
        let (pages, _) = bytes.as_chunks::<4096>();
        let zero = pages.first().is_some_and(|page| is_zero(page));
        let most = if single { 1 } else { pages.len() };
        let count = pages[..most].iter().take_while(|page| is_zero(&page[..]) == zero).count();
        Self { pages: PageCount::new(count as u64), zero }
    }
}
