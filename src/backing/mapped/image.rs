//! An immutable image of mapped RAM: an index of layers, and the plan by which a clone maps them.
//!
//! A *root* image, before the first cut, names no layer and reads as its base. Any other names a layer for every page. Nothing here
//! writes a page.

use std::fmt;
use std::sync::Arc;

use super::Mapped;
use super::layer::{Content, Family, Layer, LayerBuilder, Spot, host_pages, space_pages};
use crate::account::{Charge, Item};
use crate::backing::{Sealed, Tree};
use crate::error::SpaceError;
use crate::image::{Lineage, Source};
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageCount, PageIndex, PageRange, PageSet};
use crate::sync::OnceLock;
use crate::sys::mapping::{Mapping, Placement};

/// An immutable image of mapped RAM.
#[derive(Clone)]
pub struct MappedImage(Arc<Inner>);

struct Inner {
    tree: Tree,
    geometry: Geometry,
    family: Arc<Family>,
    index: Index<Spot>,
    base: Option<Arc<dyn Source>>,
    lineage: Arc<Lineage>,
    plan: OnceLock<Plan>,
    _charge: Charge,
}

/// How a clone maps an image: the layer that holds most pages over everything, the others laid over it.
struct Plan {
    base: Arc<Layer>,
    /// In pages of the kernel's.
    extents: Vec<(PageRange, Arc<Layer>)>,
    /// Kernel mappings that a clone is made of.
    mappings: u64,
    layers: u32,
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
        Ok(Self::build(tree, geometry, Arc::default(), index, base, Lineage::root()))
    }

    fn build(
        tree: &Tree,
        geometry: Geometry,
        family: Arc<Family>,
        index: Index<Spot>,
        base: Option<Arc<dyn Source>>,
        lineage: Arc<Lineage>,
    ) -> Self {
        let _charge = tree.0.charge(Item::Image);
        let (tree, plan) = (tree.clone(), OnceLock::new());
        Self(Arc::new(Inner { tree, geometry, family, index, base, lineage, plan, _charge }))
    }

    /// Whether there may be an image one cut further on.
    pub(super) fn check_depth(&self) -> Result<(), SpaceError> {
        self.0.lineage.child(self.0.tree.limits().depth).map(drop)
    }

    /// The image one cut further on.
    pub(super) fn child(&self, index: Index<Spot>) -> Result<Self, SpaceError> {
        let inner = &self.0;
        let lineage = inner.lineage.child(inner.tree.limits().depth)?;
        Ok(Self::build(&inner.tree, inner.geometry, inner.family.clone(), index, None, lineage))
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.0.tree
    }

    pub(super) fn family(&self) -> &Arc<Family> {
        &self.0.family
    }

    pub(super) fn index(&self) -> &Index<Spot> {
        &self.0.index
    }

    /// Whether it names no layer yet.
    pub(super) fn is_root(&self) -> bool {
        self.0.lineage.depth() == 0 && self.0.index.tally().data == 0
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
        if self.is_root() { u32::from(self.0.base.is_some()) } else { self.plan().layers }
    }

    /// Made once an image, by whoever needs it first: O(tables of the index).
    fn plan(&self) -> &Plan {
        self.0.plan.get_or_init(|| Plan::of(&self.0.index, self.0.geometry))
    }

    /// Maps the layers for a clone.
    pub(super) fn map_at(&self, place: Placement) -> Result<Mapping, SpaceError> {
        let plan = self.plan();
        let (needed, limit) = (plan.mappings, self.0.tree.limits().mappings_per_vm);
        if needed > limit {
            return Err(SpaceError::MappingLimit { needed, limit, name: "Limits::mappings_per_vm" });
        }
        let extents: Vec<_> = plan.extents.iter().map(|(range, layer)| (*range, &*layer.file)).collect();
        Ok(Mapping::map_layers(&plan.base.file, &extents, self.0.geometry.len(), place)?)
    }

    /// The pages of `range` that may hold anything but zeroes: asks the kernel what the layers hold. Two calls for each run of data.
    pub(super) fn data_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        if self.is_root() {
            let mut base = PageSet::new();
            base.push(self.base_pages().intersect(range));
            return Ok(base);
        }
        let mut data = PageSet::new();
        for (run, state) in self.0.index.runs(range) {
            if let PageState::Data(Spot { layer, content: Content::Data }) = state {
                let held = layer.file.data_in(host_pages(self.0.geometry, run))?;
                data = data.union(&space_pages(self.0.geometry, &held));
            }
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

/// Runs of one layer, holes and data together: what one kernel mapping can show.
pub(super) fn layer_runs(index: &Index<Spot>, range: PageRange) -> Vec<(PageRange, Arc<Layer>)> {
    let mut runs: Vec<(PageRange, Arc<Layer>)> = Vec::new();
    for (run, state) in index.runs(range) {
        let PageState::Data(spot) = state else { continue };
        match runs.last_mut() {
            Some((last, layer)) if last.end() == run.start() && Arc::ptr_eq(layer, &spot.layer) => {
                *last = PageRange::from_bounds(last.start(), run.end());
            }
            _ => runs.push((run, spot.layer.clone())),
        }
    }
    runs
}

impl Plan {
    fn of(index: &Index<Spot>, geometry: Geometry) -> Self {
        let runs = layer_runs(index, geometry.all());
        let mut sizes: Vec<(Arc<Layer>, PageCount, u64)> = Vec::new();
        for (run, layer) in &runs {
            match sizes.iter_mut().find(|(seen, ..)| Arc::ptr_eq(seen, layer)) {
                Some((_, pages, count)) => (*pages, *count) = (pages.saturating_add(run.count()), *count + 1),
                None => sizes.push((layer.clone(), run.count(), 1)),
            }
        }
        // The layer in most pieces goes beneath: every piece of it is one extent saved.
        let Some((base, ..)) = sizes.iter().max_by_key(|(_, pages, count)| (*count, pages.get())) else {
            unreachable!("an image that is no root names a layer for every page")
        };
        let base = base.clone();
        let mappings = runs.len() as u64;
        let over = runs.into_iter().filter(|(_, layer)| !Arc::ptr_eq(layer, &base));
        let extents = over.map(|(run, layer)| (host_pages(geometry, run), layer)).collect();
        Self { base, extents, mappings, layers: sizes.len() as u32 }
    }
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
        if self.is_root() {
            return self.read_base(at, buf);
        }
        let (size, end) = (geometry.page_size(), at.get() + buf.len() as u64);
        let first = size.page_of(at);
        let last = size.page_of(ByteOffset::new(end - 1));
        let pages = PageRange::from_bounds(first, PageIndex::new(last.get() + 1));
        for (run, state) in self.0.index.runs(pages) {
            let from = size.start_of(run.start()).get().max(at.get());
            let to = size.start_of(run.end()).get().min(end);
            let part = &mut buf[(from - at.get()) as usize..(to - at.get()) as usize];
            match state {
                PageState::Data(Spot { layer, content: Content::Data }) => {
                    layer.file.read_at(ByteOffset::new(from), part)?;
                }
                _ => part.fill(0),
            }
        }
        Ok(())
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
        if self.is_root() { 2 } else { self.plan().mappings }
    }

    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        self.check_related(other)?;
        Ok(self.0.index.diff(&other.0.index))
    }

    fn flatten(&self) -> Result<Self, SpaceError> {
        let (tree, geometry) = (&self.0.tree, self.0.geometry);
        let mut builder = LayerBuilder::new(tree, geometry)?;
        builder.copy_from_image(self, geometry.all())?;
        let built = builder.finish()?;
        let mut index = Index::uniform(geometry.pages(), &PageState::Absent);
        built.name_in(&mut index);
        Ok(Self::build(tree, geometry, Arc::default(), index, None, Lineage::root()))
    }

    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        if !self.0.lineage.descends_from(&ancestor.0.lineage) || self.same(ancestor) {
            return Err(SpaceError::Unrelated("layers are merged onto an ancestor: name one of this image's"));
        }
        let (tree, geometry) = (&self.0.tree, self.0.geometry);
        let lineage = ancestor.0.lineage.child(tree.limits().depth)?;
        let mut index = ancestor.0.index.clone();
        let mut builder = LayerBuilder::new(tree, geometry)?;
        for run in self.0.index.diff(&index).runs() {
            builder.copy_from_image(self, run)?;
        }
        let built = builder.finish()?;
        built.name_in(&mut index);
        Ok(Self::build(tree, geometry, self.0.family.clone(), index, None, lineage))
    }

    fn depth(&self) -> u32 {
        self.0.lineage.depth()
    }

    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn validate(&self) -> Result<(), String> {
        self.0.index.validate()?;
        let covered = self.0.index.tally().data == self.0.geometry.pages().get();
        if self.is_root() || covered { Ok(()) } else { Err("some pages name no layer".into()) }
    }
}
