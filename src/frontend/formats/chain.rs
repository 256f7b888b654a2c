//! Opening an image and all that it reads through to. Each layer is opened on its own, by this module, after the policy has agreed:
//! the library is handed open files and a gate that opens nothing it was not told to.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use imago::file::File as LibraryFile;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping, Storage, StorageOpenOptions};

use super::policy::ImportPolicy;
use super::vmdk_sparse::{SparseVmdk, is_sparse};
use super::{Format, FormatError, Rule, qcow2_header};
use crate::backing::FileImage;
use crate::image::Source;
use crate::page::ByteSize;

/// The library reads a descriptor whole.
const LONGEST_DESCRIPTOR: u64 = 2 << 20;

/// One file of a chain, with what belongs to it.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) len: ByteSize,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    Raw(FileImage),
    Sparse(SparseVmdk),
    /// Read through the library.
    Mapped {
        access: Box<FormatAccess<LibraryFile>>,
        /// The file that holds the data, where it is one.
        data: Option<DataFile>,
    },
}

/// A file that holds clusters as they are: read by us, and the library is asked only where they are.
#[derive(Debug)]
pub(super) struct DataFile {
    file: File,
    len: u64,
    cluster: u64,
}

impl DataFile {
    /// Fills `buf` from `at`. The file may end within its last cluster.
    pub(super) fn read(&self, path: &Path, at: u64, buf: &mut [u8]) -> Result<(), FormatError> {
        let end = at.saturating_add(buf.len() as u64);
        if end > self.len.next_multiple_of(self.cluster) {
            return Err(FormatError::refused(path, Rule::Truncated { at: end, file: ByteSize::new(self.len) }));
        }
        let held = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
        buf[held..].fill(0);
        self.file.read_exact_at(&mut buf[..held], at).map_err(|error| FormatError::io(path, error))
    }
}

/// Files that are open, to find cycles and to count.
struct Opener<'a> {
    policy: &'a ImportPolicy,
    /// Device and inode of each.
    seen: Vec<(u64, u64)>,
}

impl Opener<'_> {
    /// Opens a regular file for reading. A pipe or device is refused before it is opened: that alone may block or have an effect.
    fn open(&mut self, path: &Path) -> Result<File, FormatError> {
        let io = |error| FormatError::io(path, error);
        let refused = |rule| FormatError::refused(path, rule);
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(refused(Rule::NotAFile));
        }
        // Not blocking, should the file have become a pipe meanwhile.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?;
        if !found.is_file() {
            return Err(refused(Rule::NotAFile));
        }
        let id = (found.dev(), found.ino());
        if self.seen.contains(&id) {
            return Err(refused(Rule::Cycle));
        }
        if self.seen.len() >= self.policy.files as usize {
            return Err(refused(Rule::TooManyFiles { limit: self.policy.files }));
        }
        self.seen.push(id);
        Ok(file)
    }
}

/// Opens `path` and its backing files: the image first, the lowest layer last.
pub(super) fn open(path: &Path, format: Format, policy: &ImportPolicy) -> Result<Vec<Layer>, FormatError> {
    let mut opener = Opener { policy, seen: Vec::new() };
    let mut layers = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next {
        let file = opener.open(&path)?;
        let (layer, below) = match format {
            Format::Raw => (raw(&path, file, policy)?, None),
            Format::Qcow2 => qcow2(&path, file, &mut opener)?,
            Format::Vmdk => (vmdk(&path, file, &mut opener)?, None),
        };
        layers.push(layer);
        next = below;
    }
    Ok(layers)
}

fn raw(path: &Path, file: File, policy: &ImportPolicy) -> Result<Layer, FormatError> {
    let image = FileImage::from_file(file, None).map_err(crate::error::SpaceError::from)?;
    let len = image.len();
    if len == ByteSize::ZERO {
        return Err(FormatError::refused(path, Rule::Empty));
    }
    policy.check_size(path, len)?;
    Ok(Layer { path: path.to_owned(), len, content: Content::Raw(image) })
}

type Below = Option<(PathBuf, Format)>;

fn qcow2(path: &Path, file: File, opener: &mut Opener<'_>) -> Result<(Layer, Below), FormatError> {
    let header = qcow2_header::read(path, &file, opener.policy)?;
    let library = |file: File| LibraryFile::try_from(file).map_err(|error| FormatError::io(path, error));
    let data = match &header.data_file {
        Some(name) => Some(opener.open(&opener.policy.resolve(path, name)?)?),
        None => None,
    };
    let holds_data = data.as_ref().unwrap_or(&file);
    let io = |error| FormatError::io(path, error);
    let (len, own) = (holds_data.metadata().map_err(io)?.len(), holds_data.try_clone().map_err(io)?);
    let data = data.map(library).transpose()?;
    let file = library(file)?;
    let access = guarded(path, || {
        let image = Qcow2::<LibraryFile>::builder(file).backing(None).data_file(data);
        image.open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
    })?
    .map_err(|error| library_error(path, error))?;
    if access.size() != header.size.get() {
        return Err(FormatError::refused(path, Rule::Malformed("its header changed while it was opened".into())));
    }
    let below = match header.backing {
        None => None,
        Some((name, format)) => {
            let at = opener.policy.resolve(path, &name)?;
            let format = format.unwrap_or_default();
            let Some(known) = Format::from_name(&format) else {
                return Err(FormatError::refused(path, Rule::BackingFormat { name, format }));
            };
            Some((at, known))
        }
    };
    let data = Some(DataFile { file: own, len, cluster: header.cluster });
    let content = Content::Mapped { access: Box::new(access), data };
    Ok((Layer { path: path.to_owned(), len: header.size, content }, below))
}

