//! A system call by its number, for the few that rustix lacks.
//!
//! Knows the kernel's calling convention on each processor, and nothing of any call.
#![allow(unsafe_code)] // Inline assembly.

use rustix::io::Errno;

/// Makes a system call with up to five arguments; what is not used is 0.
///
/// # Errors
/// Those of the call.
///
/// # Safety
/// What the call reads and writes must be the caller's to be read and written.
pub(super) unsafe fn syscall5(number: usize, arguments: [usize; 5]) -> Result<usize, Errno> {
    let [a, b, c, d, e] = arguments;
    let result: isize;
    // SAFETY: the kernel keeps all registers but those named; what it does to memory is the caller's business.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a => result,
            in("x1") b,
            in("x2") c,
            in("x3") d,
            in("x4") e,
            options(nostack),
        );
    }
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result as i32))
}
