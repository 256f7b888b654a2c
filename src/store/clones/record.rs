//! What the catalogue says of a clone and of a layer, and the bytes that it is kept as.
//!
//! Decoding trusts nothing: a record is of its exact length, and every field of it can be. Must not know where records are kept.

use std::fmt;

use super::error::CloneError;
use crate::page::{ByteSize, Geometry, PageCount, PageSize};
use crate::store::id::{DiskId, LayerId, SavedId};
use crate::store::overlay::Shape;

/// A clone's or an image's name: 1 to 255 bytes, no control characters. It is never a part of a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CloneName(String);

impl CloneName {
    /// The longest name, in bytes.
    pub const LIMIT: usize = 255;

    /// Checks a name.
    ///
    /// # Errors
    /// [`CloneError::Name`].
    pub fn new(name: impl Into<String>) -> Result<Self, CloneError> {
        let name = name.into();
        if (1..=Self::LIMIT).contains(&name.len()) && !name.chars().any(char::is_control) {
            Ok(Self(name))
        } else {
            Err(CloneError::Name { limit: Self::LIMIT })
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CloneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What may be done to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// Never written: a template, or a snapshot of a clone.
    Image,
    /// A disk of its own.
    Clone,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "an image",
            Self::Clone => "a clone",
        })
    }
}

/// A row of the table of clones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CloneRecord {
    pub(super) kind: Kind,
    /// Whose head, once there is one, says what it reads.
    pub(super) disk: DiskId,
    /// New whenever what the name reads as is replaced.
    pub(super) generation: [u8; 16],
    /// Where there is no head: the topmost layer. Where there is: a layer below, or the same.
    pub(super) top: Option<LayerId>,
    /// What a reset goes back to.
    pub(super) origin: Option<LayerId>,
    pub(super) pages: u64,
    pub(super) origin_pages: u64,
}

/// A row of the table of layers. They are there so that a layer whose file is gone does not take those below it along.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LayerRecord {
    pub(super) parent: Option<LayerId>,
    pub(super) pages: u64,
    /// The fingerprint of a sealed layer.
    pub(super) content: Option<[u8; 16]>,
}

/// A row of the table of saved VMs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SavedRecord {
    /// Its manifest.
    pub(super) id: SavedId,
    /// What the manifest names, said again: a manifest that is lost must not take its layers along.
    pub(super) tops: Vec<LayerId>,
}

const CLONE_LEN: usize = 1 + 4 * 16 + 2 * 8;
const LAYER_LEN: usize = 2 * 16 + 8;
/// Layers that a saved VM lies on: of RAM and of every disk that a VM may have.
const MOST_TOPS: usize = 257;
/// Nothing has this id: random ones have version bits.
const NONE: [u8; 16] = [0; 16];

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn optional(&mut self) -> Option<Option<[u8; 16]>> {
        self.take().map(|bytes| (bytes != NONE).then_some(bytes))
    }

    fn pages(&mut self) -> Option<u64> {
        let pages = u64::from_le_bytes(self.take()?);
        shape_of(pages).map(|_| pages)
    }
}

/// The shape of a disk of so many pages, if there can be one.
pub(super) fn shape_of(pages: u64) -> Option<Shape> {
    if pages == 0 || pages > Geometry::MAX_LEN.get() >> PageSize::KIB_4.shift() {
        return None;
    }
    let len: ByteSize = PageSize::KIB_4.size_of(PageCount::new(pages));
    Geometry::new(len, PageSize::KIB_4).ok().map(|geometry| Shape { geometry, base_len: None })
}

