//! Names of disks and layers: 128 random bits each, written as a UUID.
//!
//! A file's name is its id and a suffix, so a layer that names its parent names no path: nothing in a file can lead outside its
//! directory.

use std::fmt;

/// What each kind of file ends in.
pub(super) const OVERLAY: &str = "overlay";
pub(super) const LAYER: &str = "layer";
pub(super) const DISK: &str = "disk";
pub(super) const VM: &str = "vm";
pub(super) const PARTIAL: &str = "partial";

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 16]);

        impl $name {
            /// From its 16 bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Its 16 bytes.
            pub const fn bytes(self) -> [u8; 16] {
                self.0
            }

            /// A new one that nobody else has.
            #[cfg_attr(not(feature = "store"), allow(dead_code, reason = "saved VMs get theirs from a clone store"))]
            pub(super) fn random() -> std::io::Result<Self> {
                let mut bytes = [0; 16];
                crate::sys::entropy::fill_random(&mut bytes)?;
                // RFC 9562: version 4, variant 10.
                bytes[6] = bytes[6] & 0x0f | 0x40;
                bytes[8] = bytes[8] & 0x3f | 0x80;
                Ok(Self(bytes))
            }

            /// From its text.
            pub fn parse(text: &str) -> Option<Self> {
                let mut bytes = [0; 16];
                let mut digits = text.bytes().filter(|byte| *byte != b'-');
                for byte in &mut bytes {
                    let mut nibble = || char::from(digits.next()?).to_digit(16);
                    *byte = (nibble()? << 4 | nibble()?) as u8;
                }
                let id = Self(bytes);
                // One way to write it: two names are never the same file.
                (id.to_string() == text).then_some(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for (at, byte) in self.0.iter().enumerate() {
                    if matches!(at, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(
    /// A durable disk: stays the same through forks, resets and reopening.
    ///
    /// ```
    /// use offshoot::store::DiskId;
    /// let text = "0c9f2f0e-7a54-4a7b-9d3a-0b1c2d3e4f50";
    /// assert_eq!(DiskId::parse(text).unwrap().to_string(), text);
    /// assert!(DiskId::parse("../../etc/passwd").is_none());
    /// ```
    DiskId
);
id!(
    /// A layer: what one disk wrote between two cuts.
    LayerId
);
id!(
    /// A saved VM: its manifest's name in the directory.
    SavedId
);
