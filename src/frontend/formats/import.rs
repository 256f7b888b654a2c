//! Copying out of an image, or of any source, piece by piece: what is known to be zero is skipped, and zeroes that are found are left
//! out. One buffer of 2 MiB, whatever the size of the image.

use std::ops::ControlFlow;

use super::{FormatError, ImportedImage, Progress, Watch};
use crate::backing::{Backing, Tree};
use crate::disk::Disk;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, Lba, PageSize, SECTOR_SIZE, is_zero};

/// The largest cluster of any format, so that no compressed one is unpacked twice.
pub(super) const PIECE: u64 = 2 << 20;

/// Something to copy from.
pub(super) trait Input {
    fn source(&self) -> &dyn Source;

    /// How many bytes from `at` on are zero, as far as that is known without reading.
    fn known_zeroes(&self, at: ByteOffset) -> Result<ByteSize, FormatError>;
}

impl Input for ImportedImage {
    fn source(&self) -> &dyn Source {
        self
    }

    fn known_zeroes(&self, at: ByteOffset) -> Result<ByteSize, FormatError> {
        self.zeroes_from(at)
    }
}

/// Calls `piece` for each piece of `input` that is not known to be zero, in order: where it is and its bytes. Pieces start at multiples
/// of 2 MiB or of `granule`, which divides that; the last one may be filled up with zeroes to a whole granule.
pub(super) fn pieces(
    input: &impl Input,
    granule: u64,
    watch: &mut Watch<'_>,
    mut piece: impl FnMut(u64, &[u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let source = input.source();
    let total = source.len();
    let mut buf = vec![0; PIECE as usize];
    let mut at = 0;
    while at < total.get() {
        let zeroes = input.known_zeroes(ByteOffset::new(at))?.get();
        let known = (at + zeroes).min(total.get());
        let skip = if known == total.get() { known } else { known / granule * granule };
        if skip > at {
            at = skip;
        } else {
            let end = (at / PIECE * PIECE + PIECE).min(total.get());
            let len = (end - at) as usize;
            let filled = len.next_multiple_of(granule as usize);
            source.read(ByteOffset::new(at), &mut buf[..len])?;
            buf[len..filled].fill(0);
            piece(at, &buf[..filled])?;
            at = end;
        }
        if let ControlFlow::Break(()) = watch(Progress { done: ByteSize::new(at), total }) {
            return Err(FormatError::Cancelled);
        }
    }
    Ok(())
}

/// The runs of granules in `bytes` that are not zero: offset and bytes of each.
pub(super) fn data_runs(bytes: &[u8], granule: u64) -> impl Iterator<Item = (u64, &[u8])> {
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
    /// What reading says, what the backing says, [`FormatError::Cancelled`]. The space is then gone.
    pub fn into_space<B: Backing>(
        &self,
        tree: &Tree,
        page_size: PageSize,
        watch: &mut Watch<'_>,
    ) -> Result<B, FormatError> {
        let page = page_size.bytes().get();
        let geometry = Geometry::new(ByteSize::new(self.len().get().next_multiple_of(page)), page_size);
        let space = B::create(tree, geometry.map_err(crate::error::SpaceError::from)?, None)?;
        pieces(self, page, watch, |at, bytes| {
            data_runs(bytes, page).try_for_each(|(from, run)| Ok(space.write(ByteOffset::new(at + from), run)?))
        })?;
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
        pieces(self, GRANULE, watch, |at, bytes| {
            data_runs(bytes, GRANULE).try_for_each(|(from, run)| {
                let start = at + from;
                let run = &run[..run.len().min((end - start) as usize)];
                Ok(disk.write(Lba::new(start / SECTOR_SIZE), run)?)
            })
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
