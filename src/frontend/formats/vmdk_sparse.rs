//! Reads a VMDK of kind monolithicSparse: one file with its descriptor, two levels of tables and grains. Our own, because the library reads flat
//! extents only. Opens nothing and follows no name; every table is held against the file before it is used.
//!
//! What is compressed (streamOptimized), what lies over a parent and what VMware's server writes (`COWD`) is refused by name.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Format, FormatError, ImportPolicy, Rule};
use crate::page::{ByteSize, SECTOR_SIZE};

pub(super) const MAGIC: [u8; 4] = *b"KDMV";
/// Another format of sparse extents.
const SERVER_MAGIC: [u8; 4] = *b"COWD";
const HAS_LINE_ENDS: u32 = 1;
/// An entry of 1 is a grain of zeroes.
const HAS_ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
/// Two directories, one of which is read.
const HAS_SECOND_DIRECTORY: u32 = 1 << 1;
const PER_TABLE: u64 = 512;
const TABLE_BYTES: u64 = PER_TABLE * 4;
/// Grains of 4 KiB to 2 MiB.
const GRAIN_SECTORS: std::ops::RangeInclusive<u64> = 8..=4096;
const LONGEST_DESCRIPTOR: u64 = 2 << 20;
const ZERO_GRAIN: u32 = 1;

