//! A request of the transmission phase: parsed, and held against the terms that were agreed. Pure: bytes in, a command or an error out.

use zerocopy::FromBytes;

use super::context::Contexts;
use super::wire::{ErrorCode, REQUEST_LEN, REQUEST_MAGIC, RequestHeader, command, flag};
use crate::disk::Access;
use crate::page::{ByteSize, Lba, SECTOR_SIZE, SectorCount};

/// What the client calls a request by; comes back in its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Cookie(pub(super) u64);

/// Which replies were agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Replies {
    Simple,
    Structured,
}

/// What was agreed on, as far as a request can break it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub capacity: SectorCount,
    pub access: Access,
    pub replies: Replies,
    pub contexts: Contexts,
    pub longest: ByteSize,
}

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub cookie: Cookie,
    flags: u16,
    kind: u16,
    offset: u64,
    len: u32,
}

/// Sectors of the disk, all of them there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub lba: Lba,
    pub count: SectorCount,
}

impl Span {
    pub(super) fn start_byte(self) -> u64 {
        self.lba.get() * SECTOR_SIZE
    }

    pub(super) fn byte_len(self) -> u64 {
        self.count.get() * SECTOR_SIZE
    }
}

/// When a reply may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Durability {
    Written,
    /// FUA: once it is durable.
    Durable,
}

/// Whether a read may be answered in several chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Chunks {
    Many,
    One,
}

/// How sectors are to be zeroed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Zeroing {
    /// In whatever way costs least.
    Cheapest,
    /// With room kept for later writes.
    Allocated,
}

/// How much of a range a block status must tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Extents {
    Many,
    First,
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Read { span: Span, chunks: Chunks },
    Write { span: Span, durability: Durability },
    Flush,
    Trim { span: Span, durability: Durability },
    WriteZeroes { span: Span, how: Zeroing, durability: Durability },
    Cache,
    BlockStatus { span: Span, extents: Extents },
    Disconnect,
}

/// Why a request is not executed, or has failed: the protocol's number, and words for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub code: ErrorCode,
    pub why: String,
}

impl Refusal {
    pub(super) fn new(code: ErrorCode, why: impl Into<String>) -> Self {
        Self { code, why: why.into() }
    }

    fn invalid(why: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, why)
    }
}

impl Request {
    /// The bytes of a request without payload; `None` where they do not begin as one must: the stream is lost then.
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let header = RequestHeader::ref_from_bytes(bytes).ok()?;
        (header.magic.get() == REQUEST_MAGIC).then(|| Self {
            cookie: Cookie(header.cookie.get()),
            flags: header.flags.get(),
            kind: header.kind.get(),
            offset: header.offset.get(),
            len: header.len.get(),
        })
    }

    /// Bytes that follow the request, whether it is a good one or not.
    pub(super) fn payload(&self) -> ByteSize {
        ByteSize::new(if self.kind == command::WRITE { self.len.into() } else { 0 })
    }

    /// The command, where it keeps to the terms.
    pub(super) fn check(&self, terms: &Terms) -> Result<Command, Refusal> {
        let allowed = flag::FUA
            | match self.kind {
                command::READ if terms.replies == Replies::Structured => flag::DF,
                command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
                command::BLOCK_STATUS => flag::REQ_ONE,
                _ => 0,
            };
        if self.kind == command::DISC {
            return Ok(Command::Disconnect);
        }
        if self.flags & !allowed != 0 {
            return Err(Refusal::invalid(format!("flags {:#x} do not go with command {}", self.flags, self.kind)));
        }
        let durability = if self.has(flag::FUA) { Durability::Durable } else { Durability::Written };
        match self.kind {
            command::READ => {
                let chunks = if self.has(flag::DF) { Chunks::One } else { Chunks::Many };
                let too_long = if chunks == Chunks::One { ErrorCode::Overflow } else { ErrorCode::Invalid };
                self.within(terms.longest, too_long)?;
                Ok(Command::Read { span: self.span(terms, ErrorCode::Invalid)?, chunks })
            }
            command::WRITE => {
                writable(terms)?;
                self.within(terms.longest, ErrorCode::Invalid)?;
                Ok(Command::Write { span: self.span(terms, ErrorCode::NoSpace)?, durability })
            }
            command::FLUSH if self.offset != 0 || self.len != 0 => {
                Err(Refusal::invalid("a flush has neither offset nor length"))
            }
            command::FLUSH => Ok(Command::Flush),
            command::TRIM => {
                writable(terms)?;
                Ok(Command::Trim { span: self.span(terms, ErrorCode::Invalid)?, durability })
            }
            command::CACHE => self.span(terms, ErrorCode::Invalid).map(|_| Command::Cache),
            command::WRITE_ZEROES => {
                writable(terms)?;
                let how = if self.has(flag::NO_HOLE) { Zeroing::Allocated } else { Zeroing::Cheapest };
                if how == Zeroing::Allocated && self.has(flag::FAST_ZERO) {
                    return Err(Refusal::new(ErrorCode::NotSupported, "zeroes that keep their room are written out"));
                }
                Ok(Command::WriteZeroes { span: self.span(terms, ErrorCode::NoSpace)?, how, durability })
            }
            command::BLOCK_STATUS if terms.contexts.is_empty() => {
                Err(Refusal::invalid("no metadata context was agreed on"))
            }
            command::BLOCK_STATUS => {
                let extents = if self.has(flag::REQ_ONE) { Extents::First } else { Extents::Many };
                Ok(Command::BlockStatus { span: self.span(terms, ErrorCode::Invalid)?, extents })
            }
            other => Err(Refusal::invalid(format!("command {other} is not known here"))),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn within(&self, longest: ByteSize, code: ErrorCode) -> Result<(), Refusal> {
        if u64::from(self.len) > longest.get() {
            return Err(Refusal::new(code, format!("{} bytes: at most {} in one request", self.len, longest.get())));
        }
        Ok(())
    }

    fn span(&self, terms: &Terms, beyond: ErrorCode) -> Result<Span, Refusal> {
        let (offset, len) = (self.offset, u64::from(self.len));
        if len == 0 {
            return Err(Refusal::invalid("a request of no bytes"));
        }
        if !offset.is_multiple_of(SECTOR_SIZE) || !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Refusal::invalid(format!("{len} bytes at {offset}: not whole sectors of {SECTOR_SIZE}")));
        }
        let (lba, count) = (offset / SECTOR_SIZE, len / SECTOR_SIZE);
        if lba > terms.capacity.get() || count > terms.capacity.get() - lba {
            return Err(Refusal::new(beyond, format!("{len} bytes at {offset} end past the export")));
        }
        Ok(Span { lba: Lba::new(lba), count: SectorCount::new(count) })
    }
}

