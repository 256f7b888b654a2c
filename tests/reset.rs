//! Reset in place of KVM guests: registers, devices and memory are the fork point's again, whatever was done to them; failures on the way
//! leave a VM that can be reset again; and the dirty log names exactly the pages that a guest wrote.
//!
//! The guest walks a list of addresses that the host gives it, writes a number to each and sends it to a port, again and again.
//! Where `/dev/kvm` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use common::machine::{kvm_host, machine};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_HALTED, Msrs, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use offshoot::backing::Mapped;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::kvm::{
    Devices, DirtyLog, Irqchips, KvmCall, KvmError, KvmHost, KvmMachine, MachinePlan, MachineState, MsrIndex, Part,
    Target, VcpuCount, VcpuIndex, VmBuilder, finish_exit,
};
use offshoot::page::{ByteSize, GuestAddress, Lba, PageCount, PageIndex, PageSet, PageSize, SectorCount};
use offshoot::ram::{RamLayout, RamRegion};
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{
    BoxError, CloneSpec, DeviceState, DiskName, ForkPoint, Guest, ResetError, Rewind, Tree, Vm, VmName, VmStatus,
};

/// 32-bit, flat, no paging.
const WALKING: &[u8] = &[
    0xbe, 0x00, 0x90, 0x00, 0x00, // start: mov esi, LIST
    0x8b, 0x3e, // next: mov edi, [esi]
    0x85, 0xff, // test edi, edi
    0x74, 0x08, // jz done
    0x89, 0x07, // mov [edi], eax
    0x83, 0xc6, 0x04, // add esi, 4
    0x40, // inc eax
    0xeb, 0xf2, // jmp next
    0xe6, 0x10, // done: out 0x10, al
    0xeb, 0xe9, // jmp start
];
const CODE: u64 = 0x6000;
const LIST: u64 = 0x9000;
const PAGE: u64 = 4096;
/// Where the second region starts, and with which page of the space.
const HIGH: u64 = 64 << 20;
const HIGH_PAGE: u64 = 512;
const REGIONS: [(u64, ByteSize); 2] = [(0, ByteSize::mib(2)), (HIGH, ByteSize::mib(1))];

fn layout(page: PageSize) -> RamLayout {
    let regions = REGIONS.map(|(start, len)| RamRegion { start: GuestAddress::new(start), len });
    RamLayout::new(&regions, page).unwrap()
}

/// The guest's processors, at rest or run by whoever holds them.
struct Cpus {
    host: Arc<KvmHost>,
    machine: KvmMachine,
    plan: MachinePlan,
}

impl Cpus {
    fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.machine.vcpus_mut()[0]
    }

    /// One walk along the list.
    fn walk(&mut self) {
        match self.vcpu().run().unwrap() {
            VcpuExit::IoOut(0x10, _) => {}
            other => panic!("the guest went astray: {other:?}"),
        }
    }

    fn capture(&mut self) -> MachineState {
        self.pause().unwrap();
        self.machine.capture(&self.plan).unwrap()
    }
}

impl Guest for Cpus {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(finish_exit(self.vcpu(), VcpuIndex::new(0), |exit| panic!("unexpected exit {exit:?}"))?)
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(DeviceState::from_object(Arc::new(self.machine.capture(&self.plan)?)))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Rewind for Cpus {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        let state: &MachineState = state.object().ok_or("no machine state")?;
        Ok(self.machine.load(&self.host, state, Target::Used)?)
    }
}

/// A clone at its fork point, which the guest reached after two walks along an empty list.
struct Clone {
    vm: Vm<Mapped>,
    cpus: Cpus,
    point: ForkPoint<Mapped>,
}

