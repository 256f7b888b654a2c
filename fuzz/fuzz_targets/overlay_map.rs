//! An overlay's records and map with any bytes changed.
//!
//! Oracle: opening never panics and never holds more memory than a small multiple of the file. With the checksums as they were, what opens reads as one of the
//! two versions of the map says, or is an error; with them put right, whatever opens keeps its own rules, and can be discarded, reset, cut, flushed
//! and opened again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::Tree;
use offshoot::backing::{Backing, Cut};
use offshoot::page::{ByteOffset, PageIndex, PageRange};
use offshoot::store::DiskDir;
use offshoot_fuzz::patched::{self, PAGES, Target};
use offshoot_fuzz::peak::{self, Peak};

#[global_allocator]
static ALLOCATOR: Peak = Peak;

/// The files take 70 KiB, and the largest disk's tables 8 MiB: a slot for each 128 MiB, 16 bytes each.
const LIMIT: usize = 48 << 20;

fuzz_target!(|input: &[u8]| {
    let (folder, repaired) = patched::folder(Target::Overlay, input);
    let dir = || DiskDir::over(folder.folder(), &Tree::default());
    let (disk, peak) = peak::during(|| dir().open_disk(patched::disk(), None));
    assert!(peak < LIMIT, "{peak} bytes held");
    // For reading it may open where it does not for writing.
    let (_image, peak) = peak::during(|| dir().open_image(patched::disk(), None));
    assert!(peak < LIMIT, "{peak} bytes held");
    let Ok(disk) = disk else { return };
    disk.validate().unwrap();
    let mut found = vec![0xa5; PAGES as usize * 4096];
    let read = disk.read(ByteOffset::ZERO, &mut found);
    if !repaired && read.is_ok() {
        // The older version of the map had page 0 as data of the overlay, and nothing else.
        let mut older = patched::content();
        older[..4096].fill(0xdd);
        older[4096..2 * 4096].fill(0x22);
        older[2 * 4096..3 * 4096].fill(0);
        // Without a parent, if neither of its records is the golden one, it would not have opened.
        assert!(found == patched::content() || found == older, "the map says what it never said");
    }
    let page = |first, last| PageRange::from_bounds(PageIndex::new(first), PageIndex::new(last));
    disk.zero(page(0, 2)).unwrap();
    if let Err(error) = disk.write(ByteOffset::new(4096 + 512), &[7; 4096]) {
        // A frozen layer whose map is damaged in part: its pages are errors, and so is a write to a part of one.
        assert!(read.is_err(), "{error}");
        return;
    }
    disk.flush().unwrap();
    drop(disk.cut().unwrap().commit());
    disk.reset().unwrap();
    let Ok(()) = disk.write(ByteOffset::new(3 * 4096), &[8; 512]) else { return };
    disk.flush().unwrap();
    disk.validate().unwrap();
    let Ok(()) = disk.read(ByteOffset::ZERO, &mut found) else { return };
    drop(disk);
    let mut again = vec![0; found.len()];
    dir().open_disk(patched::disk(), None).unwrap().read(ByteOffset::ZERO, &mut again).unwrap();
    assert!(again == found);
});
