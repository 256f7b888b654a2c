//! QEMU's saved state, as far as a fork of a clone reads it: whole, and cut in two as a first state and a state of devices.
//!
//! No input may panic; what is made of two has the first one's head.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::frontend::qemu::fuzz_stream;

fuzz_target!(|data: &[u8]| fuzz_stream(data));
