//! The pages that a clone's QEMU has of its own, read from outside its process.
//!
//! A clone's QEMU maps the fork point's memory file privately. What it has written since is found in its page tables and read through
//! `/proc`, and goes into the engine's RAM, which is cut next. The guest must stand still. Must not know what a fork is.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::QemuError;
use crate::backing::{Backing, Mapped};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, PageCount, PageIndex, PageRange, PageSet, PageSize};
use crate::sys::pagemap::Pagemap;

const PAGE: PageSize = PageSize::KIB_4;
/// Pages read in one go.
const BATCH: u64 = 256;

/// Which file a process maps: as in its list of mappings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MappedFile {
    major: u32,
    minor: u32,
    inode: u64,
}

/// What a look at another process found.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Gathered {
    /// Pages that the process has of its own.
    pub(super) private: PageCount,
    /// Those that differ from the engine's image.
    pub(super) changed: PageCount,
}

/// Where part of a file is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    address: u64,
    len: u64,
    offset: u64,
}

impl MappedFile {
    pub(super) fn of(file: impl AsFd) -> Result<Self, QemuError> {
        let stat = rustix::fs::fstat(file).map_err(|errno| QemuError::files("the memory file")(errno.into()))?;
        let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        Ok(Self { major, minor, inode: stat.st_ino })
    }

    /// Where it lies in a list of mappings: one line each, `from-to rwxp offset major:minor inode path`.
    fn places(self, maps: &str) -> Vec<Place> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let place = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            let (from, to) = words.next()?.split_once('-')?;
            let (_mode, offset) = (words.next()?, hex(words.next()?)?);
            let (major, minor) = words.next()?.split_once(':')?;
            let this = Self {
                major: u32::from_str_radix(major, 16).ok()?,
                minor: u32::from_str_radix(minor, 16).ok()?,
                inode: words.next()?.parse().ok()?,
            };
            let (from, to) = (hex(from)?, hex(to)?);
            (this == self && from < to).then_some(Place { address: from, len: to - from, offset })
        };
        maps.lines().filter_map(place).collect()
    }
}

/// Another process's view of the memory file.
pub(super) struct Outside {
    process: u32,
    memory: File,
    places: Vec<Place>,
}

