//! The devices of one VM: a doorbell that guests ring, a disk behind it, and a record of what the guest told.
//!
//! A request is done on the vCPU's own thread before the bell returns, so a vCPU that has stopped has nothing in flight: that is
//! all the draining that a fork needs here. A VMM with queues would wait for them in `Guest::pause`.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use offshoot::backing::Backing;
use offshoot::disk::Disk;
use offshoot::page::{GuestAddress, Lba};
use offshoot::ram::{Ram, RamError};
use offshoot::{BoxError, Vm};

use crate::guest::{Bell, Lane, SECTOR, control};

/// The name of the one disk that each VM has.
pub const DISK: &str = "disk";

/// The devices of one VM, shared by its vCPU threads and whoever controls them.
pub struct Board<R: Backing> {
    ram: Arc<Ram<R>>,
    disk: Arc<Disk>,
    lanes: Arc<[Lane]>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    stop: bool,
    /// A vCPU that has done this many rounds stops by itself, at the end of a round.
    goal: u32,
    lanes: Vec<Progress>,
}

/// What one vCPU has told since this VM was started or cloned.
#[derive(Clone, Copy, Default, Debug)]
pub struct Progress {
    /// When its first instruction was done.
    pub first_instruction: Option<Instant>,
    /// When it rang after its first round.
    pub first_round: Option<Instant>,
    /// The tag that it took, and the step that it took it for.
    pub hello: Option<(u32, u32)>,
    /// Rounds since then.
    pub rounds: u32,
    /// Steps completed at the last bell.
    pub steps: u32,
    done: bool,
    /// Whether its thread has come to an end.
    pub ended: bool,
}

/// One vCPU's place at the board.
pub struct Seat<R: Backing> {
    board: Arc<Board<R>>,
    lane: usize,
}

impl<R: Backing> Board<R> {
    pub fn new(vm: &Vm<R>, lanes: Arc<[Lane]>) -> Result<Arc<Self>, BoxError> {
        let disk = vm.disk(DISK).ok_or("the VM has no disk")?.clone();
        let state = State { stop: false, goal: u32::MAX, lanes: vec![Progress::default(); lanes.len()] };
        Ok(Arc::new(Self { ram: vm.ram().clone(), disk, lanes, state: Mutex::new(state), changed: Condvar::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn progress(&self) -> Vec<Progress> {
        self.lock().lanes.clone()
    }

    /// Asks all vCPUs to stop as soon as they can, or lets them run again.
    pub fn set_stop(&self, stop: bool) {
        self.lock().stop = stop;
    }

    /// Asks each vCPU to stop by itself at the end of a round, its `rounds`-th or a later one.
    pub fn set_goal(&self, rounds: u32) {
        let mut state = self.lock();
        state.goal = rounds;
        state.lanes.iter_mut().for_each(|lane| lane.done = false);
    }

    /// Waits until each vCPU has done this many rounds, or ended.
    pub fn wait_for(&self, rounds: u32) {
        let mut state = self.lock();
        while state.lanes.iter().any(|lane| lane.rounds < rounds && !lane.ended) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says whether a vCPU has a thread.
    pub fn set_ended(&self, lane: usize, ended: bool) {
        self.lock().lanes[lane].ended = ended;
        self.changed.notify_all();
    }

    pub fn seat(self: &Arc<Self>, lane: usize) -> Seat<R> {
        Seat { board: self.clone(), lane }
    }
}

impl<R: Backing> Seat<R> {
    pub fn ram(&self) -> &Ram<R> {
        &self.board.ram
    }

    /// Whether to leave [`Cpu::run`](crate::hypervisor::Cpu::run).
    pub fn must_stop(&self) -> bool {
        let state = self.board.lock();
        state.stop || state.lanes[self.lane].done
    }

    /// Says that an instruction was executed; the first one of a VM is noted.
    pub fn executed(&self) {
        let now = Instant::now();
        self.board.lock().lanes[self.lane].first_instruction.get_or_insert(now);
    }

    fn word(&self, offset: u16) -> Result<u32, RamError> {
        self.board.ram.load(self.address(offset))
    }

    fn address(&self, offset: u16) -> GuestAddress {
        GuestAddress::new(self.board.lanes[self.lane].control.get() + u64::from(offset))
    }

    /// Does what a guest rang for. What it asks is checked: a guest can name any sector.
    pub fn ring(&self, bell: Bell) -> Result<(), BoxError> {
        let rung = Instant::now();
        let steps = self.word(control::REQUEST_STEP)?;
        match bell {
            Bell::Hello => {
                let tag = self.word(control::TAKEN_TAG)?;
                let mut state = self.board.lock();
                let progress = &mut state.lanes[self.lane];
                *progress = Progress { hello: Some((tag, steps)), rounds: 0, steps, ..*progress };
            }
            Bell::Write => {
                let lba = Lba::new(self.word(control::REQUEST_LBA)?.into());
                let mut sector = [0; SECTOR];
                self.board.ram.read(self.address(control::BUFFER), &mut sector)?;
                self.board.disk.write(lba, &sector)?;
                let mut state = self.board.lock();
                let goal = state.goal;
                let progress = &mut state.lanes[self.lane];
                progress.steps = steps;
                // A clone may first finish a round of the VM it was cut from.
                if progress.hello.is_some() {
                    progress.rounds += 1;
                    progress.first_round.get_or_insert(rung);
                    progress.done = progress.rounds >= goal;
                }
            }
            Bell::Broken => {
                let page = self.word(control::REQUEST_PAGE)?;
                return Err(format!("the guest found page {page:#x} torn or foreign, after {steps} steps").into());
            }
            Bell::Tick => return Ok(()),
        }
        self.board.changed.notify_all();
        Ok(())
    }
}
