//! The examples as a user runs them: exit codes, the JSON report, and that their checks can fail.
//!
//! It is run through cargo, which builds what is missing, in the profile of this test. Sizes are small here; the full run is the
//! example's own.

use std::process::{Command, Output};

fn run(args: &str) -> Output {
    run_example("instant_clone", args)
}

fn run_example(name: &str, args: &str) -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--example", name]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.arg("--").args(args.split_whitespace());
    cargo.output().expect("cargo can be run")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the example writes text")
}

/// The number after a key's first place.
fn number(json: &str, key: &str) -> f64 {
    let quoted = format!("\"{key}\":");
    let (_, rest) = json.split_once(&quoted).unwrap_or_else(|| panic!("no {key} in {json}"));
    let end = rest.find([',', '}']).expect("something follows");
    rest[..end].parse().unwrap_or_else(|_| panic!("{key} is no number in {json}"))
}

/// Checks a report of 12 clones to depth 3 that came out well.
fn assert_good_report(output: &Output, backend: &str, ram: f64) {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json = text(&output.stdout).trim_end();
    assert!(json.starts_with('{') && json.ends_with('}') && !json.contains('\n'), "one object on one line: {json}");
    assert_eq!(json.matches('{').count(), json.matches('}').count());
    assert!(json.contains(&format!("\"backend\":\"{backend}\"")), "{json}");
    assert_eq!(number(json, "clones"), 12.0);
    assert_eq!(number(json, "depth"), 3.0);
    assert_eq!(number(json, "ram_bytes"), ram);
    assert_eq!(number(json, "violations"), 0.0);
    // 12 clones, all of them forked again into 4, and 16 of those into 4 again.
    assert_eq!(number(json, "vms"), 12.0 + 48.0 + 64.0);
    assert_eq!(number(json, "full_copies_bytes"), 124.0 * ram);
    assert!(number(json, "parent_steps_at_end") > number(json, "parent_steps_at_fork"));
    // Each VM has visited 64 pages or more since its last fork; all of them share what the parent wrote.
    assert!(number(json, "private_bytes") >= 124.0 * 64.0 * 4096.0);
    assert!(number(json, "shared_bytes") > 0.0);
    for stage in ["pause", "cut", "spawn", "first_instruction", "first_64_pages"] {
        let (_, times) = json.split_once(&format!("\"{stage}\":")).unwrap_or_else(|| panic!("no {stage} in {json}"));
        let [p50, p99, max] = ["p50_us", "p99_us", "max_us"].map(|key| number(times, key));
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{stage}: {p50} {p99} {max}");
    }
    if cfg!(target_os = "linux") {
        assert!(number(json, "resident_bytes") > 0.0);
    }
}

#[test]
fn the_simulator_clones_and_checks() {
    let output = run("--backend sim --ram 32M --clones 12 --json");
    assert_good_report(&output, "sim", f64::from(32 << 20));
}

#[test]
fn several_vcpus_and_a_full_check() {
    let output = run("--backend sim --ram 16M --clones 12 --vcpus 3 --check full --seed 7 --json");
    assert_good_report(&output, "sim", f64::from(16 << 20));
}

/// Whether the example picks KVM by itself here. Where it does not it must say so, and the tests of KVM say so too; they
/// fail if OFFSHOOT_REQUIRE=all is set.
fn kvm_works() -> bool {
    let output = run("--ram 8M --clones 1 --depth 1 --json");
    assert!(output.status.success(), "{}", text(&output.stderr));
    if text(&output.stdout).contains("\"backend\":\"kvm\"") {
        return true;
    }
    let error = text(&output.stderr);
    assert!(
        !cfg!(all(target_os = "linux", target_arch = "x86_64")) || error.contains("KVM does not work here"),
        "{error}"
    );
    offshoot::testing::skip(format!("the example runs in the simulator: {error}"));
    false
}

#[test]
fn kvm_clones_and_checks() {
    if !kvm_works() {
        return;
    }
    let output = run("--backend kvm --ram 64M --clones 12 --json");
    assert_good_report(&output, "kvm", f64::from(64 << 20));
    let output = run("--backend kvm --ram 16M --clones 12 --vcpus 2 --check full --seed 7 --json");
    assert_good_report(&output, "kvm", f64::from(16 << 20));
    let output = run("--backend kvm --ram 8M --clones 5 --json --inject-fault");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(number(text(&output.stdout), "violations"), 1.0);
}

#[test]
fn the_report_can_be_read() {
    let output = run("--backend sim --ram 8M --clones 2 --depth 1");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = text(&output.stdout);
    for part in ["first_instruction", "2 clones", "shared", "private", "as full copies", "to depth 1"] {
        assert!(report.contains(part), "no {part} in:\n{report}");
    }
}

