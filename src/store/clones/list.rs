//! What is in a store, and what it takes. Must not change anything.

use std::collections::{BTreeMap, BTreeSet};

use super::catalogue::Catalogue;
use super::layers::{Chain, chain};
use super::record::{CloneRecord, Kind, LayerRecord, SavedRecord};
use super::{CloneError, CloneName, CloneStore};
use crate::error::StoreError;
use crate::page::{ByteSize, PageSet, PageSize};
use crate::store::head::Head;
use crate::store::id::{DiskId, LayerId};
use crate::store::layer::{Body, Layer};
use crate::store::record::Purpose;

/// Whether it can be used.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Health {
    /// All its layers are there. Whether they are whole is for [`CloneStore::check`] to say.
    Whole,
    /// It is open, in this process: what it lies on right now is not looked at.
    Open,
    /// It can be listed and deleted.
    Degraded {
        /// Layers without a file, the topmost first. Below the last there may be more.
        missing: Vec<LayerId>,
    },
    /// Its head, or a layer's header, is not what was written. It can be listed and deleted.
    Damaged,
}

/// What the catalogue says of a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CloneInfo {
    /// The name.
    pub name: CloneName,
    /// Image or clone.
    pub kind: Kind,
    /// The length of the disk.
    pub len: ByteSize,
    /// New whenever what the name reads as is replaced, by a reset say: a guest that sees it change knows that it must draw new random numbers.
    pub generation: [u8; 16],
    /// The id that [`Durable::id`](crate::store::Durable::id) gives. Replaced with the generation.
    pub disk: DiskId,
    /// Layers from the topmost to the last.
    pub layers: Vec<LayerId>,
    /// Whether it can be used.
    pub health: Health,
}

/// What a name takes on the medium.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SpaceUsed {
    /// What deleting it gives back: files that no other name needs.
    pub exclusive: ByteSize,
    /// Files of it that others need too.
    pub shared: ByteSize,
    /// Pages in exclusive layers below the topmost that a layer over them hides: at least this much of `exclusive` is given back by a merge.
    pub reclaimable: ByteSize,
}

/// Every name, every row of a layer, every file.
pub(super) type Surveyed = (BTreeMap<CloneName, Walked>, BTreeMap<LayerId, LayerRecord>, BTreeSet<String>);

/// A name with the way down from its topmost layer.
pub(super) struct Walked {
    pub(super) record: CloneRecord,
    pub(super) chain: Chain,
    pub(super) head: Result<Option<Head>, StoreError>,
}

impl Walked {
    fn health(&self) -> Health {
        match &self.head {
            Err(StoreError::InUse { .. }) => Health::Open,
            _ if !self.chain.missing.is_empty() => Health::Degraded { missing: self.chain.missing.clone() },
            Err(_) => Health::Damaged,
            Ok(_) if self.chain.broken => Health::Damaged,
            Ok(_) => Health::Whole,
        }
    }
}

impl CloneStore {
    /// Everything in the store, by name. Costs by the layers.
    ///
    /// # Errors
    /// [`CloneError::Catalogue`], or what the system says. What is wrong with a name is in its [`Health`].
    pub fn list(&self) -> Result<Vec<CloneInfo>, CloneError> {
        // Locked for as long as heads are open here: nobody must find them in use.
        let catalogue = self.0.catalogue.lock();
        let walked = self.walk(&catalogue)?.0;
        Ok(walked.into_iter().map(|(name, walked)| info(name, &walked)).collect())
    }

    /// What the catalogue says of one name.
    ///
    /// # Errors
    /// [`CloneError::Unknown`]; as [`CloneStore::list`].
    pub fn info(&self, name: &CloneName) -> Result<CloneInfo, CloneError> {
        let catalogue = self.0.catalogue.lock();
        let record = self.record(&catalogue, name)?;
        let (rows, names) = (catalogue.layers()?, self.names()?);
        Ok(info(name.clone(), &self.walk_one(record, &rows, &names)))
    }

    pub(super) fn walk(&self, catalogue: &Catalogue) -> Result<Surveyed, CloneError> {
        let (rows, names) = (catalogue.layers()?, self.names()?);
        let clones = catalogue.clones()?.into_iter();
        let walked = clones.map(|(name, record)| (name, self.walk_one(record, &rows, &names))).collect();
        Ok((walked, rows, names))
    }

