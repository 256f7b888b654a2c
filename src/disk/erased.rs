//! The backing traits without their types: a VM's disks may lie on different backings.
//!
//! Every [`Backing`] has these through blanket implementations; nobody implements them by hand. Images know their own type again
//! through `Any` when two of them meet.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::account::Usage;
use crate::backing::{Backing, Cut, Deferred, Extent, Sealed};
use crate::error::SpaceError;
use crate::image::Source;
use crate::page::{ByteOffset, Geometry, PageCount, PageRange, PageSet};

/// [`Backing`] without its type.
pub(crate) trait AnySpace: Any + Send + Sync + fmt::Debug {
    fn geometry(&self) -> Geometry;
    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError>;
    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError>;
    fn zero(&self, range: PageRange) -> Result<(), SpaceError>;
    fn flush(&self) -> Result<(), SpaceError>;
    fn cut(&self) -> Result<Box<dyn AnyCut + '_>, SpaceError>;
    fn origin(&self) -> Arc<dyn AnySealed>;
    fn dirty(&self) -> Result<PageSet, SpaceError>;
    fn dirty_in(&self, range: PageRange) -> Result<PageSet, SpaceError>;
    fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError>;
    fn reset(&self) -> Result<PageCount, SpaceError>;
    fn usage(&self) -> Result<Usage, SpaceError>;
    fn validate(&self) -> Result<(), String>;
}

/// [`Cut`] without its type.
pub(crate) trait AnyCut {
    fn commit(self: Box<Self>) -> (Arc<dyn AnySealed>, Deferred);
}

/// [`Sealed`] without its type.
pub(crate) trait AnySealed: Any + Source + fmt::Debug {
    #[cfg_attr(
        not(any(feature = "imago", feature = "nbd", feature = "store")),
        expect(dead_code, reason = "whoever copies disks asks")
    )]
    fn geometry(&self) -> Geometry;
    fn spawn(&self) -> Result<Box<dyn AnySpace>, SpaceError>;
    fn clone_mappings(&self) -> u64;
    #[cfg(all(feature = "store", unix))]
    fn data(&self) -> Result<PageSet, SpaceError>;
    fn diff(&self, other: &dyn AnySealed) -> Result<PageSet, SpaceError>;
    fn flatten(&self) -> Result<Arc<dyn AnySealed>, SpaceError>;
    fn merge_onto(&self, ancestor: &dyn AnySealed) -> Result<Arc<dyn AnySealed>, SpaceError>;
    fn same(&self, other: &dyn AnySealed) -> bool;
    fn validate(&self) -> Result<(), String>;
}

impl<B: Backing> AnySpace for B {
    fn geometry(&self) -> Geometry {
        Backing::geometry(self)
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        Backing::read(self, at, buf)
    }

    fn write(&self, at: ByteOffset, data: &[u8]) -> Result<(), SpaceError> {
        Backing::write(self, at, data)
    }

    fn zero(&self, range: PageRange) -> Result<(), SpaceError> {
        Backing::zero(self, range)
    }

    fn flush(&self) -> Result<(), SpaceError> {
        Backing::flush(self)
    }

    fn cut(&self) -> Result<Box<dyn AnyCut + '_>, SpaceError> {
        Ok(Box::new(Erased(Backing::cut(self)?)))
    }

    fn origin(&self) -> Arc<dyn AnySealed> {
        Arc::new(Backing::origin(self))
    }

    fn dirty(&self) -> Result<PageSet, SpaceError> {
        Backing::dirty(self)
    }

    fn dirty_in(&self, range: PageRange) -> Result<PageSet, SpaceError> {
        Backing::dirty_in(self, range)
    }

    fn allocation(&self, range: PageRange) -> Result<Vec<Extent>, SpaceError> {
        Backing::allocation(self, range)
    }

    fn reset(&self) -> Result<PageCount, SpaceError> {
        Backing::reset(self)
    }

    fn usage(&self) -> Result<Usage, SpaceError> {
        Backing::usage(self)
    }

    fn validate(&self) -> Result<(), String> {
        Backing::validate(self)
    }
}

/// A cut on its way to becoming `dyn`.
struct Erased<C>(C);

impl<C: Cut<Sealed: Sealed>> AnyCut for Erased<C> {
    fn commit(self: Box<Self>) -> (Arc<dyn AnySealed>, Deferred) {
        let (sealed, deferred) = self.0.commit();
        (Arc::new(sealed), deferred)
    }
}

/// The typed image behind `other`, where it is one of `S`.
fn typed<S: Sealed>(other: &dyn AnySealed) -> Result<&S, SpaceError> {
    let any: &dyn Any = other;
    any.downcast_ref().ok_or(SpaceError::Unrelated("the images lie on different backings: compare relatives only"))
}

impl<S: Sealed> AnySealed for S {
    fn geometry(&self) -> Geometry {
        Sealed::geometry(self)
    }

    fn spawn(&self) -> Result<Box<dyn AnySpace>, SpaceError> {
        Ok(Box::new(Sealed::spawn(self)?))
    }

    fn clone_mappings(&self) -> u64 {
        Sealed::clone_mappings(self)
    }

    #[cfg(all(feature = "store", unix))]
    fn data(&self) -> Result<PageSet, SpaceError> {
        Sealed::data(self)
    }

    fn diff(&self, other: &dyn AnySealed) -> Result<PageSet, SpaceError> {
        Sealed::diff(self, typed(other)?)
    }

    fn flatten(&self) -> Result<Arc<dyn AnySealed>, SpaceError> {
        Ok(Arc::new(Sealed::flatten(self)?))
    }

    fn merge_onto(&self, ancestor: &dyn AnySealed) -> Result<Arc<dyn AnySealed>, SpaceError> {
        Ok(Arc::new(Sealed::merge_onto(self, typed(ancestor)?)?))
    }

    fn same(&self, other: &dyn AnySealed) -> bool {
        typed(other).is_ok_and(|other| Sealed::same(self, other))
    }

    fn validate(&self) -> Result<(), String> {
        Sealed::validate(self)
    }
}
