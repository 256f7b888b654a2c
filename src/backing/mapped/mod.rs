//! The mapped backing (Linux): sealed memory files, private mappings, and a kernel that breaks sharing.
//!
//! ```text
//!   before the first cut        guest ──shared──▶ memory file
//!   after it                    guest ──private─▶ sealed file (layer 0) ◀─private── every clone
//!   a diverged VM, cut again    its private pages are copied into a sparse sealed file (layer k), which is laid
//!                               over the same pages: they are shared from then on, and its page tables are small again
//! ```
//!
//! A clone's RAM is private mappings of sealed files: the first write to a page is the kernel's own fault, there is no
//! handler to wait for, and pages that are only read stay one physical copy. Which pages a VM has of its own is asked of the kernel's
//! page tables. Host addresses are stable through forks and resets; a cut that moves the space ([`relocate`]) changes them.
//!
//! `shown` is the index of what lies under the private pages: versions, whichever layers show them ([`merge`] moves them). It is the origin's, but for pages zeroed since, and after a live fork for
//! the pages that it copied: those stay private, with the origin's bytes, until they are written or a plain fork lays the layers over them.
//!
//! Locking: `state` is held shared by every access through this type, exclusively by cut, reset and zero. vCPUs go through host
//! pointers and take no lock: they must be paused for those, which is the guest's contract.

mod allocation;
#[cfg(test)]
mod chain_tests;
mod copy_back;
#[cfg(test)]
mod copy_back_tests;
mod cut;
mod image;
mod layer;
mod layer_map;
mod merge;
mod precopy;
mod relocate;
#[cfg(test)]
mod tests;
mod tracker;
mod working_set;

pub use cut::MappedCut;
pub use image::MappedImage;
pub(crate) use precopy::{Begun, NoCut, Onward, PauseBound, Precopy, Round};
pub use relocate::{AddressHole, PlacedRam};

use std::fmt;
#[cfg(feature = "qemu")]
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use self::copy_back::SecondView;
use self::image::is_hole;
use self::layer::{HOST_PAGE, Layer, Version, host_pages, space_pages};
use self::tracker::Tracker;
use super::heap::VIEW_PATIENCE;
use super::{Backing, Extent, Prefault, Prefaulted, Sealed, Tree, WorkingSet};
use crate::account::Usage;
use crate::error::{SpaceError, SystemError};
use crate::image::Source;
use crate::overlay::{Index, PageState};
use crate::page::{ByteOffset, ByteSize, Geometry, GuestAddress, PageCount, PageRange, PageSet, is_zero};
use crate::ram::{Ram, RamLayout};
#[cfg(feature = "kvm")]
use crate::sys::mapping::KeptRange;
#[cfg(feature = "vm-memory")]
use crate::sys::mapping::LeasedRange;
pub(crate) use crate::sys::mapping::Mapping as RamMapping;
use crate::sys::mapping::{Mapping, Placement};
use crate::sys::memfd::Memfd;
use crate::sys::pagemap::ScanMethod;

/// A space of mapped memory. See the [module](crate::backing) for the contract, and [`Ram::host_ranges`] for what a hypervisor
/// maps into its guest.
///
/// Page sizes over 4 KiB make a fork copy that much around a dirty page; the kernel's own faults stay 4 KiB.
pub struct Mapped {
    state: RwLock<State>,
}

struct State {
    origin: MappedImage,
    mapping: Mapping,
    view: View,
    shown: Index<Version>,
    table_bytes: u64,
    /// A second view of the origin, once pages were copied back from it.
    second: Option<SecondView>,
    /// After a live fork: tells private pages written since from those whose bytes are the origin's. After `mapping`, which
    /// is to go first.
    tracker: Mutex<Option<Tracker>>,
    /// Set where undoing a failed step failed: content can no longer be trusted, and every call says so.
    lost: Option<SystemError>,
}

