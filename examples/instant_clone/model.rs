//! The oracle: what each VM must hold, worked out without asking the engine.
//!
//! A guest is a pure function of its tags and its steps. All that the model is told of a VM is from whom and where it was cut
//! ([`Cut`]), which tag it was given, how many steps it had completed (from its vCPU's register) and for which
//! step it took its tag. From that it replays the guest, page by page, from power-on.

use std::sync::Arc;

use offshoot::page::Lba;

use crate::guest::{Lane, PAGE, ROUND, Record, SECTOR, Stamp, control, put};

/// How far one vCPU has got.
#[derive(Clone, Copy, Debug)]
pub struct Reached {
    /// Steps completed. The next one may be under way.
    pub steps: u32,
    /// The tag that it said it took, and for which step.
    pub hello: Option<(u32, u32)>,
}

/// One VM at one instant.
#[derive(Debug)]
pub struct Cut {
    /// What it was cloned from; `None` for the first parent.
    pub origin: Option<Arc<Cut>>,
    /// The tag that it was given.
    pub tag: u32,
    pub reached: Vec<Reached>,
}

/// A machine, replayed.
#[derive(Clone)]
pub struct Model {
    pub lanes: Vec<LaneModel>,
}

/// One vCPU and what it wrote.
#[derive(Clone)]
pub struct LaneModel {
    pub lane: Lane,
    /// The tag in the control page.
    given: u32,
    /// The tag that the guest goes by.
    tag: u32,
    step: u32,
    index: u32,
    left: u32,
    slot: u32,
    stamps: Vec<Stamp>,
    records: Vec<Option<Record>>,
    /// The slot and record that it wrote last.
    last: Option<(u32, Record)>,
    request_step: u32,
}

impl Model {
    /// A machine at power-on.
    pub fn power_on(lanes: &[Lane], tag: u32) -> Self {
        let lane = |&lane: &Lane| LaneModel {
            lane,
            given: tag,
            tag: 0,
            step: 0,
            index: 0,
            left: 0,
            slot: 0,
            stamps: vec![Stamp::default(); lane.pages() as usize],
            records: vec![None; lane.slots() as usize],
            last: None,
            request_step: 0,
        };
        Self { lanes: lanes.iter().map(lane).collect() }
    }

    /// Goes on as the VM of `cut` did, from where it was cloned (this model) to where it was cut.
    pub fn follow(&mut self, cut: &Cut) -> Result<(), String> {
        for (lane, reached) in self.lanes.iter_mut().zip(&cut.reached) {
            lane.given = cut.tag;
            lane.follow(*reached)?;
        }
        Ok(())
    }
}

impl LaneModel {
    fn follow(&mut self, reached: Reached) -> Result<(), String> {
        // One step may have been under way with the old tag; the next one must see the new one.
        let latest = self.step + 1;
        match reached.hello {
            Some((tag, step)) if tag == self.given && (self.step..=latest).contains(&step) => {
                self.run_to(step);
                self.take_tag();
            }
            Some((tag, step)) => {
                return Err(format!(
                    "given tag {} at step {}, it took tag {tag} for step {step}",
                    self.given, self.step
                ));
            }
            None if reached.steps <= latest => {}
            None => return Err(format!("given tag {}, it made {} steps without it", self.given, reached.steps)),
        }
        if reached.steps < self.step {
            return Err(format!("it made {} steps, and its origin {}", reached.steps, self.step));
        }
        self.run_to(reached.steps);
        Ok(())
    }

    fn take_tag(&mut self) {
        self.tag = self.given;
        (self.index, self.slot) = self.lane.start(self.tag);
        self.left = ROUND;
        self.request_step = self.step;
    }

    fn run_to(&mut self, steps: u32) {
        while self.step < steps {
            let stamp = &mut self.stamps[self.index as usize];
            *stamp = Stamp { tag: self.tag, count: stamp.count + 1, step: self.step };
            self.index = self.lane.after(self.index);
            self.step += 1;
            self.left -= 1;
            if self.left == 0 {
                let record = Record { tag: self.tag, step: self.step };
                self.records[self.slot as usize] = Some(record);
                self.last = Some((self.slot, record));
                self.request_step = self.step;
                self.slot = self.lane.slot_after(self.slot);
                self.left = ROUND;
            }
        }
    }

    pub fn steps(&self) -> u32 {
        self.step
    }

    /// The page of the step that is under way: it may be half written.
    pub fn under_way(&self) -> u32 {
        self.index
    }

    /// What the last visit left in a page; a count of zero if there was none.
    pub fn stamp(&self, index: u32) -> Stamp {
        self.stamps[index as usize]
    }

    pub fn record(&self, slot: u32) -> Option<Record> {
        self.records[slot as usize]
    }

    /// The control page at the end of a round.
    pub fn control_page(&self) -> Vec<u8> {
        let mut page = self.lane.control_page(self.given);
        debug_assert_eq!(page.len(), PAGE);
        put(&mut page, control::TAKEN_TAG, self.tag);
        put(&mut page, control::REQUEST_STEP, self.request_step);
        if let Some((slot, record)) = self.last {
            let lba: Lba = self.lane.lba(slot);
            put(&mut page, control::REQUEST_LBA, lba.get() as u32);
            let buffer = usize::from(control::BUFFER);
            record.render(lba, &mut page[buffer..buffer + SECTOR]);
        }
        page
    }
}
