//! A directory of durable disks: making and opening them, and the images that are open.
//!
//! Layers are found by their ids, which are their names, never by a path that a file tells. An image that is held in this process is shared with
//! whoever opens a disk over the same layer, so that relatives stay relatives.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use super::durable::{Durable, Live, State};
use super::file;
use super::head::Head;
use super::id::{DISK, DiskId, LayerId};
use super::image::{DurableImage, Inner as ImageInner};
use super::layer::{Body, Layer};
use super::medium::{Folder, SystemFolder};
use super::overlay::{Overlay, Shape};
use super::record::Purpose;
use crate::backing::Tree;
use crate::error::{SpaceError, StoreError};
use crate::image::Source;
use crate::page::{ByteOffset, Geometry, GeometryError, PageSize};

/// Layers between a disk and its last ancestor. Opening reads each of them once.
const MOST_LAYERS: u64 = 1 << 16;

/// A directory of durable disks. Clones of it are one reference. Any number of processes may have it open.
#[derive(Clone, Debug)]
pub struct DiskDir(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: Arc<str>,
    folder: Arc<dyn Folder>,
    tree: Tree,
    /// Images by their topmost layer, while somebody holds them.
    images: Mutex<HashMap<LayerId, Weak<ImageInner>>>,
    /// Files that are being made, and that nothing names yet.
    making: Mutex<HashSet<String>>,
    /// As for a file: a sync that failed once is not believed again.
    sync_failed: AtomicBool,
}

impl DiskDir {
    /// Opens a directory that exists. What lies in it counts, and is limited, in `tree`.
    ///
    /// # Errors
    /// [`StoreError::Missing`], or what the system says.
    pub fn open(path: impl AsRef<Path>, tree: &Tree) -> Result<Self, SpaceError> {
        let path = path.as_ref();
        let name: Arc<str> = path.display().to_string().into();
        let folder = SystemFolder::open(path).map_err(|error| file::error(&name, "open", error))?;
        Ok(Self::named(name, Arc::new(folder), tree))
    }

    /// A directory of your own kind.
    pub fn over(folder: Arc<dyn Folder>, tree: &Tree) -> Self {
        Self::named("the folder".into(), folder, tree)
    }

    /// A directory among the system's temporary files, which goes with its last user.
    pub(super) fn scratch(tree: &Tree) -> Result<Self, SpaceError> {
        let name: Arc<str> = "a scratch directory".into();
        let told = |error| SpaceError::from(file::error(&name, "create", error));
        let id = LayerId::random().map_err(told)?;
        let folder = SystemFolder::scratch(&format!("offshoot-{id}")).map_err(told)?;
        Ok(Self::named(name, Arc::new(folder), tree))
    }

