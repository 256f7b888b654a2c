//! Layers of mapped RAM: sealed memory files, position-addressed and sparse.
//!
//! Page `n` of a space lies at its own offset in whichever layer holds it; a page of zeroes is a hole there. There is no allocator in a
//! layer and nothing to corrupt. A layer is sealed before anybody else can name it, and is closed when the last map of an image that
//! names it goes. Must not know which VM maps it.

use std::num::NonZeroU64;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::MappedImage;
use crate::account::{Allocated, Charge, Item};
use crate::backing::Tree;
use crate::error::SpaceError;
use crate::image::Source;
use crate::overlay::{Index, PageRef, PageState};
use crate::page::{ByteSize, Geometry, PageIndex, PageRange, PageSet, PageSize, is_zero};
use crate::sync::OnceLock;
use crate::sys::error::SysError;
use crate::sys::mapping::Mapping;
use crate::sys::memfd::{Memfd, SealError, SealedMemfd};
use crate::sys::pagemap::Pagemap;

/// The kernel's page: what its page tables and mappings count in.
pub(super) const HOST_PAGE: PageSize = PageSize::KIB_4;

/// One sealed memory file.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) file: LayerFile,
    _charge: Charge,
}

/// The file of a layer, sealed. A layer may be there before that: whoever fills its file shows it to nobody until the file is sealed.
#[derive(Debug)]
pub(super) struct LayerFile(OnceLock<SealedMemfd>);

impl Deref for LayerFile {
    type Target = SealedMemfd;

    fn deref(&self) -> &SealedMemfd {
        self.0.get().expect("an image is only made of sealed layers")
    }
}

impl Layer {
    pub(super) fn new(tree: &Tree, file: SealedMemfd) -> Arc<Self> {
        Self::with(tree, OnceLock::from(file))
    }

    /// A layer whose file is still being written by whoever calls this.
    pub(super) fn promised(tree: &Tree) -> Arc<Self> {
        Self::with(tree, OnceLock::new())
    }

    /// Gives a promised layer its file.
    pub(super) fn fulfil(&self, file: SealedMemfd) {
        let again = self.file.0.set(file);
        debug_assert!(again.is_ok(), "a layer has one file");
    }

    fn with(tree: &Tree, file: OnceLock<SealedMemfd>) -> Arc<Self> {
        let layer = Arc::new(Self { file: LayerFile(file), _charge: tree.0.charge(Item::MemoryFile) });
        let weak: Weak<Self> = Arc::downgrade(&layer);
        tree.0.register_file(weak);
        layer
    }
}

impl Allocated for Layer {
    fn allocated(&self) -> ByteSize {
        // fstat(2) of a file that is open cannot fail; if it does, the file counts for nothing. So does one that is not sealed yet.
        self.file.0.get().and_then(|file| file.allocated().ok()).unwrap_or(ByteSize::ZERO)
    }
}

/// What a page of a layer holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// Bytes, or what the guest never touched of the first layer.
    Data,
    /// Nothing: known to be zeroes when the layer was sealed.
    Hole,
}

/// Which bytes a page holds: the number of the cut, within the family, that sealed them, and whether they are known to be zeroes. Stays
/// the same when the bytes move to another layer, so that relatives are compared exactly whatever was merged; says nothing of where
/// they lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Version(NonZeroU64);

impl Version {
    /// Zeroed by a discard, in whichever VM.
    pub(super) const ZEROED: Self = Self(NonZeroU64::MIN);

    pub(super) fn is_hole(self) -> bool {
        self.0.get() & 1 == 1
    }
}