/// What the mapping is.
enum View {
    /// Shared, of a file that nobody else maps. The guest's writes are in the file.
    Shared(OwnFile),
    /// Private, of layers that show what `shown` says: the origin's, as they were when they were mapped.
    Private,
    /// Private, of the space's own file: the first cut was begun and undone, and the shared view could not be put back.
    Kept(Arc<Layer>),
}

/// The file of a space that was never cut.
enum OwnFile {
    Writable(Memfd),
    /// A cut was begun and undone: the seal against new writers stays, and hinders nobody.
    Sealed(Arc<Layer>),
}

impl State {
    fn geometry(&self) -> Geometry {
        self.origin.geometry()
    }

    fn usable(&self) -> Result<(), SpaceError> {
        self.lost.clone().map_or(Ok(()), |lost| Err(lost.into()))
    }

    /// The pages that this VM has of its own, from the kernel.
    fn private_pages(&self) -> Result<PageSet, SpaceError> {
        let pagemap = self.origin.family().pagemap()?;
        let all = self.mapping.geometry().all();
        Ok(space_pages(self.geometry(), &pagemap.scan(&self.mapping, all, ScanMethod::Best)?))
    }

    /// Pages of the kernel's as pages of the space, and those of the base.
    fn with_base(&self, host: PageSet) -> PageSet {
        space_pages(self.geometry(), &host).union(&PageSet::from(self.origin.base_pages()))
    }

    /// The pages whose content is not the root image's. Before the first cut there is nobody to share with and nothing in the
    /// page tables that would tell: it reads all that the file holds.
    fn changed_from_root(&self) -> Result<PageSet, SpaceError> {
        let size = self.geometry().page_size();
        let mut own = vec![0; size.bytes().get() as usize];
        let mut root = own.clone();
        let mut changed = PageSet::new();
        // What the file never held and the base does not reach is zeroes in both.
        let candidates = match &self.view {
            View::Shared(OwnFile::Writable(file)) => self.with_base(file.data_in(self.mapping.geometry().all())?),
            View::Shared(OwnFile::Sealed(layer)) => self.with_base(layer.file.data_in(self.mapping.geometry().all())?),
            View::Private | View::Kept(_) => PageSet::from(self.geometry().all()),
        };
        for page in candidates.pages() {
            match &self.view {
                // Reading the file allocates nothing; reading a hole through the mapping would.
                View::Shared(OwnFile::Writable(file)) => file.read_at(size.start_of(page), &mut own)?,
                View::Shared(OwnFile::Sealed(layer)) => layer.file.read_at(size.start_of(page), &mut own)?,
                View::Private | View::Kept(_) => self.mapping.read(size.start_of(page), &mut own)?,
            }
            self.origin.read(size.start_of(page), &mut root)?;
            if own != root {
                changed.push(PageRange::one(page));
            }
        }
        Ok(changed)
    }

    fn dirty(&self) -> Result<PageSet, SpaceError> {
        if self.origin.is_root() {
            return self.changed_from_root();
        }
        Ok(self.written_pages()?.union(&self.zeroed_pages()))
    }

    /// Lays a layer over pages, which then show it and nothing private.
    fn show(&mut self, range: PageRange, layer: &Layer) -> Result<(), SpaceError> {
        let host = host_pages(self.geometry(), range);
        self.mapping.overlay_extent(host, &layer.file).map_err(|error| self.note(error))
    }

    /// Remembers an error after which content cannot be trusted.
    fn note(&mut self, error: crate::sys::error::SysError) -> SpaceError {
        let error = SpaceError::from(error);
        if let SpaceError::System(lost @ SystemError::Lost { .. }) = &error {
            self.lost = Some(lost.clone());
        }
        error
    }

