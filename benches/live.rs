//! The pause of a live re-fork beside stop-and-copy: a VM of 1 GiB, all of it touched, 30 MiB dirty since the last fork, a writer
//! going on at 100 MiB/s through every fork.
//!
//! `cargo bench --bench live [-- RUNS]`. Prints p50, p99 and the worst of the engine's part of the pause (`ForkTimings::cut`) and of all of it
//! (`ForkTimings::stopped`, with parking the writer in it), for contiguous and for scattered dirty pages.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "live/scenario.rs"]
mod scenario;

fn main() {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    scenario::run();
}
