//! An NBD client's whole conversation, negotiation and transmission, in whatever packets.
//!
//! The first byte says how the rest is fed: from the greeting on, or as requests after a negotiation that went well; the second how it is cut.
//! No input may panic, and a step may not say more than the longest request and its reply's framing. Whatever was said, the disk
//! keeps its invariants, a read-only one its content, and what follows on another session is served.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use offshoot::Tree;
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::{Export, ExportName, Exports, ServerLimits, Session, SessionStep};
use offshoot::page::{ByteSize, Lba};
use offshoot_fuzz::{Base, pattern};

const LONGEST: u64 = 64 << 10;

fn agreement(export: &[u8]) -> Vec<u8> {
    let name = [&(export.len() as u32).to_be_bytes()[..], export].concat();
    let option = |kind: u32, data: &[u8]| {
        [&b"IHAVEOPT"[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let mut contexts = [&name[..], &2u32.to_be_bytes()].concat();
    for query in ["base:allocation", "qemu:dirty-bitmap:origin"] {
        contexts.extend((query.len() as u32).to_be_bytes());
        contexts.extend(query.as_bytes());
    }
    let go = [&name[..], &[0, 0]].concat();
    [vec![0, 0, 0, 3], option(8, &[]), option(10, &contexts), option(7, &go)].concat()
}

/// Feeds `bytes` in pieces and steps through them; `false` once the session is over.
fn talk(session: &mut Session, bytes: &[u8], piece: usize) -> bool {
    for piece in bytes.chunks(piece) {
        session.feed(piece);
        loop {
            let step = session.step();
            assert!(session.output().len() as u64 <= LONGEST + (256 << 10), "one step says too much");
            session.clear_output();
            match step {
                SessionStep::Progress => {}
                SessionStep::Starved => break,
                SessionStep::Over => return false,
            }
        }
    }
    true
}

fuzz_target!(|input: &[u8]| {
    let [how, piece, bytes @ ..] = input else { return };
    let image = pattern(3, 5 * 4096 + 100);
    let disk = Disk::over_image(&Tree::default(), Base::shared(0, image), Access::ReadWrite).unwrap();
    let disk = Arc::new(disk);
    let exports = Exports::default();
    let whole = |disk: &Disk| {
        let mut all = vec![0; disk.capacity().get() as usize * 512];
        disk.read(Lba::ZERO, &mut all).unwrap();
        all
    };
    let before = whole(&disk);
    exports.add(ExportName::new("rw").unwrap(), Export::new(disk.clone())).unwrap();
    exports.add(ExportName::new("ro").unwrap(), Export::new(disk.clone()).read_only()).unwrap();
    let limits = ServerLimits { request: ByteSize::new(LONGEST), ..ServerLimits::default() };
    let mut session = Session::new(exports.clone(), &limits);
    let piece = usize::from(*piece).max(1) * 16;
    let read_only = how % 4 == 1;
    match how % 4 {
        0 => drop(talk(&mut session, bytes, piece)),
        1 | 2 => {
            assert!(talk(&mut session, &agreement(if read_only { b"ro" } else { b"rw" }), 4096));
            talk(&mut session, bytes, piece);
        }
        // Without structured replies.
        _ => {
            assert!(talk(&mut session, &[&[0, 0, 0, 3][..], b"IHAVEOPT\0\0\0\x01\0\0\0\x02rw"].concat(), 4096));
            talk(&mut session, bytes, piece);
        }
    }
    let after = whole(&disk);
    assert!(!read_only || before == after, "written through a read-only export");
    let usage = disk.usage().unwrap();
    assert_eq!(usage.private.get() + usage.shared.get() + usage.zero.get(), 6, "each page once");
    let mut next = Session::new(exports, &limits);
    assert!(talk(&mut next, &agreement(b"rw"), 4096), "the next client is served");
});
