//! The overlay core through the heap backing: spaces and images of one family tree, in any order of operations.
//!
//! Oracle: one `Vec<u8>` per space and per image. After each step the bytes it concerned are compared in *every* space and image (a
//! leak into a sibling is a difference), `validate()` re-derives the invariants, and the accounting is compared with
//! a model that holds one token per page: pages and images alive are exact at every step, and zero at the end. A
//! call that the model says must fail fails with the error that names why, and changes nothing; a write that meets the limit
//! on heap pages has written the pages before the one that failed, and no part of that one. `dirty` and `diff` hold every page whose
//! bytes differ, and no page that nobody wrote.
#![no_main]

use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use offshoot::backing::{AnyPage, Backing, Cut, Heap, HeapImage, Page4K, PageBody, Sealed, Word};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageCount, PageIndex, PageRange, PageSet, PageSize};
use offshoot::{Limits, SpaceError, Tree};
use offshoot_fuzz::held::{Counter, Held, Line};
use offshoot_fuzz::{Base, pattern};

/// Pages below one leaf of the index: a boundary worth crossing.
const LEAF_PAGES: u64 = 64;
/// Pages below one middle node: another.
const MID_PAGES: u64 = 64 * 512;
const MOST_OPS: usize = 64;
const MOST_SPACES: usize = 10;
const MOST_IMAGES: usize = 12;

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    page: PageKind,
    base: Option<BaseSpec>,
    heap_pages: Option<u8>,
    depth: Option<u8>,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum PageKind {
    Kib4,
    Kib64,
}

/// Which pages there are, and which of them the model follows (the window). Pages outside it are zero all along.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Shape {
    /// 1 to 8 pages.
    Small(u8),
    /// Across the edge of an index leaf.
    Leaf(u8),
    /// Across the edge of a middle node.
    Mid(u8),
}

#[derive(Arbitrary, Debug, Clone, Copy)]
struct BaseSpec {
    seed: u8,
    /// Its length as a fraction of the window.
    portion: u8,
    /// Bytes cut off that.
    odd: u16,
}

