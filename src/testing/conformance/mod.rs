//! What every backing and every base image must do, checked from outside, against the naive model.
//!
//! [`backing`] and [`source`] panic at the first rule that is broken, with the rule's name. They need no knowledge of
//! how pages are kept, and use nothing that is not public. Every check ends with its tree empty.

mod access;
mod family;
mod source;
mod together;

pub use source::source;

use super::pair::{Pair, broken, geometry, on_a_tree};
use crate::backing::{Backing, Tree};
use crate::error::SpaceError;
use crate::page::{ByteSize, PageSize};

/// Checks a backing: every rule in the contract of [`Backing`], [`Cut`](crate::backing::Cut) and
/// [`Sealed`](crate::backing::Sealed), over every page size that it has, with and without a base image.
///
/// # Panics
/// At the first rule that is broken.
pub fn backing<B: Backing>() {
    let mut supported = 0;
    for bytes in [4 << 10, 16 << 10, 128 << 10, 2 << 20] {
        let Ok(size) = PageSize::new(ByteSize::new(bytes)) else { unreachable!("all are powers of two in range") };
        if !supports::<B>(size) {
            continue;
        }
        supported += 1;
        let page = bytes;
        // Short bases end within a page, at the end of one, and one byte into one.
        let lens = [None, Some(0), Some(1), Some(page), Some(2 * page + 1234), Some(Bench::<B>::pages(size) * page)];
        for (at, len) in lens.into_iter().enumerate() {
            // One base is enough for the pages that take long to compare.
            if bytes <= 16 << 10 || matches!(at, 0 | 4) {
                Bench::<B>::new(size, len).run();
            }
        }
        access::far_apart::<B>(size);
    }
    if supported == 0 {
        broken("page size", "the backing has none of 4 KiB, 16 KiB, 128 KiB and 2 MiB");
    }
    family::depth_limit::<B>();
    together::run::<B>();
}

/// Whether the backing has this page size; if not, it must say so in the one way that callers know.
fn supports<B: Backing>(size: PageSize) -> bool {
    let mut answer = false;
    on_a_tree(crate::Limits::default(), |tree| {
        answer = match B::create(tree, geometry(size, 1), None) {
            Ok(_) => true,
            Err(SpaceError::PageSize { size: named, .. }) if named == size => false,
            Err(error) => broken(
                "page size",
                format_args!("a size that is not supported must be SpaceError::PageSize, not: {error}"),
            ),
        }
    });
    answer
}

/// One page size and one base.
struct Bench<B> {
    size: PageSize,
    base: Option<Vec<u8>>,
    _backing: std::marker::PhantomData<B>,
}

impl<B: Backing> Bench<B> {
    /// Enough to cross a leaf of 64 slots where that is cheap.
    fn pages(size: PageSize) -> u64 {
        match size.bytes().get() {
            4096 => 70,
            16384 => 9,
            _ => 4,
        }
    }

    fn new(size: PageSize, base_len: Option<u64>) -> Self {
        let base = base_len.map(|len| super::Dice::new(len).bytes(len));
        Self { size, base, _backing: std::marker::PhantomData }
    }

    fn page(&self) -> u64 {
        self.size.bytes().get()
    }

    fn count(&self) -> u64 {
        Self::pages(self.size)
    }

    fn space(&self, tree: &Tree) -> Pair<B> {
        Pair::create(tree, geometry(self.size, self.count()), self.base.as_deref())
    }

    fn run(&self) {
        let checks: [fn(&Self, &Tree); 13] = [
            Self::creates,
            Self::base_too_long,
            Self::every_alignment,
            Self::the_end,
            Self::zeroes,
            Self::cut_and_commit,
            Self::cut_and_drop,
            Self::siblings,
            Self::resets,
            Self::diffs,
            Self::flattens,
            Self::merges,
            Self::any_order_of_dropping,
        ];
        for check in checks {
            on_a_tree(crate::Limits::default(), |tree| check(self, tree));
        }
        for seed in 0..if self.page() == 4096 { 6 } else { 1 } {
            on_a_tree(crate::Limits::default(), |tree| self.random_walk(tree, seed));
        }
    }
}
