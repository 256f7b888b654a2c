//! The live side: creating, reading, writing and zeroing one space.

use super::Bench;
use crate::backing::{Allocation, Backing, Extent, Sealed, Tree};
use crate::image::Source;
use crate::page::{ByteOffset, PageCount, PageIndex, PageRange, PageSet};
use crate::testing::pair::{Pair, broken, check_geometry_error, geometry, ok, on_a_tree, pages};
use crate::testing::{ByteSource, Dice};
use std::sync::Arc;

impl<B: Backing> Bench<B> {
    pub(super) fn creates(&self, tree: &Tree) {
        let pair = self.space(tree);
        pair.check("just created");
        if !ok("dirty", pair.space.dirty()).is_empty() {
            broken("dirty", "a new space has no dirty pages");
        }
        let origin = pair.space.origin();
        let mut found = vec![1; pair.now.geometry().len().get() as usize];
        ok("read of an image", origin.read(ByteOffset::ZERO, &mut found));
        if pair.now.first_difference(&found).is_some() {
            broken("origin", "a new space's origin must read as the space did when it was created");
        }
        ok("flush", pair.space.flush());
        // Reading changes nothing.
        pair.check("after reading");
    }

    pub(super) fn base_too_long(&self, tree: &Tree) {
        let shape = geometry(self.size, 2);
        for over in [1, self.page()] {
            let base: Arc<dyn Source> = Arc::new(ByteSource::new(vec![1; (2 * self.page() + over) as usize]));
            check_geometry_error("create over a base longer than the space", B::create(tree, shape, Some(base)));
        }
    }

    /// Every offset around every kind of boundary, every short length, and runs over several pages.
    pub(super) fn every_alignment(&self, tree: &Tree) {
        let mut dice = Dice::new(self.page());
        let mut pair = self.space(tree);
        let _image = pair.cut();
        let page = self.page();
        for boundary in [page, 2 * page, 3 * page] {
            // The first write to each page is a short one at another place each time.
            for skew in -9i64..=9 {
                let at = boundary.wrapping_add_signed(skew);
                for len in [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 23] {
                    pair.write(at, &dice.bytes(len));
                    pair.check_read(at - 32, len + 64, "around a short write");
                }
            }
        }
        pair.check("after short writes");
        let mut fresh = self.space(tree);
        for (at, len) in [(page - 1, page + 2), (3, 2 * page), (0, 3 * page), (page / 2, page), (page, page)] {
            fresh.write(at, &dice.bytes(len));
            fresh.check("after a write across pages");
        }
    }

    pub(super) fn the_end(&self, tree: &Tree) {
        let mut pair = self.space(tree);
        let len = pair.now.geometry().len().get();
        pair.write(len - 5, &[1, 2, 3, 4, 5]);
        pair.write(len, &[]);
        pair.check_read(len, 0, "at the end");
        for (at, bytes) in
            [(len, 1), (len - 1, 2), (len - self.page(), self.page() + 1), (u64::MAX, 1), (u64::MAX - 7, 16)]
        {
            let at = ByteOffset::new(at);
            check_geometry_error("write past the end", pair.space.write(at, &vec![0xee; bytes as usize]));
            check_geometry_error("read past the end", pair.space.read(at, &mut vec![0; bytes as usize]));
        }
        let last = self.count();
        for range in [pages(last, 1), pages(last - 1, 2), pages(0, last + 1), pages(u64::MAX - 1, 1)] {
            check_geometry_error("zero past the end", pair.space.zero(range));
        }
        pair.check("after calls that must change nothing");
    }

    pub(super) fn zeroes(&self, tree: &Tree) {
        let (page, last) = (self.page(), self.count() - 1);
        let mut dice = Dice::new(77);
        let mut pair = self.space(tree);
        pair.write(0, &dice.bytes(3 * page));
        pair.zero(pages(1, 1));
        pair.check("after zeroing a private page");
        pair.zero(pages(2, 0));
        pair.check("after zeroing nothing");
        let _image = pair.cut();
        pair.zero(pages(0, 2));
        pair.check("after zeroing shared pages");
        // What was below must not show through beside a short write.
        pair.write(7, b"x");
        pair.write(page - 1, b"yz");
        pair.check("after short writes to zeroed pages");
        let image = pair.cut();
        let mut clone = image.spawn();
        clone.check("a clone of zeroed pages");
        clone.write(page + 100, b"w");
        clone.zero(pages(last, 1));
        clone.check("a clone that wrote and zeroed");
        clone.zero(pages(0, last + 1));
        clone.check("all zero");
        if ok("usage", clone.space.usage()).shared.get() != 0 {
            broken("usage", "a space that was zeroed whole shares nothing");
        }
        clone.write(2 * page + 1, b"v");
        clone.check("written after all was zero");
        image.check("whose clone was zeroed");
        pair.check("whose clone was zeroed");
    }
}