#[test]
fn one_wrong_byte_in_one_clone_is_found() {
    for seed in 1..4 {
        let output = run(&format!("--backend sim --ram 8M --clones 5 --json --inject-fault --seed {seed}"));
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(number(text(&output.stdout), "violations"), 1.0);
        assert!(text(&output.stderr).contains("violation: clone-"), "{}", text(&output.stderr));
    }
}

#[test]
fn bad_options_are_explained() {
    for (args, word) in [
        ("--clones many", "--clones"),
        ("--ram 3", "--ram"),
        ("--depth 0", "--depth"),
        ("--backend xen", "--backend"),
        ("--vcpus 9", "--vcpus"),
        ("--frobnicate", "--frobnicate"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args}");
        let error = text(&output.stderr);
        assert!(error.contains("error: ") && error.contains(word) && error.contains("Usage:"), "{error}");
    }
    let help = run("--help");
    assert!(help.status.success() && text(&help.stdout).contains("--clones"));
}

#[test]
fn what_the_simulator_cannot_do_is_said() {
    let output = run("--backend sim --ram 8G --clones 1");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("at most 4G"), "{}", text(&output.stderr));
}

/// Checks a report of fuzz_reset that came out well.
fn assert_good_fuzzing(output: &Output, backend: &str, inputs: f64, checked: f64) {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json = text(&output.stdout).trim_end();
    assert!(json.starts_with('{') && json.ends_with('}') && !json.contains('\n'), "one object on one line: {json}");
    assert!(json.contains(&format!("\"backend\":\"{backend}\"")), "{json}");
    assert_eq!(number(json, "inputs"), inputs);
    assert_eq!(number(json, "violations"), 0.0);
    assert_eq!(number(json, "resets_checked"), checked);
    let verdicts = ["accepted", "rejected", "smashed"].map(|verdict| number(json, verdict));
    assert!(verdicts.iter().sum::<f64>() == inputs && verdicts.iter().all(|&count| count > 0.0), "{json}");
    assert!((1.0..=inputs).contains(&number(json, "found_at")));
    // The page with the input at least, and pages with counters.
    assert!(number(json, "pages_a_reset") > 2.0);
    for stage in ["run", "reset", "reset_memory", "load_state", "respawn"] {
        let (_, times) = json.split_once(&format!("\"{stage}\":")).unwrap_or_else(|| panic!("no {stage} in {json}"));
        let [p50, p99] = ["p50_us", "p99_us"].map(|key| number(times, key));
        assert!(0.0 <= p50 && p50 <= p99, "{stage}: {p50} {p99}");
    }
}

#[test]
fn the_simulated_fuzzer_resets_and_finds_the_bug() {
    let output = run_example("fuzz_reset", "--backend sim --inputs 320 --ram 16M --json");
    assert_good_fuzzing(&output, "sim", 320.0, 5.0);
    let output = run_example("fuzz_reset", "--backend sim --inputs 300 --ram 8M --check full --seed 9 --json");
    assert_good_fuzzing(&output, "sim", 300.0, 300.0);
}

#[test]
fn the_kvm_fuzzer_resets_and_finds_the_bug() {
    if !kvm_works() {
        return;
    }
    let output = run_example("fuzz_reset", "--backend kvm --inputs 200 --ram 8M --check full --json");
    assert_good_fuzzing(&output, "kvm", 200.0, 200.0);
    let output = run_example("fuzz_reset", "--backend kvm --inputs 64 --ram 8M --inject-fault --json");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("violation: after input 64: RAM at"), "{}", text(&output.stderr));
}

#[test]
fn a_byte_that_a_reset_left_is_found() {
    let output = run_example("fuzz_reset", "--backend sim --inputs 320 --ram 8M --inject-fault --json");
    assert_eq!(output.status.code(), Some(1));
    // The simulator knows of the byte and drops it with the next reset, so it is seen once.
    assert_eq!(number(text(&output.stdout), "violations"), 1.0);
    assert!(text(&output.stderr).contains("violation: after input 64: RAM at 0x400000"), "{}", text(&output.stderr));
}

#[test]
fn a_run_that_finds_nothing_is_a_failure() {
    let output = run_example("fuzz_reset", "--backend sim --inputs 1 --ram 8M --json");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("did not find the planted bug"), "{}", text(&output.stderr));
    for (args, word) in
        [("--inputs none", "--inputs"), ("--ram 4M", "--ram"), ("--check some", "--check"), ("--x", "--x")]
    {
        let output = run_example("fuzz_reset", args);
        assert_eq!(output.status.code(), Some(2), "{args}");
        let error = text(&output.stderr);
        assert!(error.contains("error: ") && error.contains(word) && error.contains("Usage:"), "{error}");
    }
    let help = run_example("fuzz_reset", "--help");
    assert!(help.status.success() && text(&help.stdout).contains("--inputs"));
}
