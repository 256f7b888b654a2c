//! The job: a parent that runs, a fork, a thousand clones, forks of forks, the parent's end, and the check.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use offshoot::page::GuestAddress;
use offshoot::{BoxError, ForkPoint, ForkTimings, Tree, TreeUsage};

use crate::check::{Checker, Setting};
use crate::common::args::Fault;
use crate::common::random::Random;
use crate::disk::{BaseImage, SECTORS, new_disk};
use crate::guest::{self, Lane, PAGE, ROUND};
use crate::hypervisor::Hypervisor;
use crate::machine::Machine;
use crate::memory::MemoryReport;
use crate::model::{Cut, Reached};
use crate::options::Options;
use crate::pool::{Progress, cores, share};
use crate::report::{Level, Report, Stages};
use crate::witness::Witness;

/// Rounds that a clone runs for.
const CLONE_ROUNDS: u32 = 2;
/// How many VMs of one depth are forked again, and into how many clones each.
const FORKED_AGAIN: usize = 16;
const CHILDREN: usize = 4;

/// A clone that ran, with what must be known to check it.
struct Member<H: Hypervisor> {
    machine: Machine<H>,
    origin: Arc<Cut>,
    tag: u32,
}

/// A clone that was started, and what that took.
type Started<H> = (Member<H>, Times);

/// What all steps of a run need.
struct Run<H: Hypervisor> {
    hypervisor: Arc<H>,
    lanes: Arc<[Lane]>,
    next_tag: AtomicU32,
}

/// Runs the whole job.
pub fn run<H: Hypervisor>(hypervisor: Arc<H>, options: &Options) -> Result<Report, BoxError> {
    let start = Instant::now();
    let lanes: Arc<[Lane]> = guest::lanes(options.ram, SECTORS, options.vcpus).into();
    let base = Arc::new(BaseImage::new(options.common.seed));
    let setting = Setting {
        lanes: lanes.clone(),
        firmware: hypervisor.firmware(options.ram),
        ram: options.ram,
        base: base.clone(),
        coverage: options.coverage,
        seed: options.common.seed,
    };
    let run = Run { hypervisor, lanes, next_tag: AtomicU32::new(1) };
    let mut stages = Stages::default();

    // 1. A parent runs until it has touched three quarters of the pages that it is to visit.
    let tree = Tree::default();
    let layout = run.hypervisor.layout(options.ram)?;
    let tag = run.fresh_tag();
    let disk = new_disk(&tree, &base)?;
    let mut parent = Machine::boot(&run.hypervisor, &tree, layout, disk, &run.lanes, tag)?;
    parent.wait_for(run.lanes[0].pages() * 3 / 4 / ROUND);

    // 2. It is forked while it runs, and goes on.
    let watched = setting.witnessed_pages();
    let mut witness = Witness::new(&mut parent.vcpus, parent.vm.ram(), &watched);
    let point = parent.vm.fork(&mut witness)?;
    let (copy, witness_took) = (witness.copy, witness.took);
    let root = Arc::new(Cut { origin: None, tag, reached: parent.vcpus.at_cut().to_vec() });
    let timings = point.timings();
    // The witness's copy is for the check: no fork needs it.
    let timings = ForkTimings { save: timings.save.saturating_sub(witness_took), ..timings };
    stages.forked(&timings);
    let mut levels = vec![Level { forks: vec![timings.stopped()], vms: options.clones }];

    // 3. Clones of that one instant, and forks of clones. One core is left to the parent, which runs all the time.
    let workers = cores().saturating_sub(1).max(1);
    let progress = Progress::new("clones running", options.clones.into());
    let clones = share(workers, 0..options.clones, &progress, |_| run.spawn(&point, &root))?;
    drop(progress);
    let mut generation: Vec<Member<H>> = clones.into_iter().map(|clone| stages.spawned(clone)).collect();
    let mut members: Vec<Member<H>> = Vec::new();
    let mut random = Random::new(options.common.seed);
    for _ in 1..options.depth {
        let chosen = choose(&mut generation, FORKED_AGAIN, &mut random);
        let progress = Progress::new("forks of clones", chosen.len() as u64);
        let forked = share(workers, chosen.iter_mut(), &progress, |member| run.fork_again(member))?;
        drop(progress);
        let mut level = Level::default();
        let mut children = Vec::new();
        for (timings, clones) in forked {
            stages.forked(&timings);
            level.forks.push(timings.stopped());
            children.extend(clones.into_iter().map(|clone| stages.spawned(clone)));
        }
        level.vms = children.len() as u32;
        levels.push(level);
        members.append(&mut generation);
        generation = children;
    }
    members.append(&mut generation);

    // 4. The parent must be as it would be without clones. Then it and its fork point go.
    let checker = Checker::new(setting, root.clone(), copy)?;
    let mut findings = checker.check_witness();
    let rounds = parent.progress().iter().map(|lane| lane.rounds).max().unwrap_or_default();
    parent.run_to(rounds + 1)?;
    let end = parent.vcpus.reached()?;
    let steps = |reached: &[Reached]| reached.iter().map(|lane| u64::from(lane.steps)).sum::<u64>();
    let parent_steps = (steps(&root.reached), steps(&end));
    findings.add(checker.check(&parent.vm, &Arc::new(Cut { origin: None, tag, reached: end }))?);
    drop(parent);
    drop(point);
    if parent_steps.1 <= parent_steps.0 {
        findings.violation(|| "the parent did not go on after its fork".into());
    }
    if tree.usage().vms != members.len() as u64 {
        findings.violation(|| format!("{} clones, and the engine counts {:?}", members.len(), tree.usage()));
    }
    let memory = MemoryReport::measure(members.iter().map(|member| &member.machine.vm), &tree, options.ram)?;

    // ... and every clone is compared with what it must hold, and goes in its turn: none needs another.
    if options.common.fault == Fault::FlipOneByte {
        run.inject_fault(&members, &mut random)?;
    }
    let progress = Progress::new("VMs checked", members.len() as u64);
    let all = share(cores(), members.into_iter(), &progress, |member| {
        let reached = member.machine.vcpus.reached()?;
        let cut = Cut { origin: Some(member.origin), tag: member.tag, reached };
        checker.check(&member.machine.vm, &Arc::new(cut))
    })?;
    drop(progress);
    all.into_iter().for_each(|of_one| findings.add(of_one));

    // Nothing may be left of anybody.
    if tree.usage() != TreeUsage::default() {
        findings.violation(|| format!("all VMs are gone, and the engine still holds {:?}", tree.usage()));
    }
    Ok(Report {
        backend: H::NAME,
        options: *options,
        levels,
        stages,
        memory,
        findings,
        parent_steps,
        took: start.elapsed(),
    })
}

