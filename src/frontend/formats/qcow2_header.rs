//! The header of a qcow2 file, read and vetted before the library sees the file: every size that would be allocated is held against
//! the file, and every name is taken out for the policy. Must not open or follow anything.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::policy::ImportPolicy;
use super::{Format, FormatError, Rule};
use crate::page::ByteSize;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest backing name that QEMU takes.
pub(super) const LONGEST_NAME: u32 = 1023;
/// QEMU's limits on tables that are read whole.
pub(super) const LARGEST_L1: u64 = 32 << 20;
const LARGEST_REFCOUNT_TABLE: u64 = 8 << 20;
const MOST_SNAPSHOTS: u32 = 65536;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
pub(super) const OTHER_COMPRESSION: u64 = 8;
pub(super) const EXTENDED_L2: u64 = 16;
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// What the header says, as far as it is needed outside the library.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) size: ByteSize,
    pub(super) cluster: u64,
    /// Name and format.
    pub(super) backing: Option<(String, Option<String>)>,
    pub(super) data_file: Option<String>,
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        self.0[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }
}

/// Reads and checks the header of `file`.
pub(super) fn read(path: &Path, file: &File, policy: &ImportPolicy) -> Result<Header, FormatError> {
    let len = file.metadata().map_err(|error| FormatError::io(path, error))?.len();
    let read = |at: u64, size: u64| -> Result<Vec<u8>, FormatError> {
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, at).map_err(|error| FormatError::io(path, error))?;
        Ok(bytes)
    };
    let header = parse(len, &read, path)?;
    policy.check_size(path, header.size)?;
    Ok(header)
}

