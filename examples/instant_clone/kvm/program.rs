//! The guest in 64-bit x86 assembly, and the registers that it starts with. What it does, and why, is
//! in `guest.rs`.

use kvm_bindings::kvm_regs;
use offshoot::page::ByteSize;

use crate::common::long_mode;
use crate::common::x86::*;
use crate::guest::{Bell, CODE, Lane, PAGE, ROUND, RUN, SPREAD, TICK, control, record, stamp};

// What the guest keeps in registers all the time.
const CONTROL: Reg = EBX;
/// Steps completed; the VMM reads it from here.
const STEP: Reg = EBP;
const FIRST: Reg = R8;
const GAP: Reg = R9;
const MASK: Reg = R10;
const SLOT_MASK: Reg = R11;
const TAG: Reg = R12;
const INDEX: Reg = R13;
const LEFT: Reg = R14;
const SLOT: Reg = R15;

/// What the guest's page tables reach.
pub use crate::common::long_mode::MOST_RAM;

/// Code, and page tables that map all of RAM where it is.
pub fn firmware(ram: ByteSize) -> Vec<(u64, Vec<u8>)> {
    let mut pages = long_mode::page_tables(ram);
    pages.push((CODE / PAGE as u64, assemble()));
    pages
}

/// Registers of a vCPU that is about to start: it is told its control page, and all else is zero.
pub fn entry(lane: &Lane) -> kvm_regs {
    kvm_regs { rip: CODE, rbx: lane.control.get(), rflags: 2, ..Default::default() }
}

fn assemble() -> Vec<u8> {
    let mut asm = Assembler::default();
    let a = &mut asm;

    a.load(FIRST, CONTROL, control::FIRST);
    a.load(GAP, CONTROL, control::GAP);
    a.load(MASK, CONTROL, control::MASK);
    a.load(SLOT_MASK, CONTROL, control::SLOT_MASK);

    a.label("step"); // who am I?
    a.load(EAX, CONTROL, control::TAG);
    a.cmp(EAX, TAG);
    a.jne("identity");

    a.label("visit"); // edi = number of the next page, rsi = its address, ecx = its count
    a.mov(EDI, INDEX);
    a.shr(EDI, RUN.ilog2() as u8);
    a.imul(EDI, GAP);
    a.mov(EAX, INDEX);
    a.and_with(EAX, RUN as u8 - 1);
    a.add(EDI, EAX);
    a.add(EDI, FIRST);
    a.mov(ESI, EDI);
    a.shl_64(ESI, 12);
    a.load(ECX, ESI, stamp::COUNT);
    a.load(EAX, ESI, stamp::PAGE); // untouched?
    a.or_from(EAX, ESI, stamp::CHECK);
    a.or_from(EAX, ESI, stamp::LAST_WORD);
    a.je("write");
    a.load(EAX, ESI, stamp::PAGE); // or stamped by me or an ancestor, whole?
    a.cmp(EAX, EDI);
    a.jne("broken");
    a.xor_from(EAX, ESI, stamp::TAG);
    a.xor(EAX, ECX);
    a.xor_from(EAX, ESI, stamp::STEP);
    a.not(EAX);
    a.cmp_from(EAX, ESI, stamp::CHECK);
    a.jne("broken");
    a.cmp_from(EAX, ESI, stamp::LAST_WORD);
    a.jne("broken");

    a.label("write");
    a.inc(ECX);
    a.store(EDI, ESI, stamp::PAGE);
    a.store(TAG, ESI, stamp::TAG);
    a.store(ECX, ESI, stamp::COUNT);
    a.test_with(STEP, TICK - 1);
    a.jne("go on");
    a.out(Bell::Tick as u8); // half written
    a.label("go on");
    a.store(STEP, ESI, stamp::STEP);
    a.xor(ECX, EDI);
    a.xor(ECX, TAG);
    a.xor(ECX, STEP);
    a.not(ECX);
    a.store(ECX, ESI, stamp::CHECK);
    a.store(ECX, ESI, stamp::LAST_WORD);
    a.inc(INDEX);
    a.and(INDEX, MASK);
    a.inc(STEP);
    a.dec(LEFT);
    a.jne("step");

    // The round is over: a record of it goes to the disk.
    a.load(EAX, CONTROL, control::LBA_GAP);
    a.imul(EAX, SLOT);
    a.add_from(EAX, CONTROL, control::LBA_FIRST); // eax = sector
    a.inc(SLOT);
    a.and(SLOT, SLOT_MASK);
    a.store(TAG, CONTROL, control::BUFFER + record::TAG);
    a.store(STEP, CONTROL, control::BUFFER + record::STEP);
    a.store(EAX, CONTROL, control::BUFFER + record::LBA);
    a.store(EAX, CONTROL, control::REQUEST_LBA);
    a.store(STEP, CONTROL, control::REQUEST_STEP);
    a.xor(EAX, TAG);
    a.xor(EAX, STEP);
    a.not(EAX);
    a.store(EAX, CONTROL, control::BUFFER + record::CHECK);
    a.out(Bell::Write as u8);
    a.mov_to(LEFT, ROUND);
    a.jmp("step");

    a.label("identity"); // eax = my new tag: start where it leads
    a.mov(TAG, EAX);
    a.imul_by(ECX, EAX, SPREAD);
    a.shr(ECX, 16);
    a.mov(INDEX, ECX);
    a.and(INDEX, MASK);
    a.mov(SLOT, ECX);
    a.and(SLOT, SLOT_MASK);
    a.mov_to(LEFT, ROUND);
    a.store(TAG, CONTROL, control::TAKEN_TAG);
    a.store(STEP, CONTROL, control::REQUEST_STEP);
    a.out(Bell::Hello as u8);
    a.jmp("visit");

    a.label("broken"); // edi = the page; there is nothing to go on with
    a.store(EDI, CONTROL, control::REQUEST_PAGE);
    a.store(STEP, CONTROL, control::REQUEST_STEP);
    a.out(Bell::Broken as u8);
    a.jmp("broken");

    asm.finish()
}
