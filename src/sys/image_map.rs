//! Reading raw image files that somebody else may damage.
//!
//! Owns the choice between mapping and reading. A mapped file that shrinks kills the process with SIGBUS on the next
//! access, so a file is mapped only if it can neither change nor fail: a memory file sealed against both writing and
//! shrinking. Everything else is read by pread(2), where truncation and bad media are errors. (A file under fs-verity
//! cannot change either, but a mapped read of a damaged block is a SIGBUS too: it is read.) It must not know what is
//! in an image. Entirely safe code.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use crate::page::{ByteOffset, ByteSize};

/// What goes wrong with an image file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// It cannot be opened or its length asked for.
    #[error("cannot open the image: {0}")]
    Open(#[source] io::Error),
    /// It was shorter than it should be when it was opened.
    #[error("the image holds {found}, {declared} were declared: the file is cut short, or is not the one meant")]
    ShorterThanDeclared { declared: ByteSize, found: ByteSize },
    /// It was long enough when it was opened, and is not any more.
    #[error("the image shrank from {opened} to {found} while in use; restore it and open it again")]
    Shrunk { opened: ByteSize, found: ByteSize },
    /// A read past its end.
    #[error("{len} at offset {at} end past the end of an image of {image}")]
    OutOfRange { at: ByteOffset, len: ByteSize, image: ByteSize },
    /// The system could not read it: bad media, lost network storage.
    #[error("cannot read the image at offset {at}: {source}")]
    Unreadable { at: ByteOffset, source: io::Error },
}

/// An image file open for reading.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    map: Option<Mmap>,
    len: ByteSize,
}

impl ImageFile {
    /// Opens a regular file or a block device, read-only.
    ///
    /// # Errors
    /// [`ImageError::Open`].
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        Self::from_file(File::open(path).map_err(ImageError::Open)?)
    }

    /// The same for a file that is open for reading already. Its length is asked for here, once.
    ///
    /// # Errors
    /// [`ImageError::Open`].
    pub(crate) fn from_file(mut file: File) -> Result<Self, ImageError> {
        // A directory has a length too, and a terminal an end.
        if !holds_bytes(&file.metadata().map_err(ImageError::Open)?.file_type()) {
            let what = "an image must be a regular file or a block device";
            return Err(ImageError::Open(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        // The end by seeking: a block device's metadata says 0.
        let len = ByteSize::new(file.seek(SeekFrom::End(0)).map_err(ImageError::Open)?);
        let map = if never_faults(&file) && len != ByteSize::ZERO {
            // If the map fails for want of addresses or mappings, reading still works.
            MmapOptions::new().map_if_safe(&file).ok()
        } else {
            None
        };
        Ok(Self { file, map, len })
    }

    /// Refuses an image that is shorter than `declared`; a longer one is read up to that length.
    ///
    /// # Errors
    /// [`ImageError::ShorterThanDeclared`].
    pub(crate) fn declared(self, declared: ByteSize) -> Result<Self, ImageError> {
        if self.len < declared {
            return Err(ImageError::ShorterThanDeclared { declared, found: self.len });
        }
        Ok(Self { len: declared, ..self })
    }

    /// Its length.
    pub(crate) fn len(&self) -> ByteSize {
        self.len
    }

    /// Whether reads are plain copies out of memory (40 ns for 4 KiB) rather than pread(2) (0.7 µs).
    pub(crate) fn is_mapped(&self) -> bool {
        self.map.is_some()
    }

    /// Fills `buf` from byte `at`.
    ///
    /// # Errors
    /// [`ImageError::OutOfRange`], [`ImageError::Shrunk`], [`ImageError::Unreadable`]. `buf` may be filled in part.
    pub(crate) fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), ImageError> {
        let len = ByteSize::new(buf.len() as u64);
        let end = match at.checked_add(len) {
            Some(end) if end.get() <= self.len.get() => end.get(),
            _ => return Err(ImageError::OutOfRange { at, len, image: self.len }),
        };
        let in_map = |map: &'_ Mmap| Some((usize::try_from(at.get()).ok()?, usize::try_from(end).ok()?, map.len()));
        if let Some(map) = &self.map
            && let Some((from, to, held)) = in_map(map)
            && to <= held
        {
            buf.copy_from_slice(&map[from..to]);
            return Ok(());
        }
        let mut done = 0;
        while done < buf.len() {
            let at = ByteOffset::new(at.get() + done as u64);
            match read_once(&self.file, at, &mut buf[done..]) {
                Ok(0) => return Err(ImageError::Shrunk { opened: self.len, found: self.found(at) }),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ImageError::Unreadable { at, source }),
            }
        }
        Ok(())
    }

    /// How long it is now that a read ended at `at`.
    fn found(&self, at: ByteOffset) -> ByteSize {
        let now = self.file.metadata().map_or(0, |metadata| metadata.len());
        ByteSize::new(now.min(at.get()))
    }
}

#[cfg(unix)]
fn holds_bytes(kind: &std::fs::FileType) -> bool {
    kind.is_file() || std::os::unix::fs::FileTypeExt::is_block_device(kind)
}

