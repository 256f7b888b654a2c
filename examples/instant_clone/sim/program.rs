//! The guest in RISC-V assembly. What it does, and why, is in `guest.rs`.

use rvsim::CpuState;

use crate::common::rv32::*;
use crate::guest::{Bell, CODE, Lane, ROUND, RUN, SPREAD, control, record, stamp};

// What the guest keeps in its saved registers.
const CONTROL: Reg = S0;
/// Steps completed; the VMM reads it from here.
pub const STEP: Reg = S1;
const TAG: Reg = S2;
const INDEX: Reg = S3;
const LEFT: Reg = S4;
const SLOT: Reg = S5;
const FIRST: Reg = S6;
const GAP: Reg = S7;
const MASK: Reg = S8;
const SPREADER: Reg = S9;
const SLOT_MASK: Reg = S10;
const PAGE_SIZE: Reg = S11;
/// The number of the bell, when the guest executes `ecall`.
pub const BELL: Reg = A7;

/// Registers of a vCPU that is about to start: it is told its control page, and all else is zero.
pub fn entry(lane: &Lane) -> CpuState {
    let mut state = CpuState::new(CODE as u32);
    state.x[CONTROL] = lane.control.get() as u32;
    state
}

/// The guest's code.
pub fn assemble() -> Vec<u8> {
    let mut asm = Assembler::default();
    let a = &mut asm;

    a.lw(FIRST, control::FIRST.into(), CONTROL);
    a.lw(GAP, control::GAP.into(), CONTROL);
    a.lw(MASK, control::MASK.into(), CONTROL);
    a.lw(SLOT_MASK, control::SLOT_MASK.into(), CONTROL);
    a.li(SPREADER, SPREAD);
    a.lui(PAGE_SIZE, 1);

    a.label("step"); // who am I?
    a.lw(T0, control::TAG.into(), CONTROL);
    a.bne(T0, TAG, "identity");

    a.label("visit"); // t1 = number of the next page, t2 = its address, t3 = its end
    a.srli(T1, INDEX, RUN.ilog2() as i32);
    a.mul(T1, T1, GAP);
    a.andi(T2, INDEX, RUN as i32 - 1);
    a.add(T1, T1, T2);
    a.add(T1, T1, FIRST);
    a.slli(T2, T1, 12);
    a.add(T3, T2, PAGE_SIZE);
    a.lw(A0, stamp::PAGE.into(), T2);
    a.lw(A1, stamp::TAG.into(), T2);
    a.lw(A2, stamp::COUNT.into(), T2);
    a.lw(A3, stamp::STEP.into(), T2);
    a.lw(A4, stamp::CHECK.into(), T2);
    a.lw(A5, i32::from(stamp::LAST_WORD) - 4096, T3);
    a.or(T4, A0, A4); // untouched?
    a.or(T4, T4, A5);
    a.beq(T4, ZERO, "write");
    a.bne(A0, T1, "broken"); // or stamped by me or an ancestor, whole?
    a.xor(T4, A0, A1);
    a.xor(T4, T4, A2);
    a.xor(T4, T4, A3);
    a.not(T4, T4);
    a.bne(T4, A4, "broken");
    a.bne(T4, A5, "broken");

    a.label("write");
    a.addi(A2, A2, 1);
    a.xor(T4, T1, TAG);
    a.xor(T4, T4, A2);
    a.xor(T4, T4, STEP);
    a.not(T4, T4);
    a.sw(T1, stamp::PAGE.into(), T2);
    a.sw(TAG, stamp::TAG.into(), T2);
    a.sw(A2, stamp::COUNT.into(), T2);
    a.sw(STEP, stamp::STEP.into(), T2);
    a.sw(T4, stamp::CHECK.into(), T2);
    a.sw(T4, i32::from(stamp::LAST_WORD) - 4096, T3);
    a.addi(INDEX, INDEX, 1);
    a.and(INDEX, INDEX, MASK);
    a.addi(STEP, STEP, 1);
    a.addi(LEFT, LEFT, -1);
    a.bne(LEFT, ZERO, "step");

    // The round is over: a record of it goes to the disk.
    a.lw(T0, control::LBA_GAP.into(), CONTROL);
    a.mul(T0, T0, SLOT);
    a.lw(T1, control::LBA_FIRST.into(), CONTROL);
    a.add(T0, T0, T1); // t0 = sector
    a.addi(SLOT, SLOT, 1);
    a.and(SLOT, SLOT, SLOT_MASK);
    a.xor(T1, TAG, STEP);
    a.xor(T1, T1, T0);
    a.not(T1, T1);
    a.addi(T2, CONTROL, control::BUFFER.into());
    a.sw(TAG, record::TAG.into(), T2);
    a.sw(STEP, record::STEP.into(), T2);
    a.sw(T0, record::LBA.into(), T2);
    a.sw(T1, record::CHECK.into(), T2);
    a.sw(T0, control::REQUEST_LBA.into(), CONTROL);
    a.sw(STEP, control::REQUEST_STEP.into(), CONTROL);
    a.li(BELL, Bell::Write as u32);
    a.ecall();
    a.li(LEFT, ROUND);
    a.j("step");

    a.label("identity"); // t0 = my new tag: start where it leads
    a.mv(TAG, T0);
    a.mul(T1, T0, SPREADER);
    a.srli(T1, T1, 16);
    a.and(INDEX, T1, MASK);
    a.and(SLOT, T1, SLOT_MASK);
    a.li(LEFT, ROUND);
    a.sw(TAG, control::TAKEN_TAG.into(), CONTROL);
    a.sw(STEP, control::REQUEST_STEP.into(), CONTROL);
    a.li(BELL, Bell::Hello as u32);
    a.ecall();
    a.j("visit");

    a.label("broken"); // t1 = the page; there is nothing to go on with
    a.sw(T1, control::REQUEST_PAGE.into(), CONTROL);
    a.sw(STEP, control::REQUEST_STEP.into(), CONTROL);
    a.li(BELL, Bell::Broken as u32);
    a.ecall();
    a.j("broken");

    asm.finish()
}