    fn zero(&mut self, range: PageRange) -> Result<(), SpaceError> {
        let host = host_pages(self.geometry(), range);
        if let View::Shared(own) = &self.view {
            return match own {
                OwnFile::Writable(file) => Ok(file.punch(host)?),
                // The seal forbids holes from now on. Writing zeroes only where there is something else takes no more memory.
                OwnFile::Sealed(layer) => {
                    layer.file.data_in(host)?.runs().try_for_each(|run| Ok(self.mapping.zero(run)?))
                }
            };
        }
        if self.mapping.kernel_mappings_with(host) <= self.budget() {
            let geometry = self.geometry();
            let layer = self.origin.family().zero(self.origin.tree(), geometry.len())?.clone();
            match self.show(range, &layer) {
                Ok(()) => {
                    self.table_bytes += self.shown.set(range, &PageState::Data(Version::ZEROED));
                    self.note_zeroed(range);
                    return Ok(());
                }
                Err(error) if self.lost.is_some() => return Err(error),
                // No room for one more mapping: zeroes can be written as well, they only take memory.
                Err(_) => {}
            }
        }
        Ok(self.mapping.zero(host)?)
    }

    /// Drops what is private: the pages `dirty` lists, or all that a scan finds.
    fn reset(&mut self, dirty: Option<&PageSet>) -> Result<PageCount, SpaceError> {
        if self.origin.is_root() {
            let changed = self.changed_from_root()?;
            let size = self.geometry().page_size();
            let mut bytes = vec![0; size.bytes().get() as usize];
            for page in changed.pages() {
                self.origin.read(size.start_of(page), &mut bytes)?;
                if is_zero(&bytes) {
                    self.zero(PageRange::one(page))?;
                } else {
                    self.mapping.write(size.start_of(page), &bytes)?;
                }
            }
            return Ok(changed.count());
        }
        let tracked = self.begin_reset(dirty)?;
        // Pages that show another layer than the origin's first: laying the right one over them drops what is private there. Those
        // whose own bytes are the origin's may stay.
        let all = self.origin.index().diff(&self.shown);
        let moved = match &tracked {
            Some(tracked) => self.to_lay(&all, tracked),
            None => all.clone(),
        };
        let origin = self.origin.clone();
        if !self.can_lay(&moved) {
            return self.reset_anew(&all);
        }
        self.lay_over(&moved)?;
        let dropped = match tracked.as_ref().or(dirty) {
            Some(dirty) => {
                self.mapping.reset_pages(dirty.runs().map(|run| host_pages(self.geometry(), run)))?;
                // Zeroed pages are listed and moved: they count once.
                moved.union(dirty).count().saturating_sub(moved.count())
            }
            // The kernel counts its own pages; larger ones, of which it may hold a part each, are counted before they are gone.
            None if self.geometry().page_size() != HOST_PAGE => {
                let private = self.private_pages()?.count();
                self.mapping.reset_private(origin.family().pagemap()?)?;
                private
            }
            None => self.mapping.reset_private(origin.family().pagemap()?)?.pages,
        };
        if moved == all {
            self.shown = origin.index().clone();
        }
        self.table_bytes = 0;
        if let Some(tracked) = tracked {
            self.reset_done();
            return Ok(tracked.count());
        }
        Ok(dropped.saturating_add(moved.count()))
    }
}

impl State {
    /// Lays the origin's layers over pages, which lose whatever is private there.
    fn lay_over(&mut self, pages: &PageSet) -> Result<(), SpaceError> {
        let Some(map) = self.origin.map() else { return Ok(()) };
        for (run, layer) in pages.runs().flat_map(|run| map.runs(run)) {
            self.show(run, layer)?;
            self.shows_origin(run);
        }
        Ok(())
    }

