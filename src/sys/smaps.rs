//! What the kernel says an address range costs.
