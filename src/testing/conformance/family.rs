//! Relatives: cuts, clones, images, and who may see what of whom.

use super::Bench;
use crate::backing::{Backing, Cut, Sealed, Tree};
use crate::error::SpaceError;
use crate::page::{ByteSize, PageSize};
use crate::testing::Dice;
use crate::testing::pair::{ImagePair, Pair, broken, check_unrelated, geometry, ok, on_a_tree, pages, refused};

impl<B: Backing> Bench<B> {
    /// A space with something in private, shared, zeroed and untouched pages.
    fn lived_in(&self, tree: &Tree, dice: &mut Dice) -> (Pair<B>, ImagePair<B>) {
        let page = self.page();
        let mut pair = self.space(tree);
        pair.write(10, &dice.bytes(page));
        pair.zero(pages(2, 1));
        let image = pair.cut();
        pair.write(page + 5, &dice.bytes(9));
        (pair, image)
    }

    pub(super) fn cut_and_commit(&self, tree: &Tree) {
        let mut dice = Dice::new(1);
        let (mut pair, first) = self.lived_in(tree, &mut dice);
        let second = pair.cut();
        if !ok("dirty", pair.space.dirty()).is_empty() {
            broken("dirty", "after a cut no page is dirty");
        }
        pair.check("after a cut");
        let third = pair.cut();
        third.check_diff(&second, "two cuts with nothing between");
        pair.write(0, &dice.bytes(3 * self.page()));
        pair.zero(pages(1, 2));
        for image in [&first, &second, &third] {
            image.check("whose space wrote on");
        }
        if first.image.same(&second.image) || !first.image.same(&first.image.clone()) {
            broken("same", "an image is the same as its own handles and as no other cut");
        }
        super::source(&second.image, second.flat.bytes());
        pair.check("after three cuts");
    }

    pub(super) fn cut_and_drop(&self, tree: &Tree) {
        let mut dice = Dice::new(2);
        // Before the first commit there may be other machinery underneath than after it.
        let mut pair = self.space(tree);
        pair.roll_back();
        pair.write(3, &dice.bytes(self.page()));
        pair.roll_back();
        let (mut pair, image) = self.lived_in(tree, &mut dice);
        for _ in 0..3 {
            pair.zero(pages(0, 1));
            pair.roll_back();
            pair.write(self.page() - 3, &dice.bytes(6));
            pair.roll_back();
        }
        image.check("whose space dropped a cut");
        let later = pair.cut();
        later.check("cut after dropped cuts");
        later.check_diff(&image, "across dropped cuts");
    }

    pub(super) fn siblings(&self, tree: &Tree) {
        let mut dice = Dice::new(3);
        let (mut pair, image) = self.lived_in(tree, &mut dice);
        let mut clones: Vec<_> = (0..4).map(|_| image.spawn()).collect();
        pair.check("whose clones were spawned");
        for at in 0..clones.len() {
            clones[at].write(at as u64 * 3, &dice.bytes(self.page()));
            clones[at].zero(pages(at as u64 % 4, 1));
            pair.write(at as u64 * 2, &dice.bytes(self.page()));
            clones.iter().for_each(|clone| clone.check("while siblings and the parent write"));
            image.check("while clones and the parent write");
        }
        pair.check("while clones write");
        // Nobody depends on the parent, nor on the image that names what they share.
        drop(pair);
        drop(image);
        clones.iter().for_each(|clone| clone.check("after the parent and the image are gone"));
        let grandchild = clones[1].cut().spawn();
        clones.clear();
        grandchild.check("after all its ancestors are gone");
    }

