//! From a source to a file: the whole of it, or what changed since an ancestor.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::import::{PIECE, Terms, copy_data};
use super::output::{Output, PartFile};
use super::policy::is_protocol;
use super::qcow2_header::LONGEST_NAME;
use super::qcow2_writer::Qcow2Writer;
use super::vmdk_writer::{GRAIN, VmdkWriter};
use super::{Format, FormatError, ImportedImage, Rule, Watch};
use crate::backing::Sealed;
use crate::disk::{AnySealed, DiskImage};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, GeometryError, PageSet, PageSize, SECTOR_SIZE, is_zero};

/// Size of a qcow2 cluster: a power of two from 4 KiB to 2 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterSize(PageSize);

impl ClusterSize {
    /// Clusters of `size` bytes; `None` unless it is a power of two from 4 KiB to 2 MiB.
    pub fn new(size: ByteSize) -> Option<Self> {
        PageSize::new(size).ok().map(Self)
    }

    fn bytes(self) -> u64 {
        self.0.bytes().get()
    }
}

impl Default for ClusterSize {
    /// 64 KiB, as `qemu-img` has it.
    fn default() -> Self {
        Self::new(ByteSize::kib(64)).unwrap_or(Self(PageSize::KIB_4))
    }
}

/// What to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ExportFormat {
    /// A sparse file with the bytes of the disk.
    Raw,
    /// qcow2, version 3, without a backing file.
    Qcow2(ClusterSize),
    /// VMDK, monolithicSparse.
    Vmdk,
}

impl Default for ExportFormat {
    fn default() -> Self {
        Self::Qcow2(ClusterSize::default())
    }
}

/// The backing file that a delta names: its path, as other tools will look it up from the delta's directory, and its format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackingName {
    /// At most 1023 bytes, and no protocol.
    pub name: String,
    /// What it is. Always written, so that nobody guesses.
    pub format: Format,
}

/// A disk of a fork point as a [`Source`]: its sectors, read from its image.
#[derive(Clone, Debug)]
pub struct DiskSource {
    image: Arc<dyn AnySealed>,
    len: ByteSize,
}

impl DiskSource {
    /// Reads `image`. Costs one reference.
    pub fn new(image: &DiskImage) -> Self {
        let len = ByteSize::new(image.capacity().get().saturating_mul(SECTOR_SIZE));
        Self { image: image.shared(), len }
    }
}

impl Source for DiskSource {
    fn len(&self) -> ByteSize {
        self.len
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let len = ByteSize::new(buf.len() as u64);
        // The space may be longer: it ends with a page.
        if at.checked_add(len).is_none_or(|end| end.get() > self.len.get()) {
            return Err(GeometryError::OutOfRange { at, len, space: self.len }.into());
        }
        self.image.read(at, buf)
    }

    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        let end = ByteOffset::new(self.len.get());
        let found = self.image.next_data(at)?.map(|found| found.start..found.end.min(end));
        Ok(found.filter(|found| !found.is_empty()))
    }
}

/// What changed between an ancestor and an image: the pages, and where to read them.
pub struct Delta {
    image: Box<dyn Source>,
    changed: PageSet,
    page: PageSize,
}

impl Delta {
    /// From `ancestor` to `image`.
    ///
    /// # Errors
    /// As [`Sealed::diff`].
    pub fn of_images<S: Sealed>(image: &S, ancestor: &S) -> Result<Self, SpaceError> {
        let changed = image.diff(ancestor)?;
        Ok(Self { image: Box::new(image.clone()), changed, page: image.geometry().page_size() })
    }

    /// From `ancestor` to `image`, disks of two fork points.
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] unless both come from one disk.
    pub fn of_disks(image: &DiskImage, ancestor: &DiskImage) -> Result<Self, SpaceError> {
        let changed = image.image().diff(ancestor.image())?;
        let source = DiskSource::new(image);
        let page = image.image().geometry().page_size();
        Ok(Self { image: Box::new(source), changed, page })
    }

    /// The pages that may differ.
    pub fn changed(&self) -> &PageSet {
        &self.changed
    }
}

impl std::fmt::Debug for Delta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delta").field("changed", &self.changed).field("page", &self.page).finish_non_exhaustive()
    }
}

/// Writes all of `source` to `target`, which is replaced if it is there. Zeroes take no space. Reads what [`Source::next_data`] names, so it costs by
/// data where the source has an index; one buffer of 2 MiB.
///
/// qcow2 and VMDK count in sectors: a part of one at the end is filled up with zeroes.
///
/// # Errors
/// What the source or the system says; [`FormatError::Cancelled`]; [`Rule::NotExportable`]. Nothing is left then, and an older
/// file at `target` is as it was.
pub fn export(
    source: &dyn Source,
    target: &Path,
    format: &ExportFormat,
    watch: &mut Watch<'_>,
) -> Result<(), FormatError> {
    export_on(source, target, *format, &mut Terms::new(watch))
}

