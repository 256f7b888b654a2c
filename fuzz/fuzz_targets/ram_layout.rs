//! The RAM face's address arithmetic, with regions and addresses that nobody sane would ask for.
//!
//! Oracle: the same arithmetic done naively in 128 bits, where nothing wraps. A layout is accepted exactly when every rule holds, and a
//! refusal names a rule that is broken. `locate` and `address_of` agree with a linear walk over the sorted regions
//! for every address and length. Content is kept in a map by *guest* address, so that two addresses that lead to one byte, or a
//! hole that leads anywhere, are seen.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use offshoot::Tree;
use offshoot::backing::{AnyPage, Heap};
use offshoot::page::{ByteOffset, ByteSize, Geometry, Gfn, GuestAddress, PageCount, PageSize};
use offshoot::ram::{LayoutError, Ram, RamError, RamLayout, RamRegion};
use offshoot_fuzz::pattern;

const MOST_OPS: usize = 40;
/// Above this, a space costs megabytes of tables: its arithmetic is checked, its content is not.
const MOST_CONTENT: u64 = 1 << 36;

#[derive(Arbitrary, Debug)]
struct Input {
    page_shift: u8,
    regions: Vec<Region>,
    repeat: u8,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Region {
    Raw {
        start: u64,
        len: u64,
    },
    /// Aligned, of a few pages, anywhere.
    Pages {
        start: u32,
        shift: u8,
        count: u16,
    },
    /// Right after the one before, a page too early or a few pages further on.
    Next {
        gap: u8,
        count: u8,
    },
    /// Up to the last address.
    Last {
        count: u8,
    },
}

/// An address near something, or anywhere.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Addr {
    Raw(u64),
    StartOf { region: u8, delta: i16 },
    EndOf { region: u8, delta: i16 },
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Op {
    Locate { at: Addr, len: u64 },
    LocateRest { at: Addr, delta: i8 },
    AddressOf { offset: u64 },
    AddressOfEdge { region: u8, delta: i8 },
    Write { at: Addr, len: u16, seed: u8 },
    Read { at: Addr, len: u16 },
    Store32 { at: Addr, value: u32 },
    Load64 { at: Addr },
    View64 { at: Addr, value: u64 },
    Discard { at: Addr, count: u8 },
    DiscardRaw { gfn: u64, count: u64 },
}

/// Regions in ascending order, where all rules hold.
struct Model {
    page: u128,
    /// (start, length, offset in the space)
    regions: Vec<(u128, u128, u128)>,
}

impl Model {
    fn end(&self) -> u128 {
        self.regions.last().map_or(0, |(_, len, offset)| len + offset)
    }

    /// The byte's place in the space.
    fn byte(&self, at: u128) -> Option<u128> {
        self.regions.iter().find(|(start, len, _)| *start <= at && at < start + len).map(|(s, _, o)| o + (at - s))
    }

    /// Where an access lies: all of it in regions that follow each other without a gap.
    fn locate(&self, at: u128, len: u128) -> Option<u128> {
        if len == 0 {
            let mut touches = self.regions.iter().filter(|(start, len, _)| *start <= at && at <= start + len);
            return touches.next_back().map(|(start, _, offset)| offset + (at - start));
        }
        let (mut here, end) = (at, at + len);
        for (start, len, _) in &self.regions {
            if *start <= here && here < start + len {
                here = end.min(start + len);
            }
        }
        if here == end { self.byte(at) } else { None }
    }

