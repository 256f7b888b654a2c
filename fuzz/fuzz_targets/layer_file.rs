//! A sealed layer with any bytes changed.
//!
//! Oracle: opening and reading never panic and never hold more memory than a small multiple of the file. With the checksums as they were, every page that is
//! read is what was written, or an error; with them put right, whatever opens keeps its own rules, and can be written, flushed and opened again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::Tree;
use offshoot::backing::Backing;
use offshoot::image::Source;
use offshoot::page::ByteOffset;
use offshoot::store::DiskDir;
use offshoot_fuzz::patched::{self, PAGES, Target};
use offshoot_fuzz::peak::{self, Peak};

#[global_allocator]
static ALLOCATOR: Peak = Peak;

/// The files take 70 KiB, and the largest disk's tables 8 MiB: a slot for each 128 MiB, 16 bytes each.
const LIMIT: usize = 48 << 20;

fuzz_target!(|input: &[u8]| {
    let (folder, repaired) = patched::folder(Target::Layer, input);
    let (image, peak) =
        peak::during(|| DiskDir::over(folder.folder(), &Tree::default()).open_image(patched::disk(), None));
    assert!(peak < LIMIT, "{peak} bytes held");
    let Ok(image) = image else { return };
    let want = patched::content();
    for page in 0..PAGES {
        let at = page as usize * 4096;
        let mut found = vec![0xa5; 4096];
        let read = image.read(ByteOffset::new(at as u64), &mut found);
        assert!(repaired || read.is_err() || found == want[at..at + 4096], "page {page} is not what was written");
    }
    drop(image);
    let dir = || DiskDir::over(folder.folder(), &Tree::default());
    let Ok(disk) = dir().open_disk(patched::disk(), None) else { return };
    disk.validate().unwrap();
    disk.write(ByteOffset::new(2 * 4096), &[7; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let mut found = [0; 4096];
    dir().open_disk(patched::disk(), None).unwrap().read(ByteOffset::new(2 * 4096), &mut found).unwrap();
    assert_eq!(found, [7; 4096]);
});
