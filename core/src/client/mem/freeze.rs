//! Freezing a chunk of memory against writers while its pages are exchanged, and the fault handler that makes
//! writers wait. The only code that replaces mappings of the program.
//!
//! The chunk may hold anything of the program's, malloc's own records included. So while one is frozen this
//! thread touches its stack, a page of our own that never moves, and nothing else: no allocation, no lock, no
//! thread-local; and its signals wait. One mover at a time: callers hold the mover's lock (see mod.rs).
//!
//! The handler is checked before each use. Where another was installed over ours, ours goes back on top and
//! hands on every fault that is not ours; when too many different ones have come, moving is off.

use std::cell::UnsafeCell;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use rustix::thread::futex;

use super::MemError;
use super::maps::Vma;
use super::os;

/// Longest stretch frozen at once: a system call that writes into it meanwhile fails with EFAULT.
pub(super) const CHUNK: u64 = 64 << 10;

/// What the handler reads. In a page of its own, so that it is never frozen.
#[repr(C)]
struct State {
    /// Odd while a chunk is frozen. Pairs: release in `frozen`, acquire in `frozen_now`.
    seq: AtomicU32,
    lo: AtomicU64,
    hi: AtomicU64,
    /// Bounds of all chunks ever frozen: a fault outside is certainly not ours.
    box_lo: AtomicU64,
    box_hi: AtomicU64,
    freezes: AtomicU64,
    waits: AtomicU64,
    chains: [Chain; 32],
}

/// A thread inside a handler that ours called: tells a handler that calls ours back.
#[repr(C)]
struct Chain {
    tid: AtomicU32,
    info: AtomicU64,
    frame: AtomicU64,
}

static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

const LEVELS: usize = 16;
struct Previous([UnsafeCell<MaybeUninit<libc::sigaction>>; LEVELS]);
// SAFETY: an entry is written once, before COUNT covers it, and only read afterwards.
unsafe impl Sync for Previous {}
static PREVIOUS: Previous = Previous([const { UnsafeCell::new(MaybeUninit::uninit()) }; LEVELS]);
/// How many entries of PREVIOUS are set. Pairs: release in `install`, acquire in the handler.
static COUNT: AtomicUsize = AtomicUsize::new(0);

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

fn state() -> Option<&'static State> {
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
    install()
}

fn install() -> Result<(), MemError> {
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
        let seq = s.seq.load(Ordering::Acquire);
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
        if seq.is_multiple_of(2) && s.seq.load(Ordering::Acquire) == seq {
            return false;
        }
        // Something was frozen in between, perhaps this.
    }
}

/// Waits while `addr` is in the frozen chunk. False if it is in none.
fn wait_if_frozen(s: &State, addr: u64) -> bool {
    let mut waited = false;
    while let Some(seq) = frozen_now(s, addr) {
        if !waited {
            s.waits.fetch_add(1, Ordering::Relaxed);
        }
        waited = true;
        // Any return (woken, interrupted, already thawed) leads to another look.
        let _ = futex::wait(&s.seq, futex::Flags::PRIVATE, seq, None);
    }
    waited
}

