//! A virtual machine that runs: the engine's [`Vm`] with a hypervisor's vCPUs, and how the two meet in a fork.
//!
//! **This is the embedding.** [`Vcpus`] implements [`Guest`]: `pause` stops the vCPU threads, `save` asks the hypervisor for
//! their state, `resume` starts them again. [`Machine::fork`] and [`Machine::clone_of`] are the rest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use offshoot::disk::Disk;
use offshoot::page::GuestAddress;
use offshoot::ram::RamLayout;
use offshoot::{BoxError, CloneSpec, DeviceState, DiskName, ForkPoint, Guest, Tree, Vm, VmName};

use crate::board::{Board, DISK, Progress};
use crate::guest::{Lane, PAGE, control};
use crate::hypervisor::{Cpu, Hypervisor};
use crate::model::Reached;

/// A VM and what executes it. The vCPUs come first: they stop before the VM goes.
pub struct Machine<H: Hypervisor> {
    pub vcpus: Vcpus<H>,
    pub vm: Vm<H::Ram>,
}

impl<H: Hypervisor> Machine<H> {
    /// A new machine that runs.
    pub fn boot(
        hypervisor: &Arc<H>,
        tree: &Tree,
        layout: RamLayout,
        disk: Disk,
        lanes: &Arc<[Lane]>,
        tag: u32,
    ) -> Result<Self, BoxError> {
        let ram = layout.geometry().len();
        let vm = Vm::new(tree, VmName::new("parent")?, layout, vec![(DiskName::new(DISK), disk)])?;
        for (page, bytes) in hypervisor.firmware(ram) {
            vm.ram().write(GuestAddress::new(page * PAGE as u64), &bytes)?;
        }
        for lane in &**lanes {
            vm.ram().write(lane.control, &lane.control_page(tag))?;
        }
        let (chassis, cpus) = hypervisor.power_on(&vm, lanes)?;
        let mut machine = Self { vcpus: Vcpus::new(hypervisor, Board::new(&vm, lanes.clone())?, chassis, cpus), vm };
        machine.run()?;
        Ok(machine)
    }

    /// A clone, not yet running. Its tag is in its memory before anybody can run it. Also tells how long the engine took.
    pub fn clone_of(
        hypervisor: &Arc<H>,
        point: &ForkPoint<H::Ram>,
        lanes: &Arc<[Lane]>,
        tag: u32,
    ) -> Result<(Self, Duration), BoxError> {
        let name = VmName::new(format!("clone-{tag}"))?;
        let start = Instant::now();
        let vm = point.spawn_with(CloneSpec { name: Some(name), ..CloneSpec::default() }, |clone| {
            for lane in &**lanes {
                let at = GuestAddress::new(lane.control.get() + u64::from(control::TAG));
                clone.ram().store(at, tag)?;
            }
            Ok(())
        })?;
        let took = start.elapsed();
        let (chassis, cpus) = hypervisor.restore(&vm, point.device_state())?;
        Ok((Self { vcpus: Vcpus::new(hypervisor, Board::new(&vm, lanes.clone())?, chassis, cpus), vm }, took))
    }

    /// Lets it run until somebody stops it.
    pub fn run(&mut self) -> Result<(), BoxError> {
        self.vcpus.board.set_goal(u32::MAX);
        self.vcpus.resume()?;
        Ok(self.vm.start()?)
    }

    /// Lets it stop by itself at the end of a round, its `rounds`-th or a later one.
    pub fn stop_after(&self, rounds: u32) {
        self.vcpus.board.set_goal(rounds);
    }

    /// Lets it run on to the end of a round, its `rounds`-th or a later one: there no page is half written.
    pub fn run_to(&mut self, rounds: u32) -> Result<(), BoxError> {
        self.stop_after(rounds);
        if self.vcpus.at_rest() {
            self.vcpus.resume()?;
            self.vm.start()?;
        }
        self.vcpus.join()?;
        Ok(self.vm.pause()?)
    }

    /// Waits until each vCPU has done this many rounds.
    pub fn wait_for(&self, rounds: u32) {
        self.vcpus.board.wait_for(rounds);
    }

