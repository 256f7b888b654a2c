//! Requests: what each does to the disk, and the error that each breach has.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use offshoot::backing::Heap;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{BASE_ALLOCATION, DIRTY_BITMAP, Export, ExportName, ServerLimits};
use offshoot::page::{ByteSize, Lba, PageCount, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::testing::Dice;
use offshoot::{AtRest, CloneSpec, DeviceState, DiskName, Limits, Tree, Vm, VmName};

use super::client::*;
use super::{Served, blank, over, watched};

const PAGE: usize = 4096;
/// Not whole pages.
const SECTORS: u64 = 8 * 40 + 3;

/// Extents as one value for each sector.
fn by_sector(reply: &Reply, context: usize) -> Vec<u32> {
    let Chunk::Status { extents, .. } = &reply.chunks[context] else { panic!("no block status: {reply:?}") };
    extents.iter().flat_map(|(len, flags)| vec![*flags; *len as usize / 512]).collect()
}

#[test]
fn any_mix_of_requests_does_what_a_flat_disk_does() {
    let image: Vec<u8> = (0..20 * PAGE + 700).map(|at| (at % 251) as u8 + 1).collect();
    for structured in [false, true] {
        let disk = Arc::new(over_long(&image));
        let served = Served::with(&[("d", disk.clone())]);
        let mut client = Client::connect(&served.path).unwrap();
        if structured {
            client.structure().unwrap();
        }
        client.go("d").unwrap();
        let mut model = image.clone();
        model.resize(client.size as usize, 0);
        let mut dice = Dice::new(7);
        for round in 0..600 {
            let lba = dice.below(model.len() as u64 / 512);
            let most = (model.len() as u64 / 512 - lba).min(if dice.below(8) == 0 { 400 } else { 20 });
            let count = 1 + dice.below(most);
            let (offset, len) = (lba * 512, (count * 512) as usize);
            let range = offset as usize..offset as usize + len;
            let fua = if dice.below(4) == 0 { FUA } else { 0 };
            let call = match dice.below(7) {
                0 | 1 => {
                    let data: Vec<u8> = (0..len).map(|at| (at + round) as u8).collect();
                    model[range].copy_from_slice(&data);
                    client.call(fua, WRITE, offset, len as u32, &data)
                }
                2 => {
                    model[range].fill(0);
                    let flags = [0, NO_HOLE, FAST_ZERO][dice.below(3) as usize];
                    client.call(fua | flags, WRITE_ZEROES, offset, len as u32, &[])
                }
                3 => {
                    let end = if range.end == model.len() { range.end } else { range.end / PAGE * PAGE };
                    let start = range.start.next_multiple_of(PAGE);
                    if start < end {
                        model[start..end].fill(0);
                    }
                    client.call(fua, TRIM, offset, len as u32, &[])
                }
                4 => client.call(fua, CACHE, offset, len as u32, &[]),
                5 => client.call(fua, FLUSH, 0, 0, &[]),
                _ => {
                    assert!(client.read(offset, len as u32).unwrap() == model[range], "read in round {round}");
                    if structured {
                        let reply = client.call(DF | fua, READ, offset, len as u32, &[]).unwrap();
                        assert!(matches!(&reply.chunks[..], [Chunk::Data { .. }]), "one chunk, whatever it holds");
                    }
                    continue;
                }
            };
            assert_eq!(call.unwrap().error, 0, "round {round}");
        }
        let mut all = vec![0; model.len()];
        disk.read(Lba::ZERO, &mut all).unwrap();
        assert!(all == model);
        assert!(client.read(0, model.len() as u32).unwrap() == model);
        client.disconnect().unwrap();
    }
}

/// A disk that is longer than its image.
fn over_long(image: &[u8]) -> Disk {
    use offshoot::backing::Backing;
    use offshoot::page::Geometry;
    let len = ByteSize::new((SECTORS * 512).next_multiple_of(PAGE as u64));
    let source = Arc::new(offshoot::testing::ByteSource::new(image.to_vec()));
    let geometry = Geometry::new(len, PageSize::KIB_4).unwrap();
    let space: Heap = Heap::create(&Tree::default(), geometry, Some(source)).unwrap();
    Disk::over(space, SectorCount::new(SECTORS), Access::ReadWrite).unwrap()
}

#[test]
fn each_breach_has_its_error_and_the_connection_lives() {
    let limits = ServerLimits { request: ByteSize::mib(1), ..ServerLimits::default() };
    let served = Served::start(limits);
    served.add("rw", &blank(SECTORS));
    served.server.add(ExportName::new("ro").unwrap(), Export::new(blank(SECTORS)).read_only()).unwrap();
    let end = SECTORS * 512;
    let mib = 1 << 20;
    for structured in [false, true] {
        for (export, flags, kind, offset, len, payload, want) in [
            ("rw", 0, READ, end, 512, 0, EINVAL),
            ("rw", 0, READ, end - 512, 1024, 0, EINVAL),
            ("rw", 0, READ, u64::MAX - 511, 512, 0, EINVAL),
            ("rw", 0, READ, 3, 512, 0, EINVAL),
            ("rw", 0, READ, 0, 100, 0, EINVAL),
            ("rw", 0, READ, 0, 0, 0, EINVAL),
            ("rw", 0, READ, 0, mib + 512, 0, EINVAL),
            ("rw", 0, READ, 0, u32::MAX, 0, EINVAL),
            ("rw", NO_HOLE, READ, 0, 512, 0, EINVAL),
            ("rw", 0, WRITE, end, 512, 512, ENOSPC),
            ("rw", 0, WRITE, end - 512, 1024, 1024, ENOSPC),
            ("rw", 0, WRITE, 7, 512, 512, EINVAL),
            ("rw", 0, WRITE, 0, 513, 513, EINVAL),
            ("rw", 0, WRITE, 0, 0, 0, EINVAL),
            ("rw", 0, WRITE, 0, mib + 512, mib + 512, EINVAL),
            ("rw", 0x8000, WRITE, 0, 512, 512, EINVAL),
            ("rw", DF, WRITE, 0, 512, 512, EINVAL),
            ("rw", 0, TRIM, end - 512, 1024, 0, EINVAL),
            ("rw", REQ_ONE, TRIM, 0, 512, 0, EINVAL),
            ("rw", 0, TRIM, 0, 0, 0, EINVAL),
            ("rw", 0, WRITE_ZEROES, end, 512, 0, ENOSPC),
            ("rw", 0, WRITE_ZEROES, 0, u32::MAX - 511, 0, ENOSPC),
            ("rw", NO_HOLE | FAST_ZERO, WRITE_ZEROES, 0, 512, 0, ENOTSUP),
            ("rw", DF, WRITE_ZEROES, 0, 512, 0, EINVAL),
            ("rw", 0, CACHE, end, 512, 0, EINVAL),
            ("rw", 0, FLUSH, 512, 0, 0, EINVAL),
            ("rw", 0, FLUSH, 0, 512, 0, EINVAL),
            ("rw", 0, BLOCK_STATUS, 0, 512, 0, EINVAL),
            ("rw", 0, 8, 0, 512, 0, EINVAL),
            ("rw", 0, u16::MAX, 0, 0, 0, EINVAL),
            ("ro", 0, WRITE, 0, 512, 512, EPERM),
            ("ro", 0, WRITE, 0, mib, mib, EPERM),
            ("ro", 0, TRIM, 0, 512, 0, EPERM),
            ("ro", 0, WRITE_ZEROES, 0, 512, 0, EPERM),
        ] {
            let mut client = Client::connect(&served.path).unwrap();
            if structured {
                client.structure().unwrap();
            }
            client.go(export).unwrap();
            let reply = client.call(flags, kind, offset, len, &vec![9; payload as usize]).unwrap();
            assert_eq!(reply.error, want, "{export}: command {kind} {flags:#x} at {offset}, {len} bytes");
            assert!(reply.chunks.is_empty());
            assert_eq!(client.read(0, 1024).unwrap(), [0; 1024], "and nothing was written");
            client.disconnect().unwrap();
        }
    }
    let mut client = served.open("rw");
    assert_eq!(client.call(DF, READ, 0, mib + 512, &[]).unwrap().error, EOVERFLOW);
    let mut simple = Client::connect(&served.path).unwrap();
    simple.go("rw").unwrap();
    assert_eq!(simple.call(DF, READ, 0, 512, &[]).unwrap().error, EINVAL, "it was not offered");
    // A payload that is not going to end is not waited for.
    client.request(0, WRITE, 0, 1 << 30, &[]).unwrap();
    assert_eq!(client.reply().unwrap().error, EINVAL);
    assert!(client.is_over());
}

#[test]
fn another_magic_is_hung_up_on() {
    let served = Served::with(&[("d", blank(8))]);
    let mut client = served.open("d");
    client.send(&[0x25; 28]).unwrap();
    assert!(client.is_over());
}

#[test]
fn replies_in_any_order_each_to_its_request() {
    let served = Served::with(&[("d", blank(16 << 11))]);
    let mut client = served.open("d");
    let mut want = HashMap::new();
    // Long ones go to workers, short ones do not; all are under way at once.
    for at in 0..48u64 {
        let len = if at % 3 == 0 { 256 << 10 } else { 4096 };
        want.insert(client.request(0, WRITE, at * (256 << 10), len, &vec![at as u8 + 1; len as usize]).unwrap(), ());
    }
    for _ in 0..48 {
        let reply = client.reply().unwrap();
        assert_eq!(reply.error, 0);
        want.remove(&reply.cookie).expect("each once");
    }
    let reads: HashMap<_, _> = (0..48u64)
        .map(|at| {
            let len = if at % 3 == 0 { 256 << 10 } else { 4096 };
            (client.request(0, READ, at * (256 << 10), len, &[]).unwrap(), (at, len as usize))
        })
        .collect();
    for _ in 0..48 {
        let reply = client.reply().unwrap();
        let (at, len) = reads[&reply.cookie];
        assert!(reply.bytes(at * (256 << 10), len) == vec![at as u8 + 1; len]);
    }
}

#[test]
fn a_flush_that_stands_still_holds_up_nobody() {
    let (disk, watch) = watched::disk(64);
    let served = Served::with(&[("d", disk)]);
    let mut client = served.open("d");
    watch.hold_flushes();
    let flush = client.request(0, FLUSH, 0, 0, &[]).unwrap();
    let fua = client.request(FUA, WRITE, 0, 512, &[1; 512]).unwrap();
    // Others go past, on this connection too.
    client.request(0, WRITE, 512, 512, &[2; 512]).unwrap();
    assert_eq!(client.reply().unwrap().error, 0);
    client.request(0, TRIM, 4096, 4096, &[]).unwrap();
    assert_eq!(client.reply().unwrap().error, 0);
    assert_eq!(watch.flushes.load(Ordering::SeqCst), 0);
    watch.release();
    let replies = [client.reply().unwrap().cookie, client.reply().unwrap().cookie];
    assert!(replies.contains(&flush) && replies.contains(&fua));
    assert_eq!(watch.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn a_flush_on_one_connection_covers_writes_of_all() {
    let (disk, watch) = watched::disk(1024);
    let served = Served::with(&[("d", disk)]);
    let mut clients: Vec<_> = (0..4).map(|_| served.open("d")).collect();
    assert_eq!(clients[0].flags & 1 << 8, 1 << 8, "it says so");
    for round in 1..=8u64 {
        for (at, client) in clients.iter_mut().enumerate() {
            client.write(at as u64 * 4096, &[round as u8; 4096]).unwrap();
        }
        let flusher = (round % 4) as usize;
        clients[flusher].flush().unwrap();
        assert_eq!(watch.flushes.load(Ordering::SeqCst), round);
        assert_eq!(watch.writes_before_flush.load(Ordering::SeqCst), round * 4, "every write that was answered");
        for (at, reader) in clients.iter_mut().enumerate() {
            let other = (at as u64 + 1) % 4 * 4096;
            assert_eq!(reader.read(other, 4096).unwrap(), [round as u8; 4096], "what one wrote all see");
        }
    }
    // FUA is a flush of its own, with every command that writes.
    let flushed = |before: u64| assert_eq!(watch.flushes.load(Ordering::SeqCst), before + 1);
    for (kind, payload) in [(WRITE, 512), (TRIM, 0), (WRITE_ZEROES, 0)] {
        let before = watch.flushes.load(Ordering::SeqCst);
        assert_eq!(clients[0].call(FUA, kind, 0, 512, &vec![3; payload]).unwrap().error, 0);
        flushed(before);
    }
    let before = watch.flushes.load(Ordering::SeqCst);
    assert_eq!(clients[0].call(FUA, READ, 0, 512, &[]).unwrap().error, 0);
    assert_eq!(watch.flushes.load(Ordering::SeqCst), before, "a read has nothing to make durable");
}

#[test]
fn what_the_disk_says_is_told() {
    let (disk, watch) = watched::disk(1024);
    let served = Served::with(&[("d", disk)]);
    for mut client in [served.open("d"), {
        let mut simple = Client::connect(&served.path).unwrap();
        simple.go("d").unwrap();
        simple
    }] {
        for (how, want) in [(ErrorKind::Other, EIO), (ErrorKind::StorageFull, ENOSPC)] {
            watch.fail(Some(how));
            for (kind, len, payload) in [
                (READ, 512, 0),
                (READ, 128 << 10, 0),
                (WRITE, 512, 512),
                (WRITE, 128 << 10, 128 << 10),
                (TRIM, 4096, 0),
                (WRITE_ZEROES, 4096, 0),
                (FLUSH, 0, 0),
            ] {
                let reply = client.call(0, kind, 0, len, &vec![1; payload]).unwrap();
                assert_eq!((reply.error, reply.chunks.len()), (want, 0), "command {kind}");
            }
            watch.fail(None);
            assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
        }
    }
    // A heap that is full is a disk that is.
    let limits = Limits { heap_pages: PageCount::new(2), ..Limits::default() };
    let small = Disk::blank(&Tree::new(limits), SectorCount::new(64), Access::ReadWrite).unwrap();
    served.add("small", &Arc::new(small));
    let mut client = served.open("small");
    client.write(0, &[1; 8192]).unwrap();
    assert_eq!(client.call(0, WRITE, 8192, 4096, &[1; 4096]).unwrap().error, ENOSPC);
    assert_eq!(client.call(NO_HOLE, WRITE_ZEROES, 8192, 4096, &[]).unwrap().error, ENOSPC);
    assert_eq!(client.call(0, WRITE_ZEROES, 8192, 4096, &[]).unwrap().error, 0);
}

#[test]
fn block_status_tells_holes_from_data() {
    let served = Served::with(&[("d", over(&[7; 3 * PAGE])), ("long", Arc::new(over_long(&[7; 2 * PAGE + 1])))]);
    let mut client = Client::open(&served.path, "d", &[BASE_ALLOCATION]).unwrap();
    let status = client.call(0, BLOCK_STATUS, 0, 3 * PAGE as u32, &[]).unwrap();
    assert_eq!(by_sector(&status, 0), [0; 24], "a base image is data");
    client.call(0, WRITE_ZEROES, PAGE as u64, PAGE as u32, &[]).unwrap();
    let status = client.call(0, BLOCK_STATUS, 512, 2 * PAGE as u32, &[]).unwrap();
    assert_eq!(by_sector(&status, 0), [[0; 7].as_slice(), &[3; 8], &[0; 1]].concat());

    let mut client = Client::open(&served.path, "long", &[BASE_ALLOCATION]).unwrap();
    let size = client.size as u32;
    let one = client.call(REQ_ONE, BLOCK_STATUS, 0, size, &[]).unwrap();
    assert!(matches!(&one.chunks[..], [Chunk::Status { extents, .. }] if extents[..] == [(3 * PAGE as u32, 0)]));
    client.write(8 * PAGE as u64, &[1; 512]).unwrap();
    client.call(NO_HOLE, WRITE_ZEROES, 9 * PAGE as u64, PAGE as u32, &[]).unwrap();
    let status = client.call(0, BLOCK_STATUS, 0, size, &[]).unwrap();
    let sectors = by_sector(&status, 0);
    assert_eq!(sectors.len() as u64, SECTORS, "to the last sector, which is in no whole page");
    let want = |sector: u64| if matches!(sector / 8, 0..3 | 8 | 9) { 0 } else { 3 };
    assert!(sectors.iter().zip(0..).all(|(flags, sector)| *flags == want(sector)), "{status:?}");
    // And a read sends no holes.
    let read = client.call(0, READ, 0, size, &[]).unwrap();
    assert!(read.chunks.iter().any(|chunk| matches!(chunk, Chunk::Hole { len, .. } if *len == 5 * PAGE as u32)));
    let bytes = read.bytes(0, size as usize);
    assert!(bytes[..2 * PAGE + 1].iter().all(|byte| *byte == 7) && bytes[8 * PAGE..8 * PAGE + 512] == [1; 512]);
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 2 * PAGE + 1 + 512);
}

#[test]
fn more_extents_than_a_reply_holds_are_told_in_parts() {
    let pages = 10_000u64;
    let served = Served::with(&[("d", blank(pages * 8))]);
    let mut client = Client::open(&served.path, "d", &[BASE_ALLOCATION, DIRTY_BITMAP]).unwrap();
    for page in (0..pages).step_by(2) {
        client.request(0, WRITE, page * 4096, 512, &[1; 512]).unwrap();
    }
    (0..pages / 2).for_each(|_| assert_eq!(client.reply().unwrap().error, 0));
    let (mut told, mut replies) = (Vec::new(), 0);
    while (told.len() as u64) < pages * 8 {
        let offset = told.len() as u64 * 512;
        let status = client.call(0, BLOCK_STATUS, offset, (pages * 4096 - offset) as u32, &[]).unwrap();
        let (data, dirty) = (by_sector(&status, 0), by_sector(&status, 1));
        assert!(
            data.iter().zip(&dirty).all(|(data, dirty)| (*data == 0) == (*dirty == 1)),
            "both contexts, alike here"
        );
        assert!(!data.is_empty(), "progress");
        told.extend(data);
        replies += 1;
    }
    assert!(replies > 1);
    assert!(told.iter().zip(0u64..).all(|(flags, sector)| *flags == if sector / 8 % 2 == 0 { 0 } else { 3 }));
}

#[test]
fn the_dirty_bitmap_is_what_was_written_since_the_fork() {
    let tree = Tree::default();
    let disk = Disk::blank(&tree, SectorCount::new(SECTORS), Access::ReadWrite).unwrap();
    let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
    let parent: Vm<Heap> =
        Vm::new(&tree, VmName::new("parent").unwrap(), layout, vec![(DiskName::new("d"), disk)]).unwrap();
    parent.start().unwrap();
    parent.disk("d").unwrap().write(Lba::ZERO, &[9; 8 * PAGE]).unwrap();
    let mut guest = AtRest(DeviceState::from_bytes(*b""));
    let clone = parent.fork(&mut guest).unwrap().spawn(CloneSpec::default()).unwrap();
    clone.start().unwrap();
    let disk = clone.disk("d").unwrap().clone();
    let served = Served::with(&[("clone", disk.clone())]);
    let mut client = Client::open(&served.path, "clone", &[DIRTY_BITMAP]).unwrap();
    let size = client.size as u32;
    let mut dirty = vec![0; SECTORS as usize];
    let mut dice = Dice::new(3);
    for round in 0..60 {
        let lba = dice.below(SECTORS);
        let count = 1 + dice.below((SECTORS - lba).min(24));
        let (kind, payload) =
            if round % 3 == 0 { (WRITE_ZEROES, vec![]) } else { (WRITE, vec![1; count as usize * 512]) };
        assert_eq!(client.call(0, kind, lba * 512, count as u32 * 512, &payload).unwrap().error, 0);
        // Whole pages are what is told apart.
        for sector in lba / 8 * 8..(lba + count).next_multiple_of(8).min(SECTORS) {
            dirty[sector as usize] = 1;
        }
        if round == 30 {
            // The next fork begins a new bitmap.
            clone.fork(&mut guest).unwrap();
            dirty.fill(0);
        }
        let from = dice.below(SECTORS);
        let status = client.call(0, BLOCK_STATUS, from * 512, size - from as u32 * 512, &[]).unwrap();
        let told = by_sector(&status, 0);
        let pages: Vec<_> = disk.dirty().unwrap().pages().map(|page| page.get()).collect();
        for (sector, flags) in (from..).zip(&told) {
            assert_eq!(*flags == 1, pages.contains(&(sector / 8)), "sector {sector} in round {round}");
            // A discarded page that was zeroes before differs in nothing: never told without need, never kept back.
            assert!(*flags == 0 || dirty[sector as usize] == 1, "sector {sector} in round {round}");
        }
        assert_eq!(told.len() as u64, SECTORS - from);
    }
}
