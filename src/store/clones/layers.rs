//! Chains of layers as the catalogue and the files tell them: what lies below what, what is missing, which pages a layer holds.
//!
//! A layer's parent is in its file and, once a row names it, in the catalogue; the catalogue's word leads past a file that is gone. Must not
//! change anything.

use std::collections::{BTreeMap, BTreeSet};

use super::catalogue::Catalogue;
use super::error::CloneError;
use super::record::LayerRecord;
use crate::store::id::{LAYER, LayerId, OVERLAY};
use crate::store::layer::{Body, Layer};
use crate::store::medium::Folder;

/// The two files that a layer may be kept in.
pub(super) fn files_of(id: LayerId) -> [String; 2] {
    [format!("{id}.{LAYER}"), format!("{id}.{OVERLAY}")]
}

/// A way down, from the topmost layer.
#[derive(Clone, Default, Debug)]
pub(super) struct Chain {
    pub(super) layers: Vec<LayerId>,
    /// Those of them that have no file.
    pub(super) missing: Vec<LayerId>,
    /// What lies below the last is not known: its file is gone or damaged, and no row names it.
    pub(super) broken: bool,
}

pub(super) fn record_of(body: &Body) -> LayerRecord {
    let content = match body {
        Body::Overlay(_) => None,
        Body::Sealed(sealed) => Some(sealed.content()),
    };
    LayerRecord { parent: body.parent(), pages: body.shape().geometry.pages().get(), content }
}

/// The chain below and with `top`. `names` are those in the folder.
pub(super) fn chain(
    folder: &dyn Folder,
    rows: &BTreeMap<LayerId, LayerRecord>,
    names: &BTreeSet<String>,
    top: Option<LayerId>,
) -> Chain {
    let (mut chain, mut seen) = (Chain::default(), BTreeSet::new());
    let mut next = top;
    while let Some(id) = next {
        if !seen.insert(id) {
            chain.broken = true;
            break;
        }
        chain.layers.push(id);
        let is_missing = !files_of(id).iter().any(|file| names.contains(file));
        if is_missing {
            chain.missing.push(id);
        }
        next = match rows.get(&id) {
            Some(row) => row.parent,
            None if is_missing => {
                chain.broken = true;
                None
            }
            None => match Layer::open(folder, id) {
                Ok(body) => body.parent(),
                Err(_) => {
                    chain.broken = true;
                    None
                }
            },
        };
    }
    chain
}

/// Rows for the layers from `top` down to the first that has one.
pub(super) fn rows_for(
    folder: &dyn Folder,
    catalogue: &Catalogue,
    top: Option<LayerId>,
) -> Result<Vec<(LayerId, Option<LayerRecord>)>, CloneError> {
    let mut rows = Vec::new();
    let mut next = top;
    while let Some(id) = next {
        if catalogue.layer(id)?.is_some() || rows.iter().any(|(known, _)| *known == id) {
            break;
        }
        let record = record_of(&Layer::open(folder, id)?);
        next = record.parent;
        rows.push((id, Some(record)));
    }
    Ok(rows)
}

/// What can be reached from `tops`.
pub(super) fn closure(
    rows: &BTreeMap<LayerId, LayerRecord>,
    tops: impl IntoIterator<Item = LayerId>,
) -> BTreeSet<LayerId> {
    let mut reached = BTreeSet::new();
    for top in tops {
        let mut next = Some(top);
        while let Some(id) = next.filter(|id| reached.insert(*id)) {
            next = rows.get(&id).and_then(|row| row.parent);
        }
    }
    reached
}
