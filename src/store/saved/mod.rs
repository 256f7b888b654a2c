//! The manifest of a saved VM: which layers its RAM and disks are, where RAM lies, and its device state.
//!
//! See `docs/formats/saved-vm.md`. Everything in it is covered by one of three checksums, and it is written once. Must not know what the device state says,
//! nor how a VM is put together again.

mod decode;
#[cfg(feature = "store")]
mod file;

#[cfg(feature = "store")]
pub(super) use file::{allocated, file_name, open, write};

use std::sync::Arc;

use super::id::{LayerId, SavedId, VM};
use super::record::{BLOCK, Record};
use crate::error::StoreError;
use crate::page::{ByteSize, Geometry, GuestAddress, PageCount, PageSize, SectorCount};

const MAGIC: [u8; 8] = *b"OFFSAVM\0";
/// The longest name of a VM or a disk, in bytes.
const NAME_LIMIT: u64 = 255;
/// The most regions and disks: what a VM may have.
const REGIONS_LIMIT: u64 = 509;
const DISKS_LIMIT: u64 = 256;
const REGION_LEN: usize = 16;
const DISK_LEN: usize = 40;

/// Fields of the header, after the prefix of a record.
mod field {
    pub(super) const RAM: usize = 64;
    pub(super) const PAGE_SHIFT: usize = 80;
    pub(super) const REGIONS: usize = 84;
    pub(super) const DISKS: usize = 88;
    pub(super) const NAME_LEN: usize = 92;
    pub(super) const BODY_LEN: usize = 96;
    pub(super) const BODY_CRC: usize = 104;
    pub(super) const STATE_CRC: usize = 108;
    pub(super) const STATE_LEN: usize = 112;
    pub(super) const NAME: usize = 128;
}

/// A run of guest addresses that are RAM. They lie one after another in the space that the layers hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SavedRegion {
    /// Its first address.
    pub start: GuestAddress,
    /// Its length.
    pub len: ByteSize,
}

/// Whether a guest may write a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum SavedAccess {
    /// Reads and writes.
    ReadWrite = 0,
    /// Reads only.
    ReadOnly = 1,
}

/// A disk of a saved VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SavedDisk {
    /// Its name in the VM: at most 255 bytes, of which no two disks have the same.
    pub name: Arc<str>,
    /// How many sectors it has.
    pub sectors: SectorCount,
    /// The length of its layers, in pages of 4 KiB.
    pub pages: PageCount,
    /// Whether it may be written.
    pub access: SavedAccess,
    /// Its topmost layer; `None` where all of it is zero.
    pub layer: Option<LayerId>,
}

/// What a file `<id>.vm` says.
///
/// ```
/// use offshoot::page::{ByteSize, GuestAddress, PageSize};
/// use offshoot::store::{Manifest, SavedId, SavedRegion};
/// let manifest = Manifest {
///     id: SavedId::from_bytes([7; 16]),
///     parent: "web".into(),
///     page_size: PageSize::KIB_4,
///     regions: vec![SavedRegion { start: GuestAddress::ZERO, len: ByteSize::gib(1) }],
///     ram: None,
///     disks: vec![],
///     state: vec![1, 2, 3].into(),
/// };
/// let mut bytes = manifest.to_bytes()?;
/// assert_eq!(Manifest::from_bytes(&bytes)?, manifest);
/// bytes[4099] ^= 1;
/// assert!(Manifest::from_bytes(&bytes).is_err());
/// # Ok::<(), offshoot::StoreError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Its own name.
    pub id: SavedId,
    /// The name of the VM that was saved, at most 255 bytes.
    pub parent: Arc<str>,
    /// The page size of RAM.
    pub page_size: PageSize,
    /// Where RAM lies, ascending.
    pub regions: Vec<SavedRegion>,
    /// The topmost layer of RAM; `None` where all of it is zero.
    pub ram: Option<LayerId>,
    /// The disks, in the VM's order.
    pub disks: Vec<SavedDisk>,
    /// vCPU and device state: bytes of the embedder's.
    pub state: Arc<[u8]>,
}

fn limit(what: &'static str, found: u64, limit: u64) -> StoreError {
    StoreError::Limit { file: format!("a manifest (.{VM})").into(), what, found, limit }
}

impl Manifest {
    /// The length of RAM.
    pub fn ram_len(&self) -> ByteSize {
        ByteSize::new(self.regions.iter().fold(0, |sum, region| sum + region.len.get()))
    }

