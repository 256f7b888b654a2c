//! An immutable image of mapped RAM: an index that says which bytes each page holds, and the layers that they lie on now.
//!
//! A *root* image, before the first cut, has no layer and reads as its base. Any other has a layer for every page. Nothing here
//! writes a page; a merge in the background may move all of them to other layers.

use std::fmt;
use std::ops::Range;
#[cfg(any(feature = "qemu", feature = "uffd"))]
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Mapped;
use super::layer::{Content, Family, Layer, LayerBuilder, Version, host_pages};
use super::layer_map::LayerMap;
use super::merge::{self, Due, Laid};
use crate::account::{Charge, Item};
use crate::backing::{Prefault, Sealed, Tree, next_data_in};
use crate::error::SpaceError;
use crate::image::{Lineage, Source};
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageCount, PageIndex, PageRange, PageSet};
use crate::sys::error::SysError;
use crate::sys::mapping::{Mapping, Placement};

/// An immutable image of mapped RAM.
#[derive(Clone)]
pub struct MappedImage(Arc<Inner>);

struct Inner {
    tree: Tree,
    geometry: Geometry,
    family: Arc<Family>,
    index: Index<Version>,
    /// `None`: a root image.
    laid: Option<Arc<Laid>>,
    base: Option<Arc<dyn Source>>,
    lineage: Arc<Lineage>,
    _charge: Charge,
}

/// What the image of a cut is made of.
pub(super) struct Parts {
    pub(super) index: Index<Version>,
    pub(super) map: LayerMap,
}

impl MappedImage {
    pub(super) fn root(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        if let Some(base) = &base {
            let (len, space) = (base.len(), geometry.len());
            if len > space {
                return Err(GeometryError::OutOfRange { at: ByteOffset::ZERO, len, space }.into());
            }
        }
        let index = Index::uniform(geometry.pages(), &PageState::Absent);
        let (_charge, tree, family) = (tree.0.charge(Item::Image), tree.clone(), Arc::default());
        let lineage = Lineage::root();
        Ok(Self(Arc::new(Inner { tree, geometry, family, index, laid: None, base, lineage, _charge })))
    }

    fn build(&self, family: Arc<Family>, index: Index<Version>, laid: Arc<Laid>, lineage: Arc<Lineage>) -> Self {
        let (tree, geometry) = (self.0.tree.clone(), self.0.geometry);
        let (_charge, laid) = (tree.0.charge(Item::Image), Some(laid));
        Self(Arc::new(Inner { tree, geometry, family, index, laid, base: None, lineage, _charge }))
    }

    /// Whether there may be an image one cut further on.
    pub(super) fn check_depth(&self) -> Result<(), SpaceError> {
        self.0.lineage.child(self.0.tree.limits().depth).map(drop)
    }

    /// Whether there may be an image of the first cut.
    pub(super) fn check_first(&self) -> Result<(), SpaceError> {
        merge::check_whole(self.0.tree.limits())?;
        self.check_depth()
    }

    /// The image one cut further on. `parts` makes it of this image's layers, or, of a root image's space that is private already, of `own`.
    ///
    /// # Errors
    /// [`SpaceError::DepthLimit`], [`SpaceError::LayerLimit`], [`SpaceError::MappingLimit`], and those of `parts`.
    pub(super) fn child(
        &self,
        own: Option<Arc<Layer>>,
        parts: impl FnOnce(&LayerMap) -> Result<Parts, SpaceError>,
    ) -> Result<Self, SpaceError> {
        let inner = &self.0;
        let lineage = inner.lineage.child(inner.tree.limits().depth)?;
        let now = match (&inner.laid, own) {
            (Some(laid), _) => laid.now(),
            (None, Some(layer)) => Arc::new(LayerMap::uniform(inner.geometry.pages(), layer)),
            (None, None) => return Err(SysError::Misuse("a root image has no layers to cut from").into()),
        };
        let Parts { index, map } = parts(&now)?;
        merge::check(&map, inner.tree.limits())?;
        let laid = match &inner.laid {
            Some(laid) => laid.child(now, map),
            None => Laid::new(&inner.tree, inner.geometry, &inner.family, map),
        };
        Ok(self.build(inner.family.clone(), index, laid, lineage))
    }

    /// Has its layers merged as far as the limits ask for it, now.
    pub(super) fn settle(&self) -> Result<(), SpaceError> {
        self.0.laid.clone().map_or(Ok(()), Laid::settle)
    }

    /// The image of the first cut: all of it on one layer.
    pub(super) fn first(&self, layer: Arc<Layer>) -> Result<Self, SpaceError> {
        let inner = &self.0;
        let lineage = inner.lineage.child(inner.tree.limits().depth)?;
        let pages = inner.geometry.pages();
        let version = inner.family.number().version(Content::Data);
        let index = Index::uniform(pages, &PageState::Data(version));
        let laid = Laid::new(&inner.tree, inner.geometry, &inner.family, LayerMap::uniform(pages, layer));
        Ok(self.build(inner.family.clone(), index, laid, lineage))
    }

