//! What a space touched, from the kernel's page tables, and populating those of a clone ahead.
//!
//! A page is *written* if it is private, and *read* if a page of a file is in the page tables. The kernel maps up to 16 pages around
//! a page of a file that is read ("fault around"), if they are in memory: they count as read, and cost next to nothing to map.
//! Under the write protection of a live fork, a page that was only read and then reclaimed may count as written.

use super::State;
use super::layer::{host_pages, space_pages};
use crate::backing::{Prefault, Prefaulted, WorkingSet};
use crate::error::SpaceError;
use crate::page::{PageCount, PageIndex, PageRange};
use crate::sys::error::SysError;
use crate::sys::mapping::Populate;

/// The most pages of the kernel's that one call populates, so that nobody waits long for the lock on the address space.
const EXTENT: PageCount = PageCount::new(1024);

impl State {
    pub(super) fn working_set(&self) -> Result<WorkingSet, SpaceError> {
        let touched = self.origin.family().pagemap()?.touched(&self.mapping, self.mapping.geometry().all())?;
        let geometry = self.geometry();
        Ok(WorkingSet::new(space_pages(geometry, &touched.read), space_pages(geometry, &touched.written)))
    }

    /// Takes page faults in advance. Where it fails, some of them were taken.
    pub(super) fn prefault(&self, prefault: &Prefault) -> Result<Prefaulted, SpaceError> {
        let set = &prefault.set;
        for last in [set.written().runs().last(), set.read().runs().last()].into_iter().flatten() {
            self.geometry().check_pages(last)?;
        }
        let mut done = Prefaulted::default();
        let sides = [(set.written(), Populate::Write), (set.read(), Populate::Read)];
        for (pages, populate) in sides {
            for run in pages.runs() {
                let left = prefault.limit.saturating_sub(done.written).saturating_sub(done.read);
                let run = first_of(run, left);
                match self.populate(run, populate) {
                    Ok(()) => {}
                    Err(SysError::Unsupported { .. }) => {
                        tracing::warn!("this kernel cannot map ahead (madvise(MADV_POPULATE_*) needs Linux 5.14)");
                        done.left_out = set.count();
                        return Ok(done);
                    }
                    Err(error) => return Err(error.into()),
                }
                let count = match populate {
                    Populate::Write => &mut done.written,
                    Populate::Read => &mut done.read,
                };
                *count = count.saturating_add(run.count());
            }
        }
        done.left_out = set.count().saturating_sub(done.written).saturating_sub(done.read);
        Ok(done)
    }

    fn populate(&self, run: PageRange, populate: Populate) -> Result<(), SysError> {
        let mut rest = host_pages(self.geometry(), run);
        while !rest.is_empty() {
            let extent = first_of(rest, EXTENT);
            self.mapping.populate(extent, populate)?;
            rest = PageRange::from_bounds(extent.end(), rest.end());
        }
        Ok(())
    }
}

/// At most the first `count` pages.
fn first_of(range: PageRange, count: PageCount) -> PageRange {
    let end = range.start().checked_add(count).map_or(range.end(), |end| PageIndex::min(end, range.end()));
    PageRange::from_bounds(range.start(), end)
}
