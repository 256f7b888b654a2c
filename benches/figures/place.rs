//! Where figures of files are measured: in memory and on a disk, each in a directory of its own. Must not know what is measured.
//!
//! Memory is `/dev/shm`; the disk is the directory in `OFFSHOOT_STORE_DIR`, else the system's for temporary files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::options::Effort;
use super::report::{Outcome, Report, Skip};

/// A directory that goes with its value.
pub struct Place {
    /// What rows call it.
    pub name: &'static str,
    path: PathBuf,
}

impl Place {
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn new(name: &'static str, parent: &Path) -> Result<Self, Skip> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("offshoot-figures-{}-{serial}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self { name, path })
    }

    /// In memory.
    pub fn memory() -> Result<Self, Skip> {
        let path = Path::new("/dev/shm");
        if !path.is_dir() {
            return Err(Skip::new("tmpfs: there is no /dev/shm"));
        }
        Self::new("tmpfs", path)
    }

    fn disk() -> Result<Self, Skip> {
        let parent = std::env::var_os("OFFSHOOT_STORE_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        if is_memory(&parent) {
            return Err(Skip::new(format!(
                "disk: {} is in memory: name another in OFFSHOOT_STORE_DIR",
                parent.display()
            )));
        }
        Self::new("disk", &parent)
    }
}

#[cfg(target_os = "linux")]
fn is_memory(path: &Path) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type as u64 == TMPFS)
}

#[cfg(not(target_os = "linux"))]
fn is_memory(_: &Path) -> bool {
    false
}

impl Drop for Place {
    fn drop(&mut self) {
        // Left behind, it is a temporary file like any other.
        std::fs::remove_dir_all(&self.path).ok();
    }
}

/// Measures in memory, then on the disk. What cannot be measured in one is said, and the other goes on.
pub fn everywhere(
    effort: &Effort,
    report: &mut Report,
    measure: fn(&Effort, &mut Report, &Place) -> Outcome,
) -> Outcome {
    for place in [Place::memory(), Place::disk()] {
        if let Err(skip) = place.and_then(|place| measure(effort, report, &place)) {
            report.skipped(&skip);
        }
    }
    Ok(())
}
