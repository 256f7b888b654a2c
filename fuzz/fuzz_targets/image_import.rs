//! Images of other tools: any bytes under any name.
//!
//! Oracle: what opens can be read in pieces of any size with the same result as whole, or fails with an error; what the tables say is zero
//! reads as zero; a copy holds what was read. Nothing panics outside the library that reads the formats, whose panics are errors at our border.
#![no_main]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use offshoot::frontend::formats::{ExportFormat, Format, FormatError, ImportPolicy, ImportedImage};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize};

/// What is read of an image at most: a small file may stand for much.
const MOST: u64 = 4 << 20;

fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("offshoot-fuzz-import-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a temporary directory");
        std::fs::write(directory.join("base"), [5; 3000]).expect("room");
        // The fuzzer ends at any panic. One within the library is what the border is there to catch.
        std::panic::set_hook(Box::new(|info| {
            if !info.location().is_some_and(|location| location.file().contains("imago-")) {
                eprintln!("{info}");
                std::process::abort();
            }
        }));
        directory
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    let format = [Format::Qcow2, Format::Vmdk, Format::Raw][(kind % 3) as usize];
    let image = directory().join("image");
    std::fs::write(&image, bytes).expect("room");
    let mut policy = ImportPolicy { virtual_size: ByteSize::gib(1), ..ImportPolicy::default() };
    if kind & 4 != 0 {
        policy = ImportPolicy { references: ImportPolicy::under(directory()).references, ..policy };
    }
    let Ok(image) = ImportedImage::open(&image, format, &policy) else { return };
    let len = image.len().get();
    assert!(len > 0 && len <= policy.virtual_size.get());

    let most = len.min(MOST) as usize;
    let mut whole = vec![1; most];
    let all = image.read(ByteOffset::ZERO, &mut whole);
    let mut step = vec![0; 1 + usize::from(*kind) * 97];
    for at in (0..most.min(1 << 16)).step_by(step.len()) {
        let count = step.len().min(most - at);
        let read = image.read(ByteOffset::new(at as u64), &mut step[..count]);
        if all.is_ok() {
            read.expect("the whole could be read");
            assert_eq!(step[..count], whole[at..at + count]);
        }
    }
    assert!(image.read(ByteOffset::new(len), &mut [0; 1]).is_err(), "past the end");
    let copy = directory().join("copy");
    let copied = image.convert(&copy, &ExportFormat::Raw, &mut |progress| {
        if progress.done.get() > MOST { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    match copied {
        Ok(()) if all.is_ok() => assert_eq!(std::fs::read(&copy).expect("written")[..most], whole),
        Ok(()) => assert!(len > MOST, "a copy of what cannot be read"),
        Err(FormatError::Cancelled) => assert!(len > MOST),
        Err(_) => {}
    }
});
