//! QEMU's saved state as a stream of sections, as far as it must be understood: where the sections of RAM end.
//!
//! A fork of the first parent saves everything by a migration that leaves the shared memory file out: a head with the sections of RAM,
//! in which the few small blocks that are no guest memory lie (firmware, tables), and a section for each device. A fork of a clone saves
//! the devices alone; what it is loaded from is the first state's head and these.
//!
//! The bytes come from a process that a guest may have taken over: every length is held against what is there. The format is QEMU's,
//! documented in its `docs/devel/migration`; version 3 of it is older than any release that is taken.

/// The most blocks of RAM that a machine may have.
const BLOCKS: usize = 1024;
const PAGE: u64 = 4096;

/// A saved state that is not what QEMU writes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It ends too early.
    #[error("the saved state ends in the middle, after {0} bytes")]
    Short(u64),
    /// Something that is not expected there.
    #[error("the saved state is not understood at byte {at}: {what}")]
    Unknown {
        /// Where.
        at: u64,
        /// What was found.
        what: &'static str,
    },
    /// A block that the guest may have changed since the first fork.
    #[error(
        "a clone with the memory block `{0}` is not forked: its content is saved with all of RAM only; leave out displays and other \
         devices with memory of their own"
    )]
    OwnMemory(String),
}

/// The part of a saved state before the first device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Head {
    /// Its length in bytes.
    pub(super) len: usize,
    /// The blocks of RAM, with their lengths.
    pub(super) blocks: Vec<(String, u64)>,
}

/// Finds where the devices begin.
pub(super) fn head(state: &[u8]) -> Result<Head, StreamError> {
    let mut at = Cursor { bytes: state, at: 0 };
    at.magic()?;
    let mut blocks = Vec::new();
    loop {
        let start = at.at;
        match at.byte()? {
            0x07 => at.configuration()?,
            // The start of a section that has more than one part: RAM is the only one without a migration of disks.
            0x01 => {
                let id = at.word()?;
                if at.name()? != b"ram" {
                    return Err(at.unknown("a section of many parts that is not RAM"));
                }
                // Instance and version.
                at.skip(8)?;
                at.ram(&mut blocks)?;
                at.footer(id)?;
            }
            0x02 | 0x03 => {
                let id = at.word()?;
                at.ram(&mut blocks)?;
                at.footer(id)?;
            }
            // A device, or the end.
            0x04 | 0x00 => return Ok(Head { len: start, blocks }),
            _ => return Err(at.unknown("a section of an unknown kind")),
        }
    }
}

/// The state of a clone that is forked: the head of the state that it was loaded from, and its devices as they are now.
pub(super) fn join(loaded: &[u8], devices: &[u8]) -> Result<Vec<u8>, StreamError> {
    let head = head(loaded)?;
    if let Some((block, _)) = head.blocks.iter().find(|(name, _)| !is_constant(name)) {
        return Err(StreamError::OwnMemory(block.clone()));
    }
    let mut at = Cursor { bytes: devices, at: 0 };
    at.magic()?;
    // Newer releases may write the configuration here too; the head has one.
    if devices.get(at.at) == Some(&0x07) {
        at.skip(1)?;
        at.configuration()?;
    }
    let rest = &devices[at.at..];
    match (rest.first(), rest.last()) {
        (Some(0x04), Some(0x00)) => {}
        _ => return Err(at.unknown("the devices do not begin with one, or have no end")),
    }
    let mut state = Vec::with_capacity(head.len + rest.len() + NO_DESCRIPTION.len());
    state.extend_from_slice(&loaded[..head.len]);
    state.extend_from_slice(rest);
    state.extend_from_slice(NO_DESCRIPTION);
    Ok(state)
}

/// What a reader looks for after the end: a description of all fields, for people. An empty one.
const NO_DESCRIPTION: &[u8] = b"\x06\x00\x00\x00\x02{}";