impl Outside {
    /// Looks for the memory file of `len` bytes in a process.
    pub(super) fn open(process: u32, file: MappedFile, len: ByteSize) -> Result<Self, QemuError> {
        let what = "the memory of QEMU cannot be read (it must be this process's child, or traceable by it)";
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).map_err(QemuError::files(what))?;
        let mut places = file.places(&maps);
        places.sort_by_key(|place| place.offset);
        let mut end = 0;
        let whole = places.iter().all(|place| std::mem::replace(&mut end, place.offset + place.len) == place.offset);
        if !whole || end != len.get() {
            return Err(QemuError::files(what)(io::Error::other("QEMU does not map the memory file once and whole")));
        }
        let memory = File::options().read(true).open(format!("/proc/{process}/mem"));
        Ok(Self { process, memory: memory.map_err(QemuError::files(what))?, places })
    }

    /// The pages that the process has of its own. By the page tables in use: some 3 ms per GiB touched.
    pub(super) fn private(&self) -> Result<PageSet, QemuError> {
        let pagemap = Pagemap::open_of(self.process).map_err(SpaceError::from)?;
        let mut set = PageSet::new();
        for place in &self.places {
            let (first, count) = (PageIndex::new(place.offset / 4096), PageCount::new(place.len / 4096));
            let here = pagemap.scan_at(place.address, first, count).map_err(SpaceError::from)?;
            here.runs().for_each(|run| set.push(run));
        }
        Ok(set)
    }

    /// Fills `buf` from byte `at` of the memory file as the process sees it.
    pub(super) fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), QemuError> {
        let (mut at, mut rest) = (at.get(), buf);
        while !rest.is_empty() {
            let place = self.places.iter().find(|place| (place.offset..place.offset + place.len).contains(&at));
            let place = place.ok_or_else(|| QemuError::files("guest memory")(io::ErrorKind::UnexpectedEof.into()))?;
            let into = at - place.offset;
            let here = rest.len().min(usize::try_from(place.len - into).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(here);
            self.memory.read_exact_at(now, place.address + into).map_err(QemuError::files("guest memory"))?;
            (at, rest) = (at + here as u64, later);
        }
        Ok(())
    }

    /// Brings the engine's RAM to what the process has: pages that are private there, if they differ from the image that the space lies
    /// on, and those that the space has written itself. About 1 µs a page.
    pub(super) fn gather(&self, space: &Mapped) -> Result<Gathered, QemuError> {
        let (private, dirty, origin) = (self.private()?, space.dirty()?, space.origin());
        let mut gathered = Gathered { private: private.count(), ..Gathered::default() };
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for run in private.union(&dirty).runs() {
            for start in (run.start().get()..run.end().get()).step_by(BATCH as usize) {
                let end = run.end().get().min(start + BATCH);
                let at = PAGE.start_of(PageIndex::new(start));
                theirs.resize((end - start) as usize * 4096, 0);
                ours.resize(theirs.len(), 0);
                self.read(at, &mut theirs)?;
                // The image and not the space: a read of what no file holds would make the kernel allocate it.
                origin.read(at, &mut ours)?;
                let mut changed = PageSet::new();
                for (page, (theirs, ours)) in (start..end).zip(theirs.chunks(4096).zip(ours.chunks(4096))) {
                    if theirs != ours || dirty.contains(PageIndex::new(page)) {
                        changed.push(PageRange::one(PageIndex::new(page)));
                    }
                }
                for piece in changed.runs() {
                    let from = (piece.start().get() - start) as usize * 4096;
                    let len = piece.count().get() as usize * 4096;
                    space.write(PAGE.start_of(piece.start()), &theirs[from..from + len])?;
                }
                gathered.changed = gathered.changed.saturating_add(changed.count());
            }
        }
        Ok(gathered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Tree;
    use crate::ram::{Ram, RamLayout};

    #[test]
    fn a_file_is_found_among_the_mappings() {
        let maps = "7f5743fff000-7f5753fff000 rw-p 00000000 00:01 2983653    /memfd:ram (deleted)\n\
                    7f5753fff000-7f5754000000 rw-p 10000000 00:01 2983653    /memfd:ram (deleted)\n\
                    7f5760000000-7f5760021000 rw-p 00000000 00:00 0 \n\
                    7f5770000000-7f5770001000 r--p 00000000 fd:01 2983653    /usr/lib/x y\n\
                    nonsense\n";
        let places = MappedFile { major: 0, minor: 1, inode: 2983653 }.places(maps);
        let place = |address, len, offset| Place { address, len, offset };
        assert_eq!(places, [place(0x7f5743fff000, 0x10000000, 0), place(0x7f5753fff000, 0x1000, 0x10000000)]);
    }

    /// This process stands in for a QEMU: its own private view of a sealed file is found and read like another's.
    #[test]
    fn private_pages_come_over_and_others_stay() {
        let len = ByteSize::kib(64);
        let tree = Tree::default();
        let layout = RamLayout::flat(len, PAGE).unwrap();
        let parent: Ram<Mapped> = Ram::create(&tree, layout).unwrap();
        let file = MappedFile::of(parent.space().own_file().unwrap().unwrap()).unwrap();
        parent.space().write(ByteOffset::ZERO, &[7; 8192]).unwrap();
        let image = crate::backing::Cut::commit(parent.space().cut().unwrap()).0;
        let engine = crate::backing::Sealed::spawn(&image).unwrap();
        // Three views of one file in this process: the parent's own, the engine's clone and the "QEMU"; the last is asked for.
        let shown = Pagemap::open().map(drop);
        shown.unwrap();
        let qemu = crate::backing::Sealed::spawn(&image).unwrap();
        qemu.write(ByteOffset::new(4096), &[9; 4096]).unwrap();
        qemu.write(ByteOffset::new(3 * 4096), &[7; 1]).unwrap();
        qemu.write(ByteOffset::ZERO, &[7; 4096]).unwrap();
        let address = qemu.host_base().addr().get() as u64;
        let process = std::process::id();
        let memory = File::open("/proc/self/mem").unwrap();
        let places = vec![Place { address, len: len.get(), offset: 0 }];
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(file.places(&maps).iter().any(|place| place.address == address));
        let outside = Outside { process, memory, places };
        let gathered = outside.gather(&engine).unwrap();
        // Page 0 was written with what it held.
        assert_eq!(gathered, Gathered { private: PageCount::new(3), changed: PageCount::new(2) });
        let mut all = vec![0; 65536];
        engine.read(ByteOffset::ZERO, &mut all).unwrap();
        assert!(all[..4096].iter().all(|&b| b == 7) && all[4096..8192].iter().all(|&b| b == 9) && all[12288] == 7);
        assert_eq!(engine.dirty().unwrap().count(), PageCount::new(2));
        // What went back to the image's goes back here too.
        qemu.write(ByteOffset::new(4096), &[7; 4096]).unwrap();
        outside.gather(&engine).unwrap();
        engine.read(ByteOffset::ZERO, &mut all[..8192]).unwrap();
        assert!(all[..8192].iter().all(|&b| b == 7));
        assert!(outside.read(ByteOffset::new(65536), &mut [0]).is_err());
    }
}