    /// The merge of layers that the limits ask for.
    pub(super) fn due(&self) -> Option<Due> {
        self.0.laid.as_ref()?.due()
    }

    /// The layers of every page, now; `None` of a root image.
    pub(super) fn map(&self) -> Option<Arc<LayerMap>> {
        self.0.laid.as_ref().map(|laid| laid.now())
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.0.tree
    }

    pub(super) fn family(&self) -> &Arc<Family> {
        &self.0.family
    }

    pub(super) fn index(&self) -> &Index<Version> {
        &self.0.index
    }

    /// Whether it names no layer yet.
    pub(super) fn is_root(&self) -> bool {
        self.0.laid.is_none()
    }

    /// The base of a root image; fills with zeroes past its end.
    fn read_base(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let len = self.0.base.as_ref().map_or(0, |base| base.len().get());
        let here = len.saturating_sub(at.get()).min(buf.len() as u64) as usize;
        buf[here..].fill(0);
        match &self.0.base {
            Some(base) if here > 0 => base.read(at, &mut buf[..here]),
            _ => Ok(()),
        }
    }

    /// The pages that a root image's base reaches.
    pub(super) fn base_pages(&self) -> PageRange {
        let len = self.0.base.as_ref().map_or(0, |base| base.len().get());
        let pages = len.div_ceil(self.0.geometry.page_size().bytes().get());
        PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(pages))
    }

    /// Layers that a clone maps.
    pub(super) fn layers(&self) -> u32 {
        self.map().map_or(u32::from(self.0.base.is_some()), |map| map.layers())
    }

    /// Maps the layers for a clone: as they lie now, unless that takes more mappings than a VM may have; then it waits for a merge.
    pub(super) fn map_at(&self, place: Placement) -> Result<Mapping, SpaceError> {
        let Some(laid) = &self.0.laid else { return Err(SysError::Misuse("a root image has no layer to map").into()) };
        let limit = self.0.tree.limits().mappings_per_vm;
        let mut map = laid.now();
        if map.mappings() > limit {
            self.settle()?;
            map = laid.now();
        }
        let (base, over) = map.plan();
        let extents: Vec<_> =
            over.into_iter().map(|(run, layer)| (host_pages(self.0.geometry, run), &*layer.file)).collect();
        Ok(Mapping::map_layers(&base.file, &extents, self.0.geometry.len(), place)?)
    }

    /// The one sealed file that shows the whole image, every byte at its own offset; `None` where it lies on several, or on none: a
    /// flattened image has one. The descriptor is the caller's own.
    #[cfg(any(feature = "qemu", feature = "uffd"))]
    pub(crate) fn whole_file(&self) -> Result<Option<OwnedFd>, SpaceError> {
        let Some(map) = self.map() else { return Ok(None) };
        let (base, over) = map.plan();
        if over.is_empty() { Ok(Some(base.file.share()?)) } else { Ok(None) }
    }

    /// Those of `pages` that may hold anything but zeroes: asks the kernel what the layers hold. Two calls for each run of data.
    pub(super) fn data_in(&self, pages: &PageSet) -> Result<PageSet, SpaceError> {
        let Some(map) = self.map() else {
            return Ok(pages.intersection(&PageSet::from(self.base_pages())));
        };
        let mut known = PageSet::new();
        for (run, state) in pages.runs().flat_map(|run| self.0.index.runs(run)) {
            if !is_hole(state) {
                known.push(run);
            }
        }
        let mut data = PageSet::new();
        for (layer, there) in map.by_layer(&known) {
            data = data.union(&merge::held_by(layer, self.0.geometry, &there)?);
        }
        Ok(data)
    }

    fn check_related(&self, other: &Self) -> Result<(), SpaceError> {
        if self.0.lineage.related(&other.0.lineage) {
            return Ok(());
        }
        Err(SpaceError::Unrelated("the images do not come from one parent: compare or merge relatives only"))
    }
}

/// Whether a page is known to be zeroes.
pub(super) fn is_hole(state: PageState<&Version>) -> bool {
    matches!(state, PageState::Data(version) if version.is_hole())
}

impl fmt::Debug for MappedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedImage")
            .field("geometry", &self.0.geometry)
            .field("depth", &self.depth())
            .finish_non_exhaustive()
    }
}

impl Source for MappedImage {
    fn len(&self) -> ByteSize {
        self.0.geometry.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let geometry = self.0.geometry;
        geometry.check(at, ByteSize::new(buf.len() as u64))?;
        if buf.is_empty() {
            return Ok(());
        }
        let Some(map) = self.map() else { return self.read_base(at, buf) };
        let (size, end) = (geometry.page_size(), at.get() + buf.len() as u64);
        let first = size.page_of(at);
        let last = size.page_of(ByteOffset::new(end - 1));
        let pages = PageRange::from_bounds(first, PageIndex::new(last.get() + 1));
        for (run, state) in self.0.index.runs(pages) {
            for (piece, layer) in map.runs(run) {
                let from = size.start_of(piece.start()).get().max(at.get());
                let to = size.start_of(piece.end()).get().min(end);
                let part = &mut buf[(from - at.get()) as usize..(to - at.get()) as usize];
                if is_hole(state) {
                    part.fill(0);
                } else {
                    layer.file.read_at(ByteOffset::new(from), part)?;
                }
            }
        }
        Ok(())
    }

