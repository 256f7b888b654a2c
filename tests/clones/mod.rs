//! A clone store beside flat copies of all its disks, and random operations on both.
#![allow(dead_code)] // Each test uses a part of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use offshoot::SpaceError;
use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, PageCount, PageIndex, PageRange};
use offshoot::store::{
    CloneError, CloneName, CloneStore, Durable, DurableImage, Folder, Health, Job, Kind, Problem, StoreOptions,
};
use offshoot::testing::{ByteSource, Dice};

pub const PAGE: usize = 4096;
/// Few names, so that they meet; and few pages, so that layers hide one another.
const NAMES: u64 = 6;
const PAGES: u64 = 24;

pub fn name(text: &str) -> CloneName {
    CloneName::new(text).expect("a good name")
}

pub fn size(pages: u64) -> ByteSize {
    ByteSize::new(pages * PAGE as u64)
}

/// A directory that goes with its owner.
pub struct Temp(pub PathBuf);

impl Temp {
    pub fn new(what: &str) -> Self {
        let path = std::env::temp_dir().join(format!("offshoot-clones-{what}-{}", std::process::id()));
        std::fs::remove_dir_all(&path).ok();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn files(&self, suffix: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.0).expect("the directory is there");
        let files = entries.map(|entry| entry.expect("it can be read").path());
        files.filter(|path| path.extension().is_some_and(|found| found == suffix)).collect()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// What a name holds, and what a reset brings back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flat {
    pub kind: Kind,
    pub now: Vec<u8>,
    pub origin: Vec<u8>,
}

pub type World = BTreeMap<CloneName, Flat>;

pub struct Player {
    pub store: CloneStore,
    pub world: World,
    /// The name that the last step wrote sectors of: those are not one change.
    pub wrote: Option<CloneName>,
}

pub fn read_disk(disk: &Durable) -> Vec<u8> {
    let mut bytes = vec![0xa5; Backing::geometry(disk).len().get() as usize];
    disk.read(ByteOffset::ZERO, &mut bytes).expect("it can be read");
    bytes
}

/// Everything that a store holds.
pub fn contents(store: &CloneStore) -> Result<BTreeMap<CloneName, (Kind, Vec<u8>)>, String> {
    let mut found = BTreeMap::new();
    for info in store.list().map_err(|error| error.to_string())? {
        if info.health != Health::Whole {
            return Err(format!("{} is {:?}", info.name, info.health));
        }
        let image = store.open_image(&info.name).map_err(|error| format!("{}: {error}", info.name))?;
        image.validate()?;
        let mut bytes = vec![0xa5; image.len().get() as usize];
        image.read(ByteOffset::ZERO, &mut bytes).map_err(|error| format!("{}: {error}", info.name))?;
        found.insert(info.name, (info.kind, bytes));
    }
    Ok(found)
}

pub fn of_world(world: &World) -> BTreeMap<CloneName, (Kind, Vec<u8>)> {
    world.iter().map(|(name, flat)| (name.clone(), (flat.kind, flat.now.clone()))).collect()
}

/// A pool of the calling thread alone: states are checked by the hundred thousand, and a change of threads for each layer of each would be most of it.
pub fn threads() -> &'static rayon::ThreadPool {
    thread_local! {
        static POOL: &'static rayon::ThreadPool = {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
            Box::leak(Box::new(pool.build().expect("a pool")))
        };
    }
    POOL.with(|pool| *pool)
}

pub fn problems(store: &CloneStore) -> Vec<Problem> {
    store.check(threads(), &Job::new()).expect("a check works")
}

/// What a guest does in the middle of a call on its disk's layers: at one of the call's reports it writes a page, and may flush and fork.
struct Guest<'a> {
    disk: &'a Durable,
    page: usize,
    bytes: Vec<u8>,
    turn: u64,
    /// So many forks, if fewer than 6; with the last image of the odd ones kept.
    forks: u64,
    flushes: bool,
    calls: AtomicU64,
    done: Mutex<Result<(), SpaceError>>,
    kept: Mutex<Vec<DurableImage>>,
}

