//! Saving a fork point. Nothing waits for it: the images of a fork point never change, and its guest runs on.

use std::any::Any;

use tracing::debug_span;

use super::{SavedAs, SavedError, small_pages};
use crate::backing::{Backing, Sealed};
use crate::disk::DiskImage;
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{PageCount, PageSet, PageSize};
use crate::store::{
    CloneName, CloneStore, DurableImage, Job, LayerId, Manifest, NewSaved, SavedDisk, SavedId, SavedRegion,
};
use crate::vm::{DiskName, ForkPoint};

/// Layers of RAM, or of a disk, that one save after the other may stack. With as many, the next save copies everything.
const MOST_LAYERS: u32 = 16;

/// What is to become of RAM or of a disk.
enum Plan<'a> {
    /// A layer that is there already says it all.
    Kept(Option<LayerId>),
    /// Pages of 4 KiB go into a layer of their own.
    Copied { source: &'a dyn Source, len: PageCount, pages: PageSet, parent: Option<LayerId> },
}

impl<B: Backing> ForkPoint<B> {
    /// Saves the fork point in a store, under a name: RAM, device state and disks. Nobody waits for it, and clones and parent run on meanwhile.
    ///
    /// RAM goes into a sealed layer, pages of zeroes left out, each page with a checksum. Disks that lie in this store are not copied: their layers are
    /// kept. Others are copied, without zeroes. The saved VM is there, durably, when this returns; killed at any point before, the store opens without it.
    /// [`ForkPoint::load`] brings it back; [`CloneStore::delete`] removes it.
    ///
    /// Costs a read and a write of what is not zero, and three syncs of files; 2 MiB of memory for pages, and 4 bytes for each page that is copied. Two threads are enough: one reads and sums while the other writes. Where a fork point of the same family was saved in
    /// this store, or loaded from it, [`ForkPoint::save_since`] saves what changed.
    ///
    /// # Errors
    /// [`SavedError::Store`]: [`CloneError::Exists`](crate::store::CloneError::Exists),
    /// [`StoreError::Cancelled`](crate::StoreError::Cancelled), a full or failing medium, a limit. What was made is removed.
    ///
    /// ```
    /// # use offshoot::{*, backing::Heap, page::*, ram::*};
    /// use offshoot::Reading;
    /// use offshoot::store::{CloneName, CloneStore, Job, StoreOptions};
    /// # let path = std::env::temp_dir().join(format!("offshoot-saved-doc-{}", std::process::id()));
    /// # let layout = RamLayout::flat(ByteSize::gib(1), PageSize::KIB_4)?;
    /// # let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("web")?, layout, vec![])?;
    /// vm.start()?;
    /// vm.ram().store(GuestAddress::new(0x1000), 7u64)?;
    /// let point = vm.fork(&mut AtRest(DeviceState::from_bytes(vec![1, 2, 3])))?;
    ///
    /// let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    /// let name = CloneName::new("web, warmed up")?;
    /// let store = CloneStore::open(&path, StoreOptions::default())?;
    /// point.save(&store, &name, &threads, &Job::new())?;
    /// drop((store, point, vm));
    ///
    /// // In another process, or on another machine with a copy of the directory:
    /// let store = CloneStore::open(&path, StoreOptions::default())?;
    /// let point: ForkPoint<Heap> = ForkPoint::load(&store, &name, Reading::Now, &threads, &Job::new())?;
    /// let clone = point.spawn(CloneSpec::default())?;
    /// assert_eq!(clone.ram().load::<u64>(GuestAddress::new(0x1000))?, 7);
    /// assert_eq!(*clone.device_state().unwrap().encode(), [1, 2, 3]);
    /// # drop((clone, point, store));
    /// # std::fs::remove_dir_all(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save(
        &self,
        store: &CloneStore,
        name: &CloneName,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Manifest, SavedError> {
        self.save_over(None, store, name, threads, job)
    }

