//! The code that talks to the kernel without a safety net: every `unsafe` block of the crate lives below this module,
//! one file per kernel facility. It knows no other module of the crate except the units of [`crate::page`].

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod kvm;
