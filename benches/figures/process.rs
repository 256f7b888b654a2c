//! What the kernel says this process and this host hold. Must not measure time.

use super::report::Skip;

/// A figure in KiB of a file under /proc, as bytes; 0 where the kernel does not have the line.
pub fn bytes_in(file: &str, key: &str) -> Result<f64, Skip> {
    let text = std::fs::read_to_string(file)?;
    let figure = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.split_whitespace().next());
    Ok(figure.and_then(|figure| figure.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0)
}

/// Memory mappings of this process.
pub fn mappings() -> Result<f64, Skip> {
    Ok(std::fs::read("/proc/self/maps")?.iter().filter(|&&byte| byte == b'\n').count() as f64)
}

/// Page faults that this thread has taken without a disk.
pub fn faults() -> Result<f64, Skip> {
    let stat = std::fs::read_to_string("/proc/thread-self/stat")?;
    // proc_pid_stat(5): the tenth field; the second ends with the last bracket.
    let field = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(7)?.parse().ok());
    field.ok_or_else(|| Skip::new("/proc/thread-self/stat is not as proc(5) says"))
}

/// Lets this process open `descriptors` more.
pub fn allow_descriptors(descriptors: u64) -> Result<(), Skip> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = descriptors + 1024;
    if limit.current.is_none_or(|soft| soft >= wanted) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|hard| hard < wanted) {
        return Err(Skip::new(format!("needs {wanted} descriptors, more than the hard RLIMIT_NOFILE")));
    }
    limit.current = Some(wanted);
    setrlimit(Resource::Nofile, limit)?;
    Ok(())
}
