//! Options: the good, the malformed and the unknown.

use std::os::unix::net::UnixStream;

use offshoot::disk::Access;
use offshoot::frontend::nbd::{BASE_ALLOCATION, DIRTY_BITMAP, Export, ExportName, ServerLimits};

use super::client::*;
use super::{Served, blank};

fn served() -> Served {
    let served = Served::with(&[("a", blank(16)), ("b", blank(33))]);
    let described = Export::new(blank(8)).read_only().described("for \"people\"").unwrap();
    served.server.add(ExportName::new("c").unwrap(), described).unwrap();
    served
}

/// What a client gets on the only answer to an option.
fn only(client: &mut Client, option: u32, data: &[u8]) -> u32 {
    let answers = client.option(option, data).unwrap();
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers[0].0
}

#[test]
fn lists_all_exports_with_their_words() {
    let served = served();
    let mut client = Client::connect(&served.path).unwrap();
    let answers = client.option(OPT_LIST, &[]).unwrap();
    let entry = |name: &str, words: &str| (REP_SERVER, [counted(name), words.as_bytes().to_vec()].concat());
    let want = [entry("a", ""), entry("b", ""), entry("c", "for \"people\""), (REP_ACK, vec![])];
    assert_eq!(answers, want);
    assert_eq!(only(&mut client, OPT_LIST, b"?"), REP_ERR_INVALID);
    served.add("new", &blank(1));
    assert_eq!(client.option(OPT_LIST, &[]).unwrap().len(), 5, "exports come while clients are there");
}

#[test]
fn tells_of_an_export_what_was_asked() {
    let served = served();
    let mut client = Client::connect(&served.path).unwrap();
    let told = client.option(OPT_INFO, &info_request("c", &[1, 2, 3, 9])).unwrap();
    let kinds: Vec<_> = told.iter().filter(|told| told.0 == REP_INFO).map(|told| told.1[1]).collect();
    assert_eq!(kinds, [0, 3, 1, 2], "size, block sizes, name, description");
    assert_eq!(&told[0].1[2..10], &4096u64.to_be_bytes());
    // Flags: read-only, flush, FUA, several connections, cache; no trim, no zeroes, and no DF without structured replies.
    assert_eq!(&told[0].1[10..], &0x050fu16.to_be_bytes());
    assert_eq!(told[1].1[2..], [512u32.to_be_bytes(), 4096u32.to_be_bytes(), (32u32 << 20).to_be_bytes()].concat());
    assert_eq!((&told[2].1[2..], &told[3].1[2..]), (&b"c"[..], &b"for \"people\""[..]));

    // INFO agrees on nothing, and an unknown export is no end.
    assert_eq!(only(&mut client, OPT_INFO, &info_request("nobody", &[])), REP_ERR_UNKNOWN);
    assert_eq!(only(&mut client, OPT_GO, &info_request("nobody", &[])), REP_ERR_UNKNOWN);
    assert_eq!(only(&mut client, OPT_GO, &info_request("", &[])), REP_ERR_UNKNOWN);
    assert_eq!(only(&mut client, OPT_GO, &info_request(&"x".repeat(5000), &[])), REP_ERR_UNKNOWN);
    client.structure().unwrap();
    client.go("b").unwrap();
    assert_eq!((client.size, client.block_sizes), (33 * 512, Some((512, 4096, 32 << 20))));
    assert_eq!(client.flags, 0x0ded, "with DF, trim, zeroes and fast zeroes");
    assert_eq!(client.read(32 * 512, 512).unwrap(), [0; 512]);
    client.disconnect().unwrap();
}

