//! Copying pages into a new layer: read and checked a batch at a time, while the batch before it is written.
//!
//! Reading and writing overlap where the caller runs in a rayon pool with a thread to spare, and take turns elsewhere: there is no pool of our own.
//! Must not know what the pages are read from.

use super::super::record::BLOCK;
use super::pages::PageBuffer;
use super::{Kind, Writer};
use crate::error::StoreError;
use crate::page::{PageCount, PageIndex, PageRange, is_zero};

/// Pages of a batch: 1 MiB.
const BATCH: u64 = 256;

/// Pages that are to become part of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Run {
    /// To be read.
    Read(PageRange),
    /// Zeroes.
    Zero(PageRange),
}

impl Run {
    pub(in super::super) fn range(&self) -> PageRange {
        match *self {
            Self::Read(range) | Self::Zero(range) => range,
        }
    }
}

/// What a copy does with pages that turn out to be zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Zeroes {
    /// They are data like others.
    Data,
    /// They are named as zero: something below must be hidden.
    Kept,
    /// There is nothing below.
    LeftOut,
}

/// Copies `runs`, which ascend, with what `read` fills in for their pages.
pub(in super::super) fn copy<E: From<StoreError> + Send>(
    writer: &mut Writer,
    runs: impl Iterator<Item = Run> + Send,
    zeroes: Zeroes,
    read: impl Fn(PageRange, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let mut source = Batches { runs, rest: None };
    let (mut batch, mut next) = (Batch::new(), Batch::new());
    source.fill(&mut batch, zeroes, &read)?;
    while !batch.extents.is_empty() {
        let (written, filled) = both(|| writer.append(&batch), || source.fill(&mut next, zeroes, &read));
        written?;
        filled?;
        std::mem::swap(&mut batch, &mut next);
    }
    Ok(())
}

/// Does two things at once, in the pool that the caller is in.
fn both<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    // Asked first: outside of every pool, the second question would start one.
    let threads = rayon::current_thread_index().map_or(1, |_| rayon::current_num_threads());
    if threads > 1 { rayon::join(a, b) } else { (a(), b()) }
}

/// Pages on their way into a layer.
pub(super) struct Batch {
    buffer: PageBuffer,
    data_pages: u64,
    /// Of the data, in order.
    pub(super) checks: Vec<u32>,
    /// In the order of the disk.
    pub(super) extents: Vec<(PageRange, Kind)>,
}

impl Batch {
    fn new() -> Self {
        let buffer = PageBuffer::new(PageCount::new(BATCH));
        Self { buffer, data_pages: 0, checks: Vec::new(), extents: Vec::new() }
    }

    /// The bytes of its data pages, one after the other.
    pub(super) fn data(&self) -> &[u8] {
        &self.buffer.bytes()[..self.data_pages as usize * BLOCK]
    }

    fn clear(&mut self) {
        self.data_pages = 0;
        self.checks.clear();
        self.extents.clear();
    }

    /// Sorts out pages that were read behind those that it has.
    fn take(&mut self, range: PageRange, zeroes: Zeroes) {
        let first = self.data_pages as usize * BLOCK;
        let bytes = self.buffer.bytes_mut();
        let mut to = first;
        for (at, page) in range.iter().enumerate() {
            let from = first + at * BLOCK;
            if zeroes != Zeroes::Data && is_zero(&bytes[from..from + BLOCK]) {
                if zeroes == Zeroes::Kept {
                    self.extents.push((PageRange::one(page), Kind::Zero));
                }
                continue;
            }
            if from != to {
                bytes.copy_within(from..from + BLOCK, to);
            }
            self.checks.push(crc32fast::hash(&bytes[to..to + BLOCK]));
            self.extents.push((PageRange::one(page), Kind::Data));
            to += BLOCK;
        }
        self.data_pages = (to / BLOCK) as u64;
    }
}

/// Runs, cut into batches.
struct Batches<I> {
    runs: I,
    /// What is left of a run that the last batch had no room for.
    rest: Option<PageRange>,
}

impl<I: Iterator<Item = Run>> Batches<I> {
    /// Fills a batch; one without extents is the end.
    fn fill<E>(
        &mut self,
        batch: &mut Batch,
        zeroes: Zeroes,
        read: impl Fn(PageRange, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        batch.clear();
        while batch.data_pages < BATCH && (batch.extents.len() as u64) < BATCH {
            let range = match self.rest.take().map(Run::Read).or_else(|| self.runs.next()) {
                None => break,
                Some(Run::Zero(range)) => {
                    batch.extents.push((range, Kind::Zero));
                    continue;
                }
                Some(Run::Read(range)) => range,
            };
            let here = range.count().get().min(BATCH - batch.data_pages);
            let middle = PageIndex::new(range.start().get() + here);
            let now = PageRange::from_bounds(range.start(), middle);
            let at = batch.data_pages as usize * BLOCK;
            read(now, &mut batch.buffer.bytes_mut()[at..at + here as usize * BLOCK])?;
            batch.take(now, zeroes);
            self.rest = Some(PageRange::from_bounds(middle, range.end())).filter(|rest| !rest.is_empty());
        }
        Ok(())
    }
}
