//! How much of what a process may have is left: descriptors, memory mappings, memory.
//!
//! Owns the reading of /proc (proc(5)) and of the memory cgroup (cgroups(7)). Mappings are counted line by line, which costs by what
//! the process holds: for [`Gate`](crate::admission::Gate), which asks rarely and has nobody wait. What cannot be read is not known,
//! and that is no error: a limit that nobody can see is left to the kernel. Safe code.

use std::time::{Duration, Instant};

use crate::admission::{HostSample, HostView};

/// This process, on this host.
#[derive(Debug)]
pub(crate) struct ThisHost {
    start: Instant,
}

impl Default for ThisHost {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

impl HostView for ThisHost {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn look(&self) -> HostSample {
        linux::look()
    }

    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    fn look(&self) -> HostSample {
        HostSample::default()
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linux {
    use std::fs;
    use std::path::{Path, PathBuf};

    use parking_lot::Mutex;

    use crate::admission::{Headroom, HostSample, MemoryLimit};
    use crate::page::ByteSize;
    use crate::sys::error::mapping_limit;

    pub(super) fn look() -> HostSample {
        let host = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib_of(&text, "MemAvailable:"));
        // Asked once a process: it is dear, and whoever moves a process to another group does so before it has VMs.
        static MEMBERSHIP: Mutex<Option<String>> = Mutex::new(None);
        let mut membership = MEMBERSHIP.lock();
        let membership = membership.get_or_insert_with(|| fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
        let group = cgroup_room(Path::new("/sys/fs/cgroup"), membership);
        let available = [(host, MemoryLimit::Host), (group, MemoryLimit::Cgroup)];
        let available = available.into_iter().filter_map(|(room, limit)| Some((room?, limit)));
        HostSample {
            mappings: mapping_limit().map(|(held, limit)| Headroom { held, limit }),
            descriptors: descriptors(),
            available: available.min_by_key(|(room, _)| *room),
            anonymous: fs::read_to_string("/proc/self/status").ok().and_then(|text| kib_of(&text, "RssAnon:")),
        }
    }

    /// Open descriptors against the soft RLIMIT_NOFILE.
    fn descriptors() -> Option<Headroom> {
        let limits = fs::read_to_string("/proc/self/limits").ok()?;
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        let soft = line.split_whitespace().next()?;
        let limit = if soft == "unlimited" { u64::MAX } else { soft.parse().ok()? };
        // Since Linux 6.2 the directory's size says how many there are; before that it is 0.
        let held = match fs::metadata("/proc/self/fd").ok()?.len() {
            // One of them is the directory being read.
            0 => fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            held => held,
        };
        Some(Headroom { held, limit })
    }

    /// A figure in KiB, in a line that begins with `key`.
    fn kib_of(text: &str, key: &str) -> Option<ByteSize> {
        let figure = text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?;
        Some(ByteSize::kib(figure.parse().ok()?))
    }

    /// The names of one version of memory cgroups.
    struct Names {
        /// Below the mount point of all cgroups.
        mount: &'static str,
        limits: &'static [&'static str],
        usage: &'static str,
        /// What is given back before anybody is killed.
        reclaimable: [&'static str; 2],
    }

    /// Past `memory.high` the group's processes are made to wait: that is thrashing too.
    const V2: Names = Names {
        mount: "",
        limits: &["memory.max", "memory.high"],
        usage: "memory.current",
        reclaimable: ["active_file ", "inactive_file "],
    };
    const V1: Names = Names {
        mount: "memory",
        limits: &["memory.limit_in_bytes"],
        usage: "memory.usage_in_bytes",
        reclaimable: ["total_active_file ", "total_inactive_file "],
    };

    /// What is free in the process's memory cgroup or the one above it that has least; `None` without any limit. `membership` is
    /// /proc/self/cgroup.
    fn cgroup_room(root: &Path, membership: &str) -> Option<ByteSize> {
        let groups = membership.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let names = match controllers {
                "" => &V2,
                list if list.split(',').any(|controller| controller == "memory") => &V1,
                _ => return None,
            };
            Some((names, path))
        });
        groups.filter_map(|(names, path)| least_room(&root.join(names.mount), path, names)).min()
    }

