//! Merging layers, and closing gaps between their pieces, in the background: how an image stays small whatever its depth.
//!
//! Images are immutable, and so is every layer: a merge copies pages that nobody can write to the same place of a new layer, and
//! gives the image another [`LayerMap`]. Whoever has mapped the old layers keeps showing the same bytes. A spawn takes whichever map is
//! there and waits for nothing, unless that one needs more mappings than a VM may have.
//!
//! A child that is cut while a merge of its origin is due is made on the old map. It remembers that, and its own merge, which is
//! due then too, first takes over what became of the origin: nothing is copied twice. Merges of one family take turns.
//!
//! Must not know of VMs, cuts or indexes: which bytes a page holds does not change here.

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::layer::{Family, Layer, host_pages, in_batches, seal_file, space_pages};
use super::layer_map::LayerMap;
use crate::account::Limits;
use crate::backing::Tree;
use crate::error::SpaceError;
use crate::page::{Geometry, PageRange, PageSet};
use crate::sys::mapping::{Mapping, Placement};
use crate::sys::memfd::Memfd;

/// Where an image lies, now.
pub(super) struct Laid {
    tree: Tree,
    geometry: Geometry,
    family: Arc<Family>,
    /// Written by merges alone, with [`Family::merging`] held.
    now: RwLock<Arc<LayerMap>>,
    /// Until its own merge: the origin's map that this one was made of, where a merge of that was due.
    built_on: Mutex<Option<BuiltOn>>,
}

struct BuiltOn {
    origin: Arc<Laid>,
    map: Arc<LayerMap>,
}

/// A merge that is due: done when this is dropped, if anybody still wants the image.
pub(super) struct Due(Weak<Laid>);

impl Laid {
    /// Of an image with no origin that matters.
    pub(super) fn new(tree: &Tree, geometry: Geometry, family: &Arc<Family>, map: LayerMap) -> Arc<Self> {
        Self::on(tree, geometry, family, map, None)
    }

    fn on(tree: &Tree, geometry: Geometry, family: &Arc<Family>, map: LayerMap, on: Option<BuiltOn>) -> Arc<Self> {
        let (now, built_on) = (RwLock::new(Arc::new(map)), Mutex::new(on));
        Arc::new(Self { tree: tree.clone(), geometry, family: family.clone(), now, built_on })
    }

    /// Of an image cut from a VM over this one, whose map was `map` when `child` was made of it.
    pub(super) fn child(self: &Arc<Self>, map: Arc<LayerMap>, child: LayerMap) -> Arc<Self> {
        let due = is_over(&map, self.tree.limits());
        let on = due.then(|| BuiltOn { origin: self.clone(), map });
        Self::on(&self.tree, self.geometry, &self.family, child, on)
    }

    pub(super) fn now(&self) -> Arc<LayerMap> {
        self.now.read().clone()
    }

    /// The merge that this image is due for.
    pub(super) fn due(self: &Arc<Self>) -> Option<Due> {
        let due = self.built_on.lock().is_some() || is_over(&self.now(), self.tree.limits());
        due.then(|| Due(Arc::downgrade(self)))
    }

    /// Merges as far as the limits ask for it. Waits for merges of relatives.
    ///
    /// # Errors
    /// What the system refuses. The image shows the same bytes, from as many layers as before or fewer.
    pub(super) fn settle(self: Arc<Self>) -> Result<(), SpaceError> {
        let family = self.family.clone();
        let _turn = family.merging.lock();
        // What this image was built on, what that was built on, and so on.
        let mut line = Vec::new();
        let mut next = self.built_on.lock().take();
        while let Some(on) = next {
            next = on.origin.built_on.lock().take();
            line.push(on);
        }
        while let Some(on) = line.pop() {
            // If it failed, it fails for the child as well, or does no harm.
            if let Err(error) = on.origin.reduce() {
                tracing::debug!(%error, "layers of an origin could not be merged");
            }
            let child = line.last().map_or(&self, |on| &on.origin);
            let moved = child.now().moved(&on.map, &on.origin.now());
            *child.now.write() = Arc::new(moved);
        }
        self.reduce()
    }