fn frozen_now(s: &State, addr: u64) -> Option<u32> {
    loop {
        let seq = s.seq.load(Ordering::Acquire);
        if seq.is_multiple_of(2) {
            return None;
        }
        let (lo, hi) = (s.lo.load(Ordering::Acquire), s.hi.load(Ordering::Acquire));
        if s.seq.load(Ordering::Acquire) == seq {
            return (lo..hi).contains(&addr).then_some(seq);
        }
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
    // The kernel restores the mask when ours returns.
    // SAFETY: plain call with a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const previous.sa_mask, ptr::null_mut()) };
    if previous.sa_flags & libc::SA_NODEFER != 0 {
        unblock(sig);
    }
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

fn unblock(sig: c_int) {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: initialises the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised above.
    unsafe { libc::sigaddset(set.as_mut_ptr(), sig) };
    // SAFETY: plain call with a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut()) };
}

/// Back to the default: the instruction faults again and ends the process, with the right core dump.
fn default_action(sig: c_int) {
    // SAFETY: all-zero bytes are SIG_DFL with no flags.
    let dfl: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: plain call.
    unsafe { libc::sigaction(sig, &raw const dfl, ptr::null_mut()) };
}

/// Signals of this thread, but for faults, wait until this is dropped: a handler of the program's might write to
/// the frozen chunk, and this thread would wait for itself.
pub(super) struct SignalsWait(libc::sigset_t);

impl SignalsWait {
    pub fn begin() -> Self {
        let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: initialises the set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        for sig in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            // SAFETY: initialised above.
            unsafe { libc::sigdelset(all.as_mut_ptr(), sig) };
        }
        // SAFETY: both sets are valid for this call, which fills in the second.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), old.as_mut_ptr()) };
        // SAFETY: filled in by the call, which cannot fail with these arguments.
        SignalsWait(unsafe { old.assume_init() })
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
    s.seq.fetch_add(1, Ordering::AcqRel);
    let _ = futex::wake(&s.seq, futex::Flags::PRIVATE, i32::MAX as u32);
    result
}

/// In a forked child: no chunk is frozen there, and nobody waits.
pub(super) fn reset_after_fork() {
    if let Some(s) = state() {
        let odd = s.seq.load(Ordering::Relaxed) & 1;
        s.seq.fetch_add(odd, Ordering::AcqRel);
    }
}

fn prot_of(vma: &Vma) -> ProtFlags {
    let mut p = ProtFlags::empty();
    p.set(ProtFlags::READ, vma.read);
    p.set(ProtFlags::WRITE, vma.write);
    p.set(ProtFlags::EXEC, vma.exec);
    p
}

/// Sets the protection of a range of `vma` to read-only (`freeze`) or to what `vma` says.
pub(super) fn protect(start: u64, len: u64, vma: &Vma, freeze: bool) -> Result<(), Errno> {
    let prot = if freeze { ProtFlags::READ } else { prot_of(vma) };
    let prot = MprotectFlags::from_bits_retain(prot.bits());
    // SAFETY: a range of a mapping of the program's that the mover is exchanging; writers wait in the handler.
    unsafe { rustix::mm::mprotect(start as *mut c_void, len as usize, prot) }
}

/// Puts the file's bytes at `off` at this address, in place of what is there.
pub(super) fn map_file(
    start: u64,
    len: u64,
    vma: &Vma,
    how: Sharing,
    fd: BorrowedFd<'_>,
    off: u64,
) -> Result<(), Errno> {
    let (prot, flags) = match how {
        Sharing::Shared => (prot_of(vma), MapFlags::SHARED),
        Sharing::PrivateFrozen => (ProtFlags::READ, MapFlags::PRIVATE),
    };
    let (at, len, flags) = (start as *mut c_void, len as usize, flags | MapFlags::FIXED);
    // SAFETY: the file has the same bytes as the range it replaces, whose writers wait in the handler.
    unsafe { rustix::mm::mmap(at, len, prot, flags, fd, off) }.map(drop)
}

#[derive(Clone, Copy)]
pub(super) enum Sharing {
    Shared,
    PrivateFrozen,
}

/// Moves private pages of ours over a range of the program's, in place of what is there.
pub(super) fn move_over(from: u64, start: u64, len: u64) -> Result<(), Errno> {
    let (from, to, len) = (from as *mut c_void, start as *mut c_void, len as usize);
    // SAFETY: `from` is ours and has the same bytes as the range it replaces, whose writers wait in the handler.
    unsafe { rustix::mm::mremap_fixed(from, len, len, MremapFlags::MAYMOVE, to) }.map(drop)
}

pub(super) fn unmap(start: u64, len: u64) {
    // SAFETY: only called on scratch memory of ours, which nothing refers to.
    let _ = unsafe { rustix::mm::munmap(start as *mut c_void, len as usize) };
}

/// Writes memory of the program's (frozen) to the file.
fn write_out(start: u64, len: u64, fd: BorrowedFd<'_>, off: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (at, left) = ((start + done) as *const u8, (len - done) as usize);
        // SAFETY: mapped and readable as the kernel said under the mover's lock, and frozen against writers.
        let bytes = unsafe { std::slice::from_raw_parts(at, left) };
        match rustix::io::pwrite(fd, bytes, off + done)? {
            0 => return Err(Errno::NOSPC),
            n => done += n as u64,
        }
    }
    Ok(())
}

/// Reads the file into scratch memory of ours.
pub(super) fn read_in(scratch: u64, len: u64, fd: BorrowedFd<'_>, off: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (at, left) = ((scratch + done) as *mut u8, (len - done) as usize);
        // SAFETY: scratch memory mapped by us, that nothing else refers to.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at, left) };
        match rustix::io::pread(fd, bytes, off + done)? {
            0 => return Err(Errno::IO),
            n => done += n as u64,
        }
    }
    Ok(())
}

