//! Which QEMU this is, and whether it is one that we know.
//!
//! Must not know how the version was asked for.

use std::fmt;

use serde_json::Value;

/// A release of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct QemuVersion {
    /// The first number.
    pub major: u64,
    /// The second.
    pub minor: u64,
    /// The third.
    pub micro: u64,
}

/// A QEMU that is not used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VersionError {
    /// It does not say which it is.
    #[error("this QEMU does not say which release it is")]
    Unknown,
    /// From before what is needed was as it is now.
    #[error("QEMU {0} is too old: 7.2 is the first that forks are tested with")]
    TooOld(QemuVersion),
    /// Newer than what was looked at.
    #[error(
        "QEMU {0} is newer than 10, the last release that was looked at: nobody knows whether its saved state is as it was"
    )]
    TooNew(QemuVersion),
}

impl QemuVersion {
    /// From the greeting of QMP.
    pub(super) fn of_greeting(greeting: &Value) -> Result<Self, VersionError> {
        let number = |name: &str| greeting["version"]["qemu"][name].as_u64().ok_or(VersionError::Unknown);
        let version = Self { major: number("major")?, minor: number("minor")?, micro: number("micro")? };
        if (version.major, version.minor) < (7, 2) {
            return Err(VersionError::TooOld(version));
        }
        if version.major > 10 {
            return Err(VersionError::TooNew(version));
        }
        Ok(version)
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(major: u64, minor: u64) -> Result<QemuVersion, VersionError> {
        let version = json!({ "version": { "qemu": { "major": major, "minor": minor, "micro": 22 } } });
        QemuVersion::of_greeting(&version)
    }

    #[test]
    fn releases_from_7_2_to_10_are_taken_and_others_refused_by_name() {
        for (major, minor) in [(7, 2), (8, 0), (9, 2), (10, 0), (10, 2)] {
            assert_eq!(of(major, minor).unwrap().to_string(), format!("{major}.{minor}.22"));
        }
        assert!(of(7, 1).unwrap_err().to_string().contains("7.1.22 is too old"));
        assert!(matches!(of(11, 0), Err(VersionError::TooNew(_))));
        assert_eq!(QemuVersion::of_greeting(&json!({ "version": 7 })), Err(VersionError::Unknown));
    }
}
