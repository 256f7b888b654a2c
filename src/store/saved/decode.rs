//! Reading a manifest. Every number in it may be a lie: the length of the file bounds what is held, and all is checked before it is believed.

use std::sync::Arc;

use super::super::id::{LayerId, SavedId, VM};
use super::super::record::{BLOCK, Purpose, Record};
use super::{DISK_LEN, MAGIC, Manifest, NAME_LIMIT, REGION_LEN, SavedAccess, SavedDisk, SavedRegion, field, limit};
use crate::error::StoreError;
use crate::page::{ByteOffset, ByteSize, GuestAddress, PageCount, PageSize, SectorCount};

/// The header of a manifest: what the rest is held against.
pub(super) struct Header {
    record: Record,
    file: Arc<str>,
    body_len: u64,
    state_len: u64,
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK], file: &Arc<str>) -> Result<Self, StoreError> {
        let damaged = |what, at| StoreError::Damaged { file: file.clone(), what, at: ByteOffset::new(at) };
        let record = Record::parse(block, &MAGIC).ok_or_else(|| damaged("its header is not whole", 0))?;
        record.check_known(file, Purpose::Read)?;
        let (body_len, state_len) = (record.u64_at(field::BODY_LEN), record.u64_at(field::STATE_LEN));
        Ok(Self { record, file: file.clone(), body_len, state_len })
    }

    pub(super) fn id(&self) -> SavedId {
        SavedId::from_bytes(self.record.id())
    }

    #[cfg(feature = "store")]
    pub(super) fn state_len(&self) -> u64 {
        self.state_len
    }

    /// Fails unless the file has the length that the header says.
    pub(super) fn check_len(&self, len: u64) -> Result<(), StoreError> {
        let said = (BLOCK as u64).checked_add(self.body_len).and_then(|sum| sum.checked_add(self.state_len));
        if said == Some(len) {
            return Ok(());
        }
        Err(self.damaged("its length is not what its header says", field::BODY_LEN))
    }

    fn damaged(&self, what: &'static str, at: usize) -> StoreError {
        StoreError::Damaged { file: self.file.clone(), what, at: ByteOffset::new(at as u64) }
    }

    /// The manifest, of the bytes after the header.
    pub(super) fn decode(&self, rest: &[u8]) -> Result<Manifest, StoreError> {
        let Some((body, state)) = usize::try_from(self.body_len).ok().and_then(|len| rest.split_at_checked(len)) else {
            return Err(self.damaged("the file ends in its tables", BLOCK));
        };
        if crc32fast::hash(body) != self.record.u32_at(field::BODY_CRC) {
            return Err(self.damaged("its tables do not match their checksum", BLOCK));
        }
        if crc32fast::hash(state) != self.record.u32_at(field::STATE_CRC) {
            return Err(self.damaged("the device state does not match its checksum", BLOCK + body.len()));
        }
        let mut tables = Tables { header: self, bytes: body, at: 0 };
        let regions = (0..self.record.u32_at(field::REGIONS)).map(|_| tables.region()).collect::<Result<_, _>>()?;
        let disks = (0..self.record.u32_at(field::DISKS)).map(|_| tables.disk()).collect::<Result<_, _>>()?;
        if tables.at != body.len() {
            return Err(self.damaged("there is something after the last table", BLOCK + tables.at));
        }
        let page = 1u64.checked_shl(self.record.u32_at(field::PAGE_SHIFT)).unwrap_or(0);
        let page_size =
            PageSize::new(ByteSize::new(page)).map_err(|_| self.damaged("its page size is none", field::PAGE_SHIFT))?;
        let manifest = Manifest {
            id: self.id(),
            parent: self.parent()?,
            page_size,
            regions,
            ram: layer(self.record.bytes_at(field::RAM)),
            disks,
            state: state.into(),
        };
        manifest.check(&self.file)?;
        Ok(manifest)
    }

    fn parent(&self) -> Result<Arc<str>, StoreError> {
        let len = u64::from(self.record.u32_at(field::NAME_LEN));
        if len > NAME_LIMIT {
            return Err(limit("bytes in the name of a VM", len, NAME_LIMIT));
        }
        let bytes = self.record.bytes_at::<{ NAME_LIMIT as usize }>(field::NAME);
        let text = std::str::from_utf8(&bytes[..len as usize]).ok();
        text.map(Into::into).ok_or_else(|| self.damaged("the VM's name is not text", field::NAME))
    }
}

fn layer(bytes: [u8; 16]) -> Option<LayerId> {
    (bytes != [0; 16]).then(|| LayerId::from_bytes(bytes))
}

/// The tables after the header.
struct Tables<'a> {
    header: &'a Header,
    bytes: &'a [u8],
    at: usize,
}

impl Tables<'_> {
    fn take(&mut self, len: usize) -> Result<&[u8], StoreError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(self.header.damaged("its tables are cut short", BLOCK + self.at)) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn fields<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u64(&mut self) -> Result<u64, StoreError> {
        self.fields().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, StoreError> {
        self.fields().map(u32::from_le_bytes)
    }

    fn region(&mut self) -> Result<SavedRegion, StoreError> {
        const _: () = assert!(REGION_LEN == 16);
        Ok(SavedRegion { start: GuestAddress::new(self.u64()?), len: ByteSize::new(self.u64()?) })
    }

    fn disk(&mut self) -> Result<SavedDisk, StoreError> {
        const _: () = assert!(DISK_LEN == 16 + 8 + 8 + 4 + 4);
        let at = BLOCK + self.at;
        let layer = layer(self.fields()?);
        let (sectors, pages) = (SectorCount::new(self.u64()?), PageCount::new(self.u64()?));
        let access = match self.u32()? {
            0 => SavedAccess::ReadWrite,
            1 => SavedAccess::ReadOnly,
            _ => return Err(self.header.damaged("whether a disk may be written is not known", at)),
        };
        let len = self.u32()? as usize;
        let text = std::str::from_utf8(self.take(len)?).map(Arc::<str>::from);
        let name = text.map_err(|_| self.header.damaged("the name of a disk is not text", at))?;
        let padding = self.at.next_multiple_of(8) - self.at;
        if self.take(padding)?.iter().any(|byte| *byte != 0) {
            return Err(self.header.damaged("there is something after the name of a disk", at));
        }
        Ok(SavedDisk { name, sectors, pages, access, layer })
    }
}

impl Manifest {
    /// Reads the bytes of a file. Holds no more than a small multiple of them.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], which says where; [`StoreError::Unknown`] for a newer version's; [`StoreError::Limit`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        let file: Arc<str> = format!("a manifest (.{VM})").into();
        let Some((block, rest)) = bytes.split_first_chunk::<BLOCK>() else {
            let (what, at) = ("it is cut short", ByteOffset::new(bytes.len() as u64));
            return Err(StoreError::Damaged { file, what, at });
        };
        let header = Header::parse(block, &file)?;
        header.check_len(bytes.len() as u64)?;
        header.decode(rest)
    }
}