impl Guest<'_> {
    fn turn(&self) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let done = if call == self.turn {
            self.act()
        } else if call > self.turn && call <= self.forks && self.forks < 6 {
            self.fork()
        } else {
            return;
        };
        let mut first = self.done.lock().expect("nobody panics");
        if first.is_ok() {
            *first = done;
        }
    }

    fn act(&self) -> Result<(), SpaceError> {
        self.disk.write(ByteOffset::new((self.page * PAGE) as u64), &self.bytes)?;
        if self.bytes[0] == 0 && self.bytes[PAGE - 1] == 0 {
            self.disk.zero(PageRange::one(PageIndex::new(self.page as u64)))?;
        }
        if self.flushes {
            self.disk.flush()?;
        }
        self.fork()
    }

    fn fork(&self) -> Result<(), SpaceError> {
        if (1..6).contains(&self.forks) {
            let (image, deferred) = self.disk.cut()?.commit();
            drop(deferred);
            if self.forks % 2 == 1 {
                self.kept.lock().expect("nobody panics").push(image);
            }
        }
        Ok(())
    }
}

fn truncated(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len, 0);
    bytes
}

impl Player {
    pub fn over(folder: Arc<dyn Folder>) -> Self {
        Self {
            store: CloneStore::over(folder, StoreOptions::default()).expect("it opens"),
            world: World::new(),
            wrote: None,
        }
    }

    pub fn open(path: &Path) -> Self {
        Self {
            store: CloneStore::open(path, StoreOptions::default()).expect("it opens"),
            world: World::new(),
            wrote: None,
        }
    }

    fn pick(&self, dice: &mut Dice, which: impl Fn(&Flat) -> bool) -> Option<CloneName> {
        let names: Vec<_> = self.world.iter().filter(|(_, flat)| which(flat)).map(|(name, _)| name).collect();
        if names.is_empty() { None } else { Some(names[dice.below(names.len() as u64) as usize].clone()) }
    }

    /// A step of a random history: what it does to the world, and to the store. The world is changed only once the store says `Ok`.
    pub fn step(&mut self, dice: &mut Dice) -> Result<(), CloneError> {
        let mut after = self.world.clone();
        let done = self.try_step(dice, &mut after);
        if done.is_ok() {
            self.world = after;
        }
        done
    }

    /// As [`Player::step`], with the world as it would be whether or not it succeeds.
    pub fn try_step(&mut self, dice: &mut Dice, after: &mut World) -> Result<(), CloneError> {
        self.wrote = None;
        let free = name(&format!("n{}", dice.below(NAMES)));
        let any = self.pick(dice, |_| true);
        let Some(clone) = self.pick(dice, |flat| flat.kind == Kind::Clone) else {
            if after.contains_key(&free) {
                after.remove(&free);
                return self.store.delete(&free);
            }
            let blank = vec![0; PAGES as usize * PAGE];
            after.insert(free.clone(), Flat { kind: Kind::Clone, now: blank.clone(), origin: blank });
            return self.store.create_empty(&free, size(PAGES));
        };
        let any = any.expect("there is a clone");
        let taken = self.world.contains_key(&free);
        match dice.below(28) {
            0 if !taken => {
                let len = dice.below(PAGES * PAGE as u64) + 1;
                let mut bytes = dice.bytes(len);
                // Some of it sparse.
                let hole = dice.below(len) as usize;
                bytes[hole / 2..hole].fill(0);
                let now = truncated(&bytes, (len as usize).next_multiple_of(PAGE));
                after.insert(free.clone(), Flat { kind: Kind::Image, now: now.clone(), origin: now });
                self.store.create_image(&free, &ByteSource::new(bytes), &Job::new())
            }
            1..4 if !taken => {
                let now = self.world[&any].now.clone();
                let kind = if dice.below(3) == 0 { Kind::Image } else { Kind::Clone };
                after.insert(free.clone(), Flat { kind, now: now.clone(), origin: now });
                if kind == Kind::Image { self.store.snapshot(&any, &free) } else { self.store.clone_disk(&any, &free) }
            }
            4 | 5 => {
                after.remove(&any);
                self.store.delete(&any)
            }
            6 => {
                let flat = after.get_mut(&clone).expect("it is there");
                flat.now = flat.origin.clone();
                self.store.reset(&clone)
            }
            7 => {
                let flat = after.get_mut(&any).expect("it is there");
                flat.origin = flat.now.clone();
                self.store.flatten(&any, &Job::new())
            }
            8 | 9 => self.store.merge(&any, &Job::new()),
            10 => {
                let flat = after.get_mut(&clone).expect("it is there");
                flat.now = truncated(&flat.now, flat.now.len() + dice.below(3) as usize * PAGE);
                let len = flat.now.len() as u64;
                self.store.grow(&clone, ByteSize::new(len))
            }
            11 => self.rebase(&clone, &any, after),
            12 => self.commit(&any, &clone, after),
            13 => self.compare(&any, &clone),
            14 if !taken => {
                // A fork of an open disk: the image and the disk that goes on.
                let disk = self.store.open_disk(&clone)?;
                let now = self.world[&clone].now.clone();
                after.insert(free.clone(), Flat { kind: Kind::Image, now: now.clone(), origin: now });
                self.store.snapshot_open(&disk, &free)
            }
            15 if !taken => {
                let disk = self.store.open_disk(&clone)?;
                let (image, deferred) = disk.cut()?.commit();
                drop(deferred);
                let child = image.spawn()?;
                let mut now = self.world[&clone].now.clone();
                let origin = now.clone();
                let data = dice.bytes(PAGE as u64);
                child.write(ByteOffset::ZERO, &data)?;
                now[..PAGE].copy_from_slice(&data);
                after.insert(free.clone(), Flat { kind: Kind::Clone, now, origin });
                self.store.adopt(&child, &free)
            }
            16..22 => self.while_open(&clone, &any, dice, after),
            _ => self.write(&clone, dice, after),
        }
    }