    fn named(name: Arc<str>, folder: Arc<dyn Folder>, tree: &Tree) -> Self {
        let (images, making) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { name, folder, tree: tree.clone(), images, making, sync_failed: AtomicBool::new(false) }))
    }

    /// A new disk that reads as `base`, followed by zeroes up to the end of `geometry`. It is durable, empty, when this returns.
    ///
    /// Nobody may write to the base image for as long as the disk exists.
    ///
    /// # Errors
    /// [`SpaceError::PageSize`] unless pages have 4 KiB, [`SpaceError::Geometry`] where `base` is longer than the disk, or what the medium says.
    pub fn create(&self, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Durable, SpaceError> {
        if geometry.page_size() != PageSize::KIB_4 {
            return Err(SpaceError::PageSize { size: geometry.page_size(), backing: "Durable", instead: "4096" });
        }
        let base_len = base.as_ref().map(|base| base.len());
        if let Some(len) = base_len.filter(|len| *len > geometry.len()) {
            return Err(GeometryError::OutOfRange { at: ByteOffset::ZERO, len, space: geometry.len() }.into());
        }
        let id = DiskId::random().map_err(|error| self.no_id(error))?;
        let image = DurableImage::root(self.clone(), Shape { geometry, base_len }, base);
        let disk = Durable::new(self.clone(), id, State::over(image), None);
        disk.flush_all()?;
        Ok(disk)
    }

    /// Opens a disk to read and write it, as it was when it was last flushed, or later. `base` is the image that it was made over.
    ///
    /// # Errors
    /// [`StoreError::InUse`] where somebody has it open already; [`StoreError::Missing`], which names the disk or the layer that is not there;
    /// [`StoreError::Damaged`], after which it is marked as corrupt; [`StoreError::MarkedCorrupt`]; [`StoreError::Unknown`]; [`StoreError::Chain`].
    pub fn open_disk(&self, id: DiskId, base: Option<Arc<dyn Source>>) -> Result<Durable, SpaceError> {
        let head = Head::open(self.folder(), id, Purpose::Write)?;
        // Who made the disk may have been killed before its name was durable.
        self.sync_names()?;
        check_base(&head, base.as_deref())?;
        let state = match head.top() {
            None => State::over(DurableImage::root(self.clone(), head.shape(), base)),
            Some(top) => self.state_at(top, head.shape(), base)?,
        };
        Ok(Durable::new(self.clone(), id, state, Some(head)))
    }

    /// What a disk goes on from whose latest writes are in this layer: the layer itself, or a fresh overlay where it is frozen.
    fn state_at(&self, top: LayerId, shape: Shape, base: Option<Arc<dyn Source>>) -> Result<State, SpaceError> {
        if let Some(image) = self.held(top, shape, base.as_ref()) {
            return Ok(State::over(image));
        }
        let writable = match Layer::open(self.folder(), top) {
            Ok(Body::Overlay(overlay)) => !overlay.is_frozen(),
            Ok(Body::Sealed(_)) => false,
            // Somebody writes it: the error is that of trying to do so too.
            Err(StoreError::InUse { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        if !writable {
            return Ok(State::over(self.image_at(top, shape, base)?));
        }
        let overlay = Overlay::open(self.folder(), top, Purpose::Write)?;
        if overlay.is_corrupt() {
            return Err(StoreError::MarkedCorrupt { file: overlay.file().name().clone() }.into());
        }
        if overlay.is_frozen() {
            drop(overlay);
            return Ok(State::over(self.image_at(top, shape, base)?));
        }
        if overlay.shape() != shape {
            return Err(overlay.file().chain(OTHER_SHAPE).into());
        }
        let below = match overlay.parent() {
            Some(parent) => self.image_at(parent, shape, base)?,
            None => DurableImage::root(self.clone(), shape, base),
        };
        let live = Live::new(self.clone(), overlay, below.top().cloned());
        // Named by the head that led here, whatever comes of it.
        live.named.store(true, Ordering::Relaxed);
        let layer = live.layer.clone();
        State::reopened(below, live).inspect_err(|error| {
            if let (SpaceError::Store(StoreError::Damaged { .. }), Some(overlay)) = (error, layer.overlay())
                && let Err(error) = overlay.mark_corrupt()
            {
                tracing::error!(%error, "a damaged overlay could not be marked");
            }
        })
    }

    /// Opens a disk to read it, as it was when it was last flushed, or later. Works where the disk is marked as corrupt: reading a page that cannot be told is an
    /// error that names it. Fork a disk that is open to get an image of it.
    ///
    /// # Errors
    /// As [`DiskDir::open_disk`]; nothing is marked.
    pub fn open_image(&self, id: DiskId, base: Option<Arc<dyn Source>>) -> Result<DurableImage, SpaceError> {
        let head = Head::open(self.folder(), id, Purpose::Read)?;
        check_base(&head, base.as_deref())?;
        let Some(top) = head.top() else { return Ok(DurableImage::root(self.clone(), head.shape(), base)) };
        if let Some(image) = self.held(top, head.shape(), base.as_ref()) {
            return Ok(image);
        }
        let body = Layer::open(self.folder(), top)?;
        let below = match body.parent() {
            Some(parent) => self.image_at(parent, head.shape(), base)?,
            None => DurableImage::root(self.clone(), head.shape(), base),
        };
        below.stack(top, body)
    }

    /// The image whose topmost layer is `top`, with all below it. Every one must be frozen.
    pub(super) fn image_at(
        &self,
        top: LayerId,
        shape: Shape,
        base: Option<Arc<dyn Source>>,
    ) -> Result<DurableImage, SpaceError> {
        let (mut bodies, mut seen) = (Vec::new(), HashSet::new());
        let mut image = None;
        let mut above = shape;
        let mut next = Some(top);
        while let Some(id) = next {
            image = self.held(id, shape, base.as_ref());
            if image.is_some() {
                break;
            }
            let body = Layer::open(self.folder(), id)?;
            let file = match &body {
                Body::Overlay(overlay) => overlay.file(),
                Body::Sealed(sealed) => sealed.file(),
            };
            let found = seen.len() as u64 + 1;
            if found > MOST_LAYERS {
                return Err(file.limit("layers in a chain", found, MOST_LAYERS).into());
            }
            if !seen.insert(id) {
                return Err(file.chain("it is its own ancestor: the chain of layers has a cycle").into());
            }
            // A layer may be shorter than the one over it: the disk grew. None is longer, so nothing of it comes back.
            let here = body.shape();
            if here.base_len != shape.base_len || here.geometry.len() > above.geometry.len() {
                return Err(file.chain(OTHER_SHAPE).into());
            }
            above = here;
            if matches!(&body, Body::Overlay(overlay) if !overlay.is_frozen()) {
                return Err(file
                    .chain("it is named as a parent, and is not frozen: its child was never durable")
                    .into());
            }
            next = body.parent();
            bodies.push((id, body));
        }
        let mut image = image.unwrap_or_else(|| DurableImage::root(self.clone(), shape, base));
        for (id, body) in bodies.into_iter().rev() {
            image = image.stack(id, body)?;
            image.remember();
        }
        Ok(image)
    }

    /// The image of this layer that somebody in this process holds.
    fn held(&self, id: LayerId, shape: Shape, base: Option<&Arc<dyn Source>>) -> Option<DurableImage> {
        let image = DurableImage::from_inner(self.0.images.lock().get(&id)?.upgrade()?);
        // A disk that grew lies on layers of the length that it had.
        if image.shape() != shape {
            return None;
        }
        let same_base = match (image.base(), base) {
            (Some(held), Some(given)) => Arc::ptr_eq(held, given),
            (None, None) => true,
            _ => false,
        };
        same_base.then_some(image)
    }

    pub(super) fn remember(&self, id: LayerId, image: &Arc<ImageInner>) {
        let mut images = self.0.images.lock();
        // Room for as many again keeps the forgetting at a constant cost an image.
        if images.len() == images.capacity() {
            images.retain(|_, image| image.strong_count() > 0);
            let left = images.len();
            images.reserve(left + 1);
        }
        images.insert(id, Arc::downgrade(image));
    }

    /// The disks in it, in no order.
    ///
    /// # Errors
    /// What the system says.
    pub fn disks(&self) -> Result<Vec<DiskId>, SpaceError> {
        Ok(self.list()?.iter().filter_map(|name| DiskId::parse(name.strip_suffix(DISK)?.strip_suffix('.')?)).collect())
    }

    pub(super) fn list(&self) -> Result<Vec<String>, StoreError> {
        self.folder().names().map_err(|error| file::error(&self.0.name, "list", error))
    }

    /// The tree that its disks count in.
    pub fn tree(&self) -> &Tree {
        &self.0.tree
    }

    pub(super) fn folder(&self) -> &dyn Folder {
        &*self.0.folder
    }

    pub(super) fn shared_folder(&self) -> Arc<dyn Folder> {
        self.0.folder.clone()
    }

    /// Makes new names durable.
    pub(super) fn sync_names(&self) -> Result<(), StoreError> {
        if self.0.sync_failed.load(Ordering::Acquire) {
            return Err(StoreError::SyncFailed { file: self.0.name.clone() });
        }
        self.folder().sync().map_err(|error| {
            self.0.sync_failed.store(true, Ordering::Release);
            file::error(&self.0.name, "sync", error)
        })
    }

    pub(super) fn in_the_making(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.making.lock()
    }

    pub(super) fn no_id(&self, error: io::Error) -> StoreError {
        file::error(&self.0.name, "random numbers for a name", error)
    }
}

const OTHER_SHAPE: &str = "it belongs to a disk of another length, or over another base";

fn check_base(head: &Head, base: Option<&dyn Source>) -> Result<(), StoreError> {
    let found = base.map(|base| base.len());
    match (head.shape().base_len, found) {
        (made, found) if made == found => Ok(()),
        (None, Some(_)) => Err(head.file().chain("it lies over no base image, and one was given")),
        (Some(_), None) => Err(head.file().chain("it lies over a base image: give the one that it was made over")),
        _ => Err(head.file().chain("the base image has another length than the one that it was made over")),
    }
}
