//! Address ranges that hold guest RAM.
//!
//! Owns what is mapped into an owned range ([`Mapping`]: one shared view of a writable file, or private views of sealed
//! files laid over each other); the ranges themselves are in [`reservation`](super::reservation).
//! Every range that a caller names is checked before the kernel sees it, and every `MAP_FIXED` falls inside a range
//! that is owned, so that no call can hit memory of somebody else. It must not know layers, forks or guests: which
//! file goes where is the caller's business. The freeze is in [`freeze`](super::freeze), access in
//! [`access`](super::access).
//!
//! Sound because: a mapped file cannot shrink (sealed at birth), so access never faults; guest memory is only touched
//! through raw pointers, never through references; and the range stays mapped for as long as its owner lives.
#![allow(unsafe_code)] // madvise drops pages, and offsets become addresses.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::io::Errno;
use rustix::mm::Advice as Madvise;
use rustix::mm::MapFlags;

use super::error::{SysError, checked_errno};
use super::fault::Call;
use super::memfd::{FileId, Memfd, SealedMemfd};
use super::reservation::{Hole, Reservation};
use crate::page::{ByteOffset, ByteSize, Geometry, GeometryError, PageRange, PageSize};

/// The unit of every range in this folder: the kernel breaks sharing page by page at this size.
pub(crate) const PAGE: PageSize = PageSize::KIB_4;

/// Where in the address space a private mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Placement {
    /// Where the kernel likes: one system call. For clones.
    Anywhere,
    /// At a multiple of 1 GiB: four system calls. For what is to be forked again, or backed by huge pages.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests map clones where a freeze would need them"))]
    GiantAligned,
    /// Into a range found before, whose length must be that of the mapping: one system call.
    Hole(Hole),
}

/// Which faults [`Mapping::populate`] takes in advance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Populate {
    /// Those of reads: shared pages get page-table entries, holes of the file are allocated in the file.
    Read,
    /// Those of writes: of a private view every page becomes private, with the bytes that it shows.
    Write,
}

/// What a mapping shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum View {
    /// Writes go to this file.
    Shared(FileId),
    /// Writes make private pages over this file and the extents.
    Private(FileId),
}

/// Guest RAM in an owned address range. Its address never changes while it lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Shared with the [`KeptRange`]s handed out: the addresses are unmapped when the last of them goes.
    pub(super) range: Arc<Reservation>,
    /// Shared with the [`LeasedRange`]s handed out, which it counts.
    pub(super) leases: Arc<()>,
    pub(super) geometry: Geometry,
    pub(super) view: View,
    /// From this page on, up to the next entry, this file is mapped. Empty: one kernel mapping over everything.
    pub(super) extents: BTreeMap<u64, FileId>,
    /// Where [`move_aside`](Self::move_aside) puts the old view.
    pub(super) spare: Option<Reservation>,
}

/// Part of a mapping's addresses, which stay mapped while this lives: for those who hold host pointers, such as memory slots.
#[derive(Clone, Debug)]
pub(crate) struct KeptRange {
    base: NonNull<u8>,
    #[allow(dead_code, reason = "as for its methods")]
    len: ByteSize,
    range: Arc<Reservation>,
}

