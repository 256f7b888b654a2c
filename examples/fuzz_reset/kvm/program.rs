//! The parser in 64-bit x86 assembly. What it does, and what is wrong with it, is in `guest.rs`.

use kvm_bindings::kvm_regs;

use crate::common::x86::*;
use crate::guest::*;

const CURSOR: Reg = ESI;
const END: Reg = EDI;
const LEN: Reg = ECX;
const RECORDS: Reg = R8;
const DIGEST: Reg = R9;
const HASH: Reg = R10;
const DEPTH: Reg = R11;
const GAP: Reg = R14;

/// Registers of a vCPU that is about to start.
pub fn entry(gap: u32) -> kvm_regs {
    kvm_regs { rip: CODE, rsp: STACK, r14: gap.into(), rflags: 2, ..Default::default() }
}

/// The page with the code.
pub fn code() -> (u64, Vec<u8>) {
    (CODE / PAGE, assemble())
}

fn assemble() -> Vec<u8> {
    let mut asm = Assembler::default();
    let a = &mut asm;

    a.out(Bell::Ready as u8);
    a.mov_to(EBX, INPUT as u32);
    a.load(END, EBX, 0);
    a.mov(CURSOR, EBX);
    a.add_with(CURSOR, 4);
    a.mov_to(EAX, Reason::NoInput as u32);
    a.cmp_with(END, 6);
    a.jb("reject");
    a.load_half(EDX, CURSOR, 0);
    a.mov_to(R15, MAGIC);
    a.cmp(EDX, R15);
    a.jne("reject");
    a.mov_to(EAX, Reason::Length as u32);
    a.load_half(EDX, CURSOR, 2);
    a.cmp(EDX, END);
    a.jne("reject");
    a.add(END, CURSOR);
    a.load_half(R15, CURSOR, 4);
    a.add_with(CURSOR, 6);
    a.mov_to(EDX, 0);
    a.mov(EBX, CURSOR);
    a.label("sum");
    a.cmp(EBX, END);
    a.je("summed");
    a.imul_by(EDX, EDX, 31);
    a.load_byte(EAX, EBX, 0);
    a.add(EDX, EAX);
    a.inc(EBX);
    a.jmp("sum");
    a.label("summed");
    a.mov_to(EAX, 0xffff);
    a.and(EDX, EAX);
    a.mov_to(EAX, Reason::Checksum as u32);
    a.cmp(EDX, R15);
    a.jne("reject");
    a.call("list");
    a.mov_to(EBP, RESULT as u32);
    a.store(RECORDS, EBP, result::RECORDS);
    a.store(DIGEST, EBP, result::DIGEST);
    a.out(Bell::Log as u8);
    a.out(Bell::Accepted as u8);
    a.label("end"); // the host has no more use for this machine as it is
    a.jmp("end");

    a.label("reject"); // eax = why
    a.mov_to(EBP, RESULT as u32);
    a.store(EAX, EBP, result::REASON);
    a.out(Bell::Rejected as u8);
    a.jmp("end");

    a.label("list");
    a.mov_to(EAX, Reason::TooDeep as u32);
    a.cmp_with(DEPTH, DEEPEST);
    a.ja("reject");
    a.label("record");
    a.cmp(CURSOR, END);
    a.je("list ends");
    a.mov_to(EAX, Reason::CutShort as u32);
    a.mov(EDX, END);
    a.sub(EDX, CURSOR);
    a.cmp_with(EDX, 2);
    a.jb("reject");
    a.load_byte(EBX, CURSOR, 0); // tag
    a.load_byte(LEN, CURSOR, 1);
    a.add_with(CURSOR, 2);
    a.mov(EDX, END);
    a.sub(EDX, CURSOR);
    a.cmp(LEN, EDX);
    a.ja("reject");
    a.inc(RECORDS);
    a.cmp_with(EBX, 1);
    a.je("bytes");
    a.cmp_with(EBX, 2);
    a.je("nested");
    a.mov_to(EAX, Reason::UnknownTag as u32);
    a.cmp_with(EBX, 3);
    a.jne("reject");
    a.call("name");
    a.jmp("record");
    a.label("list ends");
    a.ret();

    a.label("nested");
    a.push(END);
    a.mov(END, CURSOR);
    a.add(END, LEN);
    a.inc(DEPTH);
    a.call("list");
    a.dec(DEPTH);
    a.pop(END);
    a.jmp("record");

    a.label("bytes");
    a.mov_to(HASH, 0);
    a.label("hash");
    a.cmp_with(LEN, 0);
    a.je("hashed");
    a.imul_by(HASH, HASH, 31);
    a.load_byte(EAX, CURSOR, 0);
    a.add(HASH, EAX);
    a.inc(CURSOR);
    a.dec(LEN);
    a.jmp("hash");
    a.label("hashed"); // ebx = the counter
    a.mov(EBX, HASH);
    a.mov_to(EAX, BUCKETS - 1);
    a.and(EBX, EAX);
    a.imul(EBX, GAP);
    a.mov_to(EAX, TABLE as u32);
    a.add(EBX, EAX);
    a.load(EAX, EBX, 0);
    a.inc(EAX);
    a.store(EAX, EBX, 0);
    a.store(HASH, EBX, 4);
    a.imul_by(DIGEST, DIGEST, 31);
    a.add(DIGEST, HASH);
    a.jmp("record");

    a.label("name"); // buffer, canary, return address
    a.mov_to(EAX, CANARY);
    a.push(EAX);
    a.grow_stack(LONGEST_NAME);
    a.mov(EBX, ESP);
    a.mov(EDX, CURSOR);
    a.dec(EDX);
    a.load_signed_byte(EAX, EDX, 0); // THE BUG: 128 and more are negative
    a.cmp_with(EAX, LONGEST_NAME);
    a.mov_to(EAX, Reason::LongName as u32);
    a.jg("reject");
    a.mov_to(HASH, 0);
    a.label("copy");
    a.cmp_with(LEN, 0);
    a.je("copied");
    a.load_byte(EAX, CURSOR, 0);
    a.store_byte(EAX, EBX, 0);
    a.imul_by(HASH, HASH, 31);
    a.add(HASH, EAX);
    a.inc(CURSOR);
    a.inc(EBX);
    a.dec(LEN);
    a.jmp("copy");
    a.label("copied");
    a.shrink_stack(LONGEST_NAME);
    a.pop(EAX);
    a.mov_to(EDX, CANARY);
    a.cmp(EAX, EDX);
    a.jne("smashed");
    a.imul_by(DIGEST, DIGEST, 31);
    a.add(DIGEST, HASH);
    a.ret();

    a.label("smashed");
    a.out(Bell::Smashed as u8);
    a.jmp("end");

    asm.finish()
}
