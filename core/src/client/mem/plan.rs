//! What a registration may move, from what the kernel says of its range. Pure.

use super::maps::Vma;
use super::{Extent, MemError, Want};

/// The bytes asked for and the pages around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub addr: u64,
    pub end: u64,
    page: u64,
}

impl Span {
    pub fn new(addr: u64, len: u64, page: u64) -> Result<Self, MemError> {
        let end = addr.checked_add(len).filter(|e| e.checked_add(page).is_some());
        let end = end.ok_or(MemError::Wraps { addr, len })?;
        Ok(Span { addr, end, page })
    }

    /// All pages that the range touches.
    pub fn outer(&self) -> (u64, u64) {
        let mask = self.page - 1;
        (self.addr & !mask, (self.end + mask) & !mask)
    }

    /// The pages that may move: whole ones for a receive target, the partial ones at the ends too for remote
    /// access, none for a source.
    pub fn movable(&self, want: Want) -> (u64, u64) {
        let mask = self.page - 1;
        let inner = ((self.addr + mask) & !mask, self.end & !mask);
        match want {
            _ if self.addr == self.end => (self.addr, self.addr),
            Want { remote: true, .. } => self.outer(),
            Want { local_write: true, .. } if inner.0 < inner.1 => inner,
            _ => (self.addr, self.addr),
        }
    }

    /// As `ibv_reg_mr`: every byte must be there and readable, and writable if the device may write.
    pub fn check(&self, vmas: &[Vma], want: Want) -> Result<(), MemError> {
        let bad = |at: u64, why| MemError::BadAddress { addr: self.addr, len: self.end - self.addr, at, why };
        let (mut at, end) = self.outer();
        for vma in vmas {
            if vma.start > at {
                break;
            }
            if !vma.read {
                return Err(bad(vma.start.max(self.addr), "not readable"));
            }
            if want.local_write && !vma.write {
                return Err(bad(vma.start.max(self.addr), "not writable"));
            }
            at = vma.end;
        }
        if at < end && self.addr < self.end { Err(bad(at.max(self.addr), "not mapped")) } else { Ok(()) }
    }
}

/// Which file a mapping is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    pub dev: (u32, u32),
    pub ino: u64,
}

