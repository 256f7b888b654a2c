//! Metadata contexts: what a client can be told of blocks, and how it asks for which.
//!
//! Two exist. `base:allocation`: where a block is a hole, and where it reads as zeroes. `qemu:dirty-bitmap:origin`: which blocks were
//! written since the disk's last fork point, or since an older one that the export names; a client that copies those alone makes an incremental backup.
//! Queries are matched here; what the contexts say of a disk is `status`'s.

/// The context of dirty blocks. The name before the last colon is what other clients look for.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:origin";
/// The context that the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// One context. Its number is its identifier on the wire, and its place in the table below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Context {
    Allocation = 1,
    Dirty = 2,
}

impl Context {
    pub(super) const ALL: [Self; 2] = [Self::Allocation, Self::Dirty];

    pub(super) fn id(self) -> u32 {
        self as u32
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Allocation => BASE_ALLOCATION,
            Self::Dirty => DIRTY_BITMAP,
        }
    }
}

/// A set of contexts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Contexts(u8);

impl Contexts {
    /// All there are: the answer to a listing without any query.
    pub(super) const ALL: Self = Self(1 << Context::Allocation as u8 | 1 << Context::Dirty as u8);

    fn with(self, context: Context) -> Self {
        Self(self.0 | 1 << context.id())
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.0 >> context.id() & 1 == 1)
    }

    /// Adds what a query of SET_META_CONTEXT selects: a context by its whole name. Others select nothing, which is no error.
    #[must_use]
    pub(super) fn selected(self, query: &[u8]) -> Self {
        Context::ALL.into_iter().filter(|context| context.name().as_bytes() == query).fold(self, Self::with)
    }

    /// Adds what a query of LIST_META_CONTEXT finds: a whole name, or one that ends with a colon and stands for all that begin so.
    #[must_use]
    pub(super) fn found(self, query: &[u8]) -> Self {
        let begins = |context: &Context| query.ends_with(b":") && context.name().as_bytes().starts_with(query);
        Context::ALL.into_iter().filter(begins).fold(self.selected(query), Self::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(contexts: Contexts) -> Vec<&'static str> {
        contexts.iter().map(Context::name).collect()
    }

    #[test]
    fn queries_find_what_they_name() {
        let none = Contexts::default();
        for (query, listed, set) in [
            ("base:allocation", vec![BASE_ALLOCATION], vec![BASE_ALLOCATION]),
            ("base:", vec![BASE_ALLOCATION], vec![]),
            ("qemu:", vec![DIRTY_BITMAP], vec![]),
            ("qemu:dirty-bitmap:", vec![DIRTY_BITMAP], vec![]),
            ("qemu:dirty-bitmap:origin", vec![DIRTY_BITMAP], vec![DIRTY_BITMAP]),
            ("qemu:dirty", vec![], vec![]),
            ("base", vec![], vec![]),
            (":", vec![], vec![]),
            ("", vec![], vec![]),
        ] {
            assert_eq!(names(none.found(query.as_bytes())), listed, "{query}");
            assert_eq!(names(none.selected(query.as_bytes())), set, "{query}");
        }
        assert_eq!(names(none.selected(b"qemu:dirty-bitmap:origin").selected(b"base:allocation")).len(), 2);
    }
}
