//! The file backing: a raw image as the read-only base of disks and RAM.
//!
//! Owns opening and the promise of a fixed length. Whether reads go through a mapping or through pread(2) is decided below, by what the
//! kernel can guarantee: an image that shrinks while it is open gives an error, never a signal. Must not know what is in an image.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::error::{ImageError, SpaceError};
use crate::image::Source;
use crate::page::{ByteOffset, ByteSize, GeometryError};
use crate::sys::image_map::{ImageError as ReadError, ImageFile};

/// A raw image file, opened read-only and shared by all that lie over it.
///
/// Nobody may write to the file while it is open: clones would see that. A file that shrinks is found out at the next read.
/// A memory file sealed against writing and shrinking is mapped, and read at the speed of memory; any other is read by
/// calls, because reading a mapping of a file that shrinks kills the process (mmap(2), SIGBUS).
///
/// ```
/// # use std::io::Write;
/// use offshoot::{Tree, backing::FileImage, disk::{Access, Disk}, page::{ByteSize, Lba}};
/// use std::sync::Arc;
/// # let path = std::env::temp_dir().join(format!("offshoot-doc-{}", std::process::id()));
/// std::fs::write(&path, vec![7; 1 << 20])?;
/// let image = Arc::new(FileImage::open(&path, None)?);
/// let disk = Disk::over_image(&Tree::default(), image, Access::ReadWrite)?;
/// let mut sector = [0; 512];
/// disk.read(Lba::new(3), &mut sector)?;
/// assert_eq!(sector, [7; 512]);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FileImage(ImageFile);

impl FileImage {
    /// Opens an image. With `declared`, it must hold at least that much, and exactly that much is used.
    ///
    /// # Errors
    /// [`ImageError::Io`], [`ImageError::TooShort`].
    pub fn open(path: impl AsRef<Path>, declared: Option<ByteSize>) -> Result<Self, ImageError> {
        Self::limited(ImageFile::open(path.as_ref()).map_err(image_error)?, declared)
    }

    /// The same for a file that is open for reading already.
    ///
    /// # Errors
    /// As [`FileImage::open`].
    pub fn from_file(file: File, declared: Option<ByteSize>) -> Result<Self, ImageError> {
        Self::limited(ImageFile::from_file(file).map_err(image_error)?, declared)
    }

    fn limited(file: ImageFile, declared: Option<ByteSize>) -> Result<Self, ImageError> {
        match declared {
            Some(declared) => Ok(Self(file.declared(declared).map_err(image_error)?)),
            None => Ok(Self(file)),
        }
    }

    /// Whether reads are copies out of a mapping rather than calls.
    pub fn is_mapped(&self) -> bool {
        self.0.is_mapped()
    }
}

fn image_error(error: ReadError) -> ImageError {
    match error {
        ReadError::Open(error) | ReadError::Unreadable { source: error, .. } => ImageError::Io(Arc::new(error)),
        ReadError::ShorterThanDeclared { declared, found } => ImageError::TooShort { declared, found },
        ReadError::Shrunk { opened, found } => ImageError::Shrank { opened, now: found },
        ReadError::OutOfRange { at, len, image } => {
            ImageError::TooShort { declared: ByteSize::new(at.get().saturating_add(len.get())), found: image }
        }
    }
}

impl Source for FileImage {
    fn len(&self) -> ByteSize {
        self.0.len()
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        self.0.read_at(at, buf).map_err(|error| match error {
            ReadError::OutOfRange { at, len, image } => GeometryError::OutOfRange { at, len, space: image }.into(),
            other => image_error(other).into(),
        })
    }
}
