//! A guest of one sector that counts, and how to look at it: what the tests of real QEMU processes share.
#![allow(dead_code)] // Not every test uses all of it.

use std::process::Command;
use std::time::{Duration, Instant};

use offshoot::disk::{Access, Disk};
use offshoot::frontend::qemu::*;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, GuestAddress, Lba, SectorCount};
use offshoot::{DiskName, Tree, VmName, VmStatus};

/// What the firmware boots: counts at 0x500; writes each count to one of 64 pages, to sector 1 of the disk, and its low byte to the
/// serial port, in this order.
pub const COUNTING: &[u8] = &[
    0xfa, // cli
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // mov ds, ax; mov es, ax; mov ss, ax
    0xbc, 0x00, 0x7c, // mov sp, 0x7c00
    0xfc, 0xfb, // cld; sti
    0x66, 0xc7, 0x06, 0x00, 0x05, 0x00, 0x00, 0x00, 0x00, // mov dword [0x500], 0
    0x66, 0xff, 0x06, 0x00, 0x05, // again: inc dword [0x500]
    0x66, 0xa1, 0x00, 0x05, // mov eax, [0x500]
    0x66, 0xa3, 0x00, 0x08, // mov [0x800], eax
    0x66, 0x89, 0xc3, // mov ebx, eax
    0x83, 0xe3, 0x3f, // and bx, 63
    0xc1, 0xe3, 0x08, // shl bx, 8
    0x81, 0xc3, 0x00, 0x20, // add bx, 0x2000
    0x8e, 0xc3, // mov es, bx
    0x26, 0x66, 0xa3, 0x00, 0x00, // mov es:[0], eax
    0x31, 0xdb, 0x8e, 0xc3, // xor bx, bx; mov es, bx
    0xbe, 0x4f, 0x7c, // mov si, packet
    0xb8, 0x00, 0x43, 0xb2, 0x80, // mov ax, 0x4300; mov dl, 0x80
    0xcd, 0x13, // int 0x13: writes the sector at 0x800 to the disk
    0xa0, 0x00, 0x05, // mov al, [0x500]
    0xba, 0xf8, 0x03, 0xee, // mov dx, 0x3f8; out dx, al
    0xeb, 0xc8, // jmp again
    0x10, 0x00, 0x01, 0x00, 0x00, 0x08, 0x00, 0x00, // packet: 16 bytes, one sector from 0:0x800
    0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // to sector 1
];
pub const COUNT: u64 = 0x500;
pub const PAGES: u64 = 0x20000;
/// Nothing takes so long on a machine that works, be it slow.
pub const LONG: Duration = Duration::from_secs(120);

pub fn qemu_is_here() -> bool {
    match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(_) => true,
        Err(error) => {
            let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
            assert!(!required, "OFFSHOOT_REQUIRE=all, but QEMU is missing: {error}");
            eprintln!("SKIPPED: no qemu-system-x86_64: {error}");
            false
        }
    }
}

/// The guest uses one processor. With two QEMU's translator keeps the barriers between the guest and its devices' thread.
pub fn spec() -> QemuSpec {
    QemuSpec { cpus: 2, ..QemuSpec::new(ByteSize::mib(32)) }
}

pub fn parent(tree: &Tree, spec: QemuSpec) -> Result<QemuVm, QemuError> {
    QemuVm::launch(tree, VmName::new("vm").unwrap(), spec, disks(tree), None)
}

pub fn running(tree: &Tree) -> QemuVm {
    let vm = parent(tree, spec()).unwrap();
    reaches(&vm, 100);
    vm
}

pub fn word(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes)
}

pub fn count(vm: &QemuVm) -> u32 {
    let mut bytes = [0; 4];
    vm.read_ram(GuestAddress::new(COUNT), &mut bytes).unwrap();
    word(bytes)
}

/// Waits until the guest has counted so far.
pub fn reaches(vm: &QemuVm, to: u32) {
    let begun = Instant::now();
    while count(vm) < to {
        if let Some(end) = vm.ended() {
            panic!("QEMU has ended: {end}");
        }
        assert!(begun.elapsed() < LONG, "the guest stands still at {}", count(vm));
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn on_disk(disk: &Disk) -> u32 {
    let mut sector = [0; 512];
    disk.read(Lba::new(1), &mut sector).unwrap();
    word(sector[..4].try_into().unwrap())
}

/// RAM and disk are of one instant: the disk has this count or the one before, and each page the last count that went there.
pub fn assert_one_instant(count: u32, disk: u32, page: impl Fn(u64, &mut [u8])) {
    assert!(disk == count || disk + 1 == count, "RAM has {count}, the disk {disk}");
    for at in 0..64_u32 {
        let mut bytes = [0; 4];
        page(PAGES + u64::from(at) * 4096, &mut bytes);
        let last = count - (count - at) % 64;
        // The count may be there before its page is.
        let before = last.saturating_sub(64);
        let found = word(bytes);
        assert!(found == last || last == count && found == before, "page {at} has {found} at {count}");
    }
}

pub fn check_point(point: &QemuPoint) -> u32 {
    let (ram, mut bytes) = (point.point().ram(), [0; 4]);
    ram.read(ByteOffset::new(COUNT), &mut bytes).unwrap();
    let disk = point.point().disk("root").unwrap().spawn().unwrap();
    assert_one_instant(word(bytes), on_disk(&disk), |at, buf| ram.read(ByteOffset::new(at), buf).unwrap());
    word(bytes)
}

/// A clone that stands still is at its parent's instant.
pub fn check_clone(clone: &QemuVm, at: u32) {
    assert_eq!((count(clone), clone.vm().status()), (at, VmStatus::Paused));
    let disk = on_disk(clone.vm().disk("root").unwrap());
    assert_one_instant(at, disk, |at, buf| clone.read_ram(GuestAddress::new(at), buf).unwrap());
}

pub fn paused() -> QemuClone {
    QemuClone { at_birth: AtBirth::Paused, ..QemuClone::default() }
}

/// A disk that boots the counting guest.
pub fn disks(tree: &Tree) -> Vec<(DiskName, Disk)> {
    let disk = Disk::blank(tree, SectorCount::new(2048), Access::ReadWrite).unwrap();
    let mut sector = [0; 512];
    sector[..COUNTING.len()].copy_from_slice(COUNTING);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write(Lba::new(0), &sector).unwrap();
    vec![(DiskName::new("root"), disk)]
}
