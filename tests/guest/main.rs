//! Linux guests in QEMU. This far: their image.
//!
//! Where a tool is missing its test says so and passes, unless OFFSHOOT_REQUIRE=all is set: then it fails.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../../examples/common/guest_image/mod.rs"]
mod guest_image;
mod image;

use std::path::{Path, PathBuf};

use guest_image::GuestTools;

/// What guests are made of, or `None` with a loud word where something is missing.
fn tools() -> Option<GuestTools> {
    match GuestTools::find() {
        Ok(tools) => Some(tools),
        Err(missing) => {
            let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
            assert!(!required, "OFFSHOOT_REQUIRE=all, but {missing}");
            eprintln!("SKIPPED: {missing}");
            None
        }
    }
}

/// A directory of one test's, gone with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("offshoot-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}
