//! Which layer each page of an image lies on: what a clone maps.
//!
//! An index says *which bytes* a page holds, a map says *where they lie*. Bytes that move to another layer keep their place in the
//! space, so a merge makes another map of the same index. A map is small (its extents are limited) and never changes; a new one is made
//! of an old one in one pass. Must not know what the pages hold, nor when layers are merged.

use std::sync::Arc;

use super::layer::Layer;
use crate::page::{PageCount, PageIndex, PageRange, PageSet};

/// The layers of an image, page by page.
#[derive(Clone, Debug)]
pub(super) struct LayerMap {
    pages: PageCount,
    /// In the order in which they were made. Each has an extent.
    layers: Vec<Held>,
    /// Ascending from page 0, each up to the next. No two neighbours lie on one layer.
    extents: Vec<Extent>,
}

/// A layer, and how much of it is in sight.
#[derive(Clone, Debug)]
struct Held {
    layer: Arc<Layer>,
    pages: PageCount,
    extents: u64,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    start: PageIndex,
    /// Into `layers`.
    layer: usize,
}

/// A map under construction.
struct Draft {
    layers: Vec<Arc<Layer>>,
    extents: Vec<Extent>,
}

impl Draft {
    /// From this page on.
    fn push(&mut self, start: PageIndex, layer: usize) {
        if self.extents.last().is_none_or(|last| last.layer != layer) {
            self.extents.push(Extent { start, layer });
        }
    }

    /// Forgets the layers that are out of sight.
    fn finish(self, pages: PageCount) -> LayerMap {
        let layers = self.layers.into_iter().map(|layer| Held { layer, pages: PageCount::ZERO, extents: 0 }).collect();
        let mut map = LayerMap { pages, layers, extents: self.extents };
        for at in 0..map.extents.len() {
            let (run, layer) = map.extent(at);
            let held = &mut map.layers[layer];
            (held.pages, held.extents) = (held.pages.saturating_add(run.count()), held.extents + 1);
        }
        if map.layers.iter().any(|held| held.extents == 0) {
            let mut renumbered = vec![0; map.layers.len()];
            let kept = (0..map.layers.len()).filter(|at| map.layers[*at].extents > 0);
            kept.enumerate().for_each(|(to, from)| renumbered[from] = to);
            map.extents.iter_mut().for_each(|extent| extent.layer = renumbered[extent.layer]);
            map.layers.retain(|held| held.extents > 0);
        }
        map
    }
}

impl LayerMap {
    /// Everything on one layer.
    pub(super) fn uniform(pages: PageCount, layer: Arc<Layer>) -> Self {
        Draft { layers: vec![layer], extents: vec![Extent { start: PageIndex::ZERO, layer: 0 }] }.finish(pages)
    }

    /// Kernel mappings of a clone.
    pub(super) fn mappings(&self) -> u64 {
        self.extents.len() as u64
    }

    /// How many layers there are.
    pub(super) fn layers(&self) -> u32 {
        self.layers.len() as u32
    }

    fn extent(&self, at: usize) -> (PageRange, usize) {
        let end = self.extents.get(at + 1).map_or(PageIndex::new(self.pages.get()), |next| next.start);
        (PageRange::from_bounds(self.extents[at].start, end), self.extents[at].layer)
    }

