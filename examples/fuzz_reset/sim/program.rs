//! The parser in RISC-V assembly. What it does, and what is wrong with it, is in `guest.rs`.

use rvsim::CpuState;

use crate::common::rv32::*;
use crate::guest::*;

const CURSOR: Reg = S0;
const END: Reg = S1;
const LEN: Reg = A0;
const WHY: Reg = A1;
const RECORDS: Reg = S2;
const DIGEST: Reg = S3;
const HASH: Reg = S4;
const DEPTH: Reg = S5;
const COUNTERS: Reg = S6;
const GAP: Reg = S7;
const FACTOR: Reg = S8;
/// The number of the bell, when the guest executes `ecall`.
pub const BELL: Reg = A7;

/// Registers of a vCPU that is about to start.
pub fn entry(gap: u32) -> CpuState {
    let mut state = CpuState::new(CODE as u32);
    state.x[SP] = STACK as u32;
    state.x[COUNTERS] = TABLE as u32;
    state.x[GAP] = gap;
    state.x[FACTOR] = 31;
    state
}

/// The page with the code.
pub fn code() -> (u64, Vec<u8>) {
    (CODE / PAGE, assemble())
}

fn assemble() -> Vec<u8> {
    let mut asm = Assembler::default();
    let a = &mut asm;
    let ring = |a: &mut Assembler, bell: Bell| {
        a.li(BELL, bell as u32);
        a.ecall();
    };

    ring(a, Bell::Ready);
    a.li(T0, INPUT as u32);
    a.lw(END, 0, T0);
    a.addi(CURSOR, T0, 4);
    a.li(WHY, Reason::NoInput as u32);
    a.li(T1, 6);
    a.bltu(END, T1, "reject");
    a.lhu(T1, 0, CURSOR);
    a.li(T2, MAGIC);
    a.bne(T1, T2, "reject");
    a.li(WHY, Reason::Length as u32);
    a.lhu(T1, 2, CURSOR);
    a.bne(T1, END, "reject");
    a.add(END, END, CURSOR);
    a.lhu(T3, 4, CURSOR);
    a.addi(CURSOR, CURSOR, 6);
    a.li(T1, 0);
    a.mv(T2, CURSOR);
    a.label("sum");
    a.beq(T2, END, "summed");
    a.mul(T1, T1, FACTOR);
    a.lbu(T4, 0, T2);
    a.add(T1, T1, T4);
    a.addi(T2, T2, 1);
    a.j("sum");
    a.label("summed");
    a.li(WHY, Reason::Checksum as u32);
    a.slli(T1, T1, 16);
    a.srli(T1, T1, 16);
    a.bne(T1, T3, "reject");
    a.call("list");
    a.li(T0, RESULT as u32);
    a.sw(RECORDS, result::RECORDS.into(), T0);
    a.sw(DIGEST, result::DIGEST.into(), T0);
    ring(a, Bell::Log);
    ring(a, Bell::Accepted);
    a.label("end"); // the host has no more use for this machine as it is
    a.j("end");

    a.label("reject");
    a.li(T0, RESULT as u32);
    a.sw(WHY, result::REASON.into(), T0);
    ring(a, Bell::Rejected);
    a.j("end");

    a.label("list");
    a.li(WHY, Reason::TooDeep as u32);
    a.li(T0, DEEPEST.into());
    a.bltu(T0, DEPTH, "reject");
    a.addi(SP, SP, -8);
    a.sw(RA, 0, SP);
    a.label("record");
    a.beq(CURSOR, END, "list ends");
    a.li(WHY, Reason::CutShort as u32);
    a.sub(T0, END, CURSOR);
    a.li(T1, 2);
    a.bltu(T0, T1, "reject");
    a.lbu(T2, 0, CURSOR); // tag
    a.lbu(LEN, 1, CURSOR);
    a.addi(CURSOR, CURSOR, 2);
    a.sub(T0, END, CURSOR);
    a.bltu(T0, LEN, "reject");
    a.addi(RECORDS, RECORDS, 1);
    a.li(T1, 1);
    a.beq(T2, T1, "bytes");
    a.li(T1, 2);
    a.beq(T2, T1, "nested");
    a.li(WHY, Reason::UnknownTag as u32);
    a.li(T1, 3);
    a.bne(T2, T1, "reject");
    a.call("name");
    a.j("record");
    a.label("list ends");
    a.lw(RA, 0, SP);
    a.addi(SP, SP, 8);
    a.ret();

    a.label("nested");
    a.addi(SP, SP, -8);
    a.sw(END, 0, SP);
    a.add(END, CURSOR, LEN);
    a.addi(DEPTH, DEPTH, 1);
    a.call("list");
    a.addi(DEPTH, DEPTH, -1);
    a.lw(END, 0, SP);
    a.addi(SP, SP, 8);
    a.j("record");

    a.label("bytes");
    a.li(HASH, 0);
    a.label("hash");
    a.beq(LEN, ZERO, "hashed");
    a.mul(HASH, HASH, FACTOR);
    a.lbu(T0, 0, CURSOR);
    a.add(HASH, HASH, T0);
    a.addi(CURSOR, CURSOR, 1);
    a.addi(LEN, LEN, -1);
    a.j("hash");
    a.label("hashed"); // t0 = the counter
    a.li(T1, BUCKETS - 1);
    a.and(T0, HASH, T1);
    a.mul(T0, T0, GAP);
    a.add(T0, T0, COUNTERS);
    a.lw(T1, 0, T0);
    a.addi(T1, T1, 1);
    a.sw(T1, 0, T0);
    a.sw(HASH, 4, T0);
    a.mul(DIGEST, DIGEST, FACTOR);
    a.add(DIGEST, DIGEST, HASH);
    a.j("record");

    a.label("name"); // buffer, canary, return address
    a.addi(SP, SP, -48);
    a.sw(RA, 40, SP);
    a.li(T0, CANARY);
    a.sw(T0, LONGEST_NAME.into(), SP);
    a.mv(T2, SP);
    a.li(WHY, Reason::LongName as u32);
    a.lb(T0, -1, CURSOR); // THE BUG: 128 and more are negative
    a.li(T1, LONGEST_NAME.into());
    a.blt(T1, T0, "reject");
    a.li(HASH, 0);
    a.label("copy");
    a.beq(LEN, ZERO, "copied");
    a.lbu(T0, 0, CURSOR);
    a.sb(T0, 0, T2);
    a.mul(HASH, HASH, FACTOR);
    a.add(HASH, HASH, T0);
    a.addi(CURSOR, CURSOR, 1);
    a.addi(T2, T2, 1);
    a.addi(LEN, LEN, -1);
    a.j("copy");
    a.label("copied");
    a.lw(T0, LONGEST_NAME.into(), SP);
    a.li(T1, CANARY);
    a.bne(T0, T1, "smashed");
    a.mul(DIGEST, DIGEST, FACTOR);
    a.add(DIGEST, DIGEST, HASH);
    a.lw(RA, 40, SP);
    a.addi(SP, SP, 48);
    a.ret();

    a.label("smashed");
    ring(a, Bell::Smashed);
    a.j("end");

    asm.finish()
}
