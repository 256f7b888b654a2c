//! How faults are served, and what one server spends on its VMMs.

use std::time::Duration;

use crate::page::PageCount;

/// What becomes of a page that the image cannot give. In either case the guest never gets other bytes than the image's.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Unreadable {
    /// Whoever touches the page gets SIGBUS, as for memory that has failed; the rest of the VM goes on. From Linux 6.6 on; on older kernels as
    /// [`Unreadable::End`].
    #[default]
    Poison,
    /// The service ends and says so ([`End::Unreadable`](super::End::Unreadable)). The VMM's threads that wait go on waiting: end it.
    End,
}

/// How the faults of one VMM are served.
///
/// ```
/// use offshoot::{frontend::uffd::FaultService, page::PageCount};
/// let service = FaultService { window: PageCount::new(16), ..FaultService::default() };
/// assert_eq!(service.workers, 1);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultService {
    /// Threads that answer faults. More than one pays where reading the image takes long: faults are read one at a time then.
    pub workers: u64,
    /// Pages of 4 KiB around a fault that are put with it, where they have not had their bytes yet; a power of two up to 512.
    pub window: PageCount,
    /// How long a VMM may take to say where its memory lies.
    pub handshake: Duration,
    /// What becomes of a page that the image cannot give.
    pub unreadable: Unreadable,
}

impl FaultService {
    /// The largest window.
    pub const MOST_WINDOW: PageCount = PageCount::new(512);

    /// What is wrong with it.
    pub(super) fn problem(&self) -> Option<&'static str> {
        if self.workers == 0 || self.workers > 64 {
            Some("`workers` is from 1 to 64")
        } else if !self.window.get().is_power_of_two() || self.window > Self::MOST_WINDOW {
            Some("`window` is a power of two from 1 to 512 pages")
        } else if self.handshake.is_zero() {
            Some("`handshake` is not zero")
        } else {
            None
        }
    }
}

impl Default for FaultService {
    /// One worker, one page at a time, 10 s for the hand-shake, and SIGBUS for what cannot be read.
    fn default() -> Self {
        let (window, handshake) = (PageCount::new(1), Duration::from_secs(10));
        Self { workers: 1, window, handshake, unreadable: Unreadable::Poison }
    }
}

/// What one server spends on its VMMs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerLimits {
    /// VMMs at once. One more is hung up on.
    pub vmms: u64,
    /// How each is served.
    pub service: FaultService,
}

impl Default for ServerLimits {
    /// 512 VMMs, each as [`FaultService::default`].
    fn default() -> Self {
        Self { vmms: 512, service: FaultService::default() }
    }
}
