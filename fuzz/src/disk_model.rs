//! A disk as a flat `Vec<u8>`, with the documented rules of the disk face and nothing else.

/// Bytes in a sector.
pub const SECTOR: u128 = 512;

/// A disk's content and the size of its pages, which only a discard shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskModel {
    pub bytes: Vec<u8>,
    /// Pages of the space below it.
    pub pages: u64,
    page: usize,
}

impl DiskModel {
    /// A disk over `image`, filled up to whole sectors with zeroes.
    pub fn over_image(image: &[u8]) -> Self {
        Self::over_space(image.len().div_ceil(SECTOR as usize), 4096, image.len().div_ceil(4096), image)
    }

    /// A disk of zeroes.
    pub fn blank(sectors: usize) -> Self {
        Self::over_space(sectors, 4096, sectors.div_ceil(8), &[])
    }

    /// The first `sectors` of a space of `pages` pages of `page` bytes whose content starts with `image`.
    pub fn over_space(sectors: usize, page: usize, pages: usize, image: &[u8]) -> Self {
        let mut bytes = image.to_vec();
        bytes.resize(sectors * SECTOR as usize, 0);
        Self { bytes, pages: pages as u64, page }
    }

    pub fn sectors(&self) -> u64 {
        self.bytes.len() as u64 / SECTOR as u64
    }

    /// The byte range of a request, if all of it is on the disk.
    pub fn range(&self, lba: u64, count: u64) -> Option<std::ops::Range<usize>> {
        let start = u128::from(lba) * SECTOR;
        let end = start + u128::from(count) * SECTOR;
        (end <= self.bytes.len() as u128).then_some(start as usize..end as usize)
    }

    /// The byte range of a buffer at `lba`, if it is whole sectors and all of it is on the disk.
    pub fn buffer(&self, lba: u64, len: usize) -> Option<std::ops::Range<usize>> {
        (len as u128).is_multiple_of(SECTOR).then(|| self.range(lba, len as u64 / SECTOR as u64)).flatten()
    }

    /// Whole pages inside the range read as zeroes; a page that the disk's end cuts short is whole if the range holds all of it.
    pub fn discard(&mut self, range: std::ops::Range<usize>) {
        let len = self.bytes.len();
        for start in (0..len).step_by(self.page) {
            let end = (start + self.page).min(len);
            if range.start <= start && end <= range.end {
                self.bytes[start..end].fill(0);
            }
        }
    }
}
