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
    check_next_data(source, content);
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

/// What an image says of its zeroes is so: from the start, and from within what it said.
fn check_next_data(source: &dyn Source, content: &[u8]) {
    const RULE: &str = "next data of an image";
    let len = content.len() as u64;
    let zeroes = |from: u64, to: u64| {
        if content[from as usize..to as usize].iter().any(|byte| *byte != 0) {
            broken(RULE, format_args!("there is data between {from:#x} and {to:#x}, and it says that there is none"));
        }
    };
    let next = |at: u64| -> u64 {
        match ok(RULE, source.next_data(ByteOffset::new(at))) {
            None => {
                zeroes(at.min(len), len);
                len
            }
            Some(found) => {
                let (start, end) = (found.start.get(), found.end.get());
                if start < at || start >= end || end > len {
                    broken(RULE, format_args!("{start:#x} to {end:#x} is no range of it at or after {at:#x}"));
                }
                zeroes(at, start);
                end
            }
        }
    };
    let mut at = 0;
    while at < len {
        at = next(at);
    }
    for at in [1, 511, 4095, 4097, len / 3, len / 2 + 1, len.saturating_sub(1), len, len + 1, u64::MAX - 8191] {
        next(at);
    }
}

fn check(source: &dyn Source, content: &[u8], at: u64, len: u64) {
    let mut found = vec![0xa5; len as usize];
    ok("read of an image", source.read(ByteOffset::new(at), &mut found));
    if found != content[at as usize..(at + len) as usize] {
        broken("read of an image", format_args!("the {len} bytes at {at:#x} are not what the image must hold"));
    }
}
