//! Our own backings pass the conformance suite, and backings that are wrong in one way each do not.

use offshoot::backing::{AnyPage, Heap};
use offshoot::testing::{ByteSource, Dice, conformance};

#[test]
fn the_heap_of_4k_pages_conforms() {
    conformance::backing::<Heap>();
}

#[test]
fn the_heap_of_any_pages_conforms() {
    conformance::backing::<Heap<AnyPage>>();
}

#[test]
fn a_source_of_bytes_conforms() {
    for len in [0, 1, 511, 4096, 10_000] {
        let bytes = Dice::new(len).bytes(len);
        conformance::source(&ByteSource::new(bytes.clone()), &bytes);
    }
}