#[test]
fn export_name_goes_on_at_once() {
    let served = served();
    for (flags, zeroes) in [(3, 0), (1, 124), (0, 124)] {
        let stream = UnixStream::connect(&served.path).unwrap();
        let mut client = Client::greet(Stream::Unix(stream), flags).unwrap();
        client.send(&option_bytes(OPT_EXPORT_NAME, b"b")).unwrap();
        let told = client.receive(10 + zeroes).unwrap();
        assert_eq!(told[..8], (33u64 * 512).to_be_bytes());
        assert!(told[10..].iter().all(|byte| *byte == 0));
        client.write(512, &[5; 512]).unwrap();
        assert_eq!(client.read(512, 512).unwrap(), [5; 512]);
        client.disconnect().unwrap();
    }
    let mut client = Client::connect(&served.path).unwrap();
    client.send(&option_bytes(OPT_EXPORT_NAME, b"nobody")).unwrap();
    assert!(client.is_over(), "there is no error to answer with");
}

#[test]
fn unknown_and_malformed_options_are_errors_that_one_can_go_on_from() {
    let served = served();
    let mut client = Client::connect(&served.path).unwrap();
    for (option, data, want) in [
        (OPT_STARTTLS, vec![], REP_ERR_UNSUP),
        (4, vec![], REP_ERR_UNSUP),
        (11, vec![], REP_ERR_UNSUP),
        (u32::MAX, vec![1, 2, 3], REP_ERR_UNSUP),
        (OPT_STRUCTURED_REPLY, vec![0], REP_ERR_INVALID),
        (OPT_LIST_META_CONTEXT, context_request("a", &[]), REP_ERR_INVALID),
        (OPT_SET_META_CONTEXT, context_request("a", &[BASE_ALLOCATION]), REP_ERR_INVALID),
        (OPT_GO, vec![], REP_ERR_INVALID),
        (OPT_GO, counted("a"), REP_ERR_INVALID),
        (OPT_GO, [&u32::MAX.to_be_bytes()[..], b"a", &[0, 0]].concat(), REP_ERR_INVALID),
        (OPT_GO, [counted("a"), vec![0, 2, 0, 1]].concat(), REP_ERR_INVALID),
        (OPT_GO, [info_request("a", &[1]), vec![0]].concat(), REP_ERR_INVALID),
        (OPT_INFO, [counted("a"), vec![0]].concat(), REP_ERR_INVALID),
        (OPT_GO, [2u32.to_be_bytes().to_vec(), vec![0xff, 0xfe, 0, 0]].concat(), REP_ERR_UNKNOWN),
        (OPT_LIST, vec![0; 1 << 20], REP_ERR_TOO_BIG),
        (99, vec![0; (64 << 10) + 1], REP_ERR_TOO_BIG),
    ] {
        assert_eq!(only(&mut client, option, &data), want, "option {option}, {} bytes", data.len());
    }
    client.structure().unwrap();
    let whole = context_request("a", &[BASE_ALLOCATION, DIRTY_BITMAP]);
    for cut in 0..whole.len() {
        assert_eq!(only(&mut client, OPT_SET_META_CONTEXT, &whole[..cut]), REP_ERR_INVALID, "cut at {cut}");
    }
    let more = [whole, vec![0]].concat();
    assert_eq!(only(&mut client, OPT_LIST_META_CONTEXT, &more), REP_ERR_INVALID);
    let billions = [counted("a"), u32::MAX.to_be_bytes().to_vec()].concat();
    assert_eq!(only(&mut client, OPT_SET_META_CONTEXT, &billions), REP_ERR_INVALID);
    assert_eq!(only(&mut client, OPT_SET_META_CONTEXT, &context_request("nobody", &[])), REP_ERR_UNKNOWN);
    client.go("a").unwrap();
}

#[test]
fn abort_is_acknowledged_and_the_end() {
    let served = served();
    let mut client = Client::connect(&served.path).unwrap();
    assert_eq!(only(&mut client, OPT_ABORT, &[]), REP_ACK);
    assert!(client.is_over());
}

