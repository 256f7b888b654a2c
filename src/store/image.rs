//! An immutable image of a durable disk: a merged index over layers that lie in files.
//!
//! Nothing here writes a page of a layer that exists. Images that are made (flattened, merged) are sealed layers.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::access::{Found, read_through};
use super::copy::{Zeroes, copy_pages, copy_runs};
use super::directory::DiskDir;
use super::durable::{Durable, State};
use super::id::{DiskId, LayerId};
use super::job::Job;
use super::layer::{Body, Layer, Place};
use super::made::Made;
use super::map::{BLOCK_PAGES, MapBlock};
use super::overlay::Shape;
use super::record::BLOCK;
use super::sealed::{Run, Verified, Writer};
use crate::account::{Charge, Item};
use crate::backing::{Sealed, next_data_in};
use crate::error::{SpaceError, StoreError};
use crate::image::{Lineage, Source};
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageRange, PageSet};

/// An immutable image of a durable disk. Clones of it are one reference.
#[derive(Clone)]
pub struct DurableImage(Arc<Inner>);

pub(super) struct Inner {
    dir: DiskDir,
    shape: Shape,
    index: Index<Place>,
    top: Option<Arc<Layer>>,
    base: Option<Arc<dyn Source>>,
    lineage: Arc<Lineage>,
    _charge: Charge,
}

/// What the topmost layer of an image says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerInfo {
    /// Its name.
    pub id: LayerId,
    /// The layer that it lies on.
    pub parent: Option<LayerId>,
    /// For a sealed layer, a fingerprint of what it says: equal content has an equal one, whatever its id.
    pub content: Option<[u8; 16]>,
    /// Space that its file takes.
    pub allocated: ByteSize,
}

impl DurableImage {
    pub(super) fn root(dir: DiskDir, shape: Shape, base: Option<Arc<dyn Source>>) -> Self {
        let index = Index::uniform(shape.geometry.pages(), &PageState::Absent);
        Self::build(dir, shape, index, None, base, Lineage::root())
    }

    fn build(
        dir: DiskDir,
        shape: Shape,
        index: Index<Place>,
        top: Option<Arc<Layer>>,
        base: Option<Arc<dyn Source>>,
        lineage: Arc<Lineage>,
    ) -> Self {
        let charge = dir.tree().0.charge(Item::Image);
        Self(Arc::new(Inner { dir, shape, index, top, base, lineage, _charge: charge }))
    }

    /// The image one cut further on.
    pub(super) fn child(&self, index: Index<Place>, top: Option<Arc<Layer>>) -> Result<Self, SpaceError> {
        let lineage = self.0.lineage.child(self.0.dir.tree().limits().depth)?;
        let inner = &self.0;
        Ok(Self::build(inner.dir.clone(), inner.shape, index, top, inner.base.clone(), lineage))
    }

    /// The image with a layer that is on disk stacked on it. Depth is no reason to refuse what exists.
    pub(super) fn stack(&self, id: LayerId, body: Body) -> Result<Self, SpaceError> {
        let layer = Layer::new(id, body, self.0.top.clone());
        let mut index = self.0.index.clone();
        apply(&layer, &mut index, &self.blank())?;
        let lineage = self.0.lineage.child(u32::MAX)?;
        let inner = &self.0;
        Ok(Self::build(inner.dir.clone(), inner.shape, index, Some(layer), inner.base.clone(), lineage))
    }

    pub(super) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    /// Lets the directory find it again by its topmost layer, for disks and images that are opened while it is held.
    pub(super) fn remember(&self) {
        if let Some(top) = &self.0.top {
            self.0.dir.remember(top.id(), &self.0);
        }
    }

    pub(super) fn geometry_of(&self) -> Geometry {
        self.0.shape.geometry
    }

    pub(super) fn shape(&self) -> Shape {
        self.0.shape
    }

    pub(super) fn index(&self) -> &Index<Place> {
        &self.0.index
    }

    pub(super) fn top(&self) -> Option<&Arc<Layer>> {
        self.0.top.as_ref()
    }

