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
/// A thread that is being created, or leaves our handler, blocks everything for a moment: so long at most, of its own time.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest time between two looks that counts: whoever looks may itself have waited for a processor.
const STEP: Duration = Duration::from_millis(10);

/// A thread that blocks SIGSEGV, as last looked at.
#[derive(Debug, Clone, Copy)]
struct Blocking {
    tid: i32,
    /// It waits for something other than a processor.
    asleep: bool,
    /// Time it has had a processor.
    ran: Duration,
}

/// The first thread that blocks SIGSEGV. Called with the mover's lock held, nothing frozen.
fn blocked_one(tids: &[i32]) -> Option<i32> {
    let Known { trusted, stubborn } = &mut *KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    trusted.retain(|t| tids.contains(t));
    stubborn.retain(|t| tids.contains(t));
    let unknown: Vec<i32> = tids.iter().filter(|t| !trusted.contains(t)).copied().collect();
    let blocking = wait_for(&unknown, stubborn);
    trusted.extend(unknown.iter().filter(|t| !blocking.contains(t)));
    // Beside one that has been waited for nobody was waited for.
    if !blocking.iter().any(|t| stubborn.contains(t)) {
        stubborn.extend(&blocking);
    }
    blocking.first().copied()
}

/// Those that block SIGSEGV still when they have had time enough to let it through, which the `stubborn` have had before.
fn wait_for(tids: &[i32], stubborn: &[i32]) -> Vec<i32> {
    let mut blocking = look_at(tids);
    let (mut spent, mut last) = (Duration::ZERO, Instant::now());
    while !blocking.is_empty() && spent < PATIENCE && !blocking.iter().any(|b| stubborn.contains(&b.tid)) {
        std::thread::yield_now();
        let now = look_at(tids);
        spent += had_time(&blocking, &now, last.elapsed().min(STEP));
        (blocking, last) = (now, Instant::now());
    }
    blocking.iter().map(|b| b.tid).collect()
}

/// How much of `step`, between two looks, counts against patience: what the one that had least of it had, asleep or on a
/// processor. Waiting for a processor does not count, since the thread cannot help it, nor can those that wait for it.
fn had_time(before: &[Blocking], now: &[Blocking], step: Duration) -> Duration {
    let had = |b: &Blocking| {
        if b.asleep {
            return step;
        }
        let then = before.iter().find(|then| then.tid == b.tid).map_or(b.ran, |then| then.ran);
        b.ran.saturating_sub(then).min(step)
    };
    now.iter().map(had).min().unwrap_or_default()
}

fn look_at(tids: &[i32]) -> Vec<Blocking> {
    tids.iter().filter_map(|tid| blocking(*tid)).collect()
}

/// None: the thread lets SIGSEGV through, or has ended and blocks nothing.
fn blocking(tid: i32) -> Option<Blocking> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
    let of = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let mask = u64::from_str_radix(of("SigBlk:")?, 16).ok()?;
    let asleep = !of("State:")?.starts_with('R');
    (mask & 1 << (libc::SIGSEGV - 1) != 0).then(|| Blocking { tid, asleep, ran: ran(tid) })
}

/// How long a thread of this process has had a processor. (pthread_getcpuclockid(3) needs a handle, which other threads' are not.)
fn ran(tid: i32) -> Duration {
    /// The kernel's name of a thread's clock: its number, and that it is a thread's, of time on a processor.
    const THREAD_TIME: i32 = 4 | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in one timespec; a thread that has ended has no clock.
    unsafe { libc::clock_gettime(!tid << 3 | THREAD_TIME, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
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

    fn seen(tid: i32, asleep: bool, ran_ms: u64) -> Blocking {
        Blocking { tid, asleep, ran: Duration::from_millis(ran_ms) }
    }

    #[test]
    fn only_time_that_a_thread_had_counts() {
        let had = |before: &[Blocking], now: &[Blocking]| had_time(before, now, STEP).as_millis();
        let waits = |ran| seen(1, false, ran);
        assert_eq!(had(&[waits(5)], &[waits(5)]), 0, "it had no processor");
        assert_eq!(had(&[waits(5)], &[waits(8)]), 3);
        assert_eq!(had(&[waits(5)], &[waits(99)]), 10, "no longer than the step");
        assert_eq!(had(&[seen(1, true, 5)], &[seen(1, true, 5)]), 10, "it sleeps");
        assert_eq!(had(&[], &[waits(5)]), 0, "it is new");
        // One sleeps until the other, which has no processor, lets it go on.
        assert_eq!(had(&[seen(2, true, 0), waits(5)], &[seen(2, true, 0), waits(5)]), 0);
    }

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
