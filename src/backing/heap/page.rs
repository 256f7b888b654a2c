//! One page on the heap: words that several guest CPUs may write at once, in safe Rust.
//!
//! A page is an array of 64-bit atomics, accessed with relaxed loads and stores: plain moves on every machine we run on, and a
//! racing guest sees some order of bytes, as on real memory. Bytes that do not fill a word go in by
//! compare-and-swap, so that a neighbour's concurrent store to the same word is never lost.
//!
//! Must not know where a page is kept or who owns it.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use crate::account::Charge;
use crate::page::PageSize;

pub(super) const WORD: usize = size_of::<u64>();

/// How the words of a page are kept: [`Page4K`] inline, [`AnyPage`] behind one more pointer.
pub trait PageBody: Send + Sync + fmt::Debug + 'static {
    /// Whether pages of this size can be kept this way.
    fn supports(size: PageSize) -> bool;

    /// The binary logarithm of the page size: a constant where only one size can be kept, which a random read is measurably faster for.
    fn shift(size: PageSize) -> u32;

    /// A page made of the words that `word` gives for each index.
    fn build(size: PageSize, word: impl FnMut(usize) -> u64) -> Self;

    /// Its words.
    fn words(&self) -> &[AtomicU64];
}

const WORDS_4K: usize = 4096 / WORD;

/// A page of 4 KiB, reached through one pointer: the fastest.
pub struct Page4K([AtomicU64; WORDS_4K]);

/// A page of any size from 4 KiB to 2 MiB, reached through two pointers.
pub struct AnyPage(Box<[AtomicU64]>);

impl fmt::Debug for Page4K {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Page4K")
    }
}

impl fmt::Debug for AnyPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnyPage({} bytes)", self.0.len() * WORD)
    }
}

impl PageBody for Page4K {
    fn supports(size: PageSize) -> bool {
        size == PageSize::KIB_4
    }

    #[inline]
    fn shift(_: PageSize) -> u32 {
        PageSize::KIB_4.shift()
    }

