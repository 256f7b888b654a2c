//! The negotiation, fixed newstyle: options in, answers out, until an export is agreed on. Pure: knows bytes and exports, no sockets.
//!
//! A client that errs gets an error and may go on; one that breaks the framing is hung up on.

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::context::Contexts;
use super::export::{Export, ExportName, Exports};
use super::limits::ServerLimits;
use super::reply::ReplyBuffer;
use super::request::{Replies, Terms};
use super::wire::{
    self, Greeting, InfoBlockSize, InfoExport, OptionHeader, OptionReply, answer, handshake, info, option,
};
use crate::disk::Access;
use crate::page::{ByteSize, SECTOR_SIZE};

/// The longest data of an option that is looked at; longer ones are skipped with an error.
const MAX_OPTION: u32 = 64 << 10;
/// The longest data of an option that is even skipped.
const MAX_SKIPPED: u32 = 32 << 20;
/// Options of one client. Nobody needs a tenth.
const MAX_OPTIONS: u32 = 1024;
/// What clients are told to prefer: a page.
const PREFERRED: u32 = 4096;
const HEADER: usize = size_of::<OptionHeader>();

/// What transmission goes by.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub export: Arc<Export>,
    pub terms: Terms,
}

/// What came of some input.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing can be said before more has come.
    Starved,
    /// So many bytes were dealt with.
    Consumed(usize),
    /// So many bytes were dealt with, and what follows are requests.
    Agreed(usize, Box<Agreed>),
    /// What was appended is to be sent, and then the connection closed.
    Over,
}

/// Whether a client may agree on anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Welcome {
    Open,
    /// There are as many clients as the server takes: this one is told so, whatever it asks.
    Full,
}

/// How far a client has come.
#[derive(Debug)]
pub(super) struct Negotiation {
    welcome: Welcome,
    longest: ByteSize,
    flags: Option<u32>,
    replies: Replies,
    /// Contexts are selected for an export by name.
    contexts: (Vec<u8>, Contexts),
    options: u32,
    /// Data of an option that was too long, still to come.
    skip: usize,
}

