//! A clone store's catalogue with any bytes changed, or with any rows in it.
//!
//! Flag 1 of the first byte says which: patches over a whole catalogue file (`patched.rs` has their form), or rows of our own making, under checksums of
//! the database's that are right. Oracle: opening, listing, checking, repairing and whatever else is asked for never panic and never hold more memory
//! than a small multiple of the file; a repair removes no file that the golden catalogue's clone needs, unless the catalogue that opened does not name it;
//! and a store that opens can be opened again.
#![no_main]

use std::sync::{Once, OnceLock};

use libfuzzer_sys::fuzz_target;
use offshoot::page::{ByteOffset, ByteSize};
use offshoot::store::{CloneName, CloneStore, Job, StoreOptions};
use offshoot::testing::crash::Recorder;
use offshoot_fuzz::peak::{self, Peak};
use offshoot_fuzz::store_files::{self, CATALOGUE};

#[global_allocator]
static ALLOCATOR: Peak = Peak;

/// The catalogue takes 1.5 MiB and its cache 4; a layer's tables are small.
const LIMIT: usize = 64 << 20;

fn threads() -> &'static rayon::ThreadPool {
    static POOL: OnceLock<rayon::ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread"))
}

fn open(folder: &Recorder) -> Option<CloneStore> {
    CloneStore::over(folder.folder(), StoreOptions::default()).ok()
}

fn use_it(store: &CloneStore) {
    let Ok(clones) = store.list() else { return };
    let _ = store.list_saved();
    let _ = store.space();
    let _ = store.check(threads(), &Job::new());
    for info in clones.iter().take(4) {
        // Whatever is left of the golden layers is small; a row may claim a disk of any length.
        if let Ok(image) = store.open_image(&info.name) {
            let mut page = [0; 4096];
            let _ = offshoot::image::Source::read(&image, ByteOffset::ZERO, &mut page);
        }
        let _ = store.diff(&info.name, &clones[0].name);
        let _ = store.merge(&info.name, &Job::new());
        let _ = store.reset(&info.name);
    }
    let before = clones.len();
    let fresh = CloneName::new("fresh").expect("a good name");
    if store.create_empty(&fresh, ByteSize::mib(1)).is_ok() {
        let disk = store.open_disk(&fresh).expect("it has just been made");
        offshoot::backing::Backing::write(&disk, ByteOffset::new(512), &[7; 512]).expect("there is room");
        let _ = store.flatten_open(&disk, &Job::new());
        drop(disk);
        assert!(store.list().expect("it could be listed").len() >= before);
    }
    if let Some(first) = clones.first() {
        let _ = store.delete(&first.name);
    }
    let _ = store.repair();
}

/// The database asserts what a damaged file contradicts, and the store makes errors of that: such a panic is caught, and must not count as one of ours.
fn forgive_the_database() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !panic.location().is_some_and(|place| place.file().contains("/redb-")) {
                hook(panic);
            }
        }));
    });
}

fuzz_target!(|input: &[u8]| {
    forgive_the_database();
    let (flags, rest) = input.split_first().map_or((0, input), |(flags, rest)| (*flags, rest));
    let folder = if flags & 1 == 0 { store_files::patched(rest) } else { store_files::with_rows(rest) };
    let (store, peak) = peak::during(|| open(&folder));
    assert!(peak < LIMIT, "{peak} bytes held");
    let Some(store) = store else { return };
    let ((), peak) = peak::during(|| use_it(&store));
    assert!(peak < LIMIT, "{peak} bytes held");
    drop(store);
    assert!(folder.content(CATALOGUE).is_some());
    if let Some(again) = open(&folder) {
        let _ = again.list();
        let _ = again.repair();
    }
});
