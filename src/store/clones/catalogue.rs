//! The catalogue: one file with a few small tables, changed by transactions.
//!
//! It lies in the store's folder like every other file and is read and written through the same trait, so that tests can cut its power
//! and fail its calls. The file is held alone for as long as the store is open: a second opener is refused. A new catalogue is made under another
//! name
//! and renamed, so there is a whole one or none. Must not know what the rows are for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;

use redb::{ReadableTable, TableDefinition};

use super::database::{Guarded, damaged, failed};
use super::error::CloneError;
use super::record::{CloneName, CloneRecord, LayerRecord, SavedRecord};
use crate::store::file;
use crate::store::id::{DISK, LAYER, LayerId, OVERLAY, PARTIAL, VM};
use crate::store::medium::{Folder, Medium, Sharing};

pub(super) const FILE: &str = "catalogue.redb";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const CLONES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("clones");
const LAYERS: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("layers");
/// Files that nothing names any more, until they are gone.
const REMOVALS: TableDefinition<'_, &str, ()> = TableDefinition::new("removals");

/// Saved VMs. Made with the first of them, with its feature.
const SAVED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("saved");

const VERSION: u64 = 1;
/// There are saved VMs: who does not know of them would take their layers for nobody's.
const FEATURE_SAVED: u64 = 1;

/// An open catalogue.
pub(super) struct Catalogue {
    database: Guarded,
    /// Removals that were done: their rows go with the next transaction.
    done: BTreeSet<String>,
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalogue").finish_non_exhaustive()
    }
}

/// What a transaction does.
#[derive(Default, Debug)]
pub(super) struct Change {
    /// `None` takes the name out.
    pub(super) clones: Vec<(CloneName, Option<CloneRecord>)>,
    pub(super) layers: Vec<(LayerId, Option<LayerRecord>)>,
    pub(super) saved: Vec<(CloneName, Option<SavedRecord>)>,
    pub(super) removals: Vec<String>,
}

/// Whether a name is that of a file that this module's formats are kept in.
fn is_ours(name: &str) -> bool {
    [OVERLAY, LAYER, DISK, VM].iter().any(|suffix| name.strip_suffix(suffix).is_some_and(|stem| stem.ends_with('.')))
}

