//! Exports: disks under a name, and the set of them that one server offers.
//!
//! Knows disks and names. Must not know sockets or the wire.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};

use super::gate::{Drained, Gate};
use crate::disk::{Access, AnySealed, Disk, DiskError, DiskImage};
use crate::error::SpaceError;
use crate::page::{PageRange, PageSet, SectorCount};

/// The name of an export: UTF-8, at most [`ExportName::MAX_LEN`] bytes, no NUL. The empty name is the one that clients ask for who name none.
///
/// ```
/// use offshoot::frontend::nbd::ExportName;
/// assert!(ExportName::new("clone-7/root").is_ok());
/// assert!(ExportName::new("a\0b").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ExportName(Arc<str>);

/// A name, or a description, that the protocol has no room for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no name for an export: at most {max} bytes, none of them NUL", max = ExportName::MAX_LEN)]
pub struct BadName(String);

impl ExportName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 4096;

    /// Checks a name.
    ///
    /// # Errors
    /// [`BadName`].
    pub fn new(name: impl Into<Arc<str>>) -> Result<Self, BadName> {
        checked(name.into()).map(Self)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn checked(text: Arc<str>) -> Result<Arc<str>, BadName> {
    if text.len() > ExportName::MAX_LEN || text.contains('\0') {
        return Err(BadName(text.chars().take(64).collect()));
    }
    Ok(text)
}

/// A disk as it is offered to clients. Any number of them use it at once.
#[derive(Debug)]
pub struct Export {
    disk: Arc<Disk>,
    access: Access,
    description: Arc<str>,
    gate: Arc<Gate>,
    /// What counts as dirty whatever the disk says.
    older: Option<Mutex<Older>>,
}

/// The pages in which a fork point of the disk may differ from an older one.
#[derive(Debug)]
struct Older {
    pages: PageSet,
    /// That fork point. The disk may have been forked since.
    upto: Arc<dyn AnySealed>,
}

impl Older {
    /// Goes on to the disk's last fork point.
    fn catch_up(&mut self, disk: &Disk) -> Result<(), SpaceError> {
        let origin = disk.space().origin();
        if origin.same(&*self.upto) {
            return Ok(());
        }
        let since = match origin.diff(&*self.upto) {
            // The disk was put over something else, a flattened image say: any page may differ.
            Err(SpaceError::Unrelated(_)) => origin.geometry().all().into(),
            since => since?,
        };
        *self = Self { pages: self.pages.union(&since), upto: origin };
        Ok(())
    }
}

impl Export {
    /// Offers `disk` with the access it has.
    pub fn new(disk: Arc<Disk>) -> Self {
        let access = disk.access();
        Self { access, disk, description: "".into(), gate: Arc::default(), older: None }
    }

    /// The same, with the dirty bitmap ([`DIRTY_BITMAP`](super::DIRTY_BITMAP)) counting from `image` instead of from the disk's last fork point: the
    /// pages in which that fork point may differ from `image`, and those written since. What an incremental backup of a running VM needs: who has a
    /// copy of `image` copies the dirty blocks of a clone of the next fork point. A later fork of the disk takes none of them away; put over other layers, all that was moved counts. Costs a diff, and another
    /// after each such fork.
    ///
    /// ```
    /// use offshoot::{CloneSpec, Tree, Vm, VmName, DiskName, backing::Heap, disk::{Access, Disk}, frontend::nbd::Export, page::*, ram::RamLayout};
    /// use offshoot::testing::ScriptedGuest;
    /// # let tree = Tree::default();
    /// # let disk = Disk::blank(&tree, SectorCount::new(2048), Access::ReadWrite)?;
    /// # let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4)?;
    /// # let vm: Vm<Heap> = Vm::new(&tree, VmName::new("vm")?, layout, vec![(DiskName::new("d"), disk)])?;
    /// # vm.start()?;
    /// # let mut guest = ScriptedGuest::running(1);
    /// let monday = vm.fork(&mut guest)?;
    /// // … the guest writes, a full backup of `monday` is made …
    /// let tuesday = vm.fork(&mut guest)?.spawn(CloneSpec::default())?;
    /// let disk = tuesday.disk("d").expect("there").clone();
    /// let export = Export::new(disk).read_only().since(monday.disk("d").expect("there"))?;
    /// # let _ = export;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SpaceError::Unrelated`] unless both come from one disk.
    pub fn since(self, image: &DiskImage) -> Result<Self, SpaceError> {
        let upto = self.disk.space().origin();
        let older = Older { pages: upto.diff(image.image())?, upto };
        Ok(Self { older: Some(Mutex::new(older)), ..self })
    }

    /// The same, for reading only, whatever the disk allows.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { access: Access::ReadOnly, ..self }
    }

    /// The same, with a line for people to read.
    ///
    /// # Errors
    /// [`BadName`]: as long as a name at most.
    pub fn described(self, description: impl Into<Arc<str>>) -> Result<Self, BadName> {
        Ok(Self { description: checked(description.into())?, ..self })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Whether clients may write.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What it says of itself.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Waits for the requests that are being executed and keeps later ones waiting, reads too, until the guard is dropped. Held for a
    /// fork, it makes the cut of a disk one instant between requests. Several guards may be held at once.
    ///
    /// Do not wait for a reply from this export while holding one.
    pub fn drain(&self) -> Drained {
        self.gate.clone().hold()
    }

    pub(super) fn capacity(&self) -> SectorCount {
        self.disk.capacity()
    }

    /// The dirty pages among those of `range`.
    pub(super) fn dirty_in(&self, range: PageRange) -> Result<PageSet, DiskError> {
        // The disk is asked first: what a fork takes from its answer meanwhile is in the other.
        let dirty = self.disk.dirty_in(range)?;
        let Some(older) = &self.older else { return Ok(dirty) };
        let mut older = older.lock();
        older.catch_up(&self.disk)?;
        Ok(dirty.union(&older.pages.within(range)))
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }
}

/// An export of this name is there already.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// Two exports of one name.
    #[error("an export named {0:?} is there already: remove it first, or take another name")]
    Taken(ExportName),
    /// The server is being shut down.
    #[error("the server is shutting down: nothing is added any more")]
    ShuttingDown,
}

