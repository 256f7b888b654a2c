//! One client on its socket: the thread that reads its requests, and those that execute what may take long.
//!
//! Short reads and writes are executed by the reading thread as they come, and their replies sent together: a hand-over to another
//! thread costs more than a page of memory. Where a disk turns out to be slow, and for everything that may be (flushes, long
//! requests, discards), requests go to workers, and replies come in any order. Memory is reserved before it is allocated.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::execute::execute;
use super::export::Exports;
use super::limits::{Budget, Reservation, ServerLimits};
use super::negotiation::{Agreed, Negotiation, Step, Welcome};
use super::reply::ReplyBuffer;
use super::request::{Command, Durability, Refusal, Request};
use super::session::{gone, most_skipped};
use super::socket::Socket;
use super::wire::{ErrorCode, REQUEST_LEN};
use crate::page::ByteSize;

/// The longest read or write that the reading thread executes itself.
const SHORT: u64 = 64 << 10;
/// What is read from a socket at once: some requests of that length.
const INPUT: usize = 256 << 10;
/// Replies that are gathered before they are sent, while more requests are there.
const GATHERED: usize = 128 << 10;
/// Reply memory that a thread keeps between requests.
const KEEP: usize = 1 << 20;
/// What a block status may take.
const STATUS: ByteSize = ByteSize::kib(128);

/// What all connections of a server share.
#[derive(Debug)]
pub(super) struct Common {
    pub exports: Exports,
    pub limits: ServerLimits,
    pub budget: Budget,
}

/// Serves one client until it leaves, errs, or its socket is shut. `agreed` is told what it has come for.
pub(super) fn serve(common: &Common, socket: &Socket, agreed: impl FnOnce(&Agreed)) -> io::Result<()> {
    socket.write_patience(common.limits.patience)?;
    let mut input = Input::new();
    let mut out = ReplyBuffer::default();
    let negotiation = Negotiation::begin(Welcome::Open, &common.limits, &mut out);
    let deadline = Instant::now() + common.limits.handshake;
    let agreed_on = negotiate(negotiation, &common.exports, socket, deadline, &mut input, &mut out)?;
    let Some(terms) = agreed_on else { return Ok(()) };
    agreed(&terms);
    socket.read_patience(None)?;
    let transmission = Transmission {
        common,
        socket,
        agreed: terms,
        sending: Mutex::new(()),
        queue: Mutex::default(),
        work: Condvar::new(),
        room: Condvar::new(),
    };
    thread::scope(|threads| {
        // Workers end, with what is queued done, whatever ends the reading.
        let _ending = Ending(&transmission);
        transmission.read(threads, &mut input, &mut out)
    })
}

/// Tells a client that there is no room for it, as soon as it asks for anything; it may take so long to.
pub(super) fn turn_away(limits: &ServerLimits, socket: &Socket, patience: Duration) -> io::Result<()> {
    socket.write_patience(patience)?;
    let (mut input, mut out) = (Input::new(), ReplyBuffer::default());
    let negotiation = Negotiation::begin(Welcome::Full, limits, &mut out);
    let deadline = Instant::now() + patience;
    negotiate(negotiation, &Exports::default(), socket, deadline, &mut input, &mut out).map(drop)
}

fn negotiate(
    mut negotiation: Negotiation,
    exports: &Exports,
    socket: &Socket,
    deadline: Instant,
    input: &mut Input,
    out: &mut ReplyBuffer,
) -> io::Result<Option<Box<Agreed>>> {
    loop {
        let step = negotiation.step(input.data(), exports, out);
        if !out.is_empty() && (!matches!(step, Step::Consumed(_)) || out.filled().len() >= GATHERED) {
            socket.write_all(out.filled())?;
            out.clear(KEEP);
        }
        match step {
            Step::Consumed(bytes) => input.consume(bytes),
            Step::Agreed(bytes, agreed) => {
                input.consume(bytes);
                return Ok(Some(agreed));
            }
            Step::Over => return Ok(None),
            Step::Starved => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                socket.read_patience(Some(left))?;
                if !input.fill(socket)? {
                    return Ok(None);
                }
            }
        }
    }
}

/// A request on its way to a worker.
struct Job<'a> {
    request: Request,
    command: Command,
    payload: Vec<u8>,
    _reserved: Reservation<'a>,
}

#[derive(Default)]
struct Queue<'a> {
    jobs: VecDeque<Job<'a>>,
    /// Queued and being executed.
    pending: u64,
    workers: u64,
    idle: u64,
    ending: bool,
}

struct Transmission<'a> {
    common: &'a Common,
    socket: &'a Socket,
    agreed: Box<Agreed>,
    sending: Mutex<()>,
    queue: Mutex<Queue<'a>>,
    work: Condvar,
    room: Condvar,
}

