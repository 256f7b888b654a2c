//! A client of the QEMU Machine Protocol: one command at a time, each with a deadline, and the events that arrive between.
//!
//! Owns the socket and the framing: one JSON object a line, of at most [`LINE`] bytes. What a line says is checked, since a guest
//! that has taken its QEMU over may say anything. Must not know what the commands are for.
//!
//! Of our own rather than the `qapi` crate: that one has a type for each command of one QEMU's schema, where we use a dozen commands of
//! four years of releases, and neither bounds a line nor lets a wait end.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The longest line that is taken. The longest that QEMU 10 has reason to send, its schema, is 0.3 MiB.
const LINE: usize = 4 << 20;
/// Events that nobody has asked for yet; older ones are forgotten.
const EVENTS: usize = 256;

/// What went wrong with a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// QEMU refused it.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's reason.
        description: String,
    },
    /// There was no answer in time. Whether the command was done is unknown.
    #[error("no answer to `{command}` within {patience:?}: raise the deadline if the host is slow")]
    Timeout {
        /// The command, or what was waited for.
        command: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The other end is gone.
    #[error("QEMU has closed its control socket")]
    Closed,
    /// Something that is not QMP.
    #[error("what QEMU says is no QMP: {0}")]
    Malformed(&'static str),
    /// The socket failed.
    #[error("the control socket failed: {0}")]
    Io(#[from] io::Error),
}

/// Something that QEMU said unasked.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Value,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    /// What was read past the last line.
    rest: Vec<u8>,
    events: VecDeque<Event>,
    next: u64,
}

impl Qmp {
    /// Waits for the greeting, and enters command mode. Returns the greeting.
    pub(super) fn greet(stream: UnixStream, patience: Duration) -> Result<(Self, Value), QmpError> {
        let mut qmp = Self { stream, rest: Vec::new(), events: VecDeque::new(), next: 0 };
        let wait = Wait::begin("greeting", patience);
        let mut line = qmp.line(&wait)?;
        let greeting = line.get_mut("QMP").map(Value::take).ok_or(QmpError::Malformed("no greeting"))?;
        qmp.execute("qmp_capabilities", json!({}), patience)?;
        Ok((qmp, greeting))
    }

    /// Sends one command and waits for its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: Value, patience: Duration) -> Result<Value, QmpError> {
        let id = self.next;
        self.next += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let wait = Wait::begin(command, patience);
        self.stream.set_write_timeout(Some(wait.left()?))?;
        self.stream.write_all(line.as_bytes()).map_err(|error| wait.failed(error))?;
        loop {
            let mut answer = self.line(&wait)?;
            // The answer to a command that was given up: nobody waits for it any more.
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                self.note(answer);
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            let description = answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("no reason given");
            return Err(QmpError::Refused { command: command.to_owned(), description: description.to_owned() });
        }
    }

    /// Waits for an event that `wanted` makes something of. Those before it are forgotten.
    pub(super) fn event<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T, QmpError> {
        let wait = Wait::begin(what, patience);
        loop {
            while let Some(event) = self.events.pop_front() {
                if let Some(found) = wanted(&event) {
                    return Ok(found);
                }
            }
            let line = self.line(&wait)?;
            self.note(line);
        }
    }

    /// Forgets the events that have come.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn note(&mut self, mut line: Value) {
        let Some(name) = line.get("event").and_then(Value::as_str).map(str::to_owned) else { return };
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { name, data: line.get_mut("data").map(Value::take).unwrap_or_default() });
    }

    fn line(&mut self, wait: &Wait<'_>) -> Result<Value, QmpError> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.rest[searched..].iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=searched + at).collect();
                return match serde_json::from_slice(&line) {
                    Ok(value @ Value::Object(_)) => Ok(value),
                    _ => Err(QmpError::Malformed("a line is no JSON object")),
                };
            }
            searched = self.rest.len();
            if searched > LINE {
                return Err(QmpError::Malformed("a line is over 4 MiB"));
            }
            self.stream.set_read_timeout(Some(wait.left()?))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(read) => self.rest.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(wait.failed(error)),
            }
        }
    }
}

