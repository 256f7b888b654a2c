//! Copying many pages of a source into a sealed layer: pages are read, compared with zero and summed on the caller's threads while those before them are
//! written.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::create::{Zeroes, read_padded};
use super::error::CloneError;
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{PageCount, PageIndex, PageRange, PageSet, is_zero};
use crate::store::record::BLOCK;
use crate::store::sealed::{Progress, Writer};

/// Pages that are held at once, twice.
const BATCH: u64 = 1024;
/// Pages that one thread reads at a time.
const PIECE: u64 = 64;

/// The threads that a long call works on, and whom it tells how far it has come.
///
/// ```
/// use offshoot::store::Job;
/// use std::ops::ControlFlow;
/// let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
/// let quiet = Job::new(&threads);
/// let told = quiet.telling(&|progress| {
///     println!("{} of {} pages", progress.done, progress.total);
///     ControlFlow::Continue(()) // Break(()) gives the work up
/// });
/// # let _ = told;
/// # Ok::<(), rayon::ThreadPoolBuildError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub(crate) threads: &'a rayon::ThreadPool,
    progress: Option<&'a (dyn Fn(Progress) -> ControlFlow<()> + Sync)>,
}

impl std::fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("threads", &self.threads.current_num_threads()).finish_non_exhaustive()
    }
}

impl<'a> Job<'a> {
    /// Works on these threads.
    pub fn new(threads: &'a rayon::ThreadPool) -> Self {
        Self { threads, progress: None }
    }

    /// Tells how far it has come, on any of the threads, some hundred pages at a time. An answer of `Break` gives the work up: the call fails with
    /// [`CloneError::Cancelled`], and what it had made is removed. Must not use the store.
    #[must_use]
    pub fn telling(self, progress: &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync)) -> Self {
        Self { progress: Some(progress), ..self }
    }

    pub(crate) fn tell(&self, done: PageCount, total: PageCount) -> Result<(), CloneError> {
        match self.progress.map(|tell| tell(Progress { done, total })) {
            Some(ControlFlow::Break(())) => Err(CloneError::Cancelled),
            _ => Ok(()),
        }
    }
}

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

/// Copies pages of 4 KiB. `before` of `total` were done by the caller already. Holds 8 MiB.
pub(super) fn gather(
    source: &dyn Source,
    pages: &PageSet,
    zeroes: Zeroes,
    writer: &mut Writer,
    (job, before, total): (&Job<'_>, PageCount, PageCount),
) -> Result<(), CloneError> {
    let mut pieces = pieces_of(pages);
    let (mut ready, mut ahead) = (Batch::default(), Batch::default());
    let mut done = before;
    ready.next(&mut pieces);
    job.threads.install(|| ready.read(source))?;
    while ready.pages > 0 {
        ahead.next(&mut pieces);
        let (written, read) = job.threads.join(|| ready.write(zeroes, writer), || ahead.read(source));
        written?;
        read?;
        done = done.saturating_add(PageCount::new(ready.pages));
        job.tell(done, total)?;
        std::mem::swap(&mut ready, &mut ahead);
    }
    Ok(())
}
