//! The flush of a durable disk, and the discards that wait for it.
//!
//! The order, each step durable before the next begins: the origin is frozen, if this overlay is its first child; data; the map; the overlay's name;
//! the disk's head; only then is the flush acknowledged, and only then is the space of discarded pages given back.

use std::sync::atomic::Ordering;

use super::durable::{Durable, Live, State};
use super::head::Head;
use super::map::{BLOCK_PAGES, MapBlock};
use crate::error::SpaceError;
use crate::overlay::PageState;
use crate::page::{PageIndex, PageRange};

/// Ranges that are punched while nobody else has the disk.
const PUNCHES: usize = 16;

impl Durable {
    pub(super) fn flush_all(&self) -> Result<(), SpaceError> {
        let mut head = self.head().lock();
        self.flush_state(&self.state().read(), &mut head)?;
        self.punch_ready();
        Ok(())
    }

    /// Makes all that this state holds durable, under the name of this disk. The head's lock keeps other flushes away.
    pub(super) fn flush_state(&self, state: &State, head: &mut Option<Head>) -> Result<(), SpaceError> {
        let dir = self.dir();
        let Some(live) = state.live.get() else {
            if head.is_none() {
                // A clone that has not written: its head names the layer that it reads.
                state.origin.freeze()?;
                let top = state.origin.top().map(|layer| layer.id());
                *head = Some(Head::create(dir.folder(), self.id(), top, state.origin.shape())?);
                self.sync_new_name(head)?;
            }
            return Ok(());
        };
        let id = live.layer.id();
        if let Some(head) = head {
            head.file().check_synced()?;
        }
        let named = head.as_ref().is_some_and(|head| head.top() == Some(id));
        if !named {
            state.origin.freeze()?;
        }
        {
            let mut next = state.next.lock();
            let waiting = std::mem::take(&mut next.waiting);
            next.ready.absorb(waiting);
        }
        let flushed = live.overlay().flush(
            || live.presence.take_changed(),
            |blocks| live.presence.put_back(blocks),
            |block| state.map_block(live, block),
        );
        if let Err(error) = flushed {
            // Nobody knows what the map says now.
            let mut next = state.next.lock();
            let ready = std::mem::take(&mut next.ready);
            next.waiting.absorb(ready);
            return Err(error.into());
        }
        if named {
            return Ok(());
        }
        // From here on a head on disk may name it, whatever is answered: it must not go with this process.
        live.named.store(true, Ordering::Relaxed);
        match head {
            Some(head) => {
                dir.sync_names()?;
                head.advance(Some(id))?;
            }
            None => {
                *head = Some(Head::create(dir.folder(), self.id(), Some(id), state.origin.shape())?);
                self.sync_new_name(head)?;
            }
        }
        Ok(())
    }

    /// Makes the name of a new head durable; takes it away again where that fails.
    fn sync_new_name(&self, head: &mut Option<Head>) -> Result<(), SpaceError> {
        let synced = self.dir().sync_names();
        if synced.is_err()
            && let Some(made) = head.take()
            && let Err(error) = self.dir().folder().remove(made.file().name())
        {
            tracing::warn!(%error, file = %made.file().name(), "a head that could not be made durable was left behind");
        }
        Ok(synced?)
    }

    /// Gives the space of discarded pages back. The map on disk does not name them any more; whoever writes one of them meanwhile has taken
    /// it out of the set, and while one is punched nobody writes. What fails is tried again at the next flush.
    fn punch_ready(&self) {
        loop {
            if self.state().read().next.lock().ready.is_empty() {
                return;
            }
            let mut state = self.state().write();
            let state = &mut *state;
            let ready = &mut state.next.get_mut().ready;
            let Some(live) = state.live.get() else { return };
            let some: Vec<PageRange> = ready.iter().take(PUNCHES).collect();
            for range in some {
                if let Err(error) = live.overlay().punch(range) {
                    tracing::warn!(%error, "the space of discarded pages could not be given back yet");
                    return;
                }
                ready.remove(range);
            }
        }
    }
}

impl State {
    /// A block of the map as it must be on disk: what the overlay has, and what it hides.
    fn map_block(&self, live: &Live, number: u64) -> MapBlock {
        let mut block = MapBlock { data: live.presence.block(number), ..MapBlock::ABSENT };
        if self.zeroed {
            let start = number * BLOCK_PAGES;
            let end = (start + BLOCK_PAGES).min(self.origin.geometry_of().pages().get());
            let range = PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end));
            let shifted = |page: PageIndex| PageIndex::new(page.get() - start);
            let below = self.below.runs(range);
            let mut was = self.origin.index().runs(range).into_iter().peekable();
            for (run, state) in below.into_iter().filter(|(_, state)| !matches!(state, PageState::Data(_))) {
                while was.next_if(|(old, _)| old.end() <= run.start()).is_some() {}
                while let Some((old, before)) = was.peek().filter(|(old, _)| old.start() < run.end()) {
                    let here = old.intersect(run);
                    if !before.same(state) {
                        block.set_zero(PageRange::from_bounds(shifted(here.start()), shifted(here.end())));
                    }
                    if old.end() > run.end() {
                        break;
                    }
                    was.next();
                }
            }
            block.zero.iter_mut().zip(&block.data).for_each(|(zero, data)| *zero &= !data);
        }
        block
    }
}
