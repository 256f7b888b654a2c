//! Copying out of an image, or of any source, piece by piece: what is known to be zero is skipped, and zeroes that are found are left
//! out. One buffer of 2 MiB, whatever the size of the image.

use std::ops::ControlFlow;
use std::path::Path;

use super::{FormatError, ImportedImage, Progress, Rule, Watch};
use crate::backing::{Backing, Tree};
use crate::disk::Disk;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, Lba, PageSize, SECTOR_SIZE, is_zero};

/// The largest cluster of any format, so that no compressed one is unpacked twice.
pub(super) const PIECE: u64 = 2 << 20;

/// Who is told how far a copy is, and how much data it may find.
pub(super) struct Terms<'t, 'w> {
    watch: &'t mut Watch<'w>,
    most: Option<(&'t Path, ByteSize)>,
    found: u64,
}

impl<'t, 'w> Terms<'t, 'w> {
    pub(super) fn new(watch: &'t mut Watch<'w>) -> Self {
        Self { watch, most: None, found: 0 }
    }

    /// Terms for a copy of `image`, whose policy has a limit.
    pub(super) fn of(image: &'t ImportedImage, watch: &'t mut Watch<'w>) -> Self {
        Self { most: image.limit(), ..Self::new(watch) }
    }

    fn count(&mut self, data: u64) -> Result<(), FormatError> {
        self.found = self.found.saturating_add(data);
        match self.most {
            Some((path, limit)) if self.found > limit.get() => Err(FormatError::refused(path, Rule::Data { limit })),
            _ => Ok(()),
        }
    }

    pub(super) fn tell(&mut self, done: u64, total: ByteSize) -> Result<(), FormatError> {
        match (self.watch)(Progress { done: ByteSize::new(done), total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(FormatError::Cancelled),
        }
    }
}

/// Calls `put` with each run of granules of `source` that are not all zeroes, in ascending order: where it begins and its bytes, 2 MiB at most.
/// `granule` divides 2 MiB; the last one may be filled up with zeroes. Reads what [`Source::next_data`] names, and nothing else.
pub(super) fn copy_data(
    source: &dyn Source,
    granule: u64,
    terms: &mut Terms<'_, '_>,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let total = source.len();
    let mut buf = vec![0; PIECE as usize];
    let mut at = 0;
    // Where the data that was told of ends.
    let mut data_end = 0;
    while at < total.get() {
        if at >= data_end {
            let found = source.next_data(ByteOffset::new(at))?;
            let skip = found.as_ref().map_or(total.get(), |found| (found.start.get() / granule * granule).max(at));
            data_end = found.map_or(at, |found| found.end.get());
            if skip > at {
                at = skip;
                terms.tell(at, total)?;
                continue;
            }
        }
        let end = (at / PIECE * PIECE + PIECE).min(data_end.next_multiple_of(granule)).min(total.get());
        let len = (end - at) as usize;
        let filled = len.next_multiple_of(granule as usize);
        source.read(ByteOffset::new(at), &mut buf[..len])?;
        buf[len..filled].fill(0);
        for (from, run) in data_runs(&buf[..filled], granule) {
            terms.count(run.len() as u64)?;
            put(at + from, run)?;
        }
        at = end;
        terms.tell(at, total)?;
    }
    Ok(())
}

/// The runs of granules in `bytes` that are not zero: offset and bytes of each.
fn data_runs(bytes: &[u8], granule: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let size = granule as usize;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && is_zero(&bytes[at..(at + size).min(bytes.len())]) {
            at += size;
        }
        let start = at;
        while at < bytes.len() && !is_zero(&bytes[at..(at + size).min(bytes.len())]) {
            at += size;
        }
        (start < bytes.len()).then(|| (start as u64, &bytes[start..at.min(bytes.len())]))
    })
}

impl ImportedImage {
    /// A new space with this image's content and nothing below it: pages of zeroes stay absent. The space is rounded up to a page.
    ///
    /// # Errors
    /// What reading says, what the backing says, [`FormatError::Cancelled`], [`Rule::Data`]. The space is then gone.
    pub fn into_space<B: Backing>(
        &self,
        tree: &Tree,
        page_size: PageSize,
        watch: &mut Watch<'_>,
    ) -> Result<B, FormatError> {
        let page = page_size.bytes().get();
        let geometry = Geometry::new(ByteSize::new(self.len().get().next_multiple_of(page)), page_size);
        let space = B::create(tree, geometry.map_err(crate::error::SpaceError::from)?, None)?;
        copy_data(self, page, &mut Terms::of(self, watch), |at, run| Ok(space.write(ByteOffset::new(at), run)?))?;
        Ok(space)
    }

    /// Writes this image's content to the front of `disk`, which must be a new, blank one and at least as long: zeroes are not
    /// written. Flushed before it returns.
    ///
    /// # Errors
    /// As [`ImportedImage::into_space`]. The disk then holds a part of the image: drop or delete it.
    pub fn fill(&self, disk: &Disk, watch: &mut Watch<'_>) -> Result<(), FormatError> {
        const GRANULE: u64 = 4096;
        // Asked first, so that a disk that is too short is not half filled.
        let sectors = self.len().get().div_ceil(SECTOR_SIZE);
        if sectors > disk.capacity().get() {
            let count = crate::page::SectorCount::new(sectors);
            return Err(crate::disk::DiskError::OutOfRange { lba: Lba::ZERO, count, capacity: disk.capacity() }.into());
        }
        let end = sectors * SECTOR_SIZE;
        copy_data(self, GRANULE, &mut Terms::of(self, watch), |at, run| {
            let run = &run[..run.len().min((end - at) as usize)];
            Ok(disk.write(Lba::new(at / SECTOR_SIZE), run)?)
        })?;
        Ok(disk.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_data_are_found() {
        let mut bytes = vec![0; 40];
        (bytes[8], bytes[15], bytes[39]) = (1, 1, 1);
        let runs: Vec<_> = data_runs(&bytes, 8).map(|(at, run)| (at, run.len())).collect();
        assert_eq!(runs, [(8, 8), (32, 8)]);
        assert_eq!(data_runs(&bytes[16..32], 8).count(), 0);
    }
}
