//! What an import may open. The names in an image's header are input of whoever made it, and a guest that had a raw disk can
//! have made one.

use std::path::{Path, PathBuf};

use super::{FormatError, Rule};
use crate::page::{ByteSize, Geometry};

/// Which files the headers of an image, and of its backing files in turn, may name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum References {
    /// None: an image that names another file is refused.
    #[default]
    None,
    /// Files that lie under this directory once all symbolic links are followed. Nobody else may be able to make links in it.
    Under(PathBuf),
    /// These files, once all symbolic links are followed.
    Files(Vec<PathBuf>),
}

/// What an import allows. The default: no other file, any size that a space can have, and any data that fits it. For images of strangers set
/// [`ImportPolicy::data`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImportPolicy {
    /// Which files the image may name.
    pub references: References,
    /// The largest virtual size, of the image and of each backing file. Never more than [`Geometry::MAX_LEN`].
    pub virtual_size: ByteSize,
    /// How much data a copy may find in the image, in the pages, clusters or grains that it writes: zeroes do not count. A small file of
    /// compressed clusters, or of many entries for one cluster, may stand for a thousand times its size.
    pub data: ByteSize,
    /// How many files a chain may have in all: the image, backing files, data files, extents.
    pub files: u32,
}

impl Default for ImportPolicy {
    fn default() -> Self {
        Self { references: References::None, virtual_size: Geometry::MAX_LEN, data: Geometry::MAX_LEN, files: 64 }
    }
}

impl ImportPolicy {
    /// A policy that lets an image name files under `directory`.
    pub fn under(directory: impl Into<PathBuf>) -> Self {
        Self { references: References::Under(directory.into()), ..Self::default() }
    }

    pub(super) fn check_size(&self, path: &Path, size: ByteSize) -> Result<(), FormatError> {
        let limit = self.virtual_size.min(Geometry::MAX_LEN);
        if size > limit {
            return Err(FormatError::refused(path, Rule::VirtualSize { size, limit }));
        }
        Ok(())
    }

    /// Where `name` in the header of `image` leads, if it may be opened.
    pub(super) fn resolve(&self, image: &Path, name: &str) -> Result<PathBuf, FormatError> {
        let refused = |rule| FormatError::refused(image, rule);
        if name.is_empty() || name.contains('\0') {
            return Err(refused(Rule::Malformed("an empty file name, or one with a zero byte".into())));
        }
        if is_protocol(name) {
            return Err(refused(Rule::Protocol(name.to_owned())));
        }
        let not_allowed = || refused(Rule::Reference(name.to_owned()));
        // Before the file system is asked: whether a file is there is nothing that a header may find out.
        if self.references == References::None {
            return Err(not_allowed());
        }
        let named = image.parent().unwrap_or(Path::new("")).join(name);
        let real = |path: &Path| path.canonicalize().map_err(|error| FormatError::io(path, error));
        match &self.references {
            References::None => Err(not_allowed()),
            References::Under(directory) => {
                let path = named.canonicalize().map_err(|_| not_allowed())?;
                if path.starts_with(real(directory)?) { Ok(path) } else { Err(not_allowed()) }
            }
            References::Files(files) => {
                let path = named.canonicalize().map_err(|_| not_allowed())?;
                let allowed = files.iter().any(|file| file.canonicalize().is_ok_and(|file| file == path));
                if allowed { Ok(path) } else { Err(not_allowed()) }
            }
        }
    }
}

/// Whether other tools would take this name for something else than a path: a colon before the first slash.
pub(super) fn is_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_from_paths() {
        for bad in ["json:{\"driver\":\"file\"}", "nbd:unix:/x", "nbd+unix:///?socket=x", "fat:rw:/etc", "a:b"] {
            assert!(is_protocol(bad), "{bad}");
        }
        for good in ["base.qcow2", "/a/b:c", "./a:b", "../x"] {
            assert!(!is_protocol(good), "{good}");
        }
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        let error = ImportPolicy::default().resolve(Path::new("image"), "/dev/null").unwrap_err();
        assert_eq!(error.rule(), Some(&Rule::Reference("/dev/null".into())));
    }
}