    #[cfg(feature = "store")]
    pub(crate) fn top_id(&self) -> Option<LayerId> {
        self.0.top.as_ref().map(|top| top.id())
    }

    #[cfg(feature = "store")]
    pub(super) fn folder(&self) -> &dyn super::medium::Folder {
        self.0.dir.folder()
    }

    pub(super) fn base(&self) -> Option<&Arc<dyn Source>> {
        self.0.base.as_ref()
    }

    /// What a page that was zeroed is set to: below an image, it must hide it.
    pub(super) fn blank(&self) -> PageState<Place> {
        if self.0.base.is_some() { PageState::Zero } else { PageState::Absent }
    }

    /// Makes sure, durably, that nobody ever writes its layers again.
    pub(super) fn freeze(&self) -> Result<(), StoreError> {
        self.0.top.as_ref().map_or(Ok(()), |top| top.freeze())
    }

    /// Fills `buf` from below the layers: the base image, and zeroes past its end.
    pub(super) fn read_base(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let Some(base) = &self.0.base else {
            buf.fill(0);
            return Ok(());
        };
        let here = base.len().get().saturating_sub(at.get()).min(buf.len() as u64) as usize;
        buf[here..].fill(0);
        if here == 0 { Ok(()) } else { base.read(at, &mut buf[..here]) }
    }

