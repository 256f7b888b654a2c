//! What the command line asks for. Must not know any figure.

use std::time::Duration;

/// How the rows are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// For people.
    Table,
    /// One object per line, for programs.
    Json,
    /// The figures' names only.
    List,
}

/// How much work a figure may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    scale: Scale,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scale {
    Quick,
    Full,
}

impl Effort {
    /// One of two values of anything: a size, a count.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        match self.scale {
            Scale::Quick => quick,
            Scale::Full => full,
        }
    }

    /// The most samples of one probe.
    pub fn samples(&self) -> usize {
        self.pick(300, 2000)
    }

    /// The most time that one probe's calls may take together, its set-up included.
    pub fn time_for_a_probe(&self) -> Duration {
        self.pick(Duration::from_millis(300), Duration::from_secs(3))
    }
}

/// The whole command line.
pub struct Options {
    pub mode: Mode,
    pub effort: Effort,
    pub name: String,
}

impl Options {
    /// # Errors
    /// What was not understood.
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self { mode: Mode::Table, effort: Effort { scale: Scale::Full }, name: String::new() };
        for arg in args {
            match arg.as_str() {
                "--json" => options.mode = Mode::Json,
                "--list" => options.mode = Mode::List,
                "--quick" => options.effort.scale = Scale::Quick,
                // Cargo says this to every bench.
                "--bench" => {}
                name if !name.starts_with('-') && options.name.is_empty() => options.name = arg,
                _ => return Err(format!("not understood: {arg}")),
            }
        }
        Ok(options)
    }
}
