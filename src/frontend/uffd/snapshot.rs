//! A fork point as the files that a VMM restores from: RAM as one file, and the state beside it.
//!
//! Knows where RAM lies in a file; must not know what the state means: it is the VMM's own, and whoever embeds this has it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use super::map::PAGE;
use crate::ForkPoint;
use crate::backing::{Mapped, MappedImage, Sealed};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, is_zero};

/// What the file of RAM is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryFile {
    /// The fork point's own sealed file, by a link to a descriptor of this process. Nothing is copied, and who maps it shares its pages with the
    /// parent and all clones. It is gone when the [`SnapshotDir`] is. Refused where RAM lies on several layers.
    Sealed,
    /// The same, and where RAM lies on several layers a copy in memory of what is not zeroes, made once.
    Flattened,
    /// A file in the directory, with holes for zeroes. A copy of what is not zeroes; it outlives this process.
    Copied,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// RAM lies on several layers, or was never cut.
    #[error(
        "RAM lies on several layers, and no file shows it: ask for a flattened or a copied one, or serve page faults"
    )]
    Layered,
    /// RAM could not be read, or be copied.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// A file could not be made.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// A directory that a VMM restores from.
///
/// Firecracker maps the file of RAM privately, so the fork point is not changed by it. It holds RAM's regions one after the other, as
/// [`RamLayout`](crate::ram::RamLayout) does and as Firecracker writes it.
#[derive(Debug)]
pub struct SnapshotDir {
    path: PathBuf,
    /// What the link leads to.
    linked: Option<OwnedFd>,
}

impl SnapshotDir {
    const STATE: &str = "vmstate";
    const MEMORY: &str = "memory";

    /// Writes a fork point's RAM and `state` to a new directory. A copy is durable when this returns; of what fails nothing is left.
    ///
    /// Cost: a link and a small file for [`MemoryFile::Sealed`]; otherwise a copy of what is not zeroes.
    ///
    /// # Errors
    /// [`SnapshotError`]; among them `AlreadyExists` where there is anything at `path`.
    pub fn create(
        path: &Path,
        point: &ForkPoint<Mapped>,
        state: &[u8],
        memory: MemoryFile,
    ) -> Result<Self, SnapshotError> {
        fs::create_dir(path).map_err(at(path))?;
        let made = Self::fill(path, point.ram(), state, memory);
        if made.is_err()
            && let Err(error) = fs::remove_dir_all(path)
        {
            tracing::warn!(path = %path.display(), %error, "part of a snapshot is left behind");
        }
        Ok(Self { path: path.to_owned(), linked: made? })
    }

    fn fill(
        path: &Path,
        ram: &MappedImage,
        state: &[u8],
        memory: MemoryFile,
    ) -> Result<Option<OwnedFd>, SnapshotError> {
        let file = path.join(Self::MEMORY);
        let sealed = match memory {
            MemoryFile::Sealed => Some(ram.whole_file()?.ok_or(SnapshotError::Layered)?),
            MemoryFile::Flattened => match ram.whole_file()? {
                None => Some(ram.flatten()?.whole_file()?.ok_or(SnapshotError::Layered)?),
                whole => whole,
            },
            MemoryFile::Copied => None,
        };
        if let Some(fd) = &sealed {
            let target = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            symlink(target, &file).map_err(at(&file))?;
            // Not made durable: it is worth nothing without what the link leads to.
            let file = path.join(Self::STATE);
            write_new(&file, |file| file.write_all_at(state, 0)).map_err(at(&file))?;
            return Ok(sealed);
        }
        let mut failed = None;
        let written = write_new(&file, |file| {
            let copied = copy(ram, file).map_err(|error| match error {
                CopyError::Io(error) => error,
                CopyError::Space(error) => {
                    failed = Some(error);
                    io::ErrorKind::Other.into()
                }
            });
            copied.and_then(|()| file.sync_all())
        });
        match failed {
            Some(error) => return Err(error.into()),
            None => written.map_err(at(&file))?,
        }
        let file = path.join(Self::STATE);
        write_new(&file, |file| file.write_all_at(state, 0).and_then(|()| file.sync_all())).map_err(at(&file))?;
        File::open(path).and_then(|dir| dir.sync_all()).map_err(at(path))?;
        Ok(None)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// RAM: what Firecracker calls `mem_file_path`, or the `backend_path` of a backend of type `File`.
    pub fn memory(&self) -> PathBuf {
        self.path.join(Self::MEMORY)
    }

    /// The state that was handed in: what Firecracker calls `snapshot_path`.
    pub fn state(&self) -> PathBuf {
        self.path.join(Self::STATE)
    }
}

/// A link that leads nowhere any more is taken away; files stay.
impl Drop for SnapshotDir {
    fn drop(&mut self) {
        if self.linked.is_some()
            && let Err(error) = fs::remove_file(self.memory())
        {
            tracing::warn!(path = %self.path.display(), %error, "the link of a snapshot is left behind");
        }
    }
}

enum CopyError {
    Io(io::Error),
    Space(SpaceError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |error| SnapshotError::Io { path, error }
}

/// A new file for this user alone.
fn write_new(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    write(&File::options().write(true).create_new(true).mode(0o600).open(path)?)
}

/// Copies what is not zeroes, a batch at a time.
fn copy(ram: &MappedImage, file: &File) -> Result<(), CopyError> {
    const BATCH: u64 = 256 << 10;
    let len = Source::len(ram).get();
    file.set_len(len).map_err(CopyError::Io)?;
    let mut batch = vec![0; BATCH as usize];
    for start in (0..len).step_by(BATCH as usize) {
        let batch = &mut batch[..BATCH.min(len - start) as usize];
        Source::read(ram, ByteOffset::new(start), batch).map_err(CopyError::Space)?;
        for (page, bytes) in (0..).zip(batch.chunks(PAGE.bytes().get() as usize)) {
            if !is_zero(bytes) {
                file.write_all_at(bytes, start + page * PAGE.bytes().get()).map_err(CopyError::Io)?;
            }
        }
    }
    Ok(())
}
