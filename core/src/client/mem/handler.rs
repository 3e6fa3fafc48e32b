//! The fault handler that makes writers to a frozen chunk wait.
//!
//! It is checked before each use. Where another was installed over ours, ours goes back on top and hands on every
//! fault that is not ours; when too many different ones have come, moving is off.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::thread::futex;

use super::MemError;
use super::freeze::{SignalsWait, ever_touched, sequence, state, wait_if_frozen};

/// A thread inside a handler that ours called: tells a handler that calls ours back.
#[repr(C)]
pub(super) struct Chain {
    tid: AtomicU32,
    info: AtomicU64,
    frame: AtomicU64,
}

const LEVELS: usize = 16;
struct Previous([UnsafeCell<MaybeUninit<libc::sigaction>>; LEVELS]);
// SAFETY: an entry is written once, before COUNT covers it, and only read afterwards.
unsafe impl Sync for Previous {}
static PREVIOUS: Previous = Previous([const { UnsafeCell::new(MaybeUninit::uninit()) }; LEVELS]);
/// How many entries of PREVIOUS are set. Pairs: release in `install`, acquire in the handler.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Puts ours on top, if it is not.
pub(super) fn install() -> Result<(), MemError> {
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only reads the present action into a structure of that type.
    unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), current.as_mut_ptr()) };
    // SAFETY: zeroed, then filled in: plain data.
    let current = unsafe { current.assume_init() };
    if current.sa_sigaction == on_fault as *const () as usize {
        return Ok(());
    }
    let n = COUNT.load(Ordering::Relaxed);
    let known = n.checked_sub(1).map(previous).is_some_and(|p| p.sa_sigaction == current.sa_sigaction);
    if !known {
        if n == LEVELS {
            return Err(MemError::HandlerTaken(n));
        }
        // SAFETY: entry n is not covered by COUNT yet, and callers hold the mover's lock.
        unsafe { (*PREVIOUS.0[n].get()).write(current) };
        COUNT.store(n + 1, Ordering::Release);
    }
    // SAFETY: all-zero bytes are a valid value of this plain structure.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = on_fault as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // Other signals wait while a thread waits here: their handlers might write to the frozen chunk too, and a
    // fault inside a fault's handler ends the process.
    ours.sa_mask = SignalsWait::all_but_faults();
    // SAFETY: the handler keeps to what is safe in signal context.
    let r = unsafe { libc::sigaction(libc::SIGSEGV, &raw const ours, ptr::null_mut()) };
    if r == 0 { Ok(()) } else { Err(MemError::HandlerTaken(n)) }
}

/// A handler that stood before ours. `level` is below COUNT.
fn previous(level: usize) -> &'static libc::sigaction {
    // SAFETY: entries below COUNT are never written again.
    let entry = unsafe { &*PREVIOUS.0[level].get() };
    // SAFETY: and they are set.
    unsafe { entry.assume_init_ref() }
}

extern "C" fn on_fault(sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid record.
    let record = unsafe { &*info };
    // SAFETY: for SIGSEGV by a fault the address is set; for one sent by kill it is some number.
    let addr = unsafe { record.si_addr() } as u64;
    // Faults have positive codes; kill and sigqueue do not.
    if record.si_code > 0 && explained(addr, record.si_code, context) {
        return;
    }
    hand_on(sig, info, context);
}

/// Whether freezing was the fault's cause; then the write is simply tried again. Waits for the thaw.
fn explained(addr: u64, code: c_int, context: *mut c_void) -> bool {
    const SEGV_ACCERR: c_int = 2;
    let Some(s) = state() else { return false };
    loop {
        let seq = sequence(s);
        if wait_if_frozen(s, addr) {
            return true;
        }
        if code != SEGV_ACCERR || !ever_touched(addr, addr + 1) || !was_write(context) {
            return false;
        }
        if is_writable(addr) {
            // Frozen when it faulted, thawed before it came here.
            return true;
        }
        if seq.is_multiple_of(2) && sequence(s) == seq {
            return false;
        }
        // Something was frozen in between, perhaps this.
    }
}

