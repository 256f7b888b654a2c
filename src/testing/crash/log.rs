//! What was done, in order, and which states of it a power cut can leave.
//!
//! The rules: a sync of a file makes durable what was done to that file before it, a sync of the folder the names. Of everything else any
//! part may be durable: a write by sectors, all else as a whole, in the order in which it was done. A sync that failed makes what came
//! before it on that file optional for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::content::Content;
use super::recorder::Recorder;
use crate::testing::Dice;

/// One recorded call.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Create {
        name: String,
        file: usize,
    },
    Rename {
        from: String,
        to: String,
        file: usize,
    },
    Remove {
        name: String,
    },
    SyncNames,
    Write {
        file: usize,
        at: u64,
        data: Arc<[u8]>,
    },
    SetLen {
        file: usize,
        len: u64,
    },
    Punch {
        file: usize,
        at: u64,
        len: u64,
    },
    Sync {
        file: usize,
    },
    FailedSync {
        file: usize,
    },
    /// The system was asked to forget what it had of the file in memory: what a failed sync lost is gone for good.
    Forget {
        file: usize,
    },
    /// Taken out by a control run. Keeps its place, so that positions stay what they are.
    Nothing,
}

impl Op {
    fn file(&self) -> Option<usize> {
        match self {
            Self::Write { file, .. } | Self::SetLen { file, .. } | Self::Punch { file, .. } => Some(*file),
            _ => None,
        }
    }

    fn is_name(&self) -> bool {
        matches!(self, Self::Create { .. } | Self::Rename { .. } | Self::Remove { .. })
    }
}

/// The unit in which a write is torn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tearing {
    /// 512 bytes.
    Sectors,
    /// 4 KiB.
    Pages,
}

impl Tearing {
    const fn bytes(self) -> u64 {
        match self {
            Self::Sectors => 512,
            Self::Pages => 4096,
        }
    }
}

/// What a sync was for, for control runs that take it out.
#[derive(Clone, Debug)]
pub struct SyncOf {
    /// Its place in the log.
    pub position: usize,
    /// The file's name when it was created; `None` for the folder.
    pub file: Option<String>,
    /// Offsets of what was written, punched or set since the file's sync before.
    pub offsets: Vec<u64>,
}

/// A record of calls.
#[derive(Clone, Default, Debug)]
pub struct Log {
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    ops: Vec<Op>,
}

/// What is known to be durable at some point, and what may be.
#[derive(Clone, Default)]
struct Medium {
    base: BTreeMap<usize, Content>,
    names: BTreeMap<String, usize>,
    /// In order; the flag says that it is durable, and waits only for older ones that may not be.
    pending: Vec<(Op, Fate)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Durable after the next sync of its file.
    Pending,
    /// Perhaps durable, and nothing will change that.
    Lost,
    /// Durable.
    Durable,
}

impl Log {
    pub(super) fn starting_from(files: Vec<Content>, names: BTreeMap<String, usize>) -> Self {
        Self { files, names, ops: Vec::new() }
    }

    pub(super) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// How many calls.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether nothing was done.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The log without the syncs that `which` names: what would have been recorded, had they been forgotten.
    #[must_use]
    pub fn without_syncs(&self, mut which: impl FnMut(&SyncOf) -> bool) -> Self {
        let mut names: BTreeMap<usize, String> = self.names.iter().map(|(name, file)| (*file, name.clone())).collect();
        let mut since: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        let mut edited = self.clone();
        for (position, op) in edited.ops.iter_mut().enumerate() {
            let of = match op {
                Op::Create { name, file } => {
                    names.insert(*file, name.clone());
                    continue;
                }
                Op::Write { file, at, .. } | Op::Punch { file, at, .. } => {
                    since.entry(*file).or_default().push(*at);
                    continue;
                }
                Op::SetLen { file, len } => {
                    since.entry(*file).or_default().push(*len);
                    continue;
                }
                Op::Sync { file } => {
                    let offsets = since.remove(file).unwrap_or_default();
                    SyncOf { position, file: names.get(file).cloned(), offsets }
                }
                Op::SyncNames => SyncOf { position, file: None, offsets: Vec::new() },
                _ => continue,
            };
            if which(&of) {
                *op = Op::Nothing;
            }
        }
        edited
    }