impl Catalogue {
    /// Opens the catalogue, or makes an empty one in a folder that holds no disks.
    pub(super) fn open(folder: &dyn Folder) -> Result<Self, CloneError> {
        let name: Arc<str> = FILE.into();
        loop {
            match folder.open(&name, Sharing::Alone) {
                Ok(medium) => return Self::over(medium),
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(file::error(&name, "open", error).into());
                }
                Err(_) => {}
            }
            if let Some(catalogue) = Self::create(folder)? {
                return Ok(catalogue);
            }
        }
    }

    /// Makes one; `None` where somebody else has just done so.
    fn create(folder: &dyn Folder) -> Result<Option<Self>, CloneError> {
        let name: Arc<str> = format!("{FILE}.{PARTIAL}").into();
        let told = |call, error| file::error(&name, call, error);
        let names = folder.names().map_err(|error| told("list", error))?;
        if let Some(file) = names.into_iter().find(|name| is_ours(name)) {
            return Err(CloneError::NoCatalogue { file });
        }
        // One that was never finished goes, unless somebody is at it.
        match folder.open(&name, Sharing::Alone) {
            Ok(_held) => folder.remove(&name).map_err(|error| told("remove", error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(told("open", error).into()),
        }
        let medium = folder.create(&name).map_err(|error| told("create", error))?;
        // Whoever makes one holds this name until it is renamed: looked at again, there is none, or there will be no other.
        if folder.names().map_err(|error| told("list", error))?.iter().any(|name| name == FILE) {
            folder.remove(&name).map_err(|error| told("remove", error))?;
            return Ok(None);
        }
        let database = Guarded::open(medium)?;
        database.with(|database| {
            let write = database.begin_write().map_err(failed)?;
            {
                let mut meta = write.open_table(META).map_err(failed)?;
                for (key, value) in [("version", VERSION), ("features", 0), ("features-read-only", 0)] {
                    meta.insert(key, value).map_err(failed)?;
                }
                write.open_table(CLONES).map_err(failed)?;
                write.open_table(LAYERS).map_err(failed)?;
                write.open_table(REMOVALS).map_err(failed)?;
            }
            write.commit().map_err(failed)
        })?;
        folder.rename(&name, FILE).map_err(|error| told("rename", error))?;
        folder.sync().map_err(|error| told("sync of its name", error))?;
        Ok(Some(Self { database, done: BTreeSet::new() }))
    }

    fn over(medium: Arc<dyn Medium>) -> Result<Self, CloneError> {
        // What an earlier holder left behind is made durable before anything is built on it.
        medium.sync().map_err(|error| file::error(&FILE.into(), "sync", error))?;
        let database = Guarded::open(medium)?;
        let (version, features) = database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let meta = read.open_table(META).map_err(failed)?;
            let word = |key| {
                let value = meta.get(key).map_err(failed)?;
                value.map(|value| value.value()).ok_or_else(|| damaged("a word of its schema is missing"))
            };
            Ok((word("version")?, (word("features")? & !FEATURE_SAVED) | word("features-read-only")?))
        })?;
        if version != VERSION || features != 0 {
            let version = u32::try_from(version).unwrap_or(u32::MAX);
            return Err(CloneError::UnknownCatalogue { version, features });
        }
        Ok(Self { database, done: BTreeSet::new() })
    }

    /// The row of a name.
    pub(super) fn clone(&self, name: &CloneName) -> Result<Option<CloneRecord>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = read.open_table(CLONES).map_err(failed)?;
            let Some(row) = table.get(name.as_str()).map_err(failed)? else { return Ok(None) };
            CloneRecord::decode(row.value()).map(Some).ok_or_else(|| damaged("the row of a clone"))
        })
    }

    /// Every row, by name.
    pub(super) fn clones(&self) -> Result<BTreeMap<CloneName, CloneRecord>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = read.open_table(CLONES).map_err(failed)?;
            let mut rows = BTreeMap::new();
            for row in table.iter().map_err(failed)? {
                let (name, record) = row.map_err(failed)?;
                let name = CloneName::new(name.value()).map_err(|_| damaged("the name of a clone"))?;
                let record = CloneRecord::decode(record.value()).ok_or_else(|| damaged("the row of a clone"))?;
                rows.insert(name, record);
            }
            Ok(rows)
        })
    }

    /// The rows of saved VMs, by name.
    pub(super) fn saved(&self) -> Result<BTreeMap<CloneName, SavedRecord>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = match read.open_table(SAVED) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
                table => table.map_err(failed)?,
            };
            let mut rows = BTreeMap::new();
            for row in table.iter().map_err(failed)? {
                let (name, record) = row.map_err(failed)?;
                let name = CloneName::new(name.value()).map_err(|_| damaged("the name of a saved VM"))?;
                let record = SavedRecord::decode(record.value()).ok_or_else(|| damaged("the row of a saved VM"))?;
                rows.insert(name, record);
            }
            Ok(rows)
        })
    }

    /// The row of a layer.
    pub(super) fn layer(&self, id: LayerId) -> Result<Option<LayerRecord>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = read.open_table(LAYERS).map_err(failed)?;
            let Some(row) = table.get(id.bytes()).map_err(failed)? else { return Ok(None) };
            LayerRecord::decode(row.value()).map(Some).ok_or_else(|| damaged("the row of a layer"))
        })
    }

    /// Every layer.
    pub(super) fn layers(&self) -> Result<BTreeMap<LayerId, LayerRecord>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = read.open_table(LAYERS).map_err(failed)?;
            let mut rows = BTreeMap::new();
            for row in table.iter().map_err(failed)? {
                let (id, record) = row.map_err(failed)?;
                let record = LayerRecord::decode(record.value()).ok_or_else(|| damaged("the row of a layer"))?;
                rows.insert(LayerId::from_bytes(id.value()), record);
            }
            Ok(rows)
        })
    }

    /// Files that are to be removed and may be there yet.
    pub(super) fn removals(&self) -> Result<Vec<String>, CloneError> {
        self.database.with(|database| {
            let read = database.begin_read().map_err(failed)?;
            let table = read.open_table(REMOVALS).map_err(failed)?;
            let mut names = Vec::new();
            for row in table.iter().map_err(failed)? {
                let name = row.map_err(failed)?.0.value().to_owned();
                // A name that leads elsewhere would be a lie: nothing but our own files was ever put there.
                if !is_ours(&name) || name.contains('/') {
                    return Err(damaged("a file to be removed that is none of the store's"));
                }
                if !self.done.contains(&name) {
                    names.push(name);
                }
            }
            Ok(names)
        })
    }

    /// Makes a change, durably and as one.
    pub(super) fn apply(&mut self, change: &Change) -> Result<(), CloneError> {
        let done = &self.done;
        self.database.with(|database| {
            let write = database.begin_write().map_err(failed)?;
            {
                let mut clones = write.open_table(CLONES).map_err(failed)?;
                for (name, record) in &change.clones {
                    match record {
                        Some(record) => clones.insert(name.as_str(), record.encode().as_slice()).map_err(failed)?,
                        None => clones.remove(name.as_str()).map_err(failed)?,
                    };
                }
                let mut layers = write.open_table(LAYERS).map_err(failed)?;
                for (id, record) in &change.layers {
                    match record {
                        Some(record) => layers.insert(id.bytes(), record.encode().as_slice()).map_err(failed)?,
                        None => layers.remove(id.bytes()).map_err(failed)?,
                    };
                }
                if !change.saved.is_empty() {
                    let mut meta = write.open_table(META).map_err(failed)?;
                    meta.insert("features", FEATURE_SAVED).map_err(failed)?;
                    let mut saved = write.open_table(SAVED).map_err(failed)?;
                    for (name, record) in &change.saved {
                        match record {
                            Some(record) => saved.insert(name.as_str(), record.encode().as_slice()).map_err(failed)?,
                            None => saved.remove(name.as_str()).map_err(failed)?,
                        };
                    }
                }
                let mut removals = write.open_table(REMOVALS).map_err(failed)?;
                for name in done {
                    removals.remove(name.as_str()).map_err(failed)?;
                }
                for name in &change.removals {
                    removals.insert(name.as_str(), ()).map_err(failed)?;
                }
            }
            write.commit().map_err(failed)
        })?;
        self.done.clear();
        Ok(())
    }

    /// These files are gone, durably.
    pub(super) fn removed(&mut self, names: impl IntoIterator<Item = String>) {
        self.done.extend(names);
    }
}