    fn write(&mut self, clone: &CloneName, dice: &mut Dice, after: &mut World) -> Result<(), CloneError> {
        self.wrote = Some(clone.clone());
        let flat = after.get_mut(clone).expect("it is there");
        let disk = self.store.open_disk(clone)?;
        // One write for one flush: what a kill leaves is old or new, and nothing in between.
        {
            let sectors = flat.now.len() as u64 / 512;
            if dice.below(4) == 0 {
                let first = dice.below(sectors / 8);
                let count = dice.below((sectors / 8 - first).min(4)) + 1;
                disk.zero(PageRange::new(PageIndex::new(first), PageCount::new(count)).expect("it is small"))?;
                flat.now[first as usize * PAGE..(first + count) as usize * PAGE].fill(0);
            } else {
                let at = dice.below(sectors);
                let count = (dice.below(12) + 1).min(sectors - at);
                let data = dice.bytes(count * 512);
                disk.write(ByteOffset::new(at * 512), &data)?;
                flat.now[at as usize * 512..at as usize * 512 + data.len()].copy_from_slice(&data);
            }
        }
        Ok(disk.flush()?)
    }

    /// A clone is open, with some layers of its own, and its layers are merged under it. In the middle its guest writes, flushes and forks.
    fn while_open(
        &mut self,
        clone: &CloneName,
        other: &CloneName,
        dice: &mut Dice,
        after: &mut World,
    ) -> Result<(), CloneError> {
        self.wrote = Some(clone.clone());
        let disk = self.store.open_disk(clone)?;
        let mut now = self.world[clone].now.clone();
        let pages = now.len() / PAGE;
        let mut put = |page: usize, bytes: Vec<u8>| now[page * PAGE..(page + 1) * PAGE].copy_from_slice(&bytes);
        // Every sector changes once at most, so that what a cut leaves of it is old or new. The guest has the upper half.
        let early: Vec<(usize, Vec<u8>)> =
            (0..pages / 2).take(dice.below(4) as usize).map(|at| (at, dice.bytes(PAGE as u64))).collect();
        let guest = Guest {
            disk: &disk,
            page: pages / 2 + dice.below((pages - pages / 2) as u64) as usize,
            bytes: if dice.below(3) == 0 { vec![0; PAGE] } else { dice.bytes(PAGE as u64) },
            turn: dice.below(2),
            forks: dice.below(7),
            flushes: dice.below(2) == 0,
            calls: AtomicU64::new(0),
            done: Mutex::new(Ok(())),
            kept: Mutex::new(Vec::new()),
        };
        early.iter().for_each(|(page, bytes)| put(*page, bytes.clone()));
        let which = dice.below(4);
        let flat = after.get_mut(clone).expect("it is there");
        flat.now = now.clone();
        let longest = self.world[other].now.len() <= now.len();
        let target = self.pick(dice, |flat| flat.kind == Kind::Clone).filter(|target| target != clone);
        for (page, bytes) in &early {
            disk.write(ByteOffset::new((page * PAGE) as u64), bytes)?;
            drop(disk.cut()?.commit());
        }
        if which == 3 {
            let Some(target) = target else { return Ok(disk.flush()?) };
            let committed = after.get_mut(&target).expect("it is there");
            let kept = std::mem::replace(&mut committed.now, now);
            return match self.store.commit_open(&disk, &target) {
                Err(CloneError::Diverged { .. }) => {
                    committed.now = kept;
                    Ok(())
                }
                done => done,
            };
        }
        let origin = {
            let mut bytes = vec![0; now.len()];
            disk.origin().read(ByteOffset::ZERO, &mut bytes)?;
            bytes
        };
        // What it may have written if this fails.
        after.get_mut(clone).expect("it is there").now[guest.page * PAGE..(guest.page + 1) * PAGE]
            .copy_from_slice(&guest.bytes);
        let report = |_| guest.turn();
        let job = Job::new().report(&report);
        let done = match which {
            0 => self.store.flatten_open(&disk, &job),
            1 => self.store.merge_open(&disk, &job),
            _ if clone != other && longest => self.store.rebase_open(&disk, other, &job),
            _ => Ok(()),
        };
        let flat = after.get_mut(clone).expect("it is there");
        match which {
            0 => flat.origin = origin,
            2 if clone != other && longest => flat.origin = self.world[other].now.clone(),
            _ => {}
        }
        done?;
        std::mem::replace(&mut *guest.done.lock().expect("nobody panics"), Ok(()))?;
        if guest.calls.load(Ordering::Relaxed) <= guest.turn {
            flat.now = now;
        }
        assert!(read_disk(&disk) == flat.now, "{clone} reads something else after its layers were merged");
        disk.validate().expect("its tables agree");
        let forked = (1..6).contains(&guest.forks);
        drop(guest);
        disk.flush()?;
        if forked {
            // What a fork point held when the layers were given back goes with a repair.
            self.store.repair()?;
        }
        Ok(())
    }

