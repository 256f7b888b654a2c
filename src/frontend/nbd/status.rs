//! What the metadata contexts say of a disk: block status, and where a read finds nothing but zeroes.
//!
//! Walks a range in windows, so that neither a lock of the disk is held nor memory is taken by the length of a request.

use super::context::Context;
use super::export::Export;
use super::request::{Extents, Span};
use super::wire::state;
use crate::backing::{Allocation, Extent};
use crate::disk::{Disk, DiskError};
use crate::page::{PageIndex, PageRange, SECTOR_SIZE};

/// Pages that a disk is asked about at once.
const WINDOW: u64 = 1 << 15;
/// Extents of one context in one reply. A client asks again where they end.
const MOST: usize = 4096;

/// Neighbouring bytes of one state. `len` is never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run<S> {
    pub len: u32,
    pub state: S,
}

/// What a context says of `span`, from its start, as far as one reply goes.
pub(super) fn describe(
    export: &Export,
    context: Context,
    span: Span,
    extents: Extents,
) -> Result<Vec<Run<u32>>, DiskError> {
    let disk = export.disk();
    let most = if extents == Extents::First { 1 } else { MOST };
    match context {
        Context::Allocation => walk(disk, span, most, |window| {
            let flags = |state| match state {
                Allocation::Zero => state::HOLE | state::ZERO,
                Allocation::Data | Allocation::Base => 0,
            };
            let extents = disk.allocation(window)?;
            Ok(extents.into_iter().map(|Extent { pages, state }| (pages, flags(state))).collect())
        }),
        Context::Dirty => walk(disk, span, most, |window| {
            let mut pieces = Vec::new();
            let mut clean_from = window.start();
            for dirty in export.dirty_in(window)?.runs() {
                pieces.push((PageRange::from_bounds(clean_from, dirty.start()), 0));
                pieces.push((dirty, state::DIRTY));
                clean_from = dirty.end();
            }
            pieces.push((PageRange::from_bounds(clean_from, window.end()), 0));
            Ok(pieces)
        }),
    }
}

/// Whether bytes are worth sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    Anything,
    Zeroes,
}

/// Where a read of `span` would find nothing but zeroes. Covers it whole, in at most `most` runs, the last of which may be anything.
pub(super) fn content(disk: &Disk, span: Span, most: usize) -> Result<Vec<Run<Content>>, DiskError> {
    let mut runs = walk(disk, span, most, |window| {
        let content = |state| if state == Allocation::Zero { Content::Zeroes } else { Content::Anything };
        let extents = disk.allocation(window)?;
        Ok(extents.into_iter().map(|Extent { pages, state }| (pages, content(state))).collect())
    })?;
    let told: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
    let rest = (span.byte_len() - told) as u32;
    match runs.last_mut() {
        _ if rest == 0 => {}
        Some(last) if last.state == Content::Anything => last.len += rest,
        _ => runs.push(Run { len: rest, state: Content::Anything }),
    }
    Ok(runs)
}

fn walk<S: Copy + PartialEq>(
    disk: &Disk,
    span: Span,
    most: usize,
    mut look: impl FnMut(PageRange) -> Result<Vec<(PageRange, S)>, DiskError>,
) -> Result<Vec<Run<S>>, DiskError> {
    let page = disk.page_size().bytes().get();
    let (start, end) = (span.start_byte(), span.start_byte() + span.byte_len());
    let last = end.div_ceil(page);
    let mut runs: Vec<Run<S>> = Vec::new();
    let mut at = start / page;
    while at < last {
        let window = PageRange::from_bounds(PageIndex::new(at), PageIndex::new((at + WINDOW).min(last)));
        for (pages, state) in look(window)? {
            let from = (pages.start().get() * page).max(start);
            let to = (pages.end().get() * page).min(end);
            let len = to.saturating_sub(from) as u32;
            let full = runs.len() == most;
            match runs.last_mut() {
                _ if len == 0 => {}
                Some(run) if run.state == state => run.len += len,
                _ if full => return Ok(runs),
                _ => runs.push(Run { len, state }),
            }
        }
        at = window.end().get();
    }
    debug_assert!(
        start.is_multiple_of(SECTOR_SIZE) && runs.iter().map(|run| u64::from(run.len)).sum::<u64>() == end - start
    );
    Ok(runs)
}
