//! What is measured: spaces and VMs of a given size, filled, and a guest that does nothing. Must not measure.

use offshoot::backing::{Backing, Cut};
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageIndex, PageSize};
use offshoot::{Limits, Tree};

use super::report::Skip;
use super::sample::Random;

pub const PAGE: u64 = 4096;

/// A tree that no number of samples exhausts.
pub fn tree() -> Tree {
    Tree::new(Limits { depth: u32::MAX - 1, ..Limits::default() })
}

/// "64 MiB", "8 GiB".
pub fn size_name(size: ByteSize) -> String {
    let mib = size.get() >> 20;
    if mib >= 1024 && mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

pub fn geometry(len: ByteSize) -> Result<Geometry, Skip> {
    Ok(Geometry::new(len, PageSize::KIB_4)?)
}

/// The first byte of a page.
pub fn at(page: u64) -> ByteOffset {
    PageSize::KIB_4.start_of(PageIndex::new(page))
}

/// A space of `len`, nothing written.
pub fn empty<B: Backing>(len: ByteSize) -> Result<B, Skip> {
    Ok(B::create(&tree(), geometry(len)?, None)?)
}

/// Writes every page of a space, each with other bytes.
pub fn fill<B: Backing>(space: &B) -> Result<(), Skip> {
    let mut random = Random::new(1);
    let mut page = [0; PAGE as usize];
    for index in 0..space.geometry().pages().get() {
        for chunk in page.as_chunks_mut::<8>().0 {
            *chunk = random.next().to_ne_bytes();
        }
        space.write(at(index), &page)?;
    }
    Ok(())
}

/// Cuts a space and does at once what the cut put off.
pub fn cut<B: Backing>(space: &B) -> Result<B::Sealed, Skip> {
    let (image, deferred) = space.cut()?.commit();
    drop(deferred);
    Ok(image)
}