    /// As [`ForkPoint::save`], with only the pages copied that differ from `ancestor`, a fork point of the same family that was saved in this store or loaded
    /// from it: its layers are lain on. Either may be deleted first; layers stay for as long as one needs them. Where `ancestor` is not in
    /// the store any more, or is a long chain of such saves already, everything is copied.
    ///
    /// # Errors
    /// As [`ForkPoint::save`]; [`SpaceError::Unrelated`](crate::SpaceError::Unrelated).
    pub fn save_since(
        &self,
        ancestor: &Self,
        store: &CloneStore,
        name: &CloneName,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Manifest, SavedError> {
        self.save_over(Some(ancestor), store, name, threads, job)
    }

    fn save_over(
        &self,
        ancestor: Option<&Self>,
        store: &CloneStore,
        name: &CloneName,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Manifest, SavedError> {
        let _span = debug_span!("save", parent = %self.parent_name(), name = %name).entered();
        // What no manifest can say is refused before anything is written.
        let mut manifest = self.outline();
        manifest.check_for(store.tree().limits().device_state)?;
        let changed = ancestor.map(|ancestor| self.diff(ancestor)).transpose()?;
        let mut new = store.new_saved(name)?;
        let (ram_below, disks_below) = match ancestor {
            Some(ancestor) => ancestor.lies_in(store),
            None => (None, Vec::new()),
        };
        let mut plans = Vec::with_capacity(1 + manifest.disks.len());
        let (size, len) = (self.ram().geometry().page_size(), self.ram().geometry().len());
        let len = PageCount::new(len.get() >> PageSize::KIB_4.shift());
        let differing = || changed.as_ref().map(|diff| small_pages(&diff.ram, size));
        plans.push(plan(&mut new, self.ram(), len, ram_below, differing, || {
            Ok(small_pages(&Sealed::data(self.ram())?, size))
        })?);
        for (at, (_, disk)) in self.disks().enumerate() {
            let any: &dyn Any = disk.image();
            let kept = match any.downcast_ref::<DurableImage>() {
                Some(image) => new.shared(image)?,
                None => None,
            };
            if let Some(top) = kept {
                plans.push(Plan::Kept(top));
                continue;
            }
            let below = disks_below.get(at).copied().flatten();
            let differing =
                || changed.as_ref().map(|diff| small_pages(&diff.disks[at].1, disk.image().geometry().page_size()));
            let data = || Ok(small_pages(&disk.image().data()?, disk.image().geometry().page_size()));
            plans.push(plan(&mut new, disk.image(), manifest.disks[at].pages, below, differing, data)?);
        }
        let mut tops = Vec::with_capacity(plans.len());
        for plan in plans {
            tops.push(match plan {
                Plan::Kept(top) => top,
                Plan::Copied { source, len, pages, parent } => {
                    Some(new.layer(source, len, &pages, parent, threads, job)?)
                }
            });
        }
        let mut tops = tops.into_iter();
        manifest.ram = tops.next().flatten();
        manifest.disks.iter_mut().zip(tops).for_each(|(disk, top)| disk.layer = top);
        let manifest = new.finish(manifest)?;
        self.remember_saved(store, &manifest);
        Ok(manifest)
    }

    /// The manifest, but for the layers.
    fn outline(&self) -> Manifest {
        let regions = self.ram_layout().regions();
        let disk = |(name, disk): (&DiskName, &DiskImage)| SavedDisk {
            name: name.as_str().into(),
            sectors: disk.capacity(),
            pages: PageCount::new(disk.image().len().get().div_ceil(PageSize::KIB_4.bytes().get())),
            access: disk.access().into(),
            layer: None,
        };
        Manifest {
            // Given when it is written.
            id: SavedId::from_bytes([0; 16]),
            parent: self.parent_name().as_str().into(),
            page_size: self.ram_layout().geometry().page_size(),
            regions: regions.map(|(region, _)| SavedRegion { start: region.start, len: region.len }).collect(),
            ram: None,
            disks: self.disks().map(disk).collect(),
            state: self.device_state().encode(),
        }
    }

    pub(super) fn remember_saved(&self, store: &CloneStore, manifest: &Manifest) {
        let disks = manifest.disks.iter().map(|disk| disk.layer).collect();
        *self.saved().lock() = Some(SavedAs { store: store.tag(), ram: manifest.ram, disks });
    }

    /// The layers that hold it in this store, as far as anybody remembers.
    fn lies_in(&self, store: &CloneStore) -> (Option<LayerId>, Vec<Option<LayerId>>) {
        match &*self.saved().lock() {
            Some(saved) if saved.store.is(store) => (saved.ram, saved.disks.clone()),
            _ => (None, Vec::new()),
        }
    }
}

/// What is to be copied: what differs from a layer that is there, or all that is not zero.
fn plan<'a>(
    new: &mut NewSaved<'_>,
    source: &'a dyn Source,
    len: PageCount,
    below: Option<LayerId>,
    differing: impl FnOnce() -> Option<PageSet>,
    data: impl FnOnce() -> Result<PageSet, SpaceError>,
) -> Result<Plan<'a>, SavedError> {
    let parent = match below {
        Some(id) => new.parent(id, len, MOST_LAYERS)?,
        None => None,
    };
    let pages = match (parent, differing()) {
        (Some(_), Some(pages)) => pages,
        _ => data()?,
    };
    if pages.is_empty() {
        return Ok(Plan::Kept(parent));
    }
    Ok(Plan::Copied { source, len, pages, parent })
}
