//! Writes a VMDK of kind monolithicSparse in one pass: one file with the descriptor in it, grains of 64 KiB in ascending order.
//!
//! ```text
//!   ┌────────┬────────────┬────────────┬────────────────┬────────┬────────────────┬────────┬───────┬───────┐
//!   │ header │ descriptor │ second     │ its grain      │ grain  │ its grain      │ unused │ grain │ grain │ ...
//!   │ 512 B  │ 10 KiB     │ directory  │ tables         │ dir.   │ tables         │        │ 64 K  │ 64 K  │
//!   └────────┴────────────┴────────────┴────────────────┴────────┴────────────────┴────────┴───────┴───────┘
//! ```
//!
//! All tables have their place from the start; those without data stay holes. Offsets are 32-bit numbers of sectors: no more than
//! 2 TiB of data.

use std::io;

use super::output::Output;

pub(super) const GRAIN: u64 = 64 << 10;
const SECTOR: u64 = 512;
const PER_TABLE: u64 = 512;
const TABLE_SECTORS: u64 = PER_TABLE * 4 / SECTOR;
const DESCRIPTOR_SECTORS: u64 = 20;

pub(super) struct VmdkWriter<'a, O> {
    out: &'a mut O,
    sectors: u64,
    name: &'a str,
    layout: Layout,
    next: u64,
    table: Vec<u32>,
    open: Option<u64>,
}

/// Places in sectors.
struct Layout {
    tables: u64,
    second_directory: u64,
    directory: u64,
    grains: u64,
}

impl Layout {
    fn of(sectors: u64) -> Self {
        let tables = sectors.div_ceil(PER_TABLE * GRAIN / SECTOR);
        let directory_sectors = (tables * 4).div_ceil(SECTOR);
        let second_directory = 1 + DESCRIPTOR_SECTORS;
        let directory = second_directory + directory_sectors + tables * TABLE_SECTORS;
        let end = directory + directory_sectors + tables * TABLE_SECTORS;
        Self { tables, second_directory, directory, grains: end.next_multiple_of(GRAIN / SECTOR) }
    }

    /// Where table `index` of the directory at `directory` is.
    fn table(&self, directory: u64, index: u64) -> u64 {
        directory + (self.tables * 4).div_ceil(SECTOR) + index * TABLE_SECTORS
    }
}

impl<'a, O: Output> VmdkWriter<'a, O> {
    /// A file for `size` bytes in whole sectors, called `name`. None where offsets of 32 bits do not reach.
    pub(super) fn new(out: &'a mut O, size: u64, name: &'a str) -> Option<Self> {
        let sectors = size / SECTOR;
        let layout = Layout::of(sectors);
        let most = layout.grains + sectors.next_multiple_of(GRAIN / SECTOR);
        let next = layout.grains;
        u32::try_from(most).ok()?;
        Some(Self { out, sectors, name, layout, next, table: vec![0; PER_TABLE as usize], open: None })
    }

    /// Grain `index` holds `bytes`, a whole grain.
    pub(super) fn data(&mut self, index: u64, bytes: &[u8]) -> io::Result<()> {
        debug_assert_eq!(bytes.len() as u64, GRAIN);
        let table = index / PER_TABLE;
        if self.open != Some(table) {
            self.close_table()?;
            self.open = Some(table);
        }
        self.out.put(self.next * SECTOR, bytes)?;
        self.table[(index % PER_TABLE) as usize] = self.next as u32;
        self.next += GRAIN / SECTOR;
        Ok(())
    }

    fn close_table(&mut self) -> io::Result<()> {
        let Some(index) = self.open.take() else { return Ok(()) };
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        for directory in [self.layout.second_directory, self.layout.directory] {
            self.out.put(self.layout.table(directory, index) * SECTOR, &bytes)?;
        }
        self.table.fill(0);
        Ok(())
    }

    /// Writes the directories and the descriptor, then the header.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.close_table()?;
        self.out.set_len(self.next * SECTOR)?;
        for directory in [self.layout.second_directory, self.layout.directory] {
            let entries = (0..self.layout.tables).map(|index| self.layout.table(directory, index) as u32);
            let bytes: Vec<u8> = entries.flat_map(u32::to_le_bytes).collect();
            self.out.put(directory * SECTOR, &bytes)?;
        }
        self.out.put(SECTOR, self.descriptor().as_bytes())?;
        let header = self.header();
        self.out.put(0, &header)
    }

    fn descriptor(&self) -> String {
        // What a BIOS would make of it: 16 heads of 63 sectors.
        let cylinders = (self.sectors / (16 * 63)).clamp(1, 16383);
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
             # Extent description\nRW {} SPARSE \"{}\"\n\n\
             # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n",
            self.sectors, self.name
        )
    }

    fn header(&self) -> Vec<u8> {
        let mut header = b"KDMV".to_vec();
        header.extend(1u32.to_le_bytes()); // version
        header.extend(3u32.to_le_bytes()); // the line ends below are there, and so is the second directory
        header.extend(self.sectors.to_le_bytes());
        header.extend((GRAIN / SECTOR).to_le_bytes());
        header.extend(1u64.to_le_bytes()); // where the descriptor is
        header.extend(DESCRIPTOR_SECTORS.to_le_bytes());
        header.extend((PER_TABLE as u32).to_le_bytes());
        header.extend(self.layout.second_directory.to_le_bytes());
        header.extend(self.layout.directory.to_le_bytes());
        header.extend(self.layout.grains.to_le_bytes());
        header.push(0); // closed cleanly
        header.extend(*b"\n \r\n"); // damaged by whoever takes this for text
        header.resize(SECTOR as usize, 0); // not compressed
        header
    }
}
