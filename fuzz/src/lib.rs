//! What the fuzz targets share: deterministic bytes, a base image, and the naive models.
//!
//! Nothing here knows how the engine works; a model is a `Vec<u8>` and the sentence in the engine's documentation.

pub mod disk_model;
pub mod held;
pub mod patched;
pub mod peak;
pub mod store_files;

use std::sync::Arc;

use offshoot::SpaceError;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, GeometryError};

/// Bytes that differ from one `seed` to the next and from one position to the next; an eighth of the seeds give zeroes, so that
/// "data that is all zero" is seen too.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    if seed.is_multiple_of(8) {
        return vec![0; len];
    }
    (0..len).map(|at| seed.wrapping_mul(31).wrapping_add((at % 251) as u8)).collect()
}

/// A base image: `bytes` from `start`, zeroes before, nothing after. Refuses to be read past its end, as a file does.
pub struct Base {
    pub start: u64,
    pub bytes: Vec<u8>,
}

impl Base {
    pub fn shared(start: u64, bytes: Vec<u8>) -> Arc<dyn Source> {
        Arc::new(Self { start, bytes })
    }
}

impl Source for Base {
    fn len(&self) -> ByteSize {
        ByteSize::new(self.start + self.bytes.len() as u64)
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let len = ByteSize::new(buf.len() as u64);
        if at.get() + len.get() > self.len().get() {
            return Err(GeometryError::OutOfRange { at, len, space: self.len() }.into());
        }
        for (here, byte) in (at.get()..).zip(buf) {
            *byte = here.checked_sub(self.start).map_or(0, |into| self.bytes[into as usize]);
        }
        Ok(())
    }
}
