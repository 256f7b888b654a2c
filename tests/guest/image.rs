//! The builder: the same bytes each time, drivers in an order that loads, and archives and disks that other people's tools read.

use std::fs;
use std::process::Command;

use crate::boot::{Scratch, tools};
use crate::guest_image::program;

#[test]
fn two_builds_are_the_same_bytes_and_other_tools_read_them() {
    let Some(tools) = tools() else { return };
    let scratch = Scratch::new("image");
    let one = tools.build(&scratch.path().join("one")).unwrap();
    let two = tools.build(&scratch.path().join("two")).unwrap();
    for (a, b) in [(&one.kernel, &two.kernel), (&one.initramfs, &two.initramfs), (&one.disk, &two.disk)] {
        assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} differs between builds", a.display());
    }

    let listed = Command::new("cpio").args(["-t", "--quiet"]).stdin(fs::File::open(&one.initramfs).unwrap()).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    for path in ["init", "bin/busybox", "dev/console", "modules/order"] {
        assert!(listed.lines().any(|line| line == path), "{path} is not in the initramfs:\n{listed}");
    }
    let position = |name: &str| listed.lines().position(|line| line.ends_with(name));
    if let (Some(needed), Some(needs)) = (position("/virtio_ring.ko"), position("/virtio_blk.ko")) {
        assert!(needed < needs, "a module comes after those it needs:\n{listed}");
    }

    let checked = Command::new(program("e2fsck").unwrap()).arg("-fn").arg(&one.disk).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}