struct Ending<'t, 'a>(&'t Transmission<'a>);

impl Drop for Ending<'_, '_> {
    fn drop(&mut self) {
        self.0.queue.lock().ending = true;
        self.0.work.notify_all();
    }
}

/// A job that is dealt with when this is dropped, even by a panic: the reading thread waits for it.
struct Done<'t, 'a>(&'t Transmission<'a>);

impl Drop for Done<'_, '_> {
    fn drop(&mut self) {
        self.0.queue.lock().pending -= 1;
        self.0.room.notify_one();
    }
}

impl<'a> Transmission<'a> {
    fn read<'scope>(
        &'scope self,
        threads: &'scope Scope<'scope, '_>,
        input: &mut Input,
        out: &mut ReplyBuffer,
    ) -> io::Result<()> {
        let mut pace = Pace::default();
        loop {
            let Some(header) = self.at_least(REQUEST_LEN, input, out)? else { return Ok(()) };
            let header = header.first_chunk().expect("as many as were asked for");
            let Some(request) = Request::parse(header) else { return self.send(out) };
            let payload = request.payload().get();
            match request.check(&self.agreed.terms) {
                Err(refusal) => {
                    input.consume(REQUEST_LEN);
                    if !self.refuse(&request, &refusal, input, out)? {
                        return self.send(out);
                    }
                }
                Ok(Command::Disconnect) => return self.send(out),
                Ok(command) if is_short(command) && pace.is_quick() => {
                    let whole = REQUEST_LEN + payload as usize;
                    let Some(message) = self.at_least(whole, input, out)? else { return Ok(()) };
                    let inside = match self.agreed.export.gate().try_enter() {
                        Some(entered) => entered,
                        None => {
                            // Held for a fork: what has been done is told first.
                            self.send(out)?;
                            self.agreed.export.gate().enter()
                        }
                    };
                    match inside {
                        Ok(_inside) => {
                            let begun = Instant::now();
                            execute(&self.agreed, &request, command, &message[REQUEST_LEN..whole], out);
                            pace.took(begun.elapsed());
                        }
                        Err(_) => out.refused(&request, self.agreed.terms.replies, &gone()),
                    }
                    input.consume(whole);
                }
                Ok(command) => {
                    input.consume(REQUEST_LEN);
                    if !self.hand_over(threads, request, command, input, out)? {
                        return self.send(out);
                    }
                }
            }
            if out.filled().len() >= GATHERED {
                self.send(out)?;
            }
        }
    }

    /// Waits for so many bytes of input, with all replies sent before it waits; `None` where the client has said its last.
    fn at_least<'i>(&self, bytes: usize, input: &'i mut Input, out: &mut ReplyBuffer) -> io::Result<Option<&'i [u8]>> {
        while input.data().len() < bytes {
            self.send(out)?;
            if !input.fill(self.socket)? {
                return Ok(None);
            }
        }
        Ok(Some(input.data()))
    }

    /// Throws away the payload of a refused request, and then says so: clients do not look for the reply to a request that they are still
    /// sending. `false` where there is too much of it, or the client has gone.
    fn refuse(
        &self,
        request: &Request,
        refusal: &Refusal,
        input: &mut Input,
        out: &mut ReplyBuffer,
    ) -> io::Result<bool> {
        let mut payload = request.payload().get();
        let endless = payload > most_skipped(&self.agreed);
        while payload > 0 && !endless {
            let Some(data) = self.at_least(1, input, out)? else { return Ok(false) };
            let now = payload.min(data.len() as u64);
            input.consume(now as usize);
            payload -= now;
        }
        out.refused(request, self.agreed.terms.replies, refusal);
        Ok(!endless)
    }

    /// Receives the payload and gives the request to a worker. `false` where the client has gone.
    fn hand_over<'scope>(
        &'scope self,
        threads: &'scope Scope<'scope, '_>,
        request: Request,
        command: Command,
        input: &mut Input,
        out: &mut ReplyBuffer,
    ) -> io::Result<bool> {
        self.send(out)?;
        let len = request.payload();
        let limits = &self.common.limits;
        let need = match command {
            Command::Read { span, .. } => ByteSize::new(span.byte_len()),
            Command::BlockStatus { .. } => STATUS,
            _ => len,
        };
        {
            let mut queue = self.queue.lock();
            self.room.wait_while(&mut queue, |queue| queue.pending >= limits.requests_per_client);
        }
        let Some(reserved) = self.common.budget.take(need, limits.patience) else {
            let refusal = Refusal::new(ErrorCode::OutOfMemory, "too many bytes in flight on this server");
            return self.refuse(&request, &refusal, input, out);
        };
        let mut payload = vec![0; len.get() as usize];
        let there = payload.len().min(input.data().len());
        payload[..there].copy_from_slice(&input.data()[..there]);
        input.consume(there);
        if there < payload.len() {
            // It holds a reservation meanwhile: it may not take for ever.
            self.socket.read_patience(Some(limits.patience))?;
            let mut rest = &mut payload[there..];
            while !rest.is_empty() {
                match self.socket.read(rest)? {
                    0 => return Ok(false),
                    read => rest = &mut rest[read..],
                }
            }
            self.socket.read_patience(None)?;
        }
        let mut queue = self.queue.lock();
        queue.jobs.push_back(Job { request, command, payload, _reserved: reserved });
        queue.pending += 1;
        if queue.jobs.len() as u64 > queue.idle && queue.workers < limits.workers_per_client {
            let spawned = thread::Builder::new().name("nbd-worker".into()).spawn_scoped(threads, || self.work());
            match spawned {
                Ok(_) => queue.workers += 1,
                // With one worker all goes on, slower.
                Err(error) if queue.workers > 0 => tracing::warn!(%error, "no thread for one more worker"),
                Err(error) => return Err(error),
            }
        }
        drop(queue);
        self.work.notify_one();
        Ok(true)
    }

    fn work(&self) {
        let mut out = ReplyBuffer::default();
        while let Some(job) = self.next_job() {
            let _done = Done(self);
            match self.agreed.export.gate().enter() {
                Ok(_inside) => execute(&self.agreed, &job.request, job.command, &job.payload, &mut out),
                Err(_) => out.refused(&job.request, self.agreed.terms.replies, &gone()),
            }
            if self.send(&mut out).is_err() {
                // The reading thread learns of it from its end of the socket.
                out.clear(KEEP);
            }
        }
    }

    fn next_job(&self) -> Option<Job<'a>> {
        let mut queue = self.queue.lock();
        queue.idle += 1;
        self.work.wait_while(&mut queue, |queue| queue.jobs.is_empty() && !queue.ending);
        queue.idle -= 1;
        queue.jobs.pop_front()
    }

    /// Sends what there is, whole replies, as one piece.
    fn send(&self, out: &mut ReplyBuffer) -> io::Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let sent = {
            let _one = self.sending.lock();
            self.socket.write_all(out.filled())
        };
        out.clear(KEEP);
        if sent.is_err() {
            // Part of a reply may be on the wire: nothing that follows would be understood.
            self.socket.shut(Shutdown::Both);
        }
        sent
    }
}

