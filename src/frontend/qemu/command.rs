//! The arguments of one QEMU process.
//!
//! The machine, its devices and their addresses are the same for a parent and its clones; only what is behind the devices differs. Must
//! not start anything.

use std::ffi::OsString;
use std::path::Path;

use serde_json::json;

use super::spec::{Accelerator, Board, Nic, QemuSpec};
use crate::Identity;

/// How a process has the memory file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MemoryView {
    /// Shared: what it writes is in the file. The first parent, until it is forked.
    Shared,
    /// Private: what it writes is its own.
    Private,
}

/// What a process does first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Boots, once it is told to.
    Boot,
    /// Waits for a saved state.
    Incoming,
}

/// What lies behind the devices of one process.
pub(super) struct Wiring<'a> {
    pub(super) identity: &'a Identity,
    /// Where it opens the memory file.
    pub(super) memory: &'a str,
    pub(super) view: MemoryView,
    pub(super) role: Role,
    /// What its control socket is, as `-chardev socket` takes it.
    pub(super) control: &'a str,
    pub(super) disks: &'a Path,
    pub(super) exports: Vec<&'a str>,
    pub(super) console: &'a Path,
    pub(super) agent: &'a Path,
}

/// The name of the channel that an agent in the guest opens: `/dev/virtio-ports/org.offshoot.agent`.
pub const AGENT_PORT: &str = "org.offshoot.agent";
/// The id of the network card.
pub(super) const NIC: &str = "net0";

/// Text as a value within an option: a comma is doubled.
fn value(text: impl Into<OsString>) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let text = text.into();
    let doubled = text.as_bytes().iter().flat_map(|&byte| std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }));
    OsString::from_vec(doubled.collect())
}

fn concat(parts: &[OsString]) -> OsString {
    parts.iter().fold(OsString::new(), |mut whole, part| {
        whole.push(part);
        whole
    })
}

