//! The job: a guest runs up to where it waits for an input and is forked; then a clone takes one input after the other, and is reset in place.
//!
//! **The loop to learn from is [`Fuzzer::one`]**: run the input to a verdict, reset. All else measures and checks.

use std::time::{Duration, Instant};

use offshoot::backing::Backing;
use offshoot::disk::{Access, Disk};
use offshoot::page::{GuestAddress, Lba, PageIndex, PageSet, SECTOR_SIZE, SectorCount};
use offshoot::{BoxError, CloneSpec, DiskName, ForkPoint, Tree, Vm, VmName};

use crate::common::args::Fault;
use crate::guest::{Bell, INPUT, PAGE, RESULT, Verdict, address, result, verdict_of};
use crate::machine::{Cpu, Hypervisor, Timed};
use crate::mutator::Mutator;
use crate::options::Options;
use crate::report::Report;

const DISK: &str = "disk";
const SECTORS: u64 = 64;
/// How often the same guest is destroyed and made anew, for comparison.
const RESPAWNS: usize = 100;
/// RAM is compared in pieces of this size.
const PIECE: usize = 64 << 10;

/// A clone that takes inputs.
struct Fuzzer<'h, H: Hypervisor> {
    hypervisor: &'h H,
    cpu: Timed<H::Cpu>,
    vm: Vm<H::Ram>,
    /// What the host writes in a run: the page with the input.
    by_host: PageSet,
}

/// What one run took.
struct Took {
    run: Duration,
    reset: Duration,
    load: Duration,
    pages: u64,
}

impl<'h, H: Hypervisor> Fuzzer<'h, H> {
    /// A clone at the fork point.
    fn spawn(hypervisor: &'h H, point: &ForkPoint<H::Ram>) -> Result<Self, BoxError> {
        let vm = point.spawn(CloneSpec::default())?;
        let cpu = hypervisor.restore(&vm, point.device_state())?;
        vm.start()?;
        let by_host = [PageIndex::new(INPUT / PAGE)].into_iter().collect();
        Ok(Self { hypervisor, cpu: Timed { cpu, load: Duration::ZERO }, vm, by_host })
    }

    /// One input: run to a verdict, and everything put back.
    fn one(&mut self, input: &[u8]) -> Result<(Verdict, Took), BoxError> {
        let start = Instant::now();
        let verdict = self.run(input)?;
        let run = start.elapsed();

        let start = Instant::now();
        let pages = self.hypervisor.reset(&self.vm, &mut self.cpu, &self.by_host)?.get();
        Ok((verdict, Took { run, reset: start.elapsed(), load: self.cpu.load, pages }))
    }

    fn run(&mut self, input: &[u8]) -> Result<Verdict, BoxError> {
        let ram = self.vm.ram();
        ram.store(GuestAddress::new(INPUT), input.len() as u32)?;
        ram.write(GuestAddress::new(INPUT + 4), input)?;
        let found = |offset| ram.load::<u32>(address(RESULT, offset));
        loop {
            return Ok(match self.cpu.cpu.run(ram)? {
                Bell::Ready => return Err("the guest started again".into()),
                Bell::Log => {
                    let mut sector = [0; SECTOR_SIZE as usize];
                    ram.read(GuestAddress::new(RESULT), &mut sector)?;
                    let lba = Lba::new(u64::from(found(result::DIGEST)?) % SECTORS);
                    self.vm.disk(DISK).ok_or("the disk is gone")?.write(lba, &sector)?;
                    continue;
                }
                Bell::Accepted => {
                    Verdict::Accepted { records: found(result::RECORDS)?, digest: found(result::DIGEST)? }
                }
                Bell::Rejected => Verdict::Rejected { reason: found(result::REASON)? },
                Bell::Smashed => Verdict::Smashed,
            });
        }
    }
}

/// RAM and disk of the fork point, to compare with.
struct Witness {
    ram: Vec<u8>,
    disk: Vec<u8>,
}