impl ImportedImage {
    /// [`export`], within this image's [`ImportPolicy::data`](super::ImportPolicy::data).
    ///
    /// # Errors
    /// As [`export`]; [`Rule::Data`].
    pub fn convert(&self, target: &Path, format: &ExportFormat, watch: &mut Watch<'_>) -> Result<(), FormatError> {
        export_on(self, target, *format, &mut Terms::of(self, watch))
    }
}

fn export_on(
    source: &dyn Source,
    target: &Path,
    format: ExportFormat,
    terms: &mut Terms<'_, '_>,
) -> Result<(), FormatError> {
    let mut file = PartFile::create(target)?;
    match format {
        ExportFormat::Raw => write_raw(source, target, &mut file, terms)?,
        ExportFormat::Qcow2(cluster) => write_qcow2(source, target, &mut file, cluster, terms)?,
        ExportFormat::Vmdk => write_vmdk(source, target, &mut file, terms)?,
    }
    file.finish()
}

fn write_raw(
    source: &dyn Source,
    target: &Path,
    out: &mut impl Output,
    terms: &mut Terms<'_, '_>,
) -> Result<(), FormatError> {
    const GRANULE: u64 = 4096;
    let len = source.len().get();
    let io = |error| FormatError::io(target, error);
    out.set_len(len).map_err(io)?;
    copy_data(source, GRANULE, terms, |at, run| out.put(at, &run[..run.len().min((len - at) as usize)]).map_err(io))
}

/// The blocks of `size` bytes that are not all zeroes, by number.
fn data_blocks(
    source: &dyn Source,
    size: u64,
    terms: &mut Terms<'_, '_>,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    copy_data(source, size, terms, |at, run| {
        (at / size..).zip(run.chunks_exact(size as usize)).try_for_each(|(i, bytes)| put(i, bytes))
    })
}

fn write_qcow2(
    source: &dyn Source,
    target: &Path,
    out: &mut impl Output,
    cluster: ClusterSize,
    terms: &mut Terms<'_, '_>,
) -> Result<(), FormatError> {
    let cluster = cluster.bytes();
    let io = |error| FormatError::io(target, error);
    let mut writer = Qcow2Writer::new(out, cluster, sectors_len(source, target)?, None)
        .ok_or_else(|| FormatError::refused(target, TOO_SMALL_CLUSTERS))?;
    data_blocks(source, cluster, terms, |i, bytes| writer.data(i, bytes).map_err(io))?;
    writer.finish().map_err(io)
}

fn write_vmdk(
    source: &dyn Source,
    target: &Path,
    out: &mut impl Output,
    terms: &mut Terms<'_, '_>,
) -> Result<(), FormatError> {
    let io = |error| FormatError::io(target, error);
    let name = target.file_name().and_then(|name| name.to_str()).filter(|name| !name.contains(['"', '\n', '\r']));
    let name = name.filter(|name| name.len() < 256);
    let refused = |why| FormatError::refused(target, Rule::NotExportable(why));
    let name = name.ok_or_else(|| refused("a VMDK has its name in it: plain UTF-8 without quotes, below 256 bytes"))?;
    let mut writer = VmdkWriter::new(out, sectors_len(source, target)?, name)
        .ok_or_else(|| refused("a VMDK reaches no further than 2 TiB: use qcow2 or raw"))?;
    data_blocks(source, GRAIN, terms, |i, bytes| writer.data(i, bytes).map_err(io))?;
    writer.finish().map_err(io)
}

const TOO_SMALL_CLUSTERS: Rule = Rule::NotExportable("its L1 table would be over 32 MiB: use larger clusters");

fn sectors_len(source: &dyn Source, target: &Path) -> Result<u64, FormatError> {
    match source.len().get() {
        0 => Err(FormatError::refused(target, Rule::Empty)),
        len => Ok(len.next_multiple_of(SECTOR_SIZE)),
    }
}

/// Writes what changed as a qcow2 over a backing file, which must have the ancestor's content. A cluster in which a page changed is
/// written whole; one that is all zeroes becomes a zero cluster, which hides the backing file. Costs by what changed.
///
/// # Errors
/// As [`export`]; [`Rule::NotExportable`] or [`Rule::Protocol`] for the backing file's name.
pub fn export_delta(
    delta: &Delta,
    backing: &BackingName,
    target: &Path,
    cluster: ClusterSize,
    watch: &mut Watch<'_>,
) -> Result<(), FormatError> {
    let refused = |rule| Err(FormatError::refused(target, rule));
    if is_protocol(&backing.name) {
        return refused(Rule::Protocol(backing.name.clone()));
    }
    if backing.name.is_empty() || backing.name.contains('\0') || backing.name.len() > LONGEST_NAME as usize {
        return refused(Rule::NotExportable("a backing file's name has 1 to 1023 bytes, none of them zero"));
    }
    let mut file = PartFile::create(target)?;
    write_delta(delta, backing, target, &mut file, cluster, &mut Terms::new(watch))?;
    file.finish()
}