    fn rebase(&mut self, clone: &CloneName, onto: &CloneName, after: &mut World) -> Result<(), CloneError> {
        let below = self.world[onto].now.clone();
        let flat = after.get_mut(clone).expect("it is there");
        if clone == onto {
            return Ok(());
        }
        if below.len() > flat.now.len() {
            let refused = self.store.rebase(clone, onto, &Job::new());
            assert!(matches!(
                refused,
                Err(CloneError::Length { .. } | CloneError::Catalogue { .. } | CloneError::Space(_))
            ));
            return refused
                .or_else(|error| if matches!(error, CloneError::Length { .. }) { Ok(()) } else { Err(error) });
        }
        flat.origin = below;
        self.store.rebase(clone, onto, &Job::new())
    }

    fn commit(&mut self, from: &CloneName, to: &CloneName, after: &mut World) -> Result<(), CloneError> {
        let now = self.world[from].now.clone();
        match self.store.commit(from, to) {
            // Whether it is legal depends on layers, which the model does not have: what it says is believed, and what it does is checked.
            Err(CloneError::Diverged { .. }) => Ok(()),
            Ok(()) => {
                after.get_mut(to).expect("it is there").now = now;
                Ok(())
            }
            Err(error) => {
                after.get_mut(to).expect("it is there").now = now;
                Err(error)
            }
        }
    }

    fn compare(&mut self, left: &CloneName, right: &CloneName) -> Result<(), CloneError> {
        let (a, b) = (&self.world[left].now, &self.world[right].now);
        let len = a.len().max(b.len());
        let (a, b) = (truncated(a, len), truncated(b, len));
        let expected: Vec<u64> = (0..len / PAGE)
            .filter(|page| a[page * PAGE..(page + 1) * PAGE] != b[page * PAGE..(page + 1) * PAGE])
            .map(|page| page as u64)
            .collect();
        let found: Vec<u64> = self.store.diff(left, right)?.pages().map(PageIndex::get).collect();
        assert_eq!(found, expected, "{left} and {right}");
        Ok(())
    }

    /// The store holds what the world says, and nothing is wrong with it but for what these histories may leave.
    pub fn verify(&self) {
        assert!(contents(&self.store).expect("it can be read") == of_world(&self.world));
        let wrong = problems(&self.store);
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}