fn clone_of(host: &Arc<KvmHost>, devices: Devices, log: DirtyLog, page: PageSize) -> Clone {
    let tree = Tree::default();
    let disk = Disk::blank(&tree, SectorCount::new(64), Access::ReadWrite).unwrap();
    let disks = vec![(DiskName::new("d"), disk)];
    let vm: Vm<Mapped> = Vm::new(&tree, VmName::new("parent").unwrap(), layout(page), disks).unwrap();
    vm.ram().write(GuestAddress::new(CODE), WALKING).unwrap();
    vm.disk("d").unwrap().write(Lba::new(3), &[3; 512]).unwrap();
    let mut machine = machine(host, vm.ram(), devices);
    let vcpu = &mut machine.vcpus_mut()[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr4, sregs.cr8) = (0x0005_0033, 1 << 9, 5);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.get_kvm_run().cr8 = 5;
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
    let plan = MachinePlan::read(host, machine.vcpus(), devices).unwrap();
    let mut parent = Cpus { host: Arc::clone(host), machine, plan };
    parent.walk();
    parent.walk();
    vm.start().unwrap();
    let point = vm.fork(&mut parent).unwrap();

    let vm = point.spawn(CloneSpec::default()).unwrap();
    let state: &MachineState = point.device_state().object().unwrap();
    let built = VmBuilder::new(host).unwrap().engine_ram_with_log(vm.ram(), log).unwrap();
    let mut machine = built.devices(devices).unwrap().vcpus(VcpuCount::ONE).unwrap();
    machine.restore(host, state).unwrap();
    vm.start().unwrap();
    Clone { vm, cpus: Cpus { host: Arc::clone(host), machine, plan: state.plan(host) }, point }
}

impl Clone {
    /// Tells the guest where to write.
    fn list(&self, pages: &[u64]) {
        let address =
            |&page: &u64| if page < HIGH_PAGE { page * PAGE + 8 } else { HIGH + (page - HIGH_PAGE) * PAGE + 8 };
        let words = pages.iter().map(address).chain([0]).flat_map(|at| (at as u32).to_le_bytes()).collect::<Vec<_>>();
        self.vm.ram().write(GuestAddress::new(LIST), &words).unwrap();
    }

    fn ram(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (start, len) in REGIONS {
            let mut region = vec![0; len.get() as usize];
            self.vm.ram().read(GuestAddress::new(start), &mut region).unwrap();
            all.append(&mut region);
        }
        all
    }

    fn sector(&self) -> [u8; 512] {
        let mut sector = [0; 512];
        self.vm.disk("d").unwrap().read(Lba::new(3), &mut sector).unwrap();
        sector
    }

    fn state(&self) -> &MachineState {
        self.point.device_state().object().unwrap()
    }

    #[track_caller]
    fn assert_at_fork_point(&mut self, ram: &[u8]) {
        assert!(self.ram() == ram, "RAM is not the fork point's");
        assert_eq!(self.sector(), [3; 512]);
        let found = self.cpus.capture();
        let state = self.state();
        let runs_on = |part| matches!(part, Part::Msr(MsrIndex::TSC) | Part::Clock | Part::Pit | Part::LapicTimer);
        let wrong: Vec<_> =
            state.differences(&found).into_iter().filter(|difference| !runs_on(difference.part)).collect();
        assert!(wrong.is_empty(), "differ: {wrong:?}");
    }
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(PageIndex::new).collect()
}

/// An IOAPIC with one line that is not masked.
fn io_apic() -> kvm_irqchip {
    let mut state = [0i8; 512];
    let mut put = |at: usize, bytes: &[u8]| bytes.iter().zip(at..).for_each(|(byte, at)| state[at] = *byte as i8);
    put(0, &0xfec0_0000u64.to_le_bytes());
    (0..24).for_each(|pin| put(24 + pin * 8, &(1u64 << 16).to_le_bytes()));
    put(24 + 20 * 8, &0x77u64.to_le_bytes());
    kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, chip: kvm_irqchip__bindgen_ty_1 { dummy: state }, pad: 0 }
}