fn writable(terms: &Terms) -> Result<(), Refusal> {
    match terms.access {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(Refusal::new(ErrorCode::NotPermitted, "this export is read-only")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    const TERMS: Terms = Terms {
        capacity: SectorCount::new(100),
        access: Access::ReadWrite,
        replies: Replies::Structured,
        contexts: Contexts::ALL,
        longest: ByteSize::kib(32),
    };

    fn request(kind: u16, flags: u16, offset: u64, len: u32) -> Request {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: 7.into(),
            offset: offset.into(),
            len: len.into(),
        };
        Request::parse(header.as_bytes().try_into().unwrap()).unwrap()
    }

    fn code(kind: u16, flags: u16, offset: u64, len: u32, terms: &Terms) -> Option<ErrorCode> {
        request(kind, flags, offset, len).check(terms).err().map(|refusal| refusal.code)
    }

    #[test]
    fn another_magic_is_not_a_request() {
        assert!(Request::parse(&[0; REQUEST_LEN]).is_none());
    }

    #[test]
    fn each_broken_term_has_its_error() {
        use ErrorCode::*;
        let read_only = Terms { access: Access::ReadOnly, ..TERMS };
        let simple = Terms { replies: Replies::Simple, contexts: Contexts::default(), ..TERMS };
        for (kind, flags, offset, len, terms, want) in [
            (command::READ, 0, 0, 512, &TERMS, None),
            (command::READ, flag::DF, 99 * 512, 512, &TERMS, None),
            (command::READ, flag::DF, 0, 512, &simple, Some(Invalid)),
            (command::READ, 0, 99 * 512, 1024, &TERMS, Some(Invalid)),
            (command::READ, 0, u64::MAX - 511, 512, &TERMS, Some(Invalid)),
            (command::READ, 0, 1, 512, &TERMS, Some(Invalid)),
            (command::READ, 0, 0, 511, &TERMS, Some(Invalid)),
            (command::READ, 0, 0, 0, &TERMS, Some(Invalid)),
            (command::READ, 0, 0, 33 << 10, &TERMS, Some(Invalid)),
            (command::READ, flag::DF, 0, 33 << 10, &TERMS, Some(Overflow)),
            (command::READ, flag::NO_HOLE, 0, 512, &TERMS, Some(Invalid)),
            (command::WRITE, flag::FUA, 0, 512, &TERMS, None),
            (command::WRITE, 0, 100 * 512, 512, &TERMS, Some(NoSpace)),
            (command::WRITE, 0, 0, 33 << 10, &TERMS, Some(Invalid)),
            (command::WRITE, 0, 0, 512, &read_only, Some(NotPermitted)),
            (command::TRIM, 0, 0, 512, &read_only, Some(NotPermitted)),
            (command::TRIM, 0, 0, 100 * 512, &TERMS, None),
            (command::TRIM, 0, 0, 101 * 512, &TERMS, Some(Invalid)),
            (command::WRITE_ZEROES, 0, 0, 101 * 512, &TERMS, Some(NoSpace)),
            (command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512, &TERMS, None),
            (command::WRITE_ZEROES, flag::NO_HOLE, 0, 512, &TERMS, None),
            (command::WRITE_ZEROES, flag::NO_HOLE | flag::FAST_ZERO, 0, 512, &TERMS, Some(NotSupported)),
            (command::WRITE_ZEROES, 0, 0, 512, &read_only, Some(NotPermitted)),
            (command::FLUSH, flag::FUA, 0, 0, &read_only, None),
            (command::FLUSH, 0, 512, 0, &TERMS, Some(Invalid)),
            (command::FLUSH, 0, 0, 512, &TERMS, Some(Invalid)),
            (command::CACHE, 0, 0, 100 * 512, &read_only, None),
            (command::CACHE, 0, 100 * 512, 512, &TERMS, Some(Invalid)),
            (command::BLOCK_STATUS, flag::REQ_ONE, 0, 512, &TERMS, None),
            (command::BLOCK_STATUS, 0, 0, 512, &simple, Some(Invalid)),
            (command::BLOCK_STATUS, 0, 0, 0, &TERMS, Some(Invalid)),
            (command::DISC, 0xffff, 1, 1, &TERMS, None),
            (8, 0, 0, 0, &TERMS, Some(Invalid)),
            (u16::MAX, 0, 0, 512, &TERMS, Some(Invalid)),
        ] {
            assert_eq!(code(kind, flags, offset, len, terms), want, "command {kind} {flags:#x} {offset} {len}");
        }
    }
}
