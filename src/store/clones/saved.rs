//! Saved VMs in the store: making their layers and manifest, naming them, listing, checking and deleting them.
//!
//! A save makes files that no row names, durably; the catalogue's commit is the instant at which the saved VM is there. Must not know what RAM or device
//! state mean, nor how a VM is put together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use super::catalogue::{Catalogue, Change};
use super::layers::{chain, closure, files_of, rows_for};
use super::list::Health;
use super::record::{LayerRecord, SavedRecord, shape_of};
use super::{CloneError, CloneName, CloneStore, Inner, Problem, Sweep};
use crate::backing::Sealed;
use crate::error::{SpaceError, StoreError};
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageCount, PageSet, PageSize};
use crate::store::copy::{Zeroes, copy_pages};
use crate::store::id::{LayerId, SavedId};
use crate::store::image::DurableImage;
use crate::store::job::Job;
use crate::store::made::{Claim, Made};
use crate::store::saved::{self, Manifest};
use crate::store::sealed::Writer;

/// What the store says of a saved VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SavedInfo {
    /// The name.
    pub name: CloneName,
    /// Its manifest's id.
    pub id: SavedId,
    /// Every layer that it needs, of RAM and of disks.
    pub layers: Vec<LayerId>,
    /// Whether it can be brought back.
    pub health: Health,
}

/// Which store something was saved in, without keeping that open.
#[derive(Clone, Debug)]
pub(crate) struct StoreTag(Weak<Inner>);

impl StoreTag {
    pub(crate) fn is(&self, store: &CloneStore) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&store.0))
    }
}

/// A saved VM in the making: what it made is no orphan, and is removed unless it is finished.
pub(crate) struct NewSaved<'a> {
    store: &'a CloneStore,
    name: CloneName,
    made: Vec<Claim>,
    /// Kept open, so that nobody removes them.
    held: Vec<DurableImage>,
}

impl CloneStore {
    pub(crate) fn tag(&self) -> StoreTag {
        StoreTag(Arc::downgrade(&self.0))
    }

