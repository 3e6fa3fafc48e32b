//! Which offsets of a PD's sparse file are whose. Pure bookkeeping.
//!
//! Each moved run has a window of its own and starts in its middle. `mremap` (glibc's realloc) makes a
//! mapping of a moved run grow over the offsets that follow; in a window of its own nobody else is there.
//! Runs of the brk heap share windows, so that neighbours merge into one mapping: nothing remaps the heap.
//! An offset is handed out again only after [`Windows::release`], which the caller may use only for offsets
//! that nothing maps any more.

use std::collections::BTreeMap;

/// Bytes of file per window.
pub(super) const WINDOW: u64 = 1 << 40;
/// Size of the whole file.
pub(super) const FILE_SIZE: u64 = 1 << 62;
/// Offsets agree with addresses modulo this, so that huge pages stay possible.
const CONGRUENT: u64 = 2 << 20;

pub(super) struct Windows {
    next: u64,
    limit: u64,
    free: Vec<u64>,
    /// Offsets handed out or given up for ever: start -> end, disjoint.
    used: BTreeMap<u64, u64>,
    /// Windows of the brk heap: (base, address at the window's middle).
    heap: Vec<(u64, u64)>,
}

impl Windows {
    pub fn new() -> Self {
        Self::with_limit(FILE_SIZE / WINDOW)
    }

    fn with_limit(limit: u64) -> Self {
        Windows { next: 0, limit, free: Vec::new(), used: BTreeMap::new(), heap: Vec::new() }
    }

    /// The offsets right after `end_off`, if they are in the same window and were never handed out.
    pub fn after(&mut self, end_off: u64, len: u64) -> Option<u64> {
        let window = (end_off - 1) / WINDOW;
        self.take(window, end_off, len)
    }

    /// The offsets right before `off`, under the same conditions.
    pub fn before(&mut self, off: u64, len: u64) -> Option<u64> {
        let start = off.checked_sub(len)?;
        self.take(off / WINDOW, start, len)
    }

    /// A new window for a run at `va`.
    pub fn fresh(&mut self, va: u64, len: u64) -> Option<u64> {
        let base = self.new_window()?;
        let got = self.take(base / WINDOW, base + WINDOW / 2 + va % CONGRUENT, len);
        if got.is_none() {
            self.free.push(base);
        }
        got
    }

    /// Offsets for a run of the brk heap, beside its neighbours where they are unused.
    pub fn heap(&mut self, va: u64, len: u64) -> Option<u64> {
        for (base, middle) in self.heap.clone().into_iter().rev() {
            let off = (base + WINDOW / 2).wrapping_add(va.wrapping_sub(middle));
            if let Some(off) = self.take(base / WINDOW, off, len) {
                return Some(off);
            }
        }
        let (base, middle) = (self.new_window()?, va - va % CONGRUENT);
        self.heap.push((base, middle));
        self.take(base / WINDOW, base + WINDOW / 2 + (va - middle), len)
    }

    /// Gives offsets back for use by others. Only for offsets that nothing maps.
    pub fn release(&mut self, off: u64, len: u64) {
        let (start, end) = (off, off + len);
        let hit: Vec<(u64, u64)> =
            self.used.range(..end).rev().take_while(|(_, e)| **e > start).map(|(s, e)| (*s, *e)).collect();
        for (s, e) in hit {
            self.used.remove(&s);
            if s < start {
                self.used.insert(s, start);
            }
            if e > end {
                self.used.insert(end, e);
            }
        }
        let base = off / WINDOW * WINDOW;
        let empty = self.used.range(base..base + WINDOW).next().is_none();
        if empty && !self.heap.iter().any(|(b, _)| *b == base) && !self.free.contains(&base) {
            self.free.push(base);
        }
    }

    /// Marks offsets found mapped that were never handed out (a mapping that grew): they stay out of use.
    pub fn give_up(&mut self, off: u64, len: u64) {
        let (mut at, end) = (off, off + len);
        while at < end {
            let cover = self.used.range(..=at).next_back().map(|(_, e)| *e).filter(|e| *e > at);
            if let Some(e) = cover {
                at = e;
                continue;
            }
            let stop = self.used.range(at..end).next().map_or(end, |(s, _)| *s);
            self.used.insert(at, stop);
            at = stop;
        }
    }

