//! Two clones of one guest are two: their kernels reseed and draw different numbers. What no kernel can reach is shared until it is told.

use std::collections::HashSet;

use offshoot::frontend::qemu::*;

use crate::boot::{Agent, Booted, until};

#[test]
fn clones_draw_different_numbers_because_their_kernels_reseed() {
    let Some(booted) = Booted::shared() else { return };
    let clones: Vec<_> = (0..2).map(|_| booted.point.spawn(QemuClone::default()).unwrap()).collect();
    let mut agents: Vec<_> = clones.iter().map(Agent::of).collect();
    let mut guids = HashSet::new();
    for (clone, agent) in clones.iter().zip(&mut agents) {
        // The parent's log has none: it went on with the id it had. See `Booted::shared`.
        until("the kernel has reseeded", || agent.reseeds() > 0);
        assert_eq!(agent.reseeds(), 1);
        assert!(agent.ask("klog reseeded").contains("crng reseeded due to virtual machine fork"));
        let told = clone.qmp("query-vm-generation-id", json!({})).unwrap();
        let told = told["guid"].as_str().unwrap().to_owned();
        assert_eq!(told, clone.vm().identity().generation.to_string());
        assert!(guids.insert(told), "two clones have one generation id");
    }
    let drawn: HashSet<_> =
        agents.iter_mut().flat_map(|agent| [agent.ask("random 32"), agent.ask("random 32")]).collect();
    assert_eq!(drawn.len(), 4, "clones drew the same random numbers");

    // A generator in a program's own memory: the clones are the same machine, and it goes on in both as in the parent.
    let numbers: Vec<_> = agents.iter_mut().map(|agent| agent.ask("prng")).collect();
    assert_eq!(numbers[0], numbers[1], "the clones are no copies of one guest");
    assert_ne!(numbers[0], booted.drawn);
    // Only its program can do something about it, when it is told.
    let numbers: Vec<_> = agents.iter_mut().map(|agent| agent.ask("prng reseed")).collect();
    assert_ne!(numbers[0], numbers[1]);
}

#[test]
fn a_clone_of_a_clone_reseeds_again() {
    let Some(booted) = Booted::shared() else { return };
    let mut clone = booted.point.spawn(QemuClone::default()).unwrap();
    for generation in 1..=2 {
        let mut agent = Agent::of(&clone);
        until("the kernel has reseeded once more", || agent.reseeds() >= generation);
        assert_eq!(agent.reseeds(), generation);
        drop(agent);
        clone = clone.fork(AfterFork::Freeze).unwrap().spawn(QemuClone::default()).unwrap();
    }
}