    /// The pages that the base image holds a part of.
    pub(super) fn base_pages(&self) -> PageRange {
        let len = self.0.base.as_ref().map_or(0, |base| base.len().get());
        PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(len.div_ceil(BLOCK as u64)))
    }

    /// How many pages an index leaves to the base image.
    pub(super) fn base_pages_under(&self, index: &Index<Place>) -> u64 {
        let pages = self.base_pages();
        let covered = index.tally_in(pages);
        pages.count().get() - covered.data - covered.zero
    }

    pub(super) fn layers(&self) -> u32 {
        let files = self.0.top.as_ref().map_or(0, |top| top.depth());
        files.saturating_add(u32::from(self.0.base.is_some()))
    }

    /// Its topmost layer, where it has one.
    ///
    /// # Errors
    /// What the system says.
    pub fn layer(&self) -> Result<Option<LayerInfo>, SpaceError> {
        let Some(top) = &self.0.top else { return Ok(None) };
        let content = top.sealed().map(|sealed| sealed.content());
        Ok(Some(LayerInfo { id: top.id(), parent: top.body().parent(), content, allocated: top.allocated()? }))
    }

    /// Checks every page of its sealed layers against its checksum, on the threads given, watched: layer by layer, the topmost first.
    /// Overlays have no checksums for their pages, and are left out.
    ///
    /// # Errors
    /// A table that is damaged, or a page that cannot be read. Pages that do not match their checksums are no error: they are named.
    pub fn verify(&self, threads: &rayon::ThreadPool, job: &Job<'_>) -> Result<Vec<(LayerId, Verified)>, SpaceError> {
        let mut found = Vec::new();
        let mut next = self.0.top.clone();
        while let Some(layer) = next {
            if let Some(sealed) = layer.sealed() {
                let id = layer.id();
                found.push((id, sealed.verify(threads, job)?));
            }
            next = layer.below();
        }
        Ok(found)
    }

    /// Rewrites its topmost layer in the sealed form, beside the old one, which stays in use by whoever has it open. Disks that are opened from then on use
    /// the new file. Nothing to do where the layer is sealed already, or where there is none. Costs a copy of the layer's pages; called inside a rayon pool
    /// (`ThreadPool::install`), as a flatten or a merge may be, it reads and writes at the same time.
    ///
    /// # Errors
    /// What the medium says, or [`StoreError::Cancelled`]. There is then no new file.
    pub fn seal(&self, job: &Job<'_>) -> Result<(), SpaceError> {
        let Some(top) = &self.0.top else { return Ok(()) };
        let Some(overlay) = top.overlay() else { return Ok(()) };
        top.freeze()?;
        let folder = self.0.dir.shared_folder();
        let mut writer = Writer::create(folder, top.id(), overlay.parent(), self.0.shape)?;
        let mut runs = Vec::new();
        overlay.load(|start, block| {
            let block = block?;
            let first = runs.len();
            runs.extend(MapBlock::runs(&block.data).into_iter().map(|run| Run::Read(moved(run, start))));
            runs.extend(MapBlock::runs(&block.zero).into_iter().map(|run| Run::Zero(moved(run, start))));
            runs[first..].sort_unstable_by_key(|run| run.range().start());
            Ok(())
        })?;
        let read_pages = |run: &Run| if let Run::Read(range) = run { range.count().get() } else { 0 };
        let total = runs.iter().map(read_pages).sum();
        let read = |range: PageRange, buf: &mut [u8]| overlay.read(range.start().get() * BLOCK as u64, buf);
        copy_runs::<StoreError>(&mut writer, runs.into_iter(), total, Zeroes::Data, job, read)?;
        writer.finish()?;
        // The old file has done its duty. Where its name cannot be taken away it is passed over from now on.
        if let Err(error) = self.0.dir.folder().remove(overlay.file().name()) {
            tracing::warn!(%error, file = %overlay.file().name(), "an overlay that was sealed was left behind");
        }
        Ok(())
    }

    fn check_related(&self, other: &Self) -> Result<(), SpaceError> {
        if self.0.lineage.related(&other.0.lineage) {
            return Ok(());
        }
        Err(SpaceError::Unrelated("the images do not come from one parent: compare or merge relatives only"))
    }

    /// Copies pages into a new sealed layer over `below`, which is an image from then on: of the cut that `lineage` says. Its file goes with the claim,
    /// until that is told to keep it.
    pub(super) fn sealed_over(
        &self,
        below: &Self,
        lineage: Arc<Lineage>,
        pages: &PageSet,
        zeroes: Zeroes,
        job: &Job<'_>,
    ) -> Result<(Self, Made), SpaceError> {
        let dir = &self.0.dir;
        let made = Made::new(dir)?;
        let parent = below.0.top.as_ref().map(|layer| layer.id());
        let mut writer = Writer::create(dir.shared_folder(), made.id(), parent, below.0.shape)?;
        copy_pages(self, pages, zeroes, &mut writer, job)?;
        writer.finish()?;
        let stacked = below.stack(made.id(), Layer::open(dir.folder(), made.id())?)?;
        Ok((stacked.of_cut(lineage), made))
    }

    /// The same image as that of another cut, which must have the same content.
    pub(super) fn of_cut(&self, lineage: Arc<Lineage>) -> Self {
        let Inner { dir, shape, index, top, base, .. } = &*self.0;
        let image = Self::build(dir.clone(), *shape, index.clone(), top.clone(), base.clone(), lineage);
        image.remember();
        image
    }

    pub(super) fn lineage(&self) -> &Arc<Lineage> {
        &self.0.lineage
    }

    pub(super) fn dir(&self) -> &DiskDir {
        &self.0.dir
    }

    /// The pages that have to be copied for the content not to need any layer.
    pub(super) fn pages_over_base(&self) -> PageSet {
        let mut pages = PageSet::new();
        for (run, state) in self.0.index.runs(self.0.shape.geometry.all()) {
            if !matches!(state, PageState::Absent) {
                pages.push(run);
            }
        }
        pages
    }
}

fn moved(run: PageRange, start: PageIndex) -> PageRange {
    let page = |page: PageIndex| PageIndex::new(start.get() + page.get());
    PageRange::from_bounds(page(run.start()), page(run.end()))
}

/// Lays what a layer says over an index.
fn apply(layer: &Arc<Layer>, index: &mut Index<Place>, blank: &PageState<Place>) -> Result<(), StoreError> {
    match layer.body() {
        Body::Overlay(overlay) => overlay.load(|start, block| {
            match block {
                Ok(block) => {
                    for run in MapBlock::runs(&block.zero) {
                        index.set(moved(run, start), blank);
                    }
                    for run in MapBlock::runs(&block.data) {
                        index.set(moved(run, start), &PageState::Data(Place::positional(layer.clone())));
                    }
                }
                // Any page of this part may be its own, and none can be told: reading one is an error that names it.
                Err(error) => {
                    tracing::error!(%error, "a part of a layer cannot be read");
                    let end = PageIndex::new((start.get() + BLOCK_PAGES).min(index.pages().get()));
                    let part = PageRange::from_bounds(start, end);
                    index.set(part, &PageState::Data(Place::damaged(layer.clone())));
                }
            }
            Ok(())
        }),
        Body::Sealed(sealed) => sealed.extents(|range, data| {
            match data {
                Some(at) => {
                    index.set(range, &PageState::Data(Place::extent(layer.clone(), range.start(), at)));
                }
                None => {
                    index.set(range, blank);
                }
            }
            Ok(())
        }),
    }
}