    fn new_window(&mut self) -> Option<u64> {
        if let Some(base) = self.free.pop() {
            return Some(base);
        }
        (self.next < self.limit).then(|| {
            self.next += 1;
            (self.next - 1) * WINDOW
        })
    }

    fn take(&mut self, window: u64, off: u64, len: u64) -> Option<u64> {
        let end = off.checked_add(len)?;
        let base = window * WINDOW;
        if off < base || end > base + WINDOW || self.is_used(off, end) {
            return None;
        }
        self.used.insert(off, end);
        Some(off)
    }

    fn is_used(&self, start: u64, end: u64) -> bool {
        self.used.range(..end).next_back().is_some_and(|(_, e)| *e > start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_are_a_window_apart_and_can_be_extended() {
        let mut w = Windows::new();
        let a = w.fresh(0x7000_1000, 0x1000).unwrap();
        let b = w.fresh(0x7000_2000, 0x1000).unwrap();
        assert!(b.abs_diff(a) >= WINDOW / 2);
        assert_eq!(a % CONGRUENT, 0x7000_1000 % CONGRUENT);
        assert_eq!(w.after(a + 0x1000, 0x3000), Some(a + 0x1000));
        assert_eq!(w.before(a, 0x2000), Some(a - 0x2000));
        assert_eq!(w.after(a + 0x1000, 0x1000), None, "already handed out");
        assert_eq!(w.after(a + 0x4000, WINDOW), None, "past the window's end");
    }

    #[test]
    fn heap_runs_keep_their_distance_in_one_window() {
        let mut w = Windows::new();
        let a = w.heap(0x5600_0000, 0x1000).unwrap();
        assert_eq!(w.heap(0x5600_3000, 0x2000), Some(a + 0x3000));
        assert_eq!(w.heap(0x55ff_f000, 0x1000), Some(a - 0x1000));
        let again = w.heap(0x5600_0000, 0x1000).unwrap();
        assert_ne!(again / WINDOW, a / WINDOW, "offsets in use are never given twice");
        w.release(a, 0x1000);
        w.release(again, 0x1000);
        let third = w.heap(0x5600_0000, 0x1000).unwrap();
        assert!(third == a || third == again);
    }

    #[test]
    fn windows_come_back_and_run_out() {
        let mut w = Windows::with_limit(2);
        let a = w.fresh(0, 4096).unwrap();
        let b = w.fresh(0, 4096).unwrap();
        assert_eq!(w.fresh(0, 4096), None);
        w.give_up(a + 4096, 4096);
        w.release(a, 4096);
        assert_eq!(w.fresh(0, 4096), None, "a window with a grown mapping stays out of use");
        w.release(b, 4096);
        assert_eq!(w.fresh(0, 4096), Some(b));
    }

    proptest! {
        /// Whatever the order of calls, no byte of the file is handed out twice at one time.
        #[test]
        fn no_offset_twice(ops in prop::collection::vec((0u8..6, 0u64..64, 1u64..16), 1..120)) {
            let mut w = Windows::with_limit(8);
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (op, n, pages) in ops {
                let len = pages * 4096;
                let pick = (!live.is_empty()).then(|| live[n as usize % live.len()]);
                let got = match (op, pick) {
                    (0, _) => w.fresh(n * 4096, len),
                    (1, _) => w.heap((n + 1000) * 4096, len),
                    (2, Some((s, l))) => w.after(s + l, len),
                    (3, Some((s, _))) => w.before(s, len),
                    (4, Some((s, l))) => {
                        live.retain(|x| *x != (s, l));
                        w.release(s, l);
                        None
                    }
                    (5, Some((s, l))) => {
                        w.give_up(s + l, len);
                        None
                    }
                    _ => None,
                };
                if let Some(off) = got {
                    for (s, l) in &live {
                        prop_assert!(off + len <= *s || s + l <= off, "{off:#x}+{len:#x} over {s:#x}+{l:#x}");
                    }
                    live.push((off, len));
                }
            }
        }
    }
}