/// The same state with a value in XMM3, by the layout in `encode.rs`.
fn with_other_vectors(state: &MachineState) -> MachineState {
    let mut bytes = state.to_bytes();
    let chips = if state.devices() == Devices::FULL { 3 * 520 + 112 + 48 } else { 0 };
    let area =
        32 + chips + 16 + state.cpuid(VcpuIndex::new(0)).unwrap().as_slice().len() * 40 + 144 + 312 + 128 + 392 + 4;
    bytes[area + 512] |= 2; // the vector registers hold something
    bytes[area + 160 + 3 * 16..][..16].copy_from_slice(&[0x55; 16]);
    let checksum = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    MachineState::from_bytes(&bytes).unwrap()
}

/// Changes every part of a machine's state that a guest or a device may change; returns the parts.
fn upset(cpus: &mut Cpus, devices: Devices) -> Vec<Part> {
    let host = Arc::clone(&cpus.host);
    // There is no safe call for the vector registers alone: a state with others is loaded.
    let others = with_other_vectors(&cpus.capture());
    cpus.machine.load(&host, &others, Target::Used).unwrap();
    let vcpu = cpus.vcpu();
    let mut upset = vec![Part::Registers, Part::SpecialRegisters, Part::DebugRegisters, Part::Xsave, Part::Events];
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip, regs.rflags) = (!regs.rax, 15, 0x1234, 0x46);
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cr2, sregs.cr8, sregs.fs.base, sregs.gdt.base, sregs.idt.limit) = (0x5000, 9, 0x7000, 0x8000, 7);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.get_kvm_run().cr8 = 9;
    vcpu.set_regs(&regs).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    (debug.db[1], debug.dr7) = (0x1111, 0x403);
    vcpu.set_debug_regs(&debug).unwrap();
    let mut xcrs = vcpu.get_xcrs().unwrap();
    if host.supported_cpuid().as_slice().iter().any(|leaf| leaf.function == 1 && leaf.ecx >> 28 & 1 == 1) {
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs).unwrap();
        upset.push(Part::Xcrs);
    }
    // SYSENTER_ESP, STAR, KERNEL_GS_BASE, PAT, a memory type range.
    for (index, data) in
        [(0x175, 0x4000), (0xc000_0081, 7 << 32), (0xc000_0102, 0x9000), (0x277, 6), (0x200, 0x10_0006)]
    {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1, "{index:#x}");
        upset.push(Part::Msr(MsrIndex::new(index)));
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.nmi.masked = 1;
    vcpu.set_vcpu_events(&events).unwrap();
    if devices.irqchips == Irqchips::InKernel {
        let mut lapic = vcpu.get_lapic().unwrap();
        (lapic.regs[0xf1], lapic.regs[0x80]) = (1, 0x20);
        vcpu.set_lapic(&lapic).unwrap();
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
        let vm = cpus.machine.vm();
        vm.set_irqchip(&io_apic()).unwrap();
        let mut pit = vm.get_pit2().unwrap();
        pit.channels[2].mode = 3;
        vm.set_pit2(&pit).unwrap();
        upset.extend([Part::Lapic, Part::MpState, Part::Irqchips]);
    }
    upset
}

#[test]
fn every_part_of_a_machine_is_put_back() {
    let Some(host) = kvm_host() else { return };
    for devices in [Devices::NONE, Devices::FULL] {
        let mut clone = clone_of(&host, devices, DirtyLog::Off, PageSize::KIB_4);
        let ram = clone.ram();
        let pit = |cpus: &Cpus| cpus.machine.vm().get_pit2().map(|pit| pit.channels[2].mode).unwrap_or(0);
        let pit_before = pit(&clone.cpus);
        for _ in 0..2 {
            clone.list(&[20, 300, HIGH_PAGE + 3]);
            clone.cpus.walk();
            clone.vm.disk("d").unwrap().write(Lba::new(3), &[9; 512]).unwrap();
            clone.cpus.pause().unwrap();
            let upset = upset(&mut clone.cpus, devices);
            let found = clone.cpus.capture();
            let differ: Vec<_> = clone.state().differences(&found).iter().map(|difference| difference.part).collect();
            assert!(upset.iter().all(|part| differ.contains(part)), "{upset:?} were changed, {differ:?} differ");
            assert!(clone.ram() != ram);
            // The page with the list, three pages that the guest wrote, and the disk's page.
            assert_eq!(clone.vm.reset(&mut clone.cpus).unwrap().get(), 5);
            clone.assert_at_fork_point(&ram);
            assert_eq!(pit(&clone.cpus), pit_before);
            // It also runs on from there: along an empty list.
            clone.cpus.walk();
            assert_eq!(clone.cpus.vcpu().get_sregs().unwrap().cr8, 5, "the run took another CR8");
            assert!(clone.ram() == ram);
        }
    }
}

