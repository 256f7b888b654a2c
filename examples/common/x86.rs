//! An assembler for the few 64-bit x86 instructions that the guests are written in, and labels.
//!
//! Operands are 32 bits wide unless a name says otherwise. Memory operands are a base register and a 32-bit offset. Encodings
//! are those of the Intel manual, volume 2.

use std::collections::HashMap;

/// A register by number.
pub type Reg = u8;
pub const EAX: Reg = 0;
pub const ECX: Reg = 1;
pub const EDX: Reg = 2;
pub const EBX: Reg = 3;
pub const ESP: Reg = 4;
pub const EBP: Reg = 5;
pub const ESI: Reg = 6;
pub const EDI: Reg = 7;
pub const R8: Reg = 8;
pub const R9: Reg = 9;
pub const R10: Reg = 10;
pub const R11: Reg = 11;
pub const R12: Reg = 12;
pub const R13: Reg = 13;
pub const R14: Reg = 14;
pub const R15: Reg = 15;

const REX_W: u8 = 8;

/// Code being written.
#[derive(Default)]
pub struct Assembler {
    bytes: Vec<u8>,
    labels: HashMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    /// Names the place of the next instruction.
    pub fn label(&mut self, name: &'static str) {
        self.labels.insert(name, self.bytes.len());
    }