#[allow(dead_code, reason = "which of these are asked for depends on the front ends that are built")]
impl KeptRange {
    /// The first address.
    pub(crate) fn base(&self) -> NonNull<u8> {
        debug_assert!(self.base >= self.range.base());
        self.base
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> ByteSize {
        self.len
    }

    /// Part of it.
    ///
    /// # Errors
    /// Out of range.
    pub(crate) fn part(&self, at: ByteOffset, len: ByteSize) -> Result<Self, GeometryError> {
        Geometry::new(self.len, PAGE)?.check(at, len)?;
        // SAFETY: checked to lie in the range, which stays mapped.
        let base = unsafe { self.base.add(at.get() as usize) };
        Ok(Self { base, len, range: self.range.clone() })
    }
}

/// A [`KeptRange`] through which safe code writes, whenever it likes. Counted, so that its mapping is not left behind.
#[cfg(feature = "vm-memory")]
#[derive(Debug)]
pub(crate) struct LeasedRange {
    kept: KeptRange,
    // After the range, so that one who counts none finds nobody on the range either.
    _lease: Arc<()>,
}

#[cfg(feature = "vm-memory")]
impl LeasedRange {
    /// The addresses, kept mapped.
    pub(crate) fn kept(&self) -> &KeptRange {
        &self.kept
    }
}

// SAFETY: it is an address range and a count; all access to what lies there is by atomics, assembly or a guest.
unsafe impl Send for KeptRange {}
// SAFETY: as above.
unsafe impl Sync for KeptRange {}

impl Mapping {
    /// Maps all of a writable file shared, at a multiple of 1 GiB, so that it can be moved aside by page-table
    /// pointers. About 4 µs, whatever its size.
    ///
    /// # Errors
    /// A `len` other than a multiple of 4 KiB within the file; [`SysError::OutOfMappings`], [`SysError::OutOfMemory`].
    pub(crate) fn map_shared(file: &Memfd, len: ByteSize) -> Result<Self, SysError> {
        let bytes = checked_len(len)?;
        let geometry = within(len, file.len())?;
        let range = Reservation::congruent(bytes, 0)?;
        range.map_over(0, bytes, file.as_fd(), MapFlags::SHARED)?;
        Ok(Self {
            range: Arc::new(range),
            leases: Arc::default(),
            geometry,
            view: View::Shared(file.id()),
            extents: BTreeMap::new(),
            spare: None,
        })
    }

    /// Maps a sealed file privately: reads share its pages, the first write to a page makes a private copy. With
    /// [`Placement::Anywhere`] one system call, 0.5–1 µs whatever the size.
    ///
    /// # Errors
    /// As [`map_shared`](Self::map_shared). With [`Placement::Hole`], [`SysError::Misuse`] if the length is not the
    /// hole's, and `EEXIST` if the hole has been taken meanwhile: pick another.
    pub(crate) fn map_private(file: &SealedMemfd, len: ByteSize, placement: Placement) -> Result<Self, SysError> {
        let bytes = checked_len(len)?;
        let geometry = within(len, file.len())?;
        let range = match placement {
            Placement::Anywhere => Reservation::map_private(file.as_fd(), bytes, None)?,
            Placement::GiantAligned => {
                let range = Reservation::congruent(bytes, 0)?;
                range.map_over(0, bytes, file.as_fd(), MapFlags::PRIVATE)?;
                range
            }
            Placement::Hole(hole) if hole.len() == len => Reservation::map_private(file.as_fd(), bytes, Some(hole))?,
            Placement::Hole(_) => return Err(SysError::Misuse("a mapping must be as long as the hole it goes into")),
        };
        Ok(Self {
            range: Arc::new(range),
            leases: Arc::default(),
            geometry,
            view: View::Private(file.id()),
            extents: BTreeMap::new(),
            spare: None,
        })
    }

    /// Maps `base` privately over everything, then each extent's file at the same pages over it, in order. About
    /// 1.6 µs an extent. Every extent that does not touch its neighbour costs up to two kernel mappings.
    ///
    /// # Errors
    /// Those of [`map_private`](Self::map_private) and [`overlay_extent`](Self::overlay_extent); nothing stays mapped.
    pub(crate) fn map_layers(
        base: &SealedMemfd,
        extents: &[(PageRange, &SealedMemfd)],
        len: ByteSize,
        placement: Placement,
    ) -> Result<Self, SysError> {
        let mut mapping = Self::map_private(base, len, placement)?;
        extents.iter().try_for_each(|&(range, file)| mapping.overlay_extent(range, file))?;
        Ok(mapping)
    }

