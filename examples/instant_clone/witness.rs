//! A witness of the fork: an independent copy of the parent's RAM at the very instant of the cut.
//!
//! It sits between the engine and the guest, and copies while the guest is paused. What that takes is measured and left out of
//! the figures: no fork needs it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use offshoot::backing::Backing;
use offshoot::page::GuestAddress;
use offshoot::ram::Ram;
use offshoot::{BoxError, DeviceState, Guest};

use crate::guest::PAGE;

/// A guest that is watched.
pub struct Witness<'a, G, R: Backing> {
    guest: &'a mut G,
    ram: &'a Ram<R>,
    pages: &'a [u64],
    pub copy: RamCopy,
    /// How long copying took.
    pub took: Duration,
}

/// The pages that were not all zeroes, by number.
#[derive(Default)]
pub struct RamCopy(BTreeMap<u64, Box<[u8]>>);

impl RamCopy {
    /// The page's content; `None` if it was all zeroes.
    pub fn page(&self, number: u64) -> Option<&[u8]> {
        self.0.get(&number).map(|page| &**page)
    }
}

impl<'a, G: Guest, R: Backing> Witness<'a, G, R> {
    /// Watches these pages.
    pub fn new(guest: &'a mut G, ram: &'a Ram<R>, pages: &'a [u64]) -> Self {
        Self { guest, ram, pages, copy: RamCopy::default(), took: Duration::ZERO }
    }
}

impl<G: Guest, R: Backing> Guest for Witness<'_, G, R> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.guest.pause()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let state = self.guest.save()?;
        let start = Instant::now();
        let mut page = [0; PAGE];
        for &number in self.pages {
            self.ram.read(GuestAddress::new(number * PAGE as u64), &mut page)?;
            if page.iter().any(|byte| *byte != 0) {
                self.copy.0.insert(number, page.into());
            }
        }
        self.took = start.elapsed();
        Ok(state)
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.guest.resume()
    }
}
