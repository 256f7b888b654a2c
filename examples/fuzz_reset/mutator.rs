//! Inputs: a tree of records that is changed a little from one to the next, encoded, and now and then damaged. All of it follows from the seed.

use crate::common::random::Random;
use crate::guest::{LONGEST_INPUT, hash};

#[derive(Clone)]
enum Record {
    Bytes(Vec<u8>),
    List(Vec<Record>),
    Name(Vec<u8>),
}

/// An endless sequence of inputs.
pub struct Mutator {
    random: Random,
    records: Vec<Record>,
}

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), records: Vec::new() }
    }

    fn start(&mut self) {
        let bytes = |n: u8| Record::Bytes(vec![n; 3]);
        self.records = (0..12).map(bytes).collect();
        self.records.extend(["main", "read", "write", "exit"].map(|name| Record::Name(name.into())));
        self.records.push(Record::List(vec![bytes(99), Record::Name(b"inner".to_vec())]));
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random.below(one_in) == 0
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..self.random.below(most + 1)).map(|_| self.random.next() as u8).collect()
    }

    fn fresh(&mut self) -> Record {
        match self.random.below(4) {
            0 => Record::Name(self.bytes(32)),
            1 => Record::List((0..self.random.below(4)).map(|_| Record::Bytes(self.bytes(8))).collect()),
            _ => Record::Bytes(self.bytes(8)),
        }
    }

    /// Changes one record somewhere below a list.
    fn change(&mut self, records: &mut Vec<Record>) {
        let at = self.random.below(records.len() as u64 + 1) as usize;
        let Some(record) = records.get_mut(at) else { return records.push(self.fresh()) };
        match record {
            Record::List(inner) if !self.chance(4) => self.change(inner),
            Record::Bytes(bytes) | Record::Name(bytes) if self.chance(2) => {
                // A length that nobody expects.
                let most = if self.chance(3) { 255 } else { 32 };
                *bytes = self.bytes(most);
            }
            _ if self.chance(3) => drop(records.remove(at)),
            _ if self.chance(3) => *record = Record::List(vec![record.clone()]),
            _ => records.insert(at, self.fresh()),
        }
    }
}

impl Iterator for Mutator {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.records.is_empty() || self.chance(16) {
            self.start();
        }
        let mut records = std::mem::take(&mut self.records);
        (0..=self.random.below(3)).for_each(|_| self.change(&mut records));
        let mut input = encode(&records);
        self.records = records;
        if input.len() > LONGEST_INPUT {
            self.start();
            input = encode(&self.records);
        }
        if self.chance(5) {
            let at = self.random.below(input.len() as u64) as usize;
            input[at] ^= 1 << self.random.below(8);
            // A parser that is to be reached behind the checksum must be given a right one.
            if !self.chance(4) {
                seal(&mut input);
            }
        }
        if self.chance(40) {
            input.pop();
        }
        Some(input)
    }
}

fn encode(records: &[Record]) -> Vec<u8> {
    let mut input = b"OR\0\0\0\0".to_vec();
    put(&mut input, records);
    seal(&mut input);
    input
}

fn put(into: &mut Vec<u8>, records: &[Record]) {
    for record in records {
        let mut inner = Vec::new();
        let (tag, payload) = match record {
            Record::Bytes(bytes) => (1, bytes),
            Record::List(records) => {
                put(&mut inner, records);
                (2, &inner)
            }
            Record::Name(bytes) => (3, bytes),
        };
        // What is too long is cut, wherever that may be.
        let payload = &payload[..payload.len().min(255)];
        into.extend([tag, payload.len() as u8]);
        into.extend_from_slice(payload);
    }
}

/// Fills in length and checksum.
fn seal(input: &mut [u8]) {
    let (len, sum) = (input.len() as u16, hash(&input[6..]) as u16);
    input[2..4].copy_from_slice(&len.to_le_bytes());
    input[4..6].copy_from_slice(&sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Verdict, verdict_of};

    #[test]
    fn a_seed_gives_the_same_inputs_and_they_reach_every_verdict() {
        let inputs: Vec<_> = Mutator::new(7).take(1000).collect();
        assert_eq!(inputs, Mutator::new(7).take(1000).collect::<Vec<_>>());
        assert!(inputs.iter().all(|input| (5..=LONGEST_INPUT).contains(&input.len())));
        for seed in 0..20 {
            let verdicts: Vec<_> = Mutator::new(seed).take(300).map(|input| verdict_of(&input)).collect();
            assert!(verdicts.contains(&Verdict::Smashed), "seed {seed} does not find the bug");
            assert!(verdicts.iter().any(|verdict| matches!(verdict, Verdict::Accepted { .. })));
        }
        let reasons: Vec<_> = inputs.iter().map(|input| verdict_of(input)).collect();
        for reason in [1, 2, 3, 5, 6, 7] {
            assert!(reasons.contains(&Verdict::Rejected { reason }), "never rejected for {reason}");
        }
    }
}
