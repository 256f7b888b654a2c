//! A host that is as full as a test says, for what admission does about it. Time stands still there until the test lets it pass.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::admission::{Headroom, HostSample, HostView, MemoryLimit};
use crate::page::ByteSize;
use crate::{Limits, Tree};

/// Stands in for this process and this host, to a [`Tree`] made by [`FakeHost::tree`]. Nothing is limited until the test says so.
///
/// ```
/// use offshoot::testing::FakeHost;
/// use offshoot::{Limits, backing::Heap, page::*, ram::RamLayout, *};
/// let host = FakeHost::new();
/// host.set_available(ByteSize::mib(1), MemoryLimit::Host);
/// let tree = host.tree(Limits::default());
/// let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
/// let refused = Vm::<Heap>::new(&tree, VmName::new("vm")?, layout, vec![]).unwrap_err();
/// assert!(matches!(refused, BuildError::Refused(AdmissionError::Memory { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct FakeHost(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    now: Duration,
    sample: HostSample,
    looks: u64,
}

impl FakeHost {
    /// A host without limits.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A tree on this host.
    pub fn tree(self: &Arc<Self>, limits: Limits) -> Tree {
        Tree::on(limits, self.clone())
    }

    /// Memory mappings of the process, and how many it may have.
    pub fn set_mappings(&self, held: u64, limit: u64) {
        self.0.lock().sample.mappings = Some(Headroom { held, limit });
    }

    /// Open descriptors of the process, and how many it may have.
    pub fn set_descriptors(&self, held: u64, limit: u64) {
        self.0.lock().sample.descriptors = Some(Headroom { held, limit });
    }

    /// Memory that is available, and whose limit that is.
    pub fn set_available(&self, available: ByteSize, limit: MemoryLimit) {
        self.0.lock().sample.available = Some((available, limit));
    }

    /// Memory of the process that belongs to no file.
    pub fn set_anonymous(&self, anonymous: ByteSize) {
        self.0.lock().sample.anonymous = Some(anonymous);
    }

    /// Lets time pass.
    pub fn pass_time(&self, time: Duration) {
        self.0.lock().now += time;
    }

    /// How often it was looked at.
    pub fn looks(&self) -> u64 {
        self.0.lock().looks
    }
}

impl HostView for FakeHost {
    fn now(&self) -> Duration {
        self.0.lock().now
    }

    fn look(&self) -> HostSample {
        let mut state = self.0.lock();
        state.looks += 1;
        state.sample
    }

    fn may_be_asked_aside(&self) -> bool {
        false
    }
}