impl FileId {
    pub fn is_mapped_by(&self, vma: &Vma) -> bool {
        vma.shared && vma.ino == self.ino && vma.dev == self.dev
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub vma: Vma,
    /// In our file already.
    pub own: bool,
}

/// What of `range` is in our file already or may move into it, in order.
pub(super) fn pieces(vmas: &[Vma], range: (u64, u64), file: FileId, zones: &[(u64, u64)]) -> Vec<Piece> {
    let mut out = Vec::new();
    for vma in vmas.iter().filter(|v| v.start < range.1 && v.end > range.0) {
        let vma = vma.clip(range.0, range.1);
        if file.is_mapped_by(&vma) {
            out.push(Piece { vma, own: true });
        } else if vma.is_plain() {
            let free = subtract((vma.start, vma.end), zones);
            out.extend(free.into_iter().map(|(s, e)| Piece { vma: vma.clip(s, e), own: false }));
        }
    }
    out
}

/// `range` without what `holes` (in any order, overlapping or not) cover.
pub(super) fn subtract(range: (u64, u64), holes: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut holes: Vec<_> = holes.iter().filter(|h| h.0 < range.1 && h.1 > range.0).collect();
    holes.sort_unstable();
    let (mut at, mut out) = (range.0, Vec::new());
    for (s, e) in holes {
        if *s > at {
            out.push((at, *s));
        }
        at = at.max(*e);
    }
    if at < range.1 {
        out.push((at, range.1));
    }
    out
}

/// Extents of a registration: what is contiguous joined, cut to its bytes, the largest `most` of them in order.
pub(super) fn extents(span: &Span, parts: &[super::table::Part], most: usize) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for part in parts.iter().filter(|p| p.start < span.end && p.end > span.addr) {
        let p = part.clip(span.addr, span.end);
        match out.last_mut() {
            Some(e) if e.va + e.len == p.start && e.offset + e.len == p.off => e.len += p.len(),
            _ => out.push(Extent { va: p.start, len: p.len(), offset: p.off }),
        }
    }
    while out.len() > most {
        let smallest = (0..out.len()).min_by_key(|i| out[*i].len).unwrap_or(0);
        out.remove(smallest);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::maps::Name;
    use super::super::table::Part;
    use super::*;
    use proptest::prelude::*;

    const OURS: FileId = FileId { dev: (0, 1), ino: 7 };

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            offset: 0,
            read: true,
            write: true,
            exec: false,
            shared: false,
            dev: (0, 0),
            ino: 0,
            name: Name::Anon,
            huge: false,
        }
    }

    const REMOTE: Want = Want { remote: true, local_write: true };
    const LOCAL: Want = Want { remote: false, local_write: true };
    const NONE: Want = Want { remote: false, local_write: false };

    #[test]
    fn access_decides_which_pages_move() {
        let s = Span::new(0x1010, 0x3000, 0x1000).unwrap();
        assert_eq!(s.movable(REMOTE), (0x1000, 0x5000));
        assert_eq!(s.movable(LOCAL), (0x2000, 0x4000));
        let none = s.movable(NONE);
        assert_eq!(none.0, none.1);
        let small = Span::new(0x1010, 0x20, 0x1000).unwrap().movable(LOCAL);
        assert_eq!(small.0, small.1);
        assert!(Span::new(u64::MAX - 5, 10, 0x1000).is_err());
        assert!(Span::new(u64::MAX - 5, 3, 0x1000).is_err());
    }

    #[test]
    fn holes_and_protections_fault() {
        let s = Span::new(0x1010, 0x3000, 0x1000).unwrap();
        let whole = [vma(0x1000, 0x3000), vma(0x3000, 0x5000)];
        assert!(s.check(&whole, REMOTE).is_ok());
        assert!(s.check(&whole[..1], REMOTE).is_err());
        assert!(s.check(&whole[1..], NONE).is_err());
        assert!(s.check(&[], NONE).is_err());
        let ro = [vma(0x1000, 0x3000), Vma { write: false, ..vma(0x3000, 0x5000) }];
        assert!(s.check(&ro, LOCAL).is_err());
        assert!(s.check(&ro, Want { remote: true, local_write: false }).is_ok());
        let dark = [vma(0x1000, 0x3000), Vma { read: false, ..vma(0x3000, 0x5000) }];
        assert!(s.check(&dark, NONE).is_err());
    }

    #[test]
    fn only_plain_memory_and_our_own_file_count() {
        let file = Vma { ino: 99, dev: (8, 1), name: Name::Other, ..vma(0x2000, 0x3000) };
        let ours = Vma { shared: true, ino: 7, dev: (0, 1), name: Name::Other, ..vma(0x3000, 0x4000) };
        let other_pd = Vma { ino: 8, ..ours };
        let vmas = [vma(0x1000, 0x2000), file, ours, Vma { start: 0x4000, end: 0x5000, ..other_pd }];
        let got = pieces(&vmas, (0x1000, 0x5000), OURS, &[]);
        assert_eq!(
            got.iter().map(|p| (p.vma.start, p.own)).collect::<Vec<_>>(),
            [(0x1000, false), (0x3000, true)]
        );
        let zoned = pieces(&[vma(0x1000, 0x5000)], (0x1000, 0x5000), OURS, &[(0x2000, 0x3000)]);
        assert_eq!(
            zoned.iter().map(|p| (p.vma.start, p.vma.end)).collect::<Vec<_>>(),
            [(0x1000, 0x2000), (0x3000, 0x5000)]
        );
    }

    #[test]
    fn extents_join_and_keep_the_largest() {
        let s = Span::new(0x1800, 0x7000, 0x1000).unwrap();
        let part = |start, end, off| Part { start, end, off, id: 0 };
        let parts = [
            part(0x1000, 0x2000, 0x10000),
            part(0x2000, 0x3000, 0x11000),
            part(0x3000, 0x4000, 0x50000),
            part(0x5000, 0x7000, 0x60000),
            part(0x8000, 0x9000, 0x70000),
        ];
        let e = extents(&s, &parts, 3);
        assert_eq!(e[0], Extent { va: 0x1800, len: 0x1800, offset: 0x10800 });
        assert_eq!(e[1], Extent { va: 0x3000, len: 0x1000, offset: 0x50000 });
        assert_eq!(e[2], Extent { va: 0x5000, len: 0x2000, offset: 0x60000 });
    }

    proptest! {
        #[test]
        fn subtracting_agrees_with_counting(start in 0u64..30, len in 0u64..30,
            holes in prop::collection::vec((0u64..60, 0u64..10), 0..8)) {
            let holes: Vec<_> = holes.into_iter().map(|(s, l)| (s, s + l)).collect();
            let left = subtract((start, start + len), &holes);
            for at in 0..80 {
                let want = (start..start + len).contains(&at) && !holes.iter().any(|h| (h.0..h.1).contains(&at));
                prop_assert_eq!(left.iter().any(|h| (h.0..h.1).contains(&at)), want);
            }
        }
    }
}