fn vmdk(path: &Path, file: File, opener: &mut Opener<'_>) -> Result<Layer, FormatError> {
    let io = |error| FormatError::io(path, error);
    if is_sparse(path, &file)? {
        let image = SparseVmdk::open(path, file, opener.policy)?;
        return Ok(Layer { path: path.to_owned(), len: image.len(), content: Content::Sparse(image) });
    }
    let len = file.metadata().map_err(io)?.len();
    if !(4..=LONGEST_DESCRIPTOR).contains(&len) {
        return Err(FormatError::refused(path, Rule::NotThisFormat(Format::Vmdk)));
    }
    // With its name, so that the library can tell where the extents are.
    let file = LibraryFile::from_open_file(file, StorageOpenOptions::new().filename(path)).map_err(io)?;
    let policy = opener.policy;
    let refusal = Arc::new(Mutex::new(None));
    let gate = ExtentGate { opener, descriptor: path, refusal: &refusal };
    let opened = guarded(path, || Vmdk::<LibraryFile>::builder(file).open(gate).map(FormatAccess::new))?;
    let access = opened.map_err(|error| {
        refusal.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_else(|| library_error(path, error))
    })?;
    let size = ByteSize::new(access.size());
    if size == ByteSize::ZERO {
        return Err(FormatError::refused(path, Rule::Empty));
    }
    policy.check_size(path, size)?;
    guarded(path, || extents_are_whole(path, &access))??;
    let content = Content::Mapped { access: Box::new(access), data: None };
    Ok(Layer { path: path.to_owned(), len: size, content })
}

/// The library reads what an extent's file does not hold as zeroes. That is a file cut off, and no content.
fn extents_are_whole(path: &Path, access: &FormatAccess<LibraryFile>) -> Result<(), FormatError> {
    let io = |error| library_error(path, error);
    let mut at = 0;
    while at < access.size() {
        let (mapping, len) = access.get_shallow_mapping(at, access.size() - at).map_err(io)?;
        if let ShallowMapping::Raw { storage, offset, .. } = mapping {
            let file = storage.size().map_err(io)?;
            let end = offset.saturating_add(len);
            if end > file {
                return Err(FormatError::refused(path, Rule::Truncated { at: end, file: ByteSize::new(file) }));
            }
        }
        if len == 0 {
            return Err(FormatError::refused(path, Rule::Malformed("its extents end before its size".into())));
        }
        at += len;
    }
    Ok(())
}

/// Opens the extents that a descriptor names, if the policy agrees.
struct ExtentGate<'a, 'p> {
    opener: &'a mut Opener<'p>,
    descriptor: &'a Path,
    /// The library turns errors into text: the typed one is kept here.
    refusal: &'a Mutex<Option<FormatError>>,
}

impl ImplicitOpenGate<LibraryFile> for ExtentGate<'_, '_> {
    fn open_format<F: FormatDriverBuilder<LibraryFile>>(&mut self, _: F) -> std::io::Result<FormatAccess<LibraryFile>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> std::io::Result<LibraryFile> {
        // The library has put the descriptor's directory before a relative name.
        let directory = self.descriptor.parent().unwrap_or(Path::new(""));
        let full = options.get_filename().unwrap_or(Path::new(""));
        let name = full.strip_prefix(directory).unwrap_or(full).to_string_lossy();
        let opened = self.opener.policy.resolve(self.descriptor, &name).and_then(|path| self.opener.open(&path));
        match opened {
            Ok(file) => LibraryFile::try_from(file),
            Err(error) => {
                let text = std::io::Error::other(error.to_string());
                *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Err(text)
            }
        }
    }
}

/// Calls the library. A panic in it becomes an error: see the front page of this module's directory for why it may.
pub(super) fn guarded<T>(path: &Path, call: impl FnOnce() -> T) -> Result<T, FormatError> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let what = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        FormatError::Fault { path: path.to_owned(), what }
    })
}

/// What the library does not take is wrong with the file; what the system says is passed on.
pub(super) fn library_error(path: &Path, error: std::io::Error) -> FormatError {
    if error.raw_os_error().is_some() {
        return FormatError::io(path, error);
    }
    FormatError::refused(path, Rule::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_library_is_an_error_that_says_what() {
        let path = Path::new("image");
        let short = guarded(path, || -> () { panic!("why") });
        assert!(matches!(short, Err(FormatError::Fault { what, .. }) if what == "why"));
        let made = guarded(path, || -> () { panic!("{}", 7) });
        assert!(matches!(made, Err(FormatError::Fault { what, .. }) if what == "7"));
        assert_eq!(guarded(path, || 3).expect("no panic"), 3);
    }
}
