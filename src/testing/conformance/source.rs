//! The rules for base images.

use crate::image::Source;
use crate::page::{ByteOffset, ByteSize};
use crate::testing::pair::{broken, check_geometry_error, ok};

/// Checks a base image against the bytes that it must hold: its length, reads at every alignment, ends, and many threads at once.
///
/// # Panics
/// At the first rule that is broken.
pub fn source(source: &dyn Source, content: &[u8]) {
    let len = content.len() as u64;
    if source.len() != ByteSize::new(len) || source.is_empty() != content.is_empty() {
        broken("length of an image", format_args!("{} found, {len} bytes expected", source.len()));
    }
    check(source, content, 0, len);
    for boundary in [0, 512, 4096, len / 2, len] {
        for at in boundary.saturating_sub(9)..(boundary + 9).min(len) {
            for take in [0, 1, 3, 8, 17, 4096, 4099] {
                check(source, content, at, take.min(len - at));
            }
        }
    }
    ok("read of nothing at an image's end", source.read(ByteOffset::new(len), &mut []));
    for (at, take) in [(len, 1), (len.saturating_sub(1), 2), (0, len + 1), (u64::MAX, 1), (u64::MAX - 3, 9)] {
        if at < len || take > 0 {
            check_geometry_error(
                "read past an image's end",
                source.read(ByteOffset::new(at), &mut vec![0; take as usize]),
            );
        }
    }
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for round in 0..16 {
                    let at = (len / 16 * round + thread).min(len);
                    check(source, content, at, (len - at).min(5000));
                }
            });
        }
    });
}

fn check(source: &dyn Source, content: &[u8], at: u64, len: u64) {
    let mut found = vec![0xa5; len as usize];
    ok("read of an image", source.read(ByteOffset::new(at), &mut found));
    if found != content[at as usize..(at + len) as usize] {
        broken("read of an image", format_args!("the {len} bytes at {at:#x} are not what the image must hold"));
    }
}
