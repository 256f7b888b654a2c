//! The recording folder: what every handle sees is what was written last; what is durable is worked out from the log.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::content::Content;
use super::log::{Log, Op};
use crate::page::{ByteOffset, ByteSize};
use crate::store::{Folder, Medium, Sharing};

/// How a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// `EIO`. A sync that fails so drops what it did not write: later ones succeed without it, as fsync(2) may.
    Io,
    /// `ENOSPC`.
    NoSpace,
    /// `ENOSPC`, after the first half of what was to be written, in whole sectors.
    Short,
}

/// A folder of files in memory that records every call.
#[derive(Clone, Default, Debug)]
pub struct Recorder(Arc<Mutex<State>>);

#[derive(Default, Debug)]
pub(super) struct State {
    pub(super) files: Vec<Content>,
    pub(super) names: BTreeMap<String, usize>,
    log: Log,
    fault: Option<(u64, Fault)>,
    calls: u64,
    locks: BTreeMap<usize, Held>,
    /// Counts the processes that were killed: what one of them held, nobody holds.
    process: u64,
}

/// Who holds a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Held {
    Alone,
    By(u32),
}

impl Recorder {
    /// An empty folder.
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder as a power cut left it, with nothing in its log.
    pub(super) fn of(files: Vec<Content>, names: BTreeMap<String, usize>) -> Self {
        let log = Log::starting_from(files.clone(), names.clone());
        Self(Arc::new(Mutex::new(State { files, names, log, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As what `DiskDir::over` takes.
    pub fn folder(&self) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }

    /// Everything that was done.
    pub fn log(&self) -> Log {
        self.state().log.clone()
    }

    /// Where the log ends now.
    pub fn position(&self) -> usize {
        self.state().log.len()
    }

    /// Makes the `n`-th call from now on (from 1) that changes something fail; 0 for none. Starts [`Recorder::calls`] from 0.
    pub fn fail_nth(&self, n: u64, how: Fault) {
        let mut state = self.state();
        (state.fault, state.calls) = ((n > 0).then_some((n, how)), 0);
    }

    /// Calls that change something since [`Recorder::fail_nth`].
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// The process that used the folder is gone, with all the locks that it had.
    pub fn process_died(&self) {
        let mut state = self.state();
        state.locks.clear();
        state.process += 1;
    }

    /// Flips one bit of a file's content, as rot does; says whether there is such a bit.
    pub fn flip(&self, name: &str, at: ByteOffset, bit: u32) -> bool {
        let mut state = self.state();
        let Some(file) = state.names.get(name).copied() else { return false };
        let mut byte = [0];
        if state.files[file].read(at.get(), &mut byte).is_none() {
            return false;
        }
        state.files[file].write(at.get(), &[byte[0] ^ 1 << bit]);
        true
    }

    /// The content of a file.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let content = &state.files[*state.names.get(name)?];
        let mut bytes = vec![0; content.len as usize];
        content.read(0, &mut bytes)?;
        Some(bytes)
    }

    /// Puts a file there, whole and durable.
    pub fn place(&self, name: &str, bytes: &[u8]) {
        self.place_parts(name, &[(ByteOffset::ZERO, bytes)]);
    }

    /// Puts a file there, whole and durable, that has these parts and holes between them.
    pub fn place_parts(&self, name: &str, parts: &[(ByteOffset, &[u8])]) {
        let mut state = self.state();
        let file = state.files.len();
        let mut content = Content::default();
        for (start, bytes) in parts {
            for (at, page) in (start.get()..).step_by(4096).zip(bytes.chunks(4096)) {
                content.write(at, page);
            }
        }
        state.files.push(content);
        state.names.insert(name.into(), file);
        let (files, names) = (state.files.clone(), state.names.clone());
        state.log = Log::starting_from(files, names);
    }
}

impl State {
    /// Holds a file, if nobody else is in the way.
    fn lock(&mut self, file: usize, sharing: Sharing) -> io::Result<()> {
        let held = match (self.locks.get(&file), sharing) {
            (None, Sharing::Alone) => Held::Alone,
            (None, Sharing::Readers) => Held::By(1),
            (Some(Held::By(readers)), Sharing::Readers) => Held::By(readers + 1),
            _ => return Err(io::ErrorKind::WouldBlock.into()),
        };
        self.locks.insert(file, held);
        Ok(())
    }

    fn unlock(&mut self, file: usize) {
        match self.locks.get_mut(&file) {
            Some(Held::By(readers)) if *readers > 1 => *readers -= 1,
            _ => drop(self.locks.remove(&file)),
        }
    }

    /// One call: counted, and failed if it is its turn.
    fn turn(&mut self) -> Option<Fault> {
        self.calls += 1;
        match self.fault {
            Some((n, how)) if n == self.calls => Some(how),
            _ => None,
        }
    }
}

fn refused(how: Fault) -> io::Error {
    match how {
        Fault::Io => io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()),
        Fault::NoSpace | Fault::Short => io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()),
    }
}

/// An open file.
#[derive(Debug)]
struct Handle {
    folder: Recorder,
    file: usize,
    process: u64,
    is_shared: AtomicBool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.folder.state();
        if state.process == self.process {
            state.unlock(self.file);
        }
    }
}

