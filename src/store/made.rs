//! A layer that is being made, and that nothing names yet: told apart from what a crash left behind, and removed where its maker fails.
//!
//! Must not know how a layer is written.

use super::directory::DiskDir;
use super::id::LayerId;
use super::sealed;

/// The claim on a new layer's id. Dropped before [`Made::keep`], the layer goes with it.
#[derive(Debug)]
pub(super) struct Made {
    dir: DiskDir,
    id: LayerId,
    kept: bool,
}

impl Made {
    pub(super) fn new(dir: &DiskDir) -> Result<Self, crate::StoreError> {
        let id = LayerId::random().map_err(|error| dir.no_id(error))?;
        dir.in_the_making().insert(id);
        Ok(Self { dir: dir.clone(), id, kept: false })
    }

    pub(super) fn id(&self) -> LayerId {
        self.id
    }

    /// Something that is durable names the layer, or may.
    pub(super) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.kept {
            let name = sealed::file_name(self.id);
            match self.dir.folder().remove(&name) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, file = %name, "a layer that nothing names was left behind");
                }
                _ => {}
            }
        }
        self.dir.in_the_making().remove(&self.id);
    }
}
