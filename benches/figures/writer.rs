//! A guest that writes pages at a given rate, on a thread of its own: by typed access, or from inside a vCPU. Must not measure.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::frontend::kvm::{
    KvmHost, KvmMachine, MachinePlan, Shell, ShellPool, ShellShape, VcpuCount, VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress};
use offshoot::ram::Ram;
use offshoot::{BoxError, DeviceState, ForkTimings, Guest, Limits, Relocate, Tree, Vm, VmName};

use super::live::{DEVICES, Dirty, Way, policy};
use super::report::Skip;
use super::subject::PAGE;
use super::tiny_guest;

/// Protected mode, 32 bits, flat. For ecx pages from edi on, esi apart: writes a word of each, and reports.
const WRITES: [u8; 11] = [
    0x89, 0x07, // mov [edi], eax
    0x01, 0xf7, // add edi, esi
    0x49, // dec ecx
    0x75, 0xf9, // jnz back
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xf5, // jmp back
];
/// The same, reading.
const READS: [u8; 11] = [0x8b, 0x07, 0x01, 0xf7, 0x49, 0x75, 0xf9, 0xe6, 0x10, 0xeb, 0xf5];
const WRITES_AT: u64 = 0x6000;
const READS_AT: u64 = 0x7000;
/// Pages that it writes without a look at whether it is to pause.
const STEP: u64 = 16;

/// What executes the guest's stores.
enum Cpu {
    Host(Arc<Ram<Mapped>>),
    Vcpu(KvmMachine),
}

impl Cpu {
    /// Writes pages, or reads them.
    fn access(&mut self, program: u64, first: u64, step: u64, count: u64, value: u64) {
        match self {
            Self::Host(ram) => {
                for page in (first..).step_by(step as usize).take(count as usize) {
                    let at = GuestAddress::new(page * PAGE);
                    match program {
                        WRITES_AT => ram.store(at, value).expect("RAM can be written"),
                        _ => drop(ram.load::<u64>(at).expect("RAM can be read")),
                    }
                }
            }
            Self::Vcpu(machine) if count > 0 => {
                let regs = kvm_regs {
                    rip: program,
                    rflags: 2,
                    rdi: first * PAGE,
                    rsi: step * PAGE,
                    rcx: count,
                    rax: value & 0xffff_ffff,
                    ..Default::default()
                };
                let vcpu = &mut machine.vcpus_mut()[0];
                finish(vcpu).expect("a vCPU that stands still");
                vcpu.set_regs(&regs).expect("registers that fit");
                match vcpu.run() {
                    Ok(VcpuExit::IoOut(0x10, _)) => {}
                    other => panic!("the writing guest went astray: {other:?}"),
                }
            }
            Self::Vcpu(_) => {}
        }
    }
}

fn finish(vcpu: &mut VcpuFd) -> Result<(), BoxError> {
    Ok(finish_exit(vcpu, VcpuIndex::new(0), |exit| panic!("unexpected {exit:?}"))?)
}

/// What the writer's thread shares with whoever pauses it.
struct Shared {
    cpu: Mutex<Cpu>,
    /// Somebody waits for the processor.
    wanted: AtomicBool,
    /// Whether the guest goes on writing between forks.
    writes: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    /// The processor, before the writer's thread takes it again.
    fn take(&self) -> MutexGuard<'_, Cpu> {
        self.wanted.store(true, Ordering::SeqCst);
        let cpu = self.cpu.lock().expect("no thread panics with it");
        self.wanted.store(false, Ordering::SeqCst);
        cpu
    }

    fn write(&self, ram: ByteSize, rate: ByteSize) {
        let pages = ram.get() / PAGE;
        let (mut start, mut done, mut at) = (Instant::now(), 0, 0);
        while !self.stop.load(Ordering::SeqCst) {
            let due = (start.elapsed().as_secs_f64() * rate.get() as f64) as u64 / PAGE;
            if !self.writes.load(Ordering::SeqCst) || done + 4096 < due {
                // What a pause, or another's turn, has held up is not made up for.
                (start, done) = (Instant::now(), 0);
            }
            if self.wanted.load(Ordering::SeqCst) || !self.writes.load(Ordering::SeqCst) || due < done + STEP {
                thread::sleep(Duration::from_micros(100));
                continue;
            }
            let first = pages * 3 / 4 + at;
            self.cpu.lock().expect("no thread panics with it").access(WRITES_AT, first, 1, STEP, done);
            (at, done) = ((at + STEP) % (pages / 4), done + STEP);
        }
    }
}

/// A VM with such a guest.
pub struct Subject<'p> {
    vm: Vm<Mapped>,
    ram: ByteSize,
    shared: Arc<Shared>,
    plan: Option<MachinePlan>,
    pool: Option<&'p ShellPool>,
    thread: Option<JoinHandle<()>>,
}

/// What its shells are like.
pub fn shape(host: &Arc<KvmHost>, ram: ByteSize) -> Result<ShellShape, Skip> {
    tiny_guest::shape(host, ram, DEVICES)
}

