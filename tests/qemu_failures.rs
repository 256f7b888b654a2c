//! What goes wrong in a fork of a real QEMU: wherever it does, the guest runs on as it was, and nothing is left behind.
//!
//! Where `qemu-system-x86_64` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]

mod qemu;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot::frontend::qemu::*;
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{ForkError, Tree, VmName, VmStatus};

use qemu::*;

/// A directory of a test's own, which must be empty in the end but for what the test has put there.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-t{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn entries(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// How many VMs and processes have a directory below.
    fn places(&self) -> usize {
        let families =
            std::fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        families.map(|family| std::fs::read_dir(family).unwrap().count()).sum()
    }

    /// A program that does `script` first, and then is QEMU.
    fn wrapper(&self, script: &str) -> PathBuf {
        let path = self.0.join("wrapper");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\nexec qemu-system-x86_64 \"$@\"\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn running_with(tree: &Tree, spec: QemuSpec) -> QemuVm {
    let vm = parent(tree, spec).unwrap();
    reaches(&vm, 100);
    vm
}

/// The guest runs on, in the process that it was in.
fn assert_runs_on(vm: &QemuVm, pid: u32) {
    assert_eq!((vm.pid().unwrap(), vm.vm().status()), (pid, VmStatus::Running));
    reaches(vm, count(vm) + 20);
}

#[test]
fn any_call_of_ours_may_fail_in_a_fork() {
    if !qemu_is_here() {
        return;
    }
    let scratch = Scratch::new("calls");
    let spec = QemuSpec { directory: Some(scratch.0.clone()), ..spec() };
    let tree = Tree::default();
    let (mut vm, mut failed) = (running_with(&tree, spec.clone()), 0);
    for n in 1.. {
        let (pid, places) = (vm.pid().unwrap(), scratch.places());
        let plan = fail_nth_call(n, Refusal::Io);
        let forked = vm.fork(AfterFork::Continue);
        let seen = plan.calls_seen();
        drop(plan);
        match forked {
            Err(error) => {
                assert_runs_on(&vm, pid);
                assert_eq!(scratch.places(), places, "{error}");
                failed += 1;
            }
            Ok(point) => {
                check_point(&point);
                point.point().teardown().wait();
                if seen < n {
                    break;
                }
                // A call that is not needed: the fork was made, and the next try needs a first parent again.
                vm = running_with(&tree, spec.clone());
            }
        }
    }
    assert!(failed > 3, "{failed}");
    // The same of a clone, and of the spawning of one.
    let point = vm.fork(AfterFork::Continue).unwrap();
    failed = 0;
    for n in 1.. {
        let places = scratch.places();
        let plan = fail_nth_call(n, Refusal::Io);
        let spawned = point.spawn(QemuClone::default());
        let seen = plan.calls_seen();
        drop(plan);
        match spawned {
            Err(error) => assert_eq!(scratch.places(), places, "{error}"),
            Ok(_) if seen < n => break,
            Ok(_) => continue,
        }
        failed += 1;
    }
    assert!(failed > 2, "{failed}");
    let mut clone = point.spawn(QemuClone::default()).unwrap();
    reaches(&clone, 200);
    failed = 0;
    for n in 1.. {
        let pid = clone.pid().unwrap();
        let plan = fail_nth_call(n, Refusal::Io);
        let forked = clone.fork(AfterFork::Continue);
        let seen = plan.calls_seen();
        drop(plan);
        match forked {
            Err(_) => assert_runs_on(&clone, pid),
            Ok(point) => {
                check_point(&point);
                if seen < n {
                    break;
                }
                continue;
            }
        }
        failed += 1;
    }
    assert!(failed > 3, "{failed}");
    drop((point, clone, vm));
    assert_eq!(scratch.entries(), Vec::<String>::new());
}

