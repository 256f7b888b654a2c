//! An assembler for the part of RV32IM that the guests are written in: one function for each instruction, and labels.
//!
//! Formats and opcodes are those of the RISC-V unprivileged specification, chapter "RV32/64G Instruction Set Listings".

use std::collections::HashMap;

/// A register by number; the names are those of the calling convention.
pub type Reg = usize;
pub const ZERO: Reg = 0;
pub const RA: Reg = 1;
pub const SP: Reg = 2;
pub const T0: Reg = 5;
pub const T1: Reg = 6;
pub const T2: Reg = 7;
pub const T3: Reg = 28;
pub const T4: Reg = 29;
pub const S0: Reg = 8;
pub const S1: Reg = 9;
pub const S2: Reg = 18;
pub const S3: Reg = 19;
pub const S4: Reg = 20;
pub const S5: Reg = 21;
pub const S6: Reg = 22;
pub const S7: Reg = 23;
pub const S8: Reg = 24;
pub const S9: Reg = 25;
pub const S10: Reg = 26;
pub const S11: Reg = 27;
pub const A0: Reg = 10;
pub const A1: Reg = 11;
pub const A2: Reg = 12;
pub const A3: Reg = 13;
pub const A4: Reg = 14;
pub const A5: Reg = 15;
pub const A7: Reg = 17;

/// Code being written.
#[derive(Default)]
pub struct Assembler {
    words: Vec<u32>,
    labels: HashMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    /// Names the place of the next instruction.
    pub fn label(&mut self, name: &'static str) {
        self.labels.insert(name, self.words.len());
    }

