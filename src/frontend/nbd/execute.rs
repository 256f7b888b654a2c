//! One command carried out on a disk, its reply appended to a buffer. Knows disks and replies; whoever calls has passed the export's gate.

use std::error::Error;
use std::io;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::negotiation::Agreed;
use super::reply::{Last, ReplyBuffer};
use super::request::{Chunks, Command, Durability, Refusal, Replies, Request, Span, Zeroing};
use super::status::{self, Content};
use super::wire::{Descriptor, ErrorCode, chunk};
use crate::disk::{Disk, DiskError};
use crate::error::{SpaceError, SystemError};
use crate::page::{Lba, SECTOR_SIZE};

/// Reads shorter than this are sent as they are: asking the disk where its holes are costs more than the bytes.
const LOOK_FOR_HOLES: u64 = 64 << 10;
/// Chunks of one read.
const MOST_CHUNKS: usize = 64;
/// Zeroes that are written out at once, for those who want them allocated.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Carries out `command` and appends its reply, be it an error.
pub(super) fn execute(agreed: &Agreed, request: &Request, command: Command, payload: &[u8], out: &mut ReplyBuffer) {
    let mark = out.mark();
    if let Err(refusal) = carry_out(agreed, request, command, payload, out) {
        out.take_back(mark);
        out.refused(request, agreed.terms.replies, &refusal);
    }
}

fn carry_out(
    agreed: &Agreed,
    request: &Request,
    command: Command,
    payload: &[u8],
    out: &mut ReplyBuffer,
) -> Result<(), Refusal> {
    let (disk, cookie) = (&**agreed.export.disk(), request.cookie);
    let durability = match command {
        Command::Read { span, chunks } => return read(agreed, request, span, chunks, out),
        Command::BlockStatus { span, extents } => {
            // A client that asks for both contexts gets both of one instant only as far as it writes nothing meanwhile.
            let mut left = agreed.terms.contexts.iter().peekable();
            while let Some(context) = left.next() {
                let runs = status::describe(&agreed.export, context, span, extents).map_err(failure)?;
                let last = if left.peek().is_none() { Last::Yes } else { Last::No };
                out.chunk(cookie, chunk::BLOCK_STATUS, (4 + runs.len() * size_of::<Descriptor>()) as u32, last);
                out.append(&context.id().to_be_bytes());
                runs.iter()
                    .for_each(|run| out.append(Descriptor { len: run.len.into(), flags: run.state.into() }.as_bytes()));
            }
            return Ok(());
        }
        Command::Write { span, durability } => {
            disk.write(span.lba, payload).map_err(failure)?;
            durability
        }
        Command::Trim { span, durability } => {
            disk.discard(span.lba, span.count).map_err(failure)?;
            durability
        }
        Command::WriteZeroes { span, how: Zeroing::Cheapest, durability } => {
            disk.write_zeroes(span.lba, span.count).map_err(failure)?;
            durability
        }
        Command::WriteZeroes { span, how: Zeroing::Allocated, durability } => {
            write_out_zeroes(disk, span).map_err(failure)?;
            durability
        }
        Command::Flush => Durability::Durable,
        // Nothing to fetch ahead: what is cached is the medium's own.
        Command::Cache | Command::Disconnect => Durability::Written,
    };
    if durability == Durability::Durable {
        disk.flush().map_err(failure)?;
    }
    out.done(cookie);
    Ok(())
}

fn read(agreed: &Agreed, request: &Request, span: Span, chunks: Chunks, out: &mut ReplyBuffer) -> Result<(), Refusal> {
    let (disk, cookie) = (&**agreed.export.disk(), request.cookie);
    if agreed.terms.replies == Replies::Simple {
        out.simple(cookie);
        return disk.read(span.lba, out.room(span.byte_len() as usize)).map_err(failure);
    }
    let most = if chunks == Chunks::Many && span.byte_len() >= LOOK_FOR_HOLES { MOST_CHUNKS } else { 0 };
    let runs = match most {
        0 => vec![status::Run { len: span.byte_len() as u32, state: Content::Anything }],
        most => status::content(disk, span, most).map_err(failure)?,
    };
    let mut offset = span.start_byte();
    for (at, run) in runs.iter().enumerate() {
        // The disk is read before anything is sent: an error takes the whole reply back, so a last chunk may say so.
        let last = if at + 1 == runs.len() { Last::Yes } else { Last::No };
        match run.state {
            Content::Zeroes => out.hole(cookie, offset, run.len, last),
            Content::Anything => {
                out.chunk(cookie, chunk::OFFSET_DATA, 8 + run.len, last);
                out.append(&offset.to_be_bytes());
                disk.read(Lba::new(offset / SECTOR_SIZE), out.room(run.len as usize)).map_err(failure)?;
            }
        }
        offset += u64::from(run.len);
    }
    Ok(())
}

fn write_out_zeroes(disk: &Disk, span: Span) -> Result<(), DiskError> {
    let (mut at, mut left) = (span.lba.get(), span.byte_len());
    while left > 0 {
        let take = left.min(ZEROES.len() as u64);
        disk.write(Lba::new(at), &ZEROES[..take as usize])?;
        at += take / SECTOR_SIZE;
        left -= take;
    }
    Ok(())
}

/// The protocol's number for what a disk says.
fn failure(error: DiskError) -> Refusal {
    let code = match &error {
        DiskError::ReadOnly | DiskError::Frozen => ErrorCode::NotPermitted,
        DiskError::OutOfRange { .. } | DiskError::Misaligned(_) | DiskError::Empty => ErrorCode::Invalid,
        DiskError::Space(SpaceError::HeapLimit { .. }) => ErrorCode::NoSpace,
        DiskError::Space(SpaceError::System(SystemError::OutOfMemory { .. })) => ErrorCode::OutOfMemory,
        other if is_full(other) => ErrorCode::NoSpace,
        _ => ErrorCode::Io,
    };
    Refusal::new(code, error.to_string())
}

/// Whether the medium has no room, whatever it is wrapped in.
fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let shared = error.downcast_ref::<Arc<io::Error>>().map(|error| &**error);
        if let Some(error) = shared.or_else(|| error.downcast_ref()) {
            return matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        }
        next = error.source();
    }
    matches!(error.downcast_ref(), Some(DiskError::Space(SpaceError::System(SystemError::Other { error, .. })))
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ImageError;
    use crate::page::PageCount;

    #[test]
    fn a_full_medium_is_told_from_a_broken_one() {
        let io = |kind: io::ErrorKind| Arc::new(io::Error::from(kind));
        let system = |kind| SpaceError::System(SystemError::Other { call: "pwrite", error: io(kind) });
        for (error, code) in [
            (DiskError::ReadOnly, ErrorCode::NotPermitted),
            (DiskError::Frozen, ErrorCode::NotPermitted),
            (SpaceError::HeapLimit { limit: PageCount::new(1) }.into(), ErrorCode::NoSpace),
            (system(io::ErrorKind::StorageFull).into(), ErrorCode::NoSpace),
            (system(io::ErrorKind::PermissionDenied).into(), ErrorCode::Io),
            (SpaceError::Image(ImageError::Io(io(io::ErrorKind::StorageFull))).into(), ErrorCode::NoSpace),
            (SpaceError::Image(ImageError::Io(io(io::ErrorKind::UnexpectedEof))).into(), ErrorCode::Io),
            (SpaceError::System(SystemError::OutOfMemory { call: "mmap" }).into(), ErrorCode::OutOfMemory),
        ] {
            assert_eq!(failure(error.clone()).code, code, "{error:?}");
        }
    }
}
