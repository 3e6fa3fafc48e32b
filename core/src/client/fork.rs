//! What a forked child must not touch: the router connections and queues are the parent's.
//!
//! The child's copies of the registered descriptors are replaced by a dead one, so that the parent's death closes its
//! connection, and every request in the child fails. Contexts that the child opens are its own and work.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

const SLOTS: usize = 256;

/// How many forks this process is away from the first.
static GENERATION: AtomicU32 = AtomicU32::new(0);
static FDS: [AtomicI32; SLOTS] = [const { AtomicI32::new(-1) }; SLOTS];
/// A descriptor that answers nothing, to put over the others.
static DEAD: AtomicI32 = AtomicI32::new(-1);
static INSTALL: Once = Once::new();

/// The process that something was made in.
#[derive(Debug, Clone, Copy)]
pub struct Birth(u32);

impl Birth {
    pub fn now() -> Self {
        install();
        Birth(GENERATION.load(Ordering::Relaxed))
    }

    /// Has this process inherited it from the one it was made in?
    pub fn is_inherited(self) -> bool {
        self.0 != GENERATION.load(Ordering::Relaxed)
    }
}

/// Registers a descriptor that a child must not keep open.
pub fn neutralize_in_child(fd: BorrowedFd<'_>) {
    install();
    let fd = fd.as_raw_fd();
    let free =
        FDS.iter().find(|slot| slot.compare_exchange(-1, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    debug_assert!(free.is_some(), "more than {SLOTS} router connections in one process");
}

/// The descriptor is about to be closed.
pub fn forget(fd: BorrowedFd<'_>) {
    let fd = fd.as_raw_fd();
    for slot in &FDS {
        if slot.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return;
        }
    }
}

fn install() {
    INSTALL.call_once(|| {
        if let Ok(dead) = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC) {
            DEAD.store(dead.as_raw_fd(), Ordering::Relaxed);
            std::mem::forget(dead); // lives as long as the process
        }
        // SAFETY: the handler only uses atomics and dup3, which are async-signal-safe.
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
    });
}

extern "C" fn child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    let dead: RawFd = DEAD.load(Ordering::Relaxed);
    for slot in &FDS {
        let fd = slot.swap(-1, Ordering::Relaxed);
        if fd >= 0 && dead >= 0 {
            // SAFETY: both are open descriptors of this process; dup3 replaces `fd` without freeing its number.
            unsafe { libc::dup3(dead, fd, libc::O_CLOEXEC) };
        }
    }
}
