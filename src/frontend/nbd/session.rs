//! One client without its socket: bytes in, bytes out. For transports of one's own, and for tests and fuzzing.
//!
//! Executes one request at a time, in order. The server's connections use the same negotiation, requests and execution, with threads.

use super::execute::execute;
use super::export::Exports;
use super::limits::ServerLimits;
use super::negotiation::{Agreed, Negotiation, Step, Welcome};
use super::reply::ReplyBuffer;
use super::request::{Command, Refusal, Request};
use super::wire::{ErrorCode, REQUEST_LEN};

/// Reply memory that is kept between messages.
const KEEP: usize = 1 << 20;

/// What [`Session::step`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionStep {
    /// One message, or a part of one. There may be more: step again.
    Progress,
    /// Nothing: more input is needed.
    Starved,
    /// What is in the output is the last of it: send it, and close.
    Over,
}

/// A client's whole conversation with the exports, free of any transport.
///
/// ```
/// use offshoot::frontend::nbd::{Exports, ServerLimits, Session, SessionStep};
/// let mut session = Session::new(Exports::default(), &ServerLimits::default());
/// assert_eq!(&session.output()[..8], b"NBDMAGIC");
/// session.clear_output();
/// session.feed(&[0, 0, 0, 3]); // the client's flags
/// assert_eq!(session.step(), SessionStep::Progress);
/// assert_eq!(session.step(), SessionStep::Starved);
/// ```
#[derive(Debug)]
pub struct Session {
    exports: Exports,
    stage: Stage,
    input: Vec<u8>,
    taken: usize,
    out: ReplyBuffer,
}

#[derive(Debug)]
enum Stage {
    Negotiating(Negotiation),
    Transmitting(Box<Agreed>),
    /// The payload of a request that was refused is thrown away.
    Skipping(u64, Refused, Box<Agreed>),
    Over,
}

/// A request, and why it was refused: told once its payload is through, since clients do not look for the reply to a request that they are
/// still sending.
type Refused = Box<(Request, Refusal)>;

impl Session {
    /// A client that has just come. Its greeting is in the output.
    pub fn new(exports: Exports, limits: &ServerLimits) -> Self {
        let mut out = ReplyBuffer::default();
        let stage = Stage::Negotiating(Negotiation::begin(Welcome::Open, limits, &mut out));
        Self { exports, stage, input: Vec::new(), taken: 0, out }
    }

    /// Takes in what the client sent. Held until [`Session::step`] has dealt with it: feed no more while it makes progress.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.taken);
        self.taken = 0;
        self.input.extend_from_slice(bytes);
    }

    /// What is to be sent to the client.
    pub fn output(&self) -> &[u8] {
        self.out.filled()
    }

    /// Forgets the output, once it was sent.
    pub fn clear_output(&mut self) {
        self.out.clear(KEEP);
    }

    /// Deals with one message at most, and appends what it has to say to the output: at most the longest request allowed, and some. Waits
    /// while the export is drained.
    pub fn step(&mut self) -> SessionStep {
        let input = &self.input[self.taken..];
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Over => SessionStep::Over,
            Stage::Negotiating(mut negotiation) => match negotiation.step(input, &self.exports, &mut self.out) {
                Step::Starved => self.stay(Stage::Negotiating(negotiation), SessionStep::Starved),
                Step::Consumed(bytes) => self.go_on(bytes, Stage::Negotiating(negotiation)),
                Step::Agreed(bytes, agreed) => self.go_on(bytes, Stage::Transmitting(agreed)),
                Step::Over => SessionStep::Over,
            },
            Stage::Skipping(0, refused, agreed) => {
                self.out.refused(&refused.0, agreed.terms.replies, &refused.1);
                self.stay(Stage::Transmitting(agreed), SessionStep::Progress)
            }
            Stage::Skipping(left, refused, agreed) => match left.min(input.len() as u64) {
                0 => self.stay(Stage::Skipping(left, refused, agreed), SessionStep::Starved),
                now => self.go_on(now as usize, Stage::Skipping(left - now, refused, agreed)),
            },
            Stage::Transmitting(agreed) => self.transmit(agreed),
        }
    }

    fn stay(&mut self, stage: Stage, step: SessionStep) -> SessionStep {
        self.stage = stage;
        step
    }

    fn go_on(&mut self, bytes: usize, stage: Stage) -> SessionStep {
        self.taken += bytes;
        self.stay(stage, SessionStep::Progress)
    }

    fn transmit(&mut self, agreed: Box<Agreed>) -> SessionStep {
        let input = &self.input[self.taken..];
        let Some((header, rest)) = input.split_first_chunk() else {
            return self.stay(Stage::Transmitting(agreed), SessionStep::Starved);
        };
        let Some(request) = Request::parse(header) else { return SessionStep::Over };
        let payload = request.payload().get();
        let refusal = match request.check(&agreed.terms) {
            Ok(Command::Disconnect) => return SessionStep::Over,
            Ok(command) => {
                let Some(payload) = rest.get(..payload as usize) else {
                    return self.stay(Stage::Transmitting(agreed), SessionStep::Starved);
                };
                let executed = agreed.export.gate().enter().map(|_inside| {
                    execute(&agreed, &request, command, payload, &mut self.out);
                    REQUEST_LEN + payload.len()
                });
                match executed {
                    Ok(bytes) => return self.go_on(bytes, Stage::Transmitting(agreed)),
                    Err(_) => gone(),
                }
            }
            Err(refusal) => refusal,
        };
        if payload > most_skipped(&agreed) {
            self.out.refused(&request, agreed.terms.replies, &refusal);
            return SessionStep::Over;
        }
        self.go_on(REQUEST_LEN, Stage::Skipping(payload, Box::new((request, refusal)), agreed))
    }
}

/// The longest payload of a refused request that is read and thrown away. Who sends more is not going to do better.
pub(super) fn most_skipped(agreed: &Agreed) -> u64 {
    agreed.terms.longest.get().saturating_mul(2)
}

pub(super) fn gone() -> Refusal {
    Refusal::new(ErrorCode::Shutdown, "this export is going away")
}
