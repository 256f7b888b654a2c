//! Copying pages of a source into a layer in the making, watched. Must not know what the layer is for.

use std::sync::atomic::{AtomicU64, Ordering};

use super::job::Job;
use super::record::BLOCK;
use super::sealed::{self, Run, Writer};
use crate::error::{SpaceError, StoreError};
use crate::image::Source;
use crate::page::{ByteOffset, PageIndex, PageRange, PageSet};

pub(super) use super::sealed::Zeroes;

/// Pages between two reports.
const PIECE: u64 = 64;

/// Copies pages of a source into a layer, and zeroes past its end.
pub(super) fn copy_pages(
    source: &dyn Source,
    pages: &PageSet,
    zeroes: Zeroes,
    writer: &mut Writer,
    job: &Job<'_>,
) -> Result<(), SpaceError> {
    let read = |range: PageRange, buf: &mut [u8]| read_padded(source, range.start().get() * BLOCK as u64, buf);
    copy_runs(writer, pages.runs().map(Run::Read), pages.count().get(), zeroes, job, read)
}

/// Copies `runs`, `total` pages of which are read.
pub(super) fn copy_runs<E: From<StoreError> + Send>(
    writer: &mut Writer,
    runs: impl Iterator<Item = Run> + Send,
    total: u64,
    zeroes: Zeroes,
    job: &Job<'_>,
    read: impl Fn(PageRange, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (id, done) = (writer.id(), AtomicU64::new(0));
    job.step(id, 0, total)?;
    sealed::copy(writer, runs, zeroes, |range, buf| {
        for (first, buf) in (range.start().get()..).step_by(PIECE as usize).zip(buf.chunks_mut(PIECE as usize * BLOCK))
        {
            let pages = (buf.len() / BLOCK) as u64;
            read(PageRange::from_bounds(PageIndex::new(first), PageIndex::new(first + pages)), buf)?;
            job.step(id, done.fetch_add(pages, Ordering::Relaxed) + pages, total)?;
        }
        Ok(())
    })
}

/// Reads, with zeroes past the end of the source.
pub(super) fn read_padded(source: &dyn Source, at: u64, buf: &mut [u8]) -> Result<(), SpaceError> {
    let here = source.len().get().saturating_sub(at).min(buf.len() as u64) as usize;
    buf[here..].fill(0);
    if here == 0 { Ok(()) } else { source.read(ByteOffset::new(at), &mut buf[..here]) }
}