    /// The log with every punch done before the sync that it came after: the order that a careless flush would have. Says how many were moved.
    #[must_use]
    pub fn punching_early(&self) -> (Self, usize) {
        let mut edited = self.clone();
        let mut moved = 0;
        for at in 0..edited.ops.len() {
            let Op::Punch { file: punched, .. } = edited.ops[at] else { continue };
            let before = edited.ops[..at].iter().rposition(|op| matches!(op, Op::Sync { file } if *file == punched));
            if let Some(sync) = before {
                edited.ops.swap(at, sync);
                moved += 1;
            }
        }
        (edited, moved)
    }

    /// The folder as it is with everything done: what a process finds that starts after another was killed.
    pub fn all_done(&self) -> Recorder {
        let mut medium = self.medium_at(self.ops.len());
        medium.pending.iter_mut().for_each(|(_, fate)| *fate = Fate::Durable);
        medium.state(|_| true, Tearing::Pages)
    }

    /// What a file holds once what failed syncs have lost of it is forgotten, where there is any such thing.
    pub(super) fn after_forgetting(&self, file: usize) -> Option<Content> {
        let failed = self.ops.iter().any(|op| matches!(op, Op::FailedSync { file: of } if *of == file));
        failed.then(|| {
            let mut medium = self.medium_at(self.ops.len());
            medium.advance(&Op::Forget { file });
            let of_file = medium.pending.iter().filter(|(op, _)| op.file() == Some(file));
            let mut files = medium.base.clone();
            of_file.for_each(|(op, _)| apply(&mut files, &mut BTreeMap::new(), op, None));
            files.remove(&file).unwrap_or_default()
        })
    }

    fn medium_at(&self, position: usize) -> Medium {
        let base = self.files.iter().cloned().enumerate().collect();
        let mut medium = Medium { base, names: self.names.clone(), pending: Vec::new() };
        self.ops[..position].iter().for_each(|op| medium.advance(op));
        medium
    }

    /// States that a power cut can leave after the first `position` calls: all of them, where there are no more than `most`, else those
    /// where all, nothing, all but one or only one thing survived, and random ones up to `most`.
    pub fn states_at(
        &self,
        position: usize,
        tearing: Tearing,
        seed: u64,
        most: usize,
    ) -> impl Iterator<Item = Recorder> + use<> {
        let medium = self.medium_at(position);
        medium.states(tearing, seed, most)
    }

    /// [`Log::states_at`] for every position from `from` on, with the position: one walk along the log.
    pub fn all_states(
        &self,
        from: usize,
        tearing: Tearing,
        seed: u64,
        most: usize,
    ) -> impl Iterator<Item = (usize, Recorder)> + '_ {
        let mut medium = self.medium_at(from);
        (from..=self.ops.len()).flat_map(move |position| {
            if position > from {
                medium.advance(&self.ops[position - 1]);
            }
            medium.clone().states(tearing, seed ^ position as u64, most).map(move |state| (position, state))
        })
    }
}

impl Medium {
    fn advance(&mut self, op: &Op) {
        let settle = |pending: &mut Vec<(Op, Fate)>, which: &dyn Fn(&Op) -> bool, to: Fate| {
            pending
                .iter_mut()
                .filter(|(op, fate)| *fate == Fate::Pending && which(op))
                .for_each(|(_, fate)| *fate = to);
        };
        match op {
            Op::Nothing => {}
            Op::Sync { file } => settle(&mut self.pending, &|op| op.file() == Some(*file), Fate::Durable),
            Op::FailedSync { file } => settle(&mut self.pending, &|op| op.file() == Some(*file), Fate::Lost),
            Op::SyncNames => settle(&mut self.pending, &Op::is_name, Fate::Durable),
            Op::Forget { file } => {
                self.pending.retain(|(op, fate)| *fate != Fate::Lost || op.file() != Some(*file));
            }
            other => {
                self.pending.push((other.clone(), Fate::Pending));
                return;
            }
        }
        // What is durable, with nothing older of the same file that may not be, goes into the base.
        let mut doubtful: BTreeSet<Option<usize>> = BTreeSet::new();
        let mut kept = Vec::new();
        for (op, fate) in std::mem::take(&mut self.pending) {
            if fate == Fate::Durable && !doubtful.contains(&op.file()) {
                apply(&mut self.base, &mut self.names, &op, None);
            } else {
                doubtful.insert(op.file());
                kept.push((op, fate));
            }
        }
        self.pending = kept;
    }

