//! The direct path: the peer's pages are mapped here, the rest goes by the router.

use std::sync::Arc;

use rustix::io::Errno;

use crate::ctl::{CopyMem, Ring, ring};
use crate::error::Error;
use crate::exec::{FarCopy, PeerMemory, Reach, Retired};
use crate::ring::{MrEntry, RqShared};
use crate::shm::{Mapping, PAGE, SharedBytes};
use crate::verbs::{Gid, QpType};

use super::conn::Conn;
use super::peers::{PeerQp, PeerSrq};

/// An extent used of late.
#[derive(Debug)]
struct Recent {
    key: u32,
    /// A window may be bound anew under its key, to memory that has moved meanwhile.
    epoch: u32,
    /// The peer's address of the first of `bytes`.
    from: u64,
    bytes: SharedBytes,
    /// Keeps `bytes` mapped.
    _map: Arc<Mapping>,
}

/// The extents used last. Two: most requests of a QP go to one MR, or in turn to one with data and one with a word that
/// says so.
#[derive(Debug, Default)]
struct Recents {
    held: [Option<Recent>; 2],
    /// Which of them was used last: the other one goes next.
    last: usize,
}

impl Recents {
    /// What is behind `va`, if `key` was used there of late.
    #[inline(always)]
    fn find(&mut self, entry: &MrEntry, key: u32, va: u64) -> Option<SharedBytes> {
        for (index, recent) in self.held.iter().enumerate() {
            if let Some(recent) = recent
                && (recent.key, recent.epoch) == (key, entry.epoch())
                && let Some(bytes) =
                    va.checked_sub(recent.from).and_then(|skipped| recent.bytes.from(skipped))
            {
                self.last = index;
                return Some(bytes);
            }
        }
        None
    }

    fn keep(&mut self, recent: Recent) {
        self.last ^= 1;
        self.held[self.last] = Some(recent);
    }
}

/// A resolved peer and what this side remembers of its memory.
#[derive(Debug)]
pub struct DirectPath {
    pub peer: PeerQp,
    dgid: Gid,
    recents: Recents,
    retired: Arc<Retired>,
}

impl DirectPath {
    pub fn new(peer: PeerQp, dgid: Gid, retired: Arc<Retired>) -> Self {
        DirectPath { peer, dgid, recents: Recents::default(), retired }
    }

    /// Binds the path to one request.
    #[inline(always)]
    pub fn bind<'a>(&'a mut self, conn: &'a Conn, qpn: u32) -> (crate::exec::Peer<'a>, Bound<'a>) {
        let DirectPath { peer, dgid, recents, retired } = self;
        let view = crate::exec::Peer {
            qp: &peer.qp[0],
            rq: RqShared::new(&peer.slots),
            srq: peer.srq.as_ref().map(PeerSrq::ring),
            recv_pd: peer.recv_pd,
            cq: &peer.cq[0],
            cq_bit: peer.cq_bit,
            mrs: &peer.mrs,
            pd: peer.pd,
            qpn: peer.qpn,
        };
        (view, Bound { peer, recents, conn, qpn, dgid, retired })
    }
}

/// [`PeerMemory`] of one request on the direct path.
#[derive(Debug)]
pub struct Bound<'a> {
    peer: &'a PeerQp,
    recents: &'a mut Recents,
    conn: &'a Conn,
    qpn: u32,
    dgid: &'a Gid,
    retired: &'a Retired,
}

impl Bound<'_> {
    fn ring(&self, what: u32) {
        let ring = Ring { qpn: self.qpn, dest_qpn: self.peer.qpn, dgid: self.dgid.0, what };
        // Fails only if router or peer are gone; both are reported as events of their own.
        let _ = self.conn.ask(&ring);
    }

    #[inline(never)]
    fn look_up(&mut self, entry: &MrEntry, key: u32, va: u64, len: u64) -> Option<Reach> {
        let view = entry.read(key)?;
        let holder = view.extents().iter().find(|e| e.holds(va, 1));
        let Some(extent) = holder else {
            let next = view.extents().iter().map(|e| e.va).filter(|start| *start > va).min();
            let len = next.map_or(len, |start| len.min(start - va));
            return Some(self.unmoved(va, len));
        };
        // A window that cannot be mapped (no address space, nonsense in the table) is left to the router's judgement.
        let Ok(map) = self.peer.memory_of(view.pd).window(extent) else { return Some(Reach::Far(len)) };
        // The window begins with the extent's first page.
        let first = map.base().wrapping_add((extent.va % PAGE) as usize);
        // SAFETY: whole pages around the extent are mapped, and stay so while a `Recent` holds the mapping.
        let bytes = unsafe { SharedBytes::new(first, extent.len as usize) };
        self.recents.keep(Recent { key, epoch: view.epoch, from: extent.va, bytes, _map: map });
        self.hit(entry, key, va, len)
    }

    /// Bytes that are in no memfd. If the peer is this very process they are at their own address.
    fn unmoved(&self, va: u64, len: u64) -> Reach {
        if self.peer.client != self.conn.hello.client {
            return Reach::Far(len);
        }
        // SAFETY: registered memory of this process, which its program keeps until deregistration.
        Reach::Here(unsafe { SharedBytes::new(va as *mut u8, len as usize) })
    }

    #[inline(always)]
    fn hit(&mut self, entry: &MrEntry, key: u32, va: u64, len: u64) -> Option<Reach> {
        self.recents.find(entry, key, va).map(|bytes| Reach::Here(bytes.first(len)))
    }
}

impl PeerMemory for Bound<'_> {
    #[inline(always)]
    fn reach(&mut self, entry: &MrEntry, key: u32, va: u64, len: u64) -> Reach {
        if let Some(here) = self.hit(entry, key, va, len) {
            return here;
        }
        self.look_up(entry, key, va, len).unwrap_or(Reach::Far(len))
    }

    fn far(&mut self, copy: FarCopy) -> Result<(), Errno> {
        let request = CopyMem {
            qpn: self.qpn,
            dest_qpn: self.peer.qpn,
            dgid: self.dgid.0,
            kind: copy.kind,
            key: copy.key,
            local: copy.local,
            remote: copy.remote,
            len: copy.len,
        };
        match self.conn.ask(&request) {
            Ok(_) => Ok(()),
            // No router, or one to which the peer has not come back yet.
            Err(Error::Away(_) | Error::Refused { errno: Errno::NOTCONN, .. }) => Err(Errno::AGAIN),
            Err(error) => Err(error.errno()),
        }
    }

    fn retired(&self) -> &Retired {
        self.retired
    }

    fn bell(&mut self) {
        match &self.peer.bell {
            Some(bell) => bell.ring(),
            None => self.ring(ring::BELL),
        }
    }

    fn limit(&mut self) {
        self.ring(ring::LIMIT);
    }

    fn is_reliable(&self) -> bool {
        self.peer.kind != QpType::Uc
    }

    fn fault(&mut self) {
        self.ring(ring::FAULT);
    }
}