#[test]
fn a_state_is_loaded_into_a_machine_whatever_it_was_doing() {
    let Some(host) = kvm_host() else { return };
    // A vCPU that was never started takes no registers from a run: they must reach it all the same.
    let mut clone = clone_of(&host, Devices::FULL, DirtyLog::Off, PageSize::KIB_4);
    let ram = clone.ram();
    clone.cpus.vcpu().set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_UNINITIALIZED }).unwrap();
    clone.cpus.vcpu().set_regs(&kvm_regs { rip: 0x1000, rflags: 2, rbx: 7, ..Default::default() }).unwrap();
    clone.vm.pause().unwrap();
    clone.vm.reset(&mut clone.cpus).unwrap();
    clone.assert_at_fork_point(&ram);
}

/// A guest that runs on a thread of its own until it is paused.
struct Threaded {
    cpus: Arc<Mutex<Cpus>>,
    stop: Arc<AtomicBool>,
    walks: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Guest for Threaded {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().ok_or("not running")?.join().map_err(|_| "the vCPU thread panicked")?;
        self.cpus.lock().unwrap().pause()
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        self.cpus.lock().unwrap().save()
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        let (cpus, stop, walks) = (Arc::clone(&self.cpus), Arc::clone(&self.stop), Arc::clone(&self.walks));
        stop.store(false, Ordering::Relaxed);
        self.thread = Some(std::thread::spawn(move || {
            let mut cpus = cpus.lock().unwrap();
            while !stop.load(Ordering::Relaxed) {
                cpus.walk();
                walks.fetch_add(1, Ordering::Relaxed);
            }
        }));
        Ok(())
    }
}

impl Rewind for Threaded {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        self.cpus.lock().unwrap().load(state)
    }
}

#[test]
fn a_running_guest_is_paused_reset_and_runs_on() {
    let Some(host) = kvm_host() else { return };
    let Clone { vm, mut cpus, point } = clone_of(&host, Devices::NONE, DirtyLog::Off, PageSize::KIB_4);
    let rax = point.device_state().object::<MachineState>().map(|_| cpus.vcpu().get_regs().unwrap().rax).unwrap();
    let (cpus, stop, walks) = (Arc::new(Mutex::new(cpus)), Arc::default(), Arc::default());
    let mut guest = Threaded { cpus, stop, walks, thread: None };
    let address = |page: u64| GuestAddress::new(page * PAGE + 8);
    for round in 0..3 {
        // In the first round the list is written before the guest runs, later while it does.
        vm.ram().store(GuestAddress::new(LIST + 4), 0u32).unwrap();
        vm.ram().store(GuestAddress::new(LIST), address(40).get() as u32).unwrap();
        if round == 0 {
            guest.resume().unwrap();
        }
        let before = guest.walks.load(Ordering::Relaxed);
        while guest.walks.load(Ordering::Relaxed) < before + 3 || vm.ram().load::<u32>(address(40)).unwrap() == 0 {
            std::thread::yield_now();
        }
        assert!(vm.reset(&mut guest).unwrap().get() >= 2);
        assert_eq!(vm.status(), VmStatus::Running);
        assert_eq!(vm.ram().load::<u32>(address(40)).unwrap(), 0, "the list is empty again: nobody writes there");
    }
    guest.pause().unwrap();
    assert_eq!(guest.cpus.lock().unwrap().vcpu().get_regs().unwrap().rax, rax, "it counts what it writes");
}

