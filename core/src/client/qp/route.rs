//! How a send queue reaches its peers: one for a connected QP, many for UD.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::ctl::{Resolve, peer_state};
use crate::exec::{Retired, Target, UdDest};
use crate::sync::Ordering;
use crate::verbs::Gid;

use super::super::context::Context;
use super::super::path::DirectPath;
use super::Qp;

/// The resolved peers of a send queue.
#[derive(Debug, Default)]
pub struct Route {
    /// Peer of a connected QP: (dgid, qpn) as set at RTR.
    pub dest: Option<(Gid, u32)>,
    connected: Option<DirectPath>,
    /// XRC: the shared receive queue that `connected` leads to, and the way to others.
    srqn: u32,
    queues: HashMap<u32, DirectPath>,
    datagrams: HashMap<(Gid, u32), DirectPath>,
    /// What was invalidated of the connected peer's, by whichever of its queues.
    retired: Arc<Retired>,
    /// The connected peer turned out to be on another host after the QP was connected.
    pub far_peer: bool,
    /// Destinations of datagrams that are on other hosts.
    far: HashSet<(Gid, u32)>,
}

impl Route {
    /// Drops what is known of the peers.
    pub fn forget(&mut self) {
        self.connected = None;
        self.queues.clear();
        self.datagrams.clear();
        self.far.clear();
        self.far_peer = false;
    }

    /// XRC: the requests that follow are for the shared receive queue `srqn`.
    pub fn aim(&mut self, srqn: u32) {
        if self.srqn != srqn {
            if let Some(path) = self.connected.take() {
                self.queues.insert(self.srqn, path);
            }
            self.connected = self.queues.remove(&srqn);
            self.srqn = srqn;
        }
    }

    /// Is the peer announced when it comes? One queue of many, or one QP of a datagram's, is not.
    pub fn is_announced(&self, target: &Target) -> bool {
        self.srqn == 0 && !matches!(target, Target::Datagram(_))
    }

    /// The path for a request, if known.
    #[inline]
    pub fn find(&mut self, target: &Target) -> Option<&mut DirectPath> {
        match target {
            Target::Datagram(UdDest { dgid, qpn, .. }) => self.datagrams.get_mut(&(*dgid, *qpn)),
            _ => self.connected.as_mut(),
        }
    }

    /// Is a path for `target` known that still leads somewhere?
    #[inline(always)]
    pub fn knows(&mut self, target: &Target) -> bool {
        match target {
            Target::Datagram(dest) => self.knows_datagram(dest),
            _ => self.connected.is_some(),
        }
    }

    #[inline(never)]
    fn knows_datagram(&mut self, dest: &UdDest) -> bool {
        let key = (dest.dgid, dest.qpn);
        // A group has no place of its own: its members have.
        if self.is_far(dest) || dest.dgid.is_multicast() {
            return true;
        }
        let alive = |path: &DirectPath| path.peer.qp[0].qpn.load(Ordering::Relaxed) == dest.qpn;
        let known = self.datagrams.get(&key).is_some_and(alive);
        if !known {
            self.datagrams.remove(&key);
        }
        known
    }

    /// Does the router carry datagrams to `dest` to another host?
    pub fn is_far(&self, dest: &UdDest) -> bool {
        !self.far.is_empty() && self.far.contains(&(dest.dgid, dest.qpn))
    }

    /// Asks the router.
    pub fn resolve(&mut self, context: &Context, qpn: u32, target: &Target) {
        let dest = match target {
            Target::Datagram(dest) => Some((dest.dgid, dest.qpn)),
            _ => self.dest,
        };
        let Some((dgid, dest_qpn)) = dest else { return };
        let request = Resolve { qpn, dest_qpn, dgid: dgid.0, srqn: self.srqn, _pad: 0 };
        let Ok((info, fds)) = context.conn.call(&request, &[]) else { return };
        if info.state == peer_state::LINK {
            if !matches!(target, Target::Datagram(_)) {
                self.far_peer = true;
            } else if context.links.open_datagrams(context).is_ok() {
                self.far.insert((dgid, dest_qpn));
            }
            return;
        }
        if info.state != peer_state::READY {
            return;
        }
        let Ok(peer) = context.peers.admit(dest_qpn, &info, fds) else { return };
        let path = DirectPath::new(peer, dgid, Arc::clone(&self.retired));
        match target {
            Target::Datagram(_) => {
                self.datagrams.insert((dgid, dest_qpn), path);
            }
            _ => self.connected = Some(path),
        }
    }
}

impl Qp {
    /// Is there a way for this QP's datagrams to `dest`? On this host: is there such a queue pair of the same tenant, and does it
    /// receive. On another: does the router know a host that has the address.
    pub fn reaches(&self, dest: UdDest) -> bool {
        let (target, mut side) = (Target::Datagram(dest), self.send.lock());
        if !side.route.knows(&target) {
            side.route.resolve(self.context(), self.qpn(), &target);
        }
        side.route.knows(&target)
    }
}