/// QEMU does not save a guest twice that has not run in between: it must be forked all the same, and not be moved by what failed.
#[test]
fn a_fork_of_a_guest_that_stands_still_can_be_tried_again() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let standing = || {
        let vm = running_with(&tree, spec());
        vm.stop().unwrap();
        let at = count(&vm);
        (vm, at)
    };
    let ((mut vm, mut at), mut failed) = (standing(), 0);
    for n in 1.. {
        let pid = vm.pid().unwrap();
        let plan = fail_nth_call(n, Refusal::Io);
        let forked = vm.fork(AfterFork::Continue);
        let seen = plan.calls_seen();
        drop(plan);
        match forked {
            Err(_) => {
                assert_eq!((vm.pid().unwrap(), vm.vm().status(), count(&vm)), (pid, VmStatus::Paused, at));
                failed += 1;
            }
            Ok(point) => {
                assert_eq!(check_point(&point), at);
                check_clone(&point.spawn(paused()).unwrap(), at);
                if seen < n {
                    break;
                }
                (vm, at) = standing();
            }
        }
    }
    assert!(failed > 3, "{failed}");
    vm.cont().unwrap();
    reaches(&vm, at + 50);
}

#[test]
fn a_path_for_the_agent_that_cannot_be_made_costs_no_fork() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    let pid = vm.pid().unwrap();
    let in_the_way = vm.agent_socket().with_file_name("agent.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let refused = vm.fork(AfterFork::Continue).unwrap_err();
    assert!(refused.to_string().contains("agent"), "{refused}");
    assert_runs_on(&vm, pid);
    std::fs::remove_dir(&in_the_way).unwrap();
    // After the cut it is too late to say that there was no fork.
    std::fs::remove_file(vm.agent_socket()).unwrap();
    std::fs::create_dir(vm.agent_socket()).unwrap();
    let point = vm.fork(AfterFork::Continue).unwrap();
    check_clone(&point.spawn(paused()).unwrap(), check_point(&point));
    reaches(&vm, count(&vm) + 50);
}

#[test]
fn a_state_that_the_successor_refuses_leaves_the_parent_running() {
    if !qemu_is_here() {
        return;
    }
    let scratch = Scratch::new("refused");
    // One processor less than the parent has.
    let script = "case \"$*\" in *-incoming*) [ -e \"${0%/*}/broken\" ] && set -- \"$@\" -smp 1;; esac";
    let program = scratch.wrapper(script);
    let tree = Tree::default();
    let mut vm = running_with(&tree, QemuSpec { program, directory: Some(scratch.0.clone()), ..spec() });
    let pid = vm.pid().unwrap();
    std::fs::write(scratch.0.join("broken"), "").unwrap();
    let refused = vm.fork(AfterFork::Continue).unwrap_err();
    // What QEMU said is told.
    assert!(refused.to_string().contains("it said"), "{refused}");
    assert_runs_on(&vm, pid);
    std::fs::remove_file(scratch.0.join("broken")).unwrap();
    let point = vm.fork(AfterFork::Continue).unwrap();
    let at = check_point(&point);
    // A clone that cannot be loaded is destroyed.
    point.point().teardown().wait();
    let places = scratch.places();
    std::fs::write(scratch.0.join("broken"), "").unwrap();
    assert!(point.spawn(QemuClone::default()).is_err());
    assert_eq!(scratch.places(), places);
    std::fs::remove_file(scratch.0.join("broken")).unwrap();
    check_clone(&point.spawn(paused()).unwrap(), at);
}

#[test]
fn deadlines_end_a_fork_that_takes_too_long() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    for deadlines in [
        Deadlines { save: Duration::ZERO, ..Deadlines::default() },
        Deadlines { load: Duration::ZERO, ..Deadlines::default() },
    ] {
        let mut vm = running_with(&tree, QemuSpec { deadlines, ..spec() });
        let pid = vm.pid().unwrap();
        for _ in 0..3 {
            let late = vm.fork(AfterFork::Continue).unwrap_err();
            assert!(late.to_string().contains("within 0ns"), "{late}");
            assert_runs_on(&vm, pid);
        }
    }
}

