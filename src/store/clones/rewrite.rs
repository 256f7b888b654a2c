//! Replacing what a name reads as, and deleting it.
//!
//! A rewrite makes new layers beside the old ones, and then one transaction gives the name a fresh disk id over them: the old head means nothing from
//! then on, and goes with the layers that nothing needs. So there is no state in between, and nothing is ever written in place.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::catalogue::Change;
use super::create::checked_shape;
use super::layers::{chain, rows_for};
use super::record::{CloneRecord, Kind};
use super::{CloneError, CloneName, CloneStore, Held, Hold, Sweep};
use crate::error::{SpaceError, StoreError};
use crate::page::{ByteSize, PageRange, PageSet};
use crate::store::copy::{Zeroes, copy_pages, read_padded};
use crate::store::id::LayerId;
use crate::store::image::DurableImage;
use crate::store::job::Job;
use crate::store::layer::Layer;
use crate::store::made::Made;
use crate::store::record::BLOCK;

/// Where a name goes on from.
struct Replaced {
    top: Option<LayerId>,
    origin: Option<LayerId>,
    pages: u64,
    origin_pages: u64,
    /// The topmost layer, where it was made for this.
    made: Option<Made>,
}

impl CloneStore {
    /// Deletes an image, a clone or a saved VM, in any order; layers that nothing else needs go with it, or later, where somebody reads them. Works for a
    /// degraded
    /// one. Costs by the names and layers in the store.
    ///
    /// # Errors
    /// [`CloneError::Unknown`], [`CloneError::Open`], [`CloneError::Catalogue`].
    pub fn delete(&self, name: &CloneName) -> Result<(), CloneError> {
        let mut catalogue = self.0.catalogue.lock();
        if let Some(saved) = catalogue.saved()?.remove(name) {
            return self.delete_saved(&mut catalogue, name, &saved);
        }
        let mut change = Change { clones: vec![(name.clone(), None)], ..Change::default() };
        match self.hold(&catalogue, name, Hold::Briefly) {
            // Where a layer is missing that no row names, those below it are found by a repair.
            Ok(held) => change.layers = self.rows_that_are_there(&catalogue, held.top())?,
            // A head that cannot be read keeps nobody: what only it led to is found by a repair.
            Err(CloneError::Space(SpaceError::Store(error))) if is_damage(&error) => {}
            Err(error) => return Err(error),
        }
        self.apply(&mut catalogue, change, Sweep::Yes)
    }

    fn rows_that_are_there(
        &self,
        catalogue: &super::Catalogue,
        top: Option<LayerId>,
    ) -> Result<Vec<(LayerId, Option<super::record::LayerRecord>)>, CloneError> {
        match rows_for(self.folder(), catalogue, top) {
            Err(CloneError::Space(SpaceError::Store(error))) if is_damage(&error) => Ok(Vec::new()),
            rows => rows,
        }
    }

    /// Takes a clone back to what it was cloned from, flattened, merged or rebased to last, and to the length that it had then.
    ///
    /// # Errors
    /// [`CloneError::Unknown`], [`CloneError::Open`], [`CloneError::WrongKind`], [`CloneError::Catalogue`].
    pub fn reset(&self, name: &CloneName) -> Result<(), CloneError> {
        let mut catalogue = self.0.catalogue.lock();
        let held = self.hold(&catalogue, name, Hold::Briefly)?;
        check_clone(&held, "reset")?;
        let CloneRecord { origin, origin_pages, .. } = held.record;
        self.replace(
            &mut catalogue,
            &held,
            Replaced { top: origin, origin, pages: origin_pages, origin_pages, made: None },
        )
    }