    /// Mappings first: closing gaps may cover whole layers.
    fn reduce(self: &Arc<Self>) -> Result<(), SpaceError> {
        let limits = *self.tree.limits();
        let map = self.now();
        if map.mappings() > soft_mappings(&limits) {
            self.gather(&map, &map.small_neighbours(soft_mappings(&limits) / 2))?;
        }
        let map = self.now();
        if map.layers() > soft_layers(&limits) {
            self.gather(&map, &map.on_smallest_layers(soft_layers(&limits) / 2))?;
        }
        Ok(())
    }

    /// Copies pages to a layer of their own.
    fn gather(self: &Arc<Self>, map: &LayerMap, pages: &PageSet) -> Result<(), SpaceError> {
        let _span = tracing::debug_span!("merge", pages = pages.count().get(), layers = map.layers()).entered();
        let file = Memfd::create("offshoot-layer", self.geometry.len())?;
        for (from, there) in map.by_layer(pages) {
            // Nothing in it, but pages that somebody read.
            if self.family.is_zero(from) {
                continue;
            }
            // By what the file holds: reading a hole through a mapping would make the kernel allocate it.
            let (there, view) = (held_by(from, self.geometry, &there)?, view_of(from, self.geometry)?);
            for batch in there.runs().flat_map(in_batches) {
                // Only this merge still has it.
                if Arc::strong_count(self) == 1 {
                    return Ok(());
                }
                file.write_at_from(&view, host_pages(self.geometry, batch))?;
            }
        }
        let layer = Layer::new(&self.tree, seal_file(file)?);
        let merged = map.with(pages, layer);
        *self.now.write() = Arc::new(merged);
        Ok(())
    }
}

fn view_of(layer: &Layer, geometry: Geometry) -> Result<Mapping, SpaceError> {
    Ok(Mapping::map_private(&layer.file, geometry.len(), Placement::Anywhere)?)
}

/// The pages of these that a layer holds anything for. Asks once for all of them: a question about a part of a file that is full costs
/// as much as one about all that comes after.
pub(super) fn held_by(layer: &Layer, geometry: Geometry, pages: &PageSet) -> Result<PageSet, SpaceError> {
    let mut runs = pages.runs();
    let Some(first) = runs.next() else { return Ok(PageSet::new()) };
    let hull = PageRange::from_bounds(first.start(), runs.last().unwrap_or(first).end());
    let held = space_pages(geometry, &layer.file.data_in(host_pages(geometry, hull))?);
    Ok(pages.intersection(&held))
}

impl Drop for Due {
    fn drop(&mut self) {
        if let Some(laid) = self.0.upgrade()
            && let Err(error) = laid.settle()
        {
            tracing::warn!(%error, "layers could not be merged: the next fork of this line tries again");
        }
    }
}

/// No layer is merged with no other.
fn soft_layers(limits: &Limits) -> u32 {
    limits.merge_over_layers.clamp(2, limits.layers_per_image.max(2))
}

fn soft_mappings(limits: &Limits) -> u64 {
    limits.merge_over_mappings.clamp(1, limits.mappings_per_vm.max(1))
}

fn is_over(map: &LayerMap, limits: &Limits) -> bool {
    map.layers() > soft_layers(limits) || map.mappings() > soft_mappings(limits)
}

/// Whether there may be an image of this map. Refused at the cut, so that a spawn never is.
pub(super) fn check(map: &LayerMap, limits: &Limits) -> Result<(), SpaceError> {
    check_layers(map.layers(), limits)?;
    // However scattered, pages can be gathered into one piece.
    if map.mappings() > limits.mappings_per_vm { check_mappings(map.fewest_mappings(), limits) } else { Ok(()) }
}

/// Whether there may be an image that is one layer in one piece.
pub(super) fn check_whole(limits: &Limits) -> Result<(), SpaceError> {
    check_layers(1, limits)?;
    check_mappings(1, limits)
}

fn check_layers(layers: u32, limits: &Limits) -> Result<(), SpaceError> {
    let limit = limits.layers_per_image;
    if layers > limit { Err(SpaceError::LayerLimit { layers, limit }) } else { Ok(()) }
}

fn check_mappings(needed: u64, limits: &Limits) -> Result<(), SpaceError> {
    let limit = limits.mappings_per_vm;
    let name = "Limits::mappings_per_vm";
    if needed > limit { Err(SpaceError::MappingLimit { needed, limit, name }) } else { Ok(()) }
}
