//! Forks of a real, unmodified QEMU: a guest of one sector counts in RAM, on its disk and at its serial port, so that a write or an
//! instruction that is lost or repeated is seen.
//!
//! Where `qemu-system-x86_64` is missing the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "qemu", target_os = "linux", target_arch = "x86_64"))]

mod qemu;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use offshoot::Tree;
use offshoot::VmStatus;
use offshoot::frontend::qemu::*;
use offshoot::page::GuestAddress;

use qemu::*;

#[test]
fn a_running_guest_is_forked_and_all_go_on_from_one_instant() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    let first = vm.pid().unwrap();
    let point = vm.fork(AfterFork::Continue).unwrap();
    let at = check_point(&point);
    assert_ne!(vm.pid().unwrap(), first);
    let clones: Vec<_> = (0..3).map(|_| point.spawn(paused()).unwrap()).collect();
    clones.iter().for_each(|clone| check_clone(clone, at));
    for clone in &clones[..2] {
        clone.cont().unwrap();
    }
    [&vm, &clones[0], &clones[1]].into_iter().for_each(|vm| reaches(vm, at + 500));
    // Whoever did not run saw nothing of all that.
    check_clone(&clones[2], at);
    assert_eq!(check_point(&point), at);
    for vm in [&vm, &clones[0]] {
        vm.stop().unwrap();
        let now = count(vm);
        let disk = on_disk(vm.vm().disk("root").unwrap());
        assert_one_instant(now, disk, |at, buf| vm.read_ram(GuestAddress::new(at), buf).unwrap());
        // Each has its own console, where no count is missing and none is there twice.
        let console = std::fs::read(vm.console()).unwrap();
        let counted: Vec<u8> = console.iter().rev().take(400).rev().copied().collect();
        assert!(counted.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1)), "{counted:?}");
    }
    // The old process is gone, and with it the last mapping that could write the file.
    point.point().teardown().wait();
    assert!(!Path::new(&format!("/proc/{first}")).exists());
    assert_sealed(&clones[0]);
}

#[test]
fn clones_of_clones_of_clones() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    let mut point = vm.fork(AfterFork::Freeze).unwrap();
    assert!(matches!(vm.pid(), Err(QemuError::NoProcess(_))));
    let mut at = check_point(&point);
    let mut line = Vec::new();
    for generation in 1..=4 {
        let mut clone = point.spawn(QemuClone::default()).unwrap();
        reaches(&clone, at + 200);
        let before = clone.pid().unwrap();
        point = clone.fork(AfterFork::Continue).unwrap();
        // A clone goes on in its own process.
        assert_eq!((clone.pid().unwrap(), point.point().depth()), (before, generation + 1));
        let now = check_point(&point);
        assert!(now >= at + 200);
        at = now;
        check_clone(&point.spawn(paused()).unwrap(), at);
        reaches(&clone, at + 100);
        line.push(clone);
    }
    // A clone that is forked twice: what it had already given is the same.
    let again = line[0].fork(AfterFork::Continue).unwrap();
    check_clone(&again.spawn(paused()).unwrap(), check_point(&again));
    line.iter().for_each(|clone| reaches(clone, count(clone) + 50));
}

#[test]
fn a_guest_that_stands_still_is_forked_where_it_stands() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    vm.stop().unwrap();
    let at = count(&vm);
    let point = vm.fork(AfterFork::Continue).unwrap();
    assert_eq!((check_point(&point), count(&vm), vm.vm().status()), (at, at, VmStatus::Paused));
    vm.cont().unwrap();
    reaches(&vm, at + 50);
    let mut clone = point.spawn(paused()).unwrap();
    let again = clone.fork(AfterFork::Freeze).unwrap();
    assert_eq!(check_point(&again), at);
    assert!(matches!(clone.fork(AfterFork::Continue), Err(QemuError::NoProcess(_))));
}

