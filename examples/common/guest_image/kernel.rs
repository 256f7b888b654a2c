//! A kernel package's kernel: which one, its release, and the image that is packed in it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::modules::ModuleTree;
use super::program;

/// A bzImage for x86-64.
#[derive(Clone, Debug)]
pub struct KernelImage {
    path: PathBuf,
    release: String,
}

/// Names another kernel than the newest of `/boot`.
const CHOICE: &str = "OFFSHOOT_GUEST_KERNEL";

/// What unpacks, known by how the packed bytes begin.
const PACKERS: &[(&[u8], &str)] =
    &[(b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (GZIP, "gzip"), (b"\x02\x21\x4c\x18", "lz4")];
const GZIP: &[u8] = b"\x1f\x8b";

/// The kernel and its modules, or what is missing.
pub fn find() -> Result<(KernelImage, ModuleTree), String> {
    let mut found = Vec::new();
    let mut reasons = Vec::new();
    let candidates = match std::env::var_os(CHOICE) {
        Some(choice) => vec![PathBuf::from(choice)],
        None => {
            let boot = fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
            boot.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
                .collect()
        }
    };
    for path in candidates {
        let opened = KernelImage::open(&path).and_then(|kernel| {
            let modules = ModuleTree::open(&Path::new("/lib/modules").join(&kernel.release))?;
            Ok((kernel, modules))
        });
        match opened {
            Ok(pair) => found.push(pair),
            Err(error) => reasons.push(format!("{}: {error}", path.display())),
        }
    }
    found.sort_by_key(|(kernel, _)| version(&kernel.release));
    found.pop().ok_or_else(|| {
        let why = if reasons.is_empty() { "none in /boot".to_owned() } else { reasons.join(", ") };
        format!("a kernel with its modules (package linux-image-amd64; or name one in {CHOICE}): {why}")
    })
}

/// The numbers of a release, to tell the newest.
fn version(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

impl KernelImage {
    fn open(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        let odd = || io::Error::new(io::ErrorKind::InvalidData, "not a Linux kernel for x86");
        if bytes.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
            return Err(odd());
        }
        let at = usize::from(half(&bytes, 0x20e).ok_or_else(odd)?) + 0x200;
        let text = bytes.get(at..).ok_or_else(odd)?;
        let release = text.split(|&byte| byte == b' ' || byte == 0).next().ok_or_else(odd)?;
        Ok(Self { path: path.to_owned(), release: String::from_utf8_lossy(release).into_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn release(&self) -> &str {
        &self.release
    }

    /// Writes what QEMU boots soonest: the ELF image packed in this one, which has an entry of its own for hypervisors, or this one as it is,
    /// to unpack itself, where the program that unpacks is missing here.
    pub fn unpack(&self, to: &Path) -> io::Result<()> {
        let bytes = fs::read(&self.path)?;
        let elf = packed(&bytes).and_then(|packed| unpack(packed).ok()).filter(|elf| elf.starts_with(b"\x7fELF"));
        fs::write(to, elf.as_deref().unwrap_or(&bytes))
    }
}

/// The payload of a bzImage: its header says where, after the sectors that set up.
fn packed(bytes: &[u8]) -> Option<&[u8]> {
    let sectors = match *bytes.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(bytes, 0x248)?;
    let payload = bytes.get(start..start.checked_add(word(bytes, 0x24c)?)?)?;
    // Its length unpacked follows; only gzip's own format ends with that.
    if payload.starts_with(GZIP) { Some(payload) } else { payload.len().checked_sub(4).map(|len| &payload[..len]) }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}

/// A file's bytes, unpacked if they are packed: some packages have their modules so.
pub fn plain(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    if bytes.starts_with(b"\x7fELF") { Ok(bytes) } else { unpack(&bytes) }
}

fn unpack(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let (_, packer) = PACKERS
        .iter()
        .find(|(magic, _)| bytes.starts_with(magic))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "packed in an unknown way"))?;
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{packer} is not installed"));
    let mut command = Command::new(program(packer).ok_or_else(missing)?);
    let mut child = command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut stdin = child.stdin.take().expect("a pipe");
    let packed = bytes.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&packed));
    let output = child.wait_with_output()?;
    let fed = feeder.join().expect("the feeder does not panic");
    if output.status.success() {
        fed.map(|()| output.stdout)
    } else {
        Err(io::Error::other(format!("{packer}: {}", output.status)))
    }
}