    /// Lays `file` over `range`, page `n` of the file at page `n`. Private pages there are dropped. About 1.6 µs.
    ///
    /// # Errors
    /// [`SysError::Range`] outside the mapping or the file, [`SysError::Misuse`] on a shared view,
    /// [`SysError::OutOfMappings`]. The mapping shows what it did before, except after [`SysError::RollbackFailed`].
    pub(crate) fn overlay_extent(&mut self, range: PageRange, file: &SealedMemfd) -> Result<(), SysError> {
        let View::Private(base) = self.view else {
            return Err(SysError::Misuse("an extent can only be laid over a private view"));
        };
        let (at, len) = self.offsets(range)?;
        if range.is_empty() {
            return Ok(());
        }
        within(ByteSize::new((at + len) as u64), file.len())?;
        self.range.map_over(at, len, file.as_fd(), MapFlags::PRIVATE)?;
        let (start, end) = (range.start().get(), range.end().get());
        let after = self.extents.range(..=end).next_back().map_or(base, |(_, &file)| file);
        if self.extents.is_empty() {
            self.extents.insert(0, base);
        }
        // What the new extent covers is gone; what it cuts goes on after it.
        // By the covered entries, not by all: a diverged clone has thousands, laid one after another.
        let covered: Vec<u64> = self.extents.range(start..end).map(|(&from, _)| from).collect();
        for from in covered {
            self.extents.remove(&from);
        }
        if end < self.geometry.pages().get() {
            self.extents.entry(end).or_insert(after);
        }
        self.extents.insert(start, file.id());
        // Extents of one file that touch are one kernel mapping: a balloon that grows page by page is one extent.
        for seam in [end, start] {
            let before = self.extents.range(..seam).next_back().map(|(_, &file)| file);
            if before.is_some() && self.extents.get(&seam) == before.as_ref() {
                self.extents.remove(&seam);
            }
        }
        Ok(())
    }

    /// Drops the private pages of `range`: it shows the files again. On a shared view nothing changes. About 0.4 µs a
    /// call and 0.1 µs a page that was present.
    ///
    /// # Errors
    /// [`SysError::Range`], or those of madvise(2).
    #[cfg(test)]
    pub(crate) fn discard_private(&self, range: PageRange) -> Result<(), SysError> {
        self.madvise(range, Madvise::LinuxDontNeed)
    }

    /// Takes the page faults of `range` in advance. Linux 5.14.
    ///
    /// # Errors
    /// [`SysError::Range`], [`SysError::OutOfMemory`], [`SysError::Unsupported`] on an older kernel. A part may have
    /// been populated.
    pub(crate) fn populate(&self, range: PageRange, populate: Populate) -> Result<(), SysError> {
        let advice = match populate {
            Populate::Read => Madvise::LinuxPopulateRead,
            Populate::Write => Madvise::LinuxPopulateWrite,
        };
        self.madvise(range, advice)
    }

    fn madvise(&self, range: PageRange, advice: Madvise) -> Result<(), SysError> {
        let (at, len) = self.offsets(range)?;
        if len == 0 {
            return Ok(());
        }
        let at = self.range.at(at).as_ptr().cast();
        let made = checked_errno(Call::Madvise, || {
            // SAFETY: the bytes are inside the owned range, and no advice passed here does more than drop private
            // pages, which other threads see as a change of contents and no more.
            unsafe { rustix::mm::madvise(at, len, advice) }
        });
        match made {
            Err(Errno::INVAL) => {
                Err(SysError::Unsupported { call: Call::Madvise, why: "this kernel does not know the advice" })
            }
            other => other.map_err(|errno| SysError::new(Call::Madvise, errno)),
        }
    }

    /// The first address: what a memory slot is registered with. Dereferencing it is unsafe code's business; it is
    /// valid for [`len`](Self::len) bytes while the mapping lives.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.range.base()
    }

    /// Part of the addresses, kept mapped for as long as the result lives, even past this object. What they show changes with
    /// this object as long as it is there, and with nothing after.
    ///
    /// # Errors
    /// Out of range.
    pub(crate) fn keep(&self, at: ByteOffset, len: ByteSize) -> Result<KeptRange, GeometryError> {
        self.geometry.check(at, len)?;
        // Checked, so both fit an address.
        Ok(KeptRange { base: self.range.at(at.get() as usize), len, range: self.range.clone() })
    }