/// An open file of this kind.
#[derive(Debug)]
pub(super) struct SparseVmdk {
    file: File,
    file_len: u64,
    len: u64,
    grain: u64,
    /// Where each grain table is, in sectors; 0 where all its grains are zeroes.
    directory: Vec<u32>,
    zero_grains: bool,
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u16(&self, at: usize) -> u16 {
        self.0[at..].first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    fn u32(&self, at: usize) -> u32 {
        self.0[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        self.0[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Whether the file is a sparse extent and no descriptor.
pub(super) fn is_sparse(path: &Path, file: &File) -> Result<bool, FormatError> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == SERVER_MAGIC => {
            Err(FormatError::refused(path, Rule::Unsupported("a COWD extent: convert it with qemu-img convert")))
        }
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(FormatError::io(path, error)),
    }
}

impl SparseVmdk {
    pub(super) fn open(path: &Path, file: File, policy: &ImportPolicy) -> Result<Self, FormatError> {
        let io = |error| FormatError::io(path, error);
        let file_len = file.metadata().map_err(io)?.len();
        if file_len < SECTOR_SIZE {
            return Err(FormatError::refused(path, Rule::NotThisFormat(Format::Vmdk)));
        }
        let mut header = [0; SECTOR_SIZE as usize];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        let shape = Shape::read(&header, file_len).map_err(|rule| FormatError::refused(path, rule))?;
        // Before its directory is read: in a file of holes, that may be as long as it likes.
        policy.check_size(path, ByteSize::new(shape.len))?;
        let mut descriptor = vec![0; shape.descriptor_len as usize];
        file.read_exact_at(&mut descriptor, shape.descriptor_at).map_err(io)?;
        check_descriptor(&descriptor).map_err(|rule| FormatError::refused(path, rule))?;
        let mut directory = vec![0; (shape.tables * 4) as usize];
        file.read_exact_at(&mut directory, shape.directory_at).map_err(io)?;
        let directory: Vec<u32> = directory.chunks_exact(4).map(|entry| Fields(entry).u32(0)).collect();
        check_directory(&directory, file_len).map_err(|rule| FormatError::refused(path, rule))?;
        let Shape { len, grain, zero_grains, .. } = shape;
        Ok(Self { file, file_len, len, grain, directory, zero_grains })
    }

    pub(super) fn len(&self) -> ByteSize {
        ByteSize::new(self.len)
    }

    /// Where the bytes from `at` on lie in the file, `None` where they are zeroes, and for how many of the next `most` that is so; `at` is inside.
    pub(super) fn find(&self, path: &Path, at: u64, most: u64) -> Result<(Option<u64>, u64), FormatError> {
        let end = at.saturating_add(most).min(self.len);
        let (first, table) = (at / self.grain, at / self.grain / PER_TABLE);
        let table_end = ((table + 1) * PER_TABLE * self.grain).min(end);
        let table_at = u64::from(self.directory[table as usize]) * SECTOR_SIZE;
        if table_at == 0 {
            return Ok((None, table_end - at));
        }
        // The entries of the grains asked for, which are neighbours.
        let grains = (table_end.div_ceil(self.grain) - first) as usize;
        let mut bytes = [0; TABLE_BYTES as usize];
        let entries = &mut bytes[..grains * 4];
        let io = |error| FormatError::io(path, error);
        self.file.read_exact_at(entries, table_at + first % PER_TABLE * 4).map_err(io)?;
        let mut entries = entries.chunks_exact(4).map(|entry| self.place(Fields(entry).u32(0)));
        let place = entries.next().unwrap_or_default();
        let mut same = 1;
        for next in entries {
            let goes_on = match place {
                None => next.is_none(),
                Some(sector) => next == Some(sector + same * self.grain / SECTOR_SIZE),
            };
            if !goes_on {
                break;
            }
            same += 1;
        }
        let run = ((first + same) * self.grain).min(end) - at;
        let Some(sector) = place else { return Ok((None, run)) };
        let from = sector * SECTOR_SIZE + at % self.grain;
        // The last grain may be cut where the disk ends, as the file may end within it.
        if from + run > self.file_len.next_multiple_of(self.grain) {
            let rule = Rule::Truncated { at: from + run, file: ByteSize::new(self.file_len) };
            return Err(FormatError::refused(path, rule));
        }
        Ok((Some(from), run))
    }

    fn place(&self, entry: u32) -> Option<u64> {
        match entry {
            0 => None,
            ZERO_GRAIN if self.zero_grains => None,
            sector => Some(u64::from(sector)),
        }
    }

    /// Reads what [`SparseVmdk::find`] has found.
    pub(super) fn read(&self, path: &Path, from: u64, buf: &mut [u8]) -> Result<(), FormatError> {
        let held = self.file_len.saturating_sub(from).min(buf.len() as u64) as usize;
        buf[held..].fill(0);
        self.file.read_exact_at(&mut buf[..held], from).map_err(|error| FormatError::io(path, error))
    }
}

/// What the header says.
struct Shape {
    len: u64,
    grain: u64,
    tables: u64,
    directory_at: u64,
    descriptor_at: u64,
    descriptor_len: u64,
    zero_grains: bool,
}

impl Shape {
    fn read(header: &[u8], file: u64) -> Result<Self, Rule> {
        let fields = Fields(header);
        let malformed = |what: &str| Err(Rule::Malformed(what.to_owned()));
        let (version, flags) = (fields.u32(4), fields.u32(8));
        if !(1..=3).contains(&version) {
            return Err(Rule::Version(version));
        }
        if flags & (COMPRESSED | MARKERS) != 0 || fields.u16(77) != 0 {
            return Err(Rule::Unsupported(
                "streamOptimized: its grains are compressed; convert it with qemu-img convert",
            ));
        }
        let known = HAS_LINE_ENDS | HAS_SECOND_DIRECTORY | HAS_ZERO_GRAINS;
        if flags & !known != 0 {
            return Err(Rule::Features(u64::from(flags & !known)));
        }
        if flags & HAS_LINE_ENDS != 0 && header[73..77] != *b"\n \r\n" {
            return malformed("it was transferred as text: its line ends were changed");
        }
        if header[72] != 0 {
            return Err(Rule::Dirty);
        }
        let (sectors, grain_sectors) = (fields.u64(12), fields.u64(20));
        if sectors == 0 {
            return Err(Rule::Empty);
        }
        if !GRAIN_SECTORS.contains(&grain_sectors) || !grain_sectors.is_power_of_two() {
            return malformed("grains are not 4 KiB to 2 MiB");
        }
        if u64::from(fields.u32(44)) != PER_TABLE {
            return malformed("grain tables of other than 512 entries");
        }
        let too_long = Rule::VirtualSize { size: ByteSize::new(u64::MAX), limit: crate::page::Geometry::MAX_LEN };
        let len = sectors.checked_mul(SECTOR_SIZE).ok_or(too_long)?;
        let grain = grain_sectors * SECTOR_SIZE;
        let tables = len.div_ceil(grain * PER_TABLE);
        let place = |table, sector: u64, len: u64| {
            let at = sector.saturating_mul(SECTOR_SIZE);
            match at.checked_add(len) {
                Some(end) if at >= SECTOR_SIZE && end <= file => Ok(at),
                _ => Err(Rule::Table { table, at, len: ByteSize::new(len), file: ByteSize::new(file) }),
            }
        };
        let descriptor_len = fields.u64(36).saturating_mul(SECTOR_SIZE);
        if descriptor_len == 0 {
            return Err(Rule::Unsupported("an extent without a descriptor: name the file that has it"));
        }
        if descriptor_len > LONGEST_DESCRIPTOR {
            return malformed("a descriptor over 2 MiB");
        }
        Ok(Self {
            len,
            grain,
            tables,
            directory_at: place("grain directory", fields.u64(56), tables * 4)?,
            descriptor_at: place("descriptor", fields.u64(28), descriptor_len)?,
            descriptor_len,
            zero_grains: flags & HAS_ZERO_GRAINS != 0,
        })
    }
}

/// The text in the file: it must speak of this one extent, and of no parent.
fn check_descriptor(bytes: &[u8]) -> Result<(), Rule> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let mut found = lines.filter(|(name, _)| name.trim().eq_ignore_ascii_case(key));
        found.next().map(|(_, value)| value.trim().trim_matches('"').to_ascii_lowercase())
    };
    if value("parentCID").is_some_and(|parent| parent != "ffffffff") || value("parentFileNameHint").is_some() {
        return Err(Rule::Unsupported("a delta link: flatten it with qemu-img convert"));
    }
    match value("createType").as_deref() {
        Some("monolithicsparse") => Ok(()),
        Some("streamoptimized") => {
            Err(Rule::Unsupported("streamOptimized: its grains are compressed; convert it with qemu-img convert"))
        }
        _ => Err(Rule::Malformed("its descriptor does not say that it is monolithicSparse".into())),
    }
}

/// Every table lies in the file, and none is used twice: a few tables could otherwise stand for any amount of data.
fn check_directory(directory: &[u32], file: u64) -> Result<(), Rule> {
    let mut tables: Vec<u32> = directory.iter().copied().filter(|table| *table != 0).collect();
    for table in &tables {
        let at = u64::from(*table) * SECTOR_SIZE;
        if at + TABLE_BYTES > file {
            let (len, file) = (ByteSize::new(TABLE_BYTES), ByteSize::new(file));
            return Err(Rule::Table { table: "grain table", at, len, file });
        }
    }
    tables.sort_unstable();
    if tables.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Rule::Malformed("a grain table that is used twice".into()));
    }
    Ok(())
}