/// Blocks that are the same in each process and that a guest cannot write once it has booted: the memory file, which is not in the
/// stream, firmware, option ROMs, and the tables that the firmware was given.
fn is_constant(block: &str) -> bool {
    matches!(block, "ram" | "/objects/ram" | "pc.bios" | "pc.rom" | "isa-bios")
        || block.starts_with("/rom@")
        || block.ends_with(".rom")
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], StreamError> {
        let short = StreamError::Short(self.bytes.len() as u64);
        let len = usize::try_from(len).map_err(|_| short.clone())?;
        let end = self.at.checked_add(len).ok_or(short.clone())?;
        let taken = self.bytes.get(self.at..end).ok_or(short)?;
        self.at = end;
        Ok(taken)
    }

    fn skip(&mut self, len: u64) -> Result<(), StreamError> {
        self.take(len).map(drop)
    }

    fn byte(&mut self) -> Result<u8, StreamError> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self, len: u64) -> Result<u64, StreamError> {
        Ok(self.take(len)?.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn word(&mut self) -> Result<u64, StreamError> {
        self.number(4)
    }

    fn name(&mut self) -> Result<&'a [u8], StreamError> {
        let len = self.byte()?;
        self.take(len.into())
    }

    fn unknown(&self, what: &'static str) -> StreamError {
        StreamError::Unknown { at: self.at as u64, what }
    }

    fn magic(&mut self) -> Result<(), StreamError> {
        if self.take(8)? == b"QEVM\x00\x00\x00\x03" {
            Ok(())
        } else {
            Err(self.unknown("no magic, or another version"))
        }
    }

    /// The name of the machine, and what else must be the same on both sides.
    fn configuration(&mut self) -> Result<(), StreamError> {
        let len = self.word()?;
        self.skip(len)?;
        while self.bytes.get(self.at) == Some(&0x05) {
            self.skip(1)?;
            let name = self.name()?;
            // Its version.
            self.skip(4)?;
            match name {
                b"configuration/target-page-bits" => self.skip(4)?,
                b"configuration/uuid" => self.skip(16)?,
                b"configuration/capabilities" => {
                    for _ in 0..self.word()? {
                        self.name()?;
                    }
                }
                _ => return Err(self.unknown("an unknown part of the configuration")),
            }
        }
        Ok(())
    }

    /// The end of a section, which repeats its number.
    fn footer(&mut self, id: u64) -> Result<(), StreamError> {
        if self.byte()? == 0x7e && self.word()? == id { Ok(()) } else { Err(self.unknown("a section without its end")) }
    }

    /// One part of RAM: pages, or at first the list of blocks.
    fn ram(&mut self, blocks: &mut Vec<(String, u64)>) -> Result<(), StreamError> {
        const ZERO: u64 = 0x02;
        const SIZES: u64 = 0x04;
        const DATA: u64 = 0x08;
        const END: u64 = 0x10;
        const SAME_BLOCK: u64 = 0x20;
        loop {
            let word = self.number(8)?;
            let (address, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
            match flags & !SAME_BLOCK {
                SIZES => {
                    let mut left = address;
                    while left > 0 {
                        let name = String::from_utf8_lossy(self.name()?).into_owned();
                        let len = self.number(8)?;
                        // Where the block lies: there because shared memory is left out.
                        self.skip(8)?;
                        if len == 0 || len > left || blocks.len() == BLOCKS {
                            return Err(self.unknown("blocks that do not add up"));
                        }
                        left -= len;
                        blocks.push((name, len));
                    }
                }
                page @ (ZERO | DATA) => {
                    if flags & SAME_BLOCK == 0 {
                        self.name()?;
                    }
                    self.skip(if page == ZERO { 1 } else { PAGE })?;
                }
                END => return Ok(()),
                _ => return Err(self.unknown("a page in an unknown form")),
            }
        }
    }
}

/// Checks a state and makes one of it and a device part, for fuzzing.
#[cfg(any(test, feature = "testing"))]
pub fn fuzz(data: &[u8]) {
    let middle = data.len() / 2;
    if let Ok(found) = head(data) {
        assert!(found.len <= data.len() && found.blocks.len() <= BLOCKS);
    }
    if let Ok(joined) = join(&data[..middle], &data[middle..]) {
        // What was made is a state with the same head.
        assert_eq!(head(&joined), head(&data[..middle]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Vec<u8> {
        let mut state = b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x03q35".to_vec();
        state.extend_from_slice(
            b"\x05\x1aconfiguration/capabilities\x00\x00\x00\x01\x00\x00\x00\x01\x0fx-ignore-shared",
        );
        state
    }

    fn section(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut section = vec![kind, 0, 0, 0, 2];
        if kind == 1 {
            section.extend_from_slice(b"\x03ram\x00\x00\x00\x00\x00\x00\x00\x04");
        }
        section.extend_from_slice(body);
        section.extend_from_slice(b"\x00\x00\x00\x00\x00\x00\x00\x10\x7e\x00\x00\x00\x02");
        section
    }

    fn blocks(names: &[&str]) -> Vec<u8> {
        let mut body = ((names.len() as u64 * 8192) | 4).to_be_bytes().to_vec();
        for name in names {
            body.push(name.len() as u8);
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&8192_u64.to_be_bytes());
            body.extend_from_slice(&[0; 8]);
        }
        body
    }

    const DEVICE: &[u8] = b"\x04\x00\x00\x00\x00\x05timer-and-the-rest";

    fn state(names: &[&str]) -> (Vec<u8>, usize) {
        let mut state = start();
        state.extend(section(1, &blocks(names)));
        let mut pages = 8_u64.to_be_bytes().to_vec();
        pages.extend_from_slice(b"\x07pc.bios");
        pages.extend_from_slice(&[4; 4096]);
        pages.extend_from_slice(&(4096_u64 | 0x22).to_be_bytes());
        pages.push(0);
        state.extend(section(2, &pages));
        state.extend(section(3, &[]));
        let head = state.len();
        state.extend_from_slice(DEVICE);
        state.push(0);
        (state, head)
    }

    #[test]
    fn the_devices_begin_where_ram_ends() {
        let (state, len) = state(&["ram", "pc.bios"]);
        let blocks = vec![("ram".to_owned(), 8192), ("pc.bios".to_owned(), 8192)];
        assert_eq!(head(&state), Ok(Head { len, blocks }));
        for short in 0..len {
            assert!(head(&state[..short]).is_err(), "{short}");
        }
    }

    #[test]
    fn devices_go_behind_the_head_that_they_were_loaded_with() {
        let (state, len) = state(&["ram", "/rom@etc/acpi/tables", "0000:00:02.0/virtio-net-pci.rom"]);
        let devices = [b"QEVM\x00\x00\x00\x03".as_slice(), b"\x04now", &[0]].concat();
        let joined = join(&state, &devices).unwrap();
        assert_eq!(joined, [&state[..len], b"\x04now\x00", NO_DESCRIPTION].concat());
        assert!(matches!(join(&state, &devices[..8]), Err(StreamError::Unknown { .. })));
    }

    #[test]
    fn memory_that_would_be_stale_is_refused() {
        let (state, _) = state(&["ram", "vga.vram"]);
        let devices = [b"QEVM\x00\x00\x00\x03".as_slice(), b"\x04now", &[0]].concat();
        assert_eq!(join(&state, &devices), Err(StreamError::OwnMemory("vga.vram".into())));
    }

    #[test]
    fn any_broken_byte_is_an_error_or_harmless() {
        let (state, _) = state(&["ram", "pc.bios"]);
        for at in 0..state.len() {
            for value in [0, 1, 4, 0x7f, 0xff] {
                let mut broken = state.clone();
                broken[at] = value;
                fuzz(&broken);
            }
        }
    }
}
