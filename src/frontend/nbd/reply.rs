//! Replies, written one after the other into a buffer that keeps its memory.
//!
//! Disks are read straight into it. Knows the layout of replies, and neither sockets nor disks.

use zerocopy::IntoBytes;

use super::request::{Cookie, Refusal, Replies, Request};
use super::wire::{CHUNK_MAGIC, ChunkError, ChunkHeader, Hole, SIMPLE_REPLY_MAGIC, SimpleReply, chunk};

/// Longest words about an error.
const MAX_MESSAGE: usize = 256;

/// Bytes to be sent. What was sent once is not cleared, only overwritten: nothing past `used` is ever shown.
#[derive(Debug, Default)]
pub(super) struct ReplyBuffer {
    bytes: Vec<u8>,
    used: usize,
}

/// Where a reply begins that may have to be taken back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark(usize);

/// Whether more chunks of one reply follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Last {
    No,
    Yes,
}

impl ReplyBuffer {
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Forgets what is in it, and gives memory back beyond `keep` bytes.
    pub(super) fn clear(&mut self, keep: usize) {
        self.used = 0;
        if self.bytes.len() > keep {
            self.bytes.truncate(keep);
            self.bytes.shrink_to(keep);
        }
    }

    pub(super) fn mark(&self) -> Mark {
        Mark(self.used)
    }

    /// Takes back whatever was appended since.
    pub(super) fn take_back(&mut self, mark: Mark) {
        self.used = mark.0;
    }

    /// The next `len` bytes, to be filled by the caller.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.used;
        self.used += len;
        if self.bytes.len() < self.used {
            self.bytes.resize(self.used, 0);
        }
        &mut self.bytes[start..self.used]
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// A simple reply, or the head of one with data; of success.
    pub(super) fn simple(&mut self, cookie: Cookie) {
        self.simple_with(cookie, 0);
    }

    fn simple_with(&mut self, cookie: Cookie, error: u32) {
        let reply = SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.0.into() };
        self.append(reply.as_bytes());
    }

    /// The header of a chunk.
    pub(super) fn chunk(&mut self, cookie: Cookie, kind: u16, len: u32, last: Last) {
        let flags = if last == Last::Yes { chunk::DONE } else { 0 };
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.0.into(),
            len: len.into(),
        };
        self.append(header.as_bytes());
    }

    /// A chunk that says that some bytes are zeroes.
    pub(super) fn hole(&mut self, cookie: Cookie, offset: u64, len: u32, last: Last) {
        self.chunk(cookie, chunk::OFFSET_HOLE, size_of::<Hole>() as u32, last);
        self.append(Hole { offset: offset.into(), len: len.into() }.as_bytes());
    }

    /// What answers a request without data that went well: a simple reply is always allowed, and the shortest.
    pub(super) fn done(&mut self, cookie: Cookie) {
        self.simple(cookie);
    }

    /// What answers a request that was refused or has failed.
    pub(super) fn refused(&mut self, request: &Request, replies: Replies, refusal: &Refusal) {
        // The shortest form where the words would be lost on the client anyway.
        if replies == Replies::Simple {
            debug_assert!(refusal.code as u32 != 0);
            return self.simple_with(request.cookie, refusal.code as u32);
        }
        let mut end = refusal.why.len().min(MAX_MESSAGE);
        while !refusal.why.is_char_boundary(end) {
            end -= 1;
        }
        let message = &refusal.why.as_bytes()[..end];
        self.chunk(request.cookie, chunk::ERROR, (size_of::<ChunkError>() + message.len()) as u32, Last::Yes);
        let error = ChunkError { error: (refusal.code as u32).into(), message_len: (message.len() as u16).into() };
        self.append(error.as_bytes());
        self.append(message);
    }
}
