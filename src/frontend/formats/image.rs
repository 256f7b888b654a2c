//! An image that was opened, as a base to read from: layers from the top down, and what each says of a range.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::{ShallowMapping, StorageExt};

use super::chain::{self, Content, Layer, guarded, library_error};
use super::{Format, FormatError, ImportPolicy, Rule};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, GeometryError};

/// A disk image of another tool, open for reading: a [`Source`] that disks lie over or are filled from.
///
/// Nobody may write to its files while it is open. Reads of compressed clusters decompress a whole cluster each. Memory: the
/// L1 table and at most 128 L2 tables of each qcow2 file in the chain.
#[derive(Debug)]
pub struct ImportedImage {
    /// The image itself, then what it reads through to.
    layers: Vec<Layer>,
    /// The library panicked once: what it holds of this image is not trusted any more.
    broken: AtomicBool,
}

/// What a layer says of the bytes from an offset on.
enum Found {
    /// They are in this layer, and were read.
    Data,
    Zero,
    /// Ask the layer below.
    Below,
}

impl ImportedImage {
    /// Opens an image that has this format, and every file that it reads through to.
    ///
    /// # Errors
    /// [`FormatError::Refused`] with the rule; [`FormatError::Io`]; [`FormatError::Fault`].
    pub fn open(path: impl AsRef<Path>, format: Format, policy: &ImportPolicy) -> Result<Self, FormatError> {
        Ok(Self { layers: chain::open(path.as_ref(), format, policy)?, broken: AtomicBool::new(false) })
    }

    /// The files of the chain, the image first. Data files and extents are not listed.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.layers.iter().map(|layer| layer.path.as_path())
    }

    /// How many bytes from `at` on are known to be zero without reading them. None are known of a raw file: its holes are read,
    /// because what a file system says of holes is not always true.
    pub(super) fn zeroes_from(&self, at: ByteOffset) -> Result<ByteSize, FormatError> {
        let mut left = self.len().get().saturating_sub(at.get());
        for layer in &self.layers {
            let Some(inside) = layer.len.get().checked_sub(at.get()).filter(|inside| *inside > 0) else {
                return Ok(ByteSize::new(left));
            };
            left = left.min(inside);
            let Content::Mapped { access, .. } = &layer.content else { return Ok(ByteSize::ZERO) };
            let (mapping, len) = self.library(layer, || access.get_shallow_mapping(at.get(), left))?;
            left = left.min(len);
            match mapping {
                ShallowMapping::Zero { explicit: false, .. } => {}
                ShallowMapping::Zero { .. } => return Ok(ByteSize::new(left)),
                _ => return Ok(ByteSize::ZERO),
            }
        }
        Ok(ByteSize::new(left))
    }

    fn library<T>(&self, layer: &Layer, call: impl FnOnce() -> std::io::Result<T>) -> Result<T, FormatError> {
        // Relaxed: it only ever turns on, and a read that races with the panic is one that came before it.
        if self.broken.load(Ordering::Relaxed) {
            let what = "it failed at an earlier read".to_owned();
            return Err(FormatError::Fault { path: layer.path.clone(), what });
        }
        let result = guarded(&layer.path, call);
        if result.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        result?.map_err(|error| library_error(&layer.path, error))
    }

    /// Fills the front of `buf` from one layer; says how much, and whether that is final.
    fn read_layer(&self, layer: &Layer, at: u64, buf: &mut [u8]) -> Result<(Found, usize), FormatError> {
        let (access, data_end) = match &layer.content {
            Content::Raw(image) => {
                image.read(ByteOffset::new(at), buf)?;
                return Ok((Found::Data, buf.len()));
            }
            Content::Mapped { access, data_end } => (access, data_end),
        };
        let (mapping, len) = self.library(layer, || access.get_shallow_mapping(at, buf.len() as u64))?;
        let len = buf.len().min(len as usize);
        if len == 0 {
            return Err(FormatError::refused(&layer.path, Rule::Malformed("its tables end before its size".into())));
        }
        let found = match mapping {
            ShallowMapping::Zero { explicit: true, .. } => Found::Zero,
            ShallowMapping::Zero { .. } => Found::Below,
            ShallowMapping::Raw { storage, offset, .. } => {
                let end = offset.saturating_add(len as u64);
                if let Some(file) = data_end.filter(|file| end > *file) {
                    let rule = Rule::Truncated { at: end, file: ByteSize::new(file) };
                    return Err(FormatError::refused(&layer.path, rule));
                }
                self.library(layer, || storage.read(&mut buf[..len], offset))?;
                Found::Data
            }
            _ => {
                self.library(layer, || access.read(&mut buf[..len], at))?;
                Found::Data
            }
        };
        Ok((found, len))
    }

    fn read_from(&self, layers: &[Layer], mut at: u64, mut buf: &mut [u8]) -> Result<(), FormatError> {
        let Some((layer, below)) = layers.split_first() else {
            buf.fill(0);
            return Ok(());
        };
        // A layer that is shorter than the one above it reads as zeroes after its end, whatever lies below it.
        let inside = layer.len.get().saturating_sub(at).min(buf.len() as u64) as usize;
        let (front, rest) = buf.split_at_mut(inside);
        rest.fill(0);
        buf = front;
        while !buf.is_empty() {
            let (found, len) = self.read_layer(layer, at, buf)?;
            let (done, rest) = std::mem::take(&mut buf).split_at_mut(len);
            match found {
                Found::Data => {}
                Found::Zero => done.fill(0),
                Found::Below => self.read_from(below, at, done)?,
            }
            at += len as u64;
            buf = rest;
        }
        Ok(())
    }
}

impl Source for ImportedImage {
    fn len(&self) -> ByteSize {
        self.layers.first().map_or(ByteSize::ZERO, |layer| layer.len)
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        let len = ByteSize::new(buf.len() as u64);
        if at.checked_add(len).is_none_or(|end| end.get() > self.len().get()) {
            return Err(GeometryError::OutOfRange { at, len, space: self.len() }.into());
        }
        self.read_from(&self.layers, at.get(), buf).map_err(FormatError::into_space_error)
    }
}
