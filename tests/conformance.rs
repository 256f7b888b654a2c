//! Our own backings pass the conformance suite, and backings that are wrong in one way each do not.

mod mutants;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use mutants::{Broken, Flaw, Has};
use offshoot::backing::{AnyPage, Heap};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize};
use offshoot::testing::{ByteSource, Dice, conformance};
use offshoot::{ImageError, SpaceError};

#[test]
fn the_heap_of_4k_pages_conforms() {
    conformance::backing::<Heap>();
}

#[test]
fn the_heap_of_any_pages_conforms() {
    conformance::backing::<Heap<AnyPage>>();
}

#[test]
fn a_source_of_bytes_conforms() {
    for len in [0, 1, 511, 4096, 10_000] {
        let bytes = Dice::new(len).bytes(len);
        conformance::source(&ByteSource::new(bytes.clone()), &bytes);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn mapped_memory_conforms() {
    conformance::backing::<offshoot::backing::Mapped>();
}

/// What the suite says of a backing with this flaw.
fn verdict<F: Has>() -> Result<(), String> {
    // The flawed backings run quietly: a panic is what is hoped for.
    catch_unwind(conformance::backing::<Broken<F>>).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    })
}

macro_rules! flaws {
    ($($flaw:ident: $rule:literal),* $(,)?) => {
        /// Each flaw is found, and by the rule that it breaks rather than by chance.
        #[test]
        fn every_flaw_is_found() {
            $(
                #[derive(Debug)]
                struct $flaw;
                impl Has for $flaw {
                    const FLAW: Flaw = Flaw::$flaw;
                }
                // A flaw that shows only in a race may need more than one try.
                match (0..10).map(|_| verdict::<$flaw>()).find(Result::is_err).unwrap_or(Ok(())) {
                    Ok(()) => panic!("{:?} was not found", Flaw::$flaw),
                    Err(said) => assert!(said.contains($rule), "{:?} was found by another rule: {said}", Flaw::$flaw),
                }
            )*
        }
    };
}

flaws! {
    SiblingsShare: "read",
    RollbackLoses: "rollback",
    RollbackCommits: "rollback",
    CutHoldsNobody: "a held cut",
    ImageFollowsParent: "never changes",
    UsageSum: "private + shared + zero",
    NothingShared: "usage",
    DirtyMisses: "dirty",
    DirtyNamesAll: "dirty",
    ZeroForgets: "zero",
    ZeroShowsBase: "zero",
    ZeroOneMore: "zero",
    ResetLeaves: "reset",
    ResetMiscounts: "reset",
    DiffEmpty: "diff",
    DiffNamesAll: "diff",
    DiffStrangers: "diff with another family",
    FlattenShares: "flatten",
    MergeLoses: "merge",
    MergeAnything: "merge onto",
    DepthStuck: "depth",
    OriginStale: "origin",
    ReadStops: "read",
    WriteStops: "read",
    WriteBeforeFailing: "calls that must",
    ReadsPastTheEnd: "read past the end",
    BaseCutOff: "base longer",
    BaseTail: "read",
    Leaks: "nothing is left",
    ReadModifyWrite: "first writes of several threads",
}

#[test]
fn the_wrapper_alone_conforms() {
    #[derive(Debug)]
    struct Sound;
    impl Has for Sound {
        const FLAW: Flaw = Flaw::None;
    }
    assert_eq!(verdict::<Sound>(), Ok(()));
}

/// An image that is wrong in one way.
enum BadImage {
    /// Longer than it says.
    Length,
    /// Fills with zeroes past its end.
    ReadsOn,
    /// Wrong at odd offsets.
    Alignment,
    /// Fails where it must not.
    Fails,
    /// Says that the rest is zeroes, which it is not.
    HidesData,
    /// Names data past its end.
    NamesTooMuch,
}

struct Bad(BadImage, ByteSource);

impl Source for Bad {
    fn len(&self) -> ByteSize {
        let len = self.1.len();
        if matches!(self.0, BadImage::Length) { ByteSize::new(len.get() + 1) } else { len }
    }

    fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
        match self.0 {
            BadImage::ReadsOn => {
                if self.1.read(at, buf).is_err() {
                    buf.fill(0);
                }
                Ok(())
            }
            BadImage::Alignment => self.1.read(ByteOffset::new(at.get() & !1), buf),
            BadImage::Fails if buf.len() == 4099 => {
                Err(ImageError::Io(std::sync::Arc::new(std::io::Error::other("no"))).into())
            }
            _ => self.1.read(at, buf),
        }
    }

    fn next_data(&self, at: ByteOffset) -> Result<Option<Range<ByteOffset>>, SpaceError> {
        match self.0 {
            BadImage::HidesData => Ok(None),
            BadImage::NamesTooMuch => Ok(Some(at..ByteOffset::new(self.1.len().get() + 4096))),
            _ => self.1.next_data(at),
        }
    }
}

#[test]
fn every_bad_image_is_found() {
    let bytes = Dice::new(3).bytes(10_000);
    for (bad, rule) in [
        (BadImage::Length, "length"),
        (BadImage::ReadsOn, "past"),
        (BadImage::Alignment, "not what"),
        (BadImage::Fails, "must work"),
        (BadImage::HidesData, "there is data"),
        (BadImage::NamesTooMuch, "no range of it"),
    ] {
        let bad = Bad(bad, ByteSource::new(bytes.clone()));
        let panic = catch_unwind(AssertUnwindSafe(|| conformance::source(&bad, &bytes))).expect_err(rule);
        let said = panic.downcast_ref::<String>().expect("the suite panics with text");
        assert!(said.contains(rule), "{rule}: {said}");
    }
}
