//! A workload that writes memory, mapped, buffered, synced and direct files and names without a pause is forked in the middle of it. Each clone
//! holds what the parent held at one instant: the ledger in memory, the page cache and the disk agree, before and after the caches are dropped,
//! the file system is clean, and nobody sees what another wrote. `guest/` has the workload and its verifier.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use offshoot::Tree;
use offshoot::disk::{Disk, DiskImage};
use offshoot::frontend::qemu::*;
use offshoot::page::{Lba, SectorCount};

use crate::boot::{Agent, Scratch, boot, image, until};
use crate::guest_image::{GuestImage, program};

const SLOTS: u32 = 64;
const MEDIA: [&str; 6] = ["anon", "mapped", "buffered", "names", "synced", "direct"];
/// What the verifier says of a record that does not hold: EBADMSG.
const BROKEN: i32 = 74;

/// Writes returned and blocks of its own of one medium.
fn progress(status: &str, medium: &str) -> (u64, u64) {
    let word = status.split(' ').find_map(|word| word.strip_prefix(medium)?.strip_prefix('=')).unwrap();
    let (done, own) = word.split_once('/').unwrap();
    (done.parse().unwrap(), own.parse().unwrap())
}

/// Has the workload run until it has written everywhere since it was marked, and parks it.
fn writes_everywhere(agent: &mut Agent) {
    agent.ask("work go");
    until("something is written to every medium", || {
        let status = agent.ask("work status");
        MEDIA.iter().all(|medium| progress(&status, medium).1 > 0)
    });
    agent.ask("work park");
}

/// Copies a disk into a file.
fn export(sectors: SectorCount, read: impl Fn(Lba, &mut [u8]), to: &Path) {
    let mut file = File::create(to).unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut lba = 0;
    while lba < sectors.get() {
        let len = (sectors.get() - lba).min(2048);
        let piece = &mut piece[..len as usize * 512];
        read(Lba::new(lba), piece);
        file.write_all(piece).unwrap();
        lba += len;
    }
}

fn export_disk(disk: &Disk, to: &Path) {
    export(disk.capacity(), |lba, piece| disk.read(lba, piece).unwrap(), to);
}

fn export_image(image: &DiskImage, to: &Path) {
    export(image.capacity(), |lba, piece| image.read(lba, piece).unwrap(), to);
}

/// Runs it and returns its exit status and what it said.
fn run(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
}

fn e2fsck(how: &str, disk: &Path) -> (i32, String) {
    run(Command::new(program("e2fsck").unwrap()).arg(how).arg(disk))
}

/// The disk alone at an instant, with no memory beside it: what a power cut would leave. After the journal is played back it is clean, and the
/// synced file holds all that had been synced.
fn crash_consistent(image: &GuestImage, disk: &DiskImage, synced: u64, scratch: &Scratch) {
    let (raw, file) = (scratch.path().join("crash.img"), scratch.path().join("synced"));
    export_image(disk, &raw);
    let (status, said) = e2fsck("-fp", &raw);
    assert!(status <= 1, "recovery needs a person: {said}");
    let (status, said) = e2fsck("-fn", &raw);
    assert_eq!(status, 0, "{said}");
    let dump = format!("dump /work/synced {}", file.display());
    run(Command::new(program("debugfs").unwrap()).args(["-R", &dump]).arg(&raw));
    let (status, said) =
        run(Command::new(&image.program).arg("check").arg(&file).args([SLOTS.to_string(), synced.to_string()]));
    assert_eq!(status, 0, "{said}");
}

/// A clone that has verified what it was born with, and then written.
struct Verified {
    vm: QemuVm,
    agent: Agent,
    mark: u64,
    /// How many wrote before it, the nameless beginning among them.
    ancestors: u64,
}

impl Verified {
    fn of(point: &QemuPoint, mark: u64, ancestors: u64) -> Self {
        let vm = point.spawn(QemuClone::default()).unwrap();
        let mut agent = Agent::of(&vm);
        // As it was cut: writes that were on their way have ended, and whoever verifies has parked the writers.
        agent.ask("work verify");
        agent.ask(&format!("work mark {mark:x}"));
        writes_everywhere(&mut agent);
        agent.ask("work verify");
        Self { vm, agent, mark, ancestors }
    }

