//! A small client of the protocol: blocking, on a Unix socket or TCP, and willing to send what no client should.
//!
//! Written from the protocol's document, not from the server's code, so that the two can disagree.

#![allow(dead_code, reason = "each program that includes this file uses some of it")]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const ENOMEM: u32 = 12;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const ENOTSUP: u32 = 95;
pub const ESHUTDOWN: u32 = 108;

/// A connection of either family.
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.read_exact(buf),
            Self::Tcp(stream) => stream.read_exact(buf),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// A part of a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Chunk {
    Data { offset: u64, bytes: Vec<u8> },
    Hole { offset: u64, len: u32 },
    Status { context: u32, extents: Vec<(u32, u32)> },
}

/// A whole reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    pub cookie: u64,
    /// 0 where all went well.
    pub error: u32,
    pub chunks: Vec<Chunk>,
}

impl Reply {
    /// The bytes of a read that began at `start`, pieced together; panics where they overlap or leave gaps.
    pub fn bytes(&self, start: u64, len: usize) -> Vec<u8> {
        let (mut whole, mut seen) = (vec![0; len], 0);
        for chunk in &self.chunks {
            match chunk {
                Chunk::Data { offset, bytes } => {
                    let at = (offset - start) as usize;
                    whole[at..at + bytes.len()].copy_from_slice(bytes);
                    seen += bytes.len();
                }
                Chunk::Hole { offset, len: hole } => {
                    assert!(offset - start + u64::from(*hole) <= len as u64, "a hole outside the read");
                    seen += *hole as usize;
                }
                Chunk::Status { .. } => panic!("a read is answered with a block status"),
            }
        }
        assert_eq!(seen, len, "a read answered in part");
        whole
    }
}