/// Runs a small guest for a moment: whether this hypervisor works here.
pub fn try_out<H: Hypervisor>(hypervisor: &Arc<H>) -> Result<(), BoxError> {
    let (tree, lanes) = (Tree::default(), guest::lanes(guest::LEAST_RAM, SECTORS, 1).into());
    let disk = new_disk(&tree, &Arc::new(BaseImage::new(0)))?;
    Machine::boot(hypervisor, &tree, hypervisor.layout(guest::LEAST_RAM)?, disk, &lanes, 1)?.run_to(1)
}

/// What a clone's start took: the engine's spawn, and from the spawn's start to the first instruction, and from there to the end
/// of the first round.
pub struct Times {
    pub spawn: Duration,
    pub first_instruction: Duration,
    pub first_pages: Duration,
}

impl<H: Hypervisor> Run<H> {
    fn fresh_tag(&self) -> u32 {
        self.next_tag.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes a clone, and runs it for a while.
    fn spawn(&self, point: &ForkPoint<H::Ram>, origin: &Arc<Cut>) -> Result<Started<H>, BoxError> {
        let tag = self.fresh_tag();
        let start = Instant::now();
        let (mut machine, spawn) = Machine::clone_of(&self.hypervisor, point, &self.lanes, tag)?;
        machine.run_to(CLONE_ROUNDS).map_err(|error| format!("clone-{tag}: {error}"))?;
        let told = machine.progress();
        let first = told.iter().filter_map(|lane| lane.first_instruction).min().ok_or("no instruction was executed")?;
        let round = told.iter().filter_map(|lane| lane.first_round).min().ok_or("no round was completed")?;
        let times = Times { spawn, first_instruction: first - start, first_pages: round - first };
        Ok((Member { machine, origin: origin.clone(), tag }, times))
    }

    /// Lets a clone run on, forks it while it does, and runs some clones of it.
    fn fork_again(&self, member: &mut Member<H>) -> Result<(ForkTimings, Vec<Started<H>>), BoxError> {
        let machine = &mut member.machine;
        let rounds = machine.progress().iter().map(|lane| lane.rounds).max().unwrap_or_default();
        machine.run()?;
        machine.wait_for(rounds + 1);
        let point = machine.fork()?;
        let reached = machine.vcpus.at_cut().to_vec();
        let cut = Arc::new(Cut { origin: Some(member.origin.clone()), tag: member.tag, reached });
        machine.stop_after(rounds + 2);
        let children = (0..CHILDREN).map(|_| self.spawn(&point, &cut)).collect::<Result<_, _>>()?;
        machine.run_to(rounds + 2)?;
        Ok((point.timings(), children))
    }

    /// Changes one byte in one clone behind the check's back: a run with this must fail.
    fn inject_fault(&self, members: &[Member<H>], random: &mut Random) -> Result<(), BoxError> {
        let victim = &members[random.below(members.len() as u64) as usize];
        let page = self.lanes[0].page(random.below(self.lanes[0].pages().into()) as u32);
        let at = GuestAddress::new(page * PAGE as u64 + random.below(PAGE as u64));
        let ram = victim.machine.vm.ram();
        Ok(ram.store(at, ram.load::<u8>(at)? ^ 1)?)
    }
}

/// Puts up to `count` randomly chosen ones first, and hands them out.
fn choose<'a, T>(from: &'a mut [T], count: usize, random: &mut Random) -> &'a mut [T] {
    let count = count.min(from.len());
    for at in 0..count {
        from.swap(at, at + random.below((from.len() - at) as u64) as usize);
    }
    &mut from[..count]
}
