//! What the examples share: assemblers for their guests, what a simulated vCPU needs, random numbers, and a program's beginning and end.

#![allow(dead_code, reason = "each example uses some of it")]

pub mod args;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod long_mode;
pub mod program;
pub mod random;
pub mod rv32;
pub mod sim_memory;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod x86;
