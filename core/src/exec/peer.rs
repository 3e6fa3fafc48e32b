//! The other end of a request: its queues, its keys, and how its bytes are reached.

use rustix::io::Errno;

use crate::ring::{CqShared, MrEntry, QpShared, RqShared, mr::slot_of};
use crate::shm::SharedBytes;
use crate::verbs::Access;

/// A peer's QP as this side sees it. All of it is memory the peer writes.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    pub qp: &'a QpShared,
    pub rq: RqShared<'a>,
    pub cq: &'a CqShared,
    /// Bit of the QP in the CQ's dirty map.
    pub cq_bit: u32,
    pub mrs: &'a [MrEntry],
    pub pd: u32,
    pub qpn: u32,
}

impl<'a> Peer<'a> {
    /// The entry behind `key`, with the owner's virtual address of `[iova, iova+len)`.
    #[inline]
    pub fn check(&self, key: u32, need: Access, iova: u64, len: u64) -> Option<(&'a MrEntry, u64)> {
        let entry = self.mrs.get(slot_of(key))?;
        Some((entry, entry.check(key, self.pd, need, iova, len)?))
    }
}

/// Where bytes of the peer are.
#[derive(Debug, Clone, Copy)]
pub enum Reach {
    /// Mapped here; maybe fewer than asked for, never none.
    Here(SharedBytes),
    /// So many bytes are only reachable by [`PeerMemory::far`].
    Far(u64),
}

/// A copy that this process cannot do itself.
#[derive(Debug, Clone, Copy)]
pub struct FarCopy {
    /// One of `ctl::copy_kind`.
    pub kind: u32,
    pub key: u32,
    /// Virtual address here.
    pub local: u64,
    /// Address in the key's own (iova) space.
    pub remote: u64,
    pub len: u64,
}

/// A path: how the peer's bytes are reached, and how the peer is woken.
pub trait PeerMemory {
    /// Finds `[va, va+len)` (the peer's addresses, inside the MR behind `entry`, `len` > 0).
    fn reach(&mut self, entry: &MrEntry, key: u32, va: u64, len: u64) -> Reach;
    /// Has somebody else copy; EAGAIN where nobody can at this time.
    fn far(&mut self, copy: FarCopy) -> Result<(), Errno>;
    /// Rings the bell of the peer's receive CQ.
    fn bell(&mut self);
    /// Reports to the peer that a request broke its rules.
    fn fault(&mut self);
}
