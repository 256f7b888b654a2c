//! A clone store: a directory of durable disks with names, and a catalogue that knows what lies on what.
//!
//! [`CloneStore::open`] is all that is needed. *Images* are never written, *clones* are disks; both are a name for a topmost layer, and share every layer
//! below it. What each call promises:
//!
//! - **It is one transaction of the catalogue.** Files are made and synced first, then the catalogue is changed, then files that nothing names are
//!   removed. Killed at any point, the store opens to the state before or after.
//! - **One process has it.** A second opener is refused. A clone is open once, and what is open is not deleted or rewritten.
//! - **Nobody writes a parent.** A layer is frozen, durably, before a row names it; the disk it belonged to goes on in a fresh overlay.
//! - **Deleting goes in any order.** A layer stays for as long as any name needs it.
//! - **A clone with a layer missing is degraded:** it is listed, says what is missing, and can be deleted.
//!
//! A clone opens as a [`Durable`], which is a backing like any other. This module must not know of sectors, guests or forks; see `docs/store.md`.

mod catalogue;
mod check;
mod create;
mod database;
mod error;
mod layers;
mod list;
mod open;
mod record;
mod rewrite;
mod saved;

pub use check::{Problem, Repaired};
pub use error::CloneError;
pub use list::{CloneInfo, Health, SpaceUsed};
pub use record::{CloneName, Kind};
pub use saved::SavedInfo;
pub(crate) use saved::{NewSaved, StoreTag};

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use self::catalogue::{Catalogue, Change};
use self::layers::{chain, closure, files_of, rows_for};
use self::record::{CloneRecord, LayerRecord};
use super::directory::DiskDir;
use super::durable::Durable;
use super::file;
use super::head::{self, Head};
use super::id::{DiskId, LayerId};
use super::image::DurableImage;
use super::layer::{Body, Layer};
use super::medium::{Folder, Sharing, SystemFolder};
use super::overlay::Overlay;
use super::record::Purpose;
use crate::backing::Tree;
use crate::error::{SpaceError, StoreError};
use crate::sys::entropy::fill_random;

/// How a store is opened.
#[derive(Clone, Default, Debug)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Where its disks count, and are limited.
    pub tree: Tree,
}

impl StoreOptions {
    /// Has its disks count in this tree.
    #[must_use]
    pub fn tree(self, tree: &Tree) -> Self {
        Self { tree: tree.clone() }
    }
}

/// A directory of clones and images. Clones of this handle are one reference; the store is closed with the last.
///
/// Every call is one transaction: killed at any point, the store opens to the state before or after. A second opener is refused. What is open is not
/// deleted or rewritten, and nobody writes a layer that others lie on.
///
/// ```
/// use offshoot::backing::Backing;
/// use offshoot::page::{ByteOffset, ByteSize};
/// use offshoot::store::{CloneName, CloneStore, StoreOptions};
/// # let path = std::env::temp_dir().join(format!("offshoot-clones-doc-{}", std::process::id()));
/// let store = CloneStore::open(&path, StoreOptions::default())?;
/// let (golden, web) = (CloneName::new("golden")?, CloneName::new("web-1")?);
/// store.create_empty(&golden, ByteSize::gib(64))?;
/// store.open_disk(&golden)?.write(ByteOffset::new(4096), b"installed")?; // not flushed, and so not kept
/// let disk = store.open_disk(&golden)?;
/// disk.write(ByteOffset::new(4096), b"INSTALLED")?;
/// disk.flush()?;
/// drop(disk);
///
/// store.clone_disk(&golden, &web)?; // one commit of the catalogue, whatever the size
/// let disk = store.open_disk(&web)?;
/// let mut found = [0; 9];
/// disk.read(ByteOffset::new(4096), &mut found)?;
/// assert_eq!(&found, b"INSTALLED");
/// drop(disk);
/// store.delete(&golden)?; // the clone keeps the layer
/// let mut found = [0; 9];
/// store.open_disk(&web)?.read(ByteOffset::new(4096), &mut found)?;
/// assert_eq!(&found, b"INSTALLED");
/// # drop(store);
/// # std::fs::remove_dir_all(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CloneStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: DiskDir,
    catalogue: Mutex<Catalogue>,
    /// A layer had no file when the store was opened: others are looked for before a clone is made.
    some_missing: bool,
}

