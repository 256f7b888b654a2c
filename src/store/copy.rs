//! Copying pages of a source into a layer in the making, watched. Must not know what the layer is for.

use super::job::Job;
use super::record::BLOCK;
use super::sealed::Writer;
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, PageIndex, PageRange, PageSet};

/// Bytes that are read at once.
const CHUNK: usize = 64 * BLOCK;

/// What a copy does with pages of zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Zeroes {
    /// Something below must be hidden.
    Kept,
    /// There is nothing below.
    LeftOut,
}

/// Copies pages of a source into a layer, and zeroes past its end.
pub(super) fn copy_pages(
    source: &dyn Source,
    pages: &PageSet,
    zeroes: Zeroes,
    writer: &mut Writer,
    job: &Job<'_>,
) -> Result<(), SpaceError> {
    let (mut done, total) = (0, pages.count().get());
    job.step(writer.id(), done, total)?;
    let mut buf = vec![0; CHUNK];
    for run in pages.runs() {
        let (mut page, end) = (run.start().get(), run.end().get());
        while page < end {
            let here = (end - page).min((CHUNK / BLOCK) as u64);
            let bytes = &mut buf[..here as usize * BLOCK];
            read_padded(source, page * BLOCK as u64, bytes)?;
            for (at, bytes) in (page..).zip(bytes.as_chunks::<BLOCK>().0) {
                if *bytes != [0; BLOCK] {
                    writer.page(PageIndex::new(at), bytes)?;
                } else if zeroes == Zeroes::Kept {
                    writer.zero(PageRange::one(PageIndex::new(at)));
                }
            }
            (page, done) = (page + here, done + here);
            job.step(writer.id(), done, total)?;
        }
    }
    Ok(())
}

/// Reads, with zeroes past the end of the source.
pub(super) fn read_padded(source: &dyn Source, at: u64, buf: &mut [u8]) -> Result<(), SpaceError> {
    let here = source.len().get().saturating_sub(at).min(buf.len() as u64) as usize;
    buf[here..].fill(0);
    if here == 0 { Ok(()) } else { source.read(ByteOffset::new(at), &mut buf[..here]) }
}