/// Whether the reading thread may execute it.
fn is_short(command: Command) -> bool {
    match command {
        Command::Read { span, .. } | Command::Write { span, durability: Durability::Written } => {
            span.byte_len() <= SHORT
        }
        _ => false,
    }
}

/// Whether the disk has been answering at the speed of memory.
#[derive(Default)]
struct Pace {
    slow: u32,
    to_workers: u32,
}

impl Pace {
    /// What is longer is worth a hand-over.
    const QUICK: Duration = Duration::from_micros(50);
    /// So many more slow than quick ones, and the next go to workers.
    const TOLERATED: u32 = 4;
    /// How many, until it is tried again.
    const LOT: u32 = 256;

    fn is_quick(&mut self) -> bool {
        if self.to_workers == 0 {
            return true;
        }
        self.to_workers -= 1;
        false
    }

    fn took(&mut self, time: Duration) {
        if time <= Self::QUICK {
            self.slow = self.slow.saturating_sub(1);
            return;
        }
        self.slow += 1;
        if self.slow >= Self::TOLERATED {
            (self.slow, self.to_workers) = (Self::TOLERATED - 1, Self::LOT);
        }
    }
}

/// Bytes that came and were not dealt with yet.
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self { bytes: vec![0; INPUT], start: 0, end: 0 }
    }

    fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads once; `false` at the end of the stream. No message that is kept here whole is as long as the buffer.
    fn fill(&mut self, socket: &Socket) -> io::Result<bool> {
        if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let read = socket.read(&mut self.bytes[self.end..])?;
        self.end += read;
        Ok(read > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_slow_is_left_to_workers_and_tried_again() {
        let mut pace = Pace::default();
        let (quick, slow) = (Duration::from_micros(2), Duration::from_millis(1));
        for _ in 0..100 {
            assert!(pace.is_quick());
            pace.took(slow);
            assert!(pace.is_quick());
            pace.took(quick);
        }
        for _ in 0..Pace::TOLERATED {
            assert!(pace.is_quick());
            pace.took(slow);
        }
        assert_eq!((0..Pace::LOT).filter(|_| pace.is_quick()).count(), 0);
        assert!(pace.is_quick());
        pace.took(slow);
        assert!(!pace.is_quick(), "one slow request more, and it is known again");
    }
}