    /// Begins a saved VM of this name.
    pub(crate) fn new_saved(&self, name: &CloneName) -> Result<NewSaved<'_>, CloneError> {
        self.check_free(&self.0.catalogue.lock(), name)?;
        Ok(NewSaved { store: self, name: name.clone(), made: Vec::new(), held: Vec::new() })
    }

    /// The saved VMs, by name. Costs by their layers, and a read of each manifest.
    ///
    /// # Errors
    /// [`CloneError::Catalogue`], or what the system says. What is wrong with one is in its [`Health`].
    pub fn list_saved(&self) -> Result<Vec<SavedInfo>, CloneError> {
        let catalogue = self.0.catalogue.lock();
        let (saved, rows, names) = (catalogue.saved()?, catalogue.layers()?, self.names()?);
        let info = |(name, record): (CloneName, SavedRecord)| {
            let layers: Vec<LayerId> = closure(&rows, record.tops.iter().copied()).into_iter().collect();
            let is_missing = |id: &&LayerId| !files_of(**id).iter().any(|file| names.contains(file));
            let missing: Vec<LayerId> = layers.iter().filter(is_missing).copied().collect();
            let health = match self.manifest(&record) {
                _ if !missing.is_empty() => Health::Degraded { missing },
                Ok(_) => Health::Whole,
                Err(_) => Health::Damaged,
            };
            SavedInfo { name, id: record.id, layers, health }
        };
        Ok(saved.into_iter().map(info).collect())
    }

    /// What a saved VM's manifest says. Costs a read of it, device state included.
    ///
    /// # Errors
    /// [`CloneError::Unknown`]; [`StoreError::Damaged`], [`StoreError::Missing`], [`StoreError::Unknown`], [`StoreError::Limit`].
    pub fn open_manifest(&self, name: &CloneName) -> Result<Manifest, CloneError> {
        let record = self.0.catalogue.lock().saved()?.remove(name);
        self.manifest(&record.ok_or_else(|| CloneError::Unknown { name: name.clone() })?).map_err(Into::into)
    }

    /// Copies a saved VM into another store, under any name free there, with RAM and each disk in one layer that lies on nothing: all that it needs, for
    /// another machine or an archive. `self` is not changed. Costs a read and a write of what is not zero.
    ///
    /// # Errors
    /// [`CloneError::Unknown`], [`CloneError::Exists`], [`CloneError::Degraded`], [`StoreError::Cancelled`]; damage, with file and page. What was made is removed.
    pub fn copy_saved(
        &self,
        name: &CloneName,
        to: &Self,
        new_name: &CloneName,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Manifest, CloneError> {
        let mut manifest = self.open_manifest(name)?;
        manifest.check_for(to.tree().limits().device_state)?;
        let ram_pages = PageCount::new(manifest.ram_len().get() >> PageSize::KIB_4.shift());
        let spaces = std::iter::once((manifest.ram, ram_pages));
        let spaces = spaces.chain(manifest.disks.iter().map(|disk| (disk.layer, disk.pages)));
        let images = spaces.map(|(top, pages)| self.open_saved_image(name, top, pages));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let mut new = to.new_saved(new_name)?;
        let mut tops = Vec::with_capacity(images.len());
        for image in &images {
            let (len, pages) = (Sealed::geometry(image).pages(), Sealed::data(image)?);
            tops.push(match pages.is_empty() {
                true => None,
                false => Some(new.layer(image, len, &pages, None, threads, job)?),
            });
        }
        let mut tops = tops.into_iter();
        manifest.ram = tops.next().flatten();
        manifest.disks.iter_mut().zip(tops).for_each(|(disk, top)| disk.layer = top);
        new.finish(manifest)
    }

    /// The image of some of a saved VM's layers, to be read. Every page is held against its checksum.
    pub(crate) fn open_saved_image(
        &self,
        name: &CloneName,
        top: Option<LayerId>,
        pages: PageCount,
    ) -> Result<DurableImage, CloneError> {
        let Some(shape) = shape_of(pages.get()) else { return Err(too_long(pages)) };
        let catalogue = self.0.catalogue.lock();
        match top {
            None => Ok(DurableImage::root(self.0.dir.clone(), shape, None)),
            Some(id) => self.0.dir.image_at(id, shape, None).map_err(|error| self.told(&catalogue, name, top, error)),
        }
    }

    fn manifest(&self, record: &SavedRecord) -> Result<Manifest, StoreError> {
        let most = self.tree().limits().device_state;
        let manifest = saved::open(self.folder(), record.id, most)?;
        if !manifest.layers().eq(record.tops.iter().copied()) {
            let (file, what) = (saved::file_name(record.id), "it names other layers than the catalogue does");
            return Err(StoreError::Chain { file, what });
        }
        Ok(manifest)
    }

    pub(super) fn manifest_size(&self, record: &SavedRecord) -> Result<ByteSize, CloneError> {
        match saved::allocated(self.folder(), record.id) {
            Err(StoreError::Missing { .. }) => Ok(ByteSize::ZERO),
            size => Ok(size?),
        }
    }

    pub(super) fn delete_saved(
        &self,
        catalogue: &mut Catalogue,
        name: &CloneName,
        record: &SavedRecord,
    ) -> Result<(), CloneError> {
        let removals = vec![saved::file_name(record.id).to_string()];
        let change = Change { saved: vec![(name.clone(), None)], removals, ..Change::default() };
        self.apply(catalogue, change, Sweep::Yes)
    }

    /// The layers that saved VMs need. What is wrong with their manifests goes to `problems`.
    pub(super) fn check_saved(
        &self,
        catalogue: &Catalogue,
        rows: &BTreeMap<LayerId, LayerRecord>,
        problems: &mut Vec<Problem>,
    ) -> Result<BTreeMap<CloneName, BTreeSet<LayerId>>, CloneError> {
        let mut layers = BTreeMap::new();
        for (name, record) in catalogue.saved()? {
            if let Err(error) = self.manifest(&record) {
                problems.push(Problem::File { error });
            }
            layers.insert(name, closure(rows, record.tops));
        }
        Ok(layers)
    }
}

