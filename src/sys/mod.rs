//! The operating system's edge: everything in the crate that is unsafe lives in this folder, and nowhere else.
//!
//! Owns system calls, the address ranges that hold guest RAM, and copies to and from memory that others change at the
//! same time. What it offers to the rest of the crate is safe: every range is checked against the mapping it names,
//! and no reference to guest memory ever leaves. It knows pages, files and addresses; it must not know layers,
//! overlays, fork points or VMs.
//!
//! The mapped backing exists on 64-bit Linux (x86-64 and AArch64) with 4 KiB host pages. Elsewhere only
//! [`disk_file`] (any Unix), [`entropy`], [`headroom`] (which knows nothing there), [`image_map`] and [`volatile`] are compiled.

#[cfg(unix)]
pub(crate) mod disk_file;
pub(crate) mod entropy;
pub(crate) mod fault;
pub(crate) mod headroom;
pub(crate) mod image_map;
pub(crate) mod volatile;
#[cfg(all(any(feature = "nbd", feature = "uffd"), unix))]
pub(crate) mod wait;

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod access;
#[cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod child;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod copy_back;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod error;
#[cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod foreign_uffd;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod freeze;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod hollow;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod iovec;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod kvm;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod mapping;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod memfd;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod pagemap;
#[cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod peer;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod raw;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod reservation;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod reset;
#[cfg(all(test, target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod smaps;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod touched;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod uffd;
#[cfg(all(feature = "vm-memory", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod vm_memory;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) mod written;