    fn address(&self, offset: u128) -> Option<u128> {
        self.regions.iter().find(|(_, len, at)| *at <= offset && offset < at + len).map(|(s, _, at)| s + (offset - at))
    }
}

fn wide(region: &RamRegion) -> (u128, u128) {
    (u128::from(region.start.get()), u128::from(region.len.get()))
}

fn model(regions: &[RamRegion], page: u128) -> Option<Model> {
    let mut sorted: Vec<_> = regions.iter().map(wide).collect();
    sorted.sort_unstable();
    let count = sorted.len() as u64;
    let sound = (1..=RamLayout::MAX_REGIONS).contains(&count)
        && sorted.iter().all(|(start, len)| {
            *len > 0 && start.is_multiple_of(page) && len.is_multiple_of(page) && start + len <= u128::from(u64::MAX)
        })
        && sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        && sorted.iter().map(|(_, len)| len).sum::<u128>() <= u128::from(Geometry::MAX_LEN.get());
    sound.then(|| {
        let mut offset = 0;
        let regions = sorted.into_iter().map(|(start, len)| {
            offset += len;
            (start, len, offset - len)
        });
        Model { page, regions: regions.collect() }
    })
}

/// Whether the rule that a refusal names is broken.
fn is_true(error: &LayoutError, regions: &[RamRegion], page: u128) -> bool {
    match error {
        LayoutError::Count { count, limit } => *count == regions.len() as u64 && (*count == 0 || count > limit),
        LayoutError::Empty(region) => regions.contains(region) && region.len.get() == 0,
        LayoutError::Misaligned { region, .. } => {
            let (start, len) = wide(region);
            regions.contains(region) && !(start.is_multiple_of(page) && len.is_multiple_of(page))
        }
        LayoutError::Overflow(region) => {
            // One region past the last address, or all together longer than any number.
            let (start, len) = wide(region);
            start + len > u128::from(u64::MAX) || regions.iter().map(|r| wide(r).1).sum::<u128>() > u128::from(u64::MAX)
        }
        LayoutError::Overlap(a, b) => {
            let ((a_start, a_len), (b_start, b_len)) = (wide(a), wide(b));
            regions.contains(a) && regions.contains(b) && a_start < b_start + b_len && b_start < a_start + a_len
        }
        LayoutError::Geometry(_) => {
            regions.iter().map(|r| wide(r).1).sum::<u128>() > u128::from(Geometry::MAX_LEN.get())
        }
        _ => false,
    }
}

fn regions(input: &Input, page: u64) -> Vec<RamRegion> {
    let mut out: Vec<RamRegion> = Vec::new();
    for spec in input.regions.iter().take(64) {
        let (start, len) = match *spec {
            Region::Raw { start, len } => (start, len),
            Region::Pages { start, shift, count } => {
                (u64::from(start).wrapping_shl(u32::from(shift)).wrapping_mul(page), u64::from(count) * page)
            }
            Region::Next { gap, count } => {
                let end = out.last().map_or(0, |last| last.start.get().wrapping_add(last.len.get()));
                (end.wrapping_add(u64::from(gap % 4) * page).wrapping_sub(page), u64::from(count) * page)
            }
            Region::Last { count } => {
                let len = u64::from(count) * page;
                (0u64.wrapping_sub(page).wrapping_sub(len), len)
            }
        };
        out.push(RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) });
    }
    // More regions than the limit, now and then.
    if input.repeat == 255 {
        out = out.iter().copied().cycle().take(if out.is_empty() { 0 } else { 510 }).collect();
    }
    out
}

fn resolve(at: Addr, model: &Model) -> u64 {
    let near = |region: u8, delta: i16, end: bool| {
        let (start, len, _) = model.regions[usize::from(region) % model.regions.len()];
        (if end { start + len } else { start } as u64).wrapping_add_signed(i64::from(delta))
    };
    match at {
        Addr::Raw(at) => at,
        Addr::StartOf { region, delta } => near(region, delta, false),
        Addr::EndOf { region, delta } => near(region, delta, true),
    }
}

fn check_locate(layout: &RamLayout, model: &Model, at: u64, len: u64) {
    let got = layout.locate(GuestAddress::new(at), ByteSize::new(len)).ok();
    let want = model.locate(u128::from(at), u128::from(len));
    match (got, want) {
        (Some(got), Some(want)) if len > 0 => assert_eq!(u128::from(got.get()), want),
        // An empty access between two regions may be the end of one or the start of the next.
        (Some(_), Some(_)) | (None, None) => {}
        _ => panic!("locate {len:#x} at {at:#x}: got {got:?}, want {want:?}"),
    }
}

fn check_address(layout: &RamLayout, model: &Model, offset: u64) {
    let got = layout.address_of(ByteOffset::new(offset)).map(|at| u128::from(at.get()));
    assert_eq!(got, model.address(u128::from(offset)), "address of {offset:#x}");
}

struct World {
    ram: Ram<Heap<AnyPage>>,
    model: Model,
    /// By guest address; what is not there is zero.
    bytes: BTreeMap<u128, u8>,
}