/// A row and, where the disk has one, its head: nobody else has it open.
struct Held {
    name: CloneName,
    record: CloneRecord,
    head: Option<Head>,
}

impl Held {
    fn top(&self) -> Option<LayerId> {
        self.head.as_ref().map_or(self.record.top, Head::top)
    }
}

/// Whether a clone that has no head yet is given one, to be held by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// For as long as the catalogue is locked.
    Briefly,
    /// Longer.
    Long,
}

/// Whether layers may have lost their last name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sweep {
    No,
    Yes,
}

impl CloneStore {
    /// Opens the store in a directory; makes both where they are not there. Finishes removals that a crash cut off.
    ///
    /// Costs by the catalogue, not by the disks.
    ///
    /// # Errors
    /// [`StoreError::InUse`] where another process, or this one, has it open; [`CloneError::NoCatalogue`] where the catalogue of a store is gone;
    /// [`CloneError::UnknownCatalogue`]; [`CloneError::Catalogue`] where it is damaged; what the system says.
    pub fn open(path: impl AsRef<Path>, options: StoreOptions) -> Result<Self, CloneError> {
        let path = path.as_ref();
        let name: Arc<str> = path.display().to_string().into();
        let told = |call| {
            let name = name.clone();
            move |error| file::error(&name, call, error)
        };
        match std::fs::create_dir(path) {
            Ok(()) => {
                let parent = match path.parent() {
                    Some(parent) if parent != Path::new("") => parent,
                    _ => Path::new("."),
                };
                SystemFolder::open(parent).and_then(|parent| parent.sync()).map_err(told("sync of its name"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(told("create")(error).into()),
        }
        let folder = SystemFolder::open(path).map_err(told("open"))?;
        Self::over(Arc::new(folder), options)
    }

    /// Opens the store in a folder of your own kind.
    ///
    /// # Errors
    /// As [`CloneStore::open`].
    pub fn over(folder: Arc<dyn Folder>, options: StoreOptions) -> Result<Self, CloneError> {
        let catalogue = Catalogue::open(&*folder)?;
        let names: BTreeSet<String> = {
            let names = folder.names().map_err(|error| file::error(&"the directory".into(), "list", error))?;
            names.into_iter().collect()
        };
        let is_missing = |id: &LayerId| !files_of(*id).iter().any(|file| names.contains(file));
        let some_missing = catalogue.layers()?.keys().any(is_missing);
        let dir = DiskDir::over(folder, &options.tree);
        let catalogue = Mutex::new(catalogue);
        let store = Self(Arc::new(Inner { dir, catalogue, some_missing }));
        store.remove_unnamed(&mut store.0.catalogue.lock())?;
        Ok(store)
    }

    /// Opens a clone to read and write it, as it was when it was last flushed, or later.
    ///
    /// # Errors
    /// [`CloneError::Unknown`], [`CloneError::Open`], [`CloneError::Degraded`], [`CloneError::WrongKind`] for an image; as [`DiskDir::open_disk`].
    pub fn open_disk(&self, name: &CloneName) -> Result<Durable, CloneError> {
        let catalogue = self.0.catalogue.lock();
        let held = self.hold(&catalogue, name, Hold::Long)?;
        if held.record.kind == Kind::Image {
            return Err(CloneError::WrongKind { name: name.clone(), kind: Kind::Image, what: "written" });
        }
        let (disk, top) = (held.record.disk, held.top());
        drop(held);
        self.0.dir.open_disk(disk, None).map_err(|error| self.told(&catalogue, name, top, error))
    }

    /// Opens an image, or a clone that nobody has open, to read it. A clone goes on in a fresh overlay when it is next opened.
    ///
    /// # Errors
    /// As [`CloneStore::open_disk`]; images are not refused.
    pub fn open_image(&self, name: &CloneName) -> Result<DurableImage, CloneError> {
        let catalogue = self.0.catalogue.lock();
        let held = self.hold(&catalogue, name, Hold::Briefly)?;
        self.image(&catalogue, &held)
    }

    /// Where its disks count.
    pub fn tree(&self) -> &Tree {
        self.0.dir.tree()
    }

    fn folder(&self) -> &dyn Folder {
        self.0.dir.folder()
    }

    fn record(&self, catalogue: &Catalogue, name: &CloneName) -> Result<CloneRecord, CloneError> {
        catalogue.clone(name)?.ok_or_else(|| CloneError::Unknown { name: name.clone() })
    }

    fn check_free(&self, catalogue: &Catalogue, name: &CloneName) -> Result<(), CloneError> {
        match catalogue.clone(name)?.is_none() && !catalogue.saved()?.contains_key(name) {
            true => Ok(()),
            false => Err(CloneError::Exists { name: name.clone() }),
        }
    }

    /// Makes sure that nobody has it open, and that nobody opens it meanwhile.
    fn hold(&self, catalogue: &Catalogue, name: &CloneName, hold: Hold) -> Result<Held, CloneError> {
        let record = self.record(catalogue, name)?;
        let open = || match Head::open(self.folder(), record.disk, Purpose::Write) {
            Ok(head) => Ok(Some(head)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(StoreError::InUse { .. }) => Err(CloneError::Open { name: name.clone() }),
            Err(error) => Err(error.into()),
        };
        let mut head = open()?;
        // An image is never written, and needs no head to be held by.
        if head.is_none() && hold == Hold::Long && record.kind == Kind::Clone {
            Head::create_whole(self.folder(), record.disk, record.top, record.shape())?;
            head = open()?;
        }
        Ok(Held { name: name.clone(), record, head })
    }

    /// Makes the topmost layer one that nobody ever writes again.
    fn freeze(&self, top: Option<LayerId>) -> Result<(), StoreError> {
        let Some(top) = top else { return Ok(()) };
        match Layer::open(self.folder(), top)? {
            Body::Overlay(overlay) if !overlay.is_frozen() => {}
            _ => return Ok(()),
        }
        let overlay = Overlay::open(self.folder(), top, Purpose::Write)?;
        if overlay.is_corrupt() {
            return Err(StoreError::MarkedCorrupt { file: overlay.file().name().clone() });
        }
        overlay.freeze()
    }

    /// What it reads as, frozen.
    fn image(&self, catalogue: &Catalogue, held: &Held) -> Result<DurableImage, CloneError> {
        let (top, shape) = (held.top(), held.record.shape());
        let Some(id) = top else { return Ok(DurableImage::root(self.0.dir.clone(), shape, None)) };
        let told = |error| self.told(catalogue, &held.name, top, error);
        self.freeze(top).map_err(|error| told(error.into()))?;
        self.0.dir.image_at(id, shape, None).map_err(told)
    }

    /// An error of opening, with its meaning for the name.
    fn told(&self, catalogue: &Catalogue, name: &CloneName, top: Option<LayerId>, error: SpaceError) -> CloneError {
        if let SpaceError::Store(StoreError::Missing { .. }) = error
            && let (Ok(rows), Ok(names)) = (catalogue.layers(), self.names())
        {
            let missing = chain(self.folder(), &rows, &names, top).missing;
            if !missing.is_empty() {
                return CloneError::Degraded { name: name.clone(), missing };
            }
        }
        error.into()
    }

    /// Refuses to build on a layer that was missing when the store was opened.
    fn check_whole(&self, catalogue: &Catalogue, name: &CloneName, top: Option<LayerId>) -> Result<(), CloneError> {
        if !self.0.some_missing {
            return Ok(());
        }
        let missing = chain(self.folder(), &catalogue.layers()?, &self.names()?, top).missing;
        if missing.is_empty() { Ok(()) } else { Err(CloneError::Degraded { name: name.clone(), missing }) }
    }

    fn names(&self) -> Result<BTreeSet<String>, CloneError> {
        let names = self.folder().names();
        Ok(names.map_err(|error| file::error(&"the directory".into(), "list", error))?.into_iter().collect())
    }

    /// Ids that nobody else has: of a disk, and of a generation.
    fn fresh(&self) -> Result<(DiskId, [u8; 16]), CloneError> {
        let told = |error| self.0.dir.no_id(error);
        let mut generation = [0; 16];
        fill_random(&mut generation).map_err(told)?;
        Ok((DiskId::random().map_err(told)?, generation))
    }

    /// Makes a change of the catalogue, and removes what it leaves without a name.
    fn apply(&self, catalogue: &mut Catalogue, mut change: Change, sweep: Sweep) -> Result<(), CloneError> {
        if sweep == Sweep::Yes {
            self.sweep(catalogue, &mut change)?;
        }
        catalogue.apply(&change)?;
        if !change.removals.is_empty()
            && let Err(error) = self.remove_unnamed(catalogue)
        {
            // The change is made. What is left is tried again when the store is opened.
            tracing::warn!(%error, "files that nothing names were left behind");
        }
        Ok(())
    }

    /// Adds to a change the layers and heads that nothing needs once it is made.
    fn sweep(&self, catalogue: &Catalogue, change: &mut Change) -> Result<(), CloneError> {
        let (mut clones, mut rows) = (catalogue.clones()?, catalogue.layers()?);
        let disks: BTreeSet<DiskId> = clones.values().map(|record| record.disk).collect();
        for (name, record) in &change.clones {
            match record {
                Some(record) => clones.insert(name.clone(), *record),
                None => clones.remove(name),
            };
        }
        rows.extend(change.layers.iter().filter_map(|(id, record)| Some((*id, (*record)?))));
        let mut saved = catalogue.saved()?;
        change.saved.iter().filter(|(_, record)| record.is_none()).for_each(|(name, _)| drop(saved.remove(name)));
        let named = clones.values().flat_map(|record| [record.top, record.origin]).flatten();
        let mut reached = closure(&rows, named.chain(saved.into_values().flat_map(|record| record.tops)));
        let names = self.names()?;
        // Held before heads are asked: what nobody has open is named by now, or never will be. What somebody reads waits for the next time.
        let candidates: Vec<LayerId> = rows.keys().filter(|id| !reached.contains(id)).copied().collect();
        let mut free = Vec::new();
        for id in candidates {
            let files: Vec<_> = files_of(id).into_iter().filter(|file| names.contains(file)).collect();
            let held: Vec<_> = files.iter().map(|file| self.folder().open(file, Sharing::Alone)).collect();
            if held.iter().all(Result::is_ok) {
                free.push((id, files, held));
            }
        }
        if !free.is_empty() && !self.reach_from_heads(&clones, &rows, &names, &mut reached) {
            // Nobody can say what a head leads to that cannot be read.
            free.clear();
        }
        for (id, files, _held) in free.into_iter().filter(|(id, ..)| !reached.contains(id)) {
            change.layers.push((id, None));
            change.removals.extend(files);
        }
        let kept: BTreeSet<DiskId> = clones.values().map(|record| record.disk).collect();
        let heads = disks.difference(&kept).map(|disk| head::file_name(*disk).to_string());
        change.removals.extend(heads.filter(|head| names.contains(head)));
        Ok(())
    }

    /// Adds the layers that heads lead to: a disk goes on over its own layers without the catalogue being told. Disks that are open hold theirs.
    /// Whether
    /// every head could be read.
    fn reach_from_heads(
        &self,
        clones: &BTreeMap<CloneName, CloneRecord>,
        rows: &BTreeMap<LayerId, LayerRecord>,
        names: &BTreeSet<String>,
        reached: &mut BTreeSet<LayerId>,
    ) -> bool {
        for record in clones.values().filter(|record| names.contains(&*head::file_name(record.disk))) {
            match Head::open(self.folder(), record.disk, Purpose::Read) {
                Ok(head) => {
                    let chain = chain(self.folder(), rows, names, head.top());
                    if chain.broken {
                        return false;
                    }
                    reached.extend(chain.layers);
                }
                Err(StoreError::InUse { .. }) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Removes the files of which the catalogue says so.
    fn remove_unnamed(&self, catalogue: &mut Catalogue) -> Result<Vec<String>, CloneError> {
        let names = catalogue.removals()?;
        if names.is_empty() {
            return Ok(names);
        }
        for name in &names {
            match self.folder().remove(name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(file::error(&name.as_str().into(), "remove", error).into());
                }
                _ => {}
            }
        }
        self.0.dir.sync_names()?;
        catalogue.removed(names.iter().cloned());
        Ok(names)
    }

    /// Gives a name to a topmost layer that is frozen and durable.
    fn name_layer(&self, catalogue: &mut Catalogue, name: &CloneName, new: CloneRecord) -> Result<(), CloneError> {
        self.check_free(catalogue, name)?;
        let layers = rows_for(self.folder(), catalogue, new.top)?;
        let change = Change { clones: vec![(name.clone(), Some(new))], layers, ..Change::default() };
        self.apply(catalogue, change, Sweep::No)
    }
}