/// All arguments, the program's name not among them.
pub(super) fn arguments(spec: &QemuSpec, wiring: &Wiring<'_>) -> Vec<OsString> {
    let identity = wiring.identity;
    let mut arguments: Vec<OsString> = Vec::new();
    let mut option = |name: &str, parts: &[OsString]| {
        arguments.push(name.into());
        if !parts.is_empty() {
            arguments.push(concat(parts));
        }
    };
    let text = |text: String| OsString::from(text);
    option("-nodefaults", &[]);
    option("-no-user-config", &[]);
    option("-display", &["none".into()]);
    option("-S", &[]);
    option("-name", &["guest=".into(), value(identity.name.as_str())]);
    option("-uuid", &[text(identity.uuid.to_string())]);
    let accelerator = match spec.accelerator {
        Accelerator::Tcg => "tcg",
        Accelerator::Kvm => "kvm",
    };
    option("-accel", &[accelerator.into()]);
    let board = match spec.board {
        Board::Q35 => "q35",
        Board::Pc => "pc",
    };
    option("-machine", &[board.into(), ",memory-backend=ram".into()]);
    if let Some(cpu) = &spec.cpu {
        option("-cpu", &[cpu.into()]);
    }
    option("-smp", &[text(spec.cpus.to_string())]);
    option("-m", &[text(format!("{}B", spec.ram.get()))]);
    let share = match wiring.view {
        MemoryView::Shared => "on",
        MemoryView::Private => "off",
    };
    let backend = format!(
        "memory-backend-file,id=ram,size={},mem-path={},share={share},prealloc=off,merge=off",
        spec.ram.get(),
        wiring.memory
    );
    option("-object", &[text(backend)]);
    option("-chardev", &[text(format!("socket,id=control,{}", wiring.control))]);
    option("-mon", &["chardev=control,mode=control".into()]);
    option("-chardev", &["file,id=console,append=on,path=".into(), value(wiring.console)]);
    option("-serial", &["chardev:console".into()]);
    option("-device", &[text(format!("vmgenid,id=generation,guid={}", identity.generation))]);
    option("-device", &["virtio-serial-pci,id=agents".into()]);
    option("-chardev", &["socket,id=agent,server=on,wait=off,path=".into(), value(wiring.agent)]);
    option(
        "-device",
        &[text(format!("virtserialport,bus=agents.0,nr=1,id=agentport,chardev=agent,name={AGENT_PORT}"))],
    );
    for (at, export) in wiring.exports.iter().enumerate() {
        let node = json!({
            "driver": "nbd", "node-name": format!("disk{at}"), "discard": "unmap", "export": export,
            "server": { "type": "unix", "path": wiring.disks.to_string_lossy() },
        });
        option("-blockdev", &[text(node.to_string())]);
        // A kernel that is given is what is booted first; disks that ask for that too are refused.
        let boot = if spec.kernel.is_none() { format!(",bootindex={at}") } else { String::new() };
        option("-device", &[text(format!("virtio-blk-pci,id=vd{at},drive=disk{at}{boot}"))]);
    }
    let netdev = match &spec.nic {
        Nic::None => None,
        Nic::User => Some("user".to_owned()),
        Nic::Netdev(netdev) => {
            let named =
                netdev.replace("{mac}", &identity.mac.to_string()).replace("{uuid}", &identity.uuid.to_string());
            Some(named.replace("{name}", &identity.name.as_str().replace(',', ",,")))
        }
    };
    if let Some(netdev) = netdev {
        let (kind, rest) = netdev.split_once(',').unwrap_or((&netdev, ""));
        let rest = if rest.is_empty() { String::new() } else { format!(",{rest}") };
        option("-netdev", &[text(format!("{kind},id=link{rest}"))]);
        option("-device", &[text(format!("virtio-net-pci,id={NIC},netdev=link,mac={}", identity.mac))]);
    }
    if let Some(kernel) = &spec.kernel {
        option("-kernel", &[kernel.image.clone().into()]);
        if let Some(initrd) = &kernel.initrd {
            option("-initrd", &[initrd.clone().into()]);
        }
        option("-append", &[kernel.command_line.clone().into()]);
    }
    if wiring.role == Role::Incoming {
        option("-incoming", &["defer".into()]);
    }
    arguments.extend(spec.extra.iter().map(OsString::from));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmName;
    use crate::frontend::qemu::spec::Kernel;
    use crate::page::ByteSize;

    fn with(spec: &QemuSpec, view: MemoryView, role: Role) -> Vec<String> {
        let identity = Identity::fresh(VmName::new("a,b").unwrap()).unwrap();
        let wiring = Wiring {
            identity: &identity,
            memory: "/proc/self/fd/40",
            view,
            role,
            control: "fd=41",
            disks: Path::new("/run/x,y/disks"),
            exports: vec!["3/0", "3/1"],
            console: Path::new("/run/x,y/console"),
            agent: Path::new("/run/x,y/agent"),
        };
        let arguments = arguments(spec, &wiring).into_iter().map(|text| text.into_string().unwrap());
        arguments.map(|text| text.replace(&identity.mac.to_string(), "MAC")).collect()
    }

    fn after<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn a_parent_and_its_clones_differ_in_what_is_behind_the_devices_only() {
        let kernel =
            Kernel { image: "/boot/k".into(), initrd: Some("/boot/i".into()), command_line: "console=ttyS0,9".into() };
        let spec = QemuSpec {
            kernel: Some(kernel),
            nic: Nic::Netdev("tap,ifname=t-{mac}".into()),
            extra: vec!["-device".into(), "virtio-rng-pci".into()],
            ..QemuSpec::new(ByteSize::mib(256))
        };
        let parent = with(&spec, MemoryView::Shared, Role::Boot);
        let clone = with(&spec, MemoryView::Private, Role::Incoming);
        assert!(
            after(&parent, "-object")[0]
                .ends_with("id=ram,size=268435456,mem-path=/proc/self/fd/40,share=on,prealloc=off,merge=off")
        );
        assert!(after(&clone, "-object")[0].contains("share=off"));
        assert_eq!((after(&parent, "-incoming"), after(&clone, "-incoming")), (vec![], vec!["defer"]));
        // Addresses are given out in the order of devices.
        let devices = |arguments: &[String]| {
            let devices = after(arguments, "-device").into_iter();
            devices.map(|device| device.split(",guid").next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(devices(&parent), devices(&clone));
        assert_eq!(devices(&parent).len(), 7);
        assert!(!devices(&parent).iter().any(|device| device.contains("bootindex")));
        assert_eq!(after(&parent, "-netdev"), ["tap,id=link,ifname=t-MAC"]);
        assert_eq!(after(&parent, "-append"), ["console=ttyS0,9"]);
    }

    #[test]
    fn commas_in_names_stay_in_their_option() {
        let arguments = with(&QemuSpec::new(ByteSize::mib(64)), MemoryView::Shared, Role::Boot);
        assert_eq!(after(&arguments, "-name"), ["guest=a,,b"]);
        assert!(after(&arguments, "-chardev").contains(&"file,id=console,append=on,path=/run/x,,y/console"));
        let disk: serde_json::Value = serde_json::from_str(after(&arguments, "-blockdev")[1]).unwrap();
        assert_eq!((&disk["export"], &disk["server"]["path"]), (&json!("3/1"), &json!("/run/x,y/disks")));
    }
}
