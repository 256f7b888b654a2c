//! A guest of one register that holds the engine to its side of the [`Guest`] contract, and fails when it is told to.

use crate::vm::{BoxError, DeviceState, Guest, Rewind};

/// How a call of the embedder's goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// It returns an error.
    Error,
    /// It panics.
    Panic,
}

/// A guest whose whole device state is one number. It knows whether it runs, and panics where the engine calls out of turn: a
/// pause of a guest that stands, a save or load of one that runs, a resume of one that was not paused.
///
/// ```
/// use offshoot::testing::{ScriptedGuest, Trouble};
/// use offshoot::Guest;
/// let mut guest = ScriptedGuest::running(7);
/// guest.fail_nth_call(2, Trouble::Error);
/// guest.pause()?;
/// assert!(guest.save().is_err());
/// assert_eq!(*guest.save()?.encode(), 7u64.to_le_bytes());
/// # Ok::<(), offshoot::BoxError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ScriptedGuest {
    /// Its device state.
    pub register: u64,
    runs: bool,
    calls: u64,
    trouble: Option<(u64, Trouble)>,
}

/// What a scripted call fails with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the test told this call to fail")]
pub struct Scripted;

impl ScriptedGuest {
    /// A guest that executes.
    pub fn running(register: u64) -> Self {
        Self { register, runs: true, calls: 0, trouble: None }
    }

    /// A guest that stands still, as a clone's does.
    pub fn paused(register: u64) -> Self {
        Self { runs: false, ..Self::running(register) }
    }

    /// A guest loaded with what a fork point carries.
    ///
    /// # Panics
    /// If that was not saved by a guest of this type.
    pub fn loaded(state: &DeviceState) -> Self {
        Self::paused(decode(state))
    }

    /// Whether it executes.
    pub fn runs(&self) -> bool {
        self.runs
    }

    /// Says that the test itself has started or stopped it.
    pub fn set_runs(&mut self, runs: bool) {
        self.runs = runs;
    }

    /// Makes the `n`-th call from now on (from 1) fail once; 0 for none. Starts [`ScriptedGuest::calls_seen`] from 0.
    pub fn fail_nth_call(&mut self, n: u64, trouble: Trouble) {
        self.calls = 0;
        self.trouble = (n > 0).then_some((n, trouble));
    }

    /// How many calls there were since.
    pub fn calls_seen(&self) -> u64 {
        self.calls
    }

    /// Counts as one call: for hooks that are not the guest's, such as customization.
    ///
    /// # Errors
    /// [`Scripted`] when its turn has come.
    ///
    /// # Panics
    /// The same, as a [`Trouble::Panic`].
    pub fn call(&mut self) -> Result<(), BoxError> {
        self.calls += 1;
        match self.trouble {
            Some((n, Trouble::Error)) if n == self.calls => Err(Scripted.into()),
            Some((n, Trouble::Panic)) if n == self.calls => std::panic::panic_any(Scripted),
            _ => Ok(()),
        }
    }
}

fn decode(state: &DeviceState) -> u64 {
    let bytes = state.encode();
    u64::from_le_bytes((*bytes).try_into().expect("the state was saved by a ScriptedGuest"))
}

impl Guest for ScriptedGuest {
    fn pause(&mut self) -> Result<(), BoxError> {
        assert!(self.runs, "the engine paused a guest that stands still");
        self.call()?;
        self.runs = false;
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        assert!(!self.runs, "the engine saved a guest that runs");
        self.call()?;
        Ok(DeviceState::from_bytes(self.register.to_le_bytes()))
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        assert!(!self.runs, "the engine resumed a guest that runs");
        self.call()?;
        self.runs = true;
        Ok(())
    }
}

impl Rewind for ScriptedGuest {
    fn load(&mut self, state: &DeviceState) -> Result<(), BoxError> {
        assert!(!self.runs, "the engine loaded a guest that runs");
        self.call()?;
        self.register = decode(state);
        Ok(())
    }
}
