//! Live forks with a hook between the steps of their pre-copy, so that what a guest writes meanwhile is the same in every run.

use crate::backing::Mapped;
use crate::vm::{ForkError, ForkPoint, Guest, LivePolicy, Relocate, Vm};

pub use crate::vm::live::Moment;

/// [`Vm::fork_live`], with a call of `between` at each [`Moment`] of the rounds before the pause.
///
/// # Errors
/// As [`Vm::fork_live`].
///
/// ```
/// # use offshoot::{*, backing::Mapped, page::*, ram::*, testing::live};
/// # let layout = RamLayout::flat(ByteSize::mib(1), PageSize::KIB_4)?;
/// # let vm: Vm<Mapped> = Vm::new(&Tree::default(), VmName::new("vm")?, layout, vec![])?;
/// # let mut guest = AtRest(DeviceState::from_bytes(vec![]));
/// # vm.start()?;
/// vm.fork(&mut guest)?;
/// let point = live::fork_live(&vm, &mut guest, &LivePolicy::default(), &mut |moment| {
///     if moment == live::Moment::Copied(0) {
///         vm.ram().store(GuestAddress::new(0x1000), 7u8).unwrap();
///     }
/// })?;
/// assert_eq!(point.spawn(CloneSpec::default())?.ram().load::<u8>(GuestAddress::new(0x1000))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn fork_live(
    vm: &Vm<Mapped>,
    guest: &mut (impl Guest + ?Sized),
    policy: &LivePolicy,
    between: &mut dyn FnMut(Moment),
) -> Result<ForkPoint<Mapped>, ForkError> {
    vm.fork_live_at(guest, policy, &mut |moment, _| between(moment))
}

/// The same for [`Vm::fork_live_relocating`].
///
/// # Errors
/// As [`Vm::fork_live_relocating`].
pub fn fork_live_relocating(
    vm: &Vm<Mapped>,
    guest: &mut (impl Relocate + ?Sized),
    policy: &LivePolicy,
    between: &mut dyn FnMut(Moment),
) -> Result<ForkPoint<Mapped>, ForkError> {
    vm.fork_live_relocating_at(guest, policy, &mut |moment, _| between(moment))
}
