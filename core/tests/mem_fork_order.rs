//! A parent leaves moved memory alone until its child has copies. A process of its own: the order in which fork
//! handlers are registered matters.

mod mem_util;

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use mem_util::*;

static GATE: AtomicI32 = AtomicI32::new(-1);
static ADDR: AtomicU64 = AtomicU64::new(0);

/// Runs in the child before the mover's own handler. Until that one has run, the child reads pages that nobody
/// wrote to straight from the file.
extern "C" fn slow_child() {
    let mut ready = libc::pollfd { fd: GATE.load(Ordering::Relaxed), events: libc::POLLIN, revents: 0 };
    // SAFETY: one descriptor.
    let early = unsafe { libc::poll(&raw mut ready, 1, 100) };
    // SAFETY: the page under test.
    let seen = unsafe { (ADDR.load(Ordering::Relaxed) as *const u8).read_volatile() };
    if early != 0 || seen != 7 {
        // SAFETY: ends this child.
        unsafe { libc::_exit(9) };
    }
}

/// An earlier version did not wait, and the child found what its parent had freed since.
#[test]
fn a_slow_child_does_not_see_what_its_parent_writes_after_the_fork() {
    watchdog();
    // SAFETY: a handler that lives as long as the process.
    assert_eq!(unsafe { libc::pthread_atfork(None, None, Some(slow_child)) }, 0);
    let pd = pd();
    let m = Map::anon(PAGE);
    m.bytes().fill(7);
    let _r = pd.register(m.addr(), 4096, REMOTE).unwrap();
    let mut gate = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(gate.as_mut_ptr()) }, 0);
    GATE.store(gate[0], Ordering::Relaxed);
    ADDR.store(m.addr(), Ordering::Relaxed);
    // SAFETY: the child does what its handlers do and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    m.bytes().fill(8);
    // SAFETY: one byte from a live buffer.
    assert_eq!(unsafe { libc::write(gate[1], [1u8].as_ptr().cast(), 1) }, 1);
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
    assert!(is_moved(m.addr()) && m.bytes().iter().all(|b| *b == 8));
}
