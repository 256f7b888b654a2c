//! What a page says of itself, and whether what was read of it can be.
//!
//! A page carries its stamp in a few words spread over it, the same in each but for the word's place, so that a check takes a few loads. Its writer
//! writes them in order, and a reader reads them against it: whatever races, the words that a reader meets grow no older on the
//! way. So every check decides, and none is repeated. Must not know of VMs or threads.

pub const PAGE: u64 = 4096;
/// Where the words lie: the ends of the page, and one in each part of it between. Bytes, ascending.
pub const PLACES: [u64; 6] = [0, 648, 1272, 2056, 3176, 4088];

const SEQUENCE_BITS: u32 = 24;
const PAGE_BITS: u32 = 10;

/// A page's number, the tag of the VM that wrote it last, and how often it has been written, as one word. Sequences go on from a VM to
/// its clones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub page: u64,
    pub tag: u64,
    pub sequence: u64,
}

impl Stamp {
    /// The word that stands for it.
    pub fn word(self) -> u64 {
        assert!(self.page >> PAGE_BITS == 0 && self.sequence >> SEQUENCE_BITS == 0, "{self:?} does not fit a word");
        assert!(self.tag >> (64 - SEQUENCE_BITS - PAGE_BITS) == 0, "{self:?} does not fit a word");
        self.tag << (SEQUENCE_BITS + PAGE_BITS) | self.page << SEQUENCE_BITS | self.sequence
    }

    pub fn of(word: u64) -> Self {
        Self {
            page: word >> SEQUENCE_BITS & ((1 << PAGE_BITS) - 1),
            tag: word >> (SEQUENCE_BITS + PAGE_BITS),
            sequence: word & ((1 << SEQUENCE_BITS) - 1),
        }
    }
}

/// What tells a word at one place from the same word at another.
fn salt(place: usize) -> u64 {
    (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What lies at a place of a page whose stamp's word this is.
#[inline]
pub fn salted(word: u64, place: usize) -> u64 {
    word ^ salt(place)
}

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// Its words do not belong together: old and new bytes, or bytes that are no stamp.
    Torn,
    /// It is another page's or another VM's: not written here, and not there at the fork.
    Foreign,
    /// It is whole, and older than what is known to have been written.
    Lost,
}

/// Who may have written a page that is read, and when.
#[derive(Clone, Copy)]
pub struct Expected {
    /// The tag of the VM that is looked at.
    pub own: u64,
    /// The page's word at its fork, which is all that may be of others.
    pub inherited: u64,
    /// The page's word before it was read: nothing older may be met.
    pub from: u64,
    /// The newest sequence that may have been begun.
    pub to: u64,
}

/// Checks a page by its words, in the order of their places, as they were read backwards while its writer may have been writing.
#[inline]
pub fn check_racing(words: &[u64; PLACES.len()], expected: Expected) -> Result<(), Wrong> {
    // The usual case: nobody was writing.
    if words.iter().enumerate().all(|(place, word)| *word == salted(expected.from, place)) {
        return Ok(());
    }
    let mut newest = Stamp::of(expected.from).sequence;
    for place in (0..PLACES.len()).rev() {
        let word = salted(words[place], place);
        let stamp = Stamp::of(word);
        if stamp.page != Stamp::of(expected.from).page {
            return Err(Wrong::Foreign);
        }
        if word != expected.inherited && stamp.tag != expected.own || stamp.sequence > expected.to {
            return Err(Wrong::Foreign);
        }
        if stamp.sequence < newest {
            return Err(if place == PLACES.len() - 1 { Wrong::Lost } else { Wrong::Torn });
        }
        newest = stamp.sequence;
    }
    Ok(())
}

/// Checks a page that nobody writes: every word is the one that was written last.
#[inline]
pub fn check_at_rest(words: &[u64; PLACES.len()], expected: u64) -> Result<(), Wrong> {
    if words.iter().enumerate().all(|(place, word)| *word == salted(expected, place)) {
        return Ok(());
    }
    let stamps = std::array::from_fn::<_, { PLACES.len() }, _>(|place| Stamp::of(salted(words[place], place)));
    let expected = Stamp::of(expected);
    if stamps.iter().any(|stamp| *stamp != stamps[0]) {
        return Err(Wrong::Torn);
    }
    let own = stamps[0].page == expected.page && stamps[0].tag == expected.tag;
    Err(if own && stamps[0].sequence < expected.sequence { Wrong::Lost } else { Wrong::Foreign })
}
