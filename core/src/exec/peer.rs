//! The other end of a request: its queues, its keys, and how its bytes are reached.

use rustix::io::Errno;

use super::Retired;
use crate::ring::mr::{domain, slot_of};
use crate::ring::{Claim, CqShared, MrEntry, QpShared, Ready, RqShared, SrqRing};
use crate::shm::SharedBytes;
use crate::sync::{AtomicU64, Ordering};
use crate::verbs::Access;

/// A peer's QP as this side sees it. All of it is memory the peer writes.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    pub qp: &'a QpShared,
    /// Its receives; with a shared queue the tickets for them.
    pub rq: RqShared<'a>,
    pub srq: Option<SrqRing<'a>>,
    /// The protection domain of its receives' keys.
    pub recv_pd: u32,
    pub cq: &'a CqShared,
    /// Bit of the QP in the CQ's dirty map.
    pub cq_bit: u32,
    pub mrs: &'a [MrEntry],
    pub pd: u32,
    pub qpn: u32,
}

impl<'a> Peer<'a> {
    /// Claims a receive of a connected QP for `client`.
    #[inline]
    pub fn claim(&self, client: u32) -> Ready<'a> {
        match &self.srq {
            None => self.rq.claim(&self.qp.head, client).into(),
            Some(srq) => srq.claim_connected(self.rq, self.qp, self.qpn),
        }
    }

    /// The same of a datagram QP.
    pub fn claim_datagram(&self, client: u32) -> Option<Claim<'a>> {
        match &self.srq {
            None => self.rq.claim(&self.qp.head, client),
            Some(srq) => srq.claim_datagram(self.rq, &self.qp.head, client),
        }
    }

    /// Takes up a claim of an earlier call.
    #[inline]
    pub fn resume(&self, suspended: (u32, u32), client: u32) -> Option<Claim<'a>> {
        match &self.srq {
            None => Claim::resume(self.rq, suspended, client),
            Some(srq) => srq.resume_connected(self.rq, self.qp, suspended, self.qpn),
        }
    }

    /// The word of the receive that is taken next, as far as can be told without looking.
    #[inline]
    pub fn next_receive(&self) -> Option<&'a AtomicU64> {
        match &self.srq {
            None => self.rq.state_word(self.qp.head.load(Ordering::Relaxed)),
            Some(srq) => srq.slots.state_word(srq.header.next()),
        }
    }

    /// A send found no receive and its sender will sleep: leaves word. True: there is one after all.
    pub fn wait_for_receive(&self) -> bool {
        self.qp.wait_for_receive();
        match &self.srq {
            None => self.rq.ready(&self.qp.head),
            Some(srq) => {
                srq.header.wait_for_receive();
                let tickets = self.qp.head.load(Ordering::Relaxed);
                let room = tickets.wrapping_sub(self.qp.taken.load(Ordering::Acquire)) < self.rq.depth();
                room && srq.ready()
            }
        }
    }

    /// The entry behind `key`, with the owner's virtual address of `[iova, iova+len)`.
    #[inline(always)]
    pub fn check(&self, key: u32, need: Access, iova: u64, len: u64) -> Option<(&'a MrEntry, u64)> {
        self.check_in(self.pd, key, need, iova, len)
    }

    /// The same of a memory window's key. `retired`: those that are over for this end.
    #[cold]
    pub fn check_window(
        self,
        retired: &Retired,
        key: u32,
        need: Access,
        iova: u64,
        len: u64,
    ) -> Option<(&'a MrEntry, u64)> {
        let entry = self.mrs.get(slot_of(key))?;
        let (va, epoch) = entry.check_window(key, (self.pd, self.qpn), need, iova, len)?;
        (!retired.has(key, epoch)).then_some((entry, va))
    }

    /// The first address that `key` names.
    #[cold]
    pub fn start_of(&self, key: u32) -> Option<u64> {
        Some(self.mrs.get(slot_of(key))?.read(key)?.iova)
    }

    /// Which binding a SEND with invalidate ends: of a window that is this QP's alone.
    #[cold]
    pub fn binding(self, retired: &Retired, key: u32) -> Option<u32> {
        let view = self.mrs.get(slot_of(key))?.read(key)?;
        let ours = view.pd == domain::window_of_qp(self.qpn) && !retired.has(key, view.epoch);
        ours.then_some(view.epoch)
    }

    /// The same of a key in a receive's list.
    #[inline]
    pub fn check_receive(&self, key: u32, iova: u64, len: u64) -> Option<(&'a MrEntry, u64)> {
        self.check_in(self.recv_pd, key, Access::LOCAL_WRITE, iova, len).or_else(|| {
            let entry = self.mrs.get(slot_of(key))?;
            Some((entry, entry.check_null(key, self.recv_pd, Access::LOCAL_WRITE, len)?))
        })
    }

    #[inline]
    fn check_in(&self, pd: u32, key: u32, need: Access, iova: u64, len: u64) -> Option<(&'a MrEntry, u64)> {
        let entry = self.mrs.get(slot_of(key))?;
        Some((entry, entry.check(key, pd, need, iova, len)?))
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
    /// What this end has invalidated of the peer's.
    fn retired(&self) -> &Retired;
    /// Rings the bell of the peer's receive CQ.
    fn bell(&mut self);
    /// Is the peer's sender told when something goes wrong at its end? Not of UC.
    fn is_reliable(&self) -> bool;
    /// Tells the peer that its shared receive queue has fallen below its limit.
    fn limit(&mut self);
    /// Reports to the peer that a request broke its rules.
    fn fault(&mut self);
}