    /// How many things may survive or not, each on its own.
    fn atoms(&self, tearing: Tearing) -> usize {
        let doubtful = self.pending.iter().filter(|(_, fate)| *fate != Fate::Durable);
        doubtful.map(|(op, _)| sectors(op, tearing)).sum()
    }

    fn states(self, tearing: Tearing, seed: u64, most: usize) -> impl Iterator<Item = Recorder> {
        let atoms = self.atoms(tearing);
        let exhaustive = atoms < usize::BITS as usize - 1 && 1usize << atoms <= most;
        let count = if exhaustive { 1 << atoms } else { most };
        let mut dice = Dice::new(seed);
        (0..count).map(move |n| {
            if exhaustive {
                return self.state(|atom| n >> atom & 1 == 1, tearing);
            }
            // The extremes first, then a mix with a density of its own.
            let odds = dice.below(16) + 1;
            let pick = dice.below(atoms as u64) as usize;
            let roll: Vec<bool> = (0..atoms)
                .map(|atom| match n % 8 {
                    _ if n == 0 => false,
                    _ if n == 1 => true,
                    2 => atom == pick,
                    3 => atom != pick,
                    // Everything up to some point, as a medium would that works in order.
                    4 => atom < pick,
                    5 => atom >= pick,
                    _ => dice.below(17) < odds,
                })
                .collect();
            self.state(|atom| roll[atom], tearing)
        })
    }

    fn state(&self, survives: impl Fn(usize) -> bool, tearing: Tearing) -> Recorder {
        let (mut files, mut names) = (self.base.clone(), self.names.clone());
        let mut atom = 0;
        for (op, fate) in &self.pending {
            if *fate == Fate::Durable {
                apply(&mut files, &mut names, op, None);
                continue;
            }
            let count = sectors(op, tearing);
            let part: Vec<bool> = (atom..atom + count).map(&survives).collect();
            atom += count;
            apply(&mut files, &mut names, op, Some((&part, tearing)));
        }
        let count = files.keys().chain(names.values()).max().map_or(0, |last| last + 1);
        let contents = (0..count).map(|file| files.remove(&file).unwrap_or_default()).collect();
        Recorder::of(contents, names)
    }
}

/// In how many pieces an operation may survive.
fn sectors(op: &Op, tearing: Tearing) -> usize {
    match op {
        Op::Write { at, data, .. } => {
            let unit = tearing.bytes();
            ((at + data.len() as u64).div_ceil(unit) - at / unit) as usize
        }
        _ => 1,
    }
}

/// Does an operation, or the part of it that survived.
fn apply(
    files: &mut BTreeMap<usize, Content>,
    names: &mut BTreeMap<String, usize>,
    op: &Op,
    part: Option<(&[bool], Tearing)>,
) {
    if let (Some((part, tearing)), Op::Write { file, at, data }) = (part, op) {
        let content = files.entry(*file).or_default();
        let unit = tearing.bytes();
        let end = at + data.len() as u64;
        for (n, _) in (0..).zip(part).filter(|(_, survived)| **survived) {
            let (from, to) = ((at / unit + n) * unit, (at / unit + n + 1) * unit);
            let (from, to) = (from.max(*at), to.min(end));
            content.write(from, &data[(from - at) as usize..(to - at) as usize]);
        }
        return;
    }
    if part.is_some_and(|(part, _)| !part[0]) {
        return;
    }
    match op {
        Op::Create { name, file } => drop(names.insert(name.clone(), *file)),
        Op::Rename { from, to, file } => {
            names.remove(from);
            names.insert(to.clone(), *file);
        }
        Op::Remove { name } => drop(names.remove(name)),
        Op::Write { file, at, data } => files.entry(*file).or_default().write(*at, data),
        Op::SetLen { file, len } => files.entry(*file).or_default().set_len(*len),
        Op::Punch { file, at, len } => files.entry(*file).or_default().punch(*at, *len),
        Op::SyncNames | Op::Sync { .. } | Op::FailedSync { .. } | Op::Forget { .. } | Op::Nothing => {}
    }
}