    fn least_room(mount: &Path, path: &str, names: &Names) -> Option<ByteSize> {
        let inside: PathBuf = mount.join(path.trim_start_matches('/'));
        // In a container the path may be the host's, and what is mounted the container's own group.
        let group = if inside.is_dir() { inside } else { mount.to_path_buf() };
        group.ancestors().take_while(|group| group.starts_with(mount)).filter_map(|group| room_in(group, names)).min()
    }

    fn room_in(group: &Path, names: &Names) -> Option<ByteSize> {
        let figure = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number, and no limit.
        let limit = names.limits.iter().filter_map(|name| figure(name)).min()?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let reclaimable = names.reclaimable.iter().filter_map(|key| {
            stat.lines().find_map(|line| line.strip_prefix(key)).and_then(|figure| figure.trim().parse::<u64>().ok())
        });
        let kept = figure(names.usage)?.saturating_sub(reclaimable.sum());
        Some(ByteSize::new(limit.saturating_sub(kept)))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn everything_is_known_here() {
            let sample = look();
            for room in [sample.descriptors.unwrap(), sample.mappings.unwrap()] {
                assert!(room.held > 0 && room.held < room.limit, "{room:?}");
            }
            let file = fs::File::open("/dev/null").unwrap();
            assert!(sample.available.unwrap().0 > ByteSize::mib(1) && sample.anonymous.unwrap() > ByteSize::ZERO);
            // Others open and close files meanwhile: what counts is that it is about as many as there are.
            let listed = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
            let held = descriptors().unwrap().held;
            assert!(held.abs_diff(listed) < 64, "{held} against {listed}");
            drop(file);
        }

        /// A tree of files like a cgroup mount.
        struct Mount(PathBuf);

        impl Mount {
            fn new(name: &str, files: &[(&str, &str)]) -> Self {
                let root = std::env::temp_dir().join(format!("offshoot-cgroup-{name}-{}", std::process::id()));
                for (path, text) in files {
                    let path = root.join(path);
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    fs::write(path, text).unwrap();
                }
                Self(root)
            }
        }

        impl Drop for Mount {
            fn drop(&mut self) {
                let _ = fs::remove_dir_all(&self.0);
            }
        }

        #[test]
        fn the_group_above_may_have_less() {
            let mount = Mount::new(
                "v2",
                &[
                    ("pod/memory.max", "1000\n"),
                    ("pod/memory.high", "max\n"),
                    ("pod/memory.current", "900\n"),
                    ("pod/memory.stat", "anon 1\nactive_file 30\ninactive_file 20\n"),
                    ("pod/inner/memory.max", "max\n"),
                    ("pod/inner/memory.high", "800\n"),
                    ("pod/inner/memory.current", "100\n"),
                ],
            );
            let room = |membership: &str| cgroup_room(&mount.0, membership);
            assert_eq!(room("0::/pod/inner\n"), Some(ByteSize::new(150)));
            assert_eq!(room("1:cpu:/\n0::/pod\n"), Some(ByteSize::new(150)));
            assert_eq!(room("0::/\n"), None, "the root has no limit");
            assert_eq!(room("0::/elsewhere\n"), None);
        }

        #[test]
        fn the_first_version_has_other_names() {
            let mount = Mount::new(
                "v1",
                &[
                    ("memory/a/memory.limit_in_bytes", "500\n"),
                    ("memory/a/memory.usage_in_bytes", "480\n"),
                    ("memory/a/memory.stat", "total_active_file 10\ntotal_inactive_file 5\n"),
                ],
            );
            let room = |membership: &str| cgroup_room(&mount.0, membership);
            assert_eq!(room("4:cpuset,memory:/a\n0::/\n"), Some(ByteSize::new(35)));
            assert_eq!(room("4:memory:/a/of/the/host\n"), None, "the container's own group has no limit");
        }
    }
}
