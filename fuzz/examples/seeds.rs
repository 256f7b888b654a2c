//! Writes the seeds of `kvm_state`: small encodings in the layout of `src/frontend/kvm/encode.rs`, made by hand so that a change of
//! the decoder is held against the documented layout and not against itself.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example seeds`. The other targets' seeds are kept from runs, after `cargo fuzz cmin`.

use std::path::Path;

use offshoot::frontend::kvm::MachineState;

const IRQCHIPS: u32 = 1;
const PIT: u32 = 2;
const CLOCK: u32 = 4;
const XCRS: u32 = 1;
const POINTERS: u32 = 2;
const LAPIC: u32 = 4;
const DEADLINE: u32 = 8;
const NESTED_REFUSED: u32 = 2 << 4;

struct Seed(Vec<u8>);

impl Seed {
    fn new(devices: u32, vcpus: u32) -> Self {
        let mut seed = Self(b"OFFSKVM\0".to_vec());
        seed.words(&[1, 0, 0, 0, devices, vcpus]);
        seed
    }

    fn words(&mut self, words: &[u32]) {
        self.0.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }

    /// Bytes that are no pattern of the kernel's.
    fn fill(&mut self, len: usize) {
        self.0.extend((0..len).map(|at| (at * 7 + 3) as u8));
    }

    fn vcpu(&mut self, parts: u32, cpuid: u32, xsave: u32, msrs: u32, refused: u32) {
        self.words(&[parts, 2_000_000, 0, cpuid]);
        self.fill(cpuid as usize * 40 + 144 + 312);
        self.fill(if parts & POINTERS != 0 { 32 } else { 0 });
        self.fill(128 + if parts & XCRS != 0 { 392 } else { 0 });
        self.words(&[xsave]);
        self.fill(xsave as usize);
        self.words(&[msrs]);
        self.fill(msrs as usize * 16);
        self.words(&[refused]);
        self.fill(refused as usize * 4);
        self.fill(if parts & DEADLINE != 0 { 8 } else { 0 });
        self.fill(if parts & LAPIC != 0 { 1024 } else { 0 });
        self.fill(64);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u64;
        self.0[16..24].copy_from_slice(&length.to_le_bytes());
        let checksum = crc32fast::hash(&self.0[16..]);
        self.0[12..16].copy_from_slice(&checksum.to_le_bytes());
        self.0
    }
}

fn main() -> std::io::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/kvm_state");
    std::fs::create_dir_all(&dir)?;
    let mut clock = Seed::new(PIT | CLOCK, 0);
    clock.fill(112 + 48);
    let mut chips = Seed::new(IRQCHIPS, 0);
    chips.fill(3 * 520);
    let mut small = Seed::new(0, 1);
    small.vcpu(0, 0, 4096, 0, 0);
    let mut full = Seed::new(0, 1);
    full.vcpu(XCRS | POINTERS | LAPIC | DEADLINE | NESTED_REFUSED, 2, 4096 + 64, 3, 2);
    // Must be refused: the kernel has no XSAVE area so small, and it would not come back the same.
    let mut short = Seed::new(0, 1);
    short.vcpu(XCRS | LAPIC, 1, 64, 1, 1);
    let seeds = [
        ("empty", Seed::new(0, 0), true),
        ("clock", clock, true),
        ("chips", chips, true),
        ("vcpu", small, true),
        ("vcpu-full", full, true),
        ("short-xsave", short, false),
    ];
    for (name, seed, good) in seeds {
        let bytes = seed.finish();
        let decoded = MachineState::from_bytes(&bytes);
        assert_eq!(decoded.is_ok(), good, "{name}: {decoded:?}");
        std::fs::write(dir.join(name), bytes)?;
    }
    Ok(())
}
