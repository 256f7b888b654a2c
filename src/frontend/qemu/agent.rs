//! The host's end of an agent in the guest: one line asked, one line answered.
//!
//! ```text
//! request: ID COMMAND [WORD ...]        reply: ID STATUS OUTPUT
//! ```
//!
//! STATUS is a number, 0 for success. `\\`, `\n`, `\s` (a space) and `\xHH` stand in words and output for what would end a line or a word. A clone's
//! agent has its parent's memory: it may be in the middle of its parent's request, and answer it. So each client's IDs are its own, replies to
//! others are passed over, and a client begins by cancelling (byte 0x18) what was begun of a line. Must not know what an agent can do: `guest/`
//! in the repository has one.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::sys::entropy;

/// The longest line, both ways.
const LONGEST: usize = 65_536;
/// What an agent drops the line so far at, and the end of that.
const CANCEL: &[u8] = b"\x18\n";

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The socket.
    #[error("the agent's socket: {0}")]
    Socket(#[from] io::Error),
    /// Nobody answered. The guest may have no agent, may still boot, or hang.
    #[error("the agent did not answer `{command}` in time")]
    Timeout {
        /// What it was asked.
        command: String,
    },
    /// The agent's reply is no reply.
    #[error("the agent said what is no reply: {0}")]
    Malformed(String),
    /// A request of more than 64 KiB, or with no command.
    #[error("a request of {0} bytes: a line has from 1 to 65,536")]
    Length(usize),
    /// The agent did it, and failed.
    #[error("the agent failed at `{command}`: status {status}: {output}")]
    Status {
        /// What it was asked.
        command: String,
        /// Not 0.
        status: i32,
        /// What it said.
        output: String,
    },
}

/// A connection to the agent of one VM.
///
/// ```
/// use offshoot::frontend::qemu::AgentClient;
/// use std::{io::Write, os::unix::net::UnixStream, time::Duration};
///
/// let (ours, mut theirs) = UnixStream::pair()?;
/// let agent = std::thread::spawn(move || {
///     use std::io::{BufRead, BufReader};
///     let lines = BufReader::new(theirs.try_clone()?).lines().map_while(Result::ok);
///     for line in lines.filter(|line| line.contains(" hostname ")) {
///         let id = line.split(' ').next().unwrap();
///         theirs.write_all(format!("parent-7 0 of another's request\n{id} 0 clone-1\n").as_bytes())?;
///     }
///     std::io::Result::Ok(())
/// });
/// let mut client = AgentClient::over(ours)?;
/// assert_eq!(client.ask(&["hostname", "clone-1"], Duration::from_secs(10))?, "clone-1");
/// drop(client);
/// agent.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AgentClient {
    stream: UnixStream,
    /// What came after the last whole line.
    unread: Vec<u8>,
    /// What all IDs of this client begin with.
    mark: String,
    asked: u64,
}

impl AgentClient {
    /// Connects to this socket, [`QemuVm::agent_socket`](super::QemuVm::agent_socket).
    ///
    /// # Errors
    /// [`AgentError::Socket`].
    pub fn connect(socket: &Path) -> Result<Self, AgentError> {
        Self::over(UnixStream::connect(socket)?)
    }

    /// Over a connection.
    ///
    /// # Errors
    /// [`AgentError::Socket`].
    pub fn over(mut stream: UnixStream) -> Result<Self, AgentError> {
        let mut random = [0; 8];
        entropy::fill_random(&mut random)?;
        stream.write_all(CANCEL)?;
        Ok(Self { stream, unread: Vec::new(), mark: format!("{:016x}", u64::from_ne_bytes(random)), asked: 0 })
    }