    /// Forks it while it runs.
    pub fn fork(&mut self) -> Result<ForkPoint<H::Ram>, BoxError> {
        Ok(self.vm.fork(&mut self.vcpus)?)
    }

    pub fn progress(&self) -> Vec<Progress> {
        self.vcpus.board.progress()
    }
}

/// The vCPUs of one machine, each at rest or on a thread of its own.
pub struct Vcpus<H: Hypervisor> {
    hypervisor: Arc<H>,
    board: Arc<Board<H::Ram>>,
    vcpus: Vec<Vcpu<H::Cpu>>,
    chassis: H::Chassis,
    at_cut: Vec<Reached>,
}

struct Vcpu<C> {
    /// Locked by its thread while it runs.
    cpu: Arc<Mutex<C>>,
    thread: Option<JoinHandle<Result<(), BoxError>>>,
}

impl<H: Hypervisor> Vcpus<H> {
    fn new(hypervisor: &Arc<H>, board: Arc<Board<H::Ram>>, chassis: H::Chassis, cpus: Vec<H::Cpu>) -> Self {
        let vcpus = cpus.into_iter().map(|cpu| Vcpu { cpu: Arc::new(Mutex::new(cpu)), thread: None }).collect();
        Self { hypervisor: hypervisor.clone(), board, vcpus, chassis, at_cut: Vec::new() }
    }

    fn at_rest(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.thread.is_none())
    }

    /// Waits until every thread has ended; tells the first error of any.
    fn join(&mut self) -> Result<(), BoxError> {
        let ends = self.vcpus.iter_mut().filter_map(|vcpu| vcpu.thread.take()).map(JoinHandle::join);
        let ends = ends.map(|end| end.unwrap_or_else(|_| Err("a vCPU thread panicked".into())));
        ends.fold(Ok(()), Result::and)
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        self.board.set_stop(true);
        let end = self.join();
        self.board.set_stop(false);
        end
    }

    /// How far each vCPU had got when its state was last saved: at the cut.
    pub fn at_cut(&self) -> &[Reached] {
        &self.at_cut
    }

    /// How far each vCPU has got. At rest only.
    pub fn reached(&self) -> Result<Vec<Reached>, BoxError> {
        let told = self.board.progress();
        let each = self.vcpus.iter().zip(told);
        each.map(|(vcpu, told)| Ok(Reached { steps: lock(&vcpu.cpu).steps()?, hello: told.hello })).collect()
    }
}

impl<H: Hypervisor> Guest for Vcpus<H> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.stop()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.at_cut = self.reached()?;
        let mut cpus: Vec<_> = self.vcpus.iter().map(|vcpu| lock(&vcpu.cpu)).collect();
        let mut cpus: Vec<_> = cpus.iter_mut().map(|cpu| &mut **cpu).collect();
        self.hypervisor.save(&self.chassis, &mut cpus)
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        for lane in 0..self.vcpus.len() {
            let (cpu, seat, board) = (self.vcpus[lane].cpu.clone(), self.board.seat(lane), self.board.clone());
            board.set_ended(lane, false);
            let ended = EndOfThread::<H> { board, lane };
            let run = move || {
                let _ended = ended;
                lock(&cpu).run(&seat)
            };
            match std::thread::Builder::new().name(format!("vcpu-{lane}")).stack_size(256 << 10).spawn(run) {
                Ok(thread) => self.vcpus[lane].thread = Some(thread),
                Err(error) => {
                    self.stop()?;
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
}

impl<H: Hypervisor> Drop for Vcpus<H> {
    fn drop(&mut self) {
        // Whoever drops a machine that runs has no use for its last error.
        let _ = self.stop();
    }
}

/// Says on drop, so after a panic too, that a vCPU's thread has ended: nobody waits for it in vain.
struct EndOfThread<H: Hypervisor> {
    board: Arc<Board<H::Ram>>,
    lane: usize,
}

impl<H: Hypervisor> Drop for EndOfThread<H> {
    fn drop(&mut self) {
        self.board.set_ended(self.lane, true);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
