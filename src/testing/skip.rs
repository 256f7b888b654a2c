//! Tests that this machine cannot run: told, and failed where nothing may be missing.
//!
//! It knows no test and no reason.

use std::fmt::Display;

/// Says on standard error that the test is skipped, and why. The test then returns.
///
/// ```no_run
/// # fn write_protection() -> Result<(), std::io::Error> { Ok(()) }
/// if let Err(why) = write_protection() {
///     return offshoot::testing::skip(why);
/// }
/// ```
///
/// # Panics
/// If the environment has `OFFSHOOT_REQUIRE=all`: the machine is said to have everything, so that a test that is skipped is one that failed.
#[track_caller]
pub fn skip(why: impl Display) {
    let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "OFFSHOOT_REQUIRE=all, and a test would be skipped: {why}");
    eprintln!("SKIPPED: {why}");
}