fn parse(
    len: u64,
    read: &dyn Fn(u64, u64) -> Result<Vec<u8>, FormatError>,
    path: &Path,
) -> Result<Header, FormatError> {
    let refused = |rule| FormatError::refused(path, rule);
    let refuse = |rule| Err(refused(rule));
    let malformed = |what: &str| Rule::Malformed(what.to_owned());
    if len < 72 {
        return refuse(Rule::NotThisFormat(Format::Qcow2));
    }
    let bytes = read(0, len.min(104))?;
    let fields = Fields(&bytes);
    if bytes[..4] != MAGIC {
        return refuse(Rule::NotThisFormat(Format::Qcow2));
    }
    let version = fields.u32(4);
    if !(2..=3).contains(&version) {
        return refuse(Rule::Version(version));
    }
    if version == 3 && len < 104 {
        return refuse(malformed("the file ends in its header"));
    }
    let bits = fields.u32(20);
    if !(9..=21).contains(&bits) {
        return refuse(malformed("clusters are not 512 bytes to 2 MiB"));
    }
    let cluster = 1u64 << bits;
    let (features, header_len) = if version == 3 { (fields.u64(72), fields.u32(100)) } else { (0, 72) };
    if version == 3 && fields.u32(96) > 6 {
        return refuse(malformed("refcounts of more than 64 bits"));
    }
    if features & CORRUPT != 0 {
        return refuse(Rule::Corrupt);
    }
    if features & DIRTY != 0 {
        return refuse(Rule::Dirty);
    }
    if features & !EXTERNAL_DATA != 0 {
        return refuse(Rule::Features(features & !EXTERNAL_DATA));
    }
    if fields.u32(32) != 0 {
        return refuse(Rule::Encrypted);
    }
    let size = fields.u64(24);
    if size == 0 {
        return refuse(Rule::Empty);
    }
    // A table: where it is, how long, and what the format allows.
    let table = |table, at: u64, bytes: u64, most: u64| {
        let fits = at.checked_add(bytes).is_some_and(|end| end <= len);
        if bytes > most || !fits || !at.is_multiple_of(cluster) {
            return Err(FormatError::refused(
                path,
                Rule::Table { table, at, len: ByteSize::new(bytes), file: ByteSize::new(len) },
            ));
        }
        Ok(())
    };
    let (l1_entries, l1_at) = (u64::from(fields.u32(36)), fields.u64(40));
    table("L1 table", l1_at, l1_entries * 8, LARGEST_L1)?;
    let per_entry = cluster * (cluster / 8);
    if l1_entries < size.div_ceil(per_entry) {
        return refuse(malformed("its L1 table is too short for its virtual size"));
    }
    // Only its place and length: it need not be read, and its last cluster may end after the file.
    let (refcounts_at, refcounts) = (fields.u64(48), u64::from(fields.u32(56)) * cluster);
    table("refcount table", refcounts_at, refcounts.min(len.saturating_sub(refcounts_at)), LARGEST_REFCOUNT_TABLE)?;
    if fields.u32(60) > MOST_SNAPSHOTS {
        return refuse(malformed("more than 65536 snapshots"));
    }
    check_l1(len, cluster, &read(l1_at, l1_entries * 8)?).map_err(refused)?;

    let first = read(0, cluster.min(len))?;
    if (version == 3 && header_len < 104) || u64::from(header_len) > cluster {
        return refuse(malformed("its header length"));
    }
    let (name_at, name_len) = (fields.u64(8), fields.u32(16));
    let name = if name_at == 0 { None } else { Some(slice(&first, name_at, name_len).map_err(refused)?) };
    let end = if name_at == 0 { first.len() as u64 } else { name_at };
    let mut header = Header { size: ByteSize::new(size), cluster, backing: None, data_file: None };
    let mut format = None;
    let mut at = u64::from(header_len);
    while at + 8 <= end {
        let fields = Fields(&first[at as usize..]);
        let (kind, len) = (fields.u32(0), fields.u32(4));
        if at + 8 + u64::from(len) > end {
            return refuse(malformed("a header extension that does not fit"));
        }
        let body = at + 8;
        match kind {
            0 => break,
            EXTENSION_BACKING_FORMAT => format = Some(slice(&first, body, len).map_err(refused)?),
            EXTENSION_DATA_FILE => header.data_file = Some(slice(&first, body, len).map_err(refused)?),
            EXTENSION_ENCRYPTION => return refuse(Rule::Encrypted),
            _ => {}
        }
        at = body + u64::from(len).next_multiple_of(8);
    }
    header.backing = name.map(|name| (name, format));
    match (&header.data_file, features & EXTERNAL_DATA != 0) {
        (None, true) => return refuse(malformed("an external data file without a name")),
        (Some(_), false) => header.data_file = None,
        _ => {}
    }
    Ok(header)
}

/// A name, which must lie in the first cluster: what a guest can write never does.
fn slice(first: &[u8], at: u64, len: u32) -> Result<String, Rule> {
    let end = at.checked_add(u64::from(len)).filter(|end| *end <= first.len() as u64);
    match end {
        Some(end) if len <= LONGEST_NAME => String::from_utf8(first[at as usize..end as usize].to_vec())
            .map_err(|_| Rule::Malformed("a file name that is not UTF-8".into())),
        _ => Err(Rule::Malformed("a file name that is too long or outside the first cluster".into())),
    }
}

/// Every L2 table lies in the file, and none is used twice: a few tables could otherwise stand for any amount of data.
fn check_l1(len: u64, cluster: u64, table: &[u8]) -> Result<(), Rule> {
    let entries = table.chunks_exact(8).map(|entry| Fields(entry).u64(0));
    let mut tables = Vec::new();
    for entry in entries.filter(|entry| *entry != 0) {
        let at = entry & L1_OFFSET;
        if entry & L1_RESERVED != 0 || !at.is_multiple_of(cluster) {
            return Err(Rule::Malformed("an L1 entry with reserved bits or an unaligned table".into()));
        }
        if at == 0 {
            continue;
        }
        // What is cut off would read as clusters that were never written.
        if at + cluster > len {
            return Err(Rule::Table { table: "L2 table", at, len: ByteSize::new(cluster), file: ByteSize::new(len) });
        }
        tables.push(at);
    }
    tables.sort_unstable();
    if tables.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Rule::Malformed("an L2 table that is used twice".into()));
    }
    Ok(())
}