    pub(super) fn resets(&self, tree: &Tree) {
        let mut dice = Dice::new(4);
        let mut blank = self.space(tree);
        blank.write(1, &dice.bytes(2 * self.page()));
        blank.reset();
        blank.check("reset to what it was created as");
        let (mut pair, image) = self.lived_in(tree, &mut dice);
        let mut clone = image.spawn();
        clone.reset();
        clone.check("reset with nothing to drop");
        // One byte in each of several pages: counted as pages, whatever they are made of.
        for page in (0..self.count()).step_by(2) {
            clone.write(page * self.page() + 17, b"b");
        }
        clone.zero(pages(0, 1));
        clone.write(4, b"zeroed and written");
        clone.reset();
        clone.check("after one byte in each of several pages");
        for _ in 0..3 {
            clone.write(self.page() - 2, &dice.bytes(self.page() + 4));
            clone.zero(pages(0, 1));
            clone.zero(pages(self.count() - 1, 1));
            pair.check("while a clone writes");
            clone.reset();
            clone.check("after a reset");
        }
        clone.write(0, b"again");
        clone.check("written after a reset");
        pair.reset();
        pair.check("the parent, after its own reset");
        image.check("after resets on both sides");
    }

    pub(super) fn diffs(&self, tree: &Tree) {
        let mut dice = Dice::new(5);
        let (mut pair, first) = self.lived_in(tree, &mut dice);
        let mut clone = first.spawn();
        clone.write(2 * self.page() + 1, b"clone");
        clone.zero(pages(0, 1));
        let same = first.flat.page(crate::page::PageIndex::new(3)).to_vec();
        clone.write(3 * self.page(), &same);
        let mine = clone.cut();
        // Pages that nobody wrote, between pages that somebody did.
        let mut gaps = first.spawn();
        for page in (0..self.count()).step_by(2) {
            gaps.write(page * self.page() + 8, b"gap");
        }
        let gaps = gaps.cut();
        let second = pair.cut();
        for (a, b, when) in [
            (&first, &first, "with itself"),
            (&first, &second, "parent and child"),
            (&mine, &second, "cousins"),
            (&first, &gaps, "every other page"),
            (&mine, &gaps, "siblings"),
            (&first, &mine, "fork point and clone's"),
        ] {
            a.check_diff(b, when);
        }
        let stranger = self.space(tree).cut();
        check_unrelated("diff with another family", first.image.diff(&stranger.image));
    }

    pub(super) fn flattens(&self, tree: &Tree) {
        let mut dice = Dice::new(6);
        let (mut pair, image) = self.lived_in(tree, &mut dice);
        let tip = pair.cut();
        let flat = tip.flatten();
        flat.check("flattened");
        check_unrelated("diff with a flattened copy", flat.image.diff(&tip.image));
        if flat.image.depth() > tip.image.depth() {
            broken("flatten", "a flattened image is not deeper than what it was made from");
        }
        let mut clone = flat.spawn();
        clone.check("a clone of a flattened image");
        let usage = ok("usage", clone.space.usage());
        if usage.zero.get() != flat.flat.zero_pages() {
            broken("flatten", format_args!("pages of zeroes are left out: {usage:?}"));
        }
        drop((pair, image, tip));
        clone.write(self.page() - 1, b"on");
        clone.check("after all that it was flattened from is gone");
        clone.cut().check("cut from a clone of a flattened image");
        flat.check("whose clone wrote");
    }

    pub(super) fn merges(&self, tree: &Tree) {
        let mut dice = Dice::new(7);
        let (mut pair, first) = self.lived_in(tree, &mut dice);
        let second = pair.cut();
        pair.write(2 * self.page() - 4, &dice.bytes(8));
        pair.zero(pages(0, 1));
        let third = pair.cut();
        let merged = third.merge_onto(&first);
        merged.check("merged");
        if merged.image.depth() != first.image.depth() + 1 {
            broken(
                "merge_onto",
                format_args!("merged onto depth {}, it is at {}", first.image.depth(), merged.image.depth()),
            );
        }
        merged.check_diff(&first, "merged and its ancestor");
        merged.check_diff(&second, "merged and a layer it took up");
        let sibling = first.spawn().cut();
        check_unrelated("merge onto a sibling", second.image.merge_onto(&sibling.image));
        check_unrelated("merge onto itself", second.image.merge_onto(&second.image));
        check_unrelated("merge onto a descendant", first.image.merge_onto(&second.image));
        check_unrelated("merge onto another family", second.image.merge_onto(&self.space(tree).cut().image));
        drop((pair, first, second, third));
        let mut clone = merged.spawn();
        clone.write(1, b"on");
        clone.check("a clone of a merged image, all others gone");
        let tip = clone.cut();
        tip.check_diff(&merged, "across a merge");
        tip.merge_onto(&merged).check("merged again");
    }

