//! A layer, whichever way it is kept, and the place of a page in one.
//!
//! Nothing here writes a page. A layer keeps those below it open, so that they stay locked for as long as anybody reads through them.

use std::sync::Arc;

use parking_lot::Mutex;

use super::id::LayerId;
use super::map::MapBlock;
use super::medium::Folder;
use super::overlay::{Overlay, Shape};
use super::record::Purpose;
use super::sealed::SealedFile;
use crate::error::StoreError;
use crate::overlay::PageRef;
use crate::page::{ByteSize, PageIndex, PageRange, PageSet, PageSize};

/// In a place: the part of the map that would say is damaged.
const DAMAGED: u64 = 1 << 63;

/// A layer that is open.
#[derive(Debug)]
pub(super) struct Layer {
    id: LayerId,
    body: Body,
    below: Mutex<Option<Arc<Layer>>>,
}

#[derive(Debug)]
pub(super) enum Body {
    /// Positional. Frozen, unless a live disk has it on top.
    Overlay(Overlay),
    /// Compact.
    Sealed(SealedFile),
}

impl Layer {
    pub(super) fn new(id: LayerId, body: Body, below: Option<Arc<Layer>>) -> Arc<Self> {
        Arc::new(Self { id, body, below: Mutex::new(below) })
    }

    /// Opens a layer to be read: the compact form, where there is one.
    pub(super) fn open(folder: &dyn Folder, id: LayerId) -> Result<Body, StoreError> {
        match SealedFile::open(folder, id) {
            Err(StoreError::Missing { .. }) => Ok(Body::Overlay(Overlay::open(folder, id, Purpose::Read)?)),
            sealed => Ok(Body::Sealed(sealed?)),
        }
    }

    pub(super) fn id(&self) -> LayerId {
        self.id
    }

    pub(super) fn body(&self) -> &Body {
        &self.body
    }

    /// The overlay, where it is kept as one.
    pub(super) fn overlay(&self) -> Option<&Overlay> {
        match &self.body {
            Body::Overlay(overlay) => Some(overlay),
            Body::Sealed(_) => None,
        }
    }

    pub(super) fn sealed(&self) -> Option<&SealedFile> {
        match &self.body {
            Body::Overlay(_) => None,
            Body::Sealed(sealed) => Some(sealed),
        }
    }

    pub(super) fn below(&self) -> Option<Arc<Layer>> {
        self.below.lock().clone()
    }

    /// Puts a live overlay's layer over another one, with the same content. Whoever reads through the layer keeps what it has.
    pub(super) fn lie_on(&self, below: Option<Arc<Layer>>) -> Option<Arc<Layer>> {
        std::mem::replace(&mut *self.below.lock(), below)
    }

    /// Layers from here to the last, this one included.
    pub(super) fn depth(self: &Arc<Self>) -> u32 {
        std::iter::successors(Some(self.clone()), |layer| layer.below()).fold(0, |depth, _| depth.saturating_add(1))
    }

    /// Makes sure that nobody ever writes it again, durably.
    pub(super) fn freeze(&self) -> Result<(), StoreError> {
        match &self.body {
            Body::Overlay(overlay) => overlay.freeze(),
            Body::Sealed(_) => Ok(()),
        }
    }

    /// Space that its file takes.
    pub(super) fn allocated(&self) -> Result<ByteSize, StoreError> {
        match &self.body {
            Body::Overlay(overlay) => overlay.file().allocated(),
            Body::Sealed(sealed) => sealed.file().allocated(),
        }
    }
}

impl Body {
    pub(super) fn parent(&self) -> Option<LayerId> {
        match self {
            Self::Overlay(overlay) => overlay.parent(),
            Self::Sealed(sealed) => sealed.parent(),
        }
    }

    pub(super) fn shape(&self) -> Shape {
        match self {
            Self::Overlay(overlay) => overlay.shape(),
            Self::Sealed(sealed) => sealed.shape(),
        }
    }

    /// The pages that it says something of: with data, and zero. Reads its map or index.
    pub(super) fn pages(&self) -> Result<(PageSet, PageSet), StoreError> {
        let (mut data, mut zero) = (PageSet::default(), PageSet::default());
        match self {
            Self::Overlay(overlay) => overlay.load(|start, block| {
                let block = block?;
                let moved = |run: PageRange| {
                    let page = |page: PageIndex| PageIndex::new(start.get() + page.get());
                    PageRange::from_bounds(page(run.start()), page(run.end()))
                };
                MapBlock::runs(&block.data).into_iter().for_each(|run| data.push(moved(run)));
                MapBlock::runs(&block.zero).into_iter().for_each(|run| zero.push(moved(run)));
                Ok(())
            })?,
            Self::Sealed(sealed) => sealed.extents(|range, at| {
                if at.is_some() {
                    data.push(range)
                } else {
                    zero.push(range)
                }
                Ok(())
            })?,
        }
        Ok((data, zero))
    }
}

impl Drop for Layer {
    /// Lets go of those below one at a time: a recursive drop would overflow the stack on a long chain.
    fn drop(&mut self) {
        let mut next = self.below.get_mut().take();
        while let Some(layer) = next {
            next = Arc::into_inner(layer).and_then(|mut layer| layer.below.get_mut().take());
        }
    }
}

/// Where pages lie: in which layer, and how much further on than on the disk. One place stands for a whole extent.
#[derive(Clone, Debug)]
pub(super) struct Place {
    layer: Arc<Layer>,
    shift: u64,
}

impl PageRef for Place {
    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.layer, &other.layer) && self.shift == other.shift
    }
}

impl Place {
    /// Page `n` at page `n` of the layer's data.
    pub(super) fn positional(layer: Arc<Layer>) -> Self {
        Self { layer, shift: 0 }
    }

    /// An extent that starts at `page` of the disk and at page `in_file` of the data.
    pub(super) fn extent(layer: Arc<Layer>, page: PageIndex, in_file: u64) -> Self {
        Self { layer, shift: in_file.wrapping_sub(page.get()) & !DAMAGED }
    }

    /// Pages of which the layer cannot say what they hold.
    pub(super) fn damaged(layer: Arc<Layer>) -> Self {
        Self { layer, shift: DAMAGED }
    }

    pub(super) fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Fills `buf` from byte `at` of the disk.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if self.shift == DAMAGED {
            buf.fill(0);
            let page = PageIndex::new(at >> PageSize::KIB_4.shift());
            let file = match &self.layer.body {
                Body::Overlay(overlay) => overlay.file(),
                Body::Sealed(sealed) => sealed.file(),
            };
            return Err(StoreError::DamagedPage { file: file.name().clone(), page });
        }
        match &self.layer.body {
            Body::Overlay(overlay) => overlay.read(at, buf),
            Body::Sealed(sealed) => {
                let in_file = at.wrapping_add(self.shift << PageSize::KIB_4.shift());
                sealed.read(in_file, self.shift, buf)
            }
        }
    }
}
