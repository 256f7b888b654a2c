//! A folder that kills its process before the n-th call that changes something, as SIGKILL may at any time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use offshoot::page::{ByteOffset, ByteSize};
use offshoot::store::{Folder, Medium, Sharing};

/// Kills the process before the n-th call that changes something.
#[derive(Debug)]
pub struct Fuse {
    pub left: AtomicU64,
}

impl Fuse {
    fn burn(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::KILL).expect("we may kill ourselves");
            loop {
                std::thread::park();
            }
        }
    }
}

#[derive(Debug)]
pub struct Killing {
    pub inner: Arc<dyn Folder>,
    pub fuse: Arc<Fuse>,
}

#[derive(Debug)]
struct File(Arc<dyn Medium>, Arc<Fuse>);

impl Folder for Killing {
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        self.fuse.burn();
        Ok(Arc::new(File(self.inner.create(name)?, self.fuse.clone())))
    }
    fn open(&self, name: &str, sharing: Sharing) -> io::Result<Arc<dyn Medium>> {
        Ok(Arc::new(File(self.inner.open(name, sharing)?, self.fuse.clone())))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.fuse.burn();
        self.inner.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.fuse.burn();
        self.inner.remove(name)
    }
    fn names(&self) -> io::Result<Vec<String>> {
        self.inner.names()
    }
    fn sync(&self) -> io::Result<()> {
        self.fuse.burn();
        self.inner.sync()
    }
}

impl Medium for File {
    fn len(&self) -> io::Result<ByteSize> {
        self.0.len()
    }
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(at, buf)
    }
    fn write_at(&self, at: ByteOffset, data: &[u8]) -> io::Result<()> {
        self.1.burn();
        self.0.write_at(at, data)
    }
    fn sync(&self) -> io::Result<()> {
        self.1.burn();
        self.0.sync()
    }
    fn punch(&self, at: ByteOffset, len: ByteSize) -> io::Result<()> {
        self.1.burn();
        self.0.punch(at, len)
    }
    fn set_len(&self, len: ByteSize) -> io::Result<()> {
        self.1.burn();
        self.0.set_len(len)
    }
    fn allocated(&self) -> io::Result<ByteSize> {
        self.0.allocated()
    }
    fn forget_cached(&self, len: ByteSize) -> io::Result<()> {
        self.0.forget_cached(len)
    }
    fn share(&self) -> io::Result<()> {
        self.0.share()
    }
}