    /// In memory, then after a sync with the caches dropped; then the disk is taken to the host.
    fn verify(&mut self, scratch: &Scratch) {
        let status = self.agent.ask("work verify");
        assert!(status.starts_with(&format!("mark={:x} generation={} ", self.mark, self.ancestors)), "{status}");
        self.agent.ask("work cold");
        self.agent.ask("work freeze");
        let raw = scratch.path().join("clone.img");
        export_disk(self.vm.vm().disk("root").unwrap(), &raw);
        self.agent.ask("work thaw");
        let (status, said) = e2fsck("-fn", &raw);
        assert_eq!(status, 0, "clone {:x}: {said}", self.mark);
    }
}

/// What a medium has written so far.
fn synced(agent: &mut Agent) -> u64 {
    progress(&agent.ask("work status"), "synced").0
}

#[test]
fn twenty_clones_of_three_generations_hold_one_instant_each() {
    let Some(image) = image() else { return };
    let scratch = Scratch::new("workload");
    let tree = Tree::default();
    let mut parent = boot(&tree, &image);
    let mut agent = Agent::of(&parent);
    agent.ask(&format!("work start {SLOTS}"));
    agent.ask("work mark aa");

    let mut clones: Vec<Verified> = Vec::new();
    let mut marks = 0x100..;
    // Of the parent 10, of a clone of it 6, of a clone of that 4.
    for (generation, count) in [(1, 10), (2, 6), (3, 4)] {
        let (vm, agent) = match clones.last_mut() {
            Some(last) => (&mut last.vm, &mut last.agent),
            None => (&mut parent, &mut agent),
        };
        agent.ask("work go");
        let before = synced(agent);
        until("the load is on", || synced(agent) > before + 8);
        let floor = synced(agent);
        let point = vm.fork(AfterFork::Continue).unwrap();
        crash_consistent(&image, point.point().disk("root").unwrap(), floor, &scratch);
        // The forked one goes on, the first parent in another process, a clone in its own, and its record holds.
        if generation == 1 {
            *agent = Agent::of(vm);
        }
        let before = synced(agent);
        until("it goes on", || synced(agent) > before);
        agent.ask("work verify");
        clones.extend(marks.by_ref().take(count).map(|mark| Verified::of(&point, mark, generation + 1)));
    }
    assert_eq!(clones.len(), 20);

    // All have written beside one another. Each has its own and its ancestors', and nobody else's.
    for clone in &mut clones {
        clone.verify(&scratch);
    }
    agent.ask("work go");
    writes_everywhere(&mut agent);
    agent.ask("work verify");
    assert!(agent.ask("work cold").starts_with("mark=aa generation=1 "));

    a_disk_of_another_instant_is_found(&mut parent, agent);
    for (clone, medium) in clones.iter_mut().zip(MEDIA) {
        a_spoiled_block_is_found(&mut clone.agent, medium);
    }
}

/// The verifier's control: memory of one instant over the disk of a later one.
fn a_disk_of_another_instant_is_found(parent: &mut QemuVm, mut agent: Agent) {
    agent.ask("work go");
    let earlier = parent.fork(AfterFork::Continue).unwrap();
    let before = synced(&mut agent);
    until("much is written", || synced(&mut agent) > before + u64::from(SLOTS));
    let later = parent.fork(AfterFork::Continue).unwrap();

    let clone = earlier.spawn(QemuClone { at_birth: AtBirth::Paused, ..QemuClone::default() }).unwrap();
    let (disk, other) = (clone.vm().disk("root").unwrap(), later.point().disk("root").unwrap());
    let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
    for lba in (0..disk.capacity().get()).step_by(8).map(Lba::new) {
        disk.read(lba, &mut ours).unwrap();
        other.read(lba, &mut theirs).unwrap();
        if ours != theirs {
            disk.write(lba, &theirs).unwrap();
        }
    }
    clone.cont().unwrap();
    broken(Agent::of(&clone).try_ask("work verify"), "");
    // The same point without that is in order.
    let clone = earlier.spawn(QemuClone::default()).unwrap();
    Agent::of(&clone).ask("work verify");
}

/// The verifier's control: one bit, or one name, of each medium.
fn a_spoiled_block_is_found(agent: &mut Agent, medium: &str) {
    agent.ask("work verify");
    agent.ask(&format!("work spoil {medium}"));
    broken(agent.try_ask("work verify"), &format!("{medium} slot 3: "));
}

fn broken(said: Result<String, AgentError>, what: &str) {
    match said {
        Err(AgentError::Status { status: BROKEN, output, .. }) => assert!(output.contains(what), "{output}"),
        other => panic!("the verifier has not seen it: {other:?}"),
    }
}
