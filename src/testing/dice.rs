//! Numbers that look random and are the same on every run: a failing run is repeated by its seed.

/// A small generator (xorshift64*). Not for secrets.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The sequence of this seed.
    pub const fn new(seed: u64) -> Self {
        // The generator stays at zero for ever if it starts there.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { (self.next() >> 16) % bound }
    }

    /// Bytes without a pattern, none of them zero.
    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        for chunk in bytes.chunks_mut(8) {
            let word = (self.next() | 0x0101_0101_0101_0101).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_seeds_differ() {
        let roll = |seed| Dice::new(seed).bytes(64);
        assert_eq!(roll(1), roll(1));
        assert_ne!(roll(1), roll(2));
        assert_ne!(Dice::new(0).next(), 0);
        let mut dice = Dice::new(3);
        let seen: std::collections::BTreeSet<_> = (0..1000).map(|_| dice.below(10)).collect();
        assert_eq!(seen.len(), 10, "every face comes up");
    }
}
