//! Moving bytes between two lists of segments, from any point on, a bounded amount at a time.

use rustix::io::Errno;

use crate::ring::MrEntry;
use crate::shm::{LocalBytes, copy_in, copy_out};
use crate::verbs::limits;

use super::{FarCopy, PeerMemory, Reach};

/// Local entries: one per sge, and a header in front of datagrams.
pub const MAX_LOCAL: usize = limits::SGE as usize + 1;

/// A stretch of this process's memory, already checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Local {
    pub va: u64,
    pub len: u64,
}

/// A stretch of the peer's memory, already checked.
#[derive(Debug, Clone, Copy)]
pub struct Remote<'a> {
    pub entry: &'a MrEntry,
    pub key: u32,
    pub iova: u64,
    pub va: u64,
    pub len: u64,
}

/// Which way, and under which right of the router's `copy_kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Direction {
    pub to_peer: bool,
    pub far_kind: u32,
}

/// Why bytes were not moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// The key died, or there is nothing at its address.
    Gone,
    /// Who has to copy them is away.
    Later,
}

/// Moves bytes `[from, from+budget)` between a list and one stretch of the peer's memory, which is as long.
/// Returns how many were moved.
#[inline(always)]
pub fn pump_one<M: PeerMemory>(
    memory: &mut M,
    direction: Direction,
    local: &[Local],
    remote: Remote<'_>,
    from: u64,
    budget: u64,
) -> Result<u64, Unreachable> {
    let [local] = local else { return pump(memory, direction, local, &[remote], from, budget) };
    let end = local.len.min(remote.len).min(from.saturating_add(budget));
    let mut at = from;
    while at < end {
        at += move_one(memory, direction, local.va + at, &remote, at, end - at)?;
    }
    Ok(at - from)
}

/// The same between two lists; both hold at least that many bytes unless the local one ends.
pub fn pump<M: PeerMemory>(
    memory: &mut M,
    direction: Direction,
    local: &[Local],
    remote: &[Remote<'_>],
    from: u64,
    budget: u64,
) -> Result<u64, Unreachable> {
    let mut l = Cursor::new(local, from, |s| s.len);
    let mut r = Cursor::new(remote, from, |s| s.len);
    let mut moved = 0;
    while moved < budget {
        let (Some((ls, lo)), Some((rs, ro))) = (l.current(), r.current()) else { break };
        let want = (ls.len - lo).min(rs.len - ro).min(budget - moved);
        let step = move_one(memory, direction, ls.va + lo, rs, ro, want)?;
        l.advance(step);
        r.advance(step);
        moved += step;
    }
    Ok(moved)
}

#[inline(always)]
fn move_one<M: PeerMemory>(
    memory: &mut M,
    direction: Direction,
    local: u64,
    remote: &Remote<'_>,
    offset: u64,
    want: u64,
) -> Result<u64, Unreachable> {
    match memory.reach(remote.entry, remote.key, remote.va.wrapping_add(offset), want) {
        Reach::Here(bytes) => {
            let bytes = bytes.first(want);
            let len = bytes.len() as u64;
            let here = LocalBytes { addr: local, len: bytes.len() };
            if direction.to_peer {
                // SAFETY: `here` lies in a registered range of this process, `bytes` in a live mapping (PeerMemory's contract).
                unsafe { copy_in(bytes, here) };
            } else {
                // SAFETY: as above, and the lkey grants LOCAL_WRITE.
                unsafe { copy_out(here, bytes) };
            }
            Ok(len)
        }
        Reach::Far(len) => {
            let len = len.min(want);
            let copy = FarCopy {
                kind: direction.far_kind,
                key: remote.key,
                local,
                remote: remote.iova.wrapping_add(offset),
                len,
            };
            match memory.far(copy) {
                Ok(()) => Ok(len),
                Err(Errno::AGAIN) => Err(Unreachable::Later),
                Err(_) => Err(Unreachable::Gone),
            }
        }
    }
}

/// A position in a list of segments.
struct Cursor<'s, T> {
    rest: &'s [T],
    offset: u64,
    len: fn(&T) -> u64,
}

impl<'s, T> Cursor<'s, T> {
    fn new(list: &'s [T], from: u64, len: fn(&T) -> u64) -> Self {
        let mut cursor = Cursor { rest: list, offset: 0, len };
        cursor.advance(from);
        cursor
    }

    fn advance(&mut self, by: u64) {
        self.offset += by;
        while let [first, rest @ ..] = self.rest {
            let len = (self.len)(first);
            if self.offset < len {
                break;
            }
            self.offset -= len;
            self.rest = rest;
        }
    }

    fn current(&self) -> Option<(&'s T, u64)> {
        self.rest.first().map(|segment| (segment, self.offset))
    }
}
