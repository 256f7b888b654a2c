//! Files that are being made, and that nothing names yet: told apart from what a crash left behind, and removed where their maker fails.
//!
//! Must not know how a file is written.

use super::directory::DiskDir;
use super::id::LayerId;
use super::sealed;
use crate::error::StoreError;

/// The claim on a new file's name. Dropped before [`Claim::keep`], the file goes with it.
#[derive(Debug)]
pub(super) struct Claim {
    dir: DiskDir,
    file: String,
    kept: bool,
}

impl Claim {
    pub(super) fn on(dir: &DiskDir, file: &str) -> Self {
        dir.in_the_making().insert(file.to_owned());
        Self { dir: dir.clone(), file: file.to_owned(), kept: false }
    }

    /// Something that is durable names the file, or may.
    pub(super) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            match self.dir.folder().remove(&self.file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, file = %self.file, "a file that nothing names was left behind");
                }
                _ => {}
            }
        }
        self.dir.in_the_making().remove(&self.file);
    }
}

/// The claim on a new layer.
#[derive(Debug)]
pub(super) struct Made {
    id: LayerId,
    claim: Claim,
}

impl Made {
    pub(super) fn new(dir: &DiskDir) -> Result<Self, StoreError> {
        let id = LayerId::random().map_err(|error| dir.no_id(error))?;
        Ok(Self { id, claim: Claim::on(dir, &sealed::file_name(id)) })
    }

    pub(super) fn id(&self) -> LayerId {
        self.id
    }

    /// Something that is durable names the layer, or may.
    pub(super) fn keep(&mut self) {
        self.claim.keep();
    }

    #[cfg(feature = "store")]
    pub(super) fn into_claim(self) -> Claim {
        self.claim
    }
}
