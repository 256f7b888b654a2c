//! What is done to a clone while it is open: its guest goes on, and neither the disk nor the catalogue is held while pages are copied.
//!
//! The disk goes over to its new layers by itself, durably (`restack.rs`); then one transaction has the clone's row name them and gives back the old
//! ones, where nobody reads them. Killed between the two, the clone reads as it did, does not need the old layers, and its row keeps them: whichever
//! call moves the row next gives them back.

use super::catalogue::Change;
use super::layers::rows_for;
use super::record::CloneRecord;
use super::rewrite::check_clone;
use super::{CloneError, CloneName, CloneStore, Hold, Sweep};
use crate::backing::{Backing, Cut, Sealed};
use crate::page::ByteSize;
use crate::store::durable::Durable;
use crate::store::id::LayerId;
use crate::store::image::DurableImage;
use crate::store::job::Job;
use crate::store::restack::{Onto, Restack, Restacked};

/// What a reset goes back to.
#[derive(Clone, Copy)]
struct Origin {
    layer: Option<LayerId>,
    pages: u64,
}

impl CloneStore {
    /// Copies all that an open clone lies on into one sealed layer, while it is read, written, flushed and forked: it depends on nothing else from then
    /// on. A write always wins over a copied page. A reset by name goes back to what the disk held when it was last cut, or opened.
    /// Costs a read of what is below that is not zero.
    ///
    /// # Errors
    /// [`CloneError::Nameless`], [`CloneError::OtherStore`], [`CloneError::Catalogue`]; as [`Durable::flatten`].
    pub fn flatten_open(&self, disk: &Durable, job: &Job<'_>) -> Result<(), CloneError> {
        let (name, record) = self.named(disk)?;
        let done = Restack::begin(disk)?.finish(Onto::Base, job)?;
        let origin = Origin { layer: top_of(&done.first), pages: Sealed::geometry(&done.first).pages().get() };
        self.moved(&name, record, done, origin)
    }

    /// Merges the layers that an open clone has had of its own since it was made into one sealed layer, while it is used. What it has written
    /// since it was last cut stays where it is. A reset goes back where it did. Costs a read of their pages.
    ///
    /// # Errors
    /// As [`CloneStore::flatten_open`].
    pub fn merge_open(&self, disk: &Durable, job: &Job<'_>) -> Result<(), CloneError> {
        let (name, record) = self.named(disk)?;
        let restack = Restack::begin(disk)?;
        let top = restack.origin().top().cloned();
        let below = std::iter::successors(top, |layer| layer.below()).map(|layer| layer.id());
        let bottom = below.into_iter().find(|id| Some(*id) == record.origin);
        let done = restack.finish(bottom.map_or(Onto::Base, Onto::Layer), job)?;
        let origin = Origin { layer: record.origin, pages: record.origin_pages };
        self.moved(&name, record, done, origin)
    }

    /// Puts an open clone over another image or a closed clone, while it is used: it reads as before, and only pages that differ stay its own. A reset by
    /// name goes back to `onto` from then on. Costs a read, on both sides, of what is not in a common ancestor.
    ///
    /// # Errors
    /// [`CloneError::Length`] where `onto` is longer; [`CloneError::Unknown`], [`CloneError::Open`]; as [`CloneStore::flatten_open`].
    pub fn rebase_open(&self, disk: &Durable, onto: &CloneName, job: &Job<'_>) -> Result<(), CloneError> {
        let (name, record) = self.named(disk)?;
        let restack = Restack::begin(disk)?;
        let old = restack.origin().clone();
        let shape = old.shape();
        let (target, below) = {
            let catalogue = self.0.catalogue.lock();
            let onto = self.hold(&catalogue, onto, Hold::Briefly)?;
            let (found, least): (ByteSize, _) = (shape.geometry.len(), onto.record.shape().geometry.len());
            if least > found {
                return Err(CloneError::Length { found, least });
            }
            let top = top_of(&self.image(&catalogue, &onto)?);
            let below = match top {
                Some(top) => self.0.dir.image_at(top, shape, None)?,
                None => DurableImage::root(self.0.dir.clone(), shape, None),
            };
            (Origin { layer: top, pages: onto.record.pages }, below)
        };
        // Read through files that others open too.
        old.freeze()?;
        let differing = self.differing(&old, &below, job)?;
        drop(old);
        let done = restack.finish(Onto::Image(below, differing), job)?;
        self.moved(&name, record, done, target)
    }

    /// Has `target` read as an open clone does at this instant, which was cloned from it. The disk goes on, in a fresh overlay. No page is copied.
    ///
    /// # Errors
    /// [`CloneError::Diverged`] where `target` was written since; [`CloneError::Unknown`], [`CloneError::Open`], [`CloneError::WrongKind`]; as
    /// [`CloneStore::snapshot_open`].
    pub fn commit_open(&self, disk: &Durable, target: &CloneName) -> Result<(), CloneError> {
        let (name, _) = self.named(disk)?;
        let (image, deferred) = disk.cut()?.commit();
        drop(deferred);
        let mut catalogue = self.0.catalogue.lock();
        let to = self.hold(&catalogue, target, Hold::Briefly)?;
        check_clone(&to, "committed into")?;
        image.freeze()?;
        let pages = Sealed::geometry(&image).pages().get();
        self.commit_top(&mut catalogue, (&name, top_of(&image), pages), &to)
    }

    /// The name of an open disk.
    fn named(&self, disk: &Durable) -> Result<(CloneName, CloneRecord), CloneError> {
        self.check_here(disk.dir().folder())?;
        let rows = self.0.catalogue.lock().clones()?;
        rows.into_iter().find(|(_, record)| record.disk == disk.id()).ok_or(CloneError::Nameless)
    }

    /// Has the row of a clone name what its disk lies on now, and gives back what it lay on.
    fn moved(&self, name: &CloneName, old: CloneRecord, done: Restacked, origin: Origin) -> Result<(), CloneError> {
        let Restacked { before, first, now } = done;
        let (top, was) = (top_of(&first), top_of(&before));
        if was == top_of(&now) && old.top == top && old.origin == origin.layer {
            return Ok(());
        }
        // Its files are opened below, to be found by the sweep.
        before.freeze()?;
        drop((before, first));
        let mut catalogue = self.0.catalogue.lock();
        // An open clone is not rewritten; a name that was taken from it and given to another is.
        if catalogue.clone(name)?.is_none_or(|row| row.disk != old.disk) {
            return Err(CloneError::Changed { name: name.clone() });
        }
        let record = CloneRecord { top, origin: origin.layer, origin_pages: origin.pages, ..old };
        let mut layers = rows_for(self.folder(), &catalogue, top_of(&now))?;
        for (id, row) in rows_for(self.folder(), &catalogue, was)? {
            if !layers.iter().any(|(known, _)| *known == id) {
                layers.push((id, row));
            }
        }
        let change = Change { clones: vec![(name.clone(), Some(record))], layers, ..Change::default() };
        self.apply(&mut catalogue, change, Sweep::Yes)
    }
}

fn top_of(image: &DurableImage) -> Option<LayerId> {
    image.top().map(|layer| layer.id())
}
