//! Front ends: what lets a particular hypervisor or library use the engine. Each is thin and behind a feature; the
//! engine knows none of them.

#[cfg(all(feature = "imago", unix))]
pub mod formats;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
#[cfg(all(feature = "nbd", unix))]
pub mod nbd;
#[cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]
pub mod qemu;
#[cfg(any(
    all(feature = "nbd", unix),
    all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))
))]
mod socket_file;
#[cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod uffd;
#[cfg(all(feature = "vm-memory", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod vm_memory;