    /// As [`keep`](Self::keep), for safe code that may write there at any time.
    ///
    /// # Errors
    /// Out of range.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn lease(&self, at: ByteOffset, len: ByteSize) -> Result<LeasedRange, GeometryError> {
        Ok(LeasedRange { kept: self.keep(at, len)?, _lease: self.leases.clone() })
    }

    /// Whether there are leases. If not, whatever was written through those that there were has been seen.
    pub(crate) fn is_leased(&self) -> bool {
        let leased = Arc::strong_count(&self.leases) > 1;
        // With the decrement that the last of them made: counts are read without ordering.
        fence(Ordering::Acquire);
        leased
    }

    /// Whether anybody else keeps the addresses mapped.
    pub(crate) fn is_kept(&self) -> bool {
        Arc::strong_count(&self.range) > 1
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> ByteSize {
        self.geometry.len()
    }

    /// Length and the size of its pages, 4 KiB.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether writes go to the file (`true` until the first freeze) or make private pages.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.view, View::Shared(_))
    }

    /// How many kernel mappings this object holds, for a budget against `vm.max_map_count`: runs of one file. The kernel may
    /// hold a few more, where it could not merge two neighbours that were both written before they touched.
    pub(crate) fn kernel_mappings(&self) -> u64 {
        self.extents.len().max(1) as u64 + u64::from(self.spare.is_some())
    }

    /// The most kernel mappings that there can be once something is laid over `range`.
    pub(crate) fn kernel_mappings_with(&self, range: PageRange) -> u64 {
        if range.is_empty() {
            return self.kernel_mappings();
        }
        let (start, end) = (range.start().get(), range.end().get());
        let covered = match self.extents.is_empty() {
            true => u64::from(start == 0),
            false => self.extents.range(start..end).count() as u64,
        };
        let rest = end < self.geometry.pages().get() && !self.extents.contains_key(&end);
        self.kernel_mappings() - covered + 1 + u64::from(rest)
    }

    /// A range of pages as offset and length in bytes, checked.
    pub(super) fn offsets(&self, range: PageRange) -> Result<(usize, usize), GeometryError> {
        self.geometry.check_pages(range)?;
        // The end fits the mapping, so both fit an address.
        Ok((PAGE.start_of(range.start()).get() as usize, PAGE.size_of(range.count()).get() as usize))
    }

    /// A range of pages as address and length in bytes, checked.
    pub(super) fn span(&self, range: PageRange) -> Result<(*mut u8, usize), GeometryError> {
        let (at, len) = self.offsets(range)?;
        Ok((self.range.at(at).as_ptr(), len))
    }

    /// The address of `len` bytes from `at`, checked.
    #[inline]
    pub(super) fn bytes(&self, at: ByteOffset, len: usize) -> Result<*mut u8, GeometryError> {
        self.geometry.check(at, ByteSize::new(len as u64))?;
        // SAFETY: checked to lie in the owned range.
        Ok(unsafe { self.range.base().as_ptr().add(at.get() as usize) })
    }
}

/// A length in bytes that can be mapped here.
pub(super) fn checked_len(len: ByteSize) -> Result<usize, SysError> {
    if rustix::param::page_size() != 4096 {
        let why = "the mapped backing needs host pages of 4 KiB; use the heap backing";
        return Err(SysError::Unsupported { call: Call::Mmap, why });
    }
    Ok(Geometry::new(len, PAGE)?.len().get() as usize)
}