    /// Asks this, the command first, and waits for the output. Words may hold any text.
    ///
    /// # Errors
    /// [`AgentError`]. After a timeout the client can be used again: a late reply is passed over.
    pub fn ask(&mut self, words: &[&str], patience: Duration) -> Result<String, AgentError> {
        let end = later(Instant::now(), patience);
        let command = words.join(" ");
        self.asked += 1;
        let id = format!("{}-{}", self.mark, self.asked);
        let mut line = id.clone();
        for word in words {
            line.push(' ');
            escape(word, &mut line);
        }
        line.push('\n');
        if words.is_empty() || line.len() > LONGEST {
            return Err(AgentError::Length(line.len()));
        }
        let late = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AgentError::Timeout { command: command.clone() },
            _ => AgentError::Socket(error),
        };
        self.stream.set_write_timeout(Some(left(end)))?;
        self.stream.write_all(line.as_bytes()).map_err(late)?;
        loop {
            let line = self.line(end).map_err(late)?;
            let Some(reply) = line.strip_prefix(&id).and_then(|reply| reply.strip_prefix(' ')) else { continue };
            let (status, output) = reply.split_once(' ').unwrap_or((reply, ""));
            let status = status.parse::<i32>().map_err(|_| AgentError::Malformed(line.clone()))?;
            let output = unescape(output);
            return if status == 0 { Ok(output) } else { Err(AgentError::Status { command, status, output }) };
        }
    }

    /// The next whole line. What is no text is shown as such; one that is too long is an error.
    fn line(&mut self, end: Instant) -> io::Result<String> {
        loop {
            if let Some(at) = self.unread.iter().position(|&byte| byte == b'\n') {
                let rest = self.unread.split_off(at + 1);
                let line = std::mem::replace(&mut self.unread, rest);
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if self.unread.len() >= LONGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the agent sent a line without an end"));
            }
            if Instant::now() >= end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left(end)))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.unread.extend_from_slice(&piece[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// So much later, or a time that nobody lives to see where the clock cannot express it.
pub(super) fn later(than: Instant, by: Duration) -> Instant {
    than.checked_add(by).unwrap_or(than + Duration::from_secs(1 << 32))
}

/// Until then; the least that a socket takes if that is past.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn escape(word: &str, line: &mut String) {
    for byte in word.bytes() {
        match byte {
            b'\\' => line.push_str("\\\\"),
            b'\n' => line.push_str("\\n"),
            b' ' => line.push_str("\\s"),
            0x21..=0x7e => line.push(char::from(byte)),
            _ => write!(line, "\\x{byte:02x}").expect("text grows"),
        }
    }
}

fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let (byte, taken) = match (bytes[at], bytes.get(at + 1)) {
            (b'\\', Some(b'n')) => (b'\n', 2),
            (b'\\', Some(b's')) => (b' ', 2),
            (b'\\', Some(b'x')) => match text.get(at + 2..at + 4).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => (byte, 4),
                None => (b'x', 2),
            },
            (b'\\', Some(&byte)) => (byte, 2),
            (byte, _) => (byte, 1),
        };
        plain.push(byte);
        at += taken;
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A client and the other end of its connection, which has read the beginning.
    fn pair() -> (AgentClient, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = AgentClient::over(ours).unwrap();
        let mut begun = [0; 2];
        theirs.read_exact(&mut begun).unwrap();
        assert_eq!(begun, CANCEL);
        (client, theirs)
    }

    #[test]
    fn any_text_passes_both_ways() {
        for text in ["", "a b", "two\nlines\\n", "\\x41", "\u{1}ümlaut\t", "ends with \\"] {
            let mut line = String::new();
            escape(text, &mut line);
            assert!(line.bytes().all(|byte| (0x21..=0x7e).contains(&byte)), "{line}");
            assert_eq!(unescape(&line), text);
        }
        assert_eq!(unescape("\\x4"), "x4");
        assert_eq!(unescape("\\xü"), "xü");
    }

    #[test]
    fn replies_to_others_are_passed_over_and_a_status_is_an_error() {
        let (mut client, mut theirs) = pair();
        let first = format!("{}-1", client.mark);
        theirs
            .write_all(format!("half of a line\n1 0 foreign\n{first}0 0 longer id\n{first} 5 no\\sdisk\n").as_bytes())
            .unwrap();
        match client.ask(&["x"], LONG) {
            Err(AgentError::Status { status: 5, output, .. }) => assert_eq!(output, "no disk"),
            other => panic!("{other:?}"),
        }
        theirs.write_all(format!("{}-2 many\n", client.mark).as_bytes()).unwrap();
        assert!(matches!(client.ask(&["x"], LONG), Err(AgentError::Malformed(_))));
    }

    #[test]
    fn a_late_reply_is_passed_over_and_the_next_is_taken() {
        let (mut client, mut theirs) = pair();
        assert!(matches!(client.ask(&["x"], Duration::ZERO), Err(AgentError::Timeout { .. })));
        let replies = format!("{0}-1 0 late\n{0}-2 0 in time\n", client.mark);
        theirs.write_all(replies.as_bytes()).unwrap();
        assert_eq!(client.ask(&["x"], LONG).unwrap(), "in time");
    }

    #[test]
    fn a_patience_without_an_end_is_one() {
        let (mut client, mut theirs) = pair();
        theirs.write_all(format!("{}-1 0 here\n", client.mark).as_bytes()).unwrap();
        assert_eq!(client.ask(&["x"], Duration::MAX).unwrap(), "here");
    }

    #[test]
    fn lines_are_bounded_both_ways() {
        let (mut client, mut theirs) = pair();
        assert!(matches!(client.ask(&[&"x".repeat(LONGEST)], LONG), Err(AgentError::Length(_))));
        assert!(matches!(client.ask(&[], LONG), Err(AgentError::Length(_))));
        let flood = std::thread::spawn(move || {
            let _hung_up_on = theirs.write_all(&vec![b'x'; LONGEST + 4096]);
        });
        assert!(matches!(client.ask(&["x"], LONG), Err(AgentError::Socket(_))));
        drop(client);
        flood.join().unwrap();
    }

    #[test]
    fn an_agent_that_hangs_up_is_an_error_at_once() {
        let (mut client, theirs) = pair();
        drop(theirs);
        assert!(matches!(client.ask(&["x"], LONG), Err(AgentError::Socket(_))));
    }
}
