//! What must hold after every step: contents, counts and the engine's own invariants.

use std::collections::BTreeSet;

use super::io::capacity;
use super::{Contents, DISKS, HIGH, HIGH_PAGES, LOW_PAGES, Machine, PAGE, Ways, World};
use offshoot::Usage;
use offshoot::backing::Backing;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, GuestAddress, Lba};
use offshoot::testing::Flat;

/// Compares without printing kilobytes.
#[track_caller]
pub fn same(what: &str, flat: &Flat, found: &[u8]) {
    if flat.bytes()[..found.len()] != *found {
        let at = flat.bytes().iter().zip(found).position(|(a, b)| a != b);
        panic!("{what} differs from the model at byte {at:#x?}");
    }
}

/// `settled` is what the space was when nothing of it was private.
fn check_usage(usage: Usage, now: &Flat, origin: Option<&Flat>, settled: Option<&Flat>) {
    let total = now.geometry().pages();
    let sum = usage.private.get() + usage.shared.get() + usage.zero.get();
    assert_eq!(sum, total.get(), "private + shared + zero: {usage:?}");
    assert!(usage.zero.get() <= now.zero_pages(), "only {} pages are zero: {usage:?}", now.zero_pages());
    if let (Some(origin), Some(settled)) = (origin, settled) {
        let must = now.changed(origin).pages().filter(|page| !now.is_zero(*page)).count() as u64;
        let may = now.touched(settled).count().get();
        assert!((must..=may).contains(&usage.private.get()), "from {must} to {may} pages are private: {usage:?}");
    }
}

impl<B: Backing> Machine<B> {
    /// All contents of this VM, its counts and its invariants.
    pub fn check(&self) {
        assert_eq!(self.vm.status(), self.status);
        if self.status != offshoot::VmStatus::Frozen {
            assert_eq!(self.guest.register, self.now.register);
        }
        for (start, pages, at) in [(0, LOW_PAGES, 0), (HIGH, HIGH_PAGES, LOW_PAGES * PAGE)] {
            let mut found = vec![0xa5; (pages * PAGE) as usize];
            self.vm.ram().read(GuestAddress::new(start), &mut found).expect("all of a region is RAM");
            assert!(found == self.now.ram.read(ByteOffset::new(at), pages * PAGE), "RAM at {start:#x} differs");
        }
        for (disk, name) in DISKS.into_iter().enumerate() {
            let mut found = vec![0xa5; (capacity(disk) * 512) as usize];
            let handle = self.vm.disk(name).expect("every VM has both disks");
            handle.read(Lba::ZERO, &mut found).expect("all of a disk can be read");
            same(name, &self.now.disks[disk], &found);
            let was = self.origin.as_ref().map(|origin| &origin.at.disks[disk]);
            let settled = self.settled.as_ref().map(|settled| &settled.disks[disk]);
            check_usage(handle.usage().expect("usage"), &self.now.disks[disk], was, settled);
            if let Some(was) = was {
                let dirty = handle.dirty().expect("dirty");
                // Pages that stayed private when a layer could not be laid over them count as written.
                let since = settled.unwrap_or(was);
                let (must, may) = (self.now.disks[disk].changed(was), self.now.disks[disk].touched(since));
                assert!(must.pages().all(|page| dirty.contains(page)), "{dirty:?} must name {must:?}");
                assert!(dirty.pages().all(|page| may.contains(page)), "{dirty:?} names more than {may:?}");
            }
        }
        let was = self.origin.as_ref().map(|origin| &origin.at.ram);
        check_usage(
            self.vm.ram().usage().expect("usage"),
            &self.now.ram,
            was,
            self.settled.as_ref().map(|settled| &settled.ram),
        );
        if let Some(was) = was {
            let (dirty, must) = (self.vm.ram().space().dirty().expect("dirty"), self.now.ram.changed(was));
            assert!(must.pages().all(|page| dirty.contains(page)), "{dirty:?} must name {must:?}");
        }
        self.vm.validate().unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

impl<B: Ways> World<B> {
    /// The totals of the tree are what is alive.
    pub fn check_books(&self) {
        let usage = self.tree.usage();
        assert_eq!(usage.vms, self.vms.len() as u64);
        let named = self.points.iter().map(|point| point.known.id);
        let lain_on = self.vms.iter().filter_map(|vm| vm.origin.as_ref().map(|origin| origin.id));
        let points: BTreeSet<_> = named.chain(lain_on).collect();
        assert_eq!(usage.fork_points, points.len() as u64, "fork points that somebody names");
    }

    /// Every byte of every VM and fork point.
    pub fn check_all(&self) {
        self.vms.iter().for_each(Machine::check);
        for point in &self.points {
            let Contents { ram, disks, register } = &point.known.at;
            let image = point.point.ram();
            let mut found = vec![0xa5; image.len().get() as usize];
            Source::read(image, ByteOffset::ZERO, &mut found).expect("an image can be read");
            same("a fork point's RAM", ram, &found);
            for (disk, name) in DISKS.into_iter().enumerate() {
                let mut found = vec![0xa5; (capacity(disk) * 512) as usize];
                point.point.disk(name).expect("both disks").read(Lba::ZERO, &mut found).expect("an image can be read");
                same("a fork point's disk", &disks[disk], &found);
            }
            assert_eq!(*point.point.device_state().encode(), register.to_le_bytes());
            point.point.validate().unwrap_or_else(|wrong| panic!("{wrong}"));
        }
        let generations: BTreeSet<_> = self.vms.iter().map(|vm| vm.vm.identity().generation).collect();
        assert_eq!(generations.len(), self.vms.len(), "no two VMs are of one generation");
    }
}
