//! What a range of a space is made of, for whoever copies a space and need not copy what is not there.
//!
//! Knows page ranges and indexes, and not what holds a page.

use std::ops::Range;

use crate::error::SpaceError;
use crate::image::Source;
use crate::overlay::{Index, PageRef, PageState};
use crate::page::{ByteOffset, PageCount, PageIndex, PageRange, PageSize};

/// Where the bytes of some pages come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    /// Pages of the space's own or of a sealed layer, or a backing that cannot tell: they hold anything.
    Data,
    /// Pages that nobody wrote since the first ancestor: they read as the base image.
    Base,
    /// Pages that read as zeroes and take no room.
    Zero,
}

/// Neighbouring pages of one [`Allocation`].
///
/// ```
/// use offshoot::{Tree, backing::{Allocation, Extent}, disk::{Access, Disk}, page::*};
/// let disk = Disk::blank(&Tree::default(), SectorCount::new(64), Access::ReadWrite)?;
/// disk.write(Lba::new(8), &[7; 4096])?;
/// let three = PageRange::from_bounds(PageIndex::new(0), PageIndex::new(3));
/// let states: Vec<_> = disk.allocation(three)?.iter().map(|extent| extent.state).collect();
/// assert_eq!(states, [Allocation::Zero, Allocation::Data, Allocation::Zero]);
/// # Ok::<(), offshoot::disk::DiskError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The pages.
    pub pages: PageRange,
    /// Where their bytes come from.
    pub state: Allocation,
}

/// What an index says of `range`, over a base image that ends before the page `base_end`: past it, what nobody wrote is zeroes.
pub(crate) fn extents_of<P: PageRef>(index: &Index<P>, range: PageRange, base_end: PageIndex) -> Vec<Extent> {
    let mut extents = Vec::new();
    for (pages, page) in index.runs(range) {
        let (state, split) = match page {
            PageState::Data(_) => (Allocation::Data, pages.end()),
            PageState::Absent => (Allocation::Base, base_end.clamp(pages.start(), pages.end())),
            PageState::Zero => (Allocation::Zero, pages.end()),
        };
        push(&mut extents, Extent { pages: PageRange::from_bounds(pages.start(), split), state });
        let rest = PageRange::from_bounds(split, pages.end());
        push(&mut extents, Extent { pages: rest, state: Allocation::Zero });
    }
    extents
}

/// Pages that one answer of [`next_data_in`] reaches at most. Whoever copies asks again.
const MOST: PageCount = PageCount::new(1 << 15);

/// [`Source::next_data`] of an image that is an index over a base.
pub(crate) fn next_data_in<P: PageRef>(
    index: &Index<P>,
    size: PageSize,
    mut base: Option<&dyn Source>,
    at: ByteOffset,
) -> Result<Option<Range<ByteOffset>>, SpaceError> {
    let all = PageIndex::new(index.pages().get());
    let mut from = at;
    loop {
        let kind = |state: PageState<&P>| match state {
            PageState::Data(_) => Some(Allocation::Data),
            PageState::Absent => base.map(|_| Allocation::Base),
            PageState::Zero => None,
        };
        let rest = PageRange::from_bounds(size.page_of(from), all);
        let Some((run, state)) = index.first_run(rest, MOST, kind) else { return Ok(None) };
        let (start, end) = (from.max(size.start_of(run.start())), size.start_of(run.end()));
        let Some(below) = base.filter(|_| state == Allocation::Base) else { return Ok(Some(start..end)) };
        match below.next_data(start)? {
            Some(data) if data.start < end => return Ok(Some(data.start..data.end.min(end))),
            Some(_) => {}
            // Nor has it any further on.
            None => base = None,
        }
        from = end;
    }
}

/// Appends an extent, joined to the one before where it goes on alike. Empty ones are dropped.
fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        _ if next.pages.is_empty() => {}
        Some(last) if last.state == next.state && last.pages.end() == next.pages.start() => {
            last.pages = PageRange::from_bounds(last.pages.start(), next.pages.end());
        }
        _ => extents.push(next),
    }
}
