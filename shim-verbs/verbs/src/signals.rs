//! What a signal does to a wait. On a NIC the wait is a read(2), which goes on after a handler with SA_RESTART; ours is a
//! poll(2), which never does.

use std::mem::zeroed;
use std::ptr::null_mut;

/// Would read(2) go on after the interruption that just happened? Nobody tells which signal it was: yes, unless some
/// handler of the program was set without SA_RESTART.
pub fn restarts() -> bool {
    // Faults are no interruption: their handler (ours, too) runs for the instruction that made them.
    const FAULTS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];
    let mut signals = (1..=libc::SIGRTMAX()).filter(|signal| !FAULTS.contains(signal));
    signals.all(|signal| handler(signal).is_none_or(|flags| flags & libc::SA_RESTART != 0))
}

/// The flags of a signal's handler, if it has one.
fn handler(signal: i32) -> Option<i32> {
    // SAFETY: plain data; all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { zeroed() };
    // SAFETY: only asks; `action` has room for the answer.
    let asked = unsafe { libc::sigaction(signal, null_mut(), &mut action) };
    let handled = asked == 0 && ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction);
    handled.then_some(action.sa_flags)
}