    /// Makes a disk longer, by zeroes. Its parent stays as it is. O(1).
    ///
    /// # Errors
    /// [`CloneError::Length`] where it would get shorter; [`SpaceError::Geometry`] for a size that cannot be; as [`CloneStore::reset`].
    pub fn grow(&self, name: &CloneName, size: ByteSize) -> Result<(), CloneError> {
        let shape = checked_shape(size)?;
        let mut catalogue = self.0.catalogue.lock();
        let held = self.hold(&catalogue, name, Hold::Briefly)?;
        check_clone(&held, "grown")?;
        let least = held.record.shape().geometry.len();
        match size.cmp(&least) {
            Ordering::Less => return Err(CloneError::Length { found: size, least }),
            Ordering::Equal => return Ok(()),
            Ordering::Greater => {}
        }
        let top = self.image(&catalogue, &held)?.top().map(|layer| layer.id());
        let pages = shape.geometry.pages().get();
        let made = match top {
            // Nothing below can be told from zeroes.
            None => None,
            Some(_) => Some(self.seal_layer(top, shape, |_| Ok(()))?),
        };
        let CloneRecord { origin, origin_pages, .. } = held.record;
        let top = made.as_ref().map(Made::id);
        self.replace(&mut catalogue, &held, Replaced { top, origin, pages, origin_pages, made })
    }

    /// Copies all that a name reads as into one sealed layer without a parent. The name depends on nothing else from then on, and a reset goes
    /// back to this.
    /// Other calls go on meanwhile, and relatives may be in use; the clone itself may not. Costs a read of what is not zero.
    ///
    /// # Errors
    /// [`CloneError::Changed`] where it was rewritten or deleted meanwhile; [`StoreError::Cancelled`]; as [`CloneStore::clone_disk`].
    pub fn flatten(&self, name: &CloneName, job: &Job<'_>) -> Result<(), CloneError> {
        self.rewrite(name, |store, held, image| {
            let pages = image.pages_over_base();
            let shape = held.record.shape();
            let made = match pages.is_empty() {
                true => None,
                false => {
                    let copy = |writer: &mut _| copy_pages(image, &pages, Zeroes::LeftOut, writer, job);
                    Some(store.seal_layer(None, shape, copy)?)
                }
            };
            let (top, pages) = (made.as_ref().map(Made::id), held.record.pages);
            Ok(Some(Replaced { top, origin: top, pages, origin_pages: pages, made }))
        })
    }

    /// Merges the layers that a clone has had of its own since it was made into one sealed layer. What they hide of one another is given back. A
    /// reset goes back where it did
    /// before. Costs a read of their pages.
    ///
    /// # Errors
    /// As [`CloneStore::flatten`].
    pub fn merge(&self, name: &CloneName, job: &Job<'_>) -> Result<(), CloneError> {
        self.rewrite(name, |store, held, image| {
            let CloneRecord { origin, pages, origin_pages, .. } = held.record;
            let chain = store.layers_above(image.top().map(|layer| layer.id()), None)?;
            // An open clone that was put over other layers may have been killed before its row said so: it does not lie on its origin then.
            let bottom = origin.filter(|origin| chain.contains(origin));
            let own: Vec<LayerId> = chain.into_iter().take_while(|id| Some(*id) != bottom).collect();
            if own.len() < 2 {
                return Ok(None);
            }
            let mut touched = PageSet::default();
            for id in &own {
                let (data, zero) = Layer::open(store.folder(), *id)?.pages()?;
                touched = touched.union(&data).union(&zero);
            }
            let zeroes = if bottom.is_some() { Zeroes::Kept } else { Zeroes::LeftOut };
            let shape = held.record.shape();
            let copy = |writer: &mut _| copy_pages(image, &touched, zeroes, writer, job);
            let made = store.seal_layer(bottom, shape, copy)?;
            Ok(Some(Replaced { top: Some(made.id()), origin, pages, origin_pages, made: Some(made) }))
        })
    }