    fn walk_one(&self, record: CloneRecord, rows: &BTreeMap<LayerId, LayerRecord>, names: &BTreeSet<String>) -> Walked {
        let head = match Head::open(self.folder(), record.disk, Purpose::Read) {
            Ok(head) => Ok(Some(head)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        let top = match &head {
            Ok(Some(head)) => head.top(),
            _ => record.top,
        };
        let chain = chain(self.folder(), rows, names, top);
        Walked { record, chain, head }
    }

    /// What each name takes: files that it alone needs, files that it shares, and what a merge would give back. For a clone that is open, what it
    /// wrote since
    /// its layers were last named is left out: ask [`Durable::allocated`](crate::store::Durable::allocated). Costs a look at each file.
    ///
    /// # Errors
    /// As [`CloneStore::list`]; a map or an index that is damaged.
    pub fn space(&self) -> Result<BTreeMap<CloneName, SpaceUsed>, CloneError> {
        let catalogue = self.0.catalogue.lock();
        let (walked, rows, _) = self.walk(&catalogue)?;
        let saved = catalogue.saved()?;
        // What a reset goes back to counts as well.
        let mut needed: BTreeMap<&CloneName, BTreeSet<LayerId>> = walked
            .iter()
            .map(|(name, walked)| {
                let origin = super::closure(&rows, walked.record.origin);
                (name, walked.chain.layers.iter().copied().chain(origin).collect())
            })
            .collect();
        let of_saved = |record: &SavedRecord| super::closure(&rows, record.tops.iter().copied());
        needed.extend(saved.iter().map(|(name, record)| (name, of_saved(record))));
        let mut users: BTreeMap<LayerId, usize> = BTreeMap::new();
        needed.values().flatten().for_each(|id| *users.entry(*id).or_default() += 1);
        let mut sizes = BTreeMap::new();
        for id in users.keys().copied() {
            match Layer::open(self.folder(), id) {
                Ok(body) => drop(sizes.insert(id, allocated(&body)?)),
                Err(StoreError::Missing { .. } | StoreError::InUse { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut used = BTreeMap::new();
        for (name, layers) in &needed {
            let mut space = SpaceUsed::default();
            for (id, size) in layers.iter().filter_map(|id| Some((id, *sizes.get(id)?))) {
                let kind = if users[id] == 1 { &mut space.exclusive } else { &mut space.shared };
                *kind = ByteSize::new(kind.get() + size.get());
            }
            if let Some(record) = saved.get(*name) {
                let file = self.manifest_size(record)?;
                space.exclusive = ByteSize::new(space.exclusive.get() + file.get());
                used.insert((*name).clone(), space);
                continue;
            }
            let walked = &walked[*name];
            if let Ok(Some(head)) = &walked.head {
                space.exclusive = ByteSize::new(space.exclusive.get() + head.file().allocated()?.get());
            }
            let own = walked.chain.layers.iter().take_while(|id| Some(**id) != walked.record.origin);
            let own: Vec<LayerId> = own.take_while(|id| users[id] == 1 && sizes.contains_key(id)).copied().collect();
            space.reclaimable = self.hidden(&own)?;
            used.insert((*name).clone(), space);
        }
        Ok(used)
    }

    /// How much of the data in these layers, the topmost first, is hidden by those over them.
    fn hidden(&self, layers: &[LayerId]) -> Result<ByteSize, CloneError> {
        let (mut seen, mut pages) = (PageSet::default(), 0);
        for id in layers {
            let (data, zero) = Layer::open(self.folder(), *id)?.pages()?;
            pages += data.intersection(&seen).count().get();
            seen = seen.union(&data).union(&zero);
        }
        Ok(PageSize::KIB_4.size_of(crate::page::PageCount::new(pages)))
    }
}

fn allocated(body: &Body) -> Result<ByteSize, StoreError> {
    match body {
        Body::Overlay(overlay) => overlay.file().allocated(),
        Body::Sealed(sealed) => sealed.file().allocated(),
    }
}

fn info(name: CloneName, walked: &Walked) -> CloneInfo {
    let CloneRecord { kind, disk, generation, .. } = walked.record;
    let len = walked.record.shape().geometry.len();
    CloneInfo { name, kind, len, generation, disk, layers: walked.chain.layers.clone(), health: walked.health() }
}
