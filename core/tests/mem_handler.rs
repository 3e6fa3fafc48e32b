//! A program's own SIGSEGV handler: before ours, after ours, and calling ours back. One test per process would
//! be cleanest; here they run in forked children, which also have no other threads.

mod mem_util;

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use freeflow_core::client::mem::freeze_stats;
use mem_util::*;

static FAULTS: AtomicUsize = AtomicUsize::new(0);
/// A page that the program keeps read-only and opens on a fault, as garbage collectors do.
static BARRIER: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static BELOW: AtomicUsize = AtomicUsize::new(0);

extern "C" fn opens(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    FAULTS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a handler's valid record.
    let info = unsafe { &*info };
    // SAFETY: of a fault.
    let addr = unsafe { info.si_addr() } as usize & !(PAGE - 1);
    let page = BARRIER.load(Ordering::Relaxed);
    if addr != page as usize {
        // SAFETY: ends this child: a fault that is not the program's own reached it.
        unsafe { libc::_exit(99) };
    }
    // SAFETY: a page of this test.
    unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE) };
}

/// Knows nothing of the fault and asks the handler that was there before: ours.
extern "C" fn passes_on(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the handler that stood before this one, of that type.
    let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(BELOW.load(Ordering::Relaxed)) };
    f(sig, info, context);
}

fn handle(f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)) {
    // SAFETY: zeroes are a valid value.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    new.sa_sigaction = f as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO;
    // SAFETY: a handler of the right type.
    assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &raw const new, &raw mut old) }, 0);
    BELOW.store(old.sa_sigaction, Ordering::Relaxed);
}

/// Faults on the program's page `n` times, with the mover at work on another.
fn fault(pd: &std::sync::Arc<freeflow_core::client::mem::PdMemory>, n: usize) {
    let (page, other) = (Map::anon(PAGE), Map::anon(4 * PAGE));
    BARRIER.store(page.at, Ordering::Relaxed);
    for i in 0..n {
        let _r = pd.register(other.addr(), 4 * 4096, REMOTE).unwrap();
        page.protect(libc::PROT_READ);
        // SAFETY: faults, is handled, and then succeeds.
        unsafe { page.at.write_volatile(i as u8) };
        assert_eq!(page.bytes()[0], i as u8);
    }
}

/// A page that moved and was then protected by the program still belongs to the program's handler.
fn fault_on_moved(pd: &std::sync::Arc<freeflow_core::client::mem::PdMemory>) {
    let page = Map::anon(PAGE);
    BARRIER.store(page.at, Ordering::Relaxed);
    let r = pd.register(page.addr(), 4096, REMOTE).unwrap();
    assert_eq!(covered(&r), 4096);
    page.protect(libc::PROT_READ);
    // SAFETY: faults, is handled, and then succeeds.
    unsafe { page.at.write_volatile(3) };
    drop(r);
    assert_eq!(page.bytes()[0], 3);
}

/// Runs `f` in a child and returns how it ended: the exit status, or minus the signal.
fn in_child(f: impl FnOnce()) -> i32 {
    // SAFETY: the child runs only this test's code and ends with _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_ok();
        // SAFETY: ends the child without the harness's exit handlers.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { -libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

#[test]
fn a_handler_from_before_keeps_its_faults() {
    watchdog();
    let ended = in_child(|| {
        handle(opens);
        let pd = pd();
        fault(&pd, 20);
        fault_on_moved(&pd);
        assert_eq!(FAULTS.load(Ordering::Relaxed), 21);
    });
    assert_eq!(ended, 0);
}

#[test]
fn a_handler_put_over_ours_keeps_its_faults() {
    watchdog();
    let ended = in_child(|| {
        let pd = pd();
        let m = Map::anon(PAGE);
        drop(pd.register(m.addr(), 4096, REMOTE).unwrap());
        handle(opens);
        fault(&pd, 20);
        fault_on_moved(&pd);
        assert_eq!(FAULTS.load(Ordering::Relaxed), 21);
    });
    assert_eq!(ended, 0);
}

#[test]
fn a_handler_that_calls_ours_back_ends_below() {
    watchdog();
    let ended = in_child(|| {
        handle(opens);
        let pd = pd();
        let m = Map::anon(PAGE);
        drop(pd.register(m.addr(), 4096, REMOTE).unwrap());
        handle(passes_on);
        fault(&pd, 20);
        assert_eq!(FAULTS.load(Ordering::Relaxed), 20);
    });
    assert_eq!(ended, 0);
}

#[test]
fn a_real_fault_still_kills() {
    watchdog();
    let ended = in_child(|| {
        let pd = pd();
        let m = Map::anon(PAGE);
        let _r = pd.register(m.addr(), 4096, REMOTE).unwrap();
        // SAFETY: the fault this test is about.
        unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
    });
    assert_eq!(ended, -libc::SIGSEGV);
}

static TARGET: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// An asynchronous signal's handler that writes to memory which the mover may have frozen.
extern "C" fn writes(_: i32) {
    let at = TARGET.load(Ordering::Relaxed);
    if !at.is_null() {
        // SAFETY: memory of the test that set it.
        unsafe { at.write_volatile(2) };
    }
}

/// A thread that waits for a chunk gets a signal whose handler writes to the same chunk: a fault inside the fault's
/// own handler would end the process.
#[test]
fn signals_wait_while_a_thread_waits() {
    watchdog();
    let ended = in_child(|| {
        // SAFETY: zeroes are a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = writes as *const () as usize;
        // SAFETY: a handler of the right type.
        assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
        let (pd, m) = (pd(), Map::anon(16 * PAGE));
        let (quiet, stop, before) = (AtomicBool::new(false), AtomicBool::new(false), freeze_stats().waits);
        TARGET.store(m.at.wrapping_add(PAGE), Ordering::Relaxed);
        std::thread::scope(|s| {
            let (tell, writer) = std::sync::mpsc::channel();
            let (m, quiet, stop) = (&m, &quiet, &stop);
            s.spawn(move || {
                // SAFETY: always possible.
                tell.send(unsafe { libc::pthread_self() }).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: memory of this test.
                    unsafe { m.at.write_volatile(1) };
                }
            });
            let writer = writer.recv().unwrap();
            let signals = s.spawn(move || {
                while !quiet.load(Ordering::Relaxed) {
                    // SAFETY: a thread that lives until `stop`.
                    unsafe { libc::pthread_kill(writer, libc::SIGUSR1) };
                }
            });
            while freeze_stats().waits < before + 200 {
                drop(pd.register(m.addr(), m.len as u64, REMOTE).unwrap());
            }
            quiet.store(true, Ordering::Relaxed);
            signals.join().unwrap();
            stop.store(true, Ordering::Relaxed);
        });
    });
    assert_eq!(ended, 0);
}

#[test]
fn when_others_keep_taking_the_handler_nothing_moves() {
    watchdog();
    let ended = in_child(|| {
        let pd = pd();
        let m = Map::anon(PAGE);
        let mut moved = 0;
        for i in 0..40 {
            // Two that take turns; one that only comes back is known.
            handle(if i % 2 == 0 { opens } else { passes_on });
            moved += usize::from(covered(&pd.register(m.addr(), 4096, REMOTE).unwrap()) > 0);
        }
        assert!((1..40).contains(&moved), "{moved} moves");
    });
    assert_eq!(ended, 0);
}
