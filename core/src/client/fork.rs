//! What a forked child must not touch: the router connections and queues are the parent's.
//!
//! The child's copies of the registered descriptors are replaced by a dead one, so that the parent's death closes its
//! connection, and every request in the child fails.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const SLOTS: usize = 256;

static IN_CHILD: AtomicBool = AtomicBool::new(false);
static FDS: [AtomicI32; SLOTS] = [const { AtomicI32::new(-1) }; SLOTS];
/// A descriptor that answers nothing, to put over the others.
static DEAD: AtomicI32 = AtomicI32::new(-1);
static INSTALL: Once = Once::new();

/// Is this a child of the process that opened the contexts it inherited? (New contexts of the child work: see [`adopt`].)
pub fn in_child() -> bool {
    IN_CHILD.load(Ordering::Relaxed)
}

/// A context is being opened: if this is a child, the inherited ones are finished with and new ones count.
pub fn adopt() {
    install();
    IN_CHILD.store(false, Ordering::Relaxed);
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
    IN_CHILD.store(true, Ordering::Relaxed);
    let dead: RawFd = DEAD.load(Ordering::Relaxed);
    for slot in &FDS {
        let fd = slot.swap(-1, Ordering::Relaxed);
        if fd >= 0 && dead >= 0 {
            // SAFETY: both are open descriptors of this process; dup3 replaces `fd` without freeing its number.
            unsafe { libc::dup3(dead, fd, libc::O_CLOEXEC) };
        }
    }
}
