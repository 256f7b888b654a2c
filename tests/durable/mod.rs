//! Histories of durable disks over a recording folder, and what each power cut in them may leave.
//!
//! The rule that is checked, sector by sector: what was acknowledged is there, or something that was written later; nothing else. A disk
//! that was never acknowledged may be missing.
#![allow(dead_code)] // Each test uses a part of it.

use std::sync::Arc;

use offshoot::backing::{Backing, Cut, Sealed};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, Geometry, PageCount, PageIndex, PageRange, PageSize};
use offshoot::store::{DiskDir, DiskId, Durable, DurableImage};
use offshoot::testing::crash::{Log, Recorder, Tearing};
use offshoot::testing::{ByteSource, Dice};
use offshoot::{SpaceError, Tree};

pub const PAGE: u64 = 4096;
pub const SECTOR: usize = 512;

type Bytes = Arc<Vec<u8>>;

/// What a disk may hold, as time goes by.
#[derive(Clone, Default)]
pub struct Timeline {
    pub id: Option<DiskId>,
    /// What it holds from a position of the log on. A call counts from its start: a crash may come in the middle of it.
    versions: Vec<(usize, Bytes)>,
    /// A position of the log, and the version that is acknowledged from there on.
    acks: Vec<(usize, usize)>,
}

impl Timeline {
    fn now(&self) -> &Bytes {
        &self.versions[self.versions.len() - 1].1
    }

    /// The versions that a crash may leave, and whether the disk must be there.
    fn allowed(&self, position: usize) -> (bool, Vec<&Bytes>) {
        let ack = self.acks.iter().rev().find(|(at, _)| *at <= position);
        let first = ack.map_or(0, |(_, version)| *version);
        let known = self.versions.iter().take_while(|(at, _)| *at <= position).count();
        let versions = self.versions[first..known.max(first + 1)].iter().map(|(_, bytes)| bytes).collect();
        (ack.is_some(), versions)
    }

    fn check(&self, found: &[u8], versions: &[&Bytes]) -> Result<(), String> {
        if versions.iter().any(|version| ***version == found) {
            return Ok(());
        }
        for at in (0..found.len()).step_by(SECTOR) {
            let sector = at..at + SECTOR;
            if !versions.iter().any(|version| version[sector.clone()] == found[sector.clone()]) {
                return Err(format!("disk {:?}: sector {} holds what it never may", self.id, at / SECTOR));
            }
        }
        Ok(())
    }
}

struct Open {
    durable: Durable,
    timeline: usize,
    /// What a reset goes back to.
    origin: Bytes,
}

pub struct Player {
    pub recorder: Recorder,
    pub timelines: Vec<Timeline>,
    /// Where in the log disks were opened again after a kill.
    pub reopened: Vec<std::ops::Range<usize>>,
    tree: Tree,
    base: Option<Arc<dyn Source>>,
    pages: u64,
    dir: DiskDir,
    open: Vec<Open>,
    images: Vec<(DurableImage, Bytes)>,
}

