//! Forks in the middle of I/O: with their exports drained, all disks are cut at one instant between requests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use offshoot::backing::Heap;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Drained, Export};
use offshoot::page::{ByteSize, Lba, PageSize, SectorCount};
use offshoot::ram::RamLayout;
use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, Guest, Tree, Vm, VmName};

use super::client::*;
use super::{Served, blank, until};

/// A guest all of whose I/O comes through exports.
struct Remote {
    exports: Vec<Arc<Export>>,
    drained: Vec<Drained>,
}

impl Guest for Remote {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.drained = self.exports.iter().map(|export| export.drain()).collect();
        Ok(())
    }
    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_bytes(*b""))
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.drained.clear();
        Ok(())
    }
}

const WRITERS: u64 = 4;
/// Of each writer: short, so that the reading thread writes it, or long, so that a worker does.
const LENGTHS: [usize; 2] = [16 << 10, 128 << 10];
const SLOT: u64 = 256 << 10;

#[test]
fn a_fork_among_parallel_writers_is_one_instant() {
    let tree = Tree::default();
    let disks = ["first", "second"].map(|name| {
        let disk = Disk::blank(&tree, SectorCount::new(WRITERS * SLOT / 512), Access::ReadWrite).unwrap();
        (DiskName::new(name), disk)
    });
    let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
    let vm: Vm<Heap> = Vm::new(&tree, VmName::new("parent").unwrap(), layout, disks.into()).unwrap();
    vm.start().unwrap();
    let served = Served::with(&[]);
    let exports = ["first", "second"].map(|name| served.add(name, vm.disk(name).unwrap()));
    let mut guest = Remote { exports: exports.into(), drained: Vec::new() };
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|threads| {
        for writer in 0..WRITERS {
            let (mut first, mut second) = (served.open("first"), served.open("second"));
            let (stop, rounds) = (&stop, &rounds);
            threads.spawn(move || {
                let len = LENGTHS[(writer % 2) as usize];
                let mut sequence = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    sequence += 1;
                    let data = sequence.to_le_bytes().repeat(len / 8);
                    // The second disk hears of it only once the first has it.
                    first.write(writer * SLOT, &data).unwrap();
                    second.write(writer * SLOT, &data).unwrap();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                (first.disconnect().unwrap(), second.disconnect().unwrap())
            });
        }
        let mut seen = 0;
        for fork in 0..60 {
            let before = rounds.load(Ordering::Relaxed);
            let clone = vm.fork(&mut guest).unwrap().spawn(CloneSpec::default()).unwrap();
            for writer in 0..WRITERS {
                let len = LENGTHS[(writer % 2) as usize];
                let [first, second] = ["first", "second"].map(|name| {
                    let mut bytes = vec![0; len];
                    clone.disk(name).unwrap().read(Lba::new(writer * SLOT / 512), &mut bytes).unwrap();
                    let sequence = u64::from_le_bytes(*bytes.first_chunk().unwrap());
                    assert!(bytes == sequence.to_le_bytes().repeat(len / 8), "half a write in fork {fork}");
                    sequence
                });
                assert!(first == second || first == second + 1, "{first} and {second} were never there together");
                seen = seen.max(first);
            }
            until("the writers go on", || rounds.load(Ordering::Relaxed) > before);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(seen > 10, "the writers hardly ran");
    });
}

#[test]
fn what_comes_while_drained_waits_and_then_goes_on() {
    let disk = blank(1024);
    let served = Served::with(&[]);
    let export = served.add("d", &disk);
    let mut client = served.open("d");
    client.write(0, &[1; 512]).unwrap();
    let drained = export.drain();
    let second = export.drain();
    let (sent, replied) = mpsc::channel();
    let waiting = thread::spawn(move || -> io::Result<()> {
        // One for the reading thread, one for a worker.
        client.request(0, WRITE_ZEROES, 4096, 4096, &[])?;
        client.request(0, WRITE, 0, 512, &[2; 512])?;
        sent.send(()).expect("the test waits for it");
        assert_eq!((client.reply()?.error, client.reply()?.error), (0, 0));
        client.disconnect()
    });
    replied.recv().unwrap();
    drop(drained);
    // Another connection can be made meanwhile, and another export goes on.
    served.add("other", &blank(8));
    served.open("other").write(0, &[1; 512]).unwrap();
    let mut seen = [0; 512];
    disk.read(Lba::ZERO, &mut seen).unwrap();
    assert_eq!(seen, [1; 512], "still held by the second guard");
    drop(second);
    waiting.join().unwrap().unwrap();
    disk.read(Lba::ZERO, &mut seen).unwrap();
    assert_eq!(seen, [2; 512]);
}

#[test]
fn requests_held_by_a_drain_are_turned_away_by_a_shutdown() {
    let disk = blank(1024);
    let served = Served::with(&[]);
    let export = served.add("d", &disk);
    let mut client = served.open("d");
    let drained = export.drain();
    client.request(0, WRITE, 0, 512, &[2; 512]).unwrap();
    client.request(0, FLUSH, 0, 0, &[]).unwrap();
    served.server.shutdown(std::time::Duration::from_secs(30));
    while let Ok(reply) = client.reply() {
        assert_eq!(reply.error, ESHUTDOWN);
    }
    drop(drained);
    let mut seen = [0; 512];
    disk.read(Lba::ZERO, &mut seen).unwrap();
    assert_eq!(seen, [0; 512], "what was turned away was not done");
}