    /// The kernel knows what the layers hold, so it is asked, of twice as much each time that nothing is there.
    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        let (geometry, size) = (self.0.geometry, self.0.geometry.page_size());
        if self.is_root() {
            return next_data_in(&self.0.index, size, self.0.base.as_deref(), at);
        }
        let (mut from, end) = (size.page_of(at), PageIndex::new(geometry.pages().get()));
        let mut window = PageCount::new(1 << 10);
        while from < end {
            let to = from.checked_add(window).map_or(end, |to| to.min(end));
            let asked = PageSet::from(PageRange::from_bounds(from, to));
            let first = self.data_in(&asked)?.runs().next();
            // The kernel walks a run to its end however little of it was asked for: a long one is asked for in few steps.
            if first.is_some_and(|run| run.end() == to) && to < end {
                window = window.saturating_add(window);
                continue;
            }
            if let Some(run) = first {
                return Ok(Some(at.max(size.start_of(run.start()))..size.start_of(run.end())));
            }
            (from, window) = (to, window.saturating_add(window));
        }
        Ok(None)
    }
}

impl Sealed for MappedImage {
    type Live = Mapped;

    fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    fn spawn(&self) -> Result<Mapped, SpaceError> {
        if self.is_root() { Mapped::fresh(self.clone()) } else { Mapped::over(self.clone()) }
    }

    fn clone_mappings(&self) -> u64 {
        // A root image is mapped with room to move it aside.
        let Some(map) = self.map() else { return 2 };
        // In more pieces than a VM may have, it is gathered first.
        map.mappings().min(self.0.tree.limits().mappings_per_vm)
    }

    fn prefault_copies(&self, prefault: &Prefault) -> PageCount {
        prefault.copies()
    }

    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        self.check_related(other)?;
        Ok(self.0.index.diff(&other.0.index))
    }

    /// The kernel is asked once for each run: it looks for the end of one as far as the file has data, so to ask piece by piece would cost the square.
    fn data(&self) -> Result<PageSet, SpaceError> {
        self.data_in(&PageSet::from(self.0.geometry.all()))
    }

    fn flatten(&self) -> Result<Self, SpaceError> {
        let (tree, geometry) = (&self.0.tree, self.0.geometry);
        merge::check_whole(tree.limits())?;
        let mut builder = LayerBuilder::new(tree, geometry)?;
        builder.copy_from_image(self, &PageSet::from(geometry.all()))?;
        let built = builder.finish()?;
        let family: Arc<Family> = Arc::default();
        let mut index = Index::uniform(geometry.pages(), &PageState::Absent);
        built.name_in(&mut index, family.number());
        let laid = Laid::new(tree, geometry, &family, LayerMap::uniform(geometry.pages(), built.layer));
        Ok(self.build(family, index, laid, Lineage::root()))
    }

    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        if !self.0.lineage.descends_from(&ancestor.0.lineage) || self.same(ancestor) {
            return Err(SpaceError::Unrelated("layers are merged onto an ancestor: name one of this image's"));
        }
        let (tree, geometry) = (&self.0.tree, self.0.geometry);
        let lineage = ancestor.0.lineage.child(tree.limits().depth)?;
        let moved = self.0.index.diff(&ancestor.0.index);
        let mut builder = LayerBuilder::new(tree, geometry)?;
        builder.copy_from_image(self, &moved)?;
        let layer = builder.finish()?.layer;
        let laid = match &ancestor.0.laid {
            // Everything differs from what names no layer.
            None => Laid::new(tree, geometry, &self.0.family, LayerMap::uniform(geometry.pages(), layer)),
            Some(below) => {
                let now = below.now();
                let map = now.with(&moved, layer);
                merge::check(&map, tree.limits())?;
                below.child(now, map)
            }
        };
        // The bytes are the same, wherever they lie.
        let merged = self.build(self.0.family.clone(), self.0.index.clone(), laid, lineage);
        // Whoever asks for this waits for copies as it is.
        drop(merged.due());
        Ok(merged)
    }

    fn depth(&self) -> u32 {
        self.0.lineage.depth()
    }

    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn validate(&self) -> Result<(), String> {
        self.0.index.validate()?;
        let Some(map) = self.map() else { return Ok(()) };
        map.validate()?;
        if self.0.index.tally().data == self.0.geometry.pages().get() {
            Ok(())
        } else {
            Err("some pages have no version".into())
        }
    }
}
