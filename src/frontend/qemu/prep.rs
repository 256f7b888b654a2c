//! A clone made its own before anyone can reach it: within a time, or not at all.
//!
//! Must not know how a clone is spawned: it is given one whose network cable is out, and the cable goes in when all is done.

use std::time::{Duration, Instant, SystemTime};

use super::agent::{AgentClient, AgentError, later};
use super::{AtBirth, LinkState, QemuClone, QemuError, QemuPoint, QemuVm};
use crate::{BoxError, Identity};

/// Why there is no clone. Whatever there was of it has been destroyed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepError {
    /// It could not be spawned, or connected afterwards.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// Its agent failed, or did not answer in time.
    #[error("the clone was destroyed: {0}")]
    Agent(#[from] AgentError),
    /// The customization failed.
    #[error("the clone was destroyed: its customization failed: {0}")]
    Customize(#[source] BoxError),
    /// It took too long.
    #[error("the clone was destroyed: it was not customized within {patience:?}")]
    Timeout {
        /// What it was given.
        patience: Duration,
    },
    /// A clone that shall be handed out paused cannot be asked anything.
    #[error("a clone is customized while it runs: have it run at birth, and stop it afterwards")]
    Paused,
}

/// A clone that nobody can reach yet.
#[derive(Debug)]
pub struct Prep<'a> {
    clone: &'a QemuVm,
    agent: AgentClient,
    spawned: Instant,
    end: Instant,
}

impl QemuPoint {
    /// Spawns a clone and customizes it through the agent in it, before its network cable is put in (if `clone.link` asks for that) and before it
    /// is handed out. All of it within `patience`: each question to the agent ends then.
    ///
    /// What needs no agent, such as writing to the clone's disk, can be done through [`Prep::vm`].
    ///
    /// # Errors
    /// [`PrepError`]. There is no clone then: its process is killed, its memory and overlays are given back. A panic in `customize` does the same.
    ///
    /// ```no_run
    /// # use offshoot::frontend::qemu::*;
    /// # use std::time::Duration;
    /// # fn example(point: &QemuPoint) -> Result<(), PrepError> {
    /// let clone = QemuClone { link: LinkState::Up, ..QemuClone::default() };
    /// let web = point.spawn_prepared(clone, Duration::from_secs(10), |prep| {
    ///     prep.reseeded()?;
    ///     prep.wall_clock()?;
    ///     prep.host_names()?;
    ///     prep.network("eth0", "10.0.0.17/24")?;
    ///     prep.ask(&["run", "5", "rm -f /etc/ssh/ssh_host_*"])?;
    ///     Ok(())
    /// })?;
    /// println!("{} can be reached", web.vm().identity().name);
    /// # Ok(())
    /// # }
    /// ```
    pub fn spawn_prepared(
        &self,
        clone: QemuClone,
        patience: Duration,
        customize: impl FnOnce(&mut Prep<'_>) -> Result<(), BoxError>,
    ) -> Result<QemuVm, PrepError> {
        if clone.at_birth == AtBirth::Paused {
            return Err(PrepError::Paused);
        }
        let link = clone.link;
        let spawned = Instant::now();
        let vm = self.spawn(QemuClone { link: LinkState::Down, ..clone })?;
        let agent = AgentClient::connect(&vm.agent_socket())?;
        let mut prep = Prep { clone: &vm, agent, spawned, end: later(spawned, patience) };
        let customized = customize(&mut prep);
        let over = Instant::now() >= prep.end;
        match customized {
            // Whatever error a step made of it: the time was over.
            Err(_) | Ok(()) if over => return Err(PrepError::Timeout { patience }),
            Err(error) => return Err(PrepError::Customize(error)),
            Ok(()) => {}
        }
        if link == LinkState::Up {
            vm.set_link(LinkState::Up)?;
        }
        Ok(vm)
    }
}

impl Prep<'_> {
    /// The clone, whose network cable is out.
    pub fn vm(&self) -> &QemuVm {
        self.clone
    }

    /// Who the clone is.
    pub fn identity(&self) -> &Identity {
        self.clone.vm().identity()
    }

    /// What is left of the time.
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Asks the agent, the command first, for no longer than what is left of the time.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn ask(&mut self, words: &[&str]) -> Result<String, AgentError> {
        let left = self.left();
        self.agent.ask(words, left)
    }

    /// Waits until the guest's kernel has logged that it reseeded its random numbers for this clone: at an instant since it was spawned. The log
    /// of a clone's clone has its parent's lines too, which are older.
    ///
    /// # Errors
    /// [`AgentError`]: a kernel without the driver (before 5.18) never says so, and the time ends.
    pub fn reseeded(&mut self) -> Result<(), AgentError> {
        loop {
            let said = self.ask(&["reseeds"])?;
            let malformed = || AgentError::Malformed(said.clone());
            let mut words = said.split(' ').skip(1).map(|word| word.parse().map(Duration::from_micros));
            let (Some(Ok(last)), Some(Ok(now))) = (words.next(), words.next()) else { return Err(malformed()) };
            if !last.is_zero() && now.saturating_sub(last) <= self.spawned.elapsed() {
                return Ok(());
            }
            if self.left().is_zero() {
                return Err(AgentError::Timeout { command: "reseeds".into() });
            }
            // Each question leaves a line in the guest's log.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sets the guest's wall clock to the host's.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn wall_clock(&mut self) -> Result<(), AgentError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.ask(&["clock", &now.as_secs().to_string(), &now.subsec_nanos().to_string()]).map(drop)
    }

    /// Gives the guest the clone's name as host name, and its UUID as machine id.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn host_names(&mut self) -> Result<(), AgentError> {
        let name = self.identity().name.as_str().to_owned();
        let machine = self.identity().uuid.to_string().replace('-', "");
        self.ask(&["hostname", &name])?;
        self.ask(&["machine-id", &machine]).map(drop)
    }

    /// Gives this interface the clone's MAC address, which the loaded state has from the parent, and this address with its prefix length.
    ///
    /// # Errors
    /// [`AgentError`]; [`AgentError::Malformed`] if the guest then says it has another.
    pub fn network(&mut self, interface: &str, address: &str) -> Result<(), AgentError> {
        let mac = self.identity().mac.to_string();
        let said = self.ask(&["net", interface, &mac, address])?;
        let ours = said.split_once(' ').is_some_and(|(now, _)| now.eq_ignore_ascii_case(&mac));
        if ours { Ok(()) } else { Err(AgentError::Malformed(said)) }
    }
}
