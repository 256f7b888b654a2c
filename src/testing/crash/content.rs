//! The bytes of a file, sparse, and cheap to copy.

use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// A file's content. A copy shares all pages until they are written.
#[derive(Clone, Default, Debug)]
pub(super) struct Content {
    pub(super) len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
}

impl Content {
    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let here = at + done as u64;
            let within = (here % PAGE) as usize;
            let take = (PAGE as usize - within).min(data.len() - done);
            let page = self.pages.entry(here / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[within..within + take].copy_from_slice(&data[done..done + take]);
            done += take;
        }
        self.len = self.len.max(at + data.len() as u64);
    }

    /// `None` past the end.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Option<()> {
        at.checked_add(buf.len() as u64).filter(|end| *end <= self.len)?;
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let within = (here % PAGE) as usize;
            let take = (PAGE as usize - within).min(buf.len() - done);
            let part = &mut buf[done..done + take];
            match self.pages.get(&(here / PAGE)) {
                Some(page) => part.copy_from_slice(&page[within..within + take]),
                None => part.fill(0),
            }
            done += take;
        }
        Some(())
    }

    pub(super) fn punch(&mut self, at: u64, len: u64) {
        let end = (at + len).min(self.len);
        let (first, last) = (at.div_ceil(PAGE), end / PAGE);
        let whole: Vec<u64> = self.pages.range(first..last.max(first)).map(|(page, _)| *page).collect();
        whole.iter().for_each(|page| drop(self.pages.remove(page)));
        for (from, to) in [(at, (first * PAGE).min(end)), ((last * PAGE).max(at), end)] {
            if from < to {
                self.write(from, &vec![0; (to - from) as usize]);
            }
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            let old = self.len;
            self.punch(len, old - len);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }

    /// Space that it takes.
    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }
}
