//! Reads and writes of one VM: guest memory with its hole, and sectors.

use super::{BLANK_SECTORS, DISKS, HIGH, HIGH_PAGES, IMAGE_BYTES, LOW_PAGES, Machine, PAGE, Power, pages};
use offshoot::VmStatus;
use offshoot::backing::Backing;
use offshoot::disk::DiskError;
use offshoot::page::{ByteOffset, Gfn, GuestAddress, Lba, PageCount, PageIndex, SectorCount};
use offshoot::ram::RamError;
use offshoot::testing::{Dice, Flat};

/// Guest memory as the test numbers it: both regions, and a page of hole after the first.
const ADDRESSES: u64 = (LOW_PAGES + 1 + HIGH_PAGES + 1) * PAGE;

/// The guest address of one of these, and the offset in the space if all `len` bytes are RAM.
fn place(at: u64, len: u64) -> (GuestAddress, Option<u64>) {
    let hole = (LOW_PAGES + 1) * PAGE;
    if at < hole {
        (GuestAddress::new(at), (at + len <= LOW_PAGES * PAGE).then_some(at))
    } else {
        let into = at - hole;
        let inside = into + len <= HIGH_PAGES * PAGE;
        (GuestAddress::new(HIGH + into), inside.then_some(LOW_PAGES * PAGE + into))
    }
}

/// The guest address of a page of the space.
pub fn place_of_page(page: u64) -> GuestAddress {
    let hole = if page < LOW_PAGES { 0 } else { PAGE };
    place(page * PAGE + hole, PAGE).0
}

pub fn capacity(disk: usize) -> u64 {
    [IMAGE_BYTES.div_ceil(512), BLANK_SECTORS][disk]
}

impl<B: Backing> Machine<B> {
    fn is_frozen(&self) -> bool {
        self.status == VmStatus::Frozen
    }

    /// The guest does something: its register shows how much.
    fn tick(&mut self) {
        self.guest.register += 1;
        self.now.register += 1;
    }

    pub fn write_ram(&mut self, at: u64, len: u64, seed: u64) {
        let (at, len) = (at % ADDRESSES, len % (3 * PAGE));
        let (address, offset) = place(at, len);
        let data = Dice::new(seed).bytes(len);
        match (self.vm.ram().write(address, &data), offset) {
            (Err(RamError::Frozen), _) => assert!(self.is_frozen(), "only a frozen VM refuses writes as frozen"),
            (Ok(()), Some(offset)) => {
                assert!(!self.is_frozen(), "a frozen VM was written");
                self.now.ram.write(ByteOffset::new(offset), &data);
                self.tick();
            }
            // An empty access at the end of a region is allowed, and changes nothing either way.
            (Ok(()), None) => panic!("{len} bytes at {address:?} are not all RAM, and were written"),
            (Err(RamError::Hole { .. }), None) => {}
            (Err(error), _) => panic!("write of {len} bytes at {address:?}: {error}"),
        }
        let mut found = vec![0; len as usize];
        match self.vm.ram().read(address, &mut found) {
            Ok(()) => assert_eq!(found, self.now.ram.read(ByteOffset::new(offset.expect("was RAM")), len)),
            Err(RamError::Hole { .. }) => assert_eq!(offset, None),
            Err(error) => panic!("read of {len} bytes at {address:?}: {error}"),
        }
    }

    pub fn discard_ram(&mut self, first: u64, count: u64) {
        let (first, count) = (first % (ADDRESSES / PAGE), count % 5);
        let (address, offset) = place(first * PAGE, count * PAGE);
        match (self.vm.ram().discard(Gfn::new(address.get() / PAGE), PageCount::new(count)), offset) {
            (Err(RamError::Frozen), _) => assert!(self.is_frozen()),
            (Ok(()), Some(offset)) => {
                assert!(!self.is_frozen(), "a frozen VM was discarded");
                self.now.ram.zero(pages(offset / PAGE, count));
            }
            (Err(RamError::Hole { .. }), None) => {}
            (result, _) => panic!("discard of {count} frames at {address:?}: {result:?}"),
        }
    }

    /// Writes a page with what its fork point holds there: dirty, and no different.
    pub fn write_back(&mut self, page: u64) {
        let page = page % (LOW_PAGES + HIGH_PAGES);
        let Some(origin) = &self.origin else { return };
        let old = origin.at.ram.page(PageIndex::new(page)).to_vec();
        if self.vm.ram().write(place_of_page(page), &old).is_ok() {
            assert!(!self.is_frozen());
            self.now.ram.write(ByteOffset::new(page * PAGE), &old);
        }
    }

    fn agree(&self, legal: bool, result: &Result<(), DiskError>) -> bool {
        match result {
            Ok(()) => assert!(legal && !self.is_frozen(), "was done, and must not be"),
            Err(DiskError::Frozen) => assert!(self.is_frozen()),
            Err(DiskError::OutOfRange { .. }) => assert!(!legal, "was refused, and is in range"),
            Err(error) => panic!("{error}"),
        }
        result.is_ok()
    }

    fn disk(&self, disk: usize) -> &offshoot::disk::Disk {
        self.vm.disk(DISKS[disk]).expect("every VM has both disks")
    }

    pub fn write_disk(&mut self, disk: usize, lba: u64, count: u64, seed: u64) {
        let (lba, count) = (lba % (capacity(disk) + 2), count % 20);
        let data = Dice::new(seed).bytes(count * 512);
        let result = self.disk(disk).write(Lba::new(lba), &data);
        if self.agree(lba + count <= capacity(disk), &result) {
            self.now.disks[disk].write(ByteOffset::new(lba * 512), &data);
            self.tick();
        }
    }

    pub fn discard(&mut self, disk: usize, lba: u64, count: u64) {
        let (lba, count) = (lba % (capacity(disk) + 2), count % 40);
        let result = self.disk(disk).discard(Lba::new(lba), SectorCount::new(count));
        if self.agree(lba + count <= capacity(disk), &result) {
            whole_pages(&mut self.now.disks[disk], lba, count, capacity(disk));
        }
    }

    pub fn write_zeroes(&mut self, disk: usize, lba: u64, count: u64) {
        let (lba, count) = (lba % (capacity(disk) + 2), count % 40);
        let result = self.disk(disk).write_zeroes(Lba::new(lba), SectorCount::new(count));
        if self.agree(lba + count <= capacity(disk), &result) {
            let flat = &mut self.now.disks[disk];
            whole_pages(flat, lba, count, capacity(disk));
            flat.write(ByteOffset::new(lba * 512), &vec![0; (count * 512) as usize]);
        }
    }

    pub fn power(&mut self, to: Power) {
        use VmStatus::{Off, Paused, Running};
        let (result, legal, next) = match to {
            Power::Start => (self.vm.start(), matches!(self.status, Off | Paused), Running),
            Power::Pause => (self.vm.pause(), self.status == Running, Paused),
            Power::Off => (self.vm.power_off(), matches!(self.status, Running | Paused), Off),
        };
        assert_eq!(result.is_ok(), legal, "{to:?} of a VM that is {:?}: {result:?}", self.status);
        if legal {
            self.status = next;
            self.guest.set_runs(next == Running);
        }
    }
}

/// Zeroes the pages of which every sector that the disk has lies in the range.
fn whole_pages(flat: &mut Flat, lba: u64, count: u64, capacity: u64) {
    for page in 0..capacity.div_ceil(8) {
        let (first, end) = (page * 8, (page * 8 + 8).min(capacity));
        if lba <= first && end <= lba + count {
            flat.zero(pages(page, 1));
        }
    }
}