    /// The topmost layers of RAM and of each disk.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.ram.into_iter().chain(self.disks.iter().filter_map(|disk| disk.layer))
    }

    /// The bytes of its file. O(state).
    ///
    /// # Errors
    /// [`StoreError::Limit`] or [`StoreError::Damaged`] for what no VM can be: [`Manifest::from_bytes`] would refuse it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StoreError> {
        let mut bytes = self.front()?;
        bytes.extend_from_slice(&self.state);
        Ok(bytes)
    }

    /// What keeps it from being written, or from being read where so much device state is allowed.
    #[cfg(feature = "store")]
    pub(crate) fn check_for(&self, most_state: ByteSize) -> Result<(), StoreError> {
        self.check(&format!("a manifest (.{VM})").into())?;
        let found = self.state.len() as u64;
        if found > most_state.get() {
            return Err(limit("bytes of device state (Limits::device_state)", found, most_state.get()));
        }
        Ok(())
    }

    /// The bytes up to the device state.
    fn front(&self) -> Result<Vec<u8>, StoreError> {
        self.check(&format!("{}.{VM}", self.id).into())?;
        let mut body = Vec::with_capacity(self.regions.len() * REGION_LEN + self.disks.len() * (DISK_LEN + 32));
        for region in &self.regions {
            body.extend(region.start.get().to_le_bytes());
            body.extend(region.len.get().to_le_bytes());
        }
        for disk in &self.disks {
            body.extend(disk.layer.map_or([0; 16], LayerId::bytes));
            body.extend(disk.sectors.get().to_le_bytes());
            body.extend(disk.pages.get().to_le_bytes());
            body.extend((disk.access as u32).to_le_bytes());
            // At most NAME_LIMIT.
            body.extend((disk.name.len() as u32).to_le_bytes());
            body.extend(disk.name.as_bytes());
            body.resize(body.len().next_multiple_of(8), 0);
        }
        let mut record = Record::new(&MAGIC, self.id.bytes());
        record.put(field::RAM, &self.ram.map_or([0; 16], LayerId::bytes));
        record.put(field::PAGE_SHIFT, &self.page_size.shift().to_le_bytes());
        record.put(field::REGIONS, &(self.regions.len() as u32).to_le_bytes());
        record.put(field::DISKS, &(self.disks.len() as u32).to_le_bytes());
        record.put(field::NAME_LEN, &(self.parent.len() as u32).to_le_bytes());
        record.put(field::BODY_LEN, &(body.len() as u64).to_le_bytes());
        record.put(field::BODY_CRC, &crc32fast::hash(&body).to_le_bytes());
        record.put(field::STATE_CRC, &crc32fast::hash(&self.state).to_le_bytes());
        record.put(field::STATE_LEN, &(self.state.len() as u64).to_le_bytes());
        record.put(field::NAME, self.parent.as_bytes());
        let mut front = Vec::with_capacity(BLOCK + body.len() + self.state.len());
        front.extend_from_slice(record.sealed());
        front.extend(body);
        Ok(front)
    }

    /// What holds for every manifest, whoever made it.
    fn check(&self, file: &Arc<str>) -> Result<(), StoreError> {
        let wrong = |what| {
            Err(StoreError::Damaged { file: file.clone(), what, at: crate::page::ByteOffset::new(BLOCK as u64) })
        };
        let over = |what, found: usize, most| {
            let found = found as u64;
            if found > most { Err(limit(what, found, most)) } else { Ok(()) }
        };
        over("regions of RAM", self.regions.len(), REGIONS_LIMIT)?;
        over("disks", self.disks.len(), DISKS_LIMIT)?;
        over("bytes in the name of a VM", self.parent.len(), NAME_LIMIT)?;
        if self.regions.is_empty() {
            return wrong("it has no RAM");
        }
        let (page, mut free_from, mut total) = (self.page_size.bytes().get(), 0u64, 0u64);
        for region in &self.regions {
            let (start, len) = (region.start.get(), region.len.get());
            if len == 0 || !len.is_multiple_of(page) || !start.is_multiple_of(page) {
                return wrong("a region of RAM is empty, or not of whole pages");
            }
            if start < free_from {
                return wrong("the regions of RAM overlap, or do not ascend");
            }
            let Some(end) = start.checked_add(len) else { return wrong("a region of RAM ends past the last address") };
            free_from = end;
            total = total.saturating_add(len);
        }
        if total > Geometry::MAX_LEN.get() {
            return Err(limit("bytes of RAM", total, Geometry::MAX_LEN.get()));
        }
        for (at, disk) in self.disks.iter().enumerate() {
            over("bytes in the name of a disk", disk.name.len(), NAME_LIMIT)?;
            if self.disks[..at].iter().any(|other| other.name == disk.name) {
                return wrong("two disks have one name");
            }
            let most = Geometry::MAX_LEN.get() >> PageSize::KIB_4.shift();
            if disk.pages.get() > most {
                return Err(limit("pages in a disk", disk.pages.get(), most));
            }
            let holds = disk.pages.get() * (BLOCK as u64 / crate::page::SECTOR_SIZE);
            if disk.sectors == SectorCount::ZERO || disk.sectors.get() > holds {
                return wrong("a disk has no sectors, or more than its layers hold");
            }
        }
        Ok(())
    }
}