    /// What is not private and shows a version of the origin's reads as it, whichever layers show it.
    fn validate_shown(&self) -> Result<(), String> {
        let text = |error: SpaceError| error.to_string();
        let (all, size) = (self.geometry().all(), self.geometry().page_size());
        // Reading what no layer holds would make the kernel allocate it.
        let held = self.origin.data_in(&PageSet::from(all)).map_err(text)?;
        let other = self.shown.diff(self.origin.index()).union(&self.private_pages().map_err(text)?);
        let (mut own, mut origin) = (vec![0; size.bytes().get() as usize], vec![0; size.bytes().get() as usize]);
        for page in held.difference(&other).pages() {
            self.mapping.read(size.start_of(page), &mut own).map_err(|error| error.to_string())?;
            self.origin.read(size.start_of(page), &mut origin).map_err(text)?;
            if own != origin {
                return Err(format!("page {} shows something else than the origin", page.get()));
            }
        }
        Ok(())
    }

    /// A reset by mapping everything anew, where what shows something else than the origin is in more pieces than there may be mappings.
    fn reset_anew(&mut self, moved: &PageSet) -> Result<PageCount, SpaceError> {
        let dropped = self.dirty()?.union(moved).count();
        self.origin.settle()?;
        // It may be all that still shows the layers of before the merge.
        self.second = None;
        self.lay_over(&PageSet::from(self.geometry().all()))?;
        self.shown = self.origin.index().clone();
        self.table_bytes = 0;
        self.reset_done();
        Ok(dropped)
    }
}

impl Mapped {
    /// A space that was never cut: a shared mapping of a file of its own, filled from the root image.
    fn fresh(root: MappedImage) -> Result<Self, SpaceError> {
        let geometry = root.geometry();
        root.tree().0.check_room_for_file()?;
        let file = Memfd::create("offshoot-ram", geometry.len())?;
        let size = geometry.page_size();
        let mut bytes = vec![0; size.bytes().get() as usize];
        for page in root.base_pages().iter() {
            root.read(size.start_of(page), &mut bytes)?;
            if !is_zero(&bytes) {
                file.write_at(size.start_of(page), &bytes)?;
            }
        }
        let mut mapping = Mapping::map_shared(&file, geometry.len())?;
        // Room to move the view aside is made now, so that the first cut does not have to.
        mapping.prepare_spare()?;
        Ok(Self::with(root, mapping, View::Shared(OwnFile::Writable(file))))
    }

    fn over(origin: MappedImage) -> Result<Self, SpaceError> {
        let mapping = origin.map_at(Placement::Anywhere)?;
        Ok(Self::with(origin, mapping, View::Private))
    }

    fn with(origin: MappedImage, mapping: Mapping, view: View) -> Self {
        let shown = origin.index().clone();
        Self {
            state: RwLock::new(State {
                origin,
                mapping,
                view,
                shown,
                table_bytes: 0,
                second: None,
                tracker: Mutex::new(None),
                lost: None,
            }),
        }
    }