    /// The bytes, with all jumps filled in.
    pub fn finish(mut self) -> Vec<u8> {
        for (at, name) in self.jumps {
            let distance = (self.labels[name] as i32 - at as i32) * 4;
            let is_branch = self.words[at] & 0x7f == 0x63;
            self.words[at] |= if is_branch { branch_bits(distance) } else { jump_bits(distance) };
        }
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn register(&mut self, funct7: u32, funct3: u32, rd: Reg, rs1: Reg, rs2: Reg) {
        let (rd, rs1, rs2) = (rd as u32, rs1 as u32, rs2 as u32);
        self.words.push(funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x33);
    }

    fn immediate(&mut self, opcode: u32, funct3: u32, rd: Reg, rs1: Reg, value: i32) {
        debug_assert!((-2048..2048).contains(&value));
        self.words.push((value as u32) << 20 | (rs1 as u32) << 15 | funct3 << 12 | (rd as u32) << 7 | opcode);
    }

    fn branch(&mut self, funct3: u32, rs1: Reg, rs2: Reg, to: &'static str) {
        self.jumps.push((self.words.len(), to));
        self.words.push((rs2 as u32) << 20 | (rs1 as u32) << 15 | funct3 << 12 | 0x63);
    }

    pub fn lui(&mut self, rd: Reg, upper: u32) {
        self.words.push(upper << 12 | (rd as u32) << 7 | 0x37);
    }

    /// Loads any constant: `lui` and `addi`.
    pub fn li(&mut self, rd: Reg, value: u32) {
        // `addi` extends the sign of its 12 bits: the upper part makes up for it.
        let low = (value as i32) << 20 >> 20;
        self.lui(rd, value.wrapping_sub(low as u32) >> 12);
        self.addi(rd, rd, low);
    }

    pub fn lw(&mut self, rd: Reg, offset: i32, base: Reg) {
        self.immediate(0x03, 2, rd, base, offset);
    }

    /// Loads a byte with its sign.
    pub fn lb(&mut self, rd: Reg, offset: i32, base: Reg) {
        self.immediate(0x03, 0, rd, base, offset);
    }

    /// Loads a byte, and two of them, without a sign.
    pub fn lbu(&mut self, rd: Reg, offset: i32, base: Reg) {
        self.immediate(0x03, 4, rd, base, offset);
    }

    pub fn lhu(&mut self, rd: Reg, offset: i32, base: Reg) {
        self.immediate(0x03, 5, rd, base, offset);
    }

    fn store(&mut self, funct3: u32, source: Reg, offset: i32, base: Reg) {
        debug_assert!((-2048..2048).contains(&offset));
        let (value, rs1, rs2) = (offset as u32, base as u32, source as u32);
        let (upper, lower) = (value >> 5 & 0x7f, value & 0x1f);
        self.words.push(upper << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | lower << 7 | 0x23);
    }

    pub fn sw(&mut self, source: Reg, offset: i32, base: Reg) {
        self.store(2, source, offset, base);
    }

    pub fn sb(&mut self, source: Reg, offset: i32, base: Reg) {
        self.store(0, source, offset, base);
    }

    pub fn addi(&mut self, rd: Reg, rs1: Reg, value: i32) {
        self.immediate(0x13, 0, rd, rs1, value);
    }

    pub fn andi(&mut self, rd: Reg, rs1: Reg, value: i32) {
        self.immediate(0x13, 7, rd, rs1, value);
    }

    /// Inverts all bits: `xori` with -1.
    pub fn not(&mut self, rd: Reg, rs1: Reg) {
        self.immediate(0x13, 4, rd, rs1, -1);
    }

    pub fn slli(&mut self, rd: Reg, rs1: Reg, by: i32) {
        self.immediate(0x13, 1, rd, rs1, by);
    }

    pub fn srli(&mut self, rd: Reg, rs1: Reg, by: i32) {
        self.immediate(0x13, 5, rd, rs1, by);
    }

    pub fn mv(&mut self, rd: Reg, rs1: Reg) {
        self.addi(rd, rs1, 0);
    }

    pub fn add(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(0, 0, rd, rs1, rs2);
    }

    pub fn sub(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(0x20, 0, rd, rs1, rs2);
    }

    pub fn and(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(0, 7, rd, rs1, rs2);
    }

    pub fn or(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(0, 6, rd, rs1, rs2);
    }

    pub fn xor(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(0, 4, rd, rs1, rs2);
    }

    pub fn mul(&mut self, rd: Reg, rs1: Reg, rs2: Reg) {
        self.register(1, 0, rd, rs1, rs2);
    }

    pub fn beq(&mut self, rs1: Reg, rs2: Reg, to: &'static str) {
        self.branch(0, rs1, rs2, to);
    }

    pub fn bne(&mut self, rs1: Reg, rs2: Reg, to: &'static str) {
        self.branch(1, rs1, rs2, to);
    }

    /// Branches if the first is less, as numbers without a sign, and with one.
    pub fn bltu(&mut self, rs1: Reg, rs2: Reg, to: &'static str) {
        self.branch(6, rs1, rs2, to);
    }

    pub fn blt(&mut self, rs1: Reg, rs2: Reg, to: &'static str) {
        self.branch(4, rs1, rs2, to);
    }

    pub fn j(&mut self, to: &'static str) {
        self.jal(ZERO, to);
    }

    pub fn call(&mut self, to: &'static str) {
        self.jal(RA, to);
    }

    fn jal(&mut self, rd: Reg, to: &'static str) {
        self.jumps.push((self.words.len(), to));
        self.words.push((rd as u32) << 7 | 0x6f);
    }

    pub fn ret(&mut self) {
        self.immediate(0x67, 0, ZERO, RA, 0);
    }

    pub fn ecall(&mut self) {
        self.words.push(0x73);
    }
}

/// A branch's distance in its scattered bits: 12, 10 to 5, 4 to 1, 11.
fn branch_bits(distance: i32) -> u32 {
    let d = distance as u32;
    (d >> 12 & 1) << 31 | (d >> 5 & 0x3f) << 25 | (d >> 1 & 0xf) << 8 | (d >> 11 & 1) << 7
}

/// A jump's distance in its scattered bits: 20, 10 to 1, 11, 19 to 12.
fn jump_bits(distance: i32) -> u32 {
    let d = distance as u32;
    (d >> 20 & 1) << 31 | (d >> 1 & 0x3ff) << 21 | (d >> 11 & 1) << 20 | (d >> 12 & 0xff) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words as the GNU assembler gives them.
    #[test]
    fn encodings() {
        let mut a = Assembler::default();
        a.label("start");
        a.lui(T0, 0x12345);
        a.addi(A0, A0, -1);
        a.lw(A0, 8, S0);
        a.sw(A0, -4, S0);
        a.mul(A0, A1, A2);
        a.srli(T1, S3, 16);
        a.not(A0, A0);
        a.beq(A0, A1, "end");
        a.j("start");
        a.label("end");
        a.ecall();
        a.lbu(A0, 1, S0);
        a.lb(A0, 1, S0);
        a.sb(A0, 4, S0);
        a.sub(T0, T1, T2);
        a.ret();
        let bytes = a.finish();
        let words: Vec<_> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let expected = [
            0x1234_52b7,
            0xfff5_0513,
            0x0084_2503,
            0xfea4_2e23,
            0x02c5_8533,
            0x0109_d313,
            0xfff5_4513,
            0x00b5_0463,
            0xfe1f_f06f,
            0x0000_0073,
            0x0014_4503,
            0x0014_0503,
            0x00a4_0223,
            0x4073_02b3,
            0x0000_8067,
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn constants_are_made_of_two_parts() {
        for value in [0, 1, 0x7ff, 0x800, 0xfff, 0x9e37_79b1, u32::MAX] {
            let mut a = Assembler::default();
            a.li(T0, value);
            let [upper, lower] = [a.words[0] & 0xffff_f000, (a.words[1] as i32 >> 20) as u32];
            assert_eq!(upper.wrapping_add(lower), value);
        }
    }
}