/// A byte position in the window, near a page's edge more often than not.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct At {
    page: u8,
    delta: i16,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Width {
    U8,
    U16,
    U32,
    U64,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Side {
    UpTo,
    From,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Write { space: u8, at: At, len: u16, seed: u8 },
    WritePages { space: u8, page: u8, count: u8, seed: u8 },
    Read { space: u8, at: At, len: u16 },
    Store { space: u8, at: At, width: Width, value: u64 },
    Load { space: u8, at: At, width: Width },
    Zero { space: u8, page: u8, count: u8 },
    ZeroWide { space: u8, page: u8, side: Side },
    Cut { space: u8 },
    Rollback { space: u8 },
    Spawn { image: u8 },
    DropSpace { space: u8 },
    DropImage { image: u8 },
    Reset { space: u8 },
    Dirty { space: u8 },
    Usage { space: u8 },
    Diff { a: u8, b: u8 },
    Flatten { image: u8 },
    MergeOnto { image: u8, ancestor: u8 },
    OutOfRange { space: u8, at: u64, len: u16 },
}

type Token = Rc<Held>;

/// The window's content and, page by page, what the engine must hold for it.
#[derive(Clone)]
struct Cells {
    bytes: Vec<u8>,
    /// The heap page that holds it, shared between relatives.
    tokens: Vec<Option<Token>>,
    /// Zeroed over a base image.
    hidden: Vec<bool>,
    /// The last step that wrote or zeroed it.
    stamps: Vec<u64>,
    has_base: bool,
}

struct Frozen {
    cells: Cells,
    line: Rc<Line>,
    _held: Held,
}

struct Live<B: PageBody> {
    heap: Heap<B>,
    cells: Cells,
    private: BTreeSet<usize>,
    origin: Rc<Frozen>,
}

struct Image<B: PageBody> {
    image: HeapImage<B>,
    frozen: Rc<Frozen>,
}

struct World<B: PageBody> {
    tree: Tree,
    size: PageSize,
    /// First page of the window.
    first: u64,
    pages: usize,
    total: u64,
    base_len: usize,
    limit: u64,
    depth_limit: u32,
    heap_pages: Counter,
    images_alive: Counter,
    families: u64,
    stamp: u64,
    spaces: Vec<Live<B>>,
    images: Vec<Image<B>>,
}

fn pick<T>(items: &[T], selector: u8) -> Option<usize> {
    (!items.is_empty()).then(|| usize::from(selector) % items.len())
}

impl<B: PageBody> World<B> {
    fn new(input: &Input, size: PageSize) -> Self {
        let (first, pages, after) = match input.shape {
            Shape::Small(n) => (0, 1 + u64::from(n % 8), 0),
            Shape::Leaf(n) => (LEAF_PAGES - 2, 4, u64::from(n)),
            Shape::Mid(n) => (MID_PAGES - 2, 4, u64::from(n)),
        };
        // Large pages cost time by the byte, and show nothing more when there are many.
        let pages = if size == PageSize::KIB_4 { pages } else { pages.min(3) };
        let total = first + pages + after;
        let page_bytes = size.bytes().get();
        let mut bytes = vec![0; (pages * page_bytes) as usize];
        let base = input.base.map(|spec| {
            let len = (bytes.len() / 255 * usize::from(spec.portion)).saturating_sub(usize::from(spec.odd));
            let content = pattern(spec.seed, len);
            bytes[..len].copy_from_slice(&content);
            Base::shared(first * page_bytes, content)
        });
        let base_len = base.as_ref().map_or(0, |base| base.len().get() - first * page_bytes) as usize;
        let limit = input.heap_pages.map_or(u64::MAX, u64::from);
        let depth_limit = input.depth.map_or(1000, |depth| u32::from(depth % 8));
        let limits = Limits { heap_pages: PageCount::new(limit), depth: depth_limit, ..Limits::default() };
        let tree = Tree::new(limits);
        let geometry = Geometry::new(ByteSize::new(total * page_bytes), size).unwrap();
        let n = pages as usize;
        let cells = Cells {
            bytes,
            tokens: vec![None; n],
            hidden: vec![false; n],
            stamps: vec![0; n],
            has_base: base.is_some(),
        };
        let heap = Heap::create(&tree, geometry, base).unwrap();
        let (heap_pages, images_alive) = (Counter::default(), Counter::default());
        let origin = Rc::new(Frozen { cells: cells.clone(), line: Line::root(0), _held: images_alive.hold() });
        let root = Live { heap, cells, private: BTreeSet::new(), origin };
        Self {
            tree,
            size,
            first,
            pages: n,
            total,
            base_len,
            limit,
            depth_limit,
            heap_pages,
            images_alive,
            families: 1,
            stamp: 0,
            spaces: vec![root],
            images: Vec::new(),
        }
    }

    fn page_bytes(&self) -> usize {
        self.size.bytes().get() as usize
    }

    fn window_len(&self) -> usize {
        self.pages * self.page_bytes()
    }

    /// From a byte of the window to one of the space.
    fn offset(&self, at: usize) -> ByteOffset {
        ByteOffset::new(self.first * self.size.bytes().get() + at as u64)
    }

    fn place(&self, at: At) -> usize {
        let page = usize::from(at.page) % (self.pages + 1);
        (page * self.page_bytes()).saturating_add_signed(isize::from(at.delta)).min(self.window_len())
    }

    /// An access of up to `len` bytes that stays in the window.
    fn span(&self, at: At, len: u16) -> Range<usize> {
        let start = self.place(at);
        start..(start + usize::from(len)).min(self.window_len())
    }

    fn window_pages(&self, page: u8, count: u8) -> Range<usize> {
        let start = usize::from(page) % self.pages;
        start..(start + usize::from(count)).min(self.pages)
    }

    fn page_range(&self, pages: &Range<usize>) -> PageRange {
        let index = |page: usize| PageIndex::new(self.first + page as u64);
        PageRange::from_bounds(index(pages.start), index(pages.end))
    }

    fn byte_range(&self, pages: &Range<usize>) -> Range<usize> {
        pages.start * self.page_bytes()..pages.end * self.page_bytes()
    }

    /// Writes to the engine and to the model: all of it, or nothing where the pages that it needs are not to be had.
    fn write(&mut self, s: usize, at: usize, data: &[u8], call: impl FnOnce(&Heap<B>) -> Result<(), SpaceError>) {
        let page_bytes = self.page_bytes();
        let space = &mut self.spaces[s];
        let touched = at / page_bytes..(at + data.len()).div_ceil(page_bytes);
        let touched = if data.is_empty() { 0..0 } else { touched };
        let needed = touched.clone().filter(|page| !space.private.contains(page)).count() as u64;
        let expected = if needed == 0 || self.heap_pages.get() + needed <= self.limit { Ok(()) } else { Err(()) };
        if expected.is_ok() {
            self.stamp += 1;
            for page in touched {
                if space.private.insert(page) {
                    space.cells.tokens[page] = Some(Rc::new(self.heap_pages.hold()));
                    space.cells.hidden[page] = false;
                }
                space.cells.stamps[page] = self.stamp;
            }
            space.cells.bytes[at..at + data.len()].copy_from_slice(data);
        }
        match (call(&space.heap), expected) {
            (Ok(()), Ok(())) => {}
            (Err(SpaceError::HeapLimit { limit }), Err(())) => assert_eq!(limit.get(), self.limit),
            (got, want) => panic!("write: got {got:?}, model says {want:?}"),
        }
        self.check_bytes(at..at + data.len());
    }

    fn zero(&mut self, s: usize, range: PageRange) {
        self.stamp += 1;
        let page_bytes = self.page_bytes();
        let space = &mut self.spaces[s];
        space.heap.zero(range).unwrap();
        for page in 0..self.pages {
            if range.contains(PageIndex::new(self.first + page as u64)) {
                space.private.remove(&page);
                space.cells.tokens[page] = None;
                space.cells.hidden[page] = space.cells.has_base;
                space.cells.stamps[page] = self.stamp;
                space.cells.bytes[page * page_bytes..(page + 1) * page_bytes].fill(0);
            }
        }
    }

    /// Compares part of the window in every space and image.
    fn check_bytes(&self, range: Range<usize>) {
        let at = self.offset(range.start);
        let mut seen = vec![0xa5; range.len()];
        for (n, space) in self.spaces.iter().enumerate() {
            space.heap.read(at, &mut seen).unwrap();
            assert!(seen == space.cells.bytes[range.clone()], "space {n} differs in {range:?}");
        }
        for (n, image) in self.images.iter().enumerate() {
            image.image.read(at, &mut seen).unwrap();
            assert!(seen == image.frozen.cells.bytes[range.clone()], "image {n} differs in {range:?}");
        }
    }

    fn check_accounts(&self) {
        let usage = self.tree.usage();
        assert_eq!(usage.heap_pages.get(), self.heap_pages.get(), "heap pages alive");
        assert_eq!(usage.images, self.images_alive.get(), "images alive");
    }

    /// `found` holds every page whose bytes differ and none whose stamp does not.
    fn check_differences(&self, found: &PageSet, a: &Cells, b: &Cells) {
        for page in 0..self.pages {
            let bytes = self.byte_range(&(page..page + 1));
            let there = found.contains(PageIndex::new(self.first + page as u64));
            assert!(there || a.bytes[bytes.clone()] == b.bytes[bytes], "page {page} differs and is not named");
            assert!(!there || a.stamps[page] != b.stamps[page], "page {page} is named and nobody wrote it");
        }
    }

    fn check_usage(&self, space: &Live<B>) {
        let usage = space.heap.usage().unwrap();
        assert_eq!(usage.private.get() + usage.shared.get() + usage.zero.get(), self.total, "each page once");
        assert_eq!(usage.private.get(), space.private.len() as u64, "private pages");
        assert_eq!(usage.depth, space.origin.line.depth, "depth");
        if self.first == 0 {
            let in_base = |page: usize| space.cells.has_base && page * self.page_bytes() < self.base_len;
            let cells = &space.cells;
            let shared = (0..self.pages).filter(|page| match cells.tokens[*page] {
                Some(_) => !space.private.contains(page),
                None => in_base(*page) && !cells.hidden[*page],
            });
            assert_eq!(usage.shared.get(), shared.count() as u64, "shared pages");
        }
    }

    fn adopt(&mut self, image: HeapImage<B>, cells: Cells, line: Rc<Line>) {
        assert_eq!(image.depth(), line.depth);
        image.validate().unwrap();
        let mut seen = vec![0xa5; self.window_len()];
        image.read(self.offset(0), &mut seen).unwrap();
        assert!(seen == cells.bytes, "the new image differs");
        let frozen = Rc::new(Frozen { cells, line, _held: self.images_alive.hold() });
        self.images.push(Image { image, frozen });
    }

    fn step(&mut self, op: &Op) -> Option<()> {
        match *op {
            Op::Write { space, at, len, seed } => {
                let range = self.span(at, len);
                let data = pattern(seed, range.len());
                let offset = self.offset(range.start);
                let s = pick(&self.spaces, space)?;
                self.write(s, range.start, &data, |heap| heap.write(offset, &data));
            }
            Op::WritePages { space, page, count, seed } => {
                let range = self.byte_range(&self.window_pages(page, count % 4));
                let data = pattern(seed, range.len());
                let offset = self.offset(range.start);
                let s = pick(&self.spaces, space)?;
                self.write(s, range.start, &data, |heap| heap.write(offset, &data));
            }
            Op::Read { space, at, len } => {
                let range = self.span(at, len);
                let space = &self.spaces[pick(&self.spaces, space)?];
                let mut seen = vec![0xa5; range.len()];
                space.heap.read(self.offset(range.start), &mut seen).unwrap();
                assert!(seen == space.cells.bytes[range], "read");
            }
            Op::Store { space, at, width, value } => {
                let s = pick(&self.spaces, space)?;
                match width {
                    Width::U8 => self.store(s, at, value as u8, &(value as u8).to_ne_bytes()),
                    Width::U16 => self.store(s, at, value as u16, &(value as u16).to_ne_bytes()),
                    Width::U32 => self.store(s, at, value as u32, &(value as u32).to_ne_bytes()),
                    Width::U64 => self.store(s, at, value, &value.to_ne_bytes()),
                }
            }
            Op::Load { space, at, width } => {
                let s = pick(&self.spaces, space)?;
                match width {
                    Width::U8 => self.load(s, at, u8::from_ne_bytes),
                    Width::U16 => self.load(s, at, u16::from_ne_bytes),
                    Width::U32 => self.load(s, at, u32::from_ne_bytes),
                    Width::U64 => self.load(s, at, u64::from_ne_bytes),
                }
            }
            Op::Zero { space, page, count } => {
                let s = pick(&self.spaces, space)?;
                let pages = self.window_pages(page, count);
                self.zero(s, self.page_range(&pages));
                self.check_bytes(self.byte_range(&pages));
            }
            Op::ZeroWide { space, page, side } => {
                let s = pick(&self.spaces, space)?;
                let edge = PageIndex::new(self.first + u64::from(page) % (self.pages as u64 + 1));
                let range = match side {
                    Side::UpTo => PageRange::from_bounds(PageIndex::ZERO, edge),
                    Side::From => PageRange::from_bounds(edge, PageIndex::new(self.total)),
                };
                self.zero(s, range);
                self.check_bytes(0..self.window_len());
            }
            Op::Cut { space } => {
                let s = pick(&self.spaces, space)?;
                if self.images.len() >= MOST_IMAGES {
                    return None;
                }
                let line = self.spaces[s].origin.line.child();
                let sealed = match self.spaces[s].heap.cut() {
                    Ok(cut) => cut.commit().0,
                    Err(SpaceError::DepthLimit { .. }) if line.depth > self.depth_limit => return None,
                    Err(other) => panic!("cut: {other}"),
                };
                assert!(line.depth <= self.depth_limit, "cut past the limit on depth");
                self.adopt(sealed, self.spaces[s].cells.clone(), line);
                let frozen = self.images.last()?.frozen.clone();
                let space = &mut self.spaces[s];
                (space.origin, space.private) = (frozen, BTreeSet::new());
                assert!(space.heap.origin().same(&self.images.last()?.image));
            }
            Op::Rollback { space } => {
                let space = &self.spaces[pick(&self.spaces, space)?];
                let before = (space.heap.usage().unwrap(), space.heap.dirty().unwrap());
                drop(space.heap.cut());
                assert_eq!(before, (space.heap.usage().unwrap(), space.heap.dirty().unwrap()));
                self.check_bytes(0..self.window_len());
            }
            Op::Spawn { image } => {
                let image = &self.images[pick(&self.images, image)?];
                if self.spaces.len() >= MOST_SPACES {
                    return None;
                }
                let heap = image.image.spawn().unwrap();
                let origin = image.frozen.clone();
                let cells = origin.cells.clone();
                self.spaces.push(Live { heap, cells, private: BTreeSet::new(), origin });
                self.check_bytes(0..self.page_bytes());
            }
            Op::DropSpace { space } => {
                let s = pick(&self.spaces, space)?;
                self.spaces.swap_remove(s);
            }
            Op::DropImage { image } => {
                let i = pick(&self.images, image)?;
                self.images.swap_remove(i);
            }
            Op::Reset { space } => {
                let s = pick(&self.spaces, space)?;
                let space = &mut self.spaces[s];
                let dirty = space.heap.dirty().unwrap().count();
                assert_eq!(space.heap.reset().unwrap(), dirty);
                (space.cells, space.private) = (space.origin.cells.clone(), BTreeSet::new());
                assert!(space.heap.dirty().unwrap().is_empty(), "dirty after a reset");
                self.check_bytes(0..self.window_len());
            }
            Op::Dirty { space } => {
                let space = &self.spaces[pick(&self.spaces, space)?];
                self.check_differences(&space.heap.dirty().unwrap(), &space.cells, &space.origin.cells);
            }
            Op::Usage { space } => self.check_usage(&self.spaces[pick(&self.spaces, space)?]),
            Op::Diff { a, b } => {
                let (a, b) = (&self.images[pick(&self.images, a)?], &self.images[pick(&self.images, b)?]);
                let related = a.frozen.line.family == b.frozen.line.family;
                match a.image.diff(&b.image) {
                    Ok(found) => {
                        assert!(related, "strangers compared");
                        self.check_differences(&found, &a.frozen.cells, &b.frozen.cells);
                        assert_eq!(found, b.image.diff(&a.image).unwrap());
                    }
                    Err(SpaceError::Unrelated(_)) => assert!(!related, "relatives refused"),
                    Err(other) => panic!("diff: {other}"),
                }
            }
            Op::Flatten { image } => {
                let image = &self.images[pick(&self.images, image)?];
                // A base image under 128 MiB of pages that nobody follows: right, and too slow to be worth it.
                if self.images.len() >= MOST_IMAGES || (self.first > 0 && image.frozen.cells.has_base) {
                    return None;
                }
                let mut cells = image.frozen.cells.clone();
                cells.has_base = false;
                cells.hidden.fill(false);
                cells.tokens.fill(None);
                let page_bytes = self.page_bytes();
                let kept = |page: &usize| cells.bytes[page * page_bytes..][..page_bytes].iter().any(|byte| *byte != 0);
                let kept: Vec<usize> = (0..self.pages).filter(kept).collect();
                let fits = self.heap_pages.get().saturating_add(kept.len() as u64) <= self.limit;
                match image.image.flatten() {
                    Ok(flat) => {
                        assert!(fits, "flattened past the limit on heap pages");
                        kept.iter().for_each(|page| cells.tokens[*page] = Some(Rc::new(self.heap_pages.hold())));
                        let line = Line::root(self.families);
                        self.families += 1;
                        self.adopt(flat, cells, line);
                    }
                    Err(SpaceError::HeapLimit { .. }) => assert!(!fits, "refused with room to spare"),
                    Err(other) => panic!("flatten: {other}"),
                }
            }
            Op::MergeOnto { image, ancestor } => {
                let (image, ancestor) =
                    (&self.images[pick(&self.images, image)?], &self.images[pick(&self.images, ancestor)?]);
                if self.images.len() >= MOST_IMAGES {
                    return None;
                }
                let legal = image.frozen.line.comes_from(&ancestor.frozen.line);
                match image.image.merge_onto(&ancestor.image) {
                    Ok(merged) => {
                        assert!(legal, "merged onto a stranger");
                        let (cells, line) = (image.frozen.cells.clone(), ancestor.frozen.line.child());
                        self.adopt(merged, cells, line);
                    }
                    Err(SpaceError::Unrelated(_)) => assert!(!legal, "refused to merge onto an ancestor"),
                    Err(other) => panic!("merge: {other}"),
                }
            }
            Op::OutOfRange { space, at, len } => {
                let space = &self.spaces[pick(&self.spaces, space)?];
                let end = u128::from(self.total) * u128::from(self.size.bytes().get());
                // Far away, or just past the end.
                let at = if at & 1 == 0 { at } else { (end as u64).saturating_sub(at >> 56) };
                if u128::from(at) + u128::from(len) <= end {
                    return None;
                }
                let (offset, mut buf) = (ByteOffset::new(at), vec![1; usize::from(len)]);
                let before = self.tree.usage();
                assert!(matches!(space.heap.write(offset, &buf), Err(SpaceError::Geometry(_))));
                assert!(matches!(space.heap.read(offset, &mut buf), Err(SpaceError::Geometry(_))));
                assert_eq!(before, self.tree.usage());
                let pages = PageRange::new(self.size.page_of(offset), PageCount::new(u64::from(len)));
                if let Some(pages) = pages
                    && pages.end().get() > self.total
                {
                    assert!(matches!(space.heap.zero(pages), Err(SpaceError::Geometry(_))));
                }
                self.check_bytes(0..self.window_len());
            }
        }
        Some(())
    }

    fn store<T: Word>(&mut self, s: usize, at: At, value: T, bytes: &[u8]) {
        let at = self.place(at);
        if at + bytes.len() <= self.window_len() {
            let offset = self.offset(at);
            self.write(s, at, bytes, |heap| heap.view().store(offset, value));
        }
    }

    fn load<T: Word + PartialEq, const N: usize>(&self, s: usize, at: At, from: impl Fn([u8; N]) -> T) {
        let at = self.place(at);
        let space = &self.spaces[s];
        if let Some(bytes) = space.cells.bytes.get(at..at + N) {
            let got: T = space.heap.view().load(self.offset(at)).unwrap();
            assert!(got == from(bytes.try_into().unwrap()), "load at {at}");
        }
    }

    fn run(mut self, ops: &[Op]) {
        for op in ops.iter().take(MOST_OPS) {
            self.step(op);
            self.check_accounts();
            self.spaces.iter().for_each(|space| space.heap.validate().unwrap());
        }
        self.check_bytes(0..self.window_len());
        self.spaces.iter().for_each(|space| self.check_usage(space));
        let tree = self.tree.clone();
        drop(self);
        assert_eq!(tree.usage(), offshoot::TreeUsage::default(), "something is left");
    }
}

fuzz_target!(|input: Input| {
    match input.page {
        PageKind::Kib4 => World::<Page4K>::new(&input, PageSize::KIB_4).run(&input.ops),
        PageKind::Kib64 => {
            World::<AnyPage>::new(&input, PageSize::new(ByteSize::kib(64)).unwrap()).run(&input.ops);
        }
    }
});
