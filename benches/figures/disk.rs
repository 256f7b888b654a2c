//! The disk face in one process, against `pread` and `pwrite` of a plain file in memory.

use super::options::Effort;
use super::report::{Outcome, Report};

pub fn requests(_effort: &Effort, _report: &mut Report) -> Outcome {
    Ok(())
}
