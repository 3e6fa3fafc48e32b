//! Which pages of the address space are in the file, where, and how many registrations hold them. Pure
//! bookkeeping: it trusts the caller's word on what is mapped and performs nothing.

use std::collections::BTreeMap;

/// A piece of address space that lies contiguously in the file. `id` names one act of moving (or adopting):
/// memory that later takes the same address gets another, so a stale holder cannot release it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub start: u64,
    pub end: u64,
    pub off: u64,
    pub id: u64,
}

impl Part {
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    pub fn end_off(&self) -> u64 {
        self.off + self.len()
    }

    /// The piece within `[start, end)`, which must overlap it.
    pub fn clip(&self, start: u64, end: u64) -> Part {
        let (s, e) = (self.start.max(start), self.end.min(end));
        Part { start: s, end: e, off: self.off + (s - self.start), id: self.id }
    }

    /// `next` follows in memory and in the file.
    pub fn joins(&self, next: &Part) -> bool {
        self.end == next.start && self.end_off() == next.off
    }
}

#[derive(Clone, Copy)]
struct Seg {
    part: Part,
    refs: u32,
}

#[derive(Default)]
pub(super) struct Table {
    segs: BTreeMap<u64, Seg>,
    runs: usize,
    last_id: u64,
}

impl Table {
    /// Number of stretches that are contiguous in memory and file: as many mappings as the kernel keeps.
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// What the table knows of `[start, end)`, clipped to it, in order.
    pub fn over(&self, start: u64, end: u64) -> Vec<Part> {
        let first = self.segs.range(..=start).next_back().filter(|(_, s)| s.part.end > start);
        let rest = self.segs.range(start + 1..end);
        first.into_iter().chain(rest).map(|(_, s)| s.part.clip(start, end)).collect()
    }

    /// Whether the table knows all of `[start, end)`.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        let from = self.segs.range(..=start).next_back().map_or(start, |(first, _)| *first);
        for seg in self.segs.range(from..end).map(|(_, s)| s.part).skip_while(|p| p.end <= start) {
            if seg.start > at {
                return false;
            }
            at = seg.end;
        }
        at >= end
    }

    /// Enters a piece held once. Nothing may be known of its addresses.
    pub fn insert(&mut self, start: u64, end: u64, off: u64) -> Part {
        debug_assert!(self.over(start, end).is_empty());
        self.last_id += 1;
        let part = Part { start, end, off, id: self.last_id };
        self.put(Seg { part, refs: 1 });
        part
    }

    /// Holds once more what the table knows of `[start, end)`.
    pub fn acquire(&mut self, start: u64, end: u64) -> Vec<Part> {
        self.cut(start);
        self.cut(end);
        self.segs
            .range_mut(start..end)
            .map(|(_, s)| {
                s.refs += 1;
                s.part
            })
            .collect()
    }

    /// Forgets `[start, end)`: its memory is no longer there. Holders keep parts that match nothing.
    pub fn forget(&mut self, start: u64, end: u64) {
        self.cut(start);
        self.cut(end);
        let keys: Vec<u64> = self.segs.range(start..end).map(|(k, _)| *k).collect();
        for k in keys {
            self.take(k);
        }
    }

    /// Lets go of a part once. `freed` were held for the last time, `stale` are forgotten already.
    pub fn release(&mut self, part: &Part) -> Released {
        self.cut(part.start);
        self.cut(part.end);
        let mut out = Released::default();
        let mut at = part.start;
        for seg in self.over(part.start, part.end).into_iter().filter(|s| s.id == part.id) {
            if seg.start > at {
                out.stale.push(part.clip(at, seg.start));
            }
            at = seg.end;
            self.drop_one(&seg, &mut out);
        }
        if at < part.end {
            out.stale.push(part.clip(at, part.end));
        }
        self.join_at(part.start);
        self.join_at(part.end);
        out
    }

    fn drop_one(&mut self, seg: &Part, out: &mut Released) {
        if let Some(s) = self.segs.get_mut(&seg.start) {
            s.refs -= 1;
            if s.refs == 0 {
                self.take(seg.start);
                out.freed.push(*seg);
            }
        }
    }

    /// Splits the segment that spans `at`.
    fn cut(&mut self, at: u64) {
        let Some((_, &seg)) = self.segs.range(..at).next_back() else { return };
        if seg.part.end <= at {
            return;
        }
        let (left, right) = (seg.part.clip(0, at), seg.part.clip(at, u64::MAX));
        self.segs.insert(left.start, Seg { part: left, refs: seg.refs });
        self.segs.insert(right.start, Seg { part: right, refs: seg.refs });
    }

    /// Undoes a split that no longer tells anything apart.
    fn join_at(&mut self, at: u64) {
        let Some(&right) = self.segs.get(&at) else { return };
        let Some((&k, &left)) = self.segs.range(..at).next_back() else { return };
        if left.part.joins(&right.part) && left.part.id == right.part.id && left.refs == right.refs {
            self.segs.remove(&at);
            let part = Part { end: right.part.end, ..left.part };
            self.segs.insert(k, Seg { part, refs: left.refs });
        }
    }

    fn put(&mut self, seg: Seg) {
        let (before, after) = self.neighbours(&seg.part);
        self.runs += 1;
        self.runs -= usize::from(before) + usize::from(after);
        self.segs.insert(seg.part.start, seg);
    }

    fn take(&mut self, key: u64) {
        if let Some(seg) = self.segs.remove(&key) {
            let (before, after) = self.neighbours(&seg.part);
            self.runs += usize::from(before) + usize::from(after);
            self.runs -= 1;
        }
    }

    fn neighbours(&self, part: &Part) -> (bool, bool) {
        let before = self.segs.range(..part.start).next_back().is_some_and(|(_, s)| s.part.joins(part));
        let after = self.segs.get(&part.end).is_some_and(|s| part.joins(&s.part));
        (before, after)
    }
}

