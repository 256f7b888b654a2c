//! Manifests as files: written under a temporary name until they are durable, and named in one step.

use std::sync::Arc;

use super::super::file::{self, NamedFile};
use super::super::id::{PARTIAL, SavedId, VM};
use super::super::medium::{Folder, Sharing};
use super::super::record::{BLOCK, BLOCK_LEN};
use super::Manifest;
use super::decode::Header;
use crate::error::StoreError;
use crate::page::ByteSize;

pub(in super::super) fn file_name(id: SavedId) -> Arc<str> {
    format!("{id}.{VM}").into()
}

/// Makes the file, durable with its name when this returns. The id must be fresh. What is left after an error is an orphan.
pub(in super::super) fn write(folder: &dyn Folder, manifest: &Manifest) -> Result<(), StoreError> {
    let front = manifest.front()?;
    let name = file_name(manifest.id);
    let partial: Arc<str> = format!("{name}.{PARTIAL}").into();
    let medium = folder.create(&partial).map_err(|error| file::error(&partial, "create", error))?;
    let file = NamedFile::new(partial.clone(), medium);
    let written = file
        .write(0, &front)
        .and_then(|()| file.write(front.len() as u64, &manifest.state))
        .and_then(|()| file.sync())
        .and_then(|()| folder.rename(&partial, &name).map_err(|error| file::error(&name, "rename", error)));
    if let Err(error) = written {
        if let Err(error) = folder.remove(&partial) {
            tracing::warn!(%error, file = %partial, "an unfinished manifest was left behind");
        }
        return Err(error);
    }
    folder.sync().map_err(|error| file::error(&name, "sync of its name", error))
}

/// What a manifest's file takes, whatever it says.
pub(in super::super) fn allocated(folder: &dyn Folder, id: SavedId) -> Result<ByteSize, StoreError> {
    let name = file_name(id);
    let medium = folder.open(&name, Sharing::Readers).map_err(|error| file::error(&name, "open", error))?;
    NamedFile::new(name, medium).allocated()
}

/// Reads a manifest with at most so much device state.
pub(in super::super) fn open(folder: &dyn Folder, id: SavedId, most_state: ByteSize) -> Result<Manifest, StoreError> {
    let name = file_name(id);
    let medium = folder.open(&name, Sharing::Readers).map_err(|error| file::error(&name, "open", error))?;
    let file = NamedFile::new(name.clone(), medium);
    let len = file.len()?;
    let mut block = [0; BLOCK];
    file.read(0, &mut block)?;
    let header = Header::parse(&block, &name)?;
    if header.id() != id {
        return Err(file.damaged("it is another saved VM than its name says", 48));
    }
    header.check_len(len)?;
    if header.state_len() > most_state.get() {
        let what = "bytes of device state (Limits::device_state)";
        return Err(file.limit(what, header.state_len(), most_state.get()));
    }
    // The tables of the largest manifest are far smaller than this; a file that says otherwise is not read.
    const MOST_TABLES: u64 = 1 << 20;
    let tables = len - BLOCK_LEN - header.state_len();
    if tables > MOST_TABLES {
        return Err(file.limit("bytes of tables", tables, MOST_TABLES));
    }
    let mut rest = vec![0; (len - BLOCK_LEN) as usize];
    file.read(BLOCK_LEN, &mut rest)?;
    header.decode(&rest)
}