/// Why an option is answered with an error.
struct Answer(u32, &'static str);

const MALFORMED: Answer = Answer(answer::ERR_INVALID, "the option's data is malformed");
const FULL: Answer = Answer(answer::ERR_POLICY, "this server has as many clients as it takes: try again later");
const UNKNOWN_EXPORT: Answer = Answer(answer::ERR_UNKNOWN, "there is no export of this name");

impl Negotiation {
    /// Greets.
    pub(super) fn begin(welcome: Welcome, limits: &ServerLimits, out: &mut ReplyBuffer) -> Self {
        let greeting = Greeting {
            magic: wire::NBD_MAGIC.into(),
            option_magic: wire::OPTION_MAGIC.into(),
            flags: (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).into(),
        };
        out.append(greeting.as_bytes());
        let contexts = (Vec::new(), Contexts::default());
        let replies = Replies::Simple;
        Self { welcome, longest: limits.request, flags: None, replies, contexts, options: 0, skip: 0 }
    }

    /// Deals with one message, or a part of one that is skipped, at the start of `input`.
    pub(super) fn step(&mut self, input: &[u8], exports: &Exports, out: &mut ReplyBuffer) -> Step {
        if self.skip > 0 {
            let skipped = self.skip.min(input.len());
            self.skip -= skipped;
            return if skipped == 0 { Step::Starved } else { Step::Consumed(skipped) };
        }
        if self.flags.is_none() {
            let Some(flags) = input.first_chunk() else { return Step::Starved };
            let flags = u32::from_be_bytes(*flags);
            self.flags = Some(flags);
            let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
            return if flags & !known == 0 { Step::Consumed(4) } else { Step::Over };
        }
        let Ok((header, rest)) = OptionHeader::ref_from_prefix(input) else { return Step::Starved };
        let (kind, len) = (header.option.get(), header.len.get());
        if header.magic.get() != wire::OPTION_MAGIC || len > MAX_SKIPPED || self.options == MAX_OPTIONS {
            return Step::Over;
        }
        if len > MAX_OPTION {
            if kind == option::EXPORT_NAME {
                return Step::Over;
            }
            self.options += 1;
            self.skip = len as usize;
            error(kind, &Answer(answer::ERR_TOO_BIG, "more data than any option needs"), out);
            return Step::Consumed(HEADER);
        }
        let Some(data) = rest.get(..len as usize) else { return Step::Starved };
        self.options += 1;
        self.option(kind, data, HEADER + data.len(), exports, out)
    }

    fn option(&mut self, kind: u32, data: &[u8], taken: usize, exports: &Exports, out: &mut ReplyBuffer) -> Step {
        let closing = exports.is_closing();
        let outcome = match kind {
            option::ABORT => {
                reply(kind, answer::ACK, &[], out);
                return Step::Over;
            }
            option::EXPORT_NAME => {
                let open = !closing && self.welcome == Welcome::Open;
                let Some(export) = find(exports, data).filter(|_| open) else { return Step::Over };
                let agreed = self.agree(export, data);
                let size = agreed.export.capacity().get() * SECTOR_SIZE;
                let flags = offered(&agreed);
                out.append(wire::ExportReply { size: size.into(), flags: flags.into() }.as_bytes());
                if self.flags.is_none_or(|flags| flags & u32::from(handshake::NO_ZEROES) == 0) {
                    out.room(124).fill(0);
                }
                return Step::Agreed(taken, Box::new(agreed));
            }
            _ if self.welcome == Welcome::Full => Err(FULL),
            _ if closing => Err(Answer(answer::ERR_SHUTDOWN, "the server is shutting down")),
            option::LIST => list(data, exports, out),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.replies = Replies::Structured;
                Ok(())
            }
            option::STRUCTURED_REPLY => Err(MALFORMED),
            option::INFO | option::GO => match self.info(kind, data, exports, out) {
                Ok(agreed) if kind == option::GO => {
                    reply(kind, answer::ACK, &[], out);
                    return Step::Agreed(taken, Box::new(agreed));
                }
                told => told.map(|_| ()),
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_contexts(kind, data, exports, out),
            _ => Err(Answer(answer::ERR_UNSUP, "this option is not known here")),
        };
        match outcome {
            Ok(()) => reply(kind, answer::ACK, &[], out),
            Err(refused) => error(kind, &refused, out),
        }
        Step::Consumed(taken)
    }

    fn agree(&self, export: Arc<Export>, name: &[u8]) -> Agreed {
        let contexts = if self.contexts.0 == name { self.contexts.1 } else { Contexts::default() };
        let terms = Terms {
            capacity: export.capacity(),
            access: export.access(),
            replies: self.replies,
            contexts,
            longest: self.longest,
        };
        Agreed { export, terms }
    }

    /// INFO and GO: what there is to know of an export.
    fn info(&self, kind: u32, data: &[u8], exports: &Exports, out: &mut ReplyBuffer) -> Result<Agreed, Answer> {
        let mut data = Fields(data);
        let name = data.counted().ok_or(MALFORMED)?;
        let asked = data.u16().ok_or(MALFORMED)?;
        let asked = (0..asked).map(|_| data.u16()).collect::<Option<Vec<_>>>().ok_or(MALFORMED)?;
        if !data.0.is_empty() {
            return Err(MALFORMED);
        }
        let export = find(exports, name).ok_or(UNKNOWN_EXPORT)?;
        let agreed = self.agree(export, name);
        let size = agreed.export.capacity().get() * SECTOR_SIZE;
        let export = InfoExport { kind: info::EXPORT.into(), size: size.into(), flags: offered(&agreed).into() };
        reply(kind, answer::INFO, &[export.as_bytes()], out);
        let sizes = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: (SECTOR_SIZE as u32).into(),
            preferred: PREFERRED.into(),
            maximum: (self.longest.get() as u32).into(),
        };
        reply(kind, answer::INFO, &[sizes.as_bytes()], out);
        if asked.contains(&info::NAME) {
            reply(kind, answer::INFO, &[&info::NAME.to_be_bytes(), name], out);
        }
        if asked.contains(&info::DESCRIPTION) && !agreed.export.description().is_empty() {
            let words = agreed.export.description().as_bytes();
            reply(kind, answer::INFO, &[&info::DESCRIPTION.to_be_bytes(), words], out);
        }
        Ok(agreed)
    }

    fn meta_contexts(
        &mut self,
        kind: u32,
        data: &[u8],
        exports: &Exports,
        out: &mut ReplyBuffer,
    ) -> Result<(), Answer> {
        let sets = kind == option::SET_META_CONTEXT;
        if sets {
            // Whatever was selected before is not any more, even if this fails.
            self.contexts = (Vec::new(), Contexts::default());
        }
        if self.replies != Replies::Structured {
            return Err(Answer(answer::ERR_INVALID, "metadata contexts need structured replies: ask for those first"));
        }
        let mut data = Fields(data);
        let name = data.counted().ok_or(MALFORMED)?;
        let queries = data.u32().ok_or(MALFORMED)?;
        let mut contexts = if queries == 0 && !sets { Contexts::ALL } else { Contexts::default() };
        for _ in 0..queries {
            let query = data.counted().ok_or(MALFORMED)?;
            contexts = if sets { contexts.selected(query) } else { contexts.found(query) };
        }
        if !data.0.is_empty() {
            return Err(MALFORMED);
        }
        find(exports, name).ok_or(UNKNOWN_EXPORT)?;
        for context in contexts.iter() {
            let id = if sets { context.id() } else { 0 };
            reply(kind, answer::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()], out);
        }
        if sets {
            self.contexts = (name.to_vec(), contexts);
        }
        Ok(())
    }
}

