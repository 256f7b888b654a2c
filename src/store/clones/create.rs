//! Making images and clones. Must not replace or remove anything.

use super::record::{CloneRecord, Kind, shape_of};
use super::{CloneError, CloneName, CloneStore, Hold};
use crate::backing::{Backing, Cut, Sealed};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageSet, PageSize};
use crate::store::copy::{Zeroes, copy_pages};
use crate::store::durable::Durable;
use crate::store::id::LayerId;
use crate::store::image::DurableImage;
use crate::store::job::Job;
use crate::store::made::Made;
use crate::store::overlay::Shape;
use crate::store::record::BLOCK;
use crate::store::sealed::Writer;

/// The shape of a disk of this size.
pub(super) fn checked_shape(size: ByteSize) -> Result<Shape, CloneError> {
    let geometry = Geometry::new(size, PageSize::KIB_4).map_err(SpaceError::from)?;
    shape_of(geometry.pages().get()).ok_or_else(|| {
        SpaceError::from(GeometryError::OutOfRange { at: ByteOffset::ZERO, len: size, space: Geometry::MAX_LEN }).into()
    })
}

impl CloneStore {
    /// A new clone of zeroes, of a whole number of 4 KiB pages. Takes no room.
    ///
    /// # Errors
    /// [`CloneError::Exists`]; [`SpaceError::Geometry`] for a size that cannot be; [`CloneError::Catalogue`].
    pub fn create_empty(&self, name: &CloneName, size: ByteSize) -> Result<(), CloneError> {
        let pages = checked_shape(size)?.geometry.pages().get();
        let record = self.new_record(Kind::Clone, None, pages)?;
        self.name_layer(&mut self.0.catalogue.lock(), name, record)
    }

    /// A new image with the content of a source, a raw image say, copied into one sealed layer; zero up to a whole page. Pages of zeroes take no
    /// room. Costs a
    /// read of the source; other calls go on meanwhile.
    ///
    /// # Errors
    /// As [`CloneStore::create_empty`]; what the source or the medium says; [`StoreError::Cancelled`](crate::StoreError::Cancelled).
    pub fn create_image(&self, name: &CloneName, source: &dyn Source, job: &Job<'_>) -> Result<(), CloneError> {
        let size = ByteSize::new(source.len().get().next_multiple_of(BLOCK as u64));
        let shape = checked_shape(size)?;
        self.check_free(&self.0.catalogue.lock(), name)?;
        let all: PageSet = std::iter::once(shape.geometry.all()).fold(PageSet::default(), |mut set, range| {
            set.push(range);
            set
        });
        let mut made = self.seal_layer(None, shape, |writer| copy_pages(source, &all, Zeroes::LeftOut, writer, job))?;
        let record = self.new_record(Kind::Image, Some(made.id()), shape.geometry.pages().get())?;
        let mut catalogue = self.0.catalogue.lock();
        self.check_free(&catalogue, name)?;
        made.keep();
        self.name_layer(&mut catalogue, name, record)
    }

    /// A new clone that reads as `source` does, an image or a clone that nobody has open. Costs one commit of the catalogue, whatever the disk's
    /// size or fragmentation
    /// (and, where the source was written since it was last cloned, the freezing of its overlay).
    ///
    /// # Errors
    /// [`CloneError::Unknown`], [`CloneError::Exists`], [`CloneError::Open`], [`CloneError::Degraded`], [`CloneError::Catalogue`]; what the medium
    /// says.
    pub fn clone_disk(&self, source: &CloneName, name: &CloneName) -> Result<(), CloneError> {
        self.name_copy(source, name, Kind::Clone)
    }

    /// A new image of what `source` holds, to be kept as it is. Costs as [`CloneStore::clone_disk`].
    ///
    /// # Errors
    /// As [`CloneStore::clone_disk`].
    pub fn snapshot(&self, source: &CloneName, name: &CloneName) -> Result<(), CloneError> {
        self.name_copy(source, name, Kind::Image)
    }

