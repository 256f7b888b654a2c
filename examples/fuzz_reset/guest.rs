//! The contract between guest code and host: where things lie in guest memory, what an input looks like, and what the parser is to say of it.
//!
//! ```text
//! input    "OR" (2), length of all of it (2), checksum of the records (2), records
//! record   tag (1), length of the payload (1), payload
//!   tag 1  bytes: counted in a table, in a page that follows from their hash
//!   tag 2  records, at most 4 deep
//!   tag 3  a name of at most 32 bytes: copied to a buffer on the stack
//! ```
//! All numbers are little-endian; hashes and checksums are `sum * 31 + byte`. **The parser has a bug**: it takes the length of a name for a number
//! with a sign. 128 passes for -128, which is not above 32, and the copy runs over the end of the buffer. A canary behind it tells.
//!
//! The parser is there three times: in x86 and RISC-V code for the guests, and here, so that every verdict can be checked.

use offshoot::page::{ByteSize, GuestAddress};

pub const PAGE: u64 = 4096;
/// Where guest code starts.
pub const CODE: u64 = 0x1000;
/// The stack grows down from here.
pub const STACK: u64 = 0x8000;
/// The length of the input, four bytes, and the input. Written by the host.
pub const INPUT: u64 = 0x9000;
/// So that it fits into its page.
pub const LONGEST_INPUT: usize = 1020;
/// What the parser found, and the sector that it has written to the disk.
pub const RESULT: u64 = 0xa000;
/// Counters, a page apart or more.
pub const TABLE: u64 = 0x10_0000;
pub const BUCKETS: u32 = 1024;
pub const LEAST_RAM: ByteSize = ByteSize::mib(8);

pub const MAGIC: u32 = u16::from_le_bytes(*b"OR") as u32;
pub const CANARY: u32 = 0x5aa5_c33c;
pub const DEEPEST: u8 = 4;
pub const LONGEST_NAME: u8 = 32;

/// Offsets in the page of results.
pub mod result {
    pub const RECORDS: u16 = 0;
    pub const DIGEST: u16 = 4;
    pub const REASON: u16 = 8;
}

/// Why a guest left its code: an `ecall` with this number, or a write to the port of this number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bell {
    /// It waits for an input: the fork point.
    Ready = 0x20,
    /// The sector at [`RESULT`] is to be written to the disk.
    Log = 0x21,
    Accepted = 0x22,
    Rejected = 0x23,
    Smashed = 0x24,
}

impl Bell {
    /// The bell of a number that a guest gave.
    pub fn from_number(number: u32) -> Option<Self> {
        let all = [Self::Ready, Self::Log, Self::Accepted, Self::Rejected, Self::Smashed];
        all.into_iter().find(|bell| *bell as u32 == number)
    }
}

/// Why an input was rejected; the number is what the guest says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    NoInput = 1,
    Length = 2,
    Checksum = 3,
    TooDeep = 4,
    CutShort = 5,
    UnknownTag = 6,
    LongName = 7,
}

/// What a parser says of an input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Accepted { records: u32, digest: u32 },
    Rejected { reason: u32 },
    Smashed,
}

/// How far apart the counters lie.
pub fn gap(ram: ByteSize) -> u32 {
    ((ram.get() - TABLE) / u64::from(BUCKETS) / PAGE * PAGE).max(PAGE) as u32
}

pub fn address(at: u64, offset: u16) -> GuestAddress {
    GuestAddress::new(at + u64::from(offset))
}

pub fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum: u32, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
}

/// What the guest must say, its bug included.
pub fn verdict_of(input: &[u8]) -> Verdict {
    match Parser::default().input(input) {
        Ok(parser) => Verdict::Accepted { records: parser.records, digest: parser.digest },
        Err(Stop::Rejected(reason)) => Verdict::Rejected { reason: reason as u32 },
        Err(Stop::Smashed) => Verdict::Smashed,
    }
}

enum Stop {
    Rejected(Reason),
    Smashed,
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self::Rejected(reason)
    }
}

#[derive(Default)]
struct Parser {
    records: u32,
    digest: u32,
}

impl Parser {
    fn input(mut self, input: &[u8]) -> Result<Self, Stop> {
        let Some((header, records)) = input.split_first_chunk::<6>() else { return Err(Reason::NoInput.into()) };
        let word = |at: usize| u32::from(header[at]) | u32::from(header[at + 1]) << 8;
        if word(0) != MAGIC {
            return Err(Reason::NoInput.into());
        }
        if word(2) as usize != input.len() {
            return Err(Reason::Length.into());
        }
        if word(4) != hash(records) & 0xffff {
            return Err(Reason::Checksum.into());
        }
        self.list(records, 0)?;
        Ok(self)
    }

    fn list(&mut self, mut rest: &[u8], depth: u8) -> Result<(), Stop> {
        if depth > DEEPEST {
            return Err(Reason::TooDeep.into());
        }
        while !rest.is_empty() {
            let (&[tag, len], after) = rest.split_first_chunk().ok_or(Reason::CutShort)?;
            let (payload, after) = after.split_at_checked(len.into()).ok_or(Reason::CutShort)?;
            rest = after;
            self.records += 1;
            match tag {
                1 => self.digest = self.digest.wrapping_mul(31).wrapping_add(hash(payload)),
                2 => self.list(payload, depth + 1)?,
                3 => self.name(payload)?,
                _ => return Err(Reason::UnknownTag.into()),
            }
        }
        Ok(())
    }

    fn name(&mut self, payload: &[u8]) -> Result<(), Stop> {
        let longest = LONGEST_NAME as usize;
        if payload.len() as u8 as i8 > LONGEST_NAME as i8 {
            return Err(Reason::LongName.into());
        }
        if payload.get(longest..longest + 4).is_some_and(|over| over != CANARY.to_le_bytes()) {
            return Err(Stop::Smashed);
        }
        self.digest = self.digest.wrapping_mul(31).wrapping_add(hash(payload));
        Ok(())
    }
}