#[derive(Default, Debug)]
pub(super) struct Released {
    pub freed: Vec<Part>,
    pub stale: Vec<Part>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shared_pages_are_freed_by_the_last_holder() {
        let mut t = Table::default();
        let a = t.insert(0x1000, 0x5000, 0x90_1000);
        let b = t.acquire(0x2000, 0x3000);
        assert_eq!((b.len(), b[0].off), (1, 0x90_2000));
        let r = t.release(&a);
        assert_eq!(
            r.freed.iter().map(|p| (p.start, p.end)).collect::<Vec<_>>(),
            [(0x1000, 0x2000), (0x3000, 0x5000)]
        );
        assert!(r.stale.is_empty());
        assert_eq!(t.release(&b[0]).freed.len(), 1);
        assert_eq!(t.runs(), 0);
    }

    #[test]
    fn a_stale_holder_frees_nothing() {
        let mut t = Table::default();
        let old = t.insert(0x1000, 0x3000, 0x90_1000);
        t.forget(0x1000, 0x2000);
        let new = t.insert(0x1000, 0x2000, 0x70_1000);
        let r = t.release(&old);
        assert_eq!(r.stale, [old.clip(0x1000, 0x2000)]);
        assert_eq!(r.freed, [old.clip(0x2000, 0x3000)]);
        assert_eq!(t.over(0, 0x10000), [new]);
    }

    #[test]
    fn runs_count_what_does_not_join() {
        let mut t = Table::default();
        let a = t.insert(0x1000, 0x2000, 0x9000);
        let c = t.insert(0x3000, 0x4000, 0xb000);
        assert_eq!(t.runs(), 2);
        let b = t.insert(0x2000, 0x3000, 0xa000);
        assert_eq!(t.runs(), 1);
        t.insert(0x4000, 0x5000, 0xf000);
        assert_eq!(t.runs(), 2);
        t.release(&b);
        assert_eq!(t.runs(), 3);
        t.release(&a);
        t.release(&c);
        assert_eq!(t.runs(), 1);
    }

    proptest! {
        /// Against a page-by-page model: who holds what, what is freed when, how many runs there are.
        #[test]
        fn agrees_with_a_model(ops in prop::collection::vec((0u8..4, 0u64..40, 1u64..12), 1..100)) {
            let mut t = Table::default();
            let mut model: BTreeMap<u64, (u64, u64, u32)> = BTreeMap::new(); // page -> off, id, refs
            let mut held: Vec<Part> = Vec::new();
            let mut next = 1000;
            for (op, page, n) in ops {
                let (s, e) = (page, page + n);
                match op {
                    0 if !(s..e).any(|p| model.contains_key(&p)) => {
                        let off = if page % 2 == 0 { next += 100; next } else { 10_000 + page };
                        let part = t.insert(s, e, off);
                        for p in s..e { model.insert(p, (off + (p - s), part.id, 1)); }
                        held.push(part);
                    }
                    1 => {
                        held.extend(t.acquire(s, e));
                        for p in s..e { if let Some(m) = model.get_mut(&p) { m.2 += 1; } }
                    }
                    2 => {
                        t.forget(s, e);
                        for p in s..e { model.remove(&p); }
                    }
                    3 if !held.is_empty() => {
                        let part = held.remove(page as usize % held.len());
                        let r = t.release(&part);
                        let mut freed: Vec<u64> = Vec::new();
                        for p in part.start..part.end {
                            if let Some(m) = model.get_mut(&p).filter(|m| m.1 == part.id) {
                                m.2 -= 1;
                                if m.2 == 0 { model.remove(&p); freed.push(p); }
                            }
                        }
                        let got: Vec<u64> = r.freed.iter().flat_map(|p| p.start..p.end).collect();
                        prop_assert_eq!(got, freed);
                    }
                    _ => {}
                }
                let pages: Vec<(u64, u64, u64)> = t.over(0, 100).iter()
                    .flat_map(|p| (p.start..p.end).map(move |v| (v, p.off + (v - p.start), p.id))).collect();
                for (s, e) in [(page, page + n), (0, page + 1), (page, 100)] {
                    prop_assert_eq!(t.covers(s, e), (s..e).all(|p| model.contains_key(&p)));
                }
                let want: Vec<(u64, u64, u64)> = model.iter().map(|(v, m)| (*v, m.0, m.1)).collect();
                prop_assert_eq!(pages, want);
                let runs = model.iter().filter(|(v, m)| {
                    v.checked_sub(1).and_then(|b| model.get(&b)).is_none_or(|b| b.0 + 1 != m.0)
                }).count();
                prop_assert_eq!(t.runs(), runs);
            }
        }
    }
}
