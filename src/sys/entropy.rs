//! Random bytes for identities.

pub(crate) fn fill_random(buf: &mut [u8]) {
    let _ = rustix::rand::getrandom(buf, rustix::rand::GetRandomFlags::empty());
}
