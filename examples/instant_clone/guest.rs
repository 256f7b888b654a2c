//! The contract between guest code, devices and the check: where things lie in guest memory, and what a page, a sector
//! and a request look like. Both guests (RISC-V and x86) are written to it, and so is the model.
//!
//! Each vCPU works in a *lane* of its own: a control page, a set of pages spread over all of RAM, a set of sectors spread over the
//! disk. One step of a guest:
//! 1. Look at the tag in the control page. If it is new (the VM was just started, or is a clone), take it: go to the page and
//!    sector that follow from it, and ring [`Bell::Hello`].
//! 2. Visit the next page of the lane: see that it is untouched or carries a stamp that is right ([`Bell::Broken`]
//!    otherwise), count the visit and stamp it anew.
//! 3. After each round of [`ROUND`] pages, write one sector ([`Bell::Write`]).

use offshoot::page::{ByteSize, GuestAddress, Lba, SectorCount};

/// Bytes of a guest page.
pub const PAGE: usize = 4096;
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Pages between two writes to the disk.
pub const ROUND: u32 = 64;
/// The most lanes, one for each vCPU.
pub const MAX_LANES: u32 = 4;
/// Where guest code starts.
pub const CODE: u64 = 0x1000;
/// Pages below this one are for code, control pages and whatever a processor needs (page tables).
pub const FIRST_FREE_PAGE: u64 = 0x100;
/// The least RAM that all of this fits into.
pub const LEAST_RAM: ByteSize = ByteSize::mib(4);

/// Pages of a lane come in runs of this many neighbours, as those of real guests do. A power of two.
pub const RUN: u32 = 16;
/// Steps between two [`Bell::Tick`]s. A power of two.
pub const TICK: u32 = 8;
/// The most pages that all lanes together visit.
const MOST_PAGES: u64 = 8192;
/// Sectors that all lanes together write.
const SECTORS: u64 = 1024;

/// Spreads tags: the first page and sector of a VM follow from its tag times this, shifted right by 16.
pub const SPREAD: u32 = 0x9e37_79b1;

/// Offsets in a control page. The VMM writes those up to `REQUEST_STEP`, the guest writes the rest.
pub mod control {
    /// Who the VM is: written before a VM runs, and by the customization of each clone.
    pub const TAG: u16 = 0x00;
    pub const FIRST: u16 = 0x04;
    pub const GAP: u16 = 0x08;
    pub const MASK: u16 = 0x0c;
    pub const LBA_FIRST: u16 = 0x10;
    pub const LBA_GAP: u16 = 0x14;
    pub const SLOT_MASK: u16 = 0x18;
    /// Steps completed when the bell was rung.
    pub const REQUEST_STEP: u16 = 0x40;
    pub const REQUEST_LBA: u16 = 0x44;
    /// The page that was found broken.
    pub const REQUEST_PAGE: u16 = 0x48;
    /// The tag that the guest took.
    pub const TAKEN_TAG: u16 = 0x4c;
    /// The sector to be written.
    pub const BUFFER: u16 = 0x200;
}

/// Offsets in a stamped page; the check is there twice, so that a page half old and half new is seen.
pub mod stamp {
    pub const PAGE: u16 = 0;
    pub const TAG: u16 = 4;
    pub const COUNT: u16 = 8;
    pub const STEP: u16 = 12;
    pub const CHECK: u16 = 16;
    pub const LAST_WORD: u16 = 4092;
}

/// Offsets in a sector that a guest wrote.
pub mod record {
    pub const TAG: u16 = 0;
    pub const STEP: u16 = 4;
    pub const LBA: u16 = 8;
    pub const CHECK: u16 = 12;
}

/// Why a guest left its code: an `ecall` with this number, or a write to the port of this number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bell {
    /// It has taken its tag.
    Hello = 0x10,
    /// The sector in its buffer is to be written.
    Write = 0x11,
    /// It found a page that nobody can have left so.
    Broken = 0x12,
    /// It has half written a page, and asks for nothing: for hypervisors that can stop a guest only when it rings.
    Tick = 0x13,
}

impl Bell {
    /// The bell of a number that a guest gave.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Hello, Self::Write, Self::Broken, Self::Tick].into_iter().find(|bell| *bell as u32 == number)
    }
}

