//! Reading and writing a durable disk: what one access does, and which page is whose.
//!
//! Runs under the disk's lock held shared. A page's first write since the last cut is claimed, so that two first writers cannot undo each
//! other; its bytes are in the file before anybody can see that it is there. Must not cut, reset, discard or flush.

use std::borrow::Cow;
use std::ops::Range;

use super::durable::{Durable, Live, State};
use super::image::DurableImage;
use super::layer::Place;
use crate::error::SpaceError;
use crate::overlay::PageState;
use crate::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageRange, PageSize};
use crate::sync::MutexGuard;

/// First writes to pages of different claims run beside each other.
pub(super) const CLAIMS: usize = 64;
const PAGE: u64 = PageSize::KIB_4.bytes().get();

/// Where a page's bytes are.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    Live,
    Place(&'a Place),
    Zero,
    Base,
}

impl Found<'_> {
    /// Whether one read serves both.
    fn joins(self, other: Self) -> bool {
        use crate::overlay::PageRef;
        match (self, other) {
            (Self::Live, Self::Live) | (Self::Zero, Self::Zero) | (Self::Base, Self::Base) => true,
            (Self::Place(a), Self::Place(b)) => a.same(b),
            _ => false,
        }
    }
}

impl<'a> From<PageState<&'a Place>> for Found<'a> {
    fn from(state: PageState<&'a Place>) -> Self {
        match state {
            PageState::Absent => Self::Base,
            PageState::Zero => Self::Zero,
            PageState::Data(place) => Self::Place(place),
        }
    }
}

/// The pages that an access touches.
fn touched(at: u64, len: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(at / PAGE), PageIndex::new((at + len).div_ceil(PAGE)))
}

/// Fills `buf` from `at`, which was checked: neighbouring pages that lie together are read in one call.
pub(super) fn read_through<'a>(
    image: &DurableImage,
    live: Option<&Live>,
    at: u64,
    buf: &mut [u8],
    find: impl Fn(PageIndex) -> Found<'a>,
) -> Result<(), SpaceError> {
    let end = at + buf.len() as u64;
    let mut from = at;
    while from < end {
        let found = find(PageIndex::new(from / PAGE));
        let mut to = (from / PAGE + 1) * PAGE;
        while to < end && found.joins(find(PageIndex::new(to / PAGE))) {
            to += PAGE;
        }
        let part = &mut buf[(from - at) as usize..(to.min(end) - at) as usize];
        match found {
            Found::Zero => part.fill(0),
            Found::Base => image.read_base(ByteOffset::new(from), part)?,
            Found::Place(place) => place.read(from, part)?,
            Found::Live => match live {
                Some(live) => live.overlay().read(from, part)?,
                None => unreachable!("only a live overlay's table says that a page is in it"),
            },
        }
        from = to;
    }
    Ok(())
}

fn checked(geometry: Geometry, at: ByteOffset, len: usize) -> Result<u64, SpaceError> {
    geometry.check(at, ByteSize::new(len as u64))?;
    Ok(at.get())
}

impl State {
    #[inline]
    fn find(&self, page: PageIndex) -> Found<'_> {
        match self.live.get() {
            Some(live) if live.presence.contains(page) => Found::Live,
            _ => self.below.get(page).into(),
        }
    }

    pub(super) fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let at = checked(self.origin.geometry_of(), at, buf.len())?;
        read_through(&self.origin, self.live.get(), at, buf, |page| self.find(page))
    }

    /// What lies under the live overlay, within one page.
    fn read_below(&self, at: u64, buf: &mut [u8]) -> Result<(), SpaceError> {
        read_through(&self.origin, None, at, buf, |page| self.below.get(page).into())
    }
}

impl Durable {
    pub(super) fn write_to(&self, state: &State, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        let at = checked(state.origin.geometry_of(), at, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let live = state.live_or_new(self)?;
        let pages = touched(at, data.len() as u64);
        if pages.iter().all(|page| live.presence.contains(page)) {
            return Ok(live.overlay().write(at, data)?);
        }
        let _claims = self.claim(pages);
        // Looked at again: another writer may have been here first.
        let cold = cold_runs(live, pages);
        let (at, data) = state.with_edges(&cold, at, data)?;
        // New pages first: they can fail for want of room, and are seen by nobody yet. What is left overwrites pages in place.
        let end = at + data.len() as u64;
        let clip = |from: u64, to: u64| from.max(at)..to.min(end);
        let write = |part: Range<u64>| {
            let bytes = &data[(part.start - at) as usize..(part.end - at) as usize];
            if bytes.is_empty() { Ok(()) } else { live.overlay().write(part.start, bytes) }
        };
        let mut warm = Vec::new();
        let mut after = at;
        for run in &cold {
            let part = clip(run.start().get() * PAGE, run.end().get() * PAGE);
            write(part.clone())?;
            warm.push(clip(after, part.start));
            after = part.end;
        }
        warm.push(clip(after, end));
        warm.into_iter().filter(|part| part.start < part.end).try_for_each(write)?;
        state.install(live, &cold);
        Ok(())
    }

    /// Keeps other first writers of these pages away.
    fn claim(&self, pages: PageRange) -> Vec<MutexGuard<'_, ()>> {
        let mut wanted: u64 = 0;
        for page in pages.iter().take(CLAIMS) {
            wanted |= 1 << (page.get() % CLAIMS as u64);
        }
        // Always in this order, so that two writers never wait for each other.
        (0..CLAIMS).filter(|claim| wanted >> claim & 1 == 1).map(|claim| self.claims[claim].lock()).collect()
    }
}

/// The runs of pages that the live overlay does not have.
fn cold_runs(live: &Live, pages: PageRange) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages.iter().filter(|page| !live.presence.contains(*page)) {
        match runs.last_mut() {
            Some(last) if last.end() == page => {
                *last = PageRange::from_bounds(last.start(), PageRange::one(page).end())
            }
            _ => runs.push(PageRange::one(page)),
        }
    }
    runs
}

impl State {
    /// The write with the rest of the pages that are new and that it covers in part, from below.
    fn with_edges<'a>(&self, cold: &[PageRange], at: u64, data: &'a [u8]) -> Result<(u64, Cow<'a, [u8]>), SpaceError> {
        let end = at + data.len() as u64;
        let is_cold = |byte: u64| cold.iter().any(|run| run.contains(PageIndex::new(byte / PAGE)));
        let from = if is_cold(at) { at / PAGE * PAGE } else { at };
        let to = if is_cold(end - 1) { end.next_multiple_of(PAGE) } else { end };
        if (from, to) == (at, end) {
            return Ok((at, data.into()));
        }
        let mut whole = vec![0; (to - from) as usize];
        let (before, rest) = whole.split_at_mut((at - from) as usize);
        let (middle, after) = rest.split_at_mut(data.len());
        self.read_below(from, before)?;
        self.read_below(end, after)?;
        middle.copy_from_slice(data);
        Ok((from, whole.into()))
    }

    /// Lets everybody see pages whose bytes are in the file.
    fn install(&self, live: &Live, cold: &[PageRange]) {
        let place = PageState::Data(Place::positional(live.layer.clone()));
        let mut next = self.next.lock();
        for run in cold {
            next.table_bytes += next.index.set(*run, &place);
            // What was discarded before must not be punched now.
            next.waiting.remove(*run);
            next.ready.remove(*run);
            live.presence.insert(*run);
            // Set as one, the pages of a leaf are a slot: less memory, and a shorter way for every read through the next image.
            for group in live.presence.full_groups(*run) {
                next.table_bytes += next.index.set(group, &place);
            }
        }
    }
}
