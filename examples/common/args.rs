//! Reading a command line: names, values and what they may be. An error says what is wrong, for the user to read.

use std::ffi::OsString;

use offshoot::page::ByteSize;

/// What executes the guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    Sim,
    Kvm,
}

/// How the report is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    Text,
    Json,
}

/// Whether the run is to fail: not in the help, for testing the check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    FlipOneByte,
}

/// The arguments, without the program's name. A value comes after its name as the next argument, or after `=`.
pub struct Args<I> {
    args: I,
    name: String,
    attached: Option<String>,
}

impl<I: Iterator<Item = OsString>> Args<I> {
    pub fn new(args: I) -> Self {
        Self { args, name: String::new(), attached: None }
    }

    fn text(&mut self) -> Result<Option<String>, String> {
        let text = |arg: OsString| arg.into_string().map_err(|arg| format!("{} is not text", arg.display()));
        self.args.next().map(text).transpose()
    }

    /// The name of the next option.
    pub fn next_name(&mut self) -> Result<Option<String>, String> {
        let Some(arg) = self.text()? else { return Ok(None) };
        (self.name, self.attached) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        Ok(Some(self.name.clone()))
    }

    /// Says that there is no such option.
    pub fn unknown(&self) -> Result<(), String> {
        Err(format!("there is no option {}", self.name))
    }

    /// Its value.
    pub fn value(&mut self) -> Result<String, String> {
        match self.attached.take() {
            Some(value) => Ok(value),
            None => self.text()?.ok_or_else(|| format!("{} needs a value", self.name)),
        }
    }

    /// Says that it takes none.
    pub fn flag(&self) -> Result<(), String> {
        match self.attached {
            Some(_) => Err(format!("{} takes no value", self.name)),
            None => Ok(()),
        }
    }

    /// Its value, a number within bounds.
    pub fn number(&mut self, least: u64, most: u64) -> Result<u64, String> {
        let text = self.value()?;
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("{} {text}: a number from {least} to {most}", self.name))
    }

    /// Its value, a size in whole pages of 4 KiB.
    pub fn size(&mut self, least: ByteSize, most: ByteSize) -> Result<ByteSize, String> {
        let (text, name) = (self.value()?, &self.name);
        let size = size(&text).ok_or_else(|| format!("{name} {text}: a size such as 512M or 1G"))?;
        if size < least || size > most || !size.get().is_multiple_of(4096) {
            let (least, most) = (least.get() >> 20, most.get() >> 30);
            return Err(format!("{name} {text}: from {least}M to {most}G, in whole pages of 4K"));
        }
        Ok(size)
    }

    /// Its value, a backend.
    pub fn backend(&mut self) -> Result<Backend, String> {
        match self.value()?.as_str() {
            "sim" => Ok(Backend::Sim),
            "kvm" => Ok(Backend::Kvm),
            other => Err(format!("{} {other}: kvm or sim", self.name)),
        }
    }
}

/// A number of bytes, or of KiB, MiB, GiB or TiB with K, M, G or T after it.
fn size(text: &str) -> Option<ByteSize> {
    let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit);
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).map(ByteSize::new)
}
