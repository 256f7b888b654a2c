//! Fork running virtual machines: RAM, disks and device state cut at one instant, and any number of clones that share
//! every page with their parent until one of them writes.

pub mod frontend;
pub mod page;
mod sys;
