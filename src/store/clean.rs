//! Removing what a crash left behind in a directory of disks. Must not remove what it cannot account for.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::directory::DiskDir;
use super::file;
use super::head::Head;
use super::id::{DISK, DiskId, LAYER, LayerId, OVERLAY, PARTIAL};
use super::layer::Layer;
use super::medium::Sharing;
use super::record::Purpose;
use crate::error::{SpaceError, StoreError};

impl DiskDir {
    /// Removes files that nothing needs: layers that no disk leads to, from forks that were never flushed, merges, and calls that were killed; and whatever
    /// was in the making. Returns their names. A directory of a [`CloneStore`](super::CloneStore) is cleaned by the store's repair.
    ///
    /// It never guesses: every disk must be closed, so that all can be followed down, and every layer that one leads to must be there and say what it
    /// lies on. Images that are held in this process or another keep their layers. Costs a look at each disk's layers.
    ///
    /// # Errors
    /// With nothing removed: [`StoreError::InUse`] where a disk is open; [`StoreError::Missing`] or [`StoreError::Damaged`], which name the file that
    /// hides what lies below; [`StoreError::Chain`] for the directory of a store. What the system says, with what was removed until then gone.
    pub fn clean(&self) -> Result<Vec<String>, SpaceError> {
        let names: BTreeSet<String> = self.list()?.into_iter().collect();
        if let Some(catalogue) = names.iter().find(|name| name.starts_with("catalogue.")) {
            let what = "it is the catalogue of a clone store, which knows what is needed: repair the store instead";
            return Err(StoreError::Chain { file: catalogue.as_str().into(), what }.into());
        }
        // Held until all is done: nobody opens a disk, and so nobody opens what lies below one.
        let mut heads = Vec::new();
        for id in names.iter().filter_map(|name| DiskId::parse(name.strip_suffix(DISK)?.strip_suffix('.')?)) {
            heads.push(Head::open(self.folder(), id, Purpose::Read)?);
        }
        let mut needed = BTreeSet::new();
        for head in &heads {
            let mut next = head.top();
            while let Some(id) = next.filter(|id| needed.insert(*id)) {
                next = Layer::open(self.folder(), id)?.parent();
            }
        }
        let mut removed = Vec::new();
        for name in names.into_iter().filter(|name| self.is_left_over(name, &needed)) {
            // Held by whoever reads or makes it.
            let Ok(_alone) = self.folder().open(&name, Sharing::Alone) else { continue };
            let told: Arc<str> = name.as_str().into();
            self.folder().remove(&name).map_err(|error| file::error(&told, "remove", error))?;
            removed.push(name);
        }
        self.sync_names()?;
        Ok(removed)
    }

    fn is_left_over(&self, name: &str, needed: &BTreeSet<LayerId>) -> bool {
        let whole = name.strip_suffix(PARTIAL).and_then(|stem| stem.strip_suffix('.'));
        let Some((stem, suffix)) = whole.unwrap_or(name).rsplit_once('.') else { return false };
        match suffix {
            DISK => whole.is_some() && DiskId::parse(stem).is_some(),
            LAYER | OVERLAY => LayerId::parse(stem).is_some_and(|id| {
                !self.in_the_making().contains(whole.unwrap_or(name)) && (whole.is_some() || !needed.contains(&id))
            }),
            _ => false,
        }
    }
}
