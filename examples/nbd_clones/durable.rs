//! Clones that last: one image in a clone store, a clone of it for each export, and what was flushed still there after a kill.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use offshoot::SpaceError;
use offshoot::backing::{Backing, FileImage};
use offshoot::disk::{Access, Disk};
use offshoot::frontend::nbd::Export;
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, SECTOR_SIZE, SectorCount};
use offshoot::store::{CloneError, CloneName, CloneStore, Job, StoreOptions};

use crate::client::Client;
use crate::serve::{BLANK, BLOCK, block, name};

/// What all clones begin with, where the caller has no image.
struct Blank;

impl Source for Blank {
    fn len(&self) -> ByteSize {
        BLANK
    }

    fn read(&self, _: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        buf.fill(0);
        Ok(())
    }

    fn next_data(&self, _: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        Ok(None)
    }
}

/// An export for each clone, made of the image where it is not in the store yet. The image is copied into the store once, the first time.
pub fn exports(dir: &Path, image: Option<&Path>, clones: u32) -> Result<Vec<Export>, Box<dyn Error>> {
    let store = CloneStore::open(dir, StoreOptions::default())?;
    let golden = CloneName::new("image")?;
    if is_new(&store, &golden)? {
        match image {
            Some(path) => store.create_image(&golden, &FileImage::open(path, None)?, &Job::new())?,
            None => store.create_image(&golden, &Blank, &Job::new())?,
        }
    }
    let export = |clone: u32| {
        let clone = CloneName::new(name(clone))?;
        if is_new(&store, &clone)? {
            store.clone_disk(&golden, &clone)?;
        }
        // The store stays open for as long as any of its disks is.
        let durable = store.open_disk(&clone)?;
        let sectors = SectorCount::new(Backing::geometry(&durable).len().get() / SECTOR_SIZE);
        let disk = Disk::over(durable, sectors, Access::ReadWrite)?;
        Ok(Export::new(Arc::new(disk)).described(format!("disk {clone} of the store"))?)
    };
    (0..clones).map(export).collect()
}

fn is_new(store: &CloneStore, name: &CloneName) -> Result<bool, CloneError> {
    match store.info(name) {
        Ok(_) => Ok(false),
        Err(CloneError::Unknown { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

/// This program again, serving the store until it is killed.
struct Serving(Child);

impl Serving {
    fn start(dir: &Path, image: Option<&Path>, clones: u32, socket: &Path) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--until-eof").arg("--store").arg(dir).arg("--socket").arg(socket);
        command.arg("--clones").arg(clones.to_string());
        if let Some(image) = image {
            command.arg("--image").arg(image);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = child.stdout.take().ok_or("its output is a pipe")?;
        let serving = Self(child);
        match BufReader::new(said).lines().next() {
            Some(Ok(_)) => Ok(serving),
            _ => Err("the server did not start".into()),
        }
    }

    fn kill(mut self) -> Result<(), Box<dyn Error>> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Ends as it should: when its input does.
    fn end(mut self) -> Result<(), Box<dyn Error>> {
        drop(self.0.stdin.take());
        if self.0.wait()?.success() { Ok(()) } else { Err("the server did not end well".into()) }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended: then there is nothing to kill.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Writes to each clone over NBD and flushes, kills the server, starts it again, and reads everything back.
pub fn check(dir: &Path, image: Option<&Path>, clones: u32, socket: &Path) -> Result<(), Box<dyn Error>> {
    let serving = Serving::start(dir, image, clones, socket)?;
    let mut wants = Vec::new();
    for clone in 0..clones {
        let mut client = Client::open(socket, &name(clone), &[])?;
        let len = client.size.min(4 * u64::from(BLOCK)) as u32;
        let mut want = client.read(0, len)?;
        let at = (clone % 3 * BLOCK) as usize;
        if want.len() < at + BLOCK as usize {
            return Err(format!("{} is too short to be checked", name(clone)).into());
        }
        // Not what an earlier check has left there.
        let fresh = block(clone + u32::from(want[at] == block(clone)[0]));
        client.write(at as u64, &fresh)?;
        client.flush()?;
        want[at..at + BLOCK as usize].copy_from_slice(&fresh);
        wants.push(want);
    }
    serving.kill()?;
    let serving = Serving::start(dir, image, clones, socket)?;
    for (clone, want) in (0..clones).zip(&wants) {
        let mut client = Client::open(socket, &name(clone), &[])?;
        if client.read(0, want.len() as u32)? != *want {
            return Err(format!("{} does not hold what was flushed before the server was killed", name(clone)).into());
        }
        client.disconnect()?;
    }
    serving.end()?;
    if socket.exists() {
        return Err("the socket file was left behind".into());
    }
    println!("{clones} clones checked: each holds what was flushed to it, after its server was killed");
    Ok(())
}
