//! Looking for everything that can be wrong with a store, and putting right what needs no guess.
//!
//! A check changes nothing. A repair finishes removals that were cut off and removes files that nothing needs; a layer whose
//! bytes are wrong, or that is missing, is for its owner to bring back.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::catalogue::{Catalogue, Change, FILE};
use super::layers::{closure, files_of, record_of};
use super::record::LayerRecord;
use super::{CloneError, CloneName, CloneStore};
use crate::error::{SpaceError, StoreError};
use crate::page::PageSet;
use crate::store::file;
use crate::store::id::{DISK, DiskId, LAYER, LayerId, OVERLAY, PARTIAL, SavedId, VM};
use crate::store::job::Job;
use crate::store::layer::{Body, Layer};
use crate::store::medium::{Medium, Sharing};
use crate::store::sealed::SealedFile;

/// One thing that is wrong with a store.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Problem {
    /// A layer has no file. Restore it, or delete those that need it.
    Missing {
        /// The layer.
        layer: LayerId,
        /// Who needs it.
        needed_by: Vec<CloneName>,
    },
    /// Pages of a sealed layer do not match their checksums. Restore it from a copy.
    Pages {
        /// The layer.
        layer: LayerId,
        /// Which pages of the disk.
        damaged: PageSet,
    },
    /// A file's metadata are not what was written, or it cannot be read.
    File {
        /// What is wrong.
        error: StoreError,
    },
    /// A layer's file is not what the catalogue says of it: another parent, length or content.
    Differs {
        /// The layer.
        layer: LayerId,
    },
    /// A layer that others lie on could be written.
    Writable {
        /// The layer.
        layer: LayerId,
    },
    /// A file that nothing needs: what a call that was killed left behind, or a disk that was forked from one of the store's and never got a name.
    /// [`CloneStore::repair`] removes it.
    Orphan {
        /// The file.
        file: String,
    },
    /// A removal that was cut off. [`CloneStore::repair`] finishes it.
    Unfinished {
        /// The file.
        file: String,
    },
}

/// What a repair did.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Repaired {
    /// The files that it removed.
    pub removed: Vec<String>,
    /// Files that would be orphans, but may be layers below one that is missing or damaged: bring that back, or delete what needs it.
    pub kept: Vec<String>,
}

/// A file with its lock.
type HeldFile = (String, Arc<dyn Medium>);

impl CloneStore {
    /// Looks at everything: the catalogue against the files, every map and index, every page of sealed layers against its checksum (on the threads
    /// given, watched), parents that are missing or could be written, files that nothing needs. Clones that are open are passed over but for their named
    /// layers. Other calls go on while pages are read.
    ///
    /// # Errors
    /// [`CloneError::Catalogue`], or a directory that cannot be listed; [`StoreError::Cancelled`]. What is found is no error.
    pub fn check(&self, threads: &rayon::ThreadPool, job: &Job<'_>) -> Result<Vec<Problem>, CloneError> {
        let (mut problems, layers) = self.survey()?;
        for layer in layers {
            job.check()?;
            // Opened while nobody can take it away; read when others go on. A sealed layer that is read is not removed.
            let opened = {
                let catalogue = self.0.catalogue.lock();
                self.check_tables(&catalogue, layer, &mut problems)?
            };
            let Some(sealed) = opened else { continue };
            match sealed.verify(threads, job) {
                Ok(verified) if verified.damaged.is_empty() => {}
                Ok(verified) => problems.push(Problem::Pages { layer, damaged: verified.damaged }),
                Err(StoreError::Cancelled) => return Err(StoreError::Cancelled.into()),
                Err(error) => problems.push(Problem::File { error }),
            }
        }
        let catalogue = self.0.catalogue.lock();
        let names = self.names()?;
        let unfinished = catalogue.removals()?;
        problems.extend(
            unfinished.into_iter().filter(|file| names.contains(file)).map(|file| Problem::Unfinished { file }),
        );
        problems.extend(self.orphans(&catalogue)?.into_iter().map(|(file, _)| Problem::Orphan { file }));
        Ok(problems)
    }

    /// What can be told from the catalogue and the heads, and the layers that have to be looked at.
    fn survey(&self) -> Result<(Vec<Problem>, BTreeSet<LayerId>), CloneError> {
        let catalogue = self.0.catalogue.lock();
        let (walked, rows, names) = self.walk(&catalogue)?;
        let mut problems = Vec::new();
        let mut layers: BTreeSet<LayerId> = rows.keys().copied().collect();
        for walked in walked.values() {
            layers.extend(&walked.chain.layers);
            if let Err(error) = &walked.head
                && !matches!(error, StoreError::InUse { .. })
            {
                problems.push(Problem::File { error: error.clone() });
            }
        }
        let saved = self.check_saved(&catalogue, &rows, &mut problems)?;
        layers.extend(saved.values().flatten());
        let is_missing = |layer: &LayerId| !files_of(*layer).iter().any(|file| names.contains(file));
        let (missing, layers) = layers.into_iter().partition::<BTreeSet<_>, _>(is_missing);
        for layer in missing {
            let needs = walked.iter().filter(|(_, walked)| {
                walked.chain.layers.contains(&layer) || closure(&rows, walked.record.origin).contains(&layer)
            });
            let saved = saved.iter().filter(|(_, layers)| layers.contains(&layer));
            let needed_by = needs.map(|(name, _)| name).chain(saved.map(|(name, _)| name)).cloned().collect();
            problems.push(Problem::Missing { layer, needed_by });
        }
        Ok((problems, layers))
    }

