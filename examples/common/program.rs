//! What the programs of the examples have in common: the options that all of them take, where guests run, and how a run ends.
//!
//! It knows no guest, and of a report only that it can be printed.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use offshoot::BoxError;

use super::args::{Args, Backend, Fault, Output};

const FAILED: u8 = 1;
const BAD_OPTIONS: u8 = 2;

/// What every example can be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Common {
    pub backend: Option<Backend>,
    pub seed: u64,
    pub output: Output,
    pub fault: Fault,
}

impl Default for Common {
    fn default() -> Self {
        Self { backend: None, seed: 1, output: Output::Text, fault: Fault::None }
    }
}

/// The options of one example.
pub trait Options: Default {
    const HELP: &'static str;

    fn common(&mut self) -> &mut Common;

    /// Reads the value of an option that is only this example's; [`Args::unknown`] where there is none of the name.
    fn read(&mut self, name: &str, args: &mut Args<impl Iterator<Item = OsString>>) -> Result<(), String>;
}

/// What a run tells.
pub trait Report {
    /// A page to read.
    fn text(&self) -> String;

    /// One JSON object.
    fn json(&self) -> String;

    /// Whether the run is a success.
    fn is_good(&self) -> bool;

    /// What is wrong, a line each, as far as it is told.
    fn complaints(&self) -> Vec<String>;
}

/// What the user wants.
#[derive(Debug)]
pub enum Command<O> {
    Run(O),
    Help,
}

/// Reads the command line, without the program's name. An error says what is wrong with it.
pub fn parse<O: Options>(args: impl Iterator<Item = OsString>) -> Result<Command<O>, String> {
    let mut options = O::default();
    let mut args = Args::new(args);
    while let Some(name) = args.next_name()? {
        let common = options.common();
        match name.as_str() {
            "--help" | "-h" => return args.flag().map(|()| Command::Help),
            "--json" => args.flag().map(|()| common.output = Output::Json)?,
            "--inject-fault" => args.flag().map(|()| common.fault = Fault::FlipOneByte)?,
            "--backend" => common.backend = Some(args.backend()?),
            "--seed" => common.seed = args.number(0, u64::MAX)?,
            name => options.read(name, &mut args)?,
        }
    }
    Ok(Command::Run(options))
}

/// A whole program: reads the command line, runs the job, prints its report.
pub fn main<O: Options, R: Report>(run: impl FnOnce(&O) -> Result<R, BoxError>) -> ExitCode {
    let mut options: O = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            println!("{}", O::HELP);
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("error: {wrong}\n\n{}", O::HELP);
            return ExitCode::from(BAD_OPTIONS);
        }
    };
    let report = match run(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let text = match options.common().output {
        Output::Text => report.text(),
        Output::Json => report.json() + "\n",
    };
    if let Err(error) = std::io::stdout().write_all(text.as_bytes()) {
        eprintln!("error: the report could not be written: {error}");
        return ExitCode::from(FAILED);
    }
    report.complaints().iter().for_each(|complaint| eprintln!("{complaint}"));
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// KVM where it was asked for, or where nothing was and it works. `None`: guests run in the simulator.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn kvm_or_simulator<K>(
    asked: Option<Backend>,
    open: impl FnOnce() -> Result<K, BoxError>,
) -> Result<Option<K>, BoxError> {
    match asked {
        Some(Backend::Sim) => Ok(None),
        Some(Backend::Kvm) => open().map(Some),
        None => {
            let tell = |why: &BoxError| eprintln!("KVM does not work here ({why}): guests run in the simulator");
            Ok(open().inspect_err(tell).ok())
        }
    }
}

/// An error where KVM was asked for.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn simulator_only(asked: Option<Backend>) -> Result<(), BoxError> {
    match asked {
        Some(Backend::Kvm) => Err("the KVM guest is for Linux on x86-64: use --backend sim".into()),
        Some(Backend::Sim) | None => Ok(()),
    }
}