/// The exports of a server, or of a [`Session`](super::Session). Clones of it are the same set.
///
/// ```
/// use std::sync::Arc;
/// use offshoot::{Tree, disk::{Access, Disk}, page::SectorCount, frontend::nbd::*};
/// let disk = Disk::blank(&Tree::default(), SectorCount::new(2048), Access::ReadWrite)?;
/// let exports = Exports::default();
/// exports.add(ExportName::new("root")?, Export::new(Arc::new(disk)))?;
/// assert_eq!(exports.names().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Exports(Arc<Set>);

#[derive(Debug, Default)]
struct Set {
    by_name: RwLock<BTreeMap<ExportName, Arc<Export>>>,
    closing: AtomicBool,
}

impl Exports {
    /// Offers one more. Clients that are connected see it in their next LIST.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, name: ExportName, export: Export) -> Result<Arc<Export>, AddError> {
        let mut by_name = self.0.by_name.write();
        if self.is_closing() {
            return Err(AddError::ShuttingDown);
        }
        if by_name.contains_key(&name) {
            return Err(AddError::Taken(name));
        }
        let export = Arc::new(export);
        by_name.insert(name, export.clone());
        Ok(export)
    }

    /// Takes one away: requests that are being executed end, all others get ESHUTDOWN from now on. Returns it once nothing
    /// touches its disk through it any more; `None` where there is none of this name.
    pub fn remove(&self, name: &ExportName) -> Option<Arc<Export>> {
        let export = self.0.by_name.write().remove(name)?;
        export.gate.close();
        Some(export)
    }

    /// An export by name.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        let by_name = self.0.by_name.read();
        by_name.get(&ExportName(name.into())).cloned()
    }

    /// All names, in order.
    pub fn names(&self) -> Vec<ExportName> {
        self.0.by_name.read().keys().cloned().collect()
    }

    /// Visits all, in order of their names. Nothing is added or removed meanwhile.
    pub(super) fn visit(&self, mut each: impl FnMut(&str, &Export)) {
        self.0.by_name.read().iter().for_each(|(name, export)| each(name.as_str(), export));
    }

    pub(super) fn is_closing(&self) -> bool {
        self.0.closing.load(Ordering::Acquire)
    }

    /// Turns new requests away, for good, and waits for those that are being executed. Disks are let go: whoever still holds the set, such as the
    /// thread of a client that has just left, keeps none of them.
    pub(super) fn close(&self) {
        let mut by_name = self.0.by_name.write();
        self.0.closing.store(true, Ordering::Release);
        by_name.values().for_each(|export| export.gate.close());
        by_name.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Heap;
    use crate::disk::Access;
    use crate::page::{ByteSize, Lba, PageIndex, PageSize};
    use crate::ram::RamLayout;
    use crate::testing::ScriptedGuest;
    use crate::vm::{CloneSpec, DiskName, Vm, VmName};

    #[test]
    fn a_fork_of_the_exported_disk_leaves_older_writes_dirty() {
        let tree = crate::Tree::default();
        let disk = Disk::blank(&tree, SectorCount::new(64), Access::ReadWrite).expect("room");
        let layout = RamLayout::flat(ByteSize::kib(4), PageSize::KIB_4).expect("a page");
        let disks = vec![(DiskName::new("d"), disk)];
        let vm: Vm<Heap> = Vm::new(&tree, VmName::new("vm").expect("a name"), layout, disks).expect("room");
        let mut guest = ScriptedGuest::running(1);
        let write = |vm: &Vm<Heap>, page: u64| {
            vm.disk("d").expect("there").write(Lba::new(page * 8), &[7; 4096]).expect("room");
        };
        vm.start().expect("new");
        let monday = vm.fork(&mut guest).expect("room");
        write(&vm, 1);
        let tuesday = vm.fork(&mut guest).expect("room").spawn(CloneSpec::default()).expect("room");
        tuesday.start().expect("new");
        let disk = tuesday.disk("d").expect("there").clone();
        let [plain, since] = [0, 1].map(|_| Export::new(disk.clone()));
        let since = since.since(monday.disk("d").expect("there")).expect("relatives");
        write(&tuesday, 2);
        let all = PageRange::from_bounds(PageIndex::ZERO, PageIndex::new(8));
        let dirty = |export: &Export| -> Vec<u64> {
            export.dirty_in(all).expect("on the heap").pages().map(PageIndex::get).collect()
        };
        assert_eq!((dirty(&plain), dirty(&since)), (vec![2], vec![1, 2]));
        tuesday.fork(&mut guest).expect("room");
        assert_eq!((dirty(&plain), dirty(&since)), (vec![], vec![1, 2]));
        write(&tuesday, 3);
        assert_eq!((dirty(&plain), dirty(&since)), (vec![3], vec![1, 2, 3]));
    }
}