    /// Compares a layer with its row, and reads its map or index; a sealed one is handed back, for its pages to be read.
    fn check_tables(
        &self,
        catalogue: &Catalogue,
        layer: LayerId,
        problems: &mut Vec<Problem>,
    ) -> Result<Option<SealedFile>, CloneError> {
        let body = match Layer::open(self.folder(), layer) {
            Ok(body) => body,
            // It was there a moment ago: who needed it has been deleted.
            Err(StoreError::InUse { .. } | StoreError::Missing { .. }) => return Ok(None),
            Err(error) => {
                problems.push(Problem::File { error });
                return Ok(None);
            }
        };
        let (row, found) = (catalogue.layer(layer)?, record_of(&body));
        // An overlay that was named and then sealed has got a fingerprint since.
        let agrees = |row: &LayerRecord| {
            (row.parent, row.pages) == (found.parent, found.pages)
                && row.content.is_none_or(|content| found.content == Some(content))
        };
        if row.is_some_and(|row| !agrees(&row)) {
            problems.push(Problem::Differs { layer });
        }
        // Maps and indices are checked as they are read.
        if let Err(error) = body.pages() {
            problems.push(Problem::File { error });
            return Ok(None);
        }
        match body {
            Body::Overlay(overlay) => {
                if overlay.is_corrupt() {
                    let error = StoreError::MarkedCorrupt { file: overlay.file().name().clone() };
                    problems.push(Problem::File { error });
                }
                if row.is_some() && !overlay.is_frozen() {
                    problems.push(Problem::Writable { layer });
                }
                Ok(None)
            }
            Body::Sealed(sealed) => Ok(Some(sealed)),
        }
    }

    /// Removes what nothing needs, and finishes removals that were cut off. Never changes a file that something needs, and keeps
    /// layers that may lie below one that is missing, and what a call is making.
    ///
    /// # Errors
    /// [`CloneError::Catalogue`], or what the system says; what was removed until then stays removed.
    pub fn repair(&self) -> Result<Repaired, CloneError> {
        let mut catalogue = self.0.catalogue.lock();
        let mut change = Change::default();
        self.sweep(&catalogue, &mut change)?;
        if !change.layers.is_empty() {
            catalogue.apply(&change)?;
        }
        let mut repaired = Repaired { removed: self.remove_unnamed(&mut catalogue)?, kept: Vec::new() };
        let is_broken = self.walk(&catalogue)?.0.values().any(|walked| {
            let is_damaged = matches!(&walked.head, Err(error) if !matches!(error, StoreError::InUse { .. }));
            is_damaged || walked.chain.broken
        });
        for (file, _held) in self.orphans(&catalogue)? {
            if is_broken && !file.ends_with(PARTIAL) {
                repaired.kept.push(file);
                continue;
            }
            self.folder().remove(&file).map_err(|error| file::error(&file.as_str().into(), "remove", error))?;
            repaired.removed.push(file);
        }
        self.0.dir.sync_names().map_err(SpaceError::from)?;
        Ok(repaired)
    }

    /// Files of the store that nothing needs, held so that nobody opens them. The caller keeps others from making any.
    fn orphans(&self, catalogue: &Catalogue) -> Result<Vec<HeldFile>, CloneError> {
        // Held before heads are asked again: a disk that was open at first, and is closed now, has named what it wrote in between.
        let first = self.not_needed(catalogue)?;
        let held = first.into_iter().filter_map(|name| Some((self.folder().open(&name, Sharing::Alone).ok()?, name)));
        let held: Vec<_> = held.map(|(medium, name)| (name, medium)).collect();
        let still = self.not_needed(catalogue)?;
        Ok(held.into_iter().filter(|(name, _)| still.contains(name)).collect())
    }

    fn not_needed(&self, catalogue: &Catalogue) -> Result<BTreeSet<String>, CloneError> {
        let (walked, rows, names) = self.walk(catalogue)?;
        let mut needed: BTreeSet<String> = BTreeSet::from([FILE.to_owned()]);
        let tops = walked.values().flat_map(|walked| {
            let origin = walked.record.origin;
            walked.chain.layers.iter().copied().chain(walked.record.top).chain(origin)
        });
        let saved = catalogue.saved()?;
        for id in closure(&rows, tops.chain(saved.values().flat_map(|record| record.tops.iter().copied()))) {
            needed.extend(files_of(id));
        }
        needed.extend(saved.values().map(|record| crate::store::saved::file_name(record.id).to_string()));
        needed.extend(walked.values().map(|walked| crate::store::head::file_name(walked.record.disk).to_string()));
        // Asked after the directory was listed: what was there by then has been told of, or has its row.
        for file in self.0.dir.in_the_making().iter() {
            needed.extend([format!("{file}.{PARTIAL}"), file.clone()]);
        }
        Ok(names.into_iter().filter(|name| !needed.contains(name) && is_one_of_ours(name)).collect())
    }
}

/// Whether a name is one that the store gives to files.
fn is_one_of_ours(name: &str) -> bool {
    let whole = name.strip_suffix(PARTIAL).and_then(|stem| stem.strip_suffix('.')).unwrap_or(name);
    let Some((stem, suffix)) = whole.rsplit_once('.') else { return false };
    match suffix {
        LAYER | OVERLAY => LayerId::parse(stem).is_some(),
        DISK => DiskId::parse(stem).is_some(),
        VM => SavedId::parse(stem).is_some(),
        _ => false,
    }
}