impl Folder for Recorder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let mut state = self.state();
        if let Some(how) = state.turn() {
            return Err(refused(how));
        }
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.files.len();
        state.files.push(Content::default());
        state.names.insert(name.into(), file);
        state.log.push(Op::Create { name: name.into(), file });
        state.lock(file, Sharing::Alone)?;
        let process = state.process;
        Ok(Arc::new(Handle { folder: self.clone(), file, process, is_shared: AtomicBool::new(false) }))
    }

    fn open(&self, name: &str, sharing: Sharing) -> io::Result<Arc<dyn Medium>> {
        let mut state = self.state();
        let file = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        state.lock(file, sharing)?;
        let (process, is_shared) = (state.process, AtomicBool::new(sharing == Sharing::Readers));
        Ok(Arc::new(Handle { folder: self.clone(), file, process, is_shared }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        if let Some(how) = state.turn() {
            return Err(refused(how));
        }
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.into(), file);
        state.log.push(Op::Rename { from: from.into(), to: to.into(), file });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        if let Some(how) = state.turn() {
            return Err(refused(how));
        }
        state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.log.push(Op::Remove { name: name.into() });
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state();
        if let Some(how) = state.turn() {
            // Names that were not made durable stay so: nothing tells the caller which.
            return Err(refused(how));
        }
        state.log.push(Op::SyncNames);
        Ok(())
    }
}

impl Medium for Handle {
    fn len(&self) -> io::Result<ByteSize> {
        Ok(ByteSize::new(self.folder.state().files[self.file].len))
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> io::Result<()> {
        let state = self.folder.state();
        state.files[self.file].read(at.get(), buf).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn write_at(&self, at: ByteOffset, data: &[u8]) -> io::Result<()> {
        let mut state = self.folder.state();
        let fault = state.turn();
        let take = match fault {
            Some(Fault::Short) => data.len() / 2 / 512 * 512,
            Some(_) => 0,
            None => data.len(),
        };
        if take > 0 {
            state.files[self.file].write(at.get(), &data[..take]);
            state.log.push(Op::Write { file: self.file, at: at.get(), data: data[..take].into() });
        }
        fault.map_or(Ok(()), |how| Err(refused(how)))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.folder.state();
        if let Some(how) = state.turn() {
            state.log.push(Op::FailedSync { file: self.file });
            return Err(refused(how));
        }
        state.log.push(Op::Sync { file: self.file });
        Ok(())
    }

    fn punch(&self, at: ByteOffset, len: ByteSize) -> io::Result<()> {
        let mut state = self.folder.state();
        if let Some(how) = state.turn() {
            return Err(refused(how));
        }
        state.files[self.file].punch(at.get(), len.get());
        state.log.push(Op::Punch { file: self.file, at: at.get(), len: len.get() });
        Ok(())
    }

    fn set_len(&self, len: ByteSize) -> io::Result<()> {
        let mut state = self.folder.state();
        if let Some(how) = state.turn() {
            return Err(refused(how));
        }
        state.files[self.file].set_len(len.get());
        state.log.push(Op::SetLen { file: self.file, len: len.get() });
        Ok(())
    }

    fn allocated(&self) -> io::Result<ByteSize> {
        Ok(ByteSize::new(self.folder.state().files[self.file].allocated()))
    }

    fn forget_cached(&self, _: ByteSize) -> io::Result<()> {
        let mut state = self.folder.state();
        if let Some(content) = state.log.after_forgetting(self.file) {
            state.log.push(Op::Forget { file: self.file });
            state.files[self.file] = content;
        }
        Ok(())
    }

    fn share(&self) -> io::Result<()> {
        let mut state = self.folder.state();
        if state.process == self.process && !self.is_shared.swap(true, Ordering::Relaxed) {
            state.locks.insert(self.file, Held::By(1));
        }
        Ok(())
    }
}