pub fn read_all(disk: &Durable) -> Result<Vec<u8>, SpaceError> {
    let mut bytes = vec![0xa5; Backing::geometry(disk).len().get() as usize];
    disk.read(ByteOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

pub fn geometry(pages: u64) -> Geometry {
    Geometry::new(PageSize::KIB_4.size_of(PageCount::new(pages)), PageSize::KIB_4).expect("a small disk")
}

pub fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_bounds(PageIndex::new(first), PageIndex::new(first + count))
}

impl Player {
    /// A disk of so many pages, over a base that ends within one.
    pub fn new(pages: u64, base_len: Option<u64>) -> Self {
        let tree = Tree::default();
        let recorder = Recorder::new();
        let base_bytes = base_len.map(|len| Dice::new(len).bytes(len));
        let base = base_bytes.clone().map(|bytes| Arc::new(ByteSource::new(bytes)) as Arc<dyn Source>);
        let dir = DiskDir::over(recorder.folder(), &tree);
        let mut content = base_bytes.unwrap_or_default();
        content.resize((pages * PAGE) as usize, 0);
        let content = Arc::new(content);
        let mut timeline = Timeline { versions: vec![(0, content.clone())], ..Timeline::default() };
        let durable = dir.create(geometry(pages), base.clone()).expect("nothing fails yet");
        timeline.id = Some(durable.id());
        timeline.acks.push((recorder.position(), 0));
        let open = vec![Open { durable, timeline: 0, origin: content }];
        Self {
            recorder,
            timelines: vec![timeline],
            reopened: Vec::new(),
            tree,
            base,
            pages,
            dir,
            open,
            images: Vec::new(),
        }
    }

    pub fn disks(&self) -> usize {
        self.open.len()
    }

    pub fn disk(&self, at: usize) -> &Durable {
        &self.open[at].durable
    }

    fn timeline(&mut self, disk: usize) -> &mut Timeline {
        &mut self.timelines[self.open[disk].timeline]
    }

    /// A change that is about to be made; after it, whatever came of it, the model holds what the disk says, which must be the old or the new.
    fn change(&mut self, disk: usize, new: Vec<u8>, call: impl FnOnce(&Durable) -> Result<(), SpaceError>) -> bool {
        let position = self.recorder.position();
        let old = self.timeline(disk).now().clone();
        let new = Arc::new(new);
        self.timeline(disk).versions.push((position, new.clone()));
        let done = call(&self.open[disk].durable);
        let found = read_all(&self.open[disk].durable).expect("reads do not fail");
        match &done {
            Ok(()) => assert!(found == **new, "a call that succeeded did not do what it should"),
            Err(_) => {
                let timeline = &self.timelines[self.open[disk].timeline];
                timeline.check(&found, &[&old, &new]).expect("a call that failed did something else");
                let position = self.recorder.position();
                self.timeline(disk).versions.push((position, Arc::new(found)));
            }
        }
        self.open[disk].durable.validate().expect("the tables agree");
        done.is_ok()
    }

    pub fn write(&mut self, disk: usize, sector: u64, data: &[u8]) -> bool {
        let mut new = (**self.timeline(disk).now()).clone();
        let at = sector as usize * SECTOR;
        new[at..at + data.len()].copy_from_slice(data);
        self.change(disk, new, |disk| disk.write(ByteOffset::new(at as u64), data))
    }

    pub fn zero(&mut self, disk: usize, range: PageRange) -> bool {
        let mut new = (**self.timeline(disk).now()).clone();
        new[(range.start().get() * PAGE) as usize..(range.end().get() * PAGE) as usize].fill(0);
        self.change(disk, new, |disk| disk.zero(range))
    }

    pub fn reset(&mut self, disk: usize) -> bool {
        let new = (*self.open[disk].origin).clone();
        self.change(disk, new, |disk| disk.reset().map(drop))
    }

    pub fn flush(&mut self, disk: usize) -> Result<(), SpaceError> {
        self.open[disk].durable.flush()?;
        let position = self.recorder.position();
        let timeline = self.timeline(disk);
        timeline.acks.push((position, timeline.versions.len() - 1));
        Ok(())
    }

    /// Cuts; the image is kept.
    pub fn cut(&mut self, disk: usize) -> Result<(), SpaceError> {
        let content = self.timeline(disk).now().clone();
        let (image, deferred) = self.open[disk].durable.cut()?.commit();
        drop(deferred);
        let position = self.recorder.position();
        let timeline = self.timeline(disk);
        timeline.acks.push((position, timeline.versions.len() - 1));
        self.open[disk].origin = content.clone();
        self.images.push((image, content));
        Ok(())
    }

    pub fn roll_back(&mut self, disk: usize) {
        drop(self.open[disk].durable.cut());
    }

    pub fn images(&self) -> usize {
        self.images.len()
    }

    pub fn image(&self, at: usize) -> &DurableImage {
        &self.images[at].0
    }

    pub fn spawn(&mut self, image: usize) -> Result<usize, SpaceError> {
        let (image, content) = self.images[image].clone();
        let durable = image.spawn()?;
        let versions = vec![(self.recorder.position(), content.clone())];
        self.timelines.push(Timeline { id: Some(durable.id()), versions, acks: Vec::new() });
        self.open.push(Open { durable, timeline: self.timelines.len() - 1, origin: content });
        Ok(self.open.len() - 1)
    }

    /// Drops a disk; it is not seen again until the next kill.
    pub fn close(&mut self, disk: usize) {
        drop(self.open.swap_remove(disk));
    }

    /// SIGKILL: whatever the system has of the process's writes stays, nothing else. Then every acknowledged disk is opened again.
    pub fn kill(&mut self) {
        for open in self.open.drain(..) {
            // A process that was killed drops nothing.
            std::mem::forget(open.durable);
        }
        self.images.drain(..).for_each(|(image, _)| std::mem::forget(image));
        self.recorder.process_died();
        self.dir = DiskDir::over(self.recorder.folder(), &self.tree);
        let position = self.recorder.position();
        for at in 0..self.timelines.len() {
            let (must, versions) = self.timelines[at].allowed(position);
            let id = self.timelines[at].id.expect("set when it was made");
            let durable = match self.dir.open_disk(id, self.base.clone()) {
                Ok(durable) => durable,
                Err(error) => {
                    assert!(!must, "an acknowledged disk opens: {error}");
                    continue;
                }
            };
            let found = read_all(&durable).expect("and can be read");
            self.timelines[at].check(&found, &versions).expect("after a kill");
            let found = Arc::new(found);
            let position = self.recorder.position();
            let timeline = &mut self.timelines[at];
            timeline.versions.push((position, found.clone()));
            // What a disk shows when it is opened stays: a journal is replayed by it.
            timeline.acks.push((position, timeline.versions.len() - 1));
            // Where it lies on a layer of before, a reset goes back to that; asked rather than modelled.
            let mut origin = vec![0; found.len()];
            durable.origin().read(ByteOffset::ZERO, &mut origin).expect("the origin can be read");
            self.open.push(Open { durable, timeline: at, origin: Arc::new(origin) });
        }
        self.reopened.push(position..self.recorder.position());
    }

    /// A step of a random history.
    pub fn step(&mut self, dice: &mut Dice) {
        if self.open.is_empty() {
            return self.kill();
        }
        let disk = dice.below(self.open.len() as u64) as usize;
        let sectors = self.pages * 8;
        match dice.below(20) {
            0..8 => {
                let at = dice.below(sectors);
                let len = (dice.below(20) + 1).min(sectors - at);
                let data = dice.bytes(len * 512);
                self.write(disk, at, &data);
            }
            8..10 => {
                let at = dice.below(self.pages);
                let data = dice.bytes(PAGE);
                self.write(disk, at * 8, &data);
            }
            10..12 => {
                let first = dice.below(self.pages);
                self.zero(disk, pages(first, dice.below((self.pages - first).min(6)) + 1));
            }
            12..16 => self.flush(disk).expect("nothing fails"),
            16 => {
                self.cut(disk).expect("nothing fails");
                if self.images.len() > 3 {
                    self.images.remove(0);
                }
            }
            17 if !self.images.is_empty() && self.timelines.len() < 5 => {
                let image = dice.below(self.images.len() as u64) as usize;
                self.spawn(image).expect("nothing fails");
            }
            18 => {
                self.reset(disk);
            }
            _ => match dice.below(4) {
                0 => self.roll_back(disk),
                1 => self.kill(),
                _ => self.flush(disk).expect("nothing fails"),
            },
        }
    }

    /// A random history of so many steps.
    pub fn random(seed: u64, steps: u64) -> Self {
        let mut dice = Dice::new(seed);
        let base = [None, Some(9 * PAGE + 100), Some(40 * PAGE)][dice.below(3) as usize];
        let mut player = Self::new(40, base);
        (0..steps).for_each(|_| player.step(&mut dice));
        player
    }

    /// Whether this state is one that a cut at `position` may leave.
    pub fn check(&self, state: &Recorder, position: usize, depth: Depth) -> Result<(), String> {
        for timeline in &self.timelines {
            let (must, versions) = timeline.allowed(position);
            let Some(id) = timeline.id else { continue };
            let dir = DiskDir::over(state.folder(), &Tree::default());
            let disk = match dir.open_disk(id, self.base.clone()) {
                Ok(disk) => disk,
                Err(error) if must => return Err(format!("disk {id}, which was acknowledged: {error}")),
                Err(_) => continue,
            };
            let found = read_all(&disk).map_err(|error| format!("disk {id}: {error}"))?;
            timeline.check(&found, &versions)?;
            disk.validate()?;
            if depth == Depth::GoOn {
                go_on(&dir, disk, found, self.base.clone()).map_err(|error| format!("disk {id}, going on: {error}"))?;
            }
        }
        Ok(())
    }

    /// Checks states of the whole log, `most` at each position; says how many, or what is wrong with the first that is.
    pub fn check_all(&self, log: &Log, tearing: Tearing, seed: u64, most: usize) -> Result<u64, String> {
        let mut checked = 0;
        for (position, state) in log.all_states(0, tearing, seed, most) {
            let depth = if checked % 16 == 0 { Depth::GoOn } else { Depth::Open };
            self.check(&state, position, depth).map_err(|wrong| format!("cut after call {position}: {wrong}"))?;
            checked += 1;
        }
        Ok(checked)
    }
}

/// How far a state is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    Open,
    /// The disk is written, flushed, killed and opened again.
    GoOn,
}

fn go_on(dir: &DiskDir, disk: Durable, mut content: Vec<u8>, base: Option<Arc<dyn Source>>) -> Result<(), SpaceError> {
    let at = 3 * PAGE + 512;
    disk.write(ByteOffset::new(at), &[0x77; 1024])?;
    content[at as usize..at as usize + 1024].fill(0x77);
    disk.zero(pages(7, 2))?;
    content[7 * PAGE as usize..9 * PAGE as usize].fill(0);
    disk.flush()?;
    let id = disk.id();
    drop(disk);
    let again = dir.open_disk(id, base)?;
    assert!(read_all(&again)? == content, "a disk that went on after a crash lost what it flushed");
    Ok(())
}

/// So many times a hundred thousand states, in a soak; a few thousand otherwise.
pub fn wanted_states() -> u64 {
    match std::env::var("OFFSHOOT_SOAK").ok().and_then(|n| n.parse::<u64>().ok()) {
        Some(n) => n * 100_000,
        None => 2_500,
    }
}