/// A wait with an end.
struct Wait<'a> {
    what: &'a str,
    patience: Duration,
    until: Option<Instant>,
}

impl<'a> Wait<'a> {
    fn begin(what: &'a str, patience: Duration) -> Self {
        // One that the clock cannot express is no limit.
        Self { what, patience, until: Instant::now().checked_add(patience) }
    }

    /// What is left of it; never zero, which sockets take for no limit.
    fn left(&self) -> Result<Duration, QmpError> {
        let Some(until) = self.until else { return Ok(Duration::from_secs(1 << 30)) };
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(self.over()),
            left => Ok(left),
        }
    }

    fn over(&self) -> QmpError {
        QmpError::Timeout { command: self.what.to_owned(), patience: self.patience }
    }

    fn failed(&self, error: io::Error) -> QmpError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.over(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed,
            _ => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;
    const LONG: Duration = Duration::from_secs(20);

    /// A peer that greets, and answers the n-th line with the n-th of `answers`; `$id` stands for the id of the command.
    fn peer(answers: &'static [&'static str]) -> (UnixStream, thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || {
            let mut theirs = BufReader::new(theirs);
            theirs.get_mut().write_all(format!("{GREETING}\r\n").as_bytes()).unwrap();
            for answer in ["{\"return\": {}, \"id\": $id}"].iter().chain(answers) {
                let mut line = String::new();
                if theirs.read_line(&mut line).unwrap() == 0 {
                    return;
                }
                let id = serde_json::from_str::<Value>(&line).unwrap()["id"].to_string();
                let answer = answer.replace("$id", &id);
                if theirs.get_mut().write_all(format!("{answer}\r\n").as_bytes()).is_err() {
                    return;
                }
            }
            // Stays until the client has had enough, so that silence is silence and no end.
            let mut line = String::new();
            let _end = theirs.read_line(&mut line);
        });
        (ours, peer)
    }

    #[test]
    fn answers_are_told_from_events_and_from_answers_to_others() {
        let (ours, peer) = peer(&[
            "{\"event\": \"STOP\", \"data\": {\"n\": 1}}\n{\"return\": 1, \"id\": 77}\n{\"return\": 2, \"id\": $id}",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": $id}",
        ]);
        let (mut qmp, greeting) = Qmp::greet(ours, LONG).unwrap();
        assert_eq!(greeting["version"]["qemu"]["major"], 7);
        assert_eq!(qmp.execute("query", json!({}), LONG).unwrap(), 2);
        let n = qmp.event("STOP", LONG, |event| (event.name == "STOP").then(|| event.data["n"].as_u64())).unwrap();
        assert_eq!(n, Some(1));
        match qmp.execute("break", json!({}), LONG).unwrap_err() {
            QmpError::Refused { command, description } => {
                assert_eq!((&*command, &*description), ("break", "no such thing"))
            }
            other => panic!("{other}"),
        }
        drop(qmp);
        peer.join().unwrap();
    }

    #[test]
    fn silence_ends_and_so_does_a_closed_socket() {
        let (ours, peer) = peer(&["{\"event\": \"NOISE\"}"]);
        let (mut qmp, _) = Qmp::greet(ours, LONG).unwrap();
        let silent = qmp.execute("stop", json!({}), Duration::from_millis(20)).unwrap_err();
        assert!(matches!(silent, QmpError::Timeout { command, .. } if command == "stop"));
        assert!(matches!(qmp.execute("stop", json!({}), Duration::ZERO), Err(QmpError::Timeout { .. })));
        drop(qmp);
        peer.join().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::greet(ours, LONG), Err(QmpError::Closed)));
    }

    #[test]
    fn what_is_no_qmp_is_refused() {
        for nonsense in ["hello", "[1, 2]", "{\"QMP\"", "{}"] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(format!("{nonsense}\n").as_bytes()).unwrap();
            assert!(matches!(Qmp::greet(ours, LONG), Err(QmpError::Malformed(_))), "{nonsense}");
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let endless = thread::spawn(move || while theirs.write_all(&[b' '; 65536]).is_ok() {});
        assert!(matches!(Qmp::greet(ours, LONG), Err(QmpError::Malformed("a line is over 4 MiB"))));
        endless.join().unwrap();
    }
}