/// Has the kernel add zero to the word at `addr`, atomically: that works where a write would. At worst it wakes
/// a waiter who finds nothing changed.
fn is_writable(addr: u64) -> bool {
    let nobody = AtomicU32::new(0);
    // SAFETY: aligned; only handed to the kernel, which checks it.
    let word = unsafe { &*((addr & !3) as *const AtomicU32) };
    let (op, cmp) = (futex::WakeOp::Add, futex::WakeOpCmp::Eq);
    futex::wake_op(&nobody, futex::Flags::PRIVATE, 0, 0, word, op, cmp, 0, 0x5a5).is_ok()
}

#[cfg(target_arch = "x86_64")]
fn was_write(context: *mut c_void) -> bool {
    // SAFETY: the third argument of an SA_SIGINFO handler is a ucontext_t.
    let uc = unsafe { &*context.cast::<libc::ucontext_t>() };
    uc.uc_mcontext.gregs[libc::REG_ERR as usize] & 2 != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn was_write(_context: *mut c_void) -> bool {
    true
}

/// Hands the signal to the handler that stood before ours.
fn hand_on(sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let marker = 0u8;
    let frame = (&raw const marker) as u64;
    let count = COUNT.load(Ordering::Acquire);
    let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    // A handler that was installed over ours and calls ours back must get the one below it.
    let depth = if count > 1 { depth_of(tid, info as u64, frame) } else { 0 };
    let Some(level) = count.checked_sub(1 + depth) else { return default_action(sig) };
    let slot = if count > 1 { enter_chain(tid, info as u64, frame) } else { None };
    call(previous(level), sig, info, context);
    if let Some(slot) = slot {
        slot.tid.store(0, Ordering::Release);
    }
}

/// How many calls of a previous handler this thread is inside for this very signal. Entries of calls that were
/// left by longjmp are cleared: their frame is not above ours.
fn depth_of(tid: u32, info: u64, frame: u64) -> usize {
    let Some(s) = state() else { return 0 };
    let mine = s.chains.iter().filter(|c| c.tid.load(Ordering::Acquire) == tid);
    mine.filter(|c| {
        let inside = c.info.load(Ordering::Relaxed) == info && c.frame.load(Ordering::Relaxed) > frame;
        if !inside {
            c.tid.store(0, Ordering::Release);
        }
        inside
    })
    .count()
}

fn enter_chain(tid: u32, info: u64, frame: u64) -> Option<&'static Chain> {
    state()?.chains.iter().find(|c| {
        // Taken with a value that is no thread's until the entry is complete.
        let free = c.tid.compare_exchange(0, u32::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if free {
            c.info.store(info, Ordering::Relaxed);
            c.frame.store(frame, Ordering::Relaxed);
            c.tid.store(tid, Ordering::Release);
        }
        free
    })
}

fn call(previous: &libc::sigaction, sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let handler = previous.sa_sigaction;
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // The kernel does not let a fault be ignored either.
        return default_action(sig);
    }
    set_mask_for(previous, sig, context);
    if previous.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: the program registered it with this signature.
        let f: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = unsafe { std::mem::transmute(handler) };
        f(sig, info, context);
    } else {
        // SAFETY: the program registered it with this signature.
        let f: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
        f(sig);
    }
}

/// The mask that the kernel would have given `previous`: the interrupted code's and its own. The kernel restores
/// the former when ours returns.
fn set_mask_for(previous: &libc::sigaction, sig: c_int, context: *mut c_void) {
    // SAFETY: the third argument of an SA_SIGINFO handler is a ucontext_t.
    let interrupted = unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask };
    // SAFETY: the kernel's set is one word, and all that it wrote.
    let interrupted = unsafe { interrupted.cast::<u64>().read() };
    // SAFETY: a set begins with that word.
    let own = unsafe { (&raw const previous.sa_mask).cast::<u64>().read() };
    let itself = if previous.sa_flags & libc::SA_NODEFER == 0 { 1 << (sig - 1) } else { 0 };
    // SAFETY: all-zero bytes are the empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { (&raw mut set).cast::<u64>().write(interrupted | own | itself) };
    // SAFETY: plain call with a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) };
}

/// Back to the default: the instruction faults again and ends the process, with the right core dump.
fn default_action(sig: c_int) {
    // SAFETY: all-zero bytes are SIG_DFL with no flags.
    let dfl: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: plain call.
    unsafe { libc::sigaction(sig, &raw const dfl, ptr::null_mut()) };
}
