//! Chains of images whose layers are merged between cuts, spawns and resets, against one version and one byte for each page.

use super::*;
use crate::backing::{Cut, Deferred, Sealed};
use crate::page::{PageIndex, PageSize};
use crate::sys::fault::plan;
use crate::{Limits, Tree, TreeUsage};
use rustix::io::Errno;

const PAGES: u64 = 300;

fn space(tree: &Tree, pages: u64) -> Mapped {
    let geometry = Geometry::new(PageSize::KIB_4.size_of(PageCount::new(pages)), PageSize::KIB_4).unwrap();
    Mapped::create(tree, geometry, None).unwrap()
}

fn at(page: u64) -> ByteOffset {
    PageSize::KIB_4.start_of(PageIndex::new(page))
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(start), PageIndex::new(end))
}

/// Cuts and merges what is due.
fn cut(space: &Mapped) -> MappedImage {
    space.cut().unwrap().commit().0
}

fn layers(image: &MappedImage) -> (u32, u64) {
    let map = image.map().unwrap();
    (map.layers(), map.mappings())
}

fn random() -> impl FnMut(u64) -> u64 {
    let mut seed = 11u64;
    move |below| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % below
    }
}

/// What a page holds, and since when: the number of the cut that sealed it, 0 for a discard, `None` if it is not sealed yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Page {
    byte: u8,
    since: Option<u64>,
}

type Flat = Vec<Page>;

struct Live {
    space: Mapped,
    origin: MappedImage,
    model: Flat,
    at_origin: Flat,
}

impl Live {
    fn check(&self) {
        self.space.validate().unwrap();
        for (page, want) in self.model.iter().enumerate() {
            let mut byte = [9];
            self.space.read(at(page as u64), &mut byte).unwrap();
            assert_eq!(byte, [want.byte], "page {page}");
        }
    }
}