impl CloneRecord {
    pub(super) fn shape(&self) -> Shape {
        shape_of(self.pages).expect("checked when it was decoded or made")
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CLONE_LEN);
        bytes.push(match self.kind {
            Kind::Image => 1,
            Kind::Clone => 2,
        });
        bytes.extend(self.disk.bytes());
        bytes.extend(self.generation);
        bytes.extend(self.top.map_or(NONE, LayerId::bytes));
        bytes.extend(self.origin.map_or(NONE, LayerId::bytes));
        bytes.extend(self.pages.to_le_bytes());
        bytes.extend(self.origin_pages.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let kind = match reader.take::<1>()? {
            [1] => Kind::Image,
            [2] => Kind::Clone,
            _ => return None,
        };
        let disk = DiskId::from_bytes(reader.optional()??);
        let generation = reader.take()?;
        let top = reader.optional()?.map(LayerId::from_bytes);
        let origin = reader.optional()?.map(LayerId::from_bytes);
        let (pages, origin_pages) = (reader.pages()?, reader.pages()?);
        let record = Self { kind, disk, generation, top, origin, pages, origin_pages };
        (reader.0.is_empty() && origin_pages <= pages).then_some(record)
    }
}

impl LayerRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LAYER_LEN);
        bytes.extend(self.parent.map_or(NONE, LayerId::bytes));
        bytes.extend(self.content.unwrap_or(NONE));
        bytes.extend(self.pages.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let parent = reader.optional()?.map(LayerId::from_bytes);
        let content = reader.optional()?;
        let pages = reader.pages()?;
        reader.0.is_empty().then_some(Self { parent, pages, content })
    }
}

impl SavedRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        self.id.bytes().into_iter().chain(self.tops.iter().flat_map(|top| top.bytes())).collect()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (ids, rest) = bytes.as_chunks::<16>();
        let (id, tops) = ids.split_first()?;
        let whole = rest.is_empty() && *id != NONE && tops.len() <= MOST_TOPS && !tops.contains(&NONE);
        whole.then(|| Self {
            id: SavedId::from_bytes(*id),
            tops: tops.iter().map(|top| LayerId::from_bytes(*top)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone() -> CloneRecord {
        CloneRecord {
            kind: Kind::Clone,
            disk: DiskId::from_bytes([1; 16]),
            generation: [2; 16],
            top: Some(LayerId::from_bytes([3; 16])),
            origin: None,
            pages: 9,
            origin_pages: 8,
        }
    }

    #[test]
    fn records_come_back_and_nothing_else_is_one() {
        let (record, bytes) = (clone(), clone().encode());
        assert_eq!(CloneRecord::decode(&bytes), Some(record));
        let layer = LayerRecord { parent: None, pages: 7, content: Some([4; 16]) };
        assert_eq!(LayerRecord::decode(&layer.encode()), Some(layer));
        for len in 0..bytes.len() {
            assert_eq!(CloneRecord::decode(&bytes[..len]), None, "cut at {len}");
        }
        assert_eq!(CloneRecord::decode(&[bytes.clone(), vec![0]].concat()), None);
        let kind = [&[9], &bytes[1..]].concat();
        assert_eq!(CloneRecord::decode(&kind), None);
        assert_eq!(CloneRecord::decode(&CloneRecord { pages: u64::MAX, ..record }.encode()), None);
        assert_eq!(CloneRecord::decode(&CloneRecord { pages: 0, origin_pages: 0, ..record }.encode()), None);
        let saved = SavedRecord { id: SavedId::from_bytes([5; 16]), tops: vec![LayerId::from_bytes([6; 16])] };
        assert_eq!(SavedRecord::decode(&saved.encode()), Some(saved.clone()));
        for bad in
            [vec![], vec![5; 15], vec![5; 17], vec![0; 16], [vec![5; 16], vec![0; 16]].concat(), vec![5; 259 * 16]]
        {
            assert_eq!(SavedRecord::decode(&bad), None, "{} bytes", bad.len());
        }
        // It would have shrunk.
        assert_eq!(CloneRecord::decode(&CloneRecord { origin_pages: 10, ..record }.encode()), None);
    }

    #[test]
    fn names() {
        assert!(CloneName::new("web-1").is_ok());
        for bad in ["", "a\nb", &"x".repeat(256)] {
            assert!(matches!(CloneName::new(bad), Err(CloneError::Name { .. })), "{bad:?}");
        }
    }
}