/// The geometry of `len` bytes from the start of a file that holds `file` bytes.
fn within(len: ByteSize, file: ByteSize) -> Result<Geometry, GeometryError> {
    if len > file {
        return Err(GeometryError::OutOfRange { at: ByteOffset::ZERO, len, space: file });
    }
    Geometry::new(len, PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageIndex;
    use crate::sys::fault::plan;
    use crate::sys::reservation::{GIB, live};

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    impl Mapping {
        /// Whether the kernel refuses a writable shared mapping of a sealed file.
        pub(crate) fn map_shared_fd_is_refused(file: &SealedMemfd) -> bool {
            let range = Reservation::congruent(4096, 0).unwrap();
            let refused = range.map_over(0, 4096, file.as_fd(), MapFlags::SHARED);
            matches!(refused, Err(SysError::Other { errno: Errno::PERM, .. }))
        }

        /// How many lines of /proc/self/maps lie in this range.
        pub(crate) fn lines(&self) -> u64 {
            let (start, end) = (self.base().addr().get(), self.base().addr().get() + self.range.len());
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let inside = |line: &&str| {
                let (from, _) = line.split_once('-').unwrap();
                (start..end).contains(&usize::from_str_radix(from, 16).unwrap())
            };
            maps.lines().filter(inside).count() as u64
        }

        /// The first byte of every page.
        pub(crate) fn marks(&self) -> Vec<u8> {
            self.geometry.all().iter().map(|page| self.load(PAGE.start_of(page)).unwrap()).collect()
        }
    }

    /// A sealed file whose every page starts with `mark`.
    fn marked(len: ByteSize, mark: u8) -> SealedMemfd {
        let file = Memfd::create("offshoot-test", len).unwrap();
        for at in (0..len.get()).step_by(4096) {
            file.write_at(ByteOffset::new(at), &[mark]).unwrap();
        }
        file.seal_all().unwrap()
    }

    #[test]
    fn placements_land_where_they_say() {
        let len = ByteSize::kib(64);
        let file = marked(len, 3);
        let hole = Hole::pick(len).unwrap();
        assert!(hole.base().addr().get().is_multiple_of(GIB));
        for placement in [Placement::Anywhere, Placement::GiantAligned, Placement::Hole(hole)] {
            let mapping = Mapping::map_private(&file, len, placement).unwrap();
            assert_eq!(mapping.marks(), [3; 16]);
            assert_eq!((mapping.len(), mapping.kernel_mappings(), mapping.lines()), (len, 1, 1));
            match placement {
                Placement::Anywhere => {}
                Placement::GiantAligned => assert!(mapping.base().addr().get().is_multiple_of(GIB)),
                Placement::Hole(hole) => {
                    assert_eq!(mapping.base(), hole.base());
                    let taken = Mapping::map_private(&file, len, placement).unwrap_err();
                    assert!(matches!(taken, SysError::Other { errno: Errno::EXIST, .. }));
                    assert_eq!(mapping.marks(), [3; 16]);
                }
            }
        }
        let other = Mapping::map_private(&file, ByteSize::kib(4), Placement::Hole(hole)).unwrap_err();
        assert!(matches!(other, SysError::Misuse(_)));
    }

    #[test]
    fn clones_share_until_they_write() {
        let len = ByteSize::kib(64);
        let file = marked(len, 1);
        let [a, b] = [(); 2].map(|()| Mapping::map_private(&file, len, Placement::Anywhere).unwrap());
        a.store(ByteOffset::new(4096), 9_u8).unwrap();
        assert_eq!((a.marks()[1], b.marks()[1]), (9, 1));
        a.discard_private(pages(0, 16)).unwrap();
        assert_eq!(a.marks(), [1; 16]);
    }

    #[test]
    fn extents_cover_and_cut_each_other() {
        let len = ByteSize::kib(64);
        let files = [1, 2, 3, 4].map(|mark| marked(len, mark));
        let mut naive = [1_u8; 16];
        let mut mapping = Mapping::map_private(&files[0], len, Placement::GiantAligned).unwrap();
        let steps =
            [(4, 8, 1), (6, 12, 2), (5, 6, 3), (0, 2, 1), (14, 16, 3), (3, 13, 2), (7, 7, 1), (0, 16, 1), (15, 16, 0)];
        for (start, end, file) in steps {
            let most = mapping.kernel_mappings_with(pages(start, end));
            mapping.overlay_extent(pages(start, end), &files[file]).unwrap();
            assert!(mapping.kernel_mappings() <= most);
            naive[start as usize..end as usize].fill(file as u8 + 1);
            assert_eq!(mapping.marks(), naive);
            assert!(mapping.lines() <= mapping.kernel_mappings());
            assert!(mapping.kernel_mappings() <= 9);
        }
        assert_eq!(mapping.kernel_mappings(), 2);
        assert!(matches!(mapping.overlay_extent(pages(15, 17), &files[1]), Err(SysError::Range(_))));
        for page in (0..8).chain((8..15).rev()) {
            mapping.overlay_extent(pages(page, page + 1), &files[2]).unwrap();
        }
        assert_eq!((mapping.kernel_mappings(), mapping.lines()), (2, 2), "one file over 0..15, in fifteen pieces");
        mapping.overlay_extent(pages(0, 15), &files[0]).unwrap();
        assert_eq!(mapping.kernel_mappings(), 1, "and the base again");
        mapping.overlay_extent(pages(0, 15), &files[1]).unwrap();
        let short = marked(ByteSize::kib(8), 7);
        assert!(matches!(mapping.overlay_extent(pages(0, 3), &short), Err(SysError::Range(_))));
        assert_eq!(mapping.marks(), naive);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let len = ByteSize::kib(64);
        let file = Memfd::create("offshoot-test", len).unwrap();
        let mut shared = Mapping::map_shared(&file, len).unwrap();
        assert!(matches!(Mapping::map_shared(&file, ByteSize::kib(68)), Err(SysError::Range(_))));
        assert!(matches!(Mapping::map_shared(&file, ByteSize::new(100)), Err(SysError::Range(_))));
        let layer = marked(len, 1);
        assert!(matches!(shared.overlay_extent(pages(0, 1), &layer), Err(SysError::Misuse(_))));
        for at in [len.get(), len.get() - 3, u64::MAX] {
            assert!(shared.load::<u32>(ByteOffset::new(at)).is_err());
            assert!(shared.store::<u32>(ByteOffset::new(at), 1).is_err());
            assert!(shared.read(ByteOffset::new(at), &mut [0; 4]).is_err());
            assert!(shared.write(ByteOffset::new(at), &[0; 4]).is_err());
        }
        assert!(shared.zero(pages(15, 17)).is_err());
    }

    #[test]
    fn a_failure_at_any_call_leaves_no_range_behind() {
        let len = ByteSize::kib(64);
        let (base, layer) = (marked(len, 1), marked(len, 2));
        let file = Memfd::create("offshoot-test", len).unwrap();
        let shared = |_: u64| Mapping::map_shared(&file, len);
        let layers = |_: u64| {
            let extents = [(pages(1, 2), &layer), (pages(5, 9), &layer)];
            Mapping::map_layers(&base, &extents, len, Placement::GiantAligned)
        };
        let makers: [&dyn Fn(u64) -> Result<Mapping, SysError>; 2] = [&shared, &layers];
        for make in makers {
            let before = live::count();
            for n in 1.. {
                let guard = plan::arm(n, Errno::NOMEM);
                let made = make(n);
                let seen = plan::calls_seen();
                drop(guard);
                if seen < n {
                    assert!(made.is_ok() && n > 2);
                    break;
                }
                assert!(matches!(made, Err(SysError::OutOfMemory { .. })));
                assert_eq!(live::count(), before);
            }
            assert_eq!(live::count(), before);
        }
    }

    #[test]
    fn a_failed_overlay_changes_nothing() {
        let len = ByteSize::kib(64);
        let (base, layer) = (marked(len, 1), marked(len, 2));
        let mut mapping = Mapping::map_private(&base, len, Placement::Anywhere).unwrap();
        mapping.store(ByteOffset::new(2 * 4096), 9_u8).unwrap();
        let before = (mapping.marks(), mapping.kernel_mappings(), mapping.lines());
        let guard = plan::arm(1, Errno::NOMEM);
        assert!(mapping.overlay_extent(pages(1, 4), &layer).is_err());
        drop(guard);
        assert_eq!((mapping.marks(), mapping.kernel_mappings(), mapping.lines()), before);
    }
}
