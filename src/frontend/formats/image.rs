//! An image that was opened, as a base to read from: layers from the top down, and what each says of a range.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::file::File as LibraryFile;
use imago::{FormatAccess, ShallowMapping, StorageExt};

use super::chain::{self, Content, DataFile, Layer, guarded, library_error};
use super::import::PIECE;
use super::vmdk_sparse::SparseVmdk;
use super::{Format, FormatError, ImportPolicy, Rule};
use crate::backing::FileImage;
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
    /// [`ImportPolicy::data`].
    data: ByteSize,
    /// The library panicked once: what it holds of this image is not trusted any more.
    broken: AtomicBool,
}

/// What a layer says of the bytes from an offset on.
enum Found<'l> {
    Raw(&'l FileImage),
    /// In a sparse VMDK, at this place in its file.
    Sparse(&'l SparseVmdk, u64),
    /// In the file that holds the layer's data, at this place.
    Held(&'l DataFile, u64),
    /// In a file that the library has open, at this place.
    Stored(&'l LibraryFile, u64),
    /// To be unpacked by the library.
    Library(&'l FormatAccess<LibraryFile>),
    Zero,
    /// Ask the layer below.
    Below,
}

/// Whether a layer had the bytes, or those below must be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Final {
    Yes,
    No,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Zero,
    Anything,
}

impl ImportedImage {
    /// Opens an image that has this format, and every file that it reads through to.
    ///
    /// # Errors
    /// [`FormatError::Refused`] with the rule; [`FormatError::Io`]; [`FormatError::Fault`].
    pub fn open(path: impl AsRef<Path>, format: Format, policy: &ImportPolicy) -> Result<Self, FormatError> {
        let layers = chain::open(path.as_ref(), format, policy)?;
        Ok(Self { layers, data: policy.data, broken: AtomicBool::new(false) })
    }

    /// The files of the chain, the image first. Data files and extents are not listed.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.layers.iter().map(|layer| layer.path.as_path())
    }

    /// How much data a copy may find in it.
    pub(super) fn limit(&self) -> Option<(&Path, ByteSize)> {
        self.layers.first().map(|top| (top.path.as_path(), self.data))
    }

    /// Whether the bytes from `at` on are known to be zero without reading them, and for how many of the next `most` that is so, or not. Nothing
    /// is known of a raw file: its holes are read, because what a file system says of holes is not always true.
    fn known(&self, at: u64, most: u64) -> Result<(Known, u64), FormatError> {
        let mut left = most;
        for layer in &self.layers {
            let Some(inside) = layer.len.get().checked_sub(at).filter(|inside| *inside > 0) else {
                return Ok((Known::Zero, left));
            };
            left = left.min(inside);
            let (found, len) = self.find(layer, at, left)?;
            left = left.min(len);
            match found {
                Found::Below => {}
                Found::Zero => return Ok((Known::Zero, left)),
                _ => return Ok((Known::Anything, left)),
            }
        }
        Ok((Known::Zero, left))
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

    /// What a layer says of the bytes from `at` on, which are inside it, and for how many of the next `most` it is so. Never for none.
    fn find<'l>(&self, layer: &'l Layer, at: u64, most: u64) -> Result<(Found<'l>, u64), FormatError> {
        let (access, data) = match &layer.content {
            Content::Raw(image) => return Ok((Found::Raw(image), most)),
            Content::Sparse(image) => {
                let (from, len) = image.find(&layer.path, at, most)?;
                return Ok((from.map_or(Found::Below, |from| Found::Sparse(image, from)), len));
            }
            Content::Mapped { access, data } => (access, data),
        };
        let (mapping, len) = self.library(layer, || access.get_shallow_mapping(at, most))?;
        let len = len.min(most);
        if len == 0 {
            return Err(FormatError::refused(&layer.path, Rule::Malformed("its tables end before its size".into())));
        }
        let found = match mapping {
            ShallowMapping::Zero { explicit: true, .. } => Found::Zero,
            ShallowMapping::Zero { .. } => Found::Below,
            ShallowMapping::Raw { storage, offset, .. } => match data {
                Some(file) => Found::Held(file, offset),
                None => Found::Stored(storage, offset),
            },
            _ => Found::Library(access),
        };
        Ok((found, len))
    }

    /// Fills the front of `buf` from one layer; says how much, and whether that is final.
    fn read_layer(&self, layer: &Layer, at: u64, buf: &mut [u8]) -> Result<(Final, usize), FormatError> {
        let (found, len) = self.find(layer, at, buf.len() as u64)?;
        let part = &mut buf[..len as usize];
        match found {
            Found::Below => return Ok((Final::No, part.len())),
            Found::Zero => part.fill(0),
            Found::Raw(image) => image.read(ByteOffset::new(at), part)?,
            Found::Sparse(image, from) => image.read(&layer.path, from, part)?,
            Found::Held(file, offset) => file.read(&layer.path, offset, part)?,
            Found::Stored(storage, offset) => self.library(layer, || storage.read(&mut *part, offset))?,
            Found::Library(access) => self.library(layer, || access.read(&mut *part, at))?,
        }
        Ok((Final::Yes, part.len()))
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
            if found == Final::No {
                self.read_from(below, at, done)?;
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
    /// As the tables say. Ends at the latest where the next 2 MiB begin, so that compressed clusters are read together.
    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        let (len, mut at) = (self.len().get(), at.get());
        let known = |at: u64, most: u64| self.known(at, most).map_err(FormatError::into_space_error);
        while at < len {
            let (is, here) = known(at, len - at)?;
            if is == Known::Zero {
                at += here;
                continue;
            }
            let mut end = at + here;
            let piece = (at / PIECE * PIECE).saturating_add(PIECE).min(len);
            while end < piece {
                match known(end, piece - end)? {
                    (Known::Zero, _) => break,
                    (Known::Anything, more) => end += more,
                }
            }
            return Ok(Some(ByteOffset::new(at)..ByteOffset::new(end)));
        }
        Ok(None)
    }
}