    /// Whatever goes first, the rest stays right and at the end nothing is left.
    pub(super) fn any_order_of_dropping(&self, tree: &Tree) {
        for seed in 0..8 {
            let mut dice = Dice::new(seed);
            let (mut pair, first) = self.lived_in(tree, &mut dice);
            let mut clone = first.spawn();
            clone.write(5, &dice.bytes(self.page()));
            let second = clone.cut();
            let mut deep = second.spawn();
            deep.write(self.page(), b"deep");
            pair.write(2, b"parent");
            let mut spaces = vec![pair, clone, deep];
            let mut images = vec![first.flatten(), second.merge_onto(&first), first, second];
            while !spaces.is_empty() || !images.is_empty() {
                let gone = dice.below((spaces.len() + images.len()) as u64) as usize;
                if gone < spaces.len() {
                    drop(spaces.swap_remove(gone));
                } else {
                    drop(images.swap_remove(gone - spaces.len()));
                }
                spaces.iter().for_each(|space| space.check("after a relative was dropped"));
                images.iter().for_each(|image| image.check("after a relative was dropped"));
            }
            crate::testing::pair::check_empty(tree, "after dropping a family in a random order");
        }
    }

    /// Everything at once, in an order nobody thought of.
    pub(super) fn random_walk(&self, tree: &Tree, seed: u64) {
        let mut dice = Dice::new(seed + 1000);
        let mut spaces = vec![self.space(tree)];
        let mut images: Vec<ImagePair<B>> = Vec::new();
        let steps = if self.page() == 4096 { 60 } else { 20 };
        for _ in 0..steps {
            let at = dice.below(spaces.len() as u64) as usize;
            match dice.below(8) {
                0 => images.push(spaces[at].cut()),
                1 if !images.is_empty() => {
                    let from = dice.below(images.len() as u64) as usize;
                    spaces.push(images[from].spawn());
                }
                2 if spaces.len() > 1 => drop(spaces.swap_remove(at)),
                3 if images.len() > 2 => {
                    let gone = dice.below(images.len() as u64) as usize;
                    drop(images.swap_remove(gone));
                }
                _ => {
                    spaces[at].random_step(&mut dice);
                    spaces[at].check("in a random walk");
                }
            }
        }
        spaces.iter().for_each(|space| space.check("at the end of a random walk"));
        images.iter().for_each(|image| image.check("at the end of a random walk"));
        for (at, a) in images.iter().enumerate() {
            images[..at].iter().for_each(|b| a.check_diff(b, "at the end of a random walk"));
        }
    }
}

/// At the limit a cut is refused by name, and the space goes on.
pub(super) fn depth_limit<B: Backing>() {
    let size = [4 << 10, 16 << 10, 128 << 10, 2 << 20]
        .into_iter()
        .filter_map(|bytes| PageSize::new(ByteSize::new(bytes)).ok())
        .find(|size| super::supports::<B>(*size))
        .unwrap_or_default();
    on_a_tree(crate::Limits { depth: 2, ..crate::Limits::default() }, |tree| {
        let mut pair: Pair<B> = Pair::create(tree, geometry(size, 3), None);
        let first = pair.cut();
        pair.write(1, b"one");
        let second = pair.cut();
        pair.write(2, b"two");
        match refused("cut at the depth limit", pair.space.cut().map(Cut::commit)) {
            SpaceError::DepthLimit { depth: 3, limit: 2 } => {}
            error => broken("depth limit", format_args!("must be SpaceError::DepthLimit with 3 and 2, not: {error}")),
        }
        pair.check("after a cut at the depth limit");
        pair.write(3, b"three");
        pair.check("written after a cut at the depth limit");
        second.check("whose space met the depth limit");
        // A merged or flattened line has room again.
        let mut clone = second.flatten().spawn();
        clone.write(0, b"flat");
        clone.cut().check("cut after flattening");
        let _room = first.spawn().cut();
    });
}
