//! Durable disks pass the suite for backings, on real files.

#![cfg(unix)]

use offshoot::store::Durable;
use offshoot::testing::conformance;

#[test]
fn durable_disks_conform() {
    conformance::backing::<Durable>();
}