impl fmt::Debug for DurableImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableImage")
            .field("layer", &self.0.top.as_ref().map(|top| top.id()))
            .field("data", &self.0.index.tally().data)
            .field("depth", &self.depth())
            .finish_non_exhaustive()
    }
}

impl Source for DurableImage {
    fn len(&self) -> ByteSize {
        self.0.shape.geometry.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.0.shape.geometry.check(at, ByteSize::new(buf.len() as u64))?;
        read_through(self, None, at.get(), buf, |page| Found::from(self.0.index.get(page)))
    }

    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        next_data_in(&self.0.index, self.0.shape.geometry.page_size(), self.0.base.as_deref(), at)
    }
}

impl Sealed for DurableImage {
    type Live = Durable;

    fn geometry(&self) -> Geometry {
        self.0.shape.geometry
    }

    fn spawn(&self) -> Result<Durable, SpaceError> {
        let id = DiskId::random().map_err(|error| self.0.dir.no_id(error))?;
        Ok(Durable::new(self.0.dir.clone(), id, State::over(self.clone()), None))
    }

    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        self.check_related(other)?;
        Ok(self.0.index.diff(&other.0.index))
    }

    fn flatten(&self) -> Result<Self, SpaceError> {
        let shape = Shape { base_len: None, ..self.0.shape };
        let below = Self::root(self.0.dir.clone(), shape, None);
        // Only pages that something lies behind are looked at, however large the disk.
        let mut pages = PageSet::new();
        for (run, state) in self.0.index.runs(self.0.shape.geometry.all()) {
            match state {
                PageState::Data(_) => pages.push(run),
                PageState::Absent => pages.push(run.intersect(self.base_pages())),
                PageState::Zero => {}
            }
        }
        let (image, mut made) = self.sealed_over(&below, Lineage::root(), &pages, Zeroes::LeftOut, &Job::new())?;
        made.keep();
        Ok(image)
    }

    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        if !self.0.lineage.descends_from(&ancestor.0.lineage) || self.same(ancestor) {
            return Err(SpaceError::Unrelated("layers are merged onto an ancestor: name one of this image's"));
        }
        let lineage = ancestor.0.lineage.child(self.0.dir.tree().limits().depth)?;
        ancestor.freeze()?;
        let pages = ancestor.0.index.diff(&self.0.index);
        let (image, mut made) = self.sealed_over(ancestor, lineage, &pages, Zeroes::Kept, &Job::new())?;
        made.keep();
        Ok(image)
    }

    fn depth(&self) -> u32 {
        self.0.lineage.depth()
    }

    fn same(&self, other: &Self) -> bool {
        // An image whose layers were merged under an open disk is of the same cut still.
        Arc::ptr_eq(&self.0.lineage, &other.0.lineage)
    }

    fn validate(&self) -> Result<(), String> {
        self.0.index.validate()?;
        // Every layer that the index names is one that the image keeps.
        let mut layers = std::collections::HashSet::new();
        let mut next = self.0.top.clone();
        while let Some(layer) = next {
            layers.insert(layer.id());
            next = layer.below();
        }
        let named = self.0.index.runs(self.0.shape.geometry.all());
        match named
            .iter()
            .find(|(_, state)| matches!(state, PageState::Data(place) if !layers.contains(&place.layer().id())))
        {
            Some((run, _)) => Err(format!("{run:?} lie in a layer that is not one of the image's")),
            None => Ok(()),
        }
    }
}