    fn shared(&self) -> Result<RwLockReadGuard<'_, State>, SpaceError> {
        let state = self.state.read();
        state.usable()?;
        Ok(state)
    }

    fn exclusive(&self) -> Result<RwLockWriteGuard<'_, State>, SpaceError> {
        let state = self.state.try_write_for(VIEW_PATIENCE).ok_or(SpaceError::Busy { waited: VIEW_PATIENCE })?;
        state.usable()?;
        Ok(state)
    }

    /// As [`Backing::reset`] for a caller that knows which pages were written or zeroed since [`Backing::origin`]: no page table is
    /// searched. A page that `dirty` leaves out stays as it is, or is reset all the same. Costs by what is listed; where a fork left more
    /// pages private than there may be mappings, once by all that there are: everything is mapped anew.
    ///
    /// # Errors
    /// As [`Backing::reset`], and [`SpaceError::Geometry`] where `dirty` reaches past the end; nothing is changed then.
    pub fn reset_listed(&self, dirty: &PageSet) -> Result<PageCount, SpaceError> {
        let mut state = self.exclusive()?;
        if let Some(last) = dirty.runs().last() {
            state.geometry().check_pages(last)?;
        }
        state.reset(Some(dirty))
    }

    /// Where the space lies in this process, all of it. Stable until the space is moved ([`crate::Vm::fork_relocating`]); dereferencing it is
    /// the embedder's unsafe code.
    pub fn host_base(&self) -> NonNull<u8> {
        self.state.read().mapping.base()
    }

    /// Part of the space's addresses, kept mapped for whoever holds host pointers. While the space is cut, and after it was moved, nobody
    /// may write there.
    #[cfg(feature = "kvm")]
    pub(crate) fn keep(&self, at: ByteOffset, len: ByteSize) -> Result<KeptRange, SpaceError> {
        Ok(self.shared()?.mapping.keep(at, len)?)
    }

    /// Part of the space's addresses, kept mapped for safe code that may write there at any time: the space is not moved while it lives.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn lease(&self, at: ByteOffset, len: ByteSize) -> Result<LeasedRange, SpaceError> {
        Ok(self.shared()?.mapping.lease(at, len)?)
    }

    /// The file that a space lies in which was never cut: every byte of it at its own offset, and whoever maps it shared writes the
    /// space. `None` once it was cut. The descriptor is the caller's own.
    #[cfg(feature = "qemu")]
    pub(crate) fn own_file(&self) -> Result<Option<OwnedFd>, SpaceError> {
        match &self.shared()?.view {
            View::Shared(OwnFile::Writable(file)) => Ok(Some(file.share()?)),
            View::Shared(OwnFile::Sealed(layer)) => Ok(Some(layer.file.share()?)),
            View::Private | View::Kept(_) => Ok(None),
        }
    }

    /// Kernel mappings that it is made of, against [`Limits::mappings_per_vm`](crate::Limits::mappings_per_vm): of the guest's view, and of
    /// the second one that [`reset_copying`](Self::reset_copying) makes.
    pub fn kernel_mappings(&self) -> u64 {
        let state = self.state.read();
        state.mapping.kernel_mappings() + state.second.as_ref().map_or(0, SecondView::kernel_mappings)
    }
}

/// A region of guest RAM and where it lies in this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRange {
    /// Its first guest address.
    pub guest: GuestAddress,
    /// Its first host address. Valid while the [`Ram`] lives and is not moved.
    pub host: NonNull<u8>,
    /// Its length.
    pub len: ByteSize,
}

impl Ram<Mapped> {
    /// Every region with its host address: what a hypervisor registers as memory slots.
    ///
    /// The addresses mean the same memory through [`Vm::fork`](crate::Vm::fork), resets and commits, in which the guest must be paused.
    /// [`Vm::fork_relocating`](crate::Vm::fork_relocating) changes all of them: the old ones then show the fork point and must not be
    /// used again. They are unmapped when this `Ram` and every [`Ram::place`] of them is gone.
    ///
    /// ```
    /// use offshoot::{Tree, backing::Mapped, page::*, ram::*};
    /// let ram: Ram<Mapped> = Ram::create(&Tree::default(), RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?)?;
    /// let region = ram.host_ranges().next().unwrap();
    /// assert_eq!((region.guest, region.len), (GuestAddress::new(0), ByteSize::mib(1)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn host_ranges(&self) -> impl ExactSizeIterator<Item = HostRange> + '_ {
        host_ranges(self.layout(), self.space().host_base())
    }
}

fn host_ranges(layout: &RamLayout, base: NonNull<u8>) -> impl ExactSizeIterator<Item = HostRange> + '_ {
    layout.regions().map(move |(region, offset)| {
        let addr = base.addr().saturating_add(offset.get() as usize);
        HostRange { guest: region.start, host: base.with_addr(addr), len: region.len }
    })
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state.try_read() {
            Some(state) => f
                .debug_struct("Mapped")
                .field("origin", &state.origin)
                .field("mappings", &state.mapping.kernel_mappings())
                .finish_non_exhaustive(),
            None => f.write_str("Mapped(being cut)"),
        }
    }
}

impl Backing for Mapped {
    type Sealed = MappedImage;
    type Cut<'a> = MappedCut<'a>;

