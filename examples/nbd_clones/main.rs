//! One raw image, N clones, N exports on one Unix socket: a disk for each of N virtual machines, none of which copies anything.
//!
//! ```text
//! cargo run --release --features nbd --example nbd_clones -- --image disk.img --clones 8 --socket /run/clones.sock
//! cargo run --release --features nbd --example nbd_clones -- --check      writes to each clone over NBD, and verifies them all
//! cargo run --release --features nbd,store --example nbd_clones -- --image disk.img --clones 8 --store DIR      clones that last
//! ```
//!
//! With `--store` the clones lie in a clone store: the first run makes them of the image, later ones go on with them, and what was flushed survives a
//! kill. Without it they are in memory, and gone with the program. A client then opens `nbd+unix:///clone-3?socket=/run/clones.sock`. Ends at Ctrl-C, or when its standard input is closed with `--until-eof`, and leaves no
//! socket file. `--check` needs no other program: it has a small client of its own.

#[cfg(all(feature = "nbd", unix))]
mod client;
#[cfg(all(feature = "nbd", feature = "store", unix))]
mod durable;
#[cfg(all(feature = "nbd", unix))]
#[path = "../common/guard.rs"]
mod guard;
#[cfg(all(feature = "nbd", unix))]
mod serve;

#[cfg(all(feature = "nbd", unix))]
fn main() -> std::process::ExitCode {
    serve::main()
}

#[cfg(not(all(feature = "nbd", unix)))]
fn main() {
    eprintln!("nbd_clones needs feature `nbd`, on a Unix");
}