/// A large, nearly empty space: every place in it works, and costs by what was written.
pub(super) fn far_apart<B: Backing>(size: crate::page::PageSize) {
    on_a_tree(crate::Limits::default(), |tree| {
        // Two gigabytes at 4 KiB: 16 times what one middle table of 32,768 pages covers.
        let count = if size.bytes().get() == 4096 { 1 << 19 } else { 1 << 10 };
        let shape = geometry(size, count);
        let space = ok("create", B::create(tree, shape, None));
        let step = count / 16;
        let places: Vec<PageIndex> =
            (0..16).flat_map(|n| [n * step, n * step + 1, n * step + step - 1]).map(PageIndex::new).collect();
        let write = |space: &B, tag: u64| {
            for page in &places {
                ok("write", space.write(size.start_of(*page), &(page.get() ^ tag).to_le_bytes()));
            }
        };
        let check = |space: &B, tag: u64| {
            for page in &places {
                let mut found = [0; 8];
                ok("read", space.read(size.start_of(*page), &mut found));
                if u64::from_le_bytes(found) != page.get() ^ tag {
                    broken("read", format_args!("{page:?} of a large space does not hold what was written"));
                }
            }
        };
        let want: PageSet = places.iter().copied().collect();
        write(&space, 1 << 40);
        if ok("dirty", space.dirty()) != want {
            broken("dirty", "of a large space with a few pages written, exactly those are dirty");
        }
        for (from, to) in [(0, count), (0, 1), (step, step + 1), (step - 1, 5 * step), (7, count - 1), (3, 3)] {
            let range = PageRange::from_bounds(PageIndex::new(from), PageIndex::new(to));
            let within: PageSet = places.iter().copied().filter(|page| range.contains(*page)).collect();
            if ok("dirty_in", space.dirty_in(range)) != within {
                broken("dirty_in", format_args!("{range:?}: not what of the dirty pages lies there"));
            }
            told(&space, range, &within);
        }
        let (image, deferred) = crate::backing::Cut::commit(ok("cut", space.cut()));
        drop(deferred);
        let clone = ok("spawn", image.spawn());
        write(&clone, 2 << 40);
        check(&space, 1 << 40);
        check(&clone, 2 << 40);
        let usage = ok("usage", clone.usage());
        let rest = usage.shared.get() + usage.zero.get();
        if (usage.private.get(), rest) != (want.count().get(), count - want.count().get()) {
            broken("usage", format_args!("a clone that wrote {} of {count} pages says {usage:?}", want.count()));
        }
        let half = PageRange::from_bounds(PageIndex::new(count / 2), PageIndex::new(count));
        ok("zero", clone.zero(half));
        for page in &places {
            let mut found = [1; 8];
            ok("read", clone.read(size.start_of(*page), &mut found));
            let want = if half.contains(*page) { 0 } else { page.get() ^ 2 << 40 };
            if u64::from_le_bytes(found) != want {
                broken("zero", format_args!("{page:?} is wrong after half of a large space was zeroed"));
            }
        }
        ok("reset", clone.reset());
        check(&clone, 1 << 40);
        clone.validate().unwrap_or_else(|wrong| broken("validate", wrong));
    });
}

impl<B: Backing> Pair<B> {
    /// One random step of its own.
    pub(super) fn random_step(&mut self, dice: &mut Dice) {
        let geometry = self.now.geometry();
        let (page, count) = (geometry.page_size().bytes().get(), geometry.pages().get());
        match dice.below(8) {
            0 => {
                let first = dice.below(count);
                self.zero(pages(first, dice.below(count - first + 1)));
            }
            1 => self.reset(),
            2 => self.roll_back(),
            3 => {
                let at = dice.below(count) * page;
                self.write(at, &dice.bytes(page));
            }
            4 => {
                // Back to what it was: dirty, and not different.
                let at = PageIndex::new(dice.below(count));
                let old = self.origin.page(at).to_vec();
                self.write(geometry.page_size().start_of(at).get(), &old);
            }
            _ => {
                let at = dice.below(geometry.len().get());
                let len = dice.below((2 * page).min(geometry.len().get() - at) + 1);
                self.write(at, &dice.bytes(len));
            }
        }
    }
}

/// What `allocation` says of `range`, in a space of zeroes where only `data` was written.
fn told<B: Backing>(space: &B, range: PageRange, data: &PageSet) {
    let mut at = range.start();
    for Extent { pages, state } in ok("allocation", space.allocation(range)) {
        if pages.start() != at || pages.is_empty() {
            broken("allocation", format_args!("{pages:?} does not go on from {at:?}"));
        }
        at = pages.end();
        if state == Allocation::Zero && data.count_in(pages) != PageCount::ZERO {
            broken("allocation", format_args!("{pages:?} are told to be zeroes, and were written"));
        }
        if state == Allocation::Base {
            broken("allocation", format_args!("{pages:?} are told to be of a base image, where there is none"));
        }
    }
    if at != range.end() {
        broken("allocation", format_args!("{range:?} is told of to {at:?} only"));
    }
}