/// A client: negotiates, then sends requests and takes replies, in whatever order they come.
pub struct Client {
    stream: Stream,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    /// Minimum, preferred and maximum block size, where the server has told.
    pub block_sizes: Option<(u32, u32, u32)>,
    next: u64,
    /// Lengths of reads under way: a simple reply does not say.
    reads: HashMap<u64, u32>,
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// A name as an option carries it.
pub fn counted(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat()
}

/// The data of GO and INFO.
pub fn info_request(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend((kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// The data of the options about metadata contexts.
pub fn context_request(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(counted(query)));
    data
}

/// The bytes of a request without payload.
pub fn request_bytes(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// The bytes of an option.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let header = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
    [header, data.to_vec()].concat()
}

impl Client {
    /// Connects and answers the greeting.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::greet(Stream::Unix(UnixStream::connect(path)?), 3)
    }

    /// Reads the greeting and answers with these flags.
    pub fn greet(mut stream: Stream, flags: u32) -> io::Result<Self> {
        let mut greeting = [0; 18];
        stream.read(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" || greeting[16..] != [0, 3] {
            return Err(wrong("another greeting"));
        }
        stream.write(&flags.to_be_bytes())?;
        let (reads, block_sizes) = (HashMap::new(), None);
        Ok(Self { stream, structured: false, size: 0, flags: 0, block_sizes, next: 1, reads })
    }

    /// Connects and agrees on an export, with structured replies and these contexts.
    pub fn open(path: &Path, export: &str, contexts: &[&str]) -> io::Result<Self> {
        let mut client = Self::connect(path)?;
        client.structure()?;
        if !contexts.is_empty() {
            let told = client.option(OPT_SET_META_CONTEXT, &context_request(export, contexts))?;
            if told.len() != contexts.len() + 1 {
                return Err(wrong("not all contexts are there"));
            }
        }
        client.go(export)?;
        Ok(client)
    }

    /// Asks for structured replies.
    pub fn structure(&mut self) -> io::Result<()> {
        let answers = self.option(OPT_STRUCTURED_REPLY, &[])?;
        self.structured = answers[0].0 == REP_ACK;
        Ok(())
    }

    /// Sends an option and takes all its answers: kind and data.
    pub fn option(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        self.send(&option_bytes(option, data))?;
        self.answers(option)
    }

    /// The answers to an option that was sent.
    pub fn answers(&mut self, option: u32) -> io::Result<Vec<(u32, Vec<u8>)>> {
        let mut answers = Vec::new();
        loop {
            let mut header = [0; 20];
            self.stream.read(&mut header)?;
            if be64(&header) != 0x0003_e889_0455_65a9 || be32(&header[8..]) != option {
                return Err(wrong("not the answer to this option"));
            }
            let kind = be32(&header[12..]);
            let mut data = vec![0; be32(&header[16..]) as usize];
            self.stream.read(&mut data)?;
            answers.push((kind, data));
            if kind == REP_ACK || kind >> 31 == 1 {
                return Ok(answers);
            }
        }
    }

    /// Agrees on an export.
    pub fn go(&mut self, name: &str) -> io::Result<()> {
        let answers = self.option(OPT_GO, &info_request(name, &[3]))?;
        for (kind, data) in answers {
            match (kind, data.first_chunk::<2>()) {
                (REP_INFO, Some([0, 0])) => {
                    (self.size, self.flags) = (be64(&data[2..]), u16::from_be_bytes([data[10], data[11]]));
                }
                (REP_INFO, Some([0, 3])) => {
                    self.block_sizes = Some((be32(&data[2..]), be32(&data[6..]), be32(&data[10..])));
                }
                (REP_INFO | REP_ACK, _) => {}
                (error, _) => return Err(wrong(format!("{error:#x}: {}", String::from_utf8_lossy(&data)))),
            }
        }
        Ok(())
    }

    /// Sends bytes of any kind.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write(bytes)
    }

    /// Takes bytes of any kind.
    pub fn receive(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether the server has hung up, and said nothing more.
    pub fn is_over(&mut self) -> bool {
        self.receive(1).is_err()
    }

    /// Says that no more requests follow.
    pub fn finish_sending(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// The connection, for requests and replies by hand.
    pub fn into_stream(self) -> Stream {
        self.stream
    }

    /// Sends a request; returns what its reply will be called.
    pub fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<u64> {
        let cookie = self.next;
        self.next += 1;
        if kind == READ {
            self.reads.insert(cookie, len);
        }
        // One piece: a client that sends twice pays for two packets.
        let mut bytes = request_bytes(flags, kind, cookie, offset, len);
        bytes.extend_from_slice(payload);
        self.send(&bytes)?;
        Ok(cookie)
    }

    /// The next reply, whichever request it answers.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let mut chunks = Vec::new();
        let mut error = 0;
        loop {
            let magic = be32(&self.receive(4)?);
            if magic == 0x6744_6698 {
                let head = self.receive(12)?;
                let (error, cookie) = (be32(&head), be64(&head[4..]));
                let read = self.reads.remove(&cookie);
                if self.structured && read.is_some() {
                    return Err(wrong("a simple reply to a read, with structured ones agreed on"));
                }
                if let (0, Some(len)) = (error, read) {
                    chunks.push(Chunk::Data { offset: u64::MAX, bytes: self.receive(len as usize)? });
                }
                return Ok(Reply { cookie, error, chunks });
            }
            if magic != 0x668e_33ef || !self.structured {
                return Err(wrong(format!("no reply begins with {magic:#x}")));
            }
            let head = self.receive(16)?;
            let (flags, kind) = (u16::from_be_bytes([head[0], head[1]]), u16::from_be_bytes([head[2], head[3]]));
            let cookie = be64(&head[4..]);
            let data = self.receive(be32(&head[12..]) as usize)?;
            match kind {
                0 => {}
                1 => chunks.push(Chunk::Data { offset: be64(&data), bytes: data[8..].to_vec() }),
                2 => chunks.push(Chunk::Hole { offset: be64(&data), len: be32(&data[8..]) }),
                5 => {
                    let extents = data[4..].chunks_exact(8).map(|extent| (be32(extent), be32(&extent[4..])));
                    chunks.push(Chunk::Status { context: be32(&data), extents: extents.collect() });
                }
                _ if kind >> 15 == 1 => error = be32(&data),
                other => return Err(wrong(format!("a chunk of kind {other}"))),
            }
            if flags & 1 == 1 {
                self.reads.remove(&cookie);
                return Ok(Reply { cookie, error, chunks });
            }
        }
    }

    /// One request and its reply, with nothing else under way.
    pub fn call(&mut self, flags: u16, kind: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<Reply> {
        let cookie = self.request(flags, kind, offset, len, payload)?;
        let reply = self.reply()?;
        if reply.cookie != cookie {
            return Err(wrong("the reply to another request"));
        }
        Ok(reply)
    }

    /// Reads, or fails with the server's error.
    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        let mut reply = granted(self.call(0, READ, offset, len, &[])?)?;
        match reply.chunks.as_mut_slice() {
            [Chunk::Data { offset: u64::MAX, bytes }] => Ok(std::mem::take(bytes)),
            _ => Ok(reply.bytes(offset, len as usize)),
        }
    }

    /// Writes, or fails with the server's error.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        granted(self.call(0, WRITE, offset, data.len() as u32, data)?).map(|_| ())
    }

    /// Makes everything durable, or fails with the server's error.
    pub fn flush(&mut self) -> io::Result<()> {
        granted(self.call(0, FLUSH, 0, 0, &[])?).map(|_| ())
    }

    /// Leaves, politely.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.request(0, DISC, 0, 0, &[])?;
        if self.is_over() { Ok(()) } else { Err(wrong("the server says more after the last request")) }
    }
}

fn granted(reply: Reply) -> io::Result<Reply> {
    match reply.error {
        0 => Ok(reply),
        error => Err(io::Error::from_raw_os_error(error as i32)),
    }
}
