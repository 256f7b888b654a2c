//! No failing call of the kernel's leaves a descriptor, a mapping or a page behind: counted in a process that does nothing else.

use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::{CloneSpec, Tree};

use crate::passive::{Fail, WAYS, base, check, move_by, passive, stamp, vm};

/// Descriptors and mappings of the engine's in this process.
fn held() -> (usize, usize) {
    let links =
        std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let files = links.filter(|link| link.to_string_lossy().contains("offshoot")).count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (files, maps.lines().filter(|line| line.contains("offshoot")).count())
}

/// Alone in its process (see below), so that counts are its own.
fn no_failing_call_leaves_anything_behind() {
    for (forks_before, way) in [0, 1, 2].into_iter().flat_map(|before| WAYS.map(|way| (before, way))) {
        for n in 1.. {
            let before = held();
            let tree = Tree::default();
            let parent = vm(&tree);
            let mut guest = passive(Fail::Nothing);
            for _ in 0..forks_before {
                stamp(&parent, 1);
                parent.fork_relocating(&mut guest).unwrap().teardown().wait();
            }
            stamp(&parent, 2);
            let (home, usage) = (base(&parent), tree.usage());
            let plan = fail_nth_call(n, Refusal::OutOfMemory);
            let forked = move_by(way, &parent, &mut guest);
            let done = plan.calls_seen() < n;
            drop(plan);
            match forked {
                Ok(point) => {
                    assert_ne!(base(&parent), home);
                    point.teardown().wait();
                    check(&point.spawn(CloneSpec::default()).unwrap(), 2);
                }
                Err(error) => {
                    assert!(!done, "{error}");
                    assert_eq!((base(&parent), tree.usage().images), (home, usage.images));
                    assert!(guest.running);
                    check(&parent, 2);
                    let point = move_by(way, &parent, &mut guest).unwrap();
                    point.teardown().wait();
                    check(&point.spawn(CloneSpec::default()).unwrap(), 2);
                }
            }
            check(&parent, 2);
            drop((parent, guest));
            assert_eq!((tree.usage(), held()), (Tree::default().usage(), before), "call {n}");
            if done {
                break;
            }
        }
    }
}

/// Counting what a process holds needs it for oneself: runs the one test that does in a child.
#[test]
fn no_failing_call_leaves_anything_behind_in_a_process_of_its_own() {
    if std::env::var_os("OFFSHOOT_ALONE").is_some() {
        return no_failing_call_leaves_anything_behind();
    }
    let name = "alone::no_failing_call_leaves_anything_behind_in_a_process_of_its_own";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("OFFSHOOT_ALONE", "1")
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
}
