//! The system calls without the engine: memory files, private and shared views of them. What every mapped figure is compared with.
#![allow(unsafe_code)] // A baseline of bare mappings cannot be written without; every range is owned by the value that maps it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::{NonNull, null_mut};

use offshoot::page::ByteSize;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::report::Skip;
use super::subject::PAGE;

/// A file in memory with every page allocated.
pub fn filled_memfd(len: ByteSize) -> Result<File, Skip> {
    let file = File::from(memfd_create("figures", MemfdFlags::CLOEXEC)?);
    file.set_len(len.get())?;
    let chunk = vec![0x5a; 1 << 20];
    for at in (0..len.get()).step_by(chunk.len()) {
        file.write_all_at(&chunk[..chunk.len().min((len.get() - at) as usize)], at)?;
    }
    Ok(file)
}

/// A mapping of a memory file; unmapped on drop.
pub struct View {
    base: NonNull<u8>,
    len: usize,
}

impl View {
    /// What a clone's RAM is at bottom.
    pub fn private(file: &File, len: ByteSize) -> Result<Self, Skip> {
        Self::map(file, len, MapFlags::PRIVATE)
    }

    /// What a parent's RAM is before its first fork.
    pub fn shared(file: &File, len: ByteSize) -> Result<Self, Skip> {
        Self::map(file, len, MapFlags::SHARED)
    }

    fn map(file: &File, len: ByteSize, flags: MapFlags) -> Result<Self, Skip> {
        let len = len.get() as usize;
        // SAFETY: the kernel chooses the address, so nothing else is mapped over.
        let base = unsafe { mmap(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| Skip::new("mmap gave the null page"))?;
        Ok(Self { base, len })
    }

    /// Maps the file privately over this view, in place: what a fork costs that tears page tables down inside the pause.
    pub fn remap_private(&self, file: &File) -> Result<(), Skip> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: exactly the range that this value owns, and no reference into it exists.
        unsafe { mmap(self.base.as_ptr().cast(), self.len, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0) }?;
        Ok(())
    }

    /// Makes every page present in the page tables, as a guest that ran has it.
    pub fn populate(&self) -> Result<(), Skip> {
        // SAFETY: changes no content, only which pages are present.
        unsafe { madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxPopulateWrite) }?;
        Ok(())
    }

    /// Gives private pages back: what a reset is at bottom.
    pub fn drop_private(&self, page: u64, count: u64) -> Result<(), Skip> {
        let (at, len) = ((page * PAGE) as usize, (count * PAGE) as usize);
        assert!(at + len <= self.len, "past the end of the view");
        // SAFETY: inside this value's range, which nobody has references into; the pages read as the file again.
        unsafe { madvise(self.base.as_ptr().add(at).cast(), len, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// The first address: what a memory slot is registered with.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub fn touch(&self, page: u64) {
        assert!((page * PAGE) as usize + 8 <= self.len, "past the end of the view");
        // SAFETY: inside this value's range, mapped writable.
        unsafe { touch(self.base, page) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and goes with it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Writes one word at the start of a page, as a guest's store does.
///
/// # Safety
/// The page must be mapped and writable from `base`.
pub unsafe fn touch(base: NonNull<u8>, page: u64) {
    // SAFETY: the caller's promise; a page's start is aligned for any word.
    unsafe { base.as_ptr().add((page * PAGE) as usize).cast::<u64>().write_volatile(page | 1) }
}
