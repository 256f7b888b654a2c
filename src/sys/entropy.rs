//! Random bytes for identities.
//!
//! Owns the choice of source, and knows nothing of what an identity is. Linux: the kernel's generator. Elsewhere: a
//! hash of keys that std draws from the system for its hash maps; different in every call and process, and enough to
//! tell two clones apart, **but not a source of secrets**: a guest there must reseed from its own.

/// Fills `buf` with random bytes. On Linux from getrandom(2), which waits only in early boot.
///
/// # Errors
/// A kernel or sandbox that refuses the call. An identity must not be made up instead: give the clone up.
#[cfg(target_os = "linux")]
pub(crate) fn fill_random(buf: &mut [u8]) -> std::io::Result<()> {
    use super::fault::{Call, check};
    use rustix::io::Errno;
    use rustix::rand::{GetRandomFlags, getrandom};

    let mut rest = buf;
    while !rest.is_empty() {
        match check(Call::Getrandom).and_then(|()| getrandom(&mut *rest, GetRandomFlags::empty())) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => rest = &mut rest[n..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Fills `buf` with bytes that differ in every call and process; see the module's head for what they are not.
///
/// # Errors
/// None here; Linux has some.
#[cfg(not(target_os = "linux"))]
pub(crate) fn fill_random(buf: &mut [u8]) -> std::io::Result<()> {
    hashed(buf);
    Ok(())
}

/// The source of other systems; compiled for tests everywhere.
#[cfg(any(test, not(target_os = "linux")))]
fn hashed(buf: &mut [u8]) {
    use std::hash::{BuildHasher, RandomState};
    // New keys for every call: std starts from the system's randomness and steps per instance.
    let keys = RandomState::new();
    for (n, chunk) in buf.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(&keys.hash_one(n).to_ne_bytes()[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_differs_and_fills_all_of_it() {
        let fill: [fn(&mut [u8]); 2] = [|buf| fill_random(buf).unwrap(), hashed];
        for fill in fill {
            let (mut a, mut b) = ([0; 61], [0; 61]);
            fill(&mut a);
            fill(&mut b);
            assert_ne!(a, b);
            // Sixteen zero bytes in a row by chance: never.
            assert!(a.windows(16).all(|w| w != [0; 16]));
            fill(&mut []);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_refusal_is_an_error() {
        use super::super::fault::plan;
        let guard = plan::arm(1, rustix::io::Errno::NOSYS);
        assert!(fill_random(&mut [0; 16]).is_err());
        drop(guard);
        let guard = plan::arm(1, rustix::io::Errno::INTR);
        fill_random(&mut [0; 16]).unwrap();
        assert_eq!(plan::calls_seen(), 2);
        drop(guard);
    }
}