#[test]
fn what_qemu_cannot_save_is_told_and_the_guest_runs_on() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let extra = ["-device", "nvme,serial=1"].map(str::to_owned).to_vec();
    let mut vm = running_with(&tree, QemuSpec { extra, ..spec() });
    let pid = vm.pid().unwrap();
    let refused = vm.fork(AfterFork::Continue).unwrap_err();
    assert!(refused.to_string().contains("nvme"), "{refused}");
    assert_runs_on(&vm, pid);
    // A display has memory that only a migration of everything saves: the first fork has it, a clone's cannot.
    let extra = ["-device", "VGA"].map(str::to_owned).to_vec();
    let mut vm = running_with(&tree, QemuSpec { extra, ..spec() });
    let point = vm.fork(AfterFork::Freeze).unwrap();
    let mut clone = point.spawn(QemuClone::default()).unwrap();
    let pid = clone.pid().unwrap();
    let refused = clone.fork(AfterFork::Continue).unwrap_err();
    assert!(refused.to_string().contains("vga.vram"), "{refused}");
    assert_runs_on(&clone, pid);
}

#[test]
fn a_copy_of_a_disk_that_is_under_way_keeps_a_guest_from_being_forked() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    let pid = vm.pid().unwrap();
    let target = json!({ "driver": "null-co", "node-name": "copy", "size": 1 << 20, "read-zeroes": true });
    vm.qmp("blockdev-add", target).unwrap();
    let mirror = json!({ "job-id": "mirror", "device": "disk0", "target": "copy", "sync": "full" });
    vm.qmp("blockdev-mirror", mirror).unwrap();
    let refused = vm.fork(AfterFork::Continue).unwrap_err();
    assert!(refused.to_string().contains("`mirror`"), "{refused}");
    assert_runs_on(&vm, pid);
    // Nor does it matter whether the guest runs: the copy goes on.
    vm.stop().unwrap();
    let refused = vm.fork(AfterFork::Continue).unwrap_err();
    assert!(refused.to_string().contains("`mirror`"), "{refused}");
    vm.cont().unwrap();
    assert_runs_on(&vm, pid);
    vm.qmp("job-cancel", json!({ "id": "mirror" })).unwrap();
    while vm.qmp("query-jobs", json!({})).unwrap() != json!([]) {
        std::thread::sleep(Duration::from_millis(1));
    }
    check_point(&vm.fork(AfterFork::Continue).unwrap());
}

#[test]
fn a_process_that_died_is_told_with_its_last_words() {
    if !qemu_is_here() {
        return;
    }
    let kill = |pid: u32| {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    };
    let scratch = Scratch::new("died");
    let tree = Tree::default();
    let mut vm = running_with(&tree, QemuSpec { directory: Some(scratch.0.clone()), ..spec() });
    let point = vm.fork(AfterFork::Continue).unwrap();
    let (mut one, other) = (point.spawn(QemuClone::default()).unwrap(), point.spawn(QemuClone::default()).unwrap());
    for dying in [&mut vm, &mut one] {
        kill(dying.pid().unwrap());
        assert!(matches!(dying.fork(AfterFork::Continue), Err(QemuError::Fork(ForkError::Pause(_)))));
        assert!(dying.ended().is_some_and(|how| how.contains("signal: 9")), "{:?}", dying.ended());
    }
    // Nobody else notices.
    point.point().teardown().wait();
    reaches(&other, count(&other) + 50);
    check_point(&point);
    drop((vm, one, other, point));
    assert_eq!(scratch.entries(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_launched_leaves_nothing() {
    if !qemu_is_here() {
        return;
    }
    let scratch = Scratch::new("launch");
    let tree = Tree::default();
    let with = |spec: QemuSpec| parent(&tree, QemuSpec { directory: Some(scratch.0.clone()), ..spec }).unwrap_err();
    assert!(matches!(with(QemuSpec { program: "/no/such/qemu".into(), ..spec() }), QemuError::Start { .. }));
    let extra = vec!["-device".into(), "no-such-device".into()];
    let refused = with(QemuSpec { extra, ..spec() });
    assert!(refused.to_string().contains("no-such-device"), "{refused}");
    let deadlines = Deadlines { start: Duration::ZERO, ..Deadlines::default() };
    assert!(with(QemuSpec { deadlines, ..spec() }).to_string().contains("greeting"));
    assert_eq!((scratch.entries(), tree.usage().vms), (Vec::<String>::new(), 0));
    let long = Some(scratch.0.join("long".repeat(20)));
    std::fs::create_dir(long.as_ref().unwrap()).unwrap();
    let refused = parent(&tree, QemuSpec { directory: long, ..spec() }).unwrap_err();
    assert!(refused.to_string().contains("QemuSpec::directory"), "{refused}");
}

/// Stands in for a QEMU that loads whatever it is sent, and dies when it is to run: run by the test below, in a process of its own whose
/// standard input is the control socket.
#[test]
fn stand_in() {
    if std::env::var_os("OFFSHOOT_STAND_IN").is_none() {
        return;
    }
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut control = BufReader::new(control);
    let say = |control: &mut BufReader<UnixStream>, what: Value| {
        control.get_mut().write_all(format!("{what}\r\n").as_bytes()).unwrap();
    };
    let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 } });
    say(&mut control, json!({ "QMP": { "version": version, "capabilities": [] } }));
    let mut line = String::new();
    while control.read_line(&mut line).is_ok_and(|read| read > 0) {
        let command: Value = serde_json_line(&line);
        line.clear();
        if command["execute"] == "cont" {
            return;
        }
        let load = command["arguments"]["uri"].as_str().map(|uri| uri.trim_start_matches("unix:").to_owned());
        let socket = load.map(|path| UnixListener::bind(path).unwrap());
        say(&mut control, json!({ "return": {}, "id": command["id"] }));
        if let Some(socket) = socket {
            let mut state = Vec::new();
            socket.accept().unwrap().0.read_to_end(&mut state).unwrap();
            assert!(state.starts_with(b"QEVM"));
            say(&mut control, json!({ "event": "MIGRATION", "data": { "status": "completed" } }));
        }
    }
}

