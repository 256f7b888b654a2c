//! Verifying a whole layer on demand: every block of every table and every page, on the threads that the caller gives.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rayon::prelude::*;

use super::super::job::Job;
use super::super::record::BLOCK;
use super::SealedFile;
use super::pages::PageBuffer;
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

/// Pages that are read at once: a buffer that stays in a core's cache between the read and the checksum.
const CHUNK: u64 = 64;

impl SealedFile {
    /// Checks everything, 256 KiB at a time and in parallel.
    ///
    /// # Errors
    /// A table that is damaged, or a page that cannot be read; [`StoreError::Cancelled`]. Damaged pages are no error: they are named.
    pub(in super::super) fn verify(&self, threads: &rayon::ThreadPool, job: &Job<'_>) -> Result<Verified, StoreError> {
        let total = self.parts.data_pages;
        let (done, damaged) = (AtomicU64::new(0), Mutex::new(Vec::new()));
        let buffer = || PageBuffer::new(PageCount::new(CHUNK));
        let check_all = || {
            (0..total.div_ceil(CHUNK)).into_par_iter().try_for_each_init(buffer, |buf, chunk| {
                let first = chunk * CHUNK;
                let pages = CHUNK.min(total - first);
                self.check_chunk(first, &mut buf.bytes_mut()[..pages as usize * BLOCK], &damaged)?;
                let done = done.fetch_add(pages, Ordering::Relaxed) + pages;
                job.step(self.id, done, total)
            })
        };
        // The fingerprint is one chain of multiplications: it goes beside the pages.
        let (fingerprint, checked) = threads.join(|| self.fingerprint(), check_all);
        if fingerprint?.bytes() != self.content() {
            return Err(self.file().damaged("its tables are not those that its content id was made from", 0));
        }
        checked?;
        let mut in_file = damaged.into_inner();
        in_file.sort_unstable();
        Ok(Verified { pages: PageCount::new(total), damaged: self.pages_of_disk(&in_file)? })
    }

    fn check_chunk(&self, first: u64, buf: &mut [u8], damaged: &Mutex<Vec<u64>>) -> Result<(), StoreError> {
        self.read_unchecked(first, buf)?;
        let mut next = first;
        while let Some(page) = self.first_damaged(next, &buf[(next - first) as usize * BLOCK..])? {
            damaged.lock().push(page);
            next = page + 1;
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