    /// The bytes, with all jumps filled in.
    pub fn finish(mut self) -> Vec<u8> {
        for (at, name) in self.jumps {
            let distance = self.labels[name] as i32 - (at as i32 + 4);
            self.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        self.bytes
    }

    /// Prefix, opcode and operands: `reg` is a register or a part of the opcode.
    fn encode(&mut self, wide: u8, opcode: &[u8], mode: u8, reg: Reg, rm: Reg) {
        let rex = wide | reg >> 3 << 2 | rm >> 3;
        if rex != 0 {
            self.bytes.push(0x40 | rex);
        }
        self.bytes.extend_from_slice(opcode);
        self.bytes.push(mode << 6 | (reg & 7) << 3 | rm & 7);
    }

    fn registers(&mut self, opcode: &[u8], reg: Reg, rm: Reg) {
        self.encode(0, opcode, 3, reg, rm);
    }

    fn memory(&mut self, opcode: &[u8], reg: Reg, base: Reg, offset: u16) {
        // A base whose number ends in 4 would need one more byte.
        debug_assert!(base & 7 != 4);
        self.encode(0, opcode, 2, reg, base);
        self.word(offset.into());
    }

    fn word(&mut self, word: u32) {
        self.bytes.extend_from_slice(&word.to_le_bytes());
    }

    fn jump(&mut self, opcode: &[u8], to: &'static str) {
        self.bytes.extend_from_slice(opcode);
        self.jumps.push((self.bytes.len(), to));
        self.word(0);
    }

    pub fn load(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x8b], to, base, offset);
    }

    /// Loads a byte, without or with its sign.
    pub fn load_byte(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x0f, 0xb6], to, base, offset);
    }

    pub fn load_signed_byte(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x0f, 0xbe], to, base, offset);
    }

    /// Loads 16 bits, without a sign.
    pub fn load_half(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x0f, 0xb7], to, base, offset);
    }

    /// Stores the lowest byte of a register below 4: others would need a prefix.
    pub fn store_byte(&mut self, from: Reg, base: Reg, offset: u16) {
        debug_assert!(from < 4);
        self.memory(&[0x88], from, base, offset);
    }

    pub fn store(&mut self, from: Reg, base: Reg, offset: u16) {
        self.memory(&[0x89], from, base, offset);
    }

    pub fn add_from(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x03], to, base, offset);
    }

    pub fn or_from(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x0b], to, base, offset);
    }

    pub fn xor_from(&mut self, to: Reg, base: Reg, offset: u16) {
        self.memory(&[0x33], to, base, offset);
    }

    pub fn cmp_from(&mut self, with: Reg, base: Reg, offset: u16) {
        self.memory(&[0x3b], with, base, offset);
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x89], from, to);
    }

    pub fn add(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x01], from, to);
    }

    pub fn and(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x21], from, to);
    }

    pub fn xor(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x31], from, to);
    }

    pub fn sub(&mut self, from: Reg, what: Reg) {
        self.registers(&[0x29], what, from);
    }

    pub fn cmp(&mut self, one: Reg, other: Reg) {
        self.registers(&[0x39], other, one);
    }

    pub fn imul(&mut self, to: Reg, by: Reg) {
        self.registers(&[0x0f, 0xaf], to, by);
    }

    /// `to = from * by`
    pub fn imul_by(&mut self, to: Reg, from: Reg, by: u32) {
        self.registers(&[0x69], to, from);
        self.word(by);
    }

    pub fn mov_to(&mut self, to: Reg, value: u32) {
        self.registers(&[0xc7], 0, to);
        self.word(value);
    }

    pub fn and_with(&mut self, to: Reg, value: u8) {
        self.registers(&[0x83], 4, to);
        self.bytes.push(value);
    }

    pub fn add_with(&mut self, to: Reg, value: u8) {
        self.registers(&[0x83], 0, to);
        self.bytes.push(value);
    }

    pub fn cmp_with(&mut self, one: Reg, value: u8) {
        self.registers(&[0x83], 7, one);
        self.bytes.push(value);
    }

    /// Takes room from the stack, and gives it back: all 64 bits of its pointer.
    pub fn grow_stack(&mut self, bytes: u8) {
        self.encode(REX_W, &[0x83], 3, 5, ESP);
        self.bytes.push(bytes);
    }

    pub fn shrink_stack(&mut self, bytes: u8) {
        self.encode(REX_W, &[0x83], 3, 0, ESP);
        self.bytes.push(bytes);
    }

    /// Pushes or pops 64 bits of one of the first eight registers.
    pub fn push(&mut self, what: Reg) {
        debug_assert!(what < 8);
        self.bytes.push(0x50 + what);
    }

    pub fn pop(&mut self, what: Reg) {
        debug_assert!(what < 8);
        self.bytes.push(0x58 + what);
    }

    pub fn call(&mut self, to: &'static str) {
        self.jump(&[0xe8], to);
    }

    pub fn ret(&mut self) {
        self.bytes.push(0xc3);
    }

    /// Sets the flags only.
    pub fn test_with(&mut self, what: Reg, value: u32) {
        self.registers(&[0xf7], 0, what);
        self.word(value);
    }

    pub fn not(&mut self, what: Reg) {
        self.registers(&[0xf7], 2, what);
    }

    pub fn inc(&mut self, what: Reg) {
        self.registers(&[0xff], 0, what);
    }

    pub fn dec(&mut self, what: Reg) {
        self.registers(&[0xff], 1, what);
    }

    pub fn shr(&mut self, what: Reg, by: u8) {
        self.registers(&[0xc1], 5, what);
        self.bytes.push(by);
    }

    /// Shifts all 64 bits.
    pub fn shl_64(&mut self, what: Reg, by: u8) {
        self.encode(REX_W, &[0xc1], 3, 4, what);
        self.bytes.push(by);
    }

    /// Writes `al` to a port.
    pub fn out(&mut self, port: u8) {
        self.bytes.extend_from_slice(&[0xe6, port]);
    }

    pub fn jmp(&mut self, to: &'static str) {
        self.jump(&[0xe9], to);
    }

    pub fn je(&mut self, to: &'static str) {
        self.jump(&[0x0f, 0x84], to);
    }

    pub fn jne(&mut self, to: &'static str) {
        self.jump(&[0x0f, 0x85], to);
    }

    /// Jumps if the first was below or above the second, as numbers without a sign.
    pub fn jb(&mut self, to: &'static str) {
        self.jump(&[0x0f, 0x82], to);
    }

    pub fn ja(&mut self, to: &'static str) {
        self.jump(&[0x0f, 0x87], to);
    }

    /// Jumps if the first was greater than the second, as numbers with a sign.
    pub fn jg(&mut self, to: &'static str) {
        self.jump(&[0x0f, 0x8f], to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as the GNU assembler gives them.
    #[test]
    fn encodings() {
        let mut a = Assembler::default();
        a.label("start");
        a.imul(EDI, R9);
        a.cmp(EAX, R12);
        a.store(R12, EBX, 0x200);
        a.load(EAX, ESI, 0xffc);
        a.imul_by(ECX, EAX, 0x9e37_79b1);
        a.shl_64(ESI, 12);
        a.shr(ECX, 16);
        a.inc(R13);
        a.dec(R14);
        a.not(EAX);
        a.and_with(EAX, 15);
        a.test_with(EBP, 7);
        a.out(0x11);
        a.load_byte(EAX, ESI, 1);
        a.load_signed_byte(EAX, ESI, 1);
        a.store_byte(EAX, EBX, 0x40);
        a.grow_stack(32);
        a.push(EAX);
        a.cmp_with(EAX, 32);
        a.ret();
        a.jne("start");
        let expected = [
            vec![0x41, 0x0f, 0xaf, 0xf9],
            vec![0x44, 0x39, 0xe0],
            vec![0x44, 0x89, 0xa3, 0x00, 0x02, 0x00, 0x00],
            vec![0x8b, 0x86, 0xfc, 0x0f, 0x00, 0x00],
            vec![0x69, 0xc8, 0xb1, 0x79, 0x37, 0x9e],
            vec![0x48, 0xc1, 0xe6, 0x0c],
            vec![0xc1, 0xe9, 0x10],
            vec![0x41, 0xff, 0xc5],
            vec![0x41, 0xff, 0xce],
            vec![0xf7, 0xd0],
            vec![0x83, 0xe0, 0x0f],
            vec![0xf7, 0xc5, 0x07, 0x00, 0x00, 0x00],
            vec![0xe6, 0x11],
            vec![0x0f, 0xb6, 0x86, 0x01, 0x00, 0x00, 0x00],
            vec![0x0f, 0xbe, 0x86, 0x01, 0x00, 0x00, 0x00],
            vec![0x88, 0x83, 0x40, 0x00, 0x00, 0x00],
            vec![0x48, 0x83, 0xec, 0x20],
            vec![0x50],
            vec![0x83, 0xf8, 0x20],
            vec![0xc3],
            vec![0x0f, 0x85, 0xa9, 0xff, 0xff, 0xff],
        ];
        assert_eq!(a.finish(), expected.concat());
    }
}