#[cfg(not(unix))]
fn holds_bytes(kind: &std::fs::FileType) -> bool {
    kind.is_file()
}

/// Whether a mapped read can never fail: the file is memory, and sealed against change.
#[cfg(target_os = "linux")]
fn never_faults(file: &File) -> bool {
    use rustix::fs::SealFlags;
    // fcntl(2): only memory files have seals to ask for.
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::WRITE | SealFlags::SHRINK))
}

#[cfg(not(target_os = "linux"))]
fn never_faults(_: &File) -> bool {
    false
}

#[cfg(unix)]
fn read_once(file: &File, at: ByteOffset, buf: &mut [u8]) -> io::Result<usize> {
    use super::fault::{Call, check};
    check(Call::Pread)?;
    std::os::unix::fs::FileExt::read_at(file, buf, at.get())
}

#[cfg(windows)]
fn read_once(file: &File, at: ByteOffset, buf: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, at.get())
}

#[cfg(not(any(unix, windows)))]
fn read_once(_: &File, _: ByteOffset, _: &mut [u8]) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, SealFlags};
    use std::os::unix::fs::FileExt;

    /// A file without a name, of bytes that tell their offset.
    fn image(len: usize) -> File {
        let file = File::from(
            rustix::fs::memfd_create("offshoot-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap(),
        );
        file.write_all_at(&bytes(len), 0).unwrap();
        file
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7) as u8).collect()
    }

    fn read(image: &ImageFile, at: u64, len: usize) -> Result<Vec<u8>, ImageError> {
        let mut buf = vec![0xEE; len];
        image.read_at(ByteOffset::new(at), &mut buf).map(|()| buf)
    }

    #[test]
    fn what_is_no_image_is_refused_when_it_is_opened() {
        for path in ["/tmp", "/dev/null", "/dev/zero"] {
            assert!(matches!(ImageFile::open(Path::new(path)), Err(ImageError::Open(_))), "{path}");
        }
    }

    #[test]
    fn mapped_and_read_images_hold_the_same_bytes() {
        let (plain, sealed) = (image(10_001), image(10_001));
        rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        let (plain, sealed) = (ImageFile::from_file(plain).unwrap(), ImageFile::from_file(sealed).unwrap());
        assert_eq!((plain.is_mapped(), sealed.is_mapped()), (false, true));
        for image in [plain, sealed] {
            assert_eq!(image.len(), ByteSize::new(10_001));
            assert_eq!(read(&image, 0, 10_001).unwrap(), bytes(10_001));
            assert_eq!(read(&image, 9_999, 2).unwrap(), bytes(10_001)[9_999..]);
            assert!(read(&image, 10_001, 0).unwrap().is_empty());
            for (at, len) in [(10_001, 1), (0, 10_002), (u64::MAX, 2)] {
                assert!(matches!(read(&image, at, len), Err(ImageError::OutOfRange { .. })));
            }
        }
    }

    #[test]
    fn an_image_that_shrinks_is_an_error_and_no_signal() {
        let file = image(3 * 4096);
        let opened = ImageFile::from_file(file.try_clone().unwrap()).unwrap();
        file.set_len(5000).unwrap();
        assert_eq!(read(&opened, 0, 5000).unwrap(), bytes(5000));
        let shrunk = read(&opened, 4096, 4096).unwrap_err();
        let (opened_len, found) = (ByteSize::new(3 * 4096), ByteSize::new(5000));
        assert!(
            matches!(shrunk, ImageError::Shrunk { opened, found: now } if opened == opened_len && now == found),
            "{shrunk}"
        );
    }

    #[test]
    fn an_image_must_be_as_long_as_declared() {
        let short = ImageFile::from_file(image(4095)).unwrap().declared(ByteSize::kib(4));
        assert!(matches!(short, Err(ImageError::ShorterThanDeclared { .. })));
        let long = ImageFile::from_file(image(5000)).unwrap().declared(ByteSize::kib(4)).unwrap();
        assert_eq!(long.len(), ByteSize::kib(4));
        assert!(matches!(read(&long, 4096, 1), Err(ImageError::OutOfRange { .. })));
    }

    #[test]
    fn bad_media_and_missing_files_are_named() {
        assert!(matches!(ImageFile::open(Path::new("/nonexistent/image.raw")), Err(ImageError::Open(_))));
        let opened = ImageFile::from_file(image(4096)).unwrap();
        let guard = super::super::fault::plan::arm(1, rustix::io::Errno::IO);
        let failed = read(&opened, 16, 16).unwrap_err();
        drop(guard);
        assert!(matches!(failed, ImageError::Unreadable { at, .. } if at == ByteOffset::new(16)));
        assert_eq!(read(&opened, 16, 16).unwrap(), bytes(32)[16..]);
    }

    #[test]
    fn an_empty_image_reads_nothing() {
        let file = image(0);
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        let empty = ImageFile::from_file(file).unwrap();
        assert!(!empty.is_mapped());
        assert!(read(&empty, 0, 1).is_err());
    }
}
