//! The disk of each VM: 64 MiB that read at first as a small image, made up from the seed, with zeroes after its end.
//!
//! The image shows how a [`Source`] of one's own lies below a disk. All clones read it; none has a copy.

use std::sync::Arc;

use offshoot::backing::{Backing, Heap, Page4K};
use offshoot::disk::{Access, Disk};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, GeometryError, Lba, PageSize, SECTOR_SIZE, SectorCount};
use offshoot::{BoxError, SpaceError, Tree};

use crate::common::random::Random;
use crate::guest::SECTOR;

const SIZE: ByteSize = ByteSize::mib(64);
const IMAGE_SIZE: usize = 4 << 20;
/// How many sectors a disk has.
pub const SECTORS: SectorCount = SectorCount::new(SIZE.get() / SECTOR_SIZE);

/// The parent's disk.
pub fn new_disk(tree: &Tree, base: &Arc<BaseImage>) -> Result<Disk, BoxError> {
    let base: Arc<dyn Source> = base.clone();
    let space = Heap::<Page4K>::create(tree, Geometry::new(SIZE, PageSize::KIB_4)?, Some(base))?;
    Ok(Disk::over(space, SECTORS, Access::ReadWrite)?)
}

/// The image below all disks.
pub struct BaseImage(Vec<u8>);

impl BaseImage {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        Self((0..IMAGE_SIZE / 8).flat_map(|_| random.next().to_le_bytes()).collect())
    }

    /// What a sector holds before anybody writes it.
    pub fn sector(&self, lba: Lba, into: &mut [u8; SECTOR]) {
        let start = lba.get() as usize * SECTOR;
        match self.0.get(start..start + SECTOR) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => into.fill(0),
        }
    }
}

impl Source for BaseImage {
    fn len(&self) -> ByteSize {
        ByteSize::new(self.0.len() as u64)
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let start = at.get() as usize;
        let bytes = start.checked_add(buf.len()).and_then(|end| self.0.get(start..end));
        let len = ByteSize::new(buf.len() as u64);
        buf.copy_from_slice(bytes.ok_or(GeometryError::OutOfRange { at, len, space: self.len() })?);
        Ok(())
    }
}