/// Moves `[vma.start, vma.end)` (already clipped to what shall move) into the file at `off`. Tells how far it
/// got: what is left over stayed as it was.
pub(super) fn move_in(vma: &Vma, fd: BorrowedFd<'_>, off: u64) -> (u64, Result<(), Errno>) {
    let mut at = vma.start;
    while at < vma.end {
        let len = CHUNK.min(vma.end - at);
        let to = off + (at - vma.start);
        let moved = frozen(at, len, || {
            let r = protect(at, len, vma, true)
                .and_then(|()| write_out(at, len, fd, to))
                .and_then(|()| map_file(at, len, vma, Sharing::Shared, fd, to));
            if r.is_err() {
                let _ = protect(at, len, vma, false);
            }
            r
        });
        if moved.is_err() {
            return (at, moved);
        }
        at += len;
    }
    (at, Ok(()))
}

/// Longest scratch mapping used when pages are given back.
const SCRATCH: u64 = 64 << 20;

/// Gives `[vma.start, vma.end)`, which maps the file from `vma.offset`, back as private memory with the same
/// bytes. Returns how far it got.
pub(super) fn move_out(vma: &Vma, fd: BorrowedFd<'_>) -> u64 {
    let mut at = vma.start;
    while at < vma.end {
        let len = SCRATCH.min(vma.end - at);
        let Ok(scratch) = os::anonymous(len) else { break };
        let part = vma.clip(at, at + len);
        let end = chunks_out(&part, fd, scratch);
        // Pages already moved over are holes here by now; no other thread's mapping can be told from a hole,
        // so only the rest is unmapped.
        if end < part.end {
            unmap(scratch + (end - at), part.end - end);
            return end;
        }
        at = end;
    }
    at
}

fn chunks_out(part: &Vma, fd: BorrowedFd<'_>, scratch: u64) -> u64 {
    let mut at = part.start;
    while at < part.end {
        let len = CHUNK.min(part.end - at);
        let (from, off) = (scratch + (at - part.start), part.offset + (at - part.start));
        if os::next_data(fd, off, off + len).is_some() {
            os::populate(from, len);
        }
        let moved = frozen(at, len, || {
            let r = protect(at, len, part, true)
                .and_then(|()| match os::next_data(fd, off, off + len) {
                    Some(_) => read_in(from, len, fd, off),
                    None => Ok(()),
                })
                .and_then(|()| if part.read && part.write { Ok(()) } else { protect(from, len, part, false) })
                .and_then(|()| move_over(from, at, len));
            if r.is_err() {
                let _ = protect(at, len, part, false);
            }
            r
        });
        if moved.is_err() {
            break;
        }
        at += len;
    }
    at
}
