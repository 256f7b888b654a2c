//! One small enum per family of operations. A message says what was wrong, which limit it met and what to do.

use std::sync::Arc;
use std::time::Duration;

use crate::admission::AdmissionError;
use crate::page::{ByteOffset, ByteSize, GeometryError, PageCount, PageIndex, PageSize};

/// What can go wrong with a space (a VM's RAM, or one disk) and its pages. The space is as it was before the call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// A range or a size that cannot be.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// There is no room in this process or on this host for one more memory file.
    #[error(transparent)]
    Refused(#[from] AdmissionError),
    /// The limit on heap pages of this fork tree.
    #[error("the limit of {limit} on the heap is reached: drop clones or fork points, or raise Limits::heap_pages")]
    HeapLimit {
        /// The limit.
        limit: PageCount,
    },
    /// The limit on kernel mappings.
    #[error(
        "{needed} kernel mappings needed, {limit} allowed ({name}): merge or flatten the fork point, or raise the limit"
    )]
    MappingLimit {
        /// How many the operation needs.
        needed: u64,
        /// The limit.
        limit: u64,
        /// Its name.
        name: &'static str,
    },
    /// The limit on layers of an image.
    #[error(
        "an image of {layers} layers, {limit} allowed: wait for the merges that earlier forks put off (ForkPoint::teardown), merge or \
         flatten a fork point, or raise Limits::layers_per_image"
    )]
    LayerLimit {
        /// How many the new image would have.
        layers: u32,
        /// The limit.
        limit: u32,
    },
    /// Too many forks between a VM and its first ancestor.
    #[error("fork depth {depth} is at the limit of {limit}: flatten the fork point, or raise Limits::depth")]
    DepthLimit {
        /// The depth the new fork point would have.
        depth: u32,
        /// The limit.
        limit: u32,
    },
    /// This backing does not have this page size.
    #[error("pages of {} are not supported by {backing}: use {instead}", .size.bytes())]
    PageSize {
        /// What was asked for.
        size: PageSize,
        /// Who refused.
        backing: &'static str,
        /// What to use.
        instead: &'static str,
    },
    /// Somebody held a view of the space for too long.
    #[error("a view of this space was still held after {waited:?}: drop every view in Guest::pause")]
    Busy {
        /// How long the call waited.
        waited: Duration,
    },
    /// The addresses that RAM was to go to are taken.
    #[error("something else of this process is mapped in the hole that RAM was to go to: take another hole")]
    HoleTaken,
    /// RAM is not moved while a lease of vm-memory, or memory made of one, has its addresses: it would go on writing to the old ones.
    #[error(
        "vm-memory has the addresses of RAM: drop every lease of it, and all memory made of them, before it is moved"
    )]
    Leased,
    /// The hole is not as long as the space.
    #[error("a hole of {hole} cannot take a space of {space}: pick one of the space's length")]
    HoleLength {
        /// The length of the hole.
        hole: ByteSize,
        /// The length of the space.
        space: ByteSize,
    },
    /// The image below failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// A file of a durable disk failed, or is not what it must be.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Two images or spaces that are not relatives, or not of one shape.
    #[error("{0}")]
    Unrelated(&'static str),
}

/// What can go wrong with a base image.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It is not as long as it must be.
    #[error("image holds {found}, {declared} declared: declare what it holds, or restore the file")]
    TooShort {
        /// What was declared or needed.
        declared: ByteSize,
        /// What is there.
        found: ByteSize,
    },
    /// It became shorter while it was open.
    #[error("image shrank from {opened} to {now} while open: nothing may write to a base image")]
    Shrank {
        /// Its length when it was opened.
        opened: ByteSize,
        /// Its length now.
        now: ByteSize,
    },
    /// It could not be opened or read.
    #[error("image could not be read: {0}")]
    Io(#[source] Arc<std::io::Error>),
}