/// What a fork of a clone takes from the first state, firmware and tables, is what it has after a reboot too.
#[test]
fn a_clone_that_has_rebooted_is_forked() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    reaches(&vm, 300);
    let point = vm.fork(AfterFork::Freeze).unwrap();
    let mut clone = point.spawn(QemuClone::default()).unwrap();
    reaches(&clone, 400);
    clone.qmp("system_reset", json!({})).unwrap();
    let begun = std::time::Instant::now();
    while count(&clone) >= 300 {
        assert!(begun.elapsed() < LONG, "the guest has not rebooted");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // By then each of the pages has a count of this boot.
    reaches(&clone, 130);
    let again = clone.fork(AfterFork::Continue).unwrap();
    let mut second = again.spawn(paused()).unwrap();
    check_clone(&second, check_point(&again));
    // And a fork of that, rebooted once more.
    second.cont().unwrap();
    second.qmp("system_reset", json!({})).unwrap();
    reaches(&second, 300);
    let third = second.fork(AfterFork::Freeze).unwrap();
    let last = third.spawn(paused()).unwrap();
    check_clone(&last, check_point(&third));
    last.cont().unwrap();
    reaches(&last, count(&last) + 50);
}

/// The memory file that a clone maps can be written by nobody any more.
fn assert_sealed(clone: &QemuVm) {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", clone.pid().unwrap())).unwrap();
    let is_memory = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:offshoot"))
    };
    let memory = fds.map(|fd| fd.unwrap().path()).find(is_memory).unwrap();
    let seals = rustix::fs::fcntl_get_seals(std::fs::File::open(memory).unwrap().as_fd()).unwrap();
    assert!(seals.contains(rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SHRINK), "{seals:?}");
}

#[test]
fn a_process_that_somebody_else_started_is_attached() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let parked = Parked::new(&tree, offshoot::VmName::new("vm").unwrap(), spec(), disks(&tree), None).unwrap();
    let control = parked.control_socket();
    let mut theirs = std::process::Command::new("qemu-system-x86_64").args(parked.arguments()).spawn().unwrap();
    let socket = loop {
        match UnixStream::connect(&control) {
            Ok(socket) => break socket,
            Err(error) => assert!(theirs.try_wait().unwrap().is_none(), "QEMU has ended: {error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    let mut vm = parked.attach(theirs.id(), socket).unwrap();
    reaches(&vm, 100);
    let point = vm.fork(AfterFork::Continue).unwrap();
    // The one that was attached has ended; the guest goes on in one of ours.
    assert!(!theirs.wait().unwrap().success());
    check_clone(&point.spawn(paused()).unwrap(), check_point(&point));
    let now = count(&vm);
    reaches(&vm, now + 100);
}

#[test]
fn another_process_is_not_attached() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let parked = Parked::new(&tree, offshoot::VmName::new("vm").unwrap(), spec(), disks(&tree), None).unwrap();
    let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 } });
    let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
    peer.write_all(format!("{greeting}\r\n{}\r\n", json!({ "return": {}, "id": 0 })).as_bytes()).unwrap();
    let refused = parked.attach(other.id(), socket).unwrap_err();
    assert!(refused.to_string().contains("memory file"), "{refused}");
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn the_agents_socket_leads_to_whichever_process_there_is() {
    if !qemu_is_here() {
        return;
    }
    let tree = Tree::default();
    let mut vm = running(&tree);
    let at = vm.agent_socket();
    UnixStream::connect(&at).unwrap();
    let point = vm.fork(AfterFork::Continue).unwrap();
    assert_eq!(vm.agent_socket(), at);
    UnixStream::connect(&at).unwrap();
    let clone = point.spawn(QemuClone::default()).unwrap();
    assert_ne!(clone.agent_socket(), at);
    UnixStream::connect(clone.agent_socket()).unwrap();
    drop(clone);
    vm.qmp("query-status", json!({})).unwrap();
}
