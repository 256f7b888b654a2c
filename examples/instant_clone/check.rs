//! The check: every VM against what the model says it must hold, byte by byte.
//!
//! A page that a VM or an ancestor wrote since the fork must be what the model says; any other page must be what the witness
//! saw at the cut. So the model is checked against the witness first, and then every clone against both.

use std::sync::Arc;

use offshoot::backing::Backing;
use offshoot::page::{ByteSize, GuestAddress, Lba};
use offshoot::{BoxError, Vm};

use crate::board::DISK;
use crate::common::random::Random;
use crate::disk::{BaseImage, SECTORS};
use crate::guest::{Lane, PAGE, SECTOR};
use crate::model::{Cut, Model};
use crate::witness::RamCopy;

/// Pages and sectors that nobody wrote, looked at in each VM unless all are.
const SAMPLE: u64 = 256;

/// How much is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coverage {
    /// Everything that the VM or any relative wrote, and a random sample of the rest.
    Written,
    /// Everything.
    Full,
}

/// What was compared, and what was found.
#[derive(Clone, Default, Debug)]
pub struct Findings {
    pub pages: u64,
    pub sectors: u64,
    pub violations: u64,
    /// The first few, in words.
    pub examples: Vec<String>,
}

impl Findings {
    const EXAMPLES: usize = 5;

    pub fn violation(&mut self, what: impl FnOnce() -> String) {
        self.violations += 1;
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(what());
        }
    }

    pub fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.sectors += other.sectors;
        self.violations += other.violations;
        self.examples.extend(other.examples);
        self.examples.truncate(Self::EXAMPLES);
    }
}

/// What is the same for all VMs of a run.
pub struct Setting {
    pub lanes: Arc<[Lane]>,
    pub firmware: Vec<(u64, Vec<u8>)>,
    pub ram: ByteSize,
    pub base: Arc<BaseImage>,
    pub coverage: Coverage,
    pub seed: u64,
}

impl Setting {
    /// The pages that any VM of the run may write, ascending, with the lane and index of those that guests visit.
    fn written_pages(&self) -> Vec<(u64, Role)> {
        let mut pages = Vec::new();
        for (number, lane) in self.lanes.iter().enumerate() {
            pages.push((lane.control.get() / PAGE as u64, Role::Control { lane: number }));
            pages.extend((0..lane.pages()).map(|index| (lane.page(index), Role::Visited { lane: number, index })));
        }
        pages.extend((0..self.firmware.len()).map(|part| (self.firmware[part].0, Role::Firmware { part })));
        pages.sort_unstable_by_key(|(page, _)| *page);
        pages
    }

    fn written_sectors(&self) -> Vec<(u64, (usize, u32))> {
        let each = self.lanes.iter().enumerate();
        let slots = each.flat_map(|(n, lane)| (0..lane.slots()).map(move |slot| (lane.lba(slot).get(), (n, slot))));
        let mut sectors: Vec<_> = slots.collect();
        sectors.sort_unstable_by_key(|(lba, _)| *lba);
        sectors
    }

    /// The numbers below `total` that are compared though nobody writes there.
    fn rest(&self, coverage: Coverage, total: u64, salt: u64, mut is_written: impl FnMut(u64) -> bool) -> Vec<u64> {
        let mut numbers: Vec<u64> = match coverage {
            Coverage::Full => (0..total).collect(),
            Coverage::Written => {
                let mut random = Random::new(self.seed ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                (0..SAMPLE).map(|_| random.below(total)).collect()
            }
        };
        numbers.retain(|&number| !is_written(number));
        numbers
    }

    /// What the witness is to copy. Not everything even where everything is checked: to read a page of the parent's for the first
    /// time may take memory, which is to be measured yet.
    pub fn witnessed_pages(&self) -> Vec<u64> {
        let written = self.written_pages();
        let total = self.ram.get() / PAGE as u64;
        let rest = self.rest(Coverage::Written, total, 0, |page| find(&written, page).is_some());
        written.iter().map(|(page, _)| *page).chain(rest).collect()
    }
}

/// What a page is for.
#[derive(Clone, Copy)]
enum Role {
    Control { lane: usize },
    Visited { lane: usize, index: u32 },
    Firmware { part: usize },
}

fn find<T: Copy>(sorted: &[(u64, T)], number: u64) -> Option<T> {
    sorted.binary_search_by_key(&number, |(own, _)| *own).ok().map(|at| sorted[at].1)
}

/// Knows what every VM of a run must hold.
pub struct Checker {
    setting: Setting,
    /// The model at the first fork, from which all clones go on.
    root: (Arc<Cut>, Model),
    copy: RamCopy,
    pages: Vec<(u64, Role)>,
    sectors: Vec<(u64, (usize, u32))>,
}

impl Checker {
    /// Replays the parent up to its fork.
    pub fn new(setting: Setting, cut: Arc<Cut>, copy: RamCopy) -> Result<Self, String> {
        let mut model = Model::power_on(&setting.lanes, cut.tag);
        model.follow(&cut).map_err(|wrong| format!("the parent: {wrong}"))?;
        let (pages, sectors) = (setting.written_pages(), setting.written_sectors());
        Ok(Self { setting, root: (cut, model), copy, pages, sectors })
    }

