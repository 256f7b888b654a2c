//! What can be wrong with an import or export. A refusal names its rule; `docs/formats/import-export.md` lists them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Format;
use crate::disk::DiskError;
use crate::error::{ImageError, SpaceError};
use crate::page::ByteSize;

/// Why an image was not imported or exported.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file breaks a rule.
    #[error("{}: refused: {rule}", .path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What it broke.
        rule: Rule,
    },
    /// The system refused.
    #[error("{}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said: no space, no such file, no permission.
        error: Arc<io::Error>,
    },
    /// The library that reads the format panicked: a bug of its, met by a broken or hostile image.
    #[error("{}: the format library failed on this image ({what}): do not use it, or repair it with qemu-img check", .path.display())]
    Fault {
        /// The file.
        path: PathBuf,
        /// The panic's message.
        what: String,
    },
    /// The watch said so.
    #[error("cancelled")]
    Cancelled,
    /// The space that is read or filled refused.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The disk that is filled refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl FormatError {
    pub(super) fn refused(path: &Path, rule: Rule) -> Self {
        Self::Refused { path: path.to_owned(), rule }
    }

    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), error: Arc::new(error) }
    }

    /// The rule that was broken, if that is what happened.
    pub fn rule(&self) -> Option<&Rule> {
        match self {
            Self::Refused { rule, .. } => Some(rule),
            _ => None,
        }
    }

    /// As an error of a read through [`Source`](crate::image::Source), which knows no formats.
    pub(super) fn into_space_error(self) -> SpaceError {
        match self {
            Self::Space(error) => error,
            other => ImageError::Io(Arc::new(io::Error::other(other))).into(),
        }
    }
}

/// What an image may not be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Rule {
    /// The caller named a format that this file does not have.
    #[error("it is not a {0} image: name its real format, which is not guessed")]
    NotThisFormat(Format),
    /// Only regular files are opened.
    #[error("it is not a regular file")]
    NotAFile,
    /// An unknown version.
    #[error("version {0} is not supported")]
    Version(u32),
    /// Bits that must be understood and are not. Extended L2 entries (16) and other compression than deflate (8) of qcow2 are among them, and
    /// are named.
    #[error("incompatible features are not supported ({}): convert it with qemu-img convert", features(*.0))]
    Features(u64),
    /// A kind of the format that is not read.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    /// Its last writer did not close it.
    #[error("it is marked dirty: repair it with qemu-img check -r all")]
    Dirty,
    /// A writer found it corrupt.
    #[error("it is marked corrupt: repair it with qemu-img check -r all")]
    Corrupt,
    /// It is encrypted.
    #[error("it is encrypted: decrypt it with qemu-img convert")]
    Encrypted,
    /// More than the policy or a space allows.
    #[error("its virtual size of {size} is over the limit of {limit} (ImportPolicy::virtual_size)")]
    VirtualSize {
        /// What it declares.
        size: ByteSize,
        /// What is allowed.
        limit: ByteSize,
    },
    /// It holds more data than the policy allows; found while it is copied.
    #[error("it stands for more than {limit} of data (ImportPolicy::data)")]
    Data {
        /// What is allowed.
        limit: ByteSize,
    },
    /// A disk of no bytes.
    #[error("its virtual size is zero")]
    Empty,
    /// A table that the file cannot hold, or that is larger than the disk warrants.
    #[error("its {table} of {len} at {at} does not fit a file of {file} or the format's limits")]
    Table {
        /// Which table.
        table: &'static str,
        /// Where it is said to be.
        at: u64,
        /// How long it is said to be.
        len: ByteSize,
        /// The file's length.
        file: ByteSize,
    },
    /// Data that the file does not hold.
    #[error("data at {at} lies past the end of a file of {file}: it was cut off")]
    Truncated {
        /// Where the data should end.
        at: u64,
        /// The file's length.
        file: ByteSize,
    },
    /// A file that the header names and the policy does not allow.
    #[error("it names the file {0:?}, which the policy does not allow (ImportPolicy::references)")]
    Reference(String),
    /// A name that other tools take for a protocol or an option string.
    #[error("it names {0:?}, which is a protocol or options and no plain path")]
    Protocol(String),
    /// A backing file without a format, or with one that is not supported: it would have to be guessed.
    #[error(
        "it names the backing file {name:?} of format {format:?}: name it with qemu-img rebase -u -F raw, qcow2 or vmdk"
    )]
    BackingFormat {
        /// The file.
        name: String,
        /// Its format; empty where the header has none.
        format: String,
    },
    /// It is among its own backing files.
    #[error("it is below itself in the chain of backing files")]
    Cycle,
    /// Too many backing files or extents.
    #[error("more than {limit} files in one chain (ImportPolicy::files)")]
    TooManyFiles {
        /// How many are allowed.
        limit: u32,
    },
    /// Something contradicts the format.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Something that cannot be written in the format.
    #[error("cannot be exported: {0}")]
    NotExportable(&'static str),
}

/// What the bits of [`Rule::Features`] mean, where it is known.
fn features(bits: u64) -> String {
    use super::qcow2_header::{EXTENDED_L2, OTHER_COMPRESSION};
    let names =
        [(OTHER_COMPRESSION, "compression other than deflate, such as zstd"), (EXTENDED_L2, "extended L2 entries")];
    let known: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| (*name).to_owned()).collect();
    let unknown = names.iter().fold(bits, |bits, (bit, _)| bits & !bit);
    let rest = (unknown != 0).then(|| format!("unknown bits {unknown:#x}"));
    known.into_iter().chain(rest).collect::<Vec<_>>().join(", ")
}