fn write_delta(
    delta: &Delta,
    backing: &BackingName,
    target: &Path,
    out: &mut impl Output,
    cluster: ClusterSize,
    terms: &mut Terms<'_, '_>,
) -> Result<(), FormatError> {
    let cluster = cluster.bytes();
    let io = |error| FormatError::io(target, error);
    let total = delta.image.len();
    let names = Some((backing.name.as_str(), backing.format.name()));
    let mut writer = Qcow2Writer::new(out, cluster, sectors_len(&*delta.image, target)?, names)
        .ok_or_else(|| FormatError::refused(target, TOO_SMALL_CLUSTERS))?;
    let mut buf = vec![0; PIECE as usize];
    // Clusters below this one are written.
    let mut next = 0;
    for run in delta.changed.runs() {
        let first = delta.page.start_of(run.start()).get() / cluster;
        let end = delta.page.start_of(run.end()).get().min(total.get()).div_ceil(cluster);
        next = next.max(first);
        while next < end {
            // What was discarded is known, and is not read.
            let data = delta.image.next_data(ByteOffset::new(next * cluster))?;
            let zeroes = data.map_or(end, |data| data.start.get() / cluster).min(end);
            (next..zeroes).try_for_each(|i| writer.zero(i).map_err(io))?;
            next = next.max(zeroes);
            if next == end {
                terms.tell((next * cluster).min(total.get()), total)?;
                break;
            }
            let count = (end - next).min(PIECE / cluster);
            let at = next * cluster;
            let whole = (count * cluster) as usize;
            let len = whole.min((total.get() - at) as usize);
            delta.image.read(ByteOffset::new(at), &mut buf[..len])?;
            buf[len..whole].fill(0);
            for (i, bytes) in (next..).zip(buf[..whole].chunks_exact(cluster as usize)) {
                let written = if is_zero(bytes) { writer.zero(i) } else { writer.data(i, bytes) };
                written.map_err(io)?;
            }
            next += count;
            terms.tell((next * cluster).min(total.get()), total)?;
        }
    }
    writer.finish().map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpaceError;
    use crate::frontend::formats::keep_going;

    /// 300 KiB of data with a hole.
    struct Pattern;

    impl Source for Pattern {
        fn len(&self) -> ByteSize {
            ByteSize::kib(300)
        }

        fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
            for (at, byte) in (at.get()..).zip(buf) {
                *byte = if (1 << 16..3 << 16).contains(&at) { 0 } else { (at >> 9) as u8 | 1 };
            }
            Ok(())
        }
    }

    /// A medium that is full at the n-th call.
    struct Full {
        left: usize,
        calls: usize,
    }

    impl Full {
        fn call(&mut self) -> std::io::Result<()> {
            self.calls += 1;
            self.left = self.left.checked_sub(1).ok_or(std::io::ErrorKind::StorageFull)?;
            Ok(())
        }
    }

    impl Output for Full {
        fn put(&mut self, _: u64, _: &[u8]) -> std::io::Result<()> {
            self.call()
        }

        fn set_len(&mut self, _: u64) -> std::io::Result<()> {
            self.call()
        }
    }

    #[test]
    fn a_full_medium_is_a_clean_error_at_every_call() {
        let target = Path::new("out");
        let changed = [(0, 16), (40, 75)].map(|(a, b)| {
            crate::page::PageRange::from_bounds(crate::page::PageIndex::new(a), crate::page::PageIndex::new(b))
        });
        let mut set = PageSet::new();
        changed.into_iter().for_each(|range| set.push(range));
        let delta = Delta { image: Box::new(Pattern), changed: set, page: PageSize::KIB_4 };
        let backing = BackingName { name: "base".into(), format: Format::Raw };
        type Write<'a> = &'a dyn Fn(&mut Full) -> Result<(), FormatError>;
        let cluster = ClusterSize::default();
        let writers: [Write<'_>; 4] = [
            &|out| write_raw(&Pattern, target, out, &mut Terms::new(&mut keep_going)),
            &|out| write_qcow2(&Pattern, target, out, cluster, &mut Terms::new(&mut keep_going)),
            &|out| write_vmdk(&Pattern, target, out, &mut Terms::new(&mut keep_going)),
            &|out| write_delta(&delta, &backing, target, out, cluster, &mut Terms::new(&mut keep_going)),
        ];
        for write in writers {
            let mut whole = Full { left: usize::MAX, calls: 0 };
            write(&mut whole).expect("there is room");
            assert!(whole.calls >= 3, "{} calls", whole.calls);
            for left in 0..whole.calls {
                match write(&mut Full { left, calls: 0 }) {
                    Err(FormatError::Io { error, .. }) => assert_eq!(error.kind(), std::io::ErrorKind::StorageFull),
                    other => panic!("call {left}: {other:?}"),
                }
            }
        }
    }
}
