//! What a QEMU machine is made of: the same for a parent and all its clones.
//!
//! Must not know arguments or processes: [`command`](super::command) makes arguments of it.

use std::path::PathBuf;
use std::time::Duration;

use super::QemuError;
use crate::page::{ByteSize, GuestAddress, PageSize};
use crate::ram::{RamLayout, RamRegion};

/// What executes the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Accelerator {
    /// QEMU's own translator: works everywhere, 10 to 50 times slower than the hardware.
    #[default]
    Tcg,
    /// The kernel's virtual machines: `/dev/kvm` must be open to this user.
    Kvm,
}

/// The board.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Board {
    /// PCI Express: `q35`.
    #[default]
    Q35,
    /// PCI: `pc`.
    Pc,
}

/// The guest's network card.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Nic {
    /// None.
    #[default]
    None,
    /// A virtio card on QEMU's own NAT, without privileges and apart from all others.
    User,
    /// A virtio card on what `-netdev` takes after the id: `tap,ifname=…`, `socket,…`. `{mac}`, `{name}` and `{uuid}` in it stand for
    /// the VM's own, so that each clone has a device of its own on the host.
    Netdev(String),
}

/// What the machine boots when it is launched without a boot loader on its disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub command_line: String,
}

/// How long QEMU may take. A step that takes longer fails, and is undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadlines {
    /// A process, from its start to its first word.
    pub start: Duration,
    /// A command, a stop of the guest with all that its disks have to flush among them.
    pub command: Duration,
    /// Saving device state.
    pub save: Duration,
    /// Loading it.
    pub load: Duration,
}

impl Default for Deadlines {
    /// 20 s to start, 20 s a command, 20 s to save and 20 s to load: none is met by a host that works.
    fn default() -> Self {
        let long = Duration::from_secs(20);
        Self { start: long, command: long, save: long, load: long }
    }
}

/// A machine.
///
/// ```
/// use offshoot::frontend::qemu::*;
/// use offshoot::page::ByteSize;
/// let spec = QemuSpec { cpus: 2, nic: Nic::User, ..QemuSpec::new(ByteSize::mib(512)) };
/// assert!(spec.check().is_ok());
/// let spec = QemuSpec { extra: vec!["-device".into(), "vfio-pci,host=0:1.0".into()], ..spec };
/// assert!(spec.check().unwrap_err().to_string().contains("VFIO"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QemuSpec {
    /// The program: `qemu-system-x86_64`, found by `PATH`.
    pub program: PathBuf,
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// The board.
    pub board: Board,
    /// The processor, as `-cpu` takes it; QEMU's choice unless given.
    pub cpu: Option<String>,
    /// How many processors.
    pub cpus: u32,
    /// RAM.
    pub ram: ByteSize,
    /// A kernel to boot; otherwise the first disk is booted.
    pub kernel: Option<Kernel>,
    /// The network card.
    pub nic: Nic,
    /// More arguments, the same for each process. Those that would break a fork are refused.
    pub extra: Vec<String>,
    /// Where sockets and files of guests go: a directory that this user may write to, with a short path. The system's temporary one
    /// unless given.
    pub directory: Option<PathBuf>,
    /// How long QEMU may take.
    pub deadlines: Deadlines,
}

impl QemuSpec {
    /// A machine of one processor, this much RAM and nothing else, under TCG.
    pub fn new(ram: ByteSize) -> Self {
        Self {
            program: "qemu-system-x86_64".into(),
            accelerator: Accelerator::default(),
            board: Board::default(),
            cpu: None,
            cpus: 1,
            ram,
            kernel: None,
            nic: Nic::default(),
            extra: Vec::new(),
            directory: None,
            deadlines: Deadlines::default(),
        }
    }

    /// Whether such a machine can be forked.
    ///
    /// # Errors
    /// [`QemuError::Unsupported`] with the reason, [`QemuError::Layout`].
    pub fn check(&self) -> Result<(), QemuError> {
        let netdev = match &self.nic {
            Nic::Netdev(netdev) => Some(netdev),
            Nic::None | Nic::User => None,
        };
        for argument in self.extra.iter().chain(netdev) {
            if let Some((_, why)) = REFUSED.iter().find(|(name, _)| names(argument, name)) {
                return Err(QemuError::Unsupported(format!("`{argument}`: {why}")));
            }
        }
        let has_nul = |text: &str| text.contains('\0');
        let kernel_nul = self.kernel.as_ref().is_some_and(|kernel| has_nul(&kernel.command_line));
        if kernel_nul
            || self.extra.iter().chain(netdev).any(|text| has_nul(text))
            || self.cpu.as_deref().is_some_and(has_nul)
        {
            return Err(QemuError::Unsupported("an argument has a NUL in it".into()));
        }
        self.layout().map(drop)
    }

    /// Where the board puts RAM: below the PCI hole, and the rest from 4 GiB.
    pub(super) fn layout(&self) -> Result<RamLayout, QemuError> {
        // What pc_q35_init and pc_init1 do: past the first number, only as much as the second lies below 4 GiB.
        let (fits, low) = match self.board {
            Board::Q35 => (0xb000_0000, 0x8000_0000),
            Board::Pc => (0xe000_0000, 0xc000_0000),
        };
        let region = |start, len| RamRegion { start: GuestAddress::new(start), len: ByteSize::new(len) };
        let ram = self.ram.get();
        let regions = if ram < fits { vec![region(0, ram)] } else { vec![region(0, low), region(1 << 32, ram - low)] };
        Ok(RamLayout::new(&regions, PageSize::KIB_4)?)
    }
}

