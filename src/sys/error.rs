//! What goes wrong at the operating system's edge, as cases with meaning: each message says what to do.

use rustix::io::Errno;

use super::fault::Call;
use crate::page::GeometryError;

/// A failed system call, or a request that no system call could serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SysError {
    /// The process holds about as many mappings as the kernel allows.
    #[error(
        "{call}: this process holds {held} memory mappings, the limit is {limit}; \
         raise it (sysctl vm.max_map_count) or flatten clones with many extents"
    )]
    OutOfMappings { call: Call, held: u64, limit: u64 },
    /// The host, the cgroup or the address space has no room.
    #[error("{call}: out of memory ({errno}); free memory, or raise the cgroup's or RLIMIT_AS limit")]
    OutOfMemory { call: Call, errno: Errno },
    /// No file descriptor is left.
    #[error("{call}: out of file descriptors ({errno}); raise RLIMIT_NOFILE (or fs.file-max if ENFILE)")]
    OutOfDescriptors { call: Call, errno: Errno },
    /// The kernel or the host cannot do this.
    #[error("{call} is not supported here: {why}")]
    Unsupported { call: Call, why: &'static str },
    /// A range outside the mapping or file.
    #[error(transparent)]
    Range(#[from] GeometryError),
    /// A request that contradicts the state of the object: a bug in the caller, refused before anything was done.
    #[error("refused: {0}")]
    Misuse(&'static str),
    /// A step failed, and so did undoing it: the mapping's contents can no longer be trusted.
    #[error("{call} failed while undoing a failed step ({errno}); the VM that used this memory is lost")]
    RollbackFailed { call: Call, errno: Errno },
    /// Anything else.
    #[error("{call}: {errno}")]
    Other { call: Call, errno: Errno },
}

impl SysError {
    /// Gives an errno its meaning. For `ENOMEM` it counts this process's mappings, which costs a read of
    /// `/proc/self/maps`; mmap(2) says that the code stands for both lack of memory and too many mappings.
    #[cold]
    pub(super) fn new(call: Call, errno: Errno) -> Self {
        match errno {
            Errno::NOMEM => match mapping_limit() {
                // The kernel wants a few spare before it starts some operations, so near is as good as there.
                Some((held, limit)) if held + 16 >= limit => Self::OutOfMappings { call, held, limit },
                _ => Self::OutOfMemory { call, errno },
            },
            Errno::MFILE | Errno::NFILE => Self::OutOfDescriptors { call, errno },
            Errno::NOSPC => Self::OutOfMemory { call, errno },
            Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOTTY => {
                Self::Unsupported { call, why: "the kernel does not know it" }
            }
            _ => Self::Other { call, errno },
        }
    }
}

/// How many mappings this process holds and how many it may; `None` where /proc cannot be read.
pub(super) fn mapping_limit() -> Option<(u64, u64)> {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()?;
    let held = std::fs::read("/proc/self/maps").ok()?.iter().filter(|&&b| b == b'\n').count();
    Some((held as u64, limit))
}

/// Passes `call` through the fault plan, makes it, and repeats it while a signal interrupts it.
pub(super) fn checked<T>(call: Call, mut make: impl FnMut() -> Result<T, Errno>) -> Result<T, SysError> {
    checked_errno(call, &mut make).map_err(|errno| SysError::new(call, errno))
}

/// The same, for callers that give some errno values a meaning of their own.
pub(super) fn checked_errno<T>(call: Call, mut make: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match super::fault::check(call).and_then(|()| make()) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_limit() {
        assert!(SysError::new(Call::MemfdCreate, Errno::MFILE).to_string().contains("RLIMIT_NOFILE"));
        let full = SysError::OutOfMappings { call: Call::Mmap, held: 65529, limit: 65530 };
        assert!(full.to_string().contains("vm.max_map_count"));
        assert!(matches!(SysError::new(Call::Mmap, Errno::NOMEM), SysError::OutOfMemory { .. }));
    }

    #[test]
    fn an_interrupted_call_is_repeated() {
        let _plan = super::super::fault::plan::arm(1, Errno::INTR);
        assert!(matches!(checked(Call::Pread, || Ok(7)), Ok(7)));
    }
}