impl Witness {
    fn of<R: Backing>(vm: &Vm<R>) -> Result<Self, BoxError> {
        let mut ram = vec![0; vm.ram().layout().geometry().len().get() as usize];
        vm.ram().read(GuestAddress::ZERO, &mut ram)?;
        let mut disk = vec![0; (SECTORS * SECTOR_SIZE) as usize];
        vm.disk(DISK).ok_or("the disk is gone")?.read(Lba::new(0), &mut disk)?;
        Ok(Self { ram, disk })
    }

    /// Where a VM differs, in words.
    fn differs<R: Backing>(&self, vm: &Vm<R>) -> Result<Option<String>, BoxError> {
        let mut found = vec![0; PIECE];
        for (piece, expected) in self.ram.chunks(PIECE).enumerate() {
            let (start, found) = (piece * PIECE, &mut found[..expected.len()]);
            vm.ram().read(GuestAddress::new(start as u64), found)?;
            if found != expected {
                let at = (0..expected.len()).find(|&at| found[at] != expected[at]).unwrap_or_default();
                return Ok(Some(format!("RAM at {:#x}", start + at)));
            }
        }
        let mut found = vec![0; self.disk.len()];
        vm.disk(DISK).ok_or("the disk is gone")?.read(Lba::new(0), &mut found)?;
        Ok((found != self.disk).then(|| "the disk".to_owned()))
    }
}

/// A guest that has run up to where it waits for its input, forked there.
fn fork_point<H: Hypervisor>(hypervisor: &H, options: &Options) -> Result<ForkPoint<H::Ram>, BoxError> {
    let tree = Tree::default();
    let disk = Disk::blank(&tree, SectorCount::new(SECTORS), Access::ReadWrite)?;
    disk.write(Lba::new(0), &[0x5a; (SECTORS * SECTOR_SIZE) as usize])?;
    let layout = hypervisor.layout(options.ram)?;
    let vm: Vm<H::Ram> = Vm::new(&tree, VmName::new("parser")?, layout, vec![(DiskName::new(DISK), disk)])?;
    for (page, bytes) in hypervisor.firmware(options.ram) {
        vm.ram().write(GuestAddress::new(page * PAGE), &bytes)?;
    }
    let mut cpu = hypervisor.power_on(&vm)?;
    vm.start()?;
    match cpu.run(vm.ram())? {
        Bell::Ready => Ok(vm.fork(&mut cpu)?),
        bell => Err(format!("the guest rings {bell:?} before it is ready").into()),
    }
}

/// Runs all inputs, checks what they did and what the resets left, and measures the other way to get back.
pub fn run<H: Hypervisor>(hypervisor: &H, options: &Options) -> Result<Report, BoxError> {
    let point = fork_point(hypervisor, options)?;
    let mut fuzzer = Fuzzer::spawn(hypervisor, &point)?;
    let witness = Witness::of(&fuzzer.vm)?;
    let mut report = Report::new(H::NAME, *options);
    for (number, input) in (1..=options.inputs).zip(Mutator::new(options.common.seed)) {
        let (verdict, took) = fuzzer.one(&input)?;
        report.took(took.run, took.reset, took.load, took.pages);
        report.verdict(number, verdict);
        if verdict != verdict_of(&input) {
            report
                .violation(|| format!("input {number}: the guest says {verdict:?}, must say {:?}", verdict_of(&input)));
        }
        if options.common.fault == Fault::FlipOneByte && number == options.check_every {
            fuzzer.vm.ram().store(GuestAddress::new(options.ram.get() / 2), 1u8)?;
        }
        if number % options.check_every == 0 || number == options.inputs {
            report.checked += 1;
            let differs = match witness.differs(&fuzzer.vm)? {
                None => fuzzer.cpu.cpu.differs(point.device_state())?,
                some => some,
            };
            if let Some(what) = differs {
                report.violation(|| format!("after input {number}: {what} is not as it was at the fork"));
            }
        }
    }
    for input in Mutator::new(options.common.seed).take(RESPAWNS) {
        fuzzer.run(&input)?;
        let start = Instant::now();
        drop(fuzzer);
        fuzzer = Fuzzer::spawn(hypervisor, &point)?;
        report.respawned(start.elapsed());
    }
    Ok(report)
}