impl World {
    fn expect<T>(&self, got: Result<T, RamError>, at: u64, len: usize) -> Option<T> {
        let legal = self.model.locate(u128::from(at), len as u128).is_some();
        match got {
            Ok(value) => {
                assert!(legal, "{len} at {at:#x} reached something");
                Some(value)
            }
            Err(RamError::Hole { .. }) => {
                assert!(!legal, "{len} at {at:#x} refused");
                None
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        self.bytes.extend((u128::from(at)..).zip(data.iter().copied()));
    }

    fn want(&self, at: u64, len: usize) -> Vec<u8> {
        (u128::from(at)..).take(len).map(|at| self.bytes.get(&at).copied().unwrap_or(0)).collect()
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Write { at, len, seed } => {
                let (at, data) = (resolve(at, &self.model), pattern(seed, usize::from(len)));
                let got = self.ram.write(GuestAddress::new(at), &data);
                if self.expect(got, at, data.len()).is_some() {
                    self.put(at, &data);
                }
            }
            Op::Read { at, len } => {
                let (at, mut seen) = (resolve(at, &self.model), vec![0xa5; usize::from(len)]);
                let got = self.ram.read(GuestAddress::new(at), &mut seen);
                if self.expect(got, at, seen.len()).is_some() {
                    assert!(seen == self.want(at, seen.len()), "read {len} at {at:#x}");
                }
            }
            Op::Store32 { at, value } => {
                let at = resolve(at, &self.model);
                let got = self.ram.store(GuestAddress::new(at), value);
                if self.expect(got, at, 4).is_some() {
                    self.put(at, &value.to_ne_bytes());
                }
            }
            Op::Load64 { at } => {
                let at = resolve(at, &self.model);
                if let Some(value) = self.expect(self.ram.load::<u64>(GuestAddress::new(at)), at, 8) {
                    assert_eq!(value.to_ne_bytes(), self.want(at, 8)[..], "load at {at:#x}");
                }
            }
            Op::View64 { at, value } => {
                let at = resolve(at, &self.model);
                let address = GuestAddress::new(at);
                let view = self.ram.view().unwrap();
                let stored = self.expect(view.store(address, value), at, 8);
                let loaded = self.expect(view.load::<u64>(address), at, 8);
                drop(view);
                assert_eq!(stored.and(loaded).unwrap_or(value), value, "view at {at:#x}");
                if stored.is_some() {
                    self.put(at, &value.to_ne_bytes());
                }
            }
            Op::Discard { at, count } => {
                let gfn = resolve(at, &self.model) / self.model.page as u64;
                self.discard(gfn, u64::from(count));
            }
            Op::DiscardRaw { gfn, count } => self.discard(gfn, count),
            Op::Locate { .. } | Op::LocateRest { .. } | Op::AddressOf { .. } | Op::AddressOfEdge { .. } => {}
        }
    }

    fn discard(&mut self, gfn: u64, count: u64) {
        let (at, len) = (u128::from(gfn) * self.model.page, u128::from(count) * self.model.page);
        let legal = self.model.locate(at, len).is_some();
        match self.ram.discard(Gfn::new(gfn), PageCount::new(count)) {
            Ok(()) => assert!(legal, "{count} frames at {gfn:#x} were discarded"),
            Err(RamError::Hole { .. }) => assert!(!legal, "{count} frames at {gfn:#x} refused"),
            Err(other) => panic!("{other}"),
        }
        if legal {
            self.bytes.retain(|byte, _| *byte < at || at + len <= *byte);
        }
    }
}

fuzz_target!(|input: Input| {
    let size = PageSize::new(ByteSize::new(1 << (12 + input.page_shift % 10))).unwrap();
    let page = u128::from(size.bytes().get());
    let regions = regions(&input, size.bytes().get());
    let (made, model) = (RamLayout::new(&regions, size), model(&regions, page));
    let (layout, model) = match (made, model) {
        (Ok(layout), Some(model)) => (layout, model),
        (Err(error), None) => return assert!(is_true(&error, &regions, page), "{error} is not so: {regions:?}"),
        (got, want) => panic!("got {got:?}, model {}: {regions:?}", if want.is_some() { "accepts" } else { "refuses" }),
    };
    assert_eq!(u128::from(layout.geometry().len().get()), model.end());
    let placed: Vec<_> = layout.regions().map(|(r, o)| (wide(&r).0, wide(&r).1, u128::from(o.get()))).collect();
    assert_eq!(placed, model.regions);
    for op in input.ops.iter().take(MOST_OPS) {
        match *op {
            Op::Locate { at, len } => check_locate(&layout, &model, resolve(at, &model), len),
            Op::LocateRest { at, delta } => {
                // Exactly up to the end of the last region, give or take.
                let at = resolve(at, &model);
                let (start, len, _) = model.regions[model.regions.len() - 1];
                let rest = ((start + len) as u64).wrapping_sub(at).wrapping_add_signed(i64::from(delta));
                check_locate(&layout, &model, at, rest);
            }
            Op::AddressOf { offset } => check_address(&layout, &model, offset),
            Op::AddressOfEdge { region, delta } => {
                let (_, _, offset) = model.regions[usize::from(region) % model.regions.len()];
                check_address(&layout, &model, (offset as u64).wrapping_add_signed(i64::from(delta)));
            }
            _ => {}
        }
    }
    if layout.geometry().len().get() <= MOST_CONTENT {
        let tree = Tree::default();
        let ram = Ram::create(&tree, layout).unwrap();
        let mut world = World { ram, model, bytes: BTreeMap::new() };
        input.ops.iter().take(MOST_OPS).for_each(|op| world.step(*op));
        drop(world);
        assert_eq!(tree.usage(), offshoot::TreeUsage::default(), "something is left");
    }
});
