//! Failures on demand: the one gate that every fallible system call of this folder passes.
//!
//! In normal builds [`check`] is an empty inline function. Under `cfg(test)` or feature `testing` it consults a plan
//! that belongs to the calling thread, so that a test can make the n-th call fail for every n and then look at what is
//! left behind. It knows the names of calls, and nothing of what they are called for.

/// A system call that may fail, as named in errors and by the fault plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    MemfdCreate,
    Ftruncate,
    Fstat,
    AddSeals,
    Fallocate,
    Lseek,
    Pread,
    Pwrite,
    Mmap,
    Mremap,
    Madvise,
    Mprotect,
    ProcessMadvise,
    Open,
    PagemapScan,
    Userfaultfd,
    UffdApi,
    UffdRegister,
    UffdWriteProtect,
    Getrandom,
    #[cfg_attr(
        not(any(feature = "nbd", feature = "uffd")),
        expect(dead_code, reason = "only those front ends make it")
    )]
    Poll,
    /// Any call on a userfaultfd, or a connection, of another process.
    #[cfg_attr(not(feature = "uffd"), expect(dead_code, reason = "only that front end makes them"))]
    Peer(PeerCall),
    #[cfg_attr(
        not(any(feature = "qemu", feature = "uffd")),
        expect(dead_code, reason = "only those front ends make it")
    )]
    Dup,
    #[cfg_attr(not(feature = "qemu"), expect(dead_code, reason = "only that front end makes it"))]
    Spawn,
    Fdatasync,
    Fsync,
    Flock,
    Fadvise,
    Rename,
    Unlink,
    Readdir,
    /// Any call on a KVM machine that makes a part of it ahead of need, moves its registers or reads its log.
    #[cfg_attr(not(feature = "kvm"), expect(dead_code, reason = "only that front end makes it"))]
    Kvm,
}

/// A call that serves another process's faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(not(feature = "uffd"), expect(dead_code, reason = "only that front end makes them"))]
pub(crate) enum PeerCall {
    Recvmsg,
    Getsockopt,
    Readlink,
    SetNonblocking,
    Read,
    Copy,
    Zeropage,
    Wake,
    Poison,
}

impl PeerCall {
    const fn name(self) -> &'static str {
        match self {
            Self::Recvmsg => "recvmsg",
            Self::Getsockopt => "getsockopt",
            Self::Readlink => "readlink",
            Self::SetNonblocking => "fcntl(F_SETFL)",
            Self::Read => "read",
            Self::Copy => "ioctl(UFFDIO_COPY)",
            Self::Zeropage => "ioctl(UFFDIO_ZEROPAGE)",
            Self::Wake => "ioctl(UFFDIO_WAKE)",
            Self::Poison => "ioctl(UFFDIO_POISON)",
        }
    }
}

impl Call {
    /// The name as in the manual, section 2.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::MemfdCreate => "memfd_create",
            Self::Ftruncate => "ftruncate",
            Self::Fstat => "fstat",
            Self::AddSeals => "fcntl(F_ADD_SEALS)",
            Self::Fallocate => "fallocate",
            Self::Lseek => "lseek",
            Self::Pread => "pread",
            Self::Pwrite => "pwrite",
            Self::Mmap => "mmap",
            Self::Mremap => "mremap",
            Self::Madvise => "madvise",
            Self::ProcessMadvise => "process_madvise",
            Self::Open => "open",
            Self::PagemapScan => "ioctl(PAGEMAP_SCAN)",
            Self::Userfaultfd => "userfaultfd",
            Self::UffdApi => "ioctl(UFFDIO_API)",
            Self::UffdRegister => "ioctl(UFFDIO_REGISTER)",
            Self::UffdWriteProtect => "ioctl(UFFDIO_WRITEPROTECT)",
            Self::Getrandom => "getrandom",
            Self::Poll => "poll",
            Self::Peer(call) => call.name(),
            Self::Dup => "fcntl(F_DUPFD_CLOEXEC)",
            Self::Spawn => "fork",
            Self::Fdatasync => "fdatasync",
            Self::Fsync => "fsync",
            Self::Flock => "flock",
            Self::Fadvise => "posix_fadvise",
            Self::Rename => "rename",
            Self::Unlink => "unlink",
            Self::Readdir => "readdir",
            Self::Kvm => "ioctl(KVM)",
            Self::Mprotect => "mprotect",
        }
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Asks the plan whether `call`, about to be made, is to fail instead.
///
/// # Errors
/// The planned errno, and only under test.
#[cfg(all(unix, not(any(test, feature = "testing"))))]
#[inline(always)]
pub(crate) fn check(_call: Call) -> Result<(), rustix::io::Errno> {
    Ok(())
}

#[cfg(all(unix, any(test, feature = "testing")))]
pub(crate) use plan::check;

/// The plan and its controls.
#[cfg(all(unix, any(test, feature = "testing")))]
pub(crate) mod plan {
    use std::cell::Cell;
    use std::marker::PhantomData;

    use rustix::io::Errno;

    use super::Call;

    thread_local! {
        /// Calls left until one fails (1: the next one), and how it fails.
        static PLAN: Cell<Option<(u64, Errno)>> = const { Cell::new(None) };
        static SEEN: Cell<u64> = const { Cell::new(0) };
    }

    /// Disarms the thread's plan when dropped.
    #[must_use = "the plan is disarmed when this is dropped"]
    pub(crate) struct Guard(PhantomData<*const ()>);

    impl Drop for Guard {
        fn drop(&mut self) {
            PLAN.set(None);
        }
    }

    /// Makes the `n`-th call from now on this thread (from 1) fail once with `errno`; replaces an earlier plan. With
    /// `n` 0 nothing fails, and the calls are only counted. Starts [`calls_seen`] from 0.
    pub(crate) fn arm(n: u64, errno: Errno) -> Guard {
        SEEN.set(0);
        PLAN.set((n > 0).then_some((n, errno)));
        Guard(PhantomData)
    }

    /// How many calls this thread has made since [`arm`]. A test that saw fewer than `n` has tried every `n`.
    pub(crate) fn calls_seen() -> u64 {
        SEEN.get()
    }

    /// See [`super::check`] of normal builds.
    pub(crate) fn check(_call: Call) -> Result<(), Errno> {
        SEEN.set(SEEN.get() + 1);
        match PLAN.get() {
            Some((1, errno)) => {
                PLAN.set(None);
                Err(errno)
            }
            Some((n, errno)) => {
                PLAN.set(Some((n - 1, errno)));
                Ok(())
            }
            None => Ok(()),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_nth_call_fails_once() {
            let guard = arm(2, Errno::IO);
            assert_eq!(check(Call::Mmap), Ok(()));
            assert_eq!(check(Call::Mmap), Err(Errno::IO));
            assert_eq!(check(Call::Mmap), Ok(()));
            assert_eq!(calls_seen(), 3);
            drop(guard);
            let guard = arm(1, Errno::IO);
            drop(guard);
            assert_eq!(check(Call::Mmap), Ok(()));
        }
    }
}