impl PageRef for Version {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

/// One cut of a family, as far as versions tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CutNumber(NonZeroU64);

impl CutNumber {
    /// What a page holds that this cut sealed.
    pub(super) fn version(self, content: Content) -> Version {
        Version(self.0.saturating_mul(NonZeroU64::MIN.saturating_add(1)) | u64::from(content == Content::Hole))
    }
}

/// What all relatives share besides layers: made when first needed.
#[derive(Debug, Default)]
pub(super) struct Family {
    pagemap: OnceLock<Pagemap>,
    zero: OnceLock<Arc<Layer>>,
    cuts: AtomicU64,
    /// Held by whoever merges layers.
    pub(super) merging: Mutex<()>,
}

impl Family {
    /// A number for a cut; never given again.
    pub(super) fn number(&self) -> CutNumber {
        // Relaxed: only uniqueness is asked of it. 2^63 cuts are more than anybody makes.
        CutNumber(NonZeroU64::MIN.saturating_add(self.cuts.fetch_add(1, Ordering::Relaxed)))
    }

    /// Whether it is the layer of nothing but holes.
    pub(super) fn is_zero(&self, layer: &Arc<Layer>) -> bool {
        self.zero.get().is_some_and(|zero| Arc::ptr_eq(zero, layer))
    }

    /// The handle to this process's page tables.
    pub(super) fn pagemap(&self) -> Result<&Pagemap, SpaceError> {
        if let Some(pagemap) = self.pagemap.get() {
            return Ok(pagemap);
        }
        let opened = Pagemap::open()?;
        Ok(self.pagemap.get_or_init(|| opened))
    }

    /// A layer of nothing but holes: what discarded pages show. A page of it takes memory once somebody reads it, for the whole family
    /// together: the kernel has no shared zero page for memory files.
    pub(super) fn zero(&self, tree: &Tree, len: ByteSize) -> Result<&Arc<Layer>, SpaceError> {
        if let Some(layer) = self.zero.get() {
            return Ok(layer);
        }
        let file = seal_file(Memfd::create("offshoot-zero", len)?)?;
        let layer = Layer::new(tree, file);
        Ok(self.zero.get_or_init(|| layer))
    }
}

/// Seals a file that was only ever written by calls.
pub(super) fn seal_file(file: Memfd) -> Result<SealedMemfd, SpaceError> {
    file.seal_all().map_err(|failed| seal_error(failed.error))
}

pub(super) fn seal_error(error: SealError) -> SpaceError {
    match error {
        SealError::Busy => SysError::Misuse("pages of a layer are still pinned: drain I/O in Guest::pause").into(),
        SealError::Sys(error) => error.into(),
    }
}

/// A new layer under construction.
pub(super) struct LayerBuilder {
    layer: Arc<Layer>,
    geometry: Geometry,
    file: Memfd,
    data: PageSet,
    holes: PageSet,
}

impl LayerBuilder {
    pub(super) fn new(tree: &Tree, geometry: Geometry) -> Result<Self, SpaceError> {
        tree.0.check_room_for_file()?;
        let file = Memfd::create("offshoot-layer", geometry.len())?;
        Ok(Self { layer: Layer::promised(tree), geometry, file, data: PageSet::new(), holes: PageSet::new() })
    }

    /// What it will be. Its file is not to be asked for before the end.
    pub(super) fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Copies `range` from a paused guest's memory. Runs are to come in ascending order.
    pub(super) fn copy_from(&mut self, mapping: &Mapping, range: PageRange) -> Result<(), SpaceError> {
        let copied = copy_run(&self.file, self.geometry, mapping, range)?;
        copied.data.runs().for_each(|run| self.data.push(run));
        copied.holes.runs().for_each(|run| self.holes.push(run));
        Ok(())
    }

    /// Takes `range` to be zeroes, unread. In order with what is copied.
    pub(super) fn leave_out(&mut self, range: PageRange) {
        self.holes.push(range);
    }

