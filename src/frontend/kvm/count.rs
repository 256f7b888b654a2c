//! Numbers of what this front end makes: vCPUs and shells.
//!
//! It knows no machine and no pool.

use crate::page::unit;

unit!(
    /// A number of vCPUs.
    VcpuCount,
    " vCPUs"
);
unit!(
    /// A number of [`Shell`](super::Shell)s.
    ShellCount,
    " shells"
);

impl VcpuCount {
    /// A machine with a single processor.
    pub const ONE: Self = Self::new(1);

    /// How many there are in a list.
    pub(super) const fn of<T>(vcpus: &[T]) -> Self {
        Self::new(vcpus.len() as u64)
    }
}
