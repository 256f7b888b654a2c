//! What the kernel says a QEMU process holds: proc_pid_smaps(5).

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use offshoot::page::ByteSize;

/// The memory of one QEMU process.
#[derive(Clone, Copy, Default, Debug)]
pub struct ProcessMemory {
    /// The guest's RAM.
    pub ram: Part,
    /// All the rest: QEMU itself, and what TCG has translated.
    pub own: Part,
}

/// Part of a process's memory.
#[derive(Clone, Copy, Default, Debug)]
pub struct Part {
    /// In memory and mapped here.
    pub resident: ByteSize,
    /// The same, each page divided by how many map it.
    pub proportional: ByteSize,
    /// Mapped by others too.
    pub shared: ByteSize,
    /// Mapped by nobody else.
    pub private: ByteSize,
}

impl ProcessMemory {
    /// Of this process, whose guest has its RAM in a memory file.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::parse(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?))
    }

    fn parse(smaps: impl BufRead) -> io::Result<Self> {
        let mut memory = Self::default();
        let mut in_ram = false;
        for line in smaps.lines() {
            let line = line?;
            let Some((key, rest)) = line.split_once(' ') else { continue };
            let Some(key) = key.strip_suffix(':') else {
                in_ram = line.contains("/memfd:");
                continue;
            };
            let Some(kib) = rest.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok()) else { continue };
            let part = if in_ram { &mut memory.ram } else { &mut memory.own };
            let sum = match key {
                "Rss" => &mut part.resident,
                "Pss" => &mut part.proportional,
                "Shared_Clean" | "Shared_Dirty" => &mut part.shared,
                "Private_Clean" | "Private_Dirty" => &mut part.private,
                _ => continue,
            };
            *sum = ByteSize::new(sum.get() + ByteSize::kib(kib).get());
        }
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_told_from_the_rest() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:01 5 /memfd:offshoot (deleted)
Size:             262144 kB
Rss:               40000 kB
Pss:                9000 kB
Shared_Clean:      35000 kB
Private_Dirty:      5000 kB
VmFlags: rd wr
55d000000000-55d000001000 r-xp 00000000 08:01 77 /usr/bin/qemu-system-x86_64
Rss:                 300 kB
Pss:                 100 kB
Shared_Clean:        300 kB
";
        let memory = ProcessMemory::parse(smaps.as_bytes()).unwrap();
        assert_eq!(memory.ram.resident, ByteSize::kib(40000));
        assert_eq!(memory.ram.shared, ByteSize::kib(35000));
        assert_eq!(memory.ram.private, ByteSize::kib(5000));
        assert_eq!(memory.own.proportional, ByteSize::kib(100));
        assert_eq!(memory.own.private, ByteSize::ZERO);
    }
}