fn too_long(pages: PageCount) -> CloneError {
    let (len, space) = (PageSize::KIB_4.size_of(pages), Geometry::MAX_LEN);
    SpaceError::from(GeometryError::OutOfRange { at: ByteOffset::ZERO, len, space }).into()
}

impl NewSaved<'_> {
    /// Whether a layer may be lain on: it has a row and all its files, and fewer than `most` layers below and with it. It stays for as long as this does.
    pub(crate) fn parent(&mut self, id: LayerId, pages: PageCount, most: u32) -> Result<Option<LayerId>, CloneError> {
        let Some(shape) = shape_of(pages.get()) else { return Err(too_long(pages)) };
        // Opened first: what is read is not removed.
        let Ok(image) = self.store.0.dir.image_at(id, shape, None) else { return Ok(None) };
        let catalogue = self.store.0.catalogue.lock();
        let (rows, names) = (catalogue.layers()?, self.store.names()?);
        let below = chain(self.store.folder(), &rows, &names, Some(id));
        let fits = rows.contains_key(&id) && below.missing.is_empty() && !below.broken;
        if !fits || below.layers.len() as u64 >= u64::from(most) {
            return Ok(None);
        }
        self.held.push(image);
        Ok(Some(id))
    }

    /// Copies pages of 4 KiB of a source into a sealed layer of its own, over `parent` where there is one.
    pub(crate) fn layer(
        &mut self,
        source: &dyn Source,
        pages: PageCount,
        copied: &PageSet,
        parent: Option<LayerId>,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<LayerId, CloneError> {
        let Some(shape) = shape_of(pages.get()) else { return Err(too_long(pages)) };
        let dir = &self.store.0.dir;
        let made = Made::new(dir)?;
        let id = made.id();
        let mut writer = Writer::create(dir.shared_folder(), id, parent, shape)?;
        let zeroes = if parent.is_some() { Zeroes::Kept } else { Zeroes::LeftOut };
        threads.install(|| copy_pages(source, copied, zeroes, &mut writer, job))?;
        writer.finish()?;
        self.made.push(made.into_claim());
        Ok(id)
    }

    /// The topmost layer of an image that lies in this store, frozen; `None` for an image of somewhere else. It goes on to be shared.
    pub(crate) fn shared(&mut self, image: &DurableImage) -> Result<Option<Option<LayerId>>, CloneError> {
        if self.store.check_here(image.folder()).is_err() || image.base().is_some() {
            return Ok(None);
        }
        image.freeze()?;
        self.held.push(image.clone());
        Ok(Some(image.top().map(|layer| layer.id())))
    }

    /// Gives the manifest its id, makes it durable, and names it: from here on the saved VM is there.
    pub(crate) fn finish(mut self, manifest: Manifest) -> Result<Manifest, CloneError> {
        let store = self.store;
        let id = SavedId::random().map_err(|error| store.0.dir.no_id(error))?;
        let manifest = Manifest { id, ..manifest };
        self.made.push(Claim::on(&store.0.dir, &saved::file_name(id)));
        saved::write(store.folder(), &manifest)?;
        let mut catalogue = store.0.catalogue.lock();
        store.check_free(&catalogue, &self.name)?;
        let mut layers: Vec<(LayerId, Option<LayerRecord>)> = Vec::new();
        for top in manifest.layers() {
            for row in rows_for(store.folder(), &catalogue, Some(top))? {
                if !layers.iter().any(|(known, _)| *known == row.0) {
                    layers.push(row);
                }
            }
        }
        let record = SavedRecord { id, tops: manifest.layers().collect() };
        let change = Change { saved: vec![(self.name.clone(), Some(record))], layers, ..Change::default() };
        // A commit that fails may have been made: what it would name stays, and is an orphan if it was not.
        self.made.iter_mut().for_each(Claim::keep);
        store.apply(&mut catalogue, change, Sweep::No)?;
        Ok(manifest)
    }
}
