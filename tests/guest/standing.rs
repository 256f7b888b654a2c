//! A guest that stands still is not written to by what comes in for it from outside: what a cut is of is what was there when it stopped.

use std::io::Write;
use std::os::unix::net::UnixStream;

use offshoot::frontend::qemu::*;
use offshoot::page::GuestAddress;

use crate::boot::{Agent, Booted};

/// All of its memory.
fn memory(vm: &QemuVm) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(vm.spec().ram.get()).unwrap()];
    vm.read_ram(GuestAddress::new(0), &mut bytes).unwrap();
    bytes
}

fn differ(one: &[u8], other: &[u8]) -> usize {
    one.chunks(4096).zip(other.chunks(4096)).filter(|(one, other)| one != other).count()
}

#[test]
fn whoever_talks_to_the_agent_of_a_guest_that_stands_still_writes_nothing_to_it() {
    let Some(booted) = Booted::shared() else { return };
    let vm = booted.point.spawn(QemuClone::default()).unwrap();
    let mut agent = Agent::of(&vm);
    agent.ask("ping");
    let before = memory(&vm);
    agent.ask("ping");
    vm.stop().unwrap();
    let stopped = memory(&vm);
    assert_ne!(differ(&before, &stopped), 0, "an answer of the agent's leaves traces, or this looks at nothing");
    // QEMU has one thread for sockets and commands: it has looked at the socket before it answers the second of two commands.
    let looked = || (0..50).for_each(|_| drop(vm.qmp("query-status", json!({})).unwrap()));
    drop(agent);
    looked();
    assert_eq!(differ(&stopped, &memory(&vm)), 0, "hanging up is written to the guest");
    let mut stranger = UnixStream::connect(vm.agent_socket()).unwrap();
    looked();
    assert_eq!(differ(&stopped, &memory(&vm)), 0, "a connection is written to the guest");
    stranger.write_all(b"\x18\n7 ping\n").unwrap();
    looked();
    assert_eq!(differ(&stopped, &memory(&vm)), 0, "what the agent is asked is written to the guest");
    drop(stranger);
    vm.cont().unwrap();
    assert_eq!(Agent::of(&vm).ask("ping"), "");
}