    /// Copies pages from an image, which says where there is anything to copy. Once, and nothing else with it.
    pub(super) fn copy_from_image(&mut self, image: &MappedImage, pages: &PageSet) -> Result<(), SpaceError> {
        let size = self.geometry.page_size();
        let mut bytes = vec![0; size.bytes().get() as usize];
        for page in image.data_in(pages)?.pages() {
            image.read(size.start_of(page), &mut bytes)?;
            if !is_zero(&bytes) {
                self.file.write_at(size.start_of(page), &bytes)?;
                self.data.push(PageRange::one(page));
            }
        }
        self.holes = pages.difference(&self.data);
        Ok(())
    }

    /// Seals the layer; says which pages are data in it, and which are holes.
    pub(super) fn finish(self) -> Result<Built, SpaceError> {
        self.layer.fulfil(seal_file(self.file)?);
        Ok(Built { layer: self.layer, data: self.data, holes: self.holes })
    }
}

/// What became of pages that were copied.
#[derive(Default)]
pub(super) struct CopiedRun {
    pub(super) data: PageSet,
    /// All zeroes: not written to the file.
    pub(super) holes: PageSet,
}

/// Copies `range` of a guest's memory to its place in a layer's file, pages of zeroes left out. Of a guest that runs on, bytes arrive old
/// or new.
pub(super) fn copy_run(
    file: &Memfd,
    geometry: Geometry,
    mapping: &Mapping,
    range: PageRange,
) -> Result<CopiedRun, SpaceError> {
    let mut copied = CopiedRun::default();
    let mut bytes = vec![0; geometry.page_size().bytes().get() as usize];
    for page in range.iter() {
        let at = geometry.page_size().start_of(page);
        // Most pages that hold anything hold something in their first word.
        let zero = mapping.load::<u64>(at)? == 0 && {
            mapping.read(at, &mut bytes)?;
            is_zero(&bytes)
        };
        let kind = if zero { &mut copied.holes } else { &mut copied.data };
        kind.push(PageRange::one(page));
    }
    for run in copied.data.runs() {
        file.write_at_from(mapping, host_pages(geometry, run))?;
    }
    Ok(copied)
}

/// A finished layer.
pub(super) struct Built {
    pub(super) layer: Arc<Layer>,
    pub(super) data: PageSet,
    pub(super) holes: PageSet,
}

impl Built {
    /// Names its pages in an index, as sealed by this cut.
    pub(super) fn name_in(&self, index: &mut Index<Version>, cut: CutNumber) {
        for (pages, content) in [(&self.data, Content::Data), (&self.holes, Content::Hole)] {
            let state = PageState::Data(cut.version(content));
            for run in pages.runs() {
                index.set(run, &state);
            }
        }
    }
}

/// Pages copied in one go: 1 MiB, so that whoever waits, or wants it stopped, is noticed soon.
const BATCH: usize = 256;

/// A run in pieces of at most 256 pages.
pub(super) fn in_batches(run: PageRange) -> impl Iterator<Item = PageRange> {
    let (start, end) = (run.start().get(), run.end().get());
    (start..end).step_by(BATCH).map(move |at| {
        let to = at.saturating_add(BATCH as u64).min(end);
        PageRange::from_bounds(PageIndex::new(at), PageIndex::new(to))
    })
}

/// Pages of a space as pages of the kernel's.
pub(super) fn host_pages(geometry: Geometry, range: PageRange) -> PageRange {
    let scale = geometry.page_size().shift() - HOST_PAGE.shift();
    let at = |page: PageIndex| PageIndex::new(page.get() << scale);
    PageRange::from_bounds(at(range.start()), at(range.end()))
}

/// Pages of the kernel's as the pages of a space that they touch.
pub(super) fn space_pages(geometry: Geometry, host: &PageSet) -> PageSet {
    let scale = geometry.page_size().shift() - HOST_PAGE.shift();
    let mut pages = PageSet::new();
    let mut from = 0;
    for run in host.runs() {
        let start = (run.start().get() >> scale).max(from);
        let end = ((run.end().get() - 1) >> scale) + 1;
        from = end.max(from);
        pages.push(PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end)));
    }
    pages
}
