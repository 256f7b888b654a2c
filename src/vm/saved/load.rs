//! Bringing a saved VM back as a fork point. Every page is held against its checksum as it is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use tracing::debug_span;

use super::SavedError;
use crate::backing::{Backing, Cut, Sealed};
use crate::disk::DiskImage;
use crate::image::Source;
use crate::page::{ByteOffset, PageCount, PageSize};
use crate::ram::{RamLayout, RamRegion};
use crate::store::{CloneName, CloneStore, DurableImage, Job};
use crate::vm::point::PointParts;
use crate::vm::{DeviceState, DiskName, ForkPoint, ForkTimings, Teardown, VmName};

/// When RAM is read from its layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reading {
    /// Before the fork point is there: costs by the RAM that is not zero. A damaged page is found at once.
    Now,
    /// As a guest asks for it, where the backing reads through to what it lies on: on the heap, nothing is read before. A damaged page is an error of the
    /// access that needs it. The mapped backing copies what lies below when it is made, on one thread: use [`Reading::Now`] for it.
    OnDemand,
}

/// Bytes that a thread reads at a time.
const PIECE: u64 = 256 << 10;

impl<B: Backing> ForkPoint<B> {
    /// Brings a saved VM back: any number of clones start from the fork point, at the instant that was saved, each with an identity of its own.
    ///
    /// Its disks lie in the store: what a clone writes is durable when it is flushed, and has no name until
    /// [`CloneStore::adopt`](crate::store::CloneStore::adopt) gives it one. RAM, disks and clones count in the store's tree. Device state is bytes, as
    /// [`DeviceState::encode`] gave them.
    ///
    /// # Errors
    /// [`SavedError::Store`]: [`CloneError::Unknown`](crate::store::CloneError::Unknown);
    /// [`CloneError::Degraded`](crate::store::CloneError::Degraded), which names the layers that are missing; damage, with file and page.
    /// [`SavedError::Space`] where there is no room for RAM.
    pub fn load(
        store: &CloneStore,
        name: &CloneName,
        reading: Reading,
        threads: &rayon::ThreadPool,
        job: &Job<'_>,
    ) -> Result<Self, SavedError> {
        let _span = debug_span!("load", name = %name).entered();
        let manifest = store.open_manifest(name)?;
        let parent = VmName::new(&*manifest.parent)?;
        let regions: Vec<_> =
            manifest.regions.iter().map(|region| RamRegion { start: region.start, len: region.len }).collect();
        let layout = RamLayout::new(&regions, manifest.page_size)?;
        let pages = PageCount::new(layout.geometry().len().get() >> PageSize::KIB_4.shift());
        let disks = manifest.disks.iter().map(|disk| {
            let image = store.open_saved_image(name, disk.layer, disk.pages)?;
            let image = DiskImage::from_image(Arc::new(image), disk.sectors, disk.access.into());
            Ok((DiskName::new(disk.name.clone()), image))
        });
        let disks = disks.collect::<Result<Vec<_>, SavedError>>()?;
        let saved = store.open_saved_image(name, manifest.ram, pages)?;
        let tree = store.tree();
        let space = match reading {
            Reading::OnDemand => B::create(tree, layout.geometry(), Some(Arc::new(saved)))?,
            Reading::Now => {
                let space = B::create(tree, layout.geometry(), None)?;
                fill(&space, &saved, threads, job)?;
                space
            }
        };
        let (ram, deferred) = space.cut()?.commit();
        drop(deferred);
        let device = DeviceState::from_bytes(manifest.state.clone());
        let parts = PointParts { layout, ram, disks, device, parent, clones: Arc::default() };
        let point = Self::new(tree.clone(), parts, ForkTimings::default(), Teardown::default());
        point.remember_saved(store, &manifest);
        Ok(point)
    }
}

/// Copies what is not zero, on the caller's threads.
fn fill<B: Backing>(
    space: &B,
    image: &DurableImage,
    threads: &rayon::ThreadPool,
    job: &Job<'_>,
) -> Result<(), SavedError> {
    let Some(top) = image.top_id() else { return Ok(()) };
    let pages = Sealed::data(image)?;
    let total = pages.count().get();
    let mut pieces = Vec::new();
    for run in pages.runs() {
        let (start, end) = (PageSize::KIB_4.start_of(run.start()).get(), PageSize::KIB_4.start_of(run.end()).get());
        pieces.extend((start..end).step_by(PIECE as usize).map(|at| at..(at + PIECE).min(end)));
    }
    let done = AtomicU64::new(0);
    threads.install(|| {
        pieces.into_par_iter().try_for_each_init(Vec::new, |bytes: &mut Vec<u8>, piece| {
            let (at, len) = (ByteOffset::new(piece.start), piece.end - piece.start);
            bytes.resize(len as usize, 0);
            Source::read(image, at, bytes)?;
            space.write(at, bytes)?;
            let pages = len >> PageSize::KIB_4.shift();
            let done = done.fetch_add(pages, Ordering::Relaxed) + pages;
            job.step(top, done, total)?;
            Ok::<(), SavedError>(())
        })
    })
}
