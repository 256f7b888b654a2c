//! An immutable image of a heap space, and what can be made of it without any live space.
//!
//! Nothing here writes a page: an image gives out its index, and pages are written only through a live table.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::page::{Page, PageBody};
use super::{Heap, PageArc};
use crate::account::{Charge, Item};
use crate::backing::{Sealed, Tree, next_data_in};
use crate::error::SpaceError;
use crate::image::{Lineage, Source};
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageIndex, PageRange, PageSet, is_zero};

/// An immutable image on the heap.
pub struct HeapImage<B: PageBody>(Arc<Inner<B>>);

struct Inner<B: PageBody> {
    tree: Tree,
    geometry: Geometry,
    index: Index<PageArc<B>>,
    base: Option<Arc<dyn Source>>,
    lineage: Arc<Lineage>,
    _charge: Charge,
}

impl<B: PageBody> Clone for HeapImage<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: PageBody> fmt::Debug for HeapImage<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tally = self.0.index.tally();
        f.debug_struct("HeapImage")
            .field("geometry", &self.0.geometry)
            .field("data", &tally.data)
            .field("depth", &self.depth())
            .finish_non_exhaustive()
    }
}

impl<B: PageBody> HeapImage<B> {
    pub(super) fn root(tree: Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        if let Some(base) = &base {
            let (len, space) = (base.len(), geometry.len());
            if len > space {
                return Err(GeometryError::OutOfRange { at: ByteOffset::ZERO, len, space }.into());
            }
        }
        let index = Index::uniform(geometry.pages(), &PageState::Absent);
        Ok(Self::build(tree, geometry, index, base, Lineage::root()))
    }

    fn build(
        tree: Tree,
        geometry: Geometry,
        index: Index<PageArc<B>>,
        base: Option<Arc<dyn Source>>,
        lineage: Arc<Lineage>,
    ) -> Self {
        let charge = tree.0.charge(Item::Image);
        Self(Arc::new(Inner { tree, geometry, index, base, lineage, _charge: charge }))
    }

    /// The image one cut further on.
    pub(super) fn child(&self, index: Index<PageArc<B>>) -> Result<Self, SpaceError> {
        let lineage = self.0.lineage.child(self.0.tree.limits().depth)?;
        Ok(Self::build(self.0.tree.clone(), self.0.geometry, index, self.0.base.clone(), lineage))
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.0.tree
    }

    pub(super) fn index(&self) -> &Index<PageArc<B>> {
        &self.0.index
    }

    pub(super) fn base(&self) -> Option<&Arc<dyn Source>> {
        self.0.base.as_ref()
    }

    /// Fills `buf` from below the index: the base image, and zeroes past its end.
    pub(super) fn read_base(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let Some(base) = &self.0.base else {
            buf.fill(0);
            return Ok(());
        };
        let here = base.len().get().saturating_sub(at.get()).min(buf.len() as u64) as usize;
        buf[here..].fill(0);
        if here == 0 { Ok(()) } else { base.read(at, &mut buf[..here]) }
    }

    /// The first page that no byte of the base image lies in.
    pub(super) fn base_end(&self) -> PageIndex {
        let len = self.0.base.as_ref().map_or(0, |base| base.len().get());
        PageIndex::new(len.div_ceil(self.0.geometry.page_size().bytes().get()))
    }

    /// How many pages an index leaves to the base image.
    pub(super) fn base_pages_under(&self, index: &Index<PageArc<B>>) -> u64 {
        let pages = self.base_end().get();
        let covered = index.tally_in(PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(pages)));
        pages - covered.data - covered.zero
    }

    /// Pages are handed over one by one, so a heap image is one merged layer whatever its depth; a base image is one more.
    pub(super) fn layers(&self) -> u32 {
        u32::from(self.0.index.tally().data > 0) + u32::from(self.0.base.is_some())
    }

    fn check_related(&self, other: &Self) -> Result<(), SpaceError> {
        if self.0.lineage.related(&other.0.lineage) {
            return Ok(());
        }
        Err(SpaceError::Unrelated("the images do not come from one parent: compare or merge relatives only"))
    }
}

impl<B: PageBody> Source for HeapImage<B> {
    fn len(&self) -> ByteSize {
        self.0.geometry.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        // A live space over this image that nobody writes reads exactly as the image.
        super::State::over(self.clone()).read(at, buf)
    }

    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        next_data_in(&self.0.index, self.0.geometry.page_size(), self.0.base.as_deref(), at)
    }
}

impl<B: PageBody> Sealed for HeapImage<B> {
    type Live = Heap<B>;

    fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    fn spawn(&self) -> Result<Heap<B>, SpaceError> {
        Ok(Heap::over(self.clone()))
    }

    fn diff(&self, other: &Self) -> Result<PageSet, SpaceError> {
        self.check_related(other)?;
        Ok(self.0.index.diff(&other.0.index))
    }

    fn flatten(&self) -> Result<Self, SpaceError> {
        let size = self.0.geometry.page_size();
        let limit = self.0.tree.limits().heap_pages;
        let mut index = Index::uniform(self.0.geometry.pages(), &PageState::Absent);
        let mut bytes = vec![0; size.bytes().get() as usize];
        for (run, state) in self.0.index.runs(self.0.geometry.all()) {
            let below = matches!(state, PageState::Absent) && self.0.base.is_some();
            if !below && !matches!(state, PageState::Data(_)) {
                continue;
            }
            for page in run.iter() {
                let charge = || self.0.tree.0.charge_heap_page().ok_or(SpaceError::HeapLimit { limit });
                let copy = match state {
                    PageState::Data(data) if data.is_zero() => continue,
                    PageState::Data(data) => Page::copy_of(size, data, charge()?),
                    _ => {
                        self.read_base(size.start_of(page), &mut bytes)?;
                        if is_zero(&bytes) {
                            continue;
                        }
                        Page::from_bytes(size, &bytes, charge()?)
                    }
                };
                index.set(PageRange::one(page), &PageState::Data(Arc::new(copy)));
            }
        }
        Ok(Self::build(self.0.tree.clone(), self.0.geometry, index, None, Lineage::root()))
    }

    fn merge_onto(&self, ancestor: &Self) -> Result<Self, SpaceError> {
        if !self.0.lineage.descends_from(&ancestor.0.lineage) || self.same(ancestor) {
            return Err(SpaceError::Unrelated("layers are merged onto an ancestor: name one of this image's"));
        }
        let lineage = ancestor.0.lineage.child(self.0.tree.limits().depth)?;
        let inner = &self.0;
        Ok(Self::build(inner.tree.clone(), inner.geometry, inner.index.clone(), inner.base.clone(), lineage))
    }

    fn depth(&self) -> u32 {
        self.0.lineage.depth()
    }

    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn validate(&self) -> Result<(), String> {
        self.0.index.validate()
    }
}
