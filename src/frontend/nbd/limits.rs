//! What one server spends on its clients, whatever they do.

use std::time::Duration;

use crate::page::ByteSize;

/// Limits on one server. A client that reaches one gets an error, or waits; nobody else notices.
///
/// ```
/// use offshoot::frontend::nbd::ServerLimits;
/// let limits = ServerLimits { clients: 16, ..ServerLimits::default() };
/// assert_eq!(limits.request.get(), 32 << 20);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerLimits {
    /// Clients connected at once. One more is told so as soon as it asks for anything (ERR_POLICY), and hung up on.
    pub clients: u64,
    /// The longest read or write: told to the client as the maximum block size, and an error beyond.
    pub request: ByteSize,
    /// Payload and replies of all requests in flight. A request that gets no room within `patience` is ENOMEM.
    pub in_flight: ByteSize,
    /// Requests of one client that are read ahead of their execution; the next stays in its socket.
    pub requests_per_client: u64,
    /// Threads that execute requests of one client, beside the one that reads them. Started when first needed.
    pub workers_per_client: u64,
    /// How long a client may take to negotiate.
    pub handshake: Duration,
    /// How long a request waits for room in `in_flight`, how long a client may leave a reply unread or a payload unsent, before it is
    /// hung up on.
    pub patience: Duration,
}

impl Default for ServerLimits {
    /// 512 clients, requests of 32 MiB, 256 MiB in flight, 64 requests and 8 threads a client, 10 s to negotiate and 30 s of patience.
    fn default() -> Self {
        Self {
            clients: 512,
            request: ByteSize::mib(32),
            in_flight: ByteSize::mib(256),
            requests_per_client: 64,
            workers_per_client: 8,
            handshake: Duration::from_secs(10),
            patience: Duration::from_secs(30),
        }
    }
}

/// Bytes of requests in flight, of a server or of a client: taken before they are allocated.
#[derive(Debug)]
pub(super) struct Budget {
    free: parking_lot::Mutex<u64>,
    freed: parking_lot::Condvar,
}

/// Bytes taken from a budget; given back on drop.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    pub(super) fn new(bytes: ByteSize) -> Self {
        Self { free: parking_lot::Mutex::new(bytes.get()), freed: parking_lot::Condvar::new() }
    }

    /// Waits for room, `patience` at most. More than there is in all is refused at its end too, and limits that could ask for
    /// it are refused when a server starts.
    pub(super) fn take(&self, bytes: ByteSize, patience: Duration) -> Option<Reservation<'_>> {
        let mut free = self.free.lock();
        let timeout = self.freed.wait_while_for(&mut free, |free| *free < bytes.get(), patience);
        if timeout.timed_out() && *free < bytes.get() {
            return None;
        }
        *free -= bytes.get();
        Some(Reservation { budget: self, bytes: bytes.get() })
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        *self.budget.free.lock() += self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_gives_no_more_than_it_has_and_gets_everything_back() {
        let budget = Budget::new(ByteSize::new(10));
        let seven = budget.take(ByteSize::new(7), Duration::ZERO).unwrap();
        assert!(budget.take(ByteSize::new(4), Duration::ZERO).is_none());
        let three = budget.take(ByteSize::new(3), Duration::ZERO).unwrap();
        std::thread::scope(|threads| {
            let waiting = threads.spawn(|| budget.take(ByteSize::new(10), Duration::MAX).is_some());
            drop((seven, three));
            assert!(waiting.join().unwrap());
        });
        assert_eq!(*budget.free.lock(), 10);
    }
}
