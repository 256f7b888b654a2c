//! Writes a qcow2 file, version 3, in one pass: guest clusters come in ascending order, and nothing written is written again.
//!
//! ```text
//!   cluster 0   1 ...                                    n                     end
//!   ┌────────┬──────┬──────┬────┬──────┬────┬──────────┬─────────────────┬────────────────┐
//!   │ header │ data │ data │ L2 │ data │ L2 │ L1 table │ refcount blocks │ refcount table │
//!   └────────┴──────┴──────┴────┴──────┴────┴──────────┴─────────────────┴────────────────┘
//! ```
//!
//! Our own because the library's writer allocates in place, keeps its refcounts up to date on disk and reads back what it wrote: none
//! of which an export needs. Every cluster is used once, so every refcount is 1. The header is written last: a file
//! that was cut off is no qcow2.

use std::io;

use super::output::Output;
use super::qcow2_header::{EXTENSION_BACKING_FORMAT, LARGEST_L1, MAGIC};

const HEADER: u32 = 104;
/// The cluster's only reference is this entry.
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;

pub(super) struct Qcow2Writer<'a, O> {
    out: &'a mut O,
    cluster: u64,
    size: u64,
    backing: Option<(&'a str, &'a str)>,
    /// The next free cluster of the file.
    next: u64,
    l1: Vec<u64>,
    /// The L2 table that is being filled, and its place in the L1 table.
    l2: Vec<u64>,
    open: Option<u64>,
}

impl<'a, O: Output> Qcow2Writer<'a, O> {
    /// A file of clusters of `cluster` bytes for `size` bytes, in whole sectors. `backing`: name and format. None where the L1 table would
    /// be larger than other tools read.
    pub(super) fn new(out: &'a mut O, cluster: u64, size: u64, backing: Option<(&'a str, &'a str)>) -> Option<Self> {
        let entries = size.div_ceil(cluster * (cluster / 8));
        if entries * 8 > LARGEST_L1 {
            return None;
        }
        let l2 = vec![0; (cluster / 8) as usize];
        Some(Self { out, cluster, size, backing, next: 1, l1: vec![0; entries as usize], l2, open: None })
    }

    /// Guest cluster `index` holds `bytes`, a whole cluster.
    pub(super) fn data(&mut self, index: u64, bytes: &[u8]) -> io::Result<()> {
        debug_assert_eq!(bytes.len() as u64, self.cluster);
        let at = self.take(1);
        self.out.put(at, bytes)?;
        self.entry(index, at | COPIED)
    }

    /// Guest cluster `index` is zero, whatever the backing file has there.
    pub(super) fn zero(&mut self, index: u64) -> io::Result<()> {
        self.entry(index, ZERO)
    }

    fn entry(&mut self, index: u64, entry: u64) -> io::Result<()> {
        let per_table = self.l2.len() as u64;
        let table = index / per_table;
        if self.open != Some(table) {
            self.close_l2()?;
            self.open = Some(table);
        }
        self.l2[(index % per_table) as usize] = entry;
        Ok(())
    }

    /// `count` clusters at the end of the file; where they begin.
    fn take(&mut self, count: u64) -> u64 {
        let at = self.next * self.cluster;
        self.next += count;
        at
    }

    fn close_l2(&mut self) -> io::Result<()> {
        let Some(table) = self.open.take() else { return Ok(()) };
        let at = self.take(1);
        self.out.put(at, &big_endian(&self.l2))?;
        self.l1[table as usize] = at | COPIED;
        self.l2.fill(0);
        Ok(())
    }

    /// Writes the tables, then the header.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.close_l2()?;
        let l1_clusters = (self.l1.len() as u64 * 8).div_ceil(self.cluster);
        let l1_at = self.take(l1_clusters);
        let l1 = big_endian(&self.l1);
        self.out.put(l1_at, &l1)?;

        // The refcounts count their own clusters too: enough blocks for all, and a table that names them.
        let per_block = self.cluster / 2;
        let (mut blocks, mut table) = (0, 0);
        while blocks * per_block < self.next + blocks + table || table * (self.cluster / 8) < blocks {
            blocks = (self.next + blocks + table).div_ceil(per_block);
            table = (blocks * 8).div_ceil(self.cluster);
        }
        let used = self.next + blocks + table;
        let blocks_at = self.take(blocks);
        for block in 0..blocks {
            let ones = used.saturating_sub(block * per_block).min(per_block) as usize;
            let mut bytes = [0, 1].repeat(ones);
            bytes.resize(self.cluster as usize, 0);
            self.out.put(blocks_at + block * self.cluster, &bytes)?;
        }
        let table_at = self.take(table);
        let names: Vec<u64> = (0..blocks).map(|block| blocks_at + block * self.cluster).collect();
        self.out.put(table_at, &big_endian(&names))?;
        // Whole clusters to the end.
        self.out.set_len(used * self.cluster)?;
        let header = self.header(l1_at, table_at, table as u32);
        self.out.put(0, &header)
    }

    fn header(&self, l1_at: u64, refcounts_at: u64, refcount_clusters: u32) -> Vec<u8> {
        let mut extensions = Vec::new();
        if let Some((_, format)) = self.backing {
            extensions.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
            extensions.extend((format.len() as u32).to_be_bytes());
            extensions.extend(format.bytes());
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend([0; 8]);
        let name = self.backing.map_or("", |(name, _)| name);
        let name_at = if name.is_empty() { 0 } else { u64::from(HEADER) + extensions.len() as u64 };

        let mut header = MAGIC.to_vec();
        header.extend(3u32.to_be_bytes());
        header.extend(name_at.to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.extend(self.cluster.trailing_zeros().to_be_bytes());
        header.extend(self.size.to_be_bytes());
        header.extend(0u32.to_be_bytes()); // not encrypted
        header.extend((self.l1.len() as u32).to_be_bytes());
        header.extend(l1_at.to_be_bytes());
        header.extend(refcounts_at.to_be_bytes());
        header.extend(refcount_clusters.to_be_bytes());
        header.extend([0; 12]); // no snapshots
        header.extend([0; 24]); // no feature bits
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend(HEADER.to_be_bytes());
        debug_assert_eq!(header.len(), HEADER as usize);
        header.extend(extensions);
        header.extend(name.bytes());
        header
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