#[test]
fn a_reset_that_fails_anywhere_can_be_repeated() {
    let Some(host) = kvm_host() else { return };
    let dirty = set([LIST / PAGE, 20, 21, 300, HIGH_PAGE + 3]);
    type Reset<'a> = &'a dyn Fn(&mut Clone) -> Result<PageCount, ResetError>;
    let ways: [Reset<'_>; 2] =
        [&|clone| clone.vm.reset(&mut clone.cpus), &|clone| clone.vm.reset_copying(&mut clone.cpus, &dirty)];
    for (devices, way) in [Devices::NONE, Devices::FULL].into_iter().flat_map(|devices| ways.map(|way| (devices, way)))
    {
        let mut clone = clone_of(&host, devices, DirtyLog::On, PageSize::KIB_4);
        let ram = clone.ram();
        let mut failed_loads = 0;
        for n in 1.. {
            clone.list(&[20, 21, 300, HIGH_PAGE + 3]);
            clone.cpus.walk();
            clone.vm.disk("d").unwrap().write(Lba::new(3), &[9; 512]).unwrap();
            let plan = fail_nth_call(n, Refusal::OutOfMemory);
            let reset = way(&mut clone);
            let seen = plan.calls_seen();
            drop(plan);
            match reset {
                Ok(_) => {
                    assert_eq!(clone.vm.status(), VmStatus::Running);
                    if seen < n {
                        break;
                    }
                }
                Err(error) => {
                    failed_loads += u32::from(matches!(error, ResetError::Load(_)));
                    assert_eq!(clone.vm.status(), VmStatus::Paused, "{error}");
                    // Whichever way it was.
                    clone.vm.reset(&mut clone.cpus).unwrap();
                    assert_eq!(clone.vm.status(), VmStatus::Paused);
                    clone.vm.start().unwrap();
                }
            }
            clone.assert_at_fork_point(&ram);
        }
        assert!(failed_loads > 0, "no load failed: what is tested then?");
    }
}

#[test]
fn the_dirty_log_names_what_the_guest_wrote_and_nothing_else() {
    let Some(host) = kvm_host() else { return };
    let mut clone = clone_of(&host, Devices::NONE, DirtyLog::On, PageSize::KIB_4);
    let (ram, layout) = (clone.ram(), layout(PageSize::KIB_4));
    // What the kernel noted while the state was loaded.
    clone.cpus.machine.take_dirty(&layout).unwrap();
    let dense: Vec<u64> = (32..160).collect();
    let sparse: Vec<u64> = (16..HIGH_PAGE + 256).step_by(37).collect();
    for pages in [&[][..], &[100], &dense, &sparse, &[63, 64, HIGH_PAGE, HIGH_PAGE + 255]] {
        clone.list(pages);
        clone.cpus.walk();
        let dirty = clone.cpus.machine.take_dirty(&layout).unwrap();
        assert_eq!(dirty, set(pages.iter().copied()));
        assert_eq!(clone.cpus.machine.take_dirty(&layout).unwrap(), PageSet::new(), "it was asked for");
        // What this process wrote is the caller's to add: without it the list stays.
        let host_wrote = set([LIST / PAGE]);
        clone.vm.reset_listed(&mut clone.cpus, &dirty.union(&host_wrote)).unwrap();
        clone.assert_at_fork_point(&ram);
        clone.vm.ram().store(GuestAddress::new(LIST), 0u32).unwrap();
        clone.vm.reset_listed(&mut clone.cpus, &host_wrote).unwrap();
    }
}

#[test]
fn a_guest_runs_on_over_pages_that_were_copied_back() {
    let Some(host) = kvm_host() else { return };
    for page in [PageSize::KIB_4, PageSize::new(ByteSize::kib(64)).unwrap()] {
        let mut clone = clone_of(&host, Devices::NONE, DirtyLog::On, page);
        let (ram, layout) = (clone.ram(), layout(page));
        clone.cpus.machine.take_dirty(&layout).unwrap();
        let host_wrote = set([LIST / page.bytes().get()]);
        for pages in [&[20, 21, 300][..], &[20, 22], &[], &[20, 21, 300, HIGH_PAGE + 3]] {
            clone.list(pages);
            clone.cpus.walk();
            let dirty = clone.cpus.machine.take_dirty(&layout).unwrap();
            assert!(pages.is_empty() || clone.ram() != ram);
            let reset = clone.vm.reset_copying(&mut clone.cpus, &dirty.union(&host_wrote)).unwrap();
            assert!(reset > dirty.count() || !dirty.intersection(&host_wrote).is_empty());
            clone.assert_at_fork_point(&ram);
        }
        // They count as written, and are given back here.
        assert!(clone.vm.reset(&mut clone.cpus).unwrap().get() >= 4);
        assert!(clone.vm.usage().unwrap().ram.private.is_zero());
        clone.list(&[20]);
        clone.cpus.walk();
        clone.vm.reset(&mut clone.cpus).unwrap();
        clone.assert_at_fork_point(&ram);
    }
}

#[test]
fn the_log_counts_pages_of_the_space() {
    let Some(host) = kvm_host() else { return };
    let large = PageSize::new(ByteSize::kib(64)).unwrap();
    let mut clone = clone_of(&host, Devices::NONE, DirtyLog::On, large);
    let (ram, layout) = (clone.ram(), layout(large));
    clone.cpus.machine.take_dirty(&layout).unwrap();
    clone.list(&[17, 31, 32, 200, HIGH_PAGE + 16]);
    clone.cpus.walk();
    let dirty = clone.cpus.machine.take_dirty(&layout).unwrap();
    assert_eq!(dirty, set([1, 2, 12, 33]));
    clone.vm.reset_listed(&mut clone.cpus, &dirty.union(&set([0]))).unwrap();
    clone.assert_at_fork_point(&ram);
}

#[test]
fn a_log_that_could_not_be_read_is_read_next_time() {
    let Some(host) = kvm_host() else { return };
    let mut clone = clone_of(&host, Devices::NONE, DirtyLog::On, PageSize::KIB_4);
    let layout = layout(PageSize::KIB_4);
    clone.cpus.machine.take_dirty(&layout).unwrap();
    let mut expected = Vec::new();
    for n in 1..=3 {
        let pages = [20 + n, HIGH_PAGE + n];
        clone.list(&pages);
        clone.cpus.walk();
        expected.extend(pages);
        let plan = fail_nth_call(n, Refusal::OutOfMemory);
        let taken = clone.cpus.machine.take_dirty(&layout);
        drop(plan);
        match taken {
            // Two slots, two calls: the first slot's pages were read and are not lost.
            Err(KvmError::Machine { call: KvmCall::GetDirtyLog, .. }) => assert!(n <= 2),
            Ok(dirty) => assert!(
                n == 3
                    && dirty == {
                        expected.sort_unstable();
                        set(expected.clone())
                    }
            ),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_machine_without_a_log_says_so() {
    let Some(host) = kvm_host() else { return };
    let clone = clone_of(&host, Devices::NONE, DirtyLog::Off, PageSize::KIB_4);
    let error = clone.cpus.machine.take_dirty(&layout(PageSize::KIB_4)).unwrap_err();
    assert!(error.to_string().contains("DirtyLog::On"), "{error}");
    let elsewhere = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4).unwrap();
    assert!(matches!(clone.cpus.machine.take_dirty(&elsewhere), Err(KvmError::ForeignSlot { .. })));
}
