//! What a simulated vCPU needs of its host: loads and stores on the engine's RAM, and a clock that ends a batch.

use offshoot::backing::Page4K;
use offshoot::page::GuestAddress;
use offshoot::ram::{RamError, RamView};
use rvsim::{Clock, Memory, MemoryAccess, Op};

/// Guest memory for one batch of instructions.
pub struct GuestMemory<'a> {
    view: RamView<'a, Page4K>,
    refused: Option<RamError>,
}

impl<'a> GuestMemory<'a> {
    pub fn new(view: RamView<'a, Page4K>) -> Self {
        Self { view, refused: None }
    }

    /// Why the last access failed: the simulator itself only knows that it did.
    pub fn refused(&self) -> Option<&RamError> {
        self.refused.as_ref()
    }

    fn load(&self, at: GuestAddress, bytes: usize) -> Result<u64, RamError> {
        match bytes {
            1 => self.view.load::<u8>(at).map(u64::from),
            2 => self.view.load::<u16>(at).map(u64::from),
            4 => self.view.load::<u32>(at).map(u64::from),
            _ => self.view.load::<u64>(at),
        }
    }

    fn store(&self, at: GuestAddress, bytes: usize, word: u64) -> Result<(), RamError> {
        match bytes {
            1 => self.view.store(at, word as u8),
            2 => self.view.store(at, word as u16),
            4 => self.view.store(at, word as u32),
            _ => self.view.store(at, word),
        }
    }
}

/// Room for the largest guest word, aligned for it.
#[repr(align(8))]
struct Cell([u8; 8]);

impl Memory for GuestMemory<'_> {
    /// `rvsim` moves values of types it does not name. Its own implementation for byte slices can put them into memory
    /// and take them out, so each value goes through a slice of eight bytes on its way.
    fn access<T: Copy>(&mut self, address: u32, access: MemoryAccess<T>) -> bool {
        let at = GuestAddress::new(u64::from(address));
        let mut cell = Cell([0; 8]);
        let done = if let MemoryAccess::Store(_) = access {
            Memory::access(&mut cell.0[..], 0, access);
            self.store(at, size_of::<T>(), u64::from_le_bytes(cell.0))
        } else {
            self.load(at, size_of::<T>()).map(|word| {
                cell.0 = word.to_le_bytes();
                Memory::access(&mut cell.0[..], 0, access);
            })
        };
        self.refused = done.err();
        self.refused.is_none()
    }
}

/// A clock that stops the simulator after so many instructions. The guest is not told the time.
pub struct Countdown {
    left: u32,
}

impl Countdown {
    pub fn new(instructions: u32) -> Self {
        Self { left: instructions }
    }
}

impl Clock for Countdown {
    fn read_cycle(&self) -> u64 {
        0
    }

    fn read_time(&self) -> u64 {
        0
    }

    fn read_instret(&self) -> u64 {
        0
    }

    fn progress(&mut self, _: &Op) {
        self.left -= 1;
    }

    fn check_quota(&self) -> bool {
        self.left > 0
    }
}
