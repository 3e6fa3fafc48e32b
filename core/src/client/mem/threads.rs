//! What the process's threads forbid: freezing their stacks and control blocks, and freezing anything at all
//! while one of them blocks SIGSEGV.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::ptr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::MemError;
use super::os::{Maps, last_errno, page_size};

pub(super) struct Threads {
    /// Address ranges that must not freeze: stacks (a fault on them cannot be handled), and the threads' control
    /// blocks, into which the kernel itself writes.
    pub zones: Vec<(u64, u64)>,
    /// A thread that would die of a write to frozen memory.
    pub blocked: Option<i32>,
}

pub(super) fn look(maps: &Maps) -> Result<Threads, MemError> {
    let mut zones = own_stack(maps)?;
    let main = rustix::process::getpid().as_raw_nonzero().get();
    let tids = tids()?;
    for tid in &tids {
        if let Some(block) = control_block(*tid) {
            zones.push(thread_zone(maps, block, *tid == main)?);
        }
    }
    Ok(Threads { zones, blocked: blocked_one(&tids) })
}

fn tids() -> Result<Vec<i32>, MemError> {
    let dir = std::fs::read_dir("/proc/self/task").map_err(|_| MemError::NoProc(last_errno()))?;
    Ok(dir.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok()).collect())
}

/// What is known of threads. Looking costs an open file each, and masks are set once, early.
struct Known {
    /// Found to let SIGSEGV through.
    trusted: Vec<i32>,
    /// Found to block it for good: waited for once, since then only looked at.
    stubborn: Vec<i32>,
}

static KNOWN: Mutex<Known> = Mutex::new(Known { trusted: Vec::new(), stubborn: Vec::new() });
/// A thread that is being created, or leaves our handler, blocks everything for a moment. On a busy machine it may have to wait for
/// its turn to go on, so long at most.
const PATIENCE: Duration = Duration::from_secs(1);

/// The first thread that blocks SIGSEGV. Called with the mover's lock held, nothing frozen.
fn blocked_one(tids: &[i32]) -> Option<i32> {
    let Known { trusted, stubborn } = &mut *KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    trusted.retain(|t| tids.contains(t));
    stubborn.retain(|t| tids.contains(t));
    for tid in tids.iter().filter(|t| !trusted.contains(t)).copied().collect::<Vec<_>>() {
        let patience = if stubborn.contains(&tid) { Duration::ZERO } else { PATIENCE };
        let deadline = Instant::now() + patience;
        while blocks_faults(tid) {
            if Instant::now() >= deadline {
                if !patience.is_zero() {
                    stubborn.push(tid);
                }
                return Some(tid);
            }
            std::thread::yield_now();
        }
        trusted.push(tid);
    }
    None
}

/// Whether the thread's mask holds SIGSEGV. A thread that has ended blocks nothing.
fn blocks_faults(tid: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")) else { return false };
    let mask = status.lines().find_map(|l| l.strip_prefix("SigBlk:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0);
    mask & 1 << (libc::SIGSEGV - 1) != 0
}

/// How far a control block reaches below and above the list head in it. (glibc 2.36: 736 and 1584; not more, so
/// that memory right above a stack is not taken for a part of it.)
const BELOW: u64 = 4096;
const ABOVE: u64 = 1536;
/// A stack without a guard below it is taken to be no longer than this.
const STACK_MAX: u64 = 64 << 20;

fn thread_zone(maps: &Maps, block: u64, main: bool) -> Result<(u64, u64), MemError> {
    let top = (block + ABOVE) | (page_size() - 1);
    if main {
        // Its stack is `[stack]`; here lie the control block and the thread-local variables below it.
        return Ok(((block - BELOW) & !(page_size() - 1), top + 1));
    }
    let mut low = block.saturating_sub(STACK_MAX);
    maps.over(block, block + 1, |vma| {
        low = low.max(vma.start);
        ControlFlow::Break(())
    })
    .map_err(MemError::NoProc)?;
    Ok((low, top + 1))
}

/// The address of the thread's robust list head, which lies in its control block. None: it has just ended.
fn control_block(tid: i32) -> Option<u64> {
    let (mut head, mut len) = (0u64, 0usize);
    // SAFETY: the kernel writes one pointer and one length, into variables of that size.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    (r == 0 && head != 0).then_some(head)
}

thread_local! {
    /// A stack stays where it is, and asking glibc for the first thread's reads all of /proc/self/maps.
    static OWN_STACK: Cell<Option<(u64, u64)>> = const { Cell::new(None) };
}

/// The caller's stack as the thread library knows it, and whatever mapping it is running on now.
fn own_stack(maps: &Maps) -> Result<Vec<(u64, u64)>, MemError> {
    let (low, size) = match OWN_STACK.get() {
        Some(known) => known,
        None => pthread_stack().ok_or(MemError::NoProc(Errno::SRCH))?,
    };
    OWN_STACK.set(Some((low, size)));
    let mut zones = vec![(low, low + size)];
    let here = (&raw const zones) as u64;
    if !(low..low + size).contains(&here) {
        // A stack the program made itself: leave its whole mapping alone.
        maps.over(here, here + 1, |vma| {
            zones.push((vma.start, vma.end));
            ControlFlow::Break(())
        })
        .map_err(MemError::NoProc)?;
    }
    Ok(zones)
}

fn pthread_stack() -> Option<(u64, u64)> {
    // SAFETY: all-zero bytes are a valid value of this plain structure.
    let mut attr: libc::pthread_attr_t = unsafe { std::mem::zeroed() };
    let (mut low, mut size) = (ptr::null_mut(), 0usize);
    // SAFETY: always possible, no precondition.
    let me = unsafe { libc::pthread_self() };
    // SAFETY: `me` is the running thread; `attr` is filled in.
    if unsafe { libc::pthread_getattr_np(me, &raw mut attr) } != 0 {
        return None;
    }
    // SAFETY: `attr` was filled in by pthread_getattr_np.
    let got = unsafe { libc::pthread_attr_getstack(&raw const attr, &raw mut low, &raw mut size) };
    // SAFETY: as above, and not used afterwards.
    unsafe { libc::pthread_attr_destroy(&raw mut attr) };
    (got == 0).then_some((low as u64, size as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zones() -> Vec<(u64, u64)> {
        look(&Maps::open().unwrap()).unwrap().zones
    }

    #[test]
    fn the_running_stack_is_a_zone() {
        let local = 0u8;
        let here = (&raw const local) as u64;
        let inside = |z: &[(u64, u64)]| z.iter().any(|(s, e)| (*s..*e).contains(&here));
        assert!(inside(&zones()));
        // And seen from another thread, which finds it by the control block alone.
        assert!(inside(&std::thread::spawn(zones).join().unwrap()));
    }
}