impl Live {
    /// Copies back what was written, or but a part of it, and sometimes pages that were not; says whether there was room to.
    fn copy_back(&mut self, random: &mut impl FnMut(u64) -> u64) -> bool {
        let dirty = self.space.dirty().unwrap();
        let (start, part) = (random(PAGES), random(3));
        let other = PageSet::from(range(start, (start + 20).min(PAGES)));
        let listed = match part {
            0 => dirty.clone(),
            1 => dirty.union(&other),
            _ => dirty.difference(&other),
        };
        match self.space.reset_copying(&listed) {
            Ok(pages) => assert_eq!(pages, listed.count()),
            Err(SpaceError::MappingLimit { .. }) => {
                self.check();
                return false;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(self.space.kernel_mappings() <= self.origin.tree().limits().mappings_per_vm);
        for page in listed.intersection(&dirty).pages().map(|page| page.get() as usize) {
            let (was, now) = (self.at_origin[page], &mut self.model[page]);
            // Zeroes over zeroes are left alone.
            let since = if now.byte == was.byte { now.since } else { None };
            *now = Page { byte: was.byte, since };
        }
        assert_eq!(self.space.dirty().unwrap(), dirty, "they go on to count as written");
        self.check();
        true
    }
}

fn check_image(image: &MappedImage, model: &Flat) {
    image.validate().unwrap();
    for (page, want) in model.iter().enumerate() {
        let mut byte = [9];
        image.read(at(page as u64), &mut byte).unwrap();
        assert_eq!(byte, [want.byte], "page {page}");
    }
}

/// The pages of which two models say different things.
fn differ(a: &Flat, b: &Flat) -> PageSet {
    (0..PAGES).filter(|page| a[*page as usize].since != b[*page as usize].since).map(PageIndex::new).collect()
}

/// Whether a diff names exactly the pages that somebody wrote.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Diffs {
    Exact,
    /// With no mapping left, a discard writes zeroes, and a page may be copied twice.
    MayNameMore,
}

fn play(limits: Limits, diffs: Diffs, steps: u64) {
    let tree = Tree::new(limits);
    let mut random = random();
    let mut cuts = 1;
    let first = space(&tree, PAGES);
    (0..PAGES).step_by(3).for_each(|page| first.write(at(page), &[page as u8 | 1]).unwrap());
    let byte = |page: u64| if page.is_multiple_of(3) { page as u8 | 1 } else { 0 };
    let sealed: Flat = (0..PAGES).map(|page| Page { byte: byte(page), since: Some(1) }).collect();
    let origin = cut(&first);
    let mut images = vec![(origin.clone(), sealed.clone())];
    let mut lives = vec![Live { space: first, origin, model: sealed.clone(), at_origin: sealed }];
    let mut put_off: Vec<Deferred> = Vec::new();
    let (mut merged, mut copied) = (0, 0);
    for step in 0..steps {
        let who = random(lives.len() as u64) as usize;
        let live = &mut lives[who];
        match random(13) {
            0..=3 => {
                for _ in 0..random(9) {
                    let (page, byte) = (random(PAGES), random(256) as u8);
                    live.space.write(at(page), &[byte]).unwrap();
                    live.model[page as usize] = Page { byte, since: None };
                }
            }
            4 => {
                let start = random(PAGES);
                let end = (start + random(12)).min(PAGES);
                live.space.zero(range(start, end)).unwrap();
                live.model[start as usize..end as usize].fill(Page { byte: 0, since: Some(0) });
            }
            5..=7 => {
                cuts += 1;
                let (image, deferred) = live.space.cut().unwrap().commit();
                live.model.iter_mut().for_each(|page| page.since = page.since.or(Some(cuts)));
                (live.origin, live.at_origin) = (image.clone(), live.model.clone());
                put_off.push(deferred);
                images.push((image, live.model.clone()));
            }
            8 => {
                let (image, model) = &images[random(images.len() as u64) as usize];
                let space = image.spawn().unwrap();
                assert!(space.kernel_mappings() <= tree.limits().mappings_per_vm);
                let (origin, model) = (image.clone(), model.clone());
                lives.push(Live { space, origin, at_origin: model.clone(), model });
            }
            9 => {
                live.space.reset().unwrap();
                live.model = live.at_origin.clone();
                live.check();
            }
            11 => copied += u64::from(live.copy_back(&mut random)),
            10 => {
                let (a, b) = (random(images.len() as u64) as usize, random(images.len() as u64) as usize);
                let (said, want) = (images[a].0.diff(&images[b].0).unwrap(), differ(&images[a].1, &images[b].1));
                assert!(want.difference(&said).is_empty(), "step {step}: {:?} missed", want.difference(&said));
                assert!(diffs == Diffs::MayNameMore || said == want, "step {step}: {:?} more", said.difference(&want));
            }
            _ => {
                // In any order: a child's before its origin's.
                if !put_off.is_empty() {
                    let files = tree.usage().memory_files;
                    drop(put_off.swap_remove(random(put_off.len() as u64) as usize));
                    merged += u64::from(tree.usage().memory_files != files);
                }
            }
        }
        // Layers pile up while merges are put off: all of them now and then.
        if put_off.len() > 12 {
            let files = tree.usage().memory_files;
            put_off.clear();
            merged += u64::from(tree.usage().memory_files != files);
        }
        if images.len() > 8 {
            images.swap_remove(random(8) as usize);
        }
        if lives.len() > 5 {
            lives.swap_remove(random(5) as usize);
        }
        if step % 50 == 0 {
            lives.iter().for_each(Live::check);
            images.iter().for_each(|(image, model)| check_image(image, model));
        }
    }
    assert!(merged > 10, "{merged} merges in {steps} steps");
    assert!(copied > 10, "copied back {copied} times in {steps} steps");
    lives.iter().for_each(Live::check);
    drop((put_off, images, lives));
    assert_eq!(tree.usage(), TreeUsage::default());
}

#[test]
fn random_chains_agree_with_a_model_and_diffs_stay_exact() {
    let limits = Limits { merge_over_layers: 3, merge_over_mappings: 40, ..Limits::default() };
    play(limits, Diffs::Exact, 800);
    play(Limits { merge_over_mappings: 4096, ..limits }, Diffs::Exact, 800);
}

#[test]
fn random_chains_hold_with_hardly_a_mapping() {
    let limits = Limits { merge_over_layers: 4, merge_over_mappings: 20, mappings_per_vm: 24, ..Limits::default() };
    play(limits, Diffs::MayNameMore, 800);
}

/// A chain of `depth` images with three pages each, nothing merged yet.
fn chain(tree: &Tree, depth: u64) -> (Mapped, Vec<MappedImage>, Vec<Deferred>) {
    let parent = space(tree, PAGES);
    (0..PAGES).for_each(|page| parent.write(at(page), &[1]).unwrap());
    let (mut images, mut put_off) = (vec![cut(&parent)], Vec::new());
    for level in 0..depth {
        (0..3).for_each(|n| parent.write(at((level * 31 + n * 90) % PAGES), &[level as u8 + 2]).unwrap());
        let (image, deferred) = parent.cut().unwrap().commit();
        images.push(image);
        put_off.push(deferred);
    }
    (parent, images, put_off)
}

fn bytes(image: &MappedImage) -> Vec<u8> {
    let mut all = vec![0; image.geometry().len().get() as usize];
    image.read(ByteOffset::ZERO, &mut all).unwrap();
    all
}

#[test]
fn a_merge_that_fails_at_any_call_leaves_everything_as_it_was() {
    let limits = Limits { merge_over_layers: 4, merge_over_mappings: 16, ..Limits::default() };
    for n in 1.. {
        let tree = Tree::new(limits);
        let (parent, images, put_off) = chain(&tree, 7);
        let (last, before) = (&images[7], images.iter().map(bytes).collect::<Vec<_>>());
        let (lies, files, diff) = (layers(last), tree.usage().memory_files, last.diff(&images[3]).unwrap());
        // The merge asked for is one of the line: origins that it takes over fail without harm.
        let guard = plan::arm(n, Errno::NOMEM);
        let settled = last.settle();
        let seen = plan::calls_seen();
        drop(guard);
        assert_eq!(images.iter().map(bytes).collect::<Vec<_>>(), before);
        images.iter().for_each(|image| image.validate().unwrap());
        parent.validate().unwrap();
        assert_eq!(last.diff(&images[3]).unwrap(), diff);
        if settled.is_err() {
            assert!(matches!(settled, Err(SpaceError::System(SystemError::OutOfMemory { .. }))), "{settled:?}");
            assert!(layers(last) <= lies && tree.usage().memory_files <= files + 20);
        } else {
            assert!(layers(last).0 <= 4 && layers(last).1 <= 16, "{:?}", layers(last));
        }
        // What failed is made up for by the next one.
        last.settle().unwrap();
        assert!(layers(last).0 <= 4 && layers(last).1 <= 16);
        drop((parent, images, put_off));
        assert_eq!(tree.usage(), TreeUsage::default());
        if seen < n {
            assert!(n > 20, "{n} calls");
            break;
        }
    }
}

/// Where nothing succeeded before the failure, not even the map is another.
#[test]
fn a_merge_that_fails_changes_no_map() {
    let tree = Tree::new(Limits { merge_over_layers: 4, ..Limits::default() });
    let (_parent, images, put_off) = chain(&tree, 5);
    let last = images.last().unwrap();
    // Only the last two are over the limit; the merge of the first of them is done.
    drop(put_off);
    let parent = last.spawn().unwrap();
    let mut image = last.clone();
    let mut put_off = Vec::new();
    while layers(&image).0 <= 4 {
        parent.write(at(image.depth().into()), &[77]).unwrap();
        let cut = parent.cut().unwrap().commit();
        image = cut.0;
        put_off.push(cut.1);
    }
    let (map, files) = (image.map().unwrap(), tree.usage().memory_files);
    let mut calls = 0;
    for n in 1.. {
        let guard = plan::arm(n, Errno::NOMEM);
        let settled = image.settle();
        let seen = plan::calls_seen();
        drop(guard);
        if seen < n {
            settled.unwrap();
            break;
        }
        calls = n;
        settled.unwrap_err();
        assert!(Arc::ptr_eq(&map, &image.map().unwrap()));
        assert_eq!(tree.usage().memory_files, files);
    }
    assert!(calls > 5, "{calls}");
    assert!(layers(&image).0 <= 4);
}

#[test]
fn an_image_that_nobody_wants_is_not_merged() {
    let tree = Tree::new(Limits { merge_over_layers: 2, ..Limits::default() });
    let (parent, images, put_off) = chain(&tree, 4);
    drop((parent, images));
    let guard = plan::arm(0, Errno::IO);
    // The newest first: an older one's holds the image before it.
    put_off.into_iter().rev().for_each(drop);
    assert_eq!(plan::calls_seen(), 0);
    drop(guard);
    assert_eq!(tree.usage(), TreeUsage::default());
}

#[test]
fn too_many_layers_are_refused_at_the_fork_and_a_merge_makes_room() {
    let tree = Tree::new(Limits { merge_over_layers: 3, layers_per_image: 6, ..Limits::default() });
    let (parent, images, mut put_off) = chain(&tree, 5);
    parent.write(at(250), &[99]).unwrap();
    let (before, dirty) = (tree.usage(), parent.dirty().unwrap());
    for _ in 0..3 {
        match parent.cut().map(drop) {
            Err(error @ SpaceError::LayerLimit { layers: 7, limit: 6 }) => {
                assert!(error.to_string().contains("Limits::layers_per_image"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((tree.usage(), parent.dirty().unwrap()), (before, dirty.clone()));
        assert!(parent.origin().same(&images[5]));
    }
    // A spawn of what there is is never refused.
    assert_eq!(images[5].spawn().unwrap().kernel_mappings(), layers(&images[5]).1);
    put_off.clear();
    assert!(layers(&images[5]).0 <= 3);
    let image = cut(&parent);
    let mut byte = [0];
    image.spawn().unwrap().read(at(250), &mut byte).unwrap();
    assert_eq!(byte, [99]);
    parent.validate().unwrap();
}

#[test]
fn a_thousand_levels_lie_on_a_few_layers() {
    let limits = Limits { merge_over_layers: 4, merge_over_mappings: 64, ..Limits::default() };
    for spawned_at_each in [false, true] {
        let tree = Tree::new(limits);
        let mut random = random();
        let mut live = space(&tree, PAGES);
        let mut model = vec![0u8; PAGES as usize];
        for level in 0..1000u64 {
            for _ in 0..4 {
                let page = random(PAGES);
                model[page as usize] = level as u8;
                live.write(at(page), &[level as u8]).unwrap();
            }
            let image = cut(&live);
            assert!(layers(&image).0 <= 4 && layers(&image).1 <= 64, "level {level}: {:?}", layers(&image));
            assert!(tree.usage().memory_files <= 6, "level {level}: {:?}", tree.usage());
            assert!(live.kernel_mappings() <= 200, "level {level}: {}", live.kernel_mappings());
            if spawned_at_each {
                live = image.spawn().unwrap();
            }
        }
        assert_eq!(live.origin().depth(), 1000);
        live.validate().unwrap();
        for (page, want) in model.iter().enumerate() {
            let mut byte = [0];
            live.read(at(page as u64), &mut byte).unwrap();
            assert_eq!(byte, [*want], "page {page}");
        }
        drop(live);
        assert_eq!(tree.usage(), TreeUsage::default());
    }
}

#[test]
fn scattered_pages_stay_private_and_are_gathered_for_the_clones() {
    let tree = Tree::new(Limits { mappings_per_vm: 64, merge_over_mappings: 32, ..Limits::default() });
    let parent = space(&tree, 4096);
    (0..4096).for_each(|page| parent.write(at(page), &[1]).unwrap());
    cut(&parent);
    let scattered = || (0..4096).step_by(8);
    scattered().for_each(|page| parent.write(at(page), &[2]).unwrap());
    let (image, deferred) = parent.cut().unwrap().commit();
    // Copied are the written pages alone.
    assert_eq!(layers(&image), (2, 1024));
    assert!(parent.kernel_mappings() <= 64);
    // A clone that comes before they are gathered.
    let early = image.spawn().unwrap();
    assert!(early.kernel_mappings() <= 64 && layers(&image).1 <= 32);
    drop(deferred);
    let known = parent.dirty().unwrap();
    let watched = crate::sys::uffd::Uffd::open().is_ok();
    assert!(known.is_empty() || !watched, "{} pages count as written", known.count().get());
    // The next fork copies what was written since, and has the VM give its private pages up.
    parent.write(at(77), &[3]).unwrap();
    let next = cut(&parent);
    assert_eq!(next.diff(&image).unwrap().count().get(), if watched { 1 } else { 513 });
    for space in [&parent, &early, &next.spawn().unwrap()] {
        space.validate().unwrap();
        assert!(space.kernel_mappings() <= 64);
        for page in 0..4096 {
            let mut byte = [0];
            space.read(at(page), &mut byte).unwrap();
            let changed = page == 77 && !std::ptr::eq(space, &early);
            assert_eq!(byte[0], if changed { 3 } else { 1 + u8::from(page % 8 == 0) }, "page {page}");
        }
    }
    // So does a reset of a clone that wrote everywhere.
    scattered().for_each(|page| early.write(at(page + 1), &[9]).unwrap());
    assert_eq!(early.reset().unwrap().get(), 512);
    assert!(early.dirty().unwrap().is_empty());
}

#[test]
fn a_cut_of_scattered_pages_that_is_undone_leaves_them_dirty() {
    let tree = Tree::new(Limits { mappings_per_vm: 16, ..Limits::default() });
    let parent = space(&tree, 512);
    cut(&parent);
    (0..512).step_by(8).for_each(|page| parent.write(at(page), &[2]).unwrap());
    let (before, dirty) = (tree.usage(), parent.dirty().unwrap());
    drop(parent.cut().unwrap());
    assert_eq!((tree.usage(), parent.dirty().unwrap()), (before, dirty.clone()));
    for n in 1.. {
        let guard = plan::arm(n, Errno::NOMEM);
        let made = parent.cut().map(drop);
        let seen = plan::calls_seen();
        drop(guard);
        assert_eq!((tree.usage(), parent.dirty().unwrap()), (before, dirty.clone()), "call {n}");
        parent.validate().unwrap();
        if seen < n {
            made.unwrap();
            break;
        }
    }
    assert_eq!(cut(&parent).diff(&parent.origin()).unwrap(), PageSet::new());
}

#[test]
fn limits_that_allow_nothing_are_refused_at_the_first_cut() {
    for limits in
        [Limits { layers_per_image: 0, ..Limits::default() }, Limits { mappings_per_vm: 0, ..Limits::default() }]
    {
        let tree = Tree::new(limits);
        let parent = space(&tree, 8);
        parent.write(at(3), &[1]).unwrap();
        let before = tree.usage();
        match parent.cut().map(drop) {
            Err(
                SpaceError::LayerLimit { layers: 1, limit: 0 } | SpaceError::MappingLimit { needed: 1, limit: 0, .. },
            ) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!((tree.usage(), parent.dirty().unwrap().count().get()), (before, 1));
        // It can still be zeroed by punching holes: its file is not sealed.
        parent.zero(range(0, 8)).unwrap();
        assert_eq!(parent.usage().unwrap().private.get(), 0);
        parent.validate().unwrap();
    }
}

#[test]
fn what_is_merged_onto_an_ancestor_stays_below_the_soft_limits() {
    let tree = Tree::new(Limits { merge_over_layers: 3, merge_over_mappings: 20, ..Limits::default() });
    let parent = space(&tree, PAGES);
    let mut images = vec![cut(&parent)];
    for level in 1..8 {
        // Scattered, and over everything that was there before.
        (0..PAGES).step_by(9).for_each(|page| parent.write(at(page), &[level]).unwrap());
        images.push(cut(&parent));
    }
    let merged = images[7].merge_onto(&images[1]).unwrap();
    let (layers, mappings) = layers(&merged);
    assert!(layers <= 3 && mappings <= 20, "{layers} layers in {mappings} pieces");
    assert_eq!(merged.diff(&images[7]).unwrap(), PageSet::new());
    let clone = merged.spawn().unwrap();
    for page in 0..PAGES {
        let mut byte = [0];
        clone.read(at(page), &mut byte).unwrap();
        assert_eq!(byte[0], if page % 9 == 0 { 7 } else { 0 });
    }
    clone.validate().unwrap();
    merged.validate().unwrap();
}

/// Does something whenever the engine notes anything.
struct AtEachNote<F>(F);

impl<F: Fn() + 'static> tracing::Subscriber for AtEachNote<F>
where
    F: Send + Sync,
{
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        (self.0)();
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// Somebody writes through the engine while a cut of scattered pages goes over to the way that needs no write protection.
#[test]
fn a_cut_is_one_instant_where_write_protection_is_missing() {
    let mut fell_back = 0;
    for n in 1..20 {
        let tree = Tree::new(Limits { mappings_per_vm: 16, ..Limits::default() });
        let parent = Arc::new(space(&tree, 512));
        cut(&parent);
        (0..512).step_by(8).for_each(|page| parent.write(at(page), &[2]).unwrap());
        let (writer, wrote) = (parent.clone(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let noted = wrote.clone();
        let subscriber = AtEachNote(move || {
            // First a page that was clean, then one that was known to be written.
            for page in [1, 0] {
                writer.write(at(page), &[9]).unwrap();
            }
            noted.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let cut = tracing::subscriber::with_default(subscriber, || {
            let _plan = plan::arm(n, Errno::NOSYS);
            parent.cut().map(|cut| cut.commit().0)
        });
        let Ok(image) = cut else { continue };
        if !wrote.load(std::sync::atomic::Ordering::Relaxed) {
            continue;
        }
        fell_back += 1;
        let (clone, mut bytes) = (image.spawn().unwrap(), [[0]; 2]);
        for (page, byte) in bytes.iter_mut().enumerate() {
            clone.read(at(page as u64), byte).unwrap();
        }
        assert!(bytes[0] != [9] || bytes[1] == [9], "an earlier write is missing: {bytes:?}");
        parent.validate().unwrap();
    }
    assert!(fell_back > 0, "write protection was never missing");
}

/// Pages that a cut left private because layers could not be laid over them cannot be laid one by one at a reset either.
#[test]
fn a_listed_reset_of_scattered_pages_stays_within_the_mappings() {
    let tree = Tree::new(Limits { mappings_per_vm: 16, ..Limits::default() });
    let parent = space(&tree, 512);
    cut(&parent);
    let scattered = || (0..512).step_by(8);
    scattered().for_each(|page| parent.write(at(page), &[2]).unwrap());
    cut(&parent);
    scattered().for_each(|page| parent.write(at(page), &[3]).unwrap());
    let listed: PageSet = scattered().map(PageIndex::new).collect();
    assert_eq!(parent.reset_listed(&listed).unwrap().get(), 64);
    assert!(parent.kernel_mappings() <= 16, "{} mappings", parent.kernel_mappings());
    assert!(parent.dirty().unwrap().is_empty());
    parent.validate().unwrap();
    for page in 0..512 {
        let mut byte = [0];
        parent.read(at(page), &mut byte).unwrap();
        assert_eq!(byte[0], if page % 8 == 0 { 2 } else { 0 }, "page {page}");
    }
}