fn serde_json_line(line: &str) -> Value {
    line.parse().unwrap()
}

#[test]
fn a_successor_that_dies_after_the_cut_is_replaced() {
    if !qemu_is_here() {
        return;
    }
    let scratch = Scratch::new("revive");
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "case \"$*\" in *-incoming*) if [ -e \"${{0%/*}}/dies\" ]; then\n\
         fd=$(echo \"$*\" | sed 's/.*id=control,fd=\\([0-9]*\\).*/\\1/')\n\
         OFFSHOOT_STAND_IN=1 exec bash -c 'exec \"$0\" --exact stand_in --nocapture <&\"$1\" >/dev/null' '{}' \"$fd\"; fi;; esac",
        this.display()
    );
    let program = scratch.wrapper(&script);
    let tree = Tree::default();
    let mut vm = running_with(&tree, QemuSpec { program, directory: Some(scratch.0.clone()), ..spec() });
    std::fs::write(scratch.0.join("dies"), "").unwrap();
    let lost = vm.fork(AfterFork::Continue).unwrap_err();
    assert!(matches!(lost, QemuError::Fork(ForkError::Resume(_))), "{lost}");
    assert_eq!(vm.vm().status(), VmStatus::Paused);
    assert!(matches!(vm.pid(), Err(QemuError::NoProcess(_))));
    let at = count_of_origin(&vm);
    std::fs::remove_file(scratch.0.join("dies")).unwrap();
    vm.revive().unwrap();
    reaches(&vm, at + 100);
    assert!(matches!(vm.revive(), Err(QemuError::Unsupported(_))));
    check_point(&vm.fork(AfterFork::Continue).unwrap());
}

fn count_of_origin(vm: &QemuVm) -> u32 {
    use offshoot::image::Source;
    let mut bytes = [0; 4];
    vm.vm().origin().unwrap().ram().read(offshoot::page::ByteOffset::new(COUNT), &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

#[test]
fn names_and_paths_with_commas_are_taken_as_they_are() {
    if !qemu_is_here() {
        return;
    }
    let scratch = Scratch::new("a,b");
    let tree = Tree::default();
    let console = scratch.0.join("con,sole");
    let spec = QemuSpec { directory: Some(scratch.0.clone()), ..spec() };
    let mut vm = QemuVm::launch(&tree, VmName::new("x,y=z").unwrap(), spec, disks(&tree), Some(&console)).unwrap();
    reaches(&vm, 50);
    vm.fork(AfterFork::Continue).unwrap().point().teardown().wait();
    assert!(Path::new(&console).metadata().unwrap().len() > 0);
    drop(vm);
    // The caller's own file stays.
    assert_eq!(scratch.entries(), ["con,sole"]);
}
