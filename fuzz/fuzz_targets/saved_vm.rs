//! The manifest of a saved VM, with any bytes.
//!
//! Oracle: reading never panics, never holds more memory at once than a small multiple of the bytes given; what it accepts is written and read again as
//! the same. Each input is tried as it is, and once more with magic, version, lengths and checksums put right, so that these do not hide the tables.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::store::Manifest;
use offshoot_fuzz::peak::{self, Peak};

#[global_allocator]
static ALLOCATOR: Peak = Peak;

const BLOCK: usize = 4096;
/// Memory per input byte: a region takes 16 bytes of the file and of memory, an entry of a disk no more than twice its 40; vectors grow by doubling.
const MULTIPLE: usize = 8;
/// And for the smallest inputs.
const FIXED: usize = 64 << 10;
/// Where the fields lie; see `docs/formats/saved-vm.md`.
const BODY_LEN: usize = 96;
const BODY_CRC: usize = 104;
const STATE_CRC: usize = 108;
const STATE_LEN: usize = 112;

fn check(bytes: &[u8]) {
    let (manifest, peak) = peak::during(|| Manifest::from_bytes(bytes));
    let limit = FIXED + MULTIPLE * bytes.len();
    assert!(peak <= limit, "{peak} bytes held for {} given", bytes.len());
    let Ok(manifest) = manifest else { return };
    let again = manifest.to_bytes().expect("what was read can be written");
    assert!(Manifest::from_bytes(&again).is_ok_and(|read| read == manifest));
}

fuzz_target!(|input: &[u8]| {
    check(input);
    if input.len() < BLOCK {
        return;
    }
    let mut repaired = input.to_vec();
    let rest = repaired.len() - BLOCK;
    let said = u64::from_le_bytes(repaired[BODY_LEN..BODY_LEN + 8].try_into().expect("eight bytes"));
    let body = usize::try_from(said).map_or(rest, |said| said % (rest + 1));
    repaired[..8].copy_from_slice(b"OFFSAVM\0");
    repaired[8..12].copy_from_slice(&1u32.to_le_bytes());
    repaired[24..40].fill(0);
    repaired[BODY_LEN..BODY_LEN + 8].copy_from_slice(&(body as u64).to_le_bytes());
    repaired[STATE_LEN..STATE_LEN + 8].copy_from_slice(&((rest - body) as u64).to_le_bytes());
    let sums = [crc32fast::hash(&repaired[BLOCK..BLOCK + body]), crc32fast::hash(&repaired[BLOCK + body..])];
    repaired[BODY_CRC..BODY_CRC + 4].copy_from_slice(&sums[0].to_le_bytes());
    repaired[STATE_CRC..STATE_CRC + 4].copy_from_slice(&sums[1].to_le_bytes());
    repaired[12..16].fill(0);
    let sum = crc32fast::hash(&repaired[..BLOCK]);
    repaired[12..16].copy_from_slice(&sum.to_le_bytes());
    check(&repaired);
});
