//! The naive model: one `Vec<u8>` for each space, copied whole at a fork. And a base image of bytes that can be told to fail.
//!
//! Each page also carries the number of the write that last touched it, so that the model can say which pages a diff must
//! name (the bytes differ) and which it may name (somebody wrote there). Must not share a line of code with the engine but
//! the types of units.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{ImageError, SpaceError};
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageIndex, PageRange, PageSet};

/// A space as plain bytes. A clone of it is a full copy, and a relative: their writes are numbered from one counter.
#[derive(Clone, Debug)]
pub struct Flat {
    geometry: Geometry,
    bytes: Vec<u8>,
    /// For each page, the number of the write that last touched it; 0 for none.
    touched: Vec<u64>,
    writes: Arc<AtomicU64>,
}

impl Flat {
    /// `base`, then zeroes to the end of the space.
    ///
    /// # Panics
    /// If `base` is longer than the space.
    pub fn new(geometry: Geometry, base: &[u8]) -> Self {
        let mut bytes = vec![0; geometry.len().get() as usize];
        bytes[..base.len()].copy_from_slice(base);
        let touched = vec![0; geometry.pages().get() as usize];
        Self { geometry, bytes, touched, writes: Arc::default() }
    }

    /// Page size and length.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Everything.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// `len` bytes from `at`.
    ///
    /// # Panics
    /// Past the end: a test asks only for what must be there.
    pub fn read(&self, at: ByteOffset, len: u64) -> &[u8] {
        &self.bytes[at.get() as usize..][..len as usize]
    }

    /// The bytes of one page.
    ///
    /// # Panics
    /// Past the end.
    pub fn page(&self, page: PageIndex) -> &[u8] {
        let size = self.geometry.page_size();
        self.read(size.start_of(page), size.bytes().get())
    }

    /// Writes `data` at `at`.
    ///
    /// # Panics
    /// Past the end.
    pub fn write(&mut self, at: ByteOffset, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.bytes[at.get() as usize..][..data.len()].copy_from_slice(data);
        let size = self.geometry.page_size();
        let last = ByteOffset::new(at.get() + data.len() as u64 - 1);
        self.touch(size.page_of(at).get()..size.page_of(last).get() + 1);
    }

    /// Makes whole pages zero.
    ///
    /// # Panics
    /// Past the end.
    pub fn zero(&mut self, range: PageRange) {
        let size = self.geometry.page_size();
        self.bytes[size.start_of(range.start()).get() as usize..size.start_of(range.end()).get() as usize].fill(0);
        self.touch(range.start().get()..range.end().get());
    }

    fn touch(&mut self, pages: std::ops::Range<u64>) {
        let write = self.writes.fetch_add(1, Ordering::Relaxed) + 1;
        self.touched[pages.start as usize..pages.end as usize].fill(write);
    }

    /// Counts pages as written again, with the bytes that they have: a merge may keep them in another place, and then a
    /// diff with what it was made from may name them.
    pub fn rewrite(&mut self, pages: &PageSet) {
        pages.runs().for_each(|run| self.touch(run.start().get()..run.end().get()));
    }

    /// Takes the content of a clone: what a commit does.
    pub fn take_over(&mut self, clone: &Self) {
        self.bytes.copy_from_slice(&clone.bytes);
        self.touched.copy_from_slice(&clone.touched);
    }

    fn pages_where(&self, mut differ: impl FnMut(PageIndex) -> bool) -> PageSet {
        self.geometry.all().iter().filter(|page| differ(*page)).collect()
    }

    /// The pages whose bytes differ: what a diff must name.
    pub fn changed(&self, other: &Self) -> PageSet {
        self.pages_where(|page| self.page(page) != other.page(page))
    }

    /// The pages that one of the two has written since they parted: what a diff may name.
    pub fn touched(&self, other: &Self) -> PageSet {
        self.pages_where(|page| self.touched[page.get() as usize] != other.touched[page.get() as usize])
    }

    /// Where the two differ first.
    pub fn first_difference(&self, other: &[u8]) -> Option<ByteOffset> {
        if self.bytes == other {
            return None;
        }
        let at = self.bytes.iter().zip(other).position(|(a, b)| a != b).unwrap_or(self.bytes.len().min(other.len()));
        Some(ByteOffset::new(at as u64))
    }

    /// How many pages hold nothing but zeroes.
    pub fn zero_pages(&self) -> u64 {
        self.geometry.all().iter().filter(|page| self.is_zero(*page)).count() as u64
    }

    /// Whether a page holds nothing but zeroes.
    pub fn is_zero(&self, page: PageIndex) -> bool {
        // Slices are compared at memory speed even in a debug build.
        self.page(page).chunks(4096).all(|chunk| chunk == [0; 4096])
    }
}

/// A base image of bytes in memory, which can be told to fail.
///
/// ```
/// use offshoot::{image::Source, page::ByteOffset, testing::ByteSource};
/// let image = ByteSource::new(vec![1, 2, 3]);
/// let mut two = [0; 2];
/// image.read(ByteOffset::new(1), &mut two)?;
/// assert_eq!(two, [2, 3]);
/// image.fail_after(0);
/// assert!(image.read(ByteOffset::new(1), &mut two).is_err());
/// # Ok::<(), offshoot::SpaceError>(())
/// ```
#[derive(Debug)]
pub struct ByteSource {
    bytes: Vec<u8>,
    /// Reads left until they fail.
    left: AtomicU64,
}

impl ByteSource {
    /// An image of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, left: AtomicU64::new(u64::MAX) }
    }

    /// Reads left until they fail; `u64::MAX` where they never do.
    pub fn reads_left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// From now on `reads` reads succeed and all later ones fail with [`ImageError::Io`], until this is called again.
    pub fn fail_after(&self, reads: u64) {
        self.left.store(reads, Ordering::SeqCst);
    }
}

impl Source for ByteSource {
    fn len(&self) -> ByteSize {
        ByteSize::new(self.bytes.len() as u64)
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let take = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(1) };
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_err() {
            let error = std::io::Error::other("the test told this image to fail");
            return Err(ImageError::Io(Arc::new(error)).into());
        }
        let len = ByteSize::new(buf.len() as u64);
        match at.checked_add(len) {
            Some(end) if end.get() <= self.len().get() => {
                buf.copy_from_slice(&self.bytes[at.get() as usize..end.get() as usize]);
                Ok(())
            }
            _ => Err(GeometryError::OutOfRange { at, len, space: self.len() }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageCount, PageSize};

    #[test]
    fn the_model_tells_changed_from_touched() {
        let geometry = Geometry::new(ByteSize::kib(16), PageSize::KIB_4).unwrap();
        let parent = Flat::new(geometry, &[9; 4097]);
        let mut clone = parent.clone();
        clone.write(ByteOffset::new(4095), &[9, 9]);
        clone.write(ByteOffset::new(12288), &[1]);
        clone.zero(PageRange::new(PageIndex::new(2), PageCount::new(1)).unwrap());
        let pages = |set: PageSet| set.pages().map(PageIndex::get).collect::<Vec<_>>();
        assert_eq!(pages(clone.changed(&parent)), [3]);
        assert_eq!(pages(clone.touched(&parent)), [0, 1, 2, 3]);
        assert_eq!(clone.first_difference(parent.bytes()), Some(ByteOffset::new(12288)));
        assert_eq!((parent.zero_pages(), clone.zero_pages()), (2, 1));
    }
}