    /// Compares the model with the witness: they know nothing of each other.
    pub fn check_witness(&self) -> Findings {
        let mut findings = Findings::default();
        let mut expected = [0; PAGE];
        for page in self.setting.witnessed_pages() {
            match find(&self.pages, page) {
                // The parent was cut between two instructions: these may be half written, and the clones finish them.
                Some(Role::Control { .. }) => continue,
                Some(Role::Visited { lane, index }) if index == self.root.1.lanes[lane].under_way() => continue,
                Some(Role::Visited { lane, index }) => {
                    self.root.1.lanes[lane].stamp(index).render(page, &mut expected);
                }
                Some(Role::Firmware { part }) => self.firmware(part, &mut expected),
                None => expected.fill(0),
            }
            findings.pages += 1;
            if self.copy.page(page).unwrap_or(&[0; PAGE]) != expected {
                findings.violation(|| format!("the parent at its fork: page {page:#x} is not as the model has it"));
            }
        }
        findings
    }

    /// The state of the model at a cut.
    fn model_at(&self, cut: &Arc<Cut>) -> Result<Model, String> {
        // From the cut up to what is known, and down again.
        let mut path = vec![cut];
        let mut model = loop {
            let last = path[path.len() - 1];
            match &last.origin {
                _ if Arc::ptr_eq(last, &self.root.0) => {
                    path.pop();
                    break self.root.1.clone();
                }
                None => break Model::power_on(&self.setting.lanes, last.tag),
                Some(origin) => path.push(origin),
            }
        };
        path.into_iter().rev().try_for_each(|cut| model.follow(cut))?;
        Ok(model)
    }

    /// Compares a VM that rests at the end of a round with what it must hold.
    pub fn check<R: Backing>(&self, vm: &Vm<R>, cut: &Arc<Cut>) -> Result<Findings, BoxError> {
        let mut findings = Findings::default();
        let name = vm.identity().name.as_str();
        match self.model_at(cut) {
            Ok(model) => {
                self.check_ram(vm, &model, cut.tag, &mut findings)?;
                self.check_disk(vm, &model, cut.tag, &mut findings)?;
            }
            Err(wrong) => findings.violation(|| format!("{name}: {wrong}")),
        }
        Ok(findings)
    }

    fn check_ram<R: Backing>(
        &self,
        vm: &Vm<R>,
        model: &Model,
        tag: u32,
        findings: &mut Findings,
    ) -> Result<(), BoxError> {
        let total = self.setting.ram.get() / PAGE as u64;
        let rest =
            self.setting.rest(self.setting.coverage, total, tag.into(), |page| find(&self.pages, page).is_some());
        let roles = self.pages.iter().map(|(page, role)| (*page, Some(*role)));
        let (mut found, mut rendered) = ([0; PAGE], [0; PAGE]);
        for (page, role) in roles.chain(rest.into_iter().map(|page| (page, None))) {
            let expected: &[u8] = match role {
                Some(Role::Visited { lane, index }) => {
                    let (stamp, root) = (model.lanes[lane].stamp(index), self.root.1.lanes[lane].steps());
                    if stamp.count > 0 && stamp.step >= root {
                        stamp.render(page, &mut rendered);
                        &rendered
                    } else {
                        self.copy.page(page).unwrap_or(&[0; PAGE])
                    }
                }
                Some(Role::Control { lane }) => {
                    rendered.copy_from_slice(&model.lanes[lane].control_page());
                    &rendered
                }
                Some(Role::Firmware { part }) => {
                    self.firmware(part, &mut rendered);
                    &rendered
                }
                None => &[0; PAGE],
            };
            vm.ram().read(GuestAddress::new(page * PAGE as u64), &mut found)?;
            findings.pages += 1;
            if found != expected {
                findings.violation(|| differ(vm, "page", page, expected, &found));
            }
        }
        Ok(())
    }

    fn check_disk<R: Backing>(
        &self,
        vm: &Vm<R>,
        model: &Model,
        tag: u32,
        findings: &mut Findings,
    ) -> Result<(), BoxError> {
        let disk = vm.disk(DISK).ok_or("the disk is gone")?;
        let is_written = |lba| find(&self.sectors, lba).is_some();
        let rest = self.setting.rest(self.setting.coverage, SECTORS.get(), tag.into(), is_written);
        let written = self.sectors.iter().map(|(lba, place)| (*lba, Some(*place)));
        let (mut found, mut expected) = ([0; SECTOR], [0; SECTOR]);
        for (lba, place) in written.chain(rest.into_iter().map(|lba| (lba, None))) {
            match place.and_then(|(lane, slot)| model.lanes[lane].record(slot)) {
                Some(record) => record.render(Lba::new(lba), &mut expected),
                None => self.setting.base.sector(Lba::new(lba), &mut expected),
            }
            disk.read(Lba::new(lba), &mut found)?;
            findings.sectors += 1;
            if found != expected {
                findings.violation(|| differ(vm, "sector", lba, &expected, &found));
            }
        }
        Ok(())
    }

    fn firmware(&self, part: usize, into: &mut [u8]) {
        let bytes = &self.setting.firmware[part].1;
        into[..bytes.len()].copy_from_slice(bytes);
        into[bytes.len()..].fill(0);
    }
}

fn differ<R: Backing>(vm: &Vm<R>, what: &str, number: u64, expected: &[u8], found: &[u8]) -> String {
    let at = expected.iter().zip(found).position(|(one, other)| one != other).unwrap_or_default() & !3;
    let word = |from: &[u8]| from[at..at + 4].iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (name, expected, found) = (&vm.identity().name, word(expected), word(found));
    format!("{name}: {what} {number:#x} holds {found} at byte {at}, must hold {expected}")
}
