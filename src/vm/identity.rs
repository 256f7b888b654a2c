//! Who a clone is: what must differ between VMs that share all their memory.
//!
//! Fail-closed: a clone has its own generation id, MAC and UUID before anybody can run it, and is not handed out if its customization
//! fails. Must not know how identity reaches the guest: the embedder's hook does that.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::backing::Prefault;
use crate::page::ByteSize;
use crate::sys::entropy;

/// A value that is new for every clone, so that a guest can tell that it was cloned and reseed its random numbers (the VM
/// Generation ID device exposes exactly this).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GenerationId([u8; 16]);

/// A universally unique id, version 4.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid([u8; 16]);

/// An Ethernet address. Fresh ones are locally administered and unicast.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress([u8; 6]);

impl GenerationId {
    /// The raw bytes, to be written to the guest.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl Uuid {
    /// From raw bytes, taken as they are.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl MacAddress {
    /// From raw bytes, taken as they are.
    pub const fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

fn hyphenated(f: &mut fmt::Formatter<'_>, bytes: &[u8; 16]) -> fmt::Result {
    for (at, byte) in bytes.iter().enumerate() {
        let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
        write!(f, "{dash}{byte:02x}")?;
    }
    Ok(())
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hyphenated(f, &self.0)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hyphenated(f, &self.0)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

macro_rules! debug_as_display {
    ($($t:ty),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}
debug_as_display!(GenerationId, Uuid, MacAddress);

/// What cannot be an identity.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The keys and values together are over the cap.
    #[error("configuration of {size} is over the limit of {limit}")]
    ConfigTooBig {
        /// Keys and values together.
        size: ByteSize,
        /// [`Config::LIMIT`].
        limit: ByteSize,
    },
    /// The system gave no random numbers: there can be no identity that is not another VM's.
    #[error("no random numbers for a new identity: {0}")]
    NoEntropy(Arc<std::io::Error>),
    /// An empty name, one that is too long, or one with control characters.
    #[error("a VM's name must have 1 to {limit} bytes and no control characters")]
    Name {
        /// [`VmName::LIMIT`].
        limit: u64,
    },
}

/// A VM's name: 1 to 255 bytes, no control characters. Compared as it is written.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VmName(String);

impl VmName {
    /// The longest name, in bytes.
    pub const LIMIT: u64 = 255;

    /// Checks a name.
    ///
    /// # Errors
    /// [`IdentityError::Name`].
    pub fn new(name: impl Into<String>) -> Result<Self, IdentityError> {
        let name = name.into();
        let fits = (1..=Self::LIMIT).contains(&(name.len() as u64));
        if fits && !name.chars().any(char::is_control) {
            Ok(Self(name))
        } else {
            Err(IdentityError::Name { limit: Self::LIMIT })
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the `serial`-th clone of a VM of this name; a long name is cut short to keep the serial.
    pub(crate) fn of_clone(&self, serial: u64) -> Self {
        let suffix = format!("-{serial}");
        let mut keep = self.0.len().min(Self::LIMIT as usize - suffix.len());
        while !self.0.is_char_boundary(keep) {
            keep -= 1;
        }
        Self(format!("{}{suffix}", &self.0[..keep]))
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Keys and values that the embedder shows its guest, read-only (what vSphere calls guestinfo). Capped at 64 KiB.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Config {
    entries: BTreeMap<String, String>,
    size: u64,
}

impl Config {
    /// The most that keys and values may take together.
    pub const LIMIT: ByteSize = ByteSize::kib(64);

    /// Nothing set.
    pub const fn new() -> Self {
        Self { entries: BTreeMap::new(), size: 0 }
    }

    /// Sets a key.
    ///
    /// # Errors
    /// [`IdentityError::ConfigTooBig`]; nothing is changed then.
    ///
    /// ```
    /// let mut config = offshoot::Config::new();
    /// config.set("hostname", "web-7")?;
    /// assert!(config.set("blob", "x".repeat(1 << 16)).is_err());
    /// assert_eq!(config.get("hostname"), Some("web-7"));
    /// # Ok::<(), offshoot::IdentityError>(())
    /// ```
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) -> Result<(), IdentityError> {
        let (key, value) = (key.into(), value.into());
        let old = self.entries.get(&key).map_or(0, |old| key.len() + old.len()) as u64;
        let size = self.size - old + (key.len() + value.len()) as u64;
        if size > Self::LIMIT.get() {
            return Err(IdentityError::ConfigTooBig { size: ByteSize::new(size), limit: Self::LIMIT });
        }
        self.entries.insert(key, value);
        self.size = size;
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.get(key).map(String::as_str)
    }

    /// All keys and values, in order of key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// Who a VM is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Its name.
    pub name: VmName,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Its UUID.
    pub uuid: Uuid,
    /// New for every clone; cannot be chosen.
    pub generation: GenerationId,
    /// What the guest may be told.
    pub config: Config,
}

impl Identity {
    /// Fresh ids under this name. One call to the system's random numbers.
    pub(crate) fn fresh(name: VmName) -> Result<Self, IdentityError> {
        let mut random = [0; 38];
        entropy::fill_random(&mut random).map_err(|error| IdentityError::NoEntropy(Arc::new(error)))?;
        let (generation, rest) = random.split_at(16);
        let (uuid, mac) = rest.split_at(16);
        let take = |from: &[u8]| -> [u8; 16] { std::array::from_fn(|at| from[at]) };
        let mut uuid = take(uuid);
        // RFC 9562, section 5.4: version 4, variant 10.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let mut mac: [u8; 6] = std::array::from_fn(|at| mac[at]);
        // IEEE 802: locally administered, unicast.
        mac[0] = mac[0] & 0xfc | 0x02;
        Ok(Self {
            name,
            mac: MacAddress(mac),
            uuid: Uuid(uuid),
            generation: GenerationId(take(generation)),
            config: Config::new(),
        })
    }
}

/// What a clone shall be. Whatever is not chosen is fresh.
///
/// ```
/// # use offshoot::*;
/// let mut config = Config::new();
/// config.set("role", "worker")?;
/// let spec = CloneSpec { name: Some(VmName::new("worker-1")?), config, ..CloneSpec::default() };
/// # Ok::<(), IdentityError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CloneSpec {
    /// Its name; if none is given, the parent's with a number that no other clone named after it has.
    pub name: Option<VmName>,
    /// Its Ethernet address.
    pub mac: Option<MacAddress>,
    /// Its UUID.
    pub uuid: Option<Uuid>,
    /// What its guest may be told.
    pub config: Config,
    /// Pages of its RAM to map ahead; none unless given.
    pub prefault: Option<Prefault>,
}

impl CloneSpec {
    pub(crate) fn identity(self, default_name: impl FnOnce() -> VmName) -> Result<Identity, IdentityError> {
        let fresh = Identity::fresh(self.name.unwrap_or_else(default_name))?;
        Ok(Identity {
            mac: self.mac.unwrap_or(fresh.mac),
            uuid: self.uuid.unwrap_or(fresh.uuid),
            config: self.config,
            ..fresh
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_stay_within_the_limit() {
        assert!(VmName::new("").is_err() && VmName::new("a\n").is_err() && VmName::new("é".repeat(128)).is_err());
        let long = VmName::new("é".repeat(127)).unwrap();
        let clone = long.of_clone(u64::MAX);
        assert!(clone.0.len() <= 255 && clone.0.ends_with("-18446744073709551615"));
    }

    #[test]
    fn config_counts_a_replaced_value_once() {
        let mut config = Config::new();
        for _ in 0..3 {
            config.set("k", "v".repeat(40_000)).unwrap();
        }
        assert!(config.set("other", "v".repeat(40_000)).is_err());
        assert_eq!(config.iter().count(), 1);
    }

    #[test]
    fn fresh_ids_have_the_shape_that_their_standards_ask_for() {
        let id = Identity::fresh(VmName::new("a").unwrap()).unwrap();
        assert_eq!(id.uuid.bytes()[6] >> 4, 4);
        assert_eq!(id.uuid.bytes()[8] >> 6, 2);
        assert_eq!(id.mac.bytes()[0] & 3, 2);
        assert_eq!(id.uuid.to_string().len(), 36);
    }
}