    fn all(&self) -> impl Iterator<Item = (PageRange, usize)> + '_ {
        (0..self.extents.len()).map(|at| self.extent(at))
    }

    /// The runs of `range` that lie on one layer each. O(log extents), plus what is found.
    pub(super) fn runs(&self, range: PageRange) -> impl Iterator<Item = (PageRange, &Arc<Layer>)> + '_ {
        let first = self.extents.partition_point(|extent| extent.start <= range.start()).saturating_sub(1);
        let found = (first..self.extents.len()).map(|at| self.extent(at));
        let meeting = found.take_while(move |(run, _)| run.start() < range.end());
        meeting
            .map(move |(run, layer)| (run.intersect(range), &self.layers[layer].layer))
            .filter(|(run, _)| !run.is_empty())
    }

    /// Which of these pages lie on each layer that any of them lies on.
    pub(super) fn by_layer(&self, pages: &PageSet) -> Vec<(&Arc<Layer>, PageSet)> {
        let mut there = vec![PageSet::new(); self.layers.len()];
        let mut extents = self.all().peekable();
        for run in pages.runs() {
            while let Some((extent, layer)) = extents.peek().copied().filter(|(extent, _)| extent.start() < run.end()) {
                let here = extent.intersect(run);
                if !here.is_empty() {
                    there[layer].push(here);
                }
                // One that reaches past this run may meet the next one too.
                if extent.end() > run.end() {
                    break;
                }
                extents.next();
            }
        }
        let all = self.layers.iter().map(|held| &held.layer).zip(there);
        all.filter(|(_, pages)| !pages.is_empty()).collect()
    }

    /// The layer to map first, over everything, and the extents to lay over it: every piece of the layer in most pieces is one saved.
    pub(super) fn plan(&self) -> (&Arc<Layer>, Vec<(PageRange, &Arc<Layer>)>) {
        let most = self.layers.iter().enumerate().max_by_key(|(_, held)| (held.extents, held.pages));
        let base = most.map_or(0, |(at, _)| at);
        let over = self.all().filter(|(_, layer)| *layer != base);
        (&self.layers[base].layer, over.map(|(run, layer)| (run, &self.layers[layer].layer)).collect())
    }

    /// This map with a layer laid over `pages`. O(extents and runs).
    pub(super) fn with(&self, pages: &PageSet, layer: Arc<Layer>) -> Self {
        if pages.is_empty() {
            return self.clone();
        }
        let top = self.layers.iter().position(|held| Arc::ptr_eq(&held.layer, &layer)).unwrap_or(self.layers.len());
        let mut layers: Vec<_> = self.layers.iter().map(|held| held.layer.clone()).collect();
        if top == layers.len() {
            layers.push(layer);
        }
        let mut draft = Draft { layers, extents: Vec::with_capacity(self.extents.len() + 2 * pages.runs().len()) };
        let mut above = pages.runs().peekable();
        let mut done = PageIndex::ZERO;
        for (run, below) in self.all() {
            while let Some(over) = above.next_if(|over| over.start() < run.end()) {
                if done.max(run.start()) < over.start() {
                    draft.push(done.max(run.start()), below);
                }
                draft.push(over.start(), top);
                done = over.end();
            }
            if done < run.end() {
                draft.push(done.max(run.start()), below);
            }
        }
        draft.finish(self.pages)
    }

    /// This map, made of `old` by laying layers over it, as it would be made of `new`, which shows the same bytes as `old`. O(extents).
    pub(super) fn moved(&self, old: &Self, new: &Self) -> Self {
        let place = |layers: &[Held], of: &Held| layers.iter().position(|held| Arc::ptr_eq(&held.layer, &of.layer));
        let in_old: Vec<_> = self.layers.iter().map(|held| place(&old.layers, held)).collect();
        let mut layers: Vec<_> = self.layers.iter().map(|held| held.layer.clone()).collect();
        let in_all: Vec<_> = new
            .layers
            .iter()
            .map(|held| {
                place(&self.layers, held).unwrap_or_else(|| {
                    layers.push(held.layer.clone());
                    layers.len() - 1
                })
            })
            .collect();
        let mut draft = Draft { layers, extents: Vec::with_capacity(self.extents.len()) };
        let (mut before, mut after) = (old.all().peekable(), new.all().peekable());
        let end = PageIndex::new(self.pages.get());
        for (run, layer) in self.all() {
            let mut at = run.start();
            while at < run.end() {
                while before.next_if(|(run, _)| run.end() <= at).is_some() {}
                while after.next_if(|(run, _)| run.end() <= at).is_some() {}
                let (was, was_on) = before.peek().map_or((end, None), |(run, layer)| (run.end(), Some(*layer)));
                let (is, is_on) = after.peek().map_or((end, layer), |(run, layer)| (run.end(), in_all[*layer]));
                draft.push(at, if was_on == in_old[layer] { is_on } else { layer });
                at = run.end().min(was).min(is);
            }
        }
        draft.finish(self.pages)
    }

    /// The pages of the smallest layers: of as few as leaves `target` layers once they are one, and then of all that are no larger
    /// than those before them on average, which costs no more for a layer saved.
    pub(super) fn on_smallest_layers(&self, target: u32) -> PageSet {
        let mut by_size: Vec<_> = (0..self.layers.len()).collect();
        by_size.sort_by_key(|at| self.layers[*at].pages);
        let size = |at: usize| self.layers[by_size[at]].pages.get();
        let mut count = (self.layers.len() + 1).saturating_sub(target.max(1) as usize).min(self.layers.len());
        let mut sum: u64 = (0..count).map(size).sum();
        while count > 0 && count < self.layers.len() && size(count) <= sum / count as u64 {
            sum += size(count);
            count += 1;
        }
        let chosen = &by_size[..count];
        let mut pages = PageSet::new();
        self.all().filter(|(_, layer)| chosen.contains(layer)).for_each(|(run, _)| pages.push(run));
        pages
    }

    /// Extents that are to become one with their neighbours so that no more than `target` are left: the smallest, since each is to be
    /// copied.
    pub(super) fn small_neighbours(&self, target: u64) -> PageSet {
        let mut small = 1;
        loop {
            let (pages, left) = self.neighbours_up_to(PageCount::new(small));
            if left <= target || small >= self.pages.get() {
                return pages;
            }
            small = small.saturating_mul(2);
        }
    }

    /// The runs of two or more extents of at most `small` pages each, and how many extents there are once each run is one.
    fn neighbours_up_to(&self, small: PageCount) -> (PageSet, u64) {
        let (mut pages, mut left) = (PageSet::new(), self.mappings());
        let mut together: Option<(PageRange, u64)> = None;
        let mut close = |together: &mut Option<(PageRange, u64)>| {
            if let Some((run, extents)) = together.take().filter(|(_, extents)| *extents > 1) {
                pages.push(run);
                left -= extents - 1;
            }
        };
        for (run, _) in self.all() {
            if run.count() > small {
                close(&mut together);
                continue;
            }
            together = Some(match together {
                Some((before, extents)) => (PageRange::from_bounds(before.start(), run.end()), extents + 1),
                None => (run, 1),
            });
        }
        close(&mut together);
        (pages, left)
    }

    /// The mappings that a clone needs at least, unless the largest layer is copied for its own sake: all else in one piece.
    pub(super) fn fewest_mappings(&self) -> u64 {
        let largest = self.layers.iter().enumerate().max_by_key(|(_, held)| held.pages).map(|(at, _)| at);
        let mut rest = self.all().filter(|(_, layer)| Some(*layer) != largest).map(|(run, _)| run);
        let Some(first) = rest.next() else { return 1 };
        let end = rest.last().unwrap_or(first).end();
        1 + u64::from(first.start() > PageIndex::ZERO) + u64::from(end.get() < self.pages.get())
    }

    /// Derives again what is kept up by hand, and compares.
    pub(super) fn validate(&self) -> Result<(), String> {
        let starts_at_zero = self.extents.first().is_some_and(|first| first.start == PageIndex::ZERO);
        let ascending =
            self.extents.windows(2).all(|pair| pair[0].start < pair[1].start && pair[0].layer != pair[1].layer);
        if !starts_at_zero || !ascending {
            return Err("the extents of an image are out of order".into());
        }
        for (at, held) in self.layers.iter().enumerate() {
            let runs = || self.all().filter(|(_, layer)| *layer == at).map(|(run, _)| run.count().get());
            if held.extents == 0 || (held.pages.get(), held.extents) != (runs().sum(), runs().count() as u64) {
                return Err(format!("layer {at} of an image is miscounted"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tree;
    use crate::page::ByteSize;
    use crate::sys::memfd::Memfd;

    const PAGES: u64 = 120;

    fn layer(tree: &Tree) -> Arc<Layer> {
        Layer::new(tree, Memfd::create("t", ByteSize::kib(4)).unwrap().seal_all().unwrap())
    }

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
    }

    fn random_pages(random: &mut impl FnMut(u64) -> u64) -> PageSet {
        let mut pages = PageSet::new();
        let mut at = random(30);
        while at < PAGES {
            let end = (at + 1 + random(6)).min(PAGES);
            pages.push(range(at, end));
            at = end + 1 + random(25);
        }
        pages
    }

    /// A map as one layer for each page.
    fn flat(map: &LayerMap) -> Vec<*const Layer> {
        map.validate().unwrap();
        let mut flat = Vec::new();
        for (run, layer) in map.runs(range(0, PAGES)) {
            flat.resize(run.end().get() as usize, Arc::as_ptr(layer));
        }
        flat
    }

    fn lay(flat: &mut [*const Layer], pages: &PageSet, layer: &Arc<Layer>) {
        pages.pages().for_each(|page| flat[page.get() as usize] = Arc::as_ptr(layer));
    }

    fn extents(flat: &[*const Layer]) -> u64 {
        1 + flat.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64
    }

    #[test]
    fn maps_agree_with_one_layer_for_each_page() {
        let tree = Tree::default();
        let mut seed = 3u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for _ in 0..100 {
            let base = layer(&tree);
            let mut map = LayerMap::uniform(PageCount::new(PAGES), base.clone());
            let mut model = vec![Arc::as_ptr(&base); PAGES as usize];
            for _ in 0..random(12) {
                let (pages, over) = (random_pages(&mut random), layer(&tree));
                lay(&mut model, &pages, &over);
                map = map.with(&pages, over);
                assert_eq!(flat(&map), model);
                assert_eq!(map.mappings(), extents(&model));
                let (from, len) = (random(PAGES), random(20));
                let part = range(from, (from + len).min(PAGES));
                let runs: Vec<_> = map.runs(part).collect();
                assert_eq!(runs.iter().map(|(run, _)| run.count().get()).sum::<u64>(), part.count().get());
                let some = random_pages(&mut random);
                let mut found = PageSet::new();
                for (layer, pages) in map.by_layer(&some) {
                    assert!(pages.pages().all(|page| model[page.get() as usize] == Arc::as_ptr(layer)));
                    found = found.union(&pages);
                }
                assert_eq!(found, some);
                let (under, over) = map.plan();
                let mut mapped = vec![Arc::as_ptr(under); PAGES as usize];
                over.iter().for_each(|(run, layer)| lay(&mut mapped, &PageSet::from(*run), layer));
                assert_eq!(mapped, model);
            }
            // A child of it, and a merge under the child's feet.
            let (mine, own) = (random_pages(&mut random), layer(&tree));
            let child = map.with(&mine, own.clone());
            let merged = layer(&tree);
            let pages = if random(2) == 0 { map.on_smallest_layers(3) } else { map.small_neighbours(1 + random(9)) };
            let new = map.with(&pages, merged.clone());
            lay(&mut model, &pages, &merged);
            lay(&mut model, &mine, &own);
            assert_eq!(flat(&child.moved(&map, &new)), model);
            assert_eq!(flat(&child.moved(&map, &map)), flat(&child));
        }
    }

    #[test]
    fn the_smallest_layers_and_extents_are_chosen() {
        let tree = Tree::default();
        let map = LayerMap::uniform(PageCount::new(PAGES), layer(&tree));
        let map = [(10, 40), (50, 51), (53, 54), (60, 62)]
            .into_iter()
            .fold(map, |map, (from, to)| map.with(&PageSet::from(range(from, to)), layer(&tree)));
        assert_eq!((map.layers(), map.mappings(), map.fewest_mappings()), (5, 9, 3));
        assert_eq!(map.on_smallest_layers(4).runs().collect::<Vec<_>>(), [range(50, 51), range(53, 54)]);
        assert_eq!(map.on_smallest_layers(3).count().get(), 4);
        assert_eq!(map.on_smallest_layers(1).count().get(), PAGES);
        assert_eq!(map.small_neighbours(7).runs().collect::<Vec<_>>(), [range(50, 54)]);
        assert_eq!(map.with(&map.small_neighbours(5), layer(&tree)).mappings(), 5);
        assert_eq!(map.with(&map.small_neighbours(1), layer(&tree)).mappings(), 1);
        let whole = map.with(&PageSet::from(range(0, PAGES)), layer(&tree));
        assert_eq!((whole.layers(), whole.fewest_mappings()), (1, 1));
    }
}