/// What one vCPU works on.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    pub control: GuestAddress,
    first_page: u32,
    gap: u32,
    /// Number of its pages, less one; a power of two less one.
    mask: u32,
    first_lba: u32,
    lba_gap: u32,
    slot_mask: u32,
}

/// What the last visit left in a page.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stamp {
    pub tag: u32,
    pub count: u32,
    pub step: u32,
}

/// What the last round left in a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub tag: u32,
    pub step: u32,
}

/// The lanes of a machine with this much RAM, a multiple of the page size of at least [`LEAST_RAM`] and within the first 16 TiB.
pub fn lanes(ram: ByteSize, disk: SectorCount, count: u32) -> Vec<Lane> {
    let count = u64::from(count);
    let usable = ram.get() / PAGE as u64 - FIRST_FREE_PAGE;
    let most = MOST_PAGES.min(usable) / count.next_power_of_two();
    let pages = 1 << most.ilog2();
    let gap = usable / (pages / u64::from(RUN) * count);
    let slots = SECTORS / count.next_power_of_two();
    let lba_gap = disk.get() / (slots * count);
    let lane = |n: u64| Lane {
        control: GuestAddress::new(CODE + (1 + n) * PAGE as u64),
        first_page: (FIRST_FREE_PAGE + n * gap) as u32,
        gap: (gap * count) as u32,
        mask: (pages - 1) as u32,
        first_lba: (n * lba_gap) as u32,
        lba_gap: (lba_gap * count) as u32,
        slot_mask: (slots - 1) as u32,
    };
    (0..count).map(lane).collect()
}

impl Lane {
    /// How many pages it visits before it starts again.
    pub fn pages(&self) -> u32 {
        self.mask + 1
    }

    /// How many sectors it writes before it starts again.
    pub fn slots(&self) -> u32 {
        self.slot_mask + 1
    }

    /// The page number of its `index`-th page.
    pub fn page(&self, index: u32) -> u64 {
        u64::from(self.first_page + index / RUN * self.gap + index % RUN)
    }

    /// The sector of its `slot`-th record.
    pub fn lba(&self, slot: u32) -> Lba {
        Lba::new(u64::from(self.first_lba + slot * self.lba_gap))
    }

    /// Where a VM starts that has taken this tag: index of its page, slot of its sector.
    pub fn start(&self, tag: u32) -> (u32, u32) {
        let spread = tag.wrapping_mul(SPREAD) >> 16;
        (spread & self.mask, spread & self.slot_mask)
    }

    pub fn after(&self, index: u32) -> u32 {
        (index + 1) & self.mask
    }

    pub fn slot_after(&self, slot: u32) -> u32 {
        (slot + 1) & self.slot_mask
    }

    /// The control page as the VMM hands it to a guest.
    pub fn control_page(&self, tag: u32) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        put(&mut page, control::TAG, tag);
        put(&mut page, control::FIRST, self.first_page);
        put(&mut page, control::GAP, self.gap);
        put(&mut page, control::MASK, self.mask);
        put(&mut page, control::LBA_FIRST, self.first_lba);
        put(&mut page, control::LBA_GAP, self.lba_gap);
        put(&mut page, control::SLOT_MASK, self.slot_mask);
        page
    }
}

impl Stamp {
    /// The whole page that carries this stamp; a page that was never visited is all zeroes.
    pub fn render(&self, page: u64, into: &mut [u8]) {
        into.fill(0);
        if self.count == 0 {
            return;
        }
        let page = page as u32;
        let check = !(page ^ self.tag ^ self.count ^ self.step);
        put(into, stamp::PAGE, page);
        put(into, stamp::TAG, self.tag);
        put(into, stamp::COUNT, self.count);
        put(into, stamp::STEP, self.step);
        put(into, stamp::CHECK, check);
        put(into, stamp::LAST_WORD, check);
    }
}

impl Record {
    /// The whole sector.
    pub fn render(&self, lba: Lba, into: &mut [u8]) {
        into.fill(0);
        let lba = lba.get() as u32;
        put(into, record::TAG, self.tag);
        put(into, record::STEP, self.step);
        put(into, record::LBA, lba);
        put(into, record::CHECK, !(self.tag ^ self.step ^ lba));
    }
}

/// Writes one guest word; both guests are little-endian.
pub fn put(into: &mut [u8], at: u16, word: u32) {
    into[at as usize..at as usize + 4].copy_from_slice(&word.to_le_bytes());
}
