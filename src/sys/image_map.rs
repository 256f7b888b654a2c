//! Read-only access to raw image files.