    fn name_copy(&self, source: &CloneName, name: &CloneName, kind: Kind) -> Result<(), CloneError> {
        let mut catalogue = self.0.catalogue.lock();
        self.check_free(&catalogue, name)?;
        let held = self.hold(&catalogue, source, Hold::Briefly)?;
        let top = held.top();
        self.check_whole(&catalogue, source, top)?;
        self.freeze(top).map_err(|error| self.told(&catalogue, source, top, error.into()))?;
        let record = self.new_record(kind, top, held.record.pages)?;
        self.name_layer(&mut catalogue, name, record)
    }

    /// Keeps the image of a disk that is open, as it is at this instant; the disk goes on. Costs a flush and a commit of the catalogue.
    ///
    /// # Errors
    /// [`CloneError::Exists`], [`CloneError::OtherStore`], [`CloneError::Catalogue`]; as [`Backing::cut`].
    pub fn snapshot_open(&self, disk: &Durable, name: &CloneName) -> Result<(), CloneError> {
        self.check_here(disk.dir().folder())?;
        self.check_free(&self.0.catalogue.lock(), name)?;
        let (image, deferred) = disk.cut()?.commit();
        drop(deferred);
        self.keep(&image, name, Kind::Image)
    }

    /// Gives an image of one of the store's disks a name: a fork point's, say. It is an image of the store from then on, or a clone.
    ///
    /// # Errors
    /// As [`CloneStore::snapshot_open`]; [`StoreError::Missing`](crate::StoreError::Missing) where its layers were removed meanwhile.
    pub fn keep(&self, image: &DurableImage, name: &CloneName, kind: Kind) -> Result<(), CloneError> {
        self.check_here(image.folder())?;
        let mut catalogue = self.0.catalogue.lock();
        image.freeze()?;
        let top = image.top().map(|layer| layer.id());
        let record = self.new_record(kind, top, Sealed::geometry(image).pages().get())?;
        self.name_layer(&mut catalogue, name, record)
    }

    /// Gives an open disk a name that was forked from one of the store's, with its VM say: without one it is not of the store, and goes with a
    /// repair. It is flushed first.
    ///
    /// # Errors
    /// As [`CloneStore::keep`]; [`CloneError::Exists`] also where the disk has a name already.
    pub fn adopt(&self, disk: &Durable, name: &CloneName) -> Result<(), CloneError> {
        self.check_here(disk.dir().folder())?;
        disk.flush()?;
        let mut catalogue = self.0.catalogue.lock();
        if let Some((name, _)) = catalogue.clones()?.into_iter().find(|(_, record)| record.disk == disk.id()) {
            return Err(CloneError::Exists { name });
        }
        let origin = disk.origin();
        origin.freeze()?;
        let top = origin.top().map(|layer| layer.id());
        let record = self.new_record(Kind::Clone, top, Backing::geometry(disk).pages().get())?;
        self.name_layer(&mut catalogue, name, CloneRecord { disk: disk.id(), ..record })
    }

    pub(super) fn check_here(&self, folder: &dyn crate::store::Folder) -> Result<(), CloneError> {
        if std::ptr::addr_eq(folder, self.folder()) { Ok(()) } else { Err(CloneError::OtherStore) }
    }

    pub(super) fn new_record(&self, kind: Kind, top: Option<LayerId>, pages: u64) -> Result<CloneRecord, CloneError> {
        let (disk, generation) = self.fresh()?;
        Ok(CloneRecord { kind, disk, generation, top, origin: top, pages, origin_pages: pages })
    }

    /// A new sealed layer, durable when this returns. No row names it yet: until it is kept it goes with the claim.
    pub(super) fn seal_layer(
        &self,
        parent: Option<LayerId>,
        shape: Shape,
        fill: impl FnOnce(&mut Writer) -> Result<(), SpaceError>,
    ) -> Result<Made, CloneError> {
        let made = Made::new(&self.0.dir)?;
        let mut writer = Writer::create(self.0.dir.shared_folder(), made.id(), parent, shape)?;
        fill(&mut writer)?;
        writer.finish()?;
        Ok(made)
    }
}
