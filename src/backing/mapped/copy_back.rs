//! Going back to the origin by copying: the pages that were written get their bytes back, and stay private.
//!
//! Owns a second view of the origin's layers, made when first asked for. It is the origin's: a cut that is committed hands it, with the old
//! origin, to whoever tears that down. A merge leaves it what it is, since bytes do not change when they move to another layer. Must not
//! know of trackers: a copy is a write like the guest's own, and whatever watches the pages sees it.

use super::layer::host_pages;
use super::{Mapped, State};
use crate::admission::Pass;
use crate::backing::Sealed;
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{PageCount, PageSet};
use crate::sys::copy_back::Originals;
use crate::sys::mapping::Placement;

/// A second view of an image.
pub(super) struct SecondView {
    originals: Originals,
    /// Admission counts its mappings.
    _pass: Pass,
}

impl SecondView {
    pub(super) fn kernel_mappings(&self) -> u64 {
        self.originals.kernel_mappings()
    }
}

impl Mapped {
    /// As [`reset_listed`](Self::reset_listed), but copies the old bytes back instead of dropping the pages: they stay private, and the next
    /// writes to them cost no fault. For a loop that writes about the same pages in every turn.
    ///
    /// Pages copied back go on to count as written: [`dirty`](crate::backing::Backing::dirty) and `usage` name them, the next fork copies them, until a plain
    /// reset, which gives their memory back, or that fork. So does a page that was zeroed since. A page on the list that was not written is
    /// only read. A page that `dirty` leaves out stays as it is.
    ///
    /// The first call after a spawn or a fork maps the origin a second time, which counts against
    /// [`Limits::mappings_per_vm`](crate::Limits::mappings_per_vm), and the kernel keeps page tables for what was copied through it. Costs
    /// by what is listed, 0.1 to 0.2 µs for each 4 KiB.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`] where `dirty` reaches past the end, [`SpaceError::MappingLimit`] or [`SpaceError::Refused`] where there is no room for the second view,
    /// [`SpaceError::Busy`], or what the system refuses; nothing is changed then.
    ///
    /// ```
    /// use offshoot::{Tree, backing::*, page::*};
    /// let geometry = Geometry::new(ByteSize::mib(1), PageSize::KIB_4)?;
    /// let parent = Mapped::create(&Tree::default(), geometry, None)?;
    /// parent.write(ByteOffset::new(5000), b"before")?;
    /// let clone = parent.cut()?.commit().0.spawn()?;
    /// clone.write(ByteOffset::new(5000), b"after!")?;
    /// let dirty: PageSet = [PageIndex::new(1)].into_iter().collect();
    /// clone.reset_copying(&dirty)?;
    /// let mut seen = [0; 6];
    /// clone.read(ByteOffset::new(5000), &mut seen)?;
    /// assert_eq!((&seen, clone.dirty()?), (b"before", dirty));
    /// # Ok::<(), offshoot::SpaceError>(())
    /// ```
    pub fn reset_copying(&self, dirty: &PageSet) -> Result<PageCount, SpaceError> {
        let mut state = self.exclusive()?;
        let Some(last) = dirty.runs().last() else { return Ok(PageCount::ZERO) };
        state.geometry().check_pages(last)?;
        // Before the first cut a reset writes the old bytes back anyway.
        if state.origin.is_root() { state.reset(Some(dirty)) } else { state.copy_back(dirty) }
    }
}

impl State {
    fn copy_back(&mut self, dirty: &PageSet) -> Result<PageCount, SpaceError> {
        let second = match self.second.take() {
            Some(there) => there,
            None => self.map_again()?,
        };
        let SecondView { originals, .. } = self.second.insert(second);
        for run in dirty.runs() {
            self.mapping.copy_back(originals, host_pages(self.origin.geometry(), run))?;
        }
        Ok(dirty.count())
    }

    fn map_again(&self) -> Result<SecondView, SpaceError> {
        let limit = self.origin.tree().limits().mappings_per_vm;
        let more = self.origin.map().map_or(1, |map| map.mappings());
        let needed = self.mapping.kernel_mappings().saturating_add(more);
        if needed > limit {
            return Err(SpaceError::MappingLimit { needed, limit, name: "Limits::mappings_per_vm" });
        }
        let _pass = self.origin.tree().0.admit_view(more)?;
        Ok(SecondView { originals: Originals::of(self.origin.map_at(Placement::Anywhere)?)?, _pass })
    }

    /// Kernel mappings that the guest's own view may be made of.
    pub(super) fn budget(&self) -> u64 {
        let second = self.second.as_ref().map_or(0, SecondView::kernel_mappings);
        self.origin.tree().limits().mappings_per_vm.saturating_sub(second)
    }

    /// The second view shows the origin.
    pub(super) fn validate_second(&self) -> Result<(), String> {
        let Some(SecondView { originals, .. }) = &self.second else { return Ok(()) };
        let (all, size, text) =
            (self.geometry().all(), self.geometry().page_size(), |error: SpaceError| error.to_string());
        let (mut shown, mut origin) = (vec![0; size.bytes().get() as usize], vec![0; size.bytes().get() as usize]);
        // Reading what no layer holds would make the kernel allocate it.
        for page in self.origin.data_in(&PageSet::from(all)).map_err(text)?.pages() {
            originals.view().read(size.start_of(page), &mut shown).map_err(|error| error.to_string())?;
            self.origin.read(size.start_of(page), &mut origin).map_err(text)?;
            if shown != origin {
                return Err(format!("page {} of the second view is not the origin's", page.get()));
            }
        }
        Ok(())
    }
}
