//! A pair of fences, one of them free: for a thread that announces itself at every request, and one that asks seldom.
//!
//! membarrier(2): after MEMBARRIER_CMD_GLOBAL_EXPEDITED returns, every running thread of a process that registered has
//! passed a full memory barrier; after _PRIVATE_EXPEDITED, every one of this process. The frequent side then needs no more
//! than the program order that the compiler keeps.
//! Both sides must be able to: a process says of itself in [`works`] whether it registered and may give the command.

#[cfg(loom)]
use super::{Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};

#[cfg(not(loom))]
use rustix::thread::{MembarrierCommand as Command, membarrier};

#[cfg(not(loom))]
static WORKS: AtomicBool = AtomicBool::new(false);

/// Registers this process; once more after fork(2), or as often as one likes. Kernels before 4.16 and some seccomp profiles
/// refuse it: then both sides use ordinary fences.
#[cfg(not(loom))]
pub fn register() {
    use Command::{GlobalExpedited, PrivateExpedited, RegisterGlobalExpedited, RegisterPrivateExpedited};
    let all = [RegisterGlobalExpedited, RegisterPrivateExpedited, GlobalExpedited, PrivateExpedited];
    WORKS.store(all.into_iter().all(|command| membarrier(command).is_ok()), Ordering::Relaxed);
}

/// May this process use either side?
#[inline]
pub fn works() -> bool {
    #[cfg(not(loom))]
    return WORKS.load(Ordering::Relaxed);
    #[cfg(loom)]
    true
}

/// The frequent side's fence.
#[inline]
pub fn light() {
    #[cfg(not(loom))]
    compiler_fence(Ordering::SeqCst);
    // What the command brings about, at the place where it does.
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// The other side's: a full fence here and in every thread of all processes.
pub fn heavy() {
    super::fence(super::Ordering::SeqCst);
    #[cfg(not(loom))]
    give(Command::GlobalExpedited);
}

/// The same where the frequent side is this process too.
pub fn heavy_here() {
    super::fence(super::Ordering::SeqCst);
    #[cfg(not(loom))]
    give(Command::PrivateExpedited);
}

#[cfg(not(loom))]
fn give(command: Command) {
    if works() {
        // It was accepted when this process registered, and the kernel then never refuses it.
        let done = membarrier(command);
        debug_assert!(done.is_ok(), "membarrier: {done:?}");
    }
}