    /// Puts a clone over another image, whatever they have to do with each other: it reads as before, and only pages that differ stay its own. A
    /// reset
    /// goes back to `onto` from then on. Costs a read, on both sides, of what is not in a common ancestor.
    ///
    /// # Errors
    /// [`CloneError::Length`] where `onto` is longer than the clone; as [`CloneStore::flatten`].
    pub fn rebase(&self, name: &CloneName, onto: &CloneName, job: &Job<'_>) -> Result<(), CloneError> {
        // Read as a kept image: deleted meanwhile, it is still there, and the commit below says that it is not.
        self.rewrite(name, |store, held, image| {
            let (below_record, below) = {
                let catalogue = store.0.catalogue.lock();
                let onto = store.hold(&catalogue, onto, Hold::Briefly)?;
                (onto.record, store.image(&catalogue, &onto)?)
            };
            let CloneRecord { pages, .. } = held.record;
            if below_record.pages > pages {
                let (found, least) = (held.record.shape().geometry.len(), below_record.shape().geometry.len());
                return Err(CloneError::Length { found, least });
            }
            let differing = store.differing(image, &below, job)?;
            let parent = below.top().map(|layer| layer.id());
            let shape = held.record.shape();
            let made = match (differing.is_empty() && below_record.pages == pages, parent) {
                (true, _) => None,
                (false, None) if differing.is_empty() => None,
                (false, parent) => {
                    let zeroes = if parent.is_some() { Zeroes::Kept } else { Zeroes::LeftOut };
                    let copy = |writer: &mut _| copy_pages(image, &differing, zeroes, writer, job);
                    Some(store.seal_layer(parent, shape, copy)?)
                }
            };
            let top = made.as_ref().map(Made::id).or(parent);
            Ok(Some(Replaced { top, origin: parent, pages, origin_pages: below_record.pages, made }))
        })
    }

    /// Has `target` read as `name` does, which was cloned from it, and must not be written since. Both are there afterwards, and share all layers.
    /// No page is copied.
    ///
    /// Legal whoever else descends from `target`: layers do not change.
    ///
    /// # Errors
    /// [`CloneError::Diverged`] where `target` was written since; as [`CloneStore::clone_disk`].
    pub fn commit(&self, name: &CloneName, target: &CloneName) -> Result<(), CloneError> {
        let mut catalogue = self.0.catalogue.lock();
        if name == target {
            return Ok(());
        }
        let (from, to) = (self.hold(&catalogue, name, Hold::Briefly)?, self.hold(&catalogue, target, Hold::Briefly)?);
        check_clone(&to, "committed into")?;
        let top = self.image(&catalogue, &from)?.top().map(|layer| layer.id());
        self.commit_top(&mut catalogue, (name, top, from.record.pages), &to)
    }

    /// Has `to` go on from a topmost layer of `name`'s, which is frozen, where that descends from what it reads as.
    pub(super) fn commit_top(
        &self,
        catalogue: &mut super::Catalogue,
        (name, top, pages): (&CloneName, Option<LayerId>, u64),
        to: &Held,
    ) -> Result<(), CloneError> {
        let (rows, names) = (catalogue.layers()?, self.names()?);
        let descends = match to.top() {
            None => true,
            Some(below) => chain(self.folder(), &rows, &names, top).layers.contains(&below),
        };
        if !descends || to.record.pages > pages {
            return Err(CloneError::Diverged { name: name.clone(), target: to.name.clone() });
        }
        let CloneRecord { origin, origin_pages, .. } = to.record;
        // Where the target lay on nothing, that is what a reset goes back to still.
        self.replace(catalogue, to, Replaced { top, origin, pages, origin_pages, made: None })
    }

    /// The pages that two names read differently; past the end of the shorter one, where the other is not zero. Costs a read of what is not in a
    /// common ancestor.
    ///
    /// # Errors
    /// As [`CloneStore::open_image`].
    pub fn diff(&self, name: &CloneName, other: &CloneName) -> Result<PageSet, CloneError> {
        let (left, right) = (self.open_image(name)?, self.open_image(other)?);
        self.differing(&left, &right, &Job::new())
    }