fn list(data: &[u8], exports: &Exports, out: &mut ReplyBuffer) -> Result<(), Answer> {
    if !data.is_empty() {
        return Err(MALFORMED);
    }
    exports.visit(|name, export| {
        let len = name.len() as u32;
        let parts = [&len.to_be_bytes()[..], name.as_bytes(), export.description().as_bytes()];
        reply(option::LIST, answer::SERVER, &parts, out);
    });
    Ok(())
}

fn find(exports: &Exports, name: &[u8]) -> Option<Arc<Export>> {
    if name.len() > ExportName::MAX_LEN {
        return None;
    }
    exports.get(std::str::from_utf8(name).ok()?)
}

/// The transmission flags of an export, to this client.
fn offered(agreed: &Agreed) -> u16 {
    use wire::transmission as offer;
    // Flush and FUA reach the one disk behind all connections, so they cover what came through any of them.
    let always = offer::HAS_FLAGS | offer::SEND_FLUSH | offer::SEND_FUA | offer::CAN_MULTI_CONN | offer::SEND_CACHE;
    let writing = match agreed.terms.access {
        Access::ReadWrite => offer::SEND_TRIM | offer::SEND_WRITE_ZEROES | offer::SEND_FAST_ZERO,
        Access::ReadOnly => offer::READ_ONLY,
    };
    let whole = if agreed.terms.replies == Replies::Structured { offer::SEND_DF } else { 0 };
    always | writing | whole
}

fn reply(option: u32, kind: u32, parts: &[&[u8]], out: &mut ReplyBuffer) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let header = OptionReply {
        magic: wire::OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        len: (len as u32).into(),
    };
    out.append(header.as_bytes());
    parts.iter().for_each(|part| out.append(part));
}

fn error(option: u32, Answer(kind, why): &Answer, out: &mut ReplyBuffer) {
    reply(option, *kind, &[why.as_bytes()], out);
}

/// Data of an option, from its front; `None` where it is too short.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(*self.take(2)?.first_chunk()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.take(4)?.first_chunk()?))
    }

    /// Bytes with their count before them.
    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(len as usize)
    }
}
