//! Rows: what was measured, beside its baseline and its goal, as a table or as JSON. Must not know how it was measured.

use std::fmt::Write as _;
use std::io::Write as _;

use super::options::Mode;
use super::sample::Stats;

/// The unit of a row's numbers; the base unit is a nanosecond, a byte, or one a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    Nanoseconds,
    Microseconds,
    Milliseconds,
    Bytes,
    PerSecond,
    /// Of whatever the row names.
    Count,
    Ratio,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Microseconds => "µs",
            Self::Milliseconds => "ms",
            Self::Bytes => "bytes",
            Self::PerSecond => "/s",
            Self::Count => "",
            Self::Ratio => "×",
        }
    }

    fn of(self, base: f64) -> f64 {
        match self {
            Self::Nanoseconds | Self::Bytes | Self::PerSecond | Self::Count | Self::Ratio => base,
            Self::Microseconds => base / 1e3,
            Self::Milliseconds => base / 1e6,
        }
    }
}

/// What a row is to reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Goal {
    /// Reported only.
    None,
    /// The median, in the row's unit, at most.
    Median(f64),
    /// The ratio of the medians at most.
    Ratio(f64),
}

/// What a row is compared with.
pub struct Baseline {
    pub name: String,
    pub stats: Stats,
}

impl Baseline {
    pub fn new(name: impl Into<String>, stats: Stats) -> Self {
        Self { name: name.into(), stats }
    }
}

/// One line of the table.
pub struct Row {
    pub case: String,
    pub unit: Unit,
    pub stats: Stats,
    pub baseline: Option<Baseline>,
    pub goal: Goal,
}

/// Why a figure has no rows here.
#[derive(Debug)]
pub struct Skip {
    pub reason: String,
}

impl Skip {
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

/// A figure that meets any error cannot be measured here; it is said aloud, and the others go on.
impl<E: std::error::Error> From<E> for Skip {
    fn from(error: E) -> Self {
        Self::new(format!("failed: {error}"))
    }
}

/// What a figure returns once its rows are reported.
pub type Outcome = Result<(), Skip>;

/// Prints rows as they come.
pub struct Report {
    mode: Mode,
    figure: &'static str,
    met: u32,
    missed: Vec<String>,
    skipped: Vec<&'static str>,
}

impl Report {
    pub fn new(mode: Mode) -> Self {
        Self { mode, figure: "", met: 0, missed: Vec::new(), skipped: Vec::new() }
    }

    /// The rows that follow belong to this figure.
    pub fn begin(&mut self, figure: &'static str, what: &str) {
        self.figure = figure;
        if self.mode == Mode::Table {
            say(&format!("\n{figure}: {what}"));
            say(&format!(
                "  {:<44} {:>11} {:>11}       {:<38} {:>11} {:>9}  {:<12} {}",
                "case", "p50", "p99", "baseline", "p50", "ratio", "goal", "met"
            ));
        }
    }

    pub fn row(&mut self, row: &Row) {
        let show = |base: f64| number(row.unit.of(base));
        let ratio = row.baseline.as_ref().map(|baseline| row.stats.p50 / baseline.stats.p50);
        let ratio = ratio.filter(|ratio| ratio.is_finite());
        let (goal, met) = match row.goal {
            Goal::None => (None, None),
            Goal::Median(most) => {
                (Some(format!("≤ {} {}", number(most), row.unit.name())), Some(row.unit.of(row.stats.p50) <= most))
            }
            Goal::Ratio(most) => (Some(format!("≤ {most}×")), ratio.map(|ratio| ratio <= most)),
        };
        match met {
            Some(true) => self.met += 1,
            Some(false) => self.missed.push(format!("{} ({})", self.figure, row.case)),
            None => {}
        }
        let baseline_name = row.baseline.as_ref().map(|baseline| baseline.name.as_str());
        let baseline_p50 = row.baseline.as_ref().map(|baseline| show(baseline.stats.p50));
        match self.mode {
            Mode::Json => {
                let mut json = Object::new();
                json.text("figure", Some(self.figure))
                    .text("case", Some(&row.case))
                    .text("unit", Some(row.unit.name()));
                json.raw("p50", Some(show(row.stats.p50))).raw("p99", Some(show(row.stats.p99)));
                json.text("baseline", baseline_name).raw("baseline_p50", baseline_p50);
                json.raw("ratio", ratio.map(number))
                    .text("goal", goal.as_deref())
                    .raw("met", met.map(|m| m.to_string()));
                say(&json.close());
            }
            Mode::Table | Mode::List => say(&format!(
                "  {:<44} {:>11} {:>11} {:<5} {:<38} {:>11} {:>9}  {:<12} {}",
                row.case,
                show(row.stats.p50),
                show(row.stats.p99),
                row.unit.name(),
                baseline_name.unwrap_or("-"),
                baseline_p50.as_deref().unwrap_or("-"),
                ratio.map_or("-".into(), |ratio| format!("{}×", number(ratio))),
                goal.as_deref().unwrap_or("-"),
                match met {
                    Some(true) => "yes",
                    Some(false) => "NO",
                    None => "-",
                }
            )),
        }
    }

    /// Says that the figure, or the rest of it, could not be measured here.
    pub fn skipped(&mut self, skip: &Skip) {
        self.skipped.push(self.figure);
        match self.mode {
            Mode::Json => {
                let mut json = Object::new();
                json.text("figure", Some(self.figure));
                for key in ["case", "unit", "p50", "p99", "baseline", "baseline_p50", "ratio", "goal", "met"] {
                    json.raw(key, None);
                }
                json.text("skipped", Some(&skip.reason));
                say(&json.close());
            }
            Mode::Table | Mode::List => say(&format!("  SKIPPED: {}", skip.reason)),
        }
    }

    /// The last words of a table.
    pub fn finish(&self) {
        if self.mode == Mode::Table {
            say(&format!(
                "\n{} goals met, {} missed, {} figures skipped",
                self.met,
                self.missed.len(),
                self.skipped.len()
            ));
            self.missed.iter().for_each(|row| say(&format!("  missed:  {row}")));
            self.skipped.iter().for_each(|figure| say(&format!("  skipped: {figure}")));
        }
    }
}

/// Prints a line at once: a run takes minutes, and its reader may be a pipe that has gone.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Three significant digits, as plain as JSON wants them.
fn number(value: f64) -> String {
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let digits = (2 - magnitude).clamp(0, 9) as usize;
    format!("{value:.digits$}")
}

/// A JSON object on one line.
struct Object(String);

impl Object {
    fn new() -> Self {
        Self("{".into())
    }

    fn raw(&mut self, key: &str, value: Option<String>) -> &mut Self {
        let comma = if self.0.len() > 1 { "," } else { "" };
        let value = value.unwrap_or_else(|| "null".into());
        write!(self.0, "{comma}\"{key}\":{value}").expect("a string takes all that is written to it");
        self
    }

    fn text(&mut self, key: &str, value: Option<&str>) -> &mut Self {
        let quoted = value.map(|value| {
            let mut quoted = String::from('"');
            for c in value.chars() {
                match c {
                    '"' | '\\' => quoted.extend(['\\', c]),
                    c if c.is_control() => write!(quoted, "\\u{:04x}", c as u32).expect("as above"),
                    c => quoted.push(c),
                }
            }
            quoted.push('"');
            quoted
        });
        self.raw(key, quoted)
    }

    fn close(mut self) -> String {
        self.0.push('}');
        self.0
    }
}
