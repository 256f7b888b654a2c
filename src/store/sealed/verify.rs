//! Verifying a whole layer on demand: every block of every table and every page, on the threads that the caller gives.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rayon::prelude::*;

use super::super::job::Job;
use super::super::record::BLOCK;
use super::SealedFile;
use super::read::{CHUNK, PageError};
use crate::error::StoreError;
use crate::page::{PageCount, PageIndex, PageSet};

/// What a verification found. All other pages are what was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified {
    /// Pages of data in the layer.
    pub pages: PageCount,
    /// Pages of the disk whose data do not match their checksums.
    pub damaged: PageSet,
}

impl SealedFile {
    /// Checks everything, 256 KiB at a time and in parallel.
    ///
    /// # Errors
    /// A table that is damaged, or a page that cannot be read; [`StoreError::Cancelled`]. Damaged pages are no error: they are named.
    pub(in super::super) fn verify(
        &self,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Verified, StoreError> {
        if self.fingerprint()?.bytes() != self.content() {
            return Err(self.file().damaged("its tables are not those that its content id was made from", 0));
        }
        let total = self.parts.data_pages;
        let (done, damaged) = (AtomicU64::new(0), Mutex::new(Vec::new()));
        let starts: Vec<u64> = (0..total.div_ceil(CHUNK)).collect();
        threads.install(|| {
            // A buffer for each thread, small enough to stay in its cache between the read and the checksum.
            starts.par_iter().try_for_each_init(Vec::new, |buf, chunk| {
                let first = chunk * CHUNK;
                let pages = CHUNK.min(total - first);
                self.check_chunk(first, pages, buf, &damaged)?;
                let done = done.fetch_add(pages, Ordering::Relaxed) + pages;
                job.step(self.id, done, total)
            })
        })?;
        let mut in_file = damaged.into_inner();
        in_file.sort_unstable();
        Ok(Verified { pages: PageCount::new(total), damaged: self.pages_of_disk(&in_file)? })
    }

    fn check_chunk(
        &self,
        first: u64,
        pages: u64,
        buf: &mut Vec<u8>,
        damaged: &Mutex<Vec<u64>>,
    ) -> Result<(), StoreError> {
        buf.resize(pages as usize * BLOCK, 0);
        match self.read_pages(first, buf) {
            Ok(()) => return Ok(()),
            Err(PageError::Store(error)) => return Err(error),
            Err(PageError::Damaged(_)) => {}
        }
        // There may be more than the one that it stopped at.
        for page in first..first + pages {
            match self.read_pages(page, &mut buf[..BLOCK]) {
                Err(PageError::Damaged(page)) => damaged.lock().push(page),
                Err(PageError::Store(error)) => return Err(error),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Pages of the file, ascending, as pages of the disk.
    fn pages_of_disk(&self, in_file: &[u64]) -> Result<PageSet, StoreError> {
        let mut pages = Vec::new();
        let mut left = in_file;
        self.extents(|range, data| {
            let Some(start) = data else { return Ok(()) };
            let here = left.partition_point(|page| page - start < range.count().get());
            pages.extend(left[..here].iter().map(|page| PageIndex::new(range.start().get() + (page - start))));
            left = &left[here..];
            Ok(())
        })?;
        Ok(pages.into_iter().collect())
    }
}
