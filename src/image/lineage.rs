//! Who descends from whom: the ancestry of a cut, apart from its pages.
//!
//! An image must be able to say whether another is its ancestor without keeping that ancestor's pages alive. A
//! lineage node holds no page; a node that nobody can name any more is skipped when the line grows, so a VM that forks
//! for days and drops its fork points keeps a line of constant length. Depth counts every fork all the same.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::SpaceError;

/// One cut's place in its family.
#[derive(Debug)]
pub(crate) struct Lineage {
    /// Same for all that come from one `create`.
    family: Arc<()>,
    depth: u32,
    parent: Mutex<Option<Arc<Lineage>>>,
}

impl Lineage {
    /// A new family.
    pub(crate) fn root() -> Arc<Self> {
        Arc::new(Self { family: Arc::new(()), depth: 0, parent: Mutex::new(None) })
    }

    /// The next cut after `self`.
    ///
    /// # Errors
    /// [`SpaceError::DepthLimit`].
    pub(crate) fn child(self: &Arc<Self>, limit: u32) -> Result<Arc<Self>, SpaceError> {
        let depth = self.depth.saturating_add(1);
        if depth > limit || depth == u32::MAX {
            return Err(SpaceError::DepthLimit { depth, limit });
        }
        self.skip_unnamed_parents();
        Ok(Arc::new(Self { family: self.family.clone(), depth, parent: Mutex::new(Some(self.clone())) }))
    }

    /// A parent whose only reference is this line's own can be named by nobody, and nobody can gain a name for it but
    /// through this line's lock, which is held: so the count is stable and the node may go.
    fn skip_unnamed_parents(&self) {
        let mut parent = self.parent.lock();
        while let Some(node) = parent.take_if(|node| Arc::strong_count(node) == 1) {
            *parent = node.parent.lock().take();
        }
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// Whether both come from one `create`.
    pub(crate) fn related(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.family, &other.family)
    }

    /// Whether `self` is `ancestor` or comes from it. Walks the line: O(fork points still named between them).
    pub(crate) fn descends_from(self: &Arc<Self>, ancestor: &Arc<Self>) -> bool {
        let mut node = self.clone();
        loop {
            if Arc::ptr_eq(&node, ancestor) {
                return true;
            }
            if node.depth <= ancestor.depth {
                return false;
            }
            let Some(parent) = node.parent.lock().clone() else { return false };
            node = parent;
        }
    }
}

impl Drop for Lineage {
    /// Unlinks the line one node at a time: a recursive drop would overflow the stack on a long one.
    fn drop(&mut self) {
        let mut next = self.parent.get_mut().take();
        while let Some(node) = next {
            next = Arc::into_inner(node).and_then(|mut node| node.parent.get_mut().take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ancestors_are_known_and_siblings_are_not() {
        let root = Lineage::root();
        let a = root.child(10).unwrap();
        let b = a.child(10).unwrap();
        let c = a.child(10).unwrap();
        assert!(b.descends_from(&root) && b.descends_from(&a) && b.descends_from(&b));
        assert!(!b.descends_from(&c) && !a.descends_from(&b));
        assert!(b.related(&c) && !b.related(&Lineage::root()));
        assert!(matches!(b.child(2), Err(SpaceError::DepthLimit { depth: 3, limit: 2 })));
    }

    #[test]
    fn a_line_that_nobody_names_stays_short_and_a_long_one_drops() {
        let root = Lineage::root();
        let mut tip = root.clone();
        for _ in 0..100_000 {
            tip = tip.child(u32::MAX).unwrap();
        }
        assert_eq!(tip.depth(), 100_000);
        let mut length = 0;
        let mut node = tip.clone();
        while let Some(parent) = { node.parent.lock().clone() } {
            (node, length) = (parent, length + 1);
        }
        assert!(length < 4, "{length} nodes kept");
        assert!(tip.descends_from(&root));
        let mut all = vec![root];
        for _ in 0..100_000 {
            let next = all[all.len() - 1].child(u32::MAX).unwrap();
            all.push(next);
        }
        let last = all.pop().unwrap();
        drop(all);
        drop(last);
    }
}