/// What an argument may not name, and why.
const REFUSED: &[(&str, &str)] = &[
    ("vfio", "a VFIO device writes guest memory without a fault, and its state cannot be saved: use virtio devices"),
    (
        "vhost-user",
        "a vhost-user back end maps RAM shared, and a clone's is private: use the virtio device without vhost",
    ),
    ("vhost", "a vhost back end keeps device state outside QEMU: leave vhost off"),
    ("virtio-balloon", "a balloon punches holes into the memory file, which is sealed: leave it out"),
    ("virtio-mem", "RAM that is plugged is not in the memory file: give all of it in `QemuSpec::ram`"),
    ("virtio-pmem", "its memory is a file of its own, which a fork would not cut: use a disk of the VM's"),
    ("nvdimm", "its memory is a file of its own, which a fork would not cut: use a disk of the VM's"),
    ("ivshmem", "memory shared with others cannot be cut: leave it out"),
    ("memory-backend", "all RAM is in the memory file: give its size in `QemuSpec::ram`"),
    ("-mem-path", "RAM is our memory file: leave it out"),
    ("-mem-prealloc", "a clone would copy all of RAM: leave it out"),
    ("-m", "give the size in `QemuSpec::ram`"),
    ("-machine", "give the board in `QemuSpec::board`"),
    ("-M", "give the board in `QemuSpec::board`"),
    ("-numa", "RAM is one memory file: leave it out"),
    ("-drive", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-blockdev", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-hda", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-hdb", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-hdc", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-hdd", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-cdrom", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-fda", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-fdb", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-sd", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-mtdblock", "disks are those given to the engine; one of QEMU's own would not be cut"),
    ("-virtfs", "files of the host's that the guest writes would not be cut: use a disk of the VM's"),
    ("-fsdev", "files of the host's that the guest writes would not be cut: use a disk of the VM's"),
    ("-readconfig", "what is in a file is not checked: give the options themselves"),
    ("-pflash", "flash of QEMU's own would not be cut: boot with the built-in firmware"),
    ("-snapshot", "disks are those given to the engine: leave it out"),
    ("-incoming", "it is how clones are loaded: leave it out"),
    ("-loadvm", "state is loaded by the engine: leave it out"),
    ("-daemonize", "the process must stay our child, to end with us: leave it out"),
    ("-pidfile", "each process would write the same file: leave it out"),
    ("-preconfig", "the engine starts the machine: leave it out"),
    ("-S", "the engine starts and stops the machine: leave it out"),
];

/// Whether an argument is this option, or names such a device or back end.
fn names(argument: &str, name: &str) -> bool {
    if name.starts_with('-') {
        return argument == name || argument.strip_prefix('-') == Some(name);
    }
    argument.split([',', '=', '"', ':', ' ']).any(|word| word.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(extra: &[&str]) -> Result<(), QemuError> {
        let extra = extra.iter().map(|&text| text.to_owned()).collect();
        QemuSpec { extra, ..QemuSpec::new(ByteSize::mib(64)) }.check()
    }

    #[test]
    fn what_cannot_be_forked_is_refused_with_the_reason() {
        for (extra, why) in [
            (["-device", "vfio-pci,host=01:00.0"], "VFIO"),
            (["-device", "vhost-user-blk-pci,chardev=c"], "private"),
            (["-netdev", "tap,id=n,vhost=on"], "leave vhost off"),
            (["-object", "memory-backend-memfd,id=m,size=1G"], "memory file"),
            (["-device", "{\"driver\":\"virtio-balloon-pci\"}"], "balloon"),
            (["--drive", "file=x.img"], "would not be cut"),
            (["-cdrom", "x.iso"], "would not be cut"),
            (["-hdd", "x.img"], "would not be cut"),
            (["-fsdev", "local,id=f,path=x"], "would not be cut"),
            (["-readconfig", "x"], "not checked"),
            (["-m", "4G"], "QemuSpec::ram"),
        ] {
            let refused = with(&extra).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        // The same of what is behind the network card, which comes by another way.
        let netdev = |netdev: &str| {
            QemuSpec { nic: Nic::Netdev(netdev.into()), ..QemuSpec::new(ByteSize::mib(64)) }
                .check()
                .map_err(|e| e.to_string())
        };
        assert!(netdev("tap,ifname=t,vhost=on").unwrap_err().contains("leave vhost off"));
        assert!(netdev("vhost-user,chardev=c").unwrap_err().contains("private"));
        assert!(netdev("tap,ifname=a\0b").is_err());
        netdev("tap,ifname=t-{mac},script=no").unwrap();
        with(&["-device", "virtio-rng-pci", "-msg", "timestamp=on"]).unwrap();
        assert!(with(&["a\0b"]).is_err());
    }

    #[test]
    fn ram_lies_where_the_boards_put_it() {
        let regions = |board, ram| {
            let spec = QemuSpec { board, ..QemuSpec::new(ram) };
            spec.layout().unwrap().regions().map(|(region, _)| (region.start.get(), region.len)).collect::<Vec<_>>()
        };
        assert_eq!(regions(Board::Q35, ByteSize::gib(2)), [(0, ByteSize::gib(2))]);
        assert_eq!(regions(Board::Q35, ByteSize::gib(4)), [(0, ByteSize::gib(2)), (1 << 32, ByteSize::gib(2))]);
        assert_eq!(regions(Board::Pc, ByteSize::gib(4)), [(0, ByteSize::gib(3)), (1 << 32, ByteSize::gib(1))]);
        assert!(QemuSpec::new(ByteSize::new(5000)).check().is_err());
    }
}