    fn create(tree: &Tree, geometry: Geometry, base: Option<Arc<dyn Source>>) -> Result<Self, SpaceError> {
        Self::fresh(MappedImage::root(tree, geometry, base)?)
    }

    fn geometry(&self) -> Geometry {
        self.state.read().geometry()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        Ok(self.shared()?.mapping.read(at, buf)?)
    }

    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        Ok(self.shared()?.mapping.write(at, data)?)
    }

    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        let mut state = self.exclusive()?;
        state.geometry().check_pages(range)?;
        if range.is_empty() { Ok(()) } else { state.zero(range) }
    }

    fn flush(&self) -> Result<(), SpaceError> {
        // Memory has no medium behind it.
        Ok(())
    }

    fn cut(&self) -> Result<MappedCut<'_>, SpaceError> {
        MappedCut::begin(self)
    }

    fn origin(&self) -> MappedImage {
        self.state.read().origin.clone()
    }

    fn dirty(&self) -> Result<PageSet, SpaceError> {
        self.shared()?.dirty()
    }

    /// Asks the kernel: by the page tables in use in `range`, and two calls for each run of data.
    fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        self.shared()?.allocation(range)
    }

    fn reset(&self) -> Result<PageCount, SpaceError> {
        self.exclusive()?.reset(None)
    }

    /// What it holds. Asks the kernel: by the page tables in use, some 3 ms per GiB that the guest has touched.
    ///
    /// Before the first fork everything that the kernel has allocated is private. After it, pages of the first layer that the guest never
    /// touched count as shared.
    fn usage(&self) -> Result<Usage, SpaceError> {
        let state = self.shared()?;
        let (geometry, total) = (state.geometry(), state.geometry().pages());
        let (private, zero) = match &state.view {
            View::Shared(own) => {
                let pages = if geometry.page_size() == HOST_PAGE {
                    let allocated = match own {
                        OwnFile::Writable(file) => file.allocated()?,
                        OwnFile::Sealed(layer) => layer.file.allocated()?,
                    };
                    allocated.get().div_ceil(HOST_PAGE.bytes().get())
                } else {
                    // The kernel may have allocated a part of each.
                    let all = state.mapping.geometry().all();
                    let held = match own {
                        OwnFile::Writable(file) => file.data_in(all)?,
                        OwnFile::Sealed(layer) => layer.file.data_in(all)?,
                    };
                    space_pages(geometry, &held).count().get()
                };
                let pages = pages.min(total.get());
                (PageCount::new(pages), PageCount::new(total.get() - pages))
            }
            View::Private | View::Kept(_) => {
                let private = state.private_pages()?;
                let mut zero = PageCount::ZERO;
                for (run, spot) in state.shown.runs(geometry.all()) {
                    if is_hole(spot) {
                        zero = zero.saturating_add(run.count().saturating_sub(private.count_in(run)));
                    }
                }
                (private.count(), zero)
            }
        };
        Ok(Usage {
            private,
            shared: total.saturating_sub(private).saturating_sub(zero),
            zero,
            table_bytes: ByteSize::new(state.table_bytes),
            layers: state.origin.layers(),
            depth: state.origin.depth(),
        })
    }

    /// The pages that the page tables have: by [`Vm::working_set`](crate::Vm::working_set).
    fn working_set(&self) -> Result<WorkingSet, SpaceError> {
        self.shared()?.working_set()
    }

    fn prefault(&self, prefault: &Prefault) -> Result<Prefaulted, SpaceError> {
        self.shared()?.prefault(prefault)
    }

    fn validate(&self) -> Result<(), String> {
        let state = self.exclusive().map_err(|error| error.to_string())?;
        state.origin.validate()?;
        state.shown.validate()?;
        if let View::Shared(_) = state.view {
            return if state.mapping.is_shared() { Ok(()) } else { Err("never cut, and mapped privately".into()) };
        }
        state.validate_shown()?;
        state.validate_second()?;
        state.validate_tracker()
    }
}
