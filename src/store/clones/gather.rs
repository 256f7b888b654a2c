//! Copying many pages of a source into a sealed layer: pages are read, compared with zero and summed on the caller's threads while those before them are
//! written.

use rayon::prelude::*;

use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{PageIndex, PageRange, PageSet, is_zero};
use crate::store::copy::{Zeroes, read_padded};
use crate::store::id::LayerId;
use crate::store::job::Job;
use crate::store::record::BLOCK;
use crate::store::sealed::Writer;

/// Pages that are held at once, twice.
const BATCH: u64 = 1024;
/// Pages that one thread reads at a time.
const PIECE: u64 = 64;

/// Pages that are read and not yet written.
#[derive(Default)]
struct Batch {
    pieces: Vec<PageRange>,
    pages: u64,
    bytes: Vec<u8>,
    /// The checksum of each page; `None` for zeroes.
    checks: Vec<Option<u32>>,
}

impl Batch {
    fn next(&mut self, pieces: &mut impl Iterator<Item = PageRange>) {
        self.pieces.clear();
        self.pages = 0;
        while self.pages + PIECE <= BATCH
            && let Some(piece) = pieces.next()
        {
            self.pages += piece.count().get();
            self.pieces.push(piece);
        }
        self.bytes.resize(self.pages as usize * BLOCK, 0);
        self.checks.resize(self.pages as usize, None);
    }

    fn read(&mut self, source: &dyn Source) -> Result<(), SpaceError> {
        let (mut bytes, mut checks) = (&mut self.bytes[..], &mut self.checks[..]);
        let mut parts = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let pages = piece.count().get() as usize;
            let (here, rest) = std::mem::take(&mut bytes).split_at_mut(pages * BLOCK);
            let (sums, others) = std::mem::take(&mut checks).split_at_mut(pages);
            parts.push((*piece, here, sums));
            (bytes, checks) = (rest, others);
        }
        parts.into_par_iter().try_for_each(|(piece, bytes, checks)| {
            read_padded(source, piece.start().get() * BLOCK as u64, bytes)?;
            for (page, check) in bytes.chunks_exact(BLOCK).zip(checks) {
                *check = (!is_zero(page)).then(|| crc32fast::hash(page));
            }
            Ok(())
        })
    }

    fn write(&self, zeroes: Zeroes, writer: &mut Writer) -> Result<(), SpaceError> {
        let mut at = 0;
        for piece in &self.pieces {
            let count = piece.count().get() as usize;
            let checks = &self.checks[at..at + count];
            let mut done = 0;
            for run in checks.chunk_by(|one, next| one.is_some() == next.is_some()) {
                let first = PageIndex::new(piece.start().get() + done as u64);
                if run[0].is_some() {
                    let from = (at + done) * BLOCK;
                    let sums = run.iter().flatten().copied();
                    writer.run(first, &self.bytes[from..from + run.len() * BLOCK], sums)?;
                } else if zeroes == Zeroes::Kept {
                    writer.zero(PageRange::from_bounds(first, PageIndex::new(first.get() + run.len() as u64)));
                }
                done += run.len();
            }
            at += count;
        }
        Ok(())
    }
}

fn pieces_of(pages: &PageSet) -> impl Iterator<Item = PageRange> + '_ {
    pages.runs().flat_map(|run| {
        let (start, end) = (run.start().get(), run.end().get());
        (start..end)
            .step_by(PIECE as usize)
            .map(move |from| PageRange::from_bounds(PageIndex::new(from), PageIndex::new((from + PIECE).min(end))))
    })
}

/// Copies pages of 4 KiB into the layer of this id. Holds 8 MiB.
pub(super) fn gather(
    source: &dyn Source,
    pages: &PageSet,
    zeroes: Zeroes,
    (id, writer): (LayerId, &mut Writer),
    threads: &rayon::ThreadPool,
    job: &Job<'_>,
) -> Result<(), SpaceError> {
    let mut pieces = pieces_of(pages);
    let (mut ready, mut ahead) = (Batch::default(), Batch::default());
    let (mut done, total) = (0, pages.count().get());
    job.step(id, done, total)?;
    ready.next(&mut pieces);
    threads.install(|| ready.read(source))?;
    while ready.pages > 0 {
        ahead.next(&mut pieces);
        let (written, read) = threads.join(|| ready.write(zeroes, writer), || ahead.read(source));
        written?;
        read?;
        done += ready.pages;
        job.step(id, done, total)?;
        std::mem::swap(&mut ready, &mut ahead);
    }
    Ok(())
}
