//! An allocator that knows how much was ever held at once: the oracle for "allocates no more than a small multiple".
//!
//! Why unsafe code is used here: implementing [`GlobalAlloc`] is unsafe by nature. It only counts and passes on.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Install it with `#[global_allocator]`.
pub struct Peak;

// SAFETY: every call is passed on to the system's allocator unchanged, so its contract is kept by whoever keeps ours.
unsafe impl GlobalAlloc for Peak {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed).wrapping_add(layout.size()), Relaxed);
        // SAFETY: the caller's layout, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's pointer and layout, passed on; `alloc` got it from the same allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// The most that `work` held at once beyond what was held before it. Meaningful where no other thread allocates.
pub fn during<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let value = work();
    (value, PEAK.load(Relaxed).saturating_sub(before))
}
