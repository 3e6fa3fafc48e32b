//! Freezing a chunk of memory against writers while its pages are exchanged, and how writers wait.
//!
//! The chunk may hold anything of the program's, malloc's own records included. So while one is frozen this
//! thread touches its stack, a page of our own that never moves, scratch memory of ours, and nothing else: no
//! allocation, no lock, no thread-local; and its signals wait. One mover at a time: callers hold the mover's lock
//! (see mod.rs).

use std::mem::{MaybeUninit, size_of};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use rustix::thread::futex;

use super::{MemError, handler, os};

/// Longest stretch frozen at once: a system call that writes into it meanwhile fails with EFAULT.
pub(super) const CHUNK: u64 = 64 << 10;

/// What the handler reads. In a page of its own, so that it is never frozen.
#[repr(C)]
pub(super) struct State {
    /// Odd while a chunk is frozen. Pairs: release in `frozen`, acquire in `frozen_now`.
    seq: AtomicU32,
    /// Threads between looking at `seq` and sleeping on it. SeqCst with `seq`: one side sees the other.
    waiting: AtomicU32,
    lo: AtomicU64,
    hi: AtomicU64,
    /// Bounds of all chunks ever frozen: a fault outside is certainly not ours.
    box_lo: AtomicU64,
    box_hi: AtomicU64,
    freezes: AtomicU64,
    waits: AtomicU64,
    pub chains: [handler::Chain; 32],
}

static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

/// Counters since the process started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezeStats {
    /// Chunks frozen.
    pub freezes: u64,
    /// Writes by other threads that had to wait for one.
    pub waits: u64,
}

pub(super) fn stats() -> FreezeStats {
    match state() {
        Some(s) => {
            FreezeStats { freezes: s.freezes.load(Ordering::Relaxed), waits: s.waits.load(Ordering::Relaxed) }
        }
        None => FreezeStats { freezes: 0, waits: 0 },
    }
}

pub(super) fn state() -> Option<&'static State> {
    // SAFETY: null, or a page mapped for good whose zero bytes are valid atomics.
    unsafe { STATE.load(Ordering::Acquire).as_ref() }
}

/// Whether `[start, end)` may contain bytes that were ever moved. Cheap: two loads.
pub(super) fn ever_touched(start: u64, end: u64) -> bool {
    state()
        .is_some_and(|s| s.box_lo.load(Ordering::Acquire) < end && start < s.box_hi.load(Ordering::Acquire))
}

/// The page that must not move.
pub(super) fn own_zone() -> Option<(u64, u64)> {
    state().map(|s| {
        let at = ptr::from_ref(s) as u64;
        (at, at + os::page_size())
    })
}

/// Makes sure that a chunk may be frozen now: the page is there and our handler stands first.
pub(super) fn ready() -> Result<(), MemError> {
    const { assert!(size_of::<State>() <= 4096) };
    if state().is_none() {
        let page = os::anonymous(os::page_size())
            .map_err(|errno| MemError::System { what: "mmap of the mover's page", errno })?;
        let s = page as *mut State;
        // SAFETY: a fresh mapping of ours, larger than the structure.
        unsafe { &*s }.box_lo.store(u64::MAX, Ordering::Relaxed);
        STATE.store(s, Ordering::Release);
    }
    handler::install()
}

/// Signals of this thread, but for faults, wait until this is dropped: a handler of the program's might write to
/// the frozen chunk, and this thread would wait for itself.
pub(super) struct SignalsWait(libc::sigset_t);

impl SignalsWait {
    pub fn begin() -> Self {
        let (set, mut old) = (Self::all_but_faults(), MaybeUninit::uninit());
        // SAFETY: both sets are valid for this call, which fills in the second.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, old.as_mut_ptr()) };
        // SAFETY: filled in by the call, which cannot fail with these arguments.
        SignalsWait(unsafe { old.assume_init() })
    }

    pub fn all_but_faults() -> libc::sigset_t {
        let mut set = MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigfillset(set.as_mut_ptr()) };
        for sig in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            // SAFETY: initialised above.
            unsafe { libc::sigdelset(set.as_mut_ptr(), sig) };
        }
        // SAFETY: as above.
        unsafe { set.assume_init() }
    }
}

impl Drop for SignalsWait {
    fn drop(&mut self) {
        // SAFETY: a set the kernel gave us.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

/// Runs `exchange` while writes to `[start, start + len)` by other threads wait. `exchange` must take the write
/// permission away first and leave the chunk writable (if it was) whether it succeeds or not.
pub(super) fn frozen<R>(start: u64, len: u64, exchange: impl FnOnce() -> R) -> R {
    let Some(s) = state() else { unreachable!("ready() was called") };
    let _signals = SignalsWait::begin();
    s.box_lo.fetch_min(start, Ordering::AcqRel);
    s.box_hi.fetch_max(start + len, Ordering::AcqRel);
    s.lo.store(start, Ordering::Release);
    s.hi.store(start + len, Ordering::Release);
    s.seq.fetch_add(1, Ordering::AcqRel);
    s.freezes.fetch_add(1, Ordering::Relaxed);
    let result = exchange();
    s.seq.fetch_add(1, Ordering::SeqCst);
    if s.waiting.load(Ordering::SeqCst) != 0 {
        let _ = futex::wake(&s.seq, futex::Flags::PRIVATE, i32::MAX as u32);
    }
    result
}

/// Waits while `addr` is in the frozen chunk. False if it is in none.
pub(super) fn wait_if_frozen(s: &State, addr: u64) -> bool {
    if frozen_now(s, addr).is_none() {
        return false;
    }
    s.waits.fetch_add(1, Ordering::Relaxed);
    s.waiting.fetch_add(1, Ordering::SeqCst);
    while let Some(seq) = frozen_now(s, addr) {
        // Any return (woken, interrupted, already thawed) leads to another look.
        let _ = futex::wait(&s.seq, futex::Flags::PRIVATE, seq, None);
    }
    s.waiting.fetch_sub(1, Ordering::SeqCst);
    true
}

/// A number that changes with each freeze and thaw; even while nothing is frozen.
pub(super) fn sequence(s: &State) -> u32 {
    s.seq.load(Ordering::Acquire)
}

fn frozen_now(s: &State, addr: u64) -> Option<u32> {
    loop {
        let seq = s.seq.load(Ordering::SeqCst);
        if seq.is_multiple_of(2) {
            return None;
        }
        let (lo, hi) = (s.lo.load(Ordering::Acquire), s.hi.load(Ordering::Acquire));
        if s.seq.load(Ordering::Acquire) == seq {
            return (lo..hi).contains(&addr).then_some(seq);
        }
    }
}

/// In a forked child: no chunk is frozen there, and nobody waits.
pub(super) fn reset_after_fork() {
    if let Some(s) = state() {
        let odd = s.seq.load(Ordering::Relaxed) & 1;
        s.seq.fetch_add(odd, Ordering::AcqRel);
        s.waiting.store(0, Ordering::Relaxed);
    }
}