    fn build(_: PageSize, mut word: impl FnMut(usize) -> u64) -> Self {
        Self(std::array::from_fn(|at| AtomicU64::new(word(at))))
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl PageBody for AnyPage {
    fn supports(_: PageSize) -> bool {
        true
    }

    #[inline]
    fn shift(size: PageSize) -> u32 {
        size.shift()
    }

    fn build(size: PageSize, mut word: impl FnMut(usize) -> u64) -> Self {
        let words = size.bytes().get() as usize / WORD;
        Self((0..words).map(|at| AtomicU64::new(word(at))).collect())
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// A page and its place in the fork tree's books.
#[derive(Debug)]
pub(super) struct Page<B> {
    body: B,
    _charge: Charge,
}

impl<B: PageBody> Page<B> {
    pub(super) fn zeroed(size: PageSize, charge: Charge) -> Self {
        Self { body: B::build(size, |_| 0), _charge: charge }
    }

    pub(super) fn copy_of(size: PageSize, other: &Self, charge: Charge) -> Self {
        let from = other.body.words();
        Self { body: B::build(size, |at| from[at].load(Relaxed)), _charge: charge }
    }

    /// A page with these bytes, which must fill it.
    pub(super) fn from_bytes(size: PageSize, bytes: &[u8], charge: Charge) -> Self {
        let (words, []) = bytes.as_chunks::<WORD>() else { unreachable!("a page is whole words") };
        Self { body: B::build(size, |at| u64::from_ne_bytes(words[at])), _charge: charge }
    }

    /// The aligned word at byte `at`, without the search for edges that [`Page::read`] does.
    #[inline]
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        &self.body.words()[at / WORD]
    }

    pub(super) fn read(&self, at: usize, buf: &mut [u8]) {
        let words = self.body.words();
        let (mut word, skip) = (at / WORD, at % WORD);
        let mut rest = buf;
        if skip != 0 {
            let head;
            let take = rest.len().min(WORD - skip);
            (head, rest) = rest.split_at_mut(take);
            head.copy_from_slice(&words[word].load(Relaxed).to_ne_bytes()[skip..skip + take]);
            word += 1;
        }
        let (whole, tail) = rest.as_chunks_mut::<WORD>();
        for (chunk, from) in whole.iter_mut().zip(&words[word..]) {
            *chunk = from.load(Relaxed).to_ne_bytes();
        }
        if !tail.is_empty() {
            let last = words[word + whole.len()].load(Relaxed).to_ne_bytes();
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }

    pub(super) fn write(&self, at: usize, data: &[u8]) {
        let words = self.body.words();
        let (mut word, skip) = (at / WORD, at % WORD);
        let mut rest = data;
        if skip != 0 {
            let (head, after) = rest.split_at(rest.len().min(WORD - skip));
            merge(&words[word], skip, head);
            (rest, word) = (after, word + 1);
        }
        let (whole, tail) = rest.as_chunks::<WORD>();
        for (chunk, to) in whole.iter().zip(&words[word..]) {
            to.store(u64::from_ne_bytes(*chunk), Relaxed);
        }
        if !tail.is_empty() {
            merge(&words[word + whole.len()], 0, tail);
        }
    }

    /// Exchanges bytes within one word if they are `expected`; what they were, at the front of the result.
    pub(super) fn compare_exchange(&self, at: usize, expected: &[u8], new: &[u8]) -> [u8; WORD] {
        let (word, skip) = (&self.body.words()[at / WORD], at % WORD);
        let part = skip..skip + expected.len();
        let mut now = word.load(SeqCst);
        loop {
            let mut bytes = now.to_ne_bytes();
            let mut held = [0; WORD];
            held[..expected.len()].copy_from_slice(&bytes[part.clone()]);
            if bytes[part.clone()] != *expected {
                return held;
            }
            bytes[part.clone()].copy_from_slice(new);
            match word.compare_exchange_weak(now, u64::from_ne_bytes(bytes), SeqCst, SeqCst) {
                Ok(_) => return held,
                Err(seen) => now = seen,
            }
        }
    }

    pub(super) fn is_zero(&self) -> bool {
        self.body.words().iter().all(|word| word.load(Relaxed) == 0)
    }
}

/// Stores `bytes` into part of a word, keeping its other bytes as a concurrent writer leaves them.
#[inline]
fn merge(word: &AtomicU64, skip: usize, bytes: &[u8]) {
    let mut now = word.load(Relaxed);
    loop {
        let mut next = now.to_ne_bytes();
        next[skip..skip + bytes.len()].copy_from_slice(bytes);
        crate::sync::step();
        match word.compare_exchange_weak(now, u64::from_ne_bytes(next), Relaxed, Relaxed) {
            Ok(_) => return,
            Err(seen) => now = seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tree;
    use crate::account::Item;

    #[test]
    fn every_position_and_length_agrees_with_a_slice() {
        let charge = || Tree::default().0.charge(Item::HeapPage);
        let page: Page<Page4K> = Page::zeroed(PageSize::KIB_4, charge());
        let mut model = vec![0u8; 4096];
        assert!(page.is_zero());
        let mut fill = 0u8;
        for base in [0, 8, 2048, 4096 - 40] {
            for at in base..base + 17 {
                for len in 0..=23 {
                    fill = fill.wrapping_mul(5).wrapping_add(77);
                    let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add(i)).collect();
                    page.write(at, &data);
                    model[at..at + len as usize].copy_from_slice(&data);
                    let mut back = vec![0; len as usize];
                    page.read(at, &mut back);
                    assert_eq!(back, data);
                }
            }
        }
        let mut all = vec![0; 4096];
        page.read(0, &mut all);
        assert_eq!(all, model);
        let copy: Page<Page4K> = Page::copy_of(PageSize::KIB_4, &page, charge());
        let again: Page<AnyPage> = Page::from_bytes(PageSize::KIB_4, &model, charge());
        copy.read(0, &mut all);
        assert_eq!(all, model);
        again.read(0, &mut all);
        assert_eq!(all, model);
    }
}