#[test]
fn broken_framing_is_hung_up_on() {
    let served = served();
    let greet = |flags| Client::greet(Stream::Unix(UnixStream::connect(&served.path).unwrap()), flags).unwrap();
    for flags in [4, 0x8000_0003, u32::MAX] {
        assert!(greet(flags).is_over(), "flags {flags:#x}");
    }
    let mut client = greet(3);
    client.send(b"IHAVENOPT0000000").unwrap();
    assert!(client.is_over());
    let mut client = greet(3);
    client.send(&[&b"IHAVEOPT"[..], &[0, 0, 0, 99], &u32::MAX.to_be_bytes()].concat()).unwrap();
    assert!(client.is_over(), "4 GiB of an option are not even skipped");
    // More options than anybody needs.
    let mut client = greet(3);
    let mut asked = 0;
    while client.option(99, &[]).is_ok() {
        asked += 1;
        assert!(asked < 5000, "a client may negotiate for ever");
    }
}

#[test]
fn contexts_are_listed_selected_and_bound_to_their_export() {
    let served = served();
    let mut client = Client::connect(&served.path).unwrap();
    client.structure().unwrap();
    let names = |answers: Vec<(u32, Vec<u8>)>| -> Vec<(u32, String)> {
        let told = answers.into_iter().filter(|answer| answer.0 == REP_META_CONTEXT);
        told.map(|(_, data)| {
            (u32::from_be_bytes(*data.first_chunk().unwrap()), String::from_utf8(data[4..].into()).unwrap())
        })
        .collect()
    };
    let mut ask = |option, queries: &[&str]| names(client.option(option, &context_request("a", queries)).unwrap());
    let (base, dirty) = (BASE_ALLOCATION.to_string(), DIRTY_BITMAP.to_string());
    assert_eq!(ask(OPT_LIST_META_CONTEXT, &[]), [(0, base.clone()), (0, dirty.clone())]);
    assert_eq!(ask(OPT_LIST_META_CONTEXT, &["qemu:", "x-other:y"]), [(0, dirty.clone())]);
    assert_eq!(ask(OPT_SET_META_CONTEXT, &[]), []);
    assert_eq!(ask(OPT_SET_META_CONTEXT, &["x-other:y"]), []);
    let set = ask(OPT_SET_META_CONTEXT, &[DIRTY_BITMAP, BASE_ALLOCATION]);
    assert_eq!(set.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>(), [base, dirty]);
    assert_ne!(set[0].0, set[1].0);
    client.go("b").unwrap();
    let reply = client.call(0, BLOCK_STATUS, 0, 512, &[]).unwrap();
    assert_eq!(reply.error, EINVAL, "selected for another export");

    // A later selection replaces an earlier one, even if it fails.
    let mut client = Client::connect(&served.path).unwrap();
    client.structure().unwrap();
    client.option(OPT_SET_META_CONTEXT, &context_request("a", &[BASE_ALLOCATION])).unwrap();
    assert_eq!(only(&mut client, OPT_SET_META_CONTEXT, &[0]), REP_ERR_INVALID);
    client.go("a").unwrap();
    assert_eq!(client.call(0, BLOCK_STATUS, 0, 512, &[]).unwrap().error, EINVAL);
}

#[test]
fn a_client_that_does_not_negotiate_in_time_is_hung_up_on() {
    let limits = ServerLimits { handshake: std::time::Duration::from_millis(50), ..ServerLimits::default() };
    let served = Served::start(limits);
    let mut client = Client::connect(&served.path).unwrap();
    client.send(b"IHAVE").unwrap();
    assert!(client.is_over());
}

#[test]
fn names_that_the_protocol_has_no_room_for_are_refused() {
    assert!(ExportName::new("x".repeat(4096)).is_ok());
    assert!(ExportName::new("x".repeat(4097)).is_err());
    assert!(Export::new(blank(1)).described("a\0b").is_err());
    let served = served();
    let error = served.server.add(ExportName::new("a").unwrap(), Export::new(blank(1))).unwrap_err();
    assert!(error.to_string().contains("\"a\""), "{error}");
    assert_eq!(served.server.get("c").unwrap().access(), Access::ReadOnly);
}