/// What can go wrong with the files of a durable disk. `file` is a name within the disk's directory.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system is full, or a quota is.
    #[error("{file}: {call}: no space left: free some and try again, what was acknowledged is safe")]
    NoSpace {
        /// The file.
        file: Arc<str>,
        /// What was being done.
        call: &'static str,
    },
    /// The medium or the system refused.
    #[error("{file}: {call}: {error}")]
    Io {
        /// The file.
        file: Arc<str>,
        /// What was being done.
        call: &'static str,
        /// What the system said.
        error: Arc<std::io::Error>,
    },
    /// A sync failed earlier. What was written since the last good one may be lost whatever later syncs say.
    #[error(
        "{file}: a sync failed, nothing written since the last good flush is durable: drop the disk and open it again"
    )]
    SyncFailed {
        /// The file.
        file: Arc<str>,
    },
    /// Somebody else has it open.
    #[error("{file} is in use by somebody else, in this process or another: close it there first")]
    InUse {
        /// The file.
        file: Arc<str>,
    },
    /// It is not there.
    #[error("{file} is missing: restore it, or delete what depends on it")]
    Missing {
        /// The file.
        file: Arc<str>,
    },
    /// It is there already.
    #[error("{file} exists already: pick another name")]
    Exists {
        /// The file.
        file: Arc<str>,
    },
    /// Its metadata are not what was written.
    #[error("{file} is damaged at byte {at}: {what}: restore it from a copy, or repair it")]
    Damaged {
        /// The file.
        file: Arc<str>,
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: ByteOffset,
    },
    /// A page of a sealed layer does not match its checksum.
    #[error("page {page} of {file} does not match its checksum: restore the layer from a copy")]
    DamagedPage {
        /// The layer's file.
        file: Arc<str>,
        /// The page of the disk.
        page: PageIndex,
    },
    /// It was marked as corrupt: it can be read, and not written.
    #[error("{file} is marked as corrupt: open it read-only and copy what is needed, or repair it")]
    MarkedCorrupt {
        /// The file.
        file: Arc<str>,
    },
    /// A newer version wrote it, with something that this one does not know.
    #[error("{file} uses version {version}, features {features:#x}, which this version cannot {what}: use a newer one")]
    Unknown {
        /// The file.
        file: Arc<str>,
        /// Its version.
        version: u32,
        /// The feature bits that are not known.
        features: u64,
        /// `read` or `write`.
        what: &'static str,
    },
    /// A number in it is over a limit.
    #[error("{file}: {found} {what}, the limit is {limit}")]
    Limit {
        /// The file.
        file: Arc<str>,
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },
    /// The layers under this disk are being merged already.
    #[error("the layers under this disk are being merged already: wait for that to end, or cancel it")]
    Restacking,
    /// Somebody stopped the call: see [`Job`](crate::store::Job).
    #[error("cancelled: nothing has changed")]
    Cancelled,
    /// The layers do not fit together.
    #[error("{file}: {what}")]
    Chain {
        /// The file.
        file: Arc<str>,
        /// What does not fit.
        what: &'static str,
    },
}

/// A system call that the engine needs was refused. `call` names it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SystemError {
    /// The host, the cgroup or the address space has no room.
    #[error("{call}: out of memory: drop clones, give the host more, or raise the cgroup's or RLIMIT_AS limit")]
    OutOfMemory {
        /// The call.
        call: &'static str,
    },
    /// Too many mappings in this process.
    #[error(
        "{call}: this process holds {held} memory mappings and may have {limit} (sysctl vm.max_map_count): drop clones, merge or \
         flatten fork points, or raise it"
    )]
    OutOfMappings {
        /// The call.
        call: &'static str,
        /// How many there are.
        held: u64,
        /// The limit.
        limit: u64,
    },
    /// Too many open descriptors in this process, or on this host.
    #[error("{call}: out of descriptors: drop fork points, or raise RLIMIT_NOFILE (fs.file-max for the whole host)")]
    OutOfDescriptors {
        /// The call.
        call: &'static str,
    },
    /// This kernel does not have it.
    #[error("{call} is not supported here: {why}")]
    Unsupported {
        /// The call.
        call: &'static str,
        /// What is missing.
        why: &'static str,
    },
    /// A step failed and so did undoing it: the content of this space can no longer be trusted.
    #[error("{call} failed while a failed step was undone ({error}): drop the VM that used this memory")]
    Lost {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        error: Arc<std::io::Error>,
    },
    /// A request that contradicts the state of an object of the engine's: please report it.
    #[error("refused: {0}")]
    Misuse(&'static str),
    /// Any other refusal.
    #[error("{call}: {error}")]
    Other {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        error: Arc<std::io::Error>,
    },
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
impl From<crate::sys::error::SysError> for SpaceError {
    fn from(error: crate::sys::error::SysError) -> Self {
        use crate::sys::error::SysError as Sys;
        let io = |errno: rustix::io::Errno| Arc::new(std::io::Error::from(errno));
        Self::System(match error {
            Sys::Range(geometry) => return Self::Geometry(geometry),
            Sys::OutOfMappings { call, held, limit } => SystemError::OutOfMappings { call: call.name(), held, limit },
            Sys::OutOfMemory { call, .. } => SystemError::OutOfMemory { call: call.name() },
            Sys::OutOfDescriptors { call, .. } => SystemError::OutOfDescriptors { call: call.name() },
            Sys::Unsupported { call, why } => SystemError::Unsupported { call: call.name(), why },
            Sys::Misuse(what) => SystemError::Misuse(what),
            Sys::RollbackFailed { call, errno } => SystemError::Lost { call: call.name(), error: io(errno) },
            Sys::Other { call, errno } => SystemError::Other { call: call.name(), error: io(errno) },
        })
    }
}
