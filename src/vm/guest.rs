//! What the embedder brings: a guest that can be paused, saved and resumed, and its opaque device state.
//!
//! The engine never looks into device state. Must not know how a fork uses these.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::backing::Deferred;
use crate::page::ByteSize;

/// A guest that stands still already: nothing executes while the call is under way, because the caller is what executes it, as in a
/// simulator of one thread. Carries the device state to be saved.
///
/// ```
/// # use offshoot::{*, backing::Heap, page::*, ram::*};
/// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
/// # let vm: Vm<Heap> = Vm::new(&Tree::default(), VmName::new("sim")?, layout, vec![])?;
/// # let registers = vec![0; 32];
/// vm.start()?;
/// let point = vm.fork(&mut AtRest(DeviceState::from_bytes(registers)))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct AtRest(pub DeviceState);

impl Guest for AtRest {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        Ok(self.0.clone())
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Rewind for AtRest {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        self.0 = state.clone();
        Ok(())
    }
}

/// Any error of the embedder's.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The embedder's running guest, as far as a fork needs it.
///
/// # Contract
/// - After `pause` returns `Ok`, no vCPU executes and no device writes guest memory or disks: in-flight I/O is drained. Memory
///   pinned by others (vhost, VFIO, io_uring buffers) must be drained too, or the guest must refuse to pause. Views of RAM
///   are dropped.
/// - After `pause` returns `Err`, the guest runs as before.
/// - `save` is called while paused and changes nothing.
/// - `resume` undoes `pause`.
pub trait Guest {
    /// Stops the vCPUs and drains I/O.
    ///
    /// # Errors
    /// Whatever keeps the guest from stopping; it then runs on.
    fn pause(&mut self) -> Result<(), BoxError>;

    /// The state of all vCPUs and devices.
    ///
    /// # Errors
    /// Whatever could not be read; the fork is undone and the guest resumed.
    fn save(&mut self) -> Result<DeviceState, BoxError>;

    /// The cut is made and cannot be undone any more; `resume` is next, unless the VM stays frozen or was paused before. Returns what
    /// still has the memory that was cut, such as another process that maps it: dropped with what the fork puts off, before the old view of
    /// RAM. For a guest that is more than one process; nothing unless overridden. Must not panic.
    fn committed(&mut self) -> Deferred {
        Deferred::default()
    }

    /// Runs on.
    ///
    /// # Errors
    /// Whatever keeps it from running; the VM is then [`VmStatus::Paused`](crate::VmStatus::Paused) and `resume` may be tried again.
    fn resume(&mut self) -> Result<(), BoxError>;
}

/// A guest whose state can be put back in place, for [`Vm::reset`](crate::Vm::reset).
pub trait Rewind: Guest {
    /// Loads what `save` gave. Called while paused.
    ///
    /// # Errors
    /// Whatever could not be loaded; the VM stays paused.
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError>;
}

/// Device state that the embedder keeps as a value of its own type rather than as bytes.
pub trait StateObject: Any + Send + Sync + fmt::Debug {
    /// The same state as bytes, for storing and for other machines.
    fn encode(&self) -> Vec<u8>;
}

/// vCPU and device state at a cut: opaque to the engine, shared by all clones, never changed.
///
/// ```
/// use offshoot::DeviceState;
/// let state = DeviceState::from_bytes(vec![1, 2, 3]);
/// assert_eq!(*state.clone().encode(), [1, 2, 3]);
/// ```
#[derive(Clone, Debug)]
pub struct DeviceState(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Bytes(Arc<[u8]>),
    Object(Arc<dyn StateObject>),
}

impl DeviceState {
    /// State that the embedder has encoded itself.
    pub fn from_bytes(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(Kind::Bytes(bytes.into()))
    }

    /// State kept as a value: a clone on this host then need not decode anything.
    pub fn from_object(object: Arc<impl StateObject>) -> Self {
        Self(Kind::Object(object))
    }

    /// The value, where it was made from one of this type.
    pub fn object<T: StateObject>(&self) -> Option<&T> {
        match &self.0 {
            Kind::Bytes(_) => None,
            Kind::Object(object) => {
                let any: &dyn Any = &**object;
                any.downcast_ref()
            }
        }
    }

    /// The state as bytes: the ones it was made from, or [`StateObject::encode`]. O(state).
    pub fn encode(&self) -> Arc<[u8]> {
        match &self.0 {
            Kind::Bytes(bytes) => bytes.clone(),
            Kind::Object(object) => object.encode().into(),
        }
    }

    /// Length where it is known without encoding.
    pub(crate) fn known_len(&self) -> Option<ByteSize> {
        match &self.0 {
            Kind::Bytes(bytes) => Some(ByteSize::new(bytes.len() as u64)),
            Kind::Object(_) => None,
        }
    }
}