    /// The pages that two frozen images read differently.
    pub(super) fn differing(
        &self,
        left: &DurableImage,
        right: &DurableImage,
        job: &Job<'_>,
    ) -> Result<PageSet, CloneError> {
        let tops = [left, right].map(|image| image.top().map(|layer| layer.id()));
        let chains = [self.layers_above(tops[0], None)?, self.layers_above(tops[1], None)?];
        let shared: BTreeSet<LayerId> = chains[0].iter().copied().filter(|id| chains[1].contains(id)).collect();
        let mut candidates = PageSet::default();
        for id in chains.iter().flatten().filter(|id| !shared.contains(id)) {
            let (data, zero) = Layer::open(self.folder(), *id)?.pages()?;
            candidates = candidates.union(&data).union(&zero);
        }
        let (mut a, mut b) = ([0; BLOCK], [0; BLOCK]);
        let mut found = PageSet::default();
        for page in candidates.pages() {
            job.check()?;
            let at = page.get() * BLOCK as u64;
            read_padded(left, at, &mut a)?;
            read_padded(right, at, &mut b)?;
            if a != b {
                found.push(PageRange::one(page));
            }
        }
        Ok(found)
    }

    /// The layers from `top` down to `bottom`, which is left out; all of them, where it is not among them.
    pub(super) fn layers_above(
        &self,
        top: Option<LayerId>,
        bottom: Option<LayerId>,
    ) -> Result<Vec<LayerId>, CloneError> {
        let (rows, names) = (self.0.catalogue.lock().layers()?, self.names()?);
        let chain = chain(self.folder(), &rows, &names, top);
        Ok(chain.layers.into_iter().take_while(|id| Some(*id) != bottom).collect())
    }

    /// Makes layers for a name while others use the store, and then has it go on from them. `None` leaves it as it is.
    fn rewrite(
        &self,
        name: &CloneName,
        make: impl FnOnce(&Self, &Held, &DurableImage) -> Result<Option<Replaced>, CloneError>,
    ) -> Result<(), CloneError> {
        let (held, image) = {
            let catalogue = self.0.catalogue.lock();
            let held = self.hold(&catalogue, name, Hold::Long)?;
            let image = self.image(&catalogue, &held)?;
            (held, image)
        };
        let Some(replaced) = make(self, &held, &image)? else { return Ok(()) };
        // What is read is not removed.
        drop(image);
        let mut catalogue = self.0.catalogue.lock();
        // A clone is held by its head; an image is not, and a layer to lie on may have gone.
        if catalogue.clone(name)? != Some(held.record) {
            return Err(CloneError::Changed { name: name.clone() });
        }
        self.replace(&mut catalogue, &held, replaced)
    }

    /// Has a name go on from other layers, which are durable.
    fn replace(&self, catalogue: &mut super::Catalogue, held: &Held, new: Replaced) -> Result<(), CloneError> {
        let (disk, generation) = self.fresh()?;
        let Replaced { top, origin, pages, origin_pages, mut made } = new;
        let record = CloneRecord { kind: held.record.kind, disk, generation, top, origin, pages, origin_pages };
        // The old ones too, so that those that nothing needs are found.
        let mut layers = self.rows_that_are_there(catalogue, held.top())?;
        for (id, row) in rows_for(self.folder(), catalogue, top)? {
            if !layers.iter().any(|(known, _)| *known == id) {
                layers.push((id, row));
            }
        }
        let change = Change { clones: vec![(held.name.clone(), Some(record))], layers, ..Change::default() };
        if let Some(made) = &mut made {
            made.keep();
        }
        self.apply(catalogue, change, Sweep::Yes)
    }
}

pub(super) fn check_clone(held: &Held, what: &'static str) -> Result<(), CloneError> {
    match held.record.kind {
        Kind::Clone => Ok(()),
        kind => Err(CloneError::WrongKind { name: held.name.clone(), kind, what }),
    }
}

/// Whether a file is not there, or not what was written, rather than the system having refused.
pub(super) fn is_damage(error: &StoreError) -> bool {
    matches!(error, StoreError::Missing { .. } | StoreError::Damaged { .. } | StoreError::Limit { .. })
}
