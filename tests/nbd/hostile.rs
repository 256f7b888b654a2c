//! Clients that mean harm, or are broken: they hurt nobody but themselves.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use offshoot::frontend::nbd::{BASE_ALLOCATION, Export, ExportName, Exports, ServerLimits, Session, SessionStep};
use offshoot::page::ByteSize;
use offshoot::testing::Dice;

use super::client::*;
use super::{Served, blank, until};

/// A whole conversation as a client would send it.
fn conversation() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(OPT_STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(OPT_LIST, &[]));
    bytes.extend(option_bytes(77, &[1, 2, 3]));
    bytes.extend(option_bytes(OPT_SET_META_CONTEXT, &context_request("d", &[BASE_ALLOCATION])));
    bytes.extend(option_bytes(OPT_GO, &info_request("d", &[1, 3])));
    for (kind, offset, len, payload) in [
        (WRITE, 4096, 1024, 1024),
        (READ, 4096, 512, 0),
        (WRITE, 1 << 40, 512, 512),
        (BLOCK_STATUS, 0, 8192, 0),
        (99, 0, 0, 0),
        (TRIM, 0, 8192, 0),
        (WRITE_ZEROES, 512, 512, 0),
        (FLUSH, 0, 0, 0),
        (READ, 0, 8192, 0),
        (DISC, 0, 0, 0),
    ] {
        bytes.extend(request_bytes(0, kind, bytes.len() as u64, offset, len));
        bytes.extend(vec![5; payload]);
    }
    bytes
}

fn exports() -> Exports {
    let exports = Exports::default();
    exports.add(ExportName::new("d").unwrap(), Export::new(blank(64))).unwrap();
    exports
}

/// All that a session says to these pieces, and whether it ended.
fn talk<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, bool) {
    let mut session = Session::new(exports(), &ServerLimits::default());
    let mut said = Vec::new();
    for piece in pieces {
        session.feed(piece);
        loop {
            let step = session.step();
            said.extend_from_slice(session.output());
            session.clear_output();
            match step {
                SessionStep::Progress => {}
                SessionStep::Starved => break,
                SessionStep::Over => return (said, true),
            }
        }
    }
    (said, false)
}

#[test]
fn how_bytes_are_cut_into_packets_changes_nothing() {
    let bytes = conversation();
    let (whole, over) = talk([&bytes[..]].into_iter());
    assert!(over && whole.len() > 8192, "a read of 8 KiB is in it");
    for size in [1, 2, 3, 7, 27, 28, 29, 100, 1000] {
        assert!(talk(bytes.chunks(size)) == (whole.clone(), true), "in pieces of {size}");
    }
    // Cut short, it says a beginning of the same.
    for end in 0..bytes.len() {
        let (said, over) = talk([&bytes[..end]].into_iter());
        assert!(!over && whole.starts_with(&said), "cut at {end}");
    }
}

#[test]
fn a_flipped_bit_anywhere_is_no_panic() {
    let bytes = conversation();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        talk([&flipped[..]].into_iter());
    }
}

#[test]
fn leaving_at_any_byte_hurts_nobody() {
    let served = Served::with(&[("d", blank(64))]);
    let bytes = conversation();
    for end in (0..bytes.len()).step_by(13) {
        let mut client = Client::greet(Stream::Unix(UnixStream::connect(&served.path).unwrap()), 3).unwrap();
        client.send(&bytes[4..end.max(4)]).unwrap();
        drop(client);
    }
    let mut client = served.open("d");
    client.write(0, &[1; 512]).unwrap();
    client.disconnect().unwrap();
    until("all have left", || served.server.clients() == 0);
}

#[test]
fn garbage_is_answered_or_hung_up_on() {
    let served = Served::with(&[("d", blank(64))]);
    let mut dice = Dice::new(99);
    for _ in 0..60 {
        let mut client = served.open("d");
        let garbage: Vec<u8> = (0..1 + dice.below(5000)).map(|_| dice.below(256) as u8).collect();
        // It may have been hung up on by the first bytes.
        let _sent = client.send(&garbage);
        let _ended = client.finish_sending();
        while client.reply().is_ok() {}
    }
    served.open("d").read(0, 512).unwrap();
}

#[test]
fn who_has_said_all_still_gets_all_replies() {
    let served = Served::with(&[("d", blank(1 << 14))]);
    let mut client = served.open("d");
    for at in 0..24u64 {
        let len = if at % 2 == 0 { 512 } else { 128 << 10 };
        client.request(0, if at % 4 < 2 { READ } else { FLUSH }, 0, if at % 4 < 2 { len } else { 0 }, &[]).unwrap();
    }
    client.finish_sending().unwrap();
    for _ in 0..24 {
        assert_eq!(client.reply().unwrap().error, 0);
    }
    assert_eq!(client.receive(1).unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn a_client_that_never_reads_is_hung_up_on_and_holds_up_nobody() {
    let limits = ServerLimits { patience: Duration::from_millis(100), ..ServerLimits::default() };
    let served = Served::start(limits);
    served.add("d", &blank(1 << 16));
    for len in [4096, 1 << 20] {
        let mut deaf = served.open("d");
        deaf.write(0, &[1; 4096]).unwrap();
        // More than any socket holds; sent until nobody takes it any more.
        let sending = std::thread::spawn(move || while deaf.request(0, READ, 0, len, &[]).is_ok() {});
        let mut other = served.open("d");
        for round in 0..50 {
            other.write(8192, &[round; 4096]).unwrap();
            assert_eq!(other.read(8192, 4096).unwrap(), [round; 4096]);
        }
        other.disconnect().unwrap();
        sending.join().unwrap();
        until("it is gone", || served.server.clients() == 0);
    }
}

#[test]
fn a_payload_that_never_comes_is_not_waited_for() {
    let limits = ServerLimits { patience: Duration::from_millis(50), ..ServerLimits::default() };
    let served = Served::start(limits);
    served.add("d", &blank(1 << 16));
    let mut client = served.open("d");
    client.request(0, WRITE, 0, 1 << 20, &[1; 1000]).unwrap();
    assert!(client.is_over());
    assert_eq!(served.open("d").read(0, 1024).unwrap(), [0; 1024], "half a payload is no write");
}

#[test]
fn a_session_keeps_to_its_limits() {
    let limits = ServerLimits { request: ByteSize::kib(64), ..ServerLimits::default() };
    let mut session = Session::new(exports(), &limits);
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(OPT_GO, &info_request("d", &[])));
    bytes.extend(request_bytes(0, WRITE, 1, 0, (128 << 10) + 1));
    session.feed(&bytes);
    while session.step() == SessionStep::Progress {}
    assert_eq!(session.step(), SessionStep::Over, "too long even to be thrown away");
    assert!(session.output().ends_with(&1u64.to_be_bytes()), "with an error");
}
