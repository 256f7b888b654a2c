//! Random bytes for identities.