impl<'p> Subject<'p> {
    /// Running, all of its RAM written.
    pub fn start(ram: ByteSize, rate: ByteSize, kvm: Option<(&Arc<KvmHost>, &'p ShellPool)>) -> Result<Self, Skip> {
        let limits = Limits { depth: u32::MAX - 1, mappings_per_vm: 40_000, ..Limits::default() };
        let vm: Vm<Mapped> = Vm::new(&Tree::new(limits), VmName::new("writer")?, tiny_guest::layout(ram)?, vec![])?;
        let block = vec![0x5a; 1 << 20];
        for at in (0..ram.get()).step_by(block.len()) {
            vm.ram().write(GuestAddress::new(at), &block)?;
        }
        vm.ram().write(GuestAddress::new(WRITES_AT), &WRITES)?;
        vm.ram().write(GuestAddress::new(READS_AT), &READS)?;
        let (cpu, plan) = match kvm {
            None => (Cpu::Host(vm.ram().clone()), None),
            Some((host, _)) => {
                let machine = VmBuilder::new(host)?.engine_ram(vm.ram())?.devices(DEVICES)?.vcpus(VcpuCount::ONE)?;
                let vcpu = &machine.vcpus()[0];
                vcpu.set_cpuid2(host.supported_cpuid())?;
                let mut sregs = vcpu.get_sregs()?;
                let flat = |selector, type_| kvm_segment {
                    limit: u32::MAX,
                    selector,
                    type_,
                    present: 1,
                    db: 1,
                    s: 1,
                    g: 1,
                    ..Default::default()
                };
                let data = flat(0x10, 3);
                (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (flat(8, 11), data, data, data);
                sregs.cr0 |= 1;
                vcpu.set_sregs(&sregs)?;
                let plan = MachinePlan::read(host, machine.vcpus(), DEVICES)?;
                (Cpu::Vcpu(machine), Some(plan))
            }
        };
        vm.start()?;
        let shared = Arc::new(Shared {
            cpu: Mutex::new(cpu),
            wanted: AtomicBool::new(false),
            writes: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = thread::spawn(move || theirs.write(ram, rate));
        Ok(Self { vm, ram, shared, plan, pool: kvm.map(|(_, pool)| pool), thread: Some(thread) })
    }

    /// Reads every page, so that this process's page tables are full.
    pub fn touch(&self) {
        Cpu::Host(self.vm.ram().clone()).access(READS_AT, 0, 1, self.ram.get() / PAGE, 0);
    }

    /// The same by the guest, so that the hypervisor's are.
    pub fn touch_from_inside(&self) {
        self.shared.take().access(READS_AT, 0, 1, self.ram.get() / PAGE, 0);
    }

    pub fn dirty(&self, dirty: Dirty, run: u64) {
        let (first, step, count) = dirty.pages(self.ram, run);
        self.shared.take().access(WRITES_AT, first, step, count, run + 1);
        // A guest that went astray would look fast.
        let last = GuestAddress::new((first + step * count.saturating_sub(1)) * PAGE);
        assert!(count == 0 || self.vm.ram().load::<u32>(last).is_ok_and(|word| u64::from(word) == run + 1));
    }

    /// Forks, the guest writing from a little before to a little after.
    pub fn fork(&self, way: Way) -> Result<ForkTimings, Skip> {
        self.shared.writes.store(true, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(2));
        let mut guest = Hands { subject: self, held: None, next: None };
        let point = match way {
            Way::Stop => self.vm.fork(&mut guest),
            Way::Live => self.vm.fork_live(&mut guest, &policy()),
            Way::Moving => self.vm.fork_relocating(&mut guest),
            Way::LiveMoving => self.vm.fork_live_relocating(&mut guest, &policy()),
        };
        self.shared.writes.store(false, Ordering::SeqCst);
        let point = point?;
        point.teardown().wait();
        Ok(point.timings())
    }
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What pauses, saves and moves it.
struct Hands<'a> {
    subject: &'a Subject<'a>,
    held: Option<MutexGuard<'a, Cpu>>,
    next: Option<Shell>,
}

impl Hands<'_> {
    fn cpu(&mut self) -> Result<&mut Cpu, BoxError> {
        Ok(self.held.as_mut().ok_or("asked while paused")?)
    }
}

impl Guest for Hands<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.held = Some(self.subject.shared.take());
        match self.cpu()? {
            Cpu::Vcpu(machine) => finish(&mut machine.vcpus_mut()[0]),
            Cpu::Host(_) => Ok(()),
        }
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        let plan = self.subject.plan.as_ref();
        match (self.cpu()?, plan) {
            (Cpu::Vcpu(machine), Some(plan)) => Ok(DeviceState::from_object(Arc::new(machine.capture(plan)?))),
            _ => Ok(DeviceState::from_bytes(vec![0; 64])),
        }
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        self.held = None;
        Ok(())
    }
}

impl Relocate for Hands<'_> {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        let shell = self.subject.pool.ok_or("no pool to move with")?.take()?;
        Ok(self.next.insert(shell).hole().clone())
    }

    fn relocate(&mut self, ram: &PlacedRam, state: &DeviceState) -> Result<Deferred, BoxError> {
        let shell = self.next.take().ok_or("no shell was taken")?;
        let machine = shell.enter(ram, state.object().ok_or("saved by `save`")?)?;
        let old = std::mem::replace(self.cpu()?, Cpu::Vcpu(machine));
        let Cpu::Vcpu(old) = old else { return Err("no machine to leave".into()) };
        Ok(Deferred::costly(old).named("old machine"))
    }
}
