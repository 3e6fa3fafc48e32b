//! What the program has unmapped, as UCX's memory hooks tell: registered memory that is kept need not be asked for then.
//!
//! The hook runs in any thread, within munmap(2) and its like, maybe within malloc: it neither waits nor allocates.

use std::ffi::{c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::uct::symbols::Ucx;
use crate::uct::types::{Status, UnmapEvent};

/// `UCM_EVENT_VM_UNMAPPED`.
const VM_UNMAPPED: c_int = 1 << 17;
/// Called early among UCX's own.
const PRIORITY: c_int = 0;

/// Ranges remembered between two looks.
const MOST: usize = 64;

/// `[start, end)`.
pub type Range = (u64, u64);

struct Ranges {
    used: usize,
    all: [Range; MOST],
}

/// Written by the hook, read by the cache.
struct Log {
    news: AtomicBool,
    /// There was no room: it could be anything.
    lost: AtomicBool,
    ranges: Mutex<Ranges>,
}

impl Log {
    const fn new() -> Self {
        let ranges = Mutex::new(Ranges { used: 0, all: [(0, 0); MOST] });
        Log { news: AtomicBool::new(false), lost: AtomicBool::new(false), ranges }
    }

    fn add(&self, range: Range) {
        let noted = self.ranges.try_lock().is_ok_and(|mut ranges| {
            let at = ranges.used;
            let room = at < MOST;
            if room {
                ranges.all[at] = range;
                ranges.used += 1;
            }
            room
        });
        if !noted {
            self.lost.store(true, Ordering::Relaxed);
        }
        // Release: partner is take()'s swap.
        self.news.store(true, Ordering::Release);
    }

    /// What was unmapped since the last call.
    #[inline]
    fn take(&self) -> Unmapped {
        if self.news.load(Ordering::Relaxed) { self.take_news() } else { Unmapped::Nothing }
    }

    #[cold]
    fn take_news(&self) -> Unmapped {
        self.news.swap(false, Ordering::Acquire);
        let Ok(mut ranges) = self.ranges.lock() else { return Unmapped::Anything };
        let used = std::mem::take(&mut ranges.used);
        let all = ranges.all[..used].to_vec();
        drop(ranges);
        if self.lost.swap(false, Ordering::Relaxed) { Unmapped::Anything } else { Unmapped::These(all) }
    }
}

/// An answer of [`Unmaps::take`].
#[derive(Debug, PartialEq, Eq)]
pub enum Unmapped {
    Nothing,
    These(Vec<Range>),
    Anything,
    /// There are no hooks: ask the kernel.
    Unknown,
}

/// A subscription.
pub struct Unmaps {
    ucx: &'static Ucx,
    /// None: UCX has its hooks turned off.
    log: Option<Box<Log>>,
}

impl Unmaps {
    pub fn watch(ucx: &'static Ucx) -> Self {
        let log = Box::new(Log::new());
        let at = std::ptr::from_ref::<Log>(&log).cast_mut().cast();
        // SAFETY: UCX's own function; the hook takes `at` as what it is, which lives until drop() has unset it.
        let status = unsafe { (ucx.call.ucm_set_event_handler)(VM_UNMAPPED, PRIORITY, hook, at) };
        Unmaps { ucx, log: (status == Status::OK).then_some(log) }
    }

    /// What was unmapped since the last call.
    #[inline]
    pub fn take(&self) -> Unmapped {
        self.log.as_ref().map_or(Unmapped::Unknown, |log| log.take())
    }
}

impl Drop for Unmaps {
    fn drop(&mut self) {
        let Some(log) = &self.log else { return };
        let at = std::ptr::from_ref::<Log>(log).cast_mut().cast();
        // SAFETY: UCX's own function with what watch() gave it; it returns when no hook runs.
        unsafe { (self.ucx.call.ucm_unset_event_handler)(VM_UNMAPPED, hook, at) };
    }
}

unsafe extern "C" fn hook(_kind: c_int, event: *const UnmapEvent, log: *mut c_void) {
    // SAFETY: what watch() gave.
    let log = unsafe { &*log.cast::<Log>() };
    // SAFETY: UCX's structure for this kind.
    let UnmapEvent { address, size } = unsafe { event.read() };
    log.add((address, address.saturating_add(size)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_out_once() {
        let log = Log::new();
        assert_eq!(log.take(), Unmapped::Nothing);
        log.add((1, 2));
        log.add((5, 9));
        assert_eq!(log.take(), Unmapped::These(vec![(1, 2), (5, 9)]));
        assert_eq!(log.take(), Unmapped::Nothing);
    }

    #[test]
    fn too_many_are_anything() {
        let log = Log::new();
        (0..=MOST as u64).for_each(|i| log.add((i, i + 1)));
        assert_eq!(log.take(), Unmapped::Anything);
        log.add((1, 2));
        assert_eq!(log.take(), Unmapped::These(vec![(1, 2)]));
    }

    #[test]
    fn a_hook_that_finds_the_log_taken_loses_nothing() {
        let log = Log::new();
        let reading = log.ranges.lock().expect("nobody panicked");
        log.add((1, 2));
        drop(reading);
        assert_eq!(log.take(), Unmapped::Anything);
    }
}
