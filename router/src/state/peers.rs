//! Who may reach whom: connecting, resolving, and what peers are told.
//!
//! A peer's descriptors are given only for a queue pair that agreed to it: connected to the asker (RC, UC), or a UD queue
//! pair of the same tenant that receives.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::{PeerInfo, peer_fds, peer_state};
use freeflow_core::verbs::{Gid, QpType};

use super::{Given, Link, Notice, Owner, Qp, State};
use crate::refusal::{Refusal, Result};

type Fds = Vec<Arc<OwnedFd>>;
/// Bit in `PeerInfo::fds`, what it is, the descriptor.
type Wanted = Vec<(u32, Given, Arc<OwnedFd>)>;

impl State {
    /// The queue pair becomes able to receive, and an RC or UC one belongs to `dest_qpn` at `gid`.
    pub fn connect(&mut self, owner: Owner, qpn: u32, dest_qpn: u32, gid: Gid) -> Result<()> {
        let qp = self.qps.owned_mut(qpn, owner)?;
        if qp.link != Link::None {
            return Err(Refusal::Invalid("the queue pair is connected already"));
        }
        if qp.kind == QpType::Ud {
            qp.link = Link::Receiving;
            return Ok(());
        }
        if dest_qpn >= 1 << 24 {
            return Err(Refusal::Range { what: "dest_qpn", got: dest_qpn.into(), limit: (1 << 24) - 1 });
        }
        qp.link = Link::To { qpn: dest_qpn, gid };
        if self.container_at(owner.container, gid).is_none() {
            self.note_refused(owner.container, gid);
        }
        if let Some(peer) = self.connected_peer(qpn)
            && peer != qpn
            && let Some((them, _)) = self.qps.get(peer)
        {
            self.tell(them.client, Notice::PeerReady { qpn: peer });
        }
        self.reunite(owner, qpn);
        Ok(())
    }

    /// One line for the operator per container and address it may not reach.
    fn note_refused(&mut self, container: u32, gid: Gid) {
        let Some(container) = self.containers.get_mut(&container) else { return };
        let ip = gid.ip();
        if let Some(other) = self.directory.elsewhere(&container.tenant, ip)
            && container.refused.insert(ip)
        {
            let (name, tenant) = (&container.name, &container.tenant);
            self.outbox.lines.push(format!(
                "refused: container {name} of tenant {tenant} asks for {ip}, which only tenant {other} has; \
                 connections across tenants are not supported"
            ));
        }
    }

    /// The queue pair that `qpn` is connected to and that is connected to `qpn`.
    pub fn connected_peer(&self, qpn: u32) -> Option<u32> {
        let (us, qp) = self.qps.get(qpn)?;
        let Link::To { qpn: peer, gid } = qp.link else { return None };
        let (them, other) = self.qps.get(peer)?;
        let Link::To { qpn: back, gid: back_gid } = other.link else { return None };
        let agreed = other.kind == qp.kind.counterpart()
            && back == qpn
            && self.container_at(us.container, gid) == Some(them.container)
            && self.container_at(them.container, back_gid) == Some(us.container);
        agreed.then_some(peer)
    }

    /// The peer a request of `qpn` means, if it agrees to be reached.
    pub fn find_peer(&mut self, owner: Owner, qpn: u32, dest_qpn: u32, gid: Gid) -> Result<Option<u32>> {
        let qp = self.qps.owned(qpn, owner)?;
        if qp.kind != QpType::Ud {
            if qp.link != (Link::To { qpn: dest_qpn, gid }) {
                return Err(Refusal::Invalid("dest_qpn and dgid are not those of Connect"));
            }
            return Ok(self.connected_peer(qpn));
        }
        let Some(container) = self.container_at(owner.container, gid) else {
            self.note_refused(owner.container, gid);
            return Ok(None);
        };
        let receives = |(them, other): (Owner, &Qp)| {
            them.container == container && other.kind == QpType::Ud && other.link == Link::Receiving
        };
        Ok(self.qps.get(dest_qpn).is_some_and(receives).then_some(dest_qpn))
    }

    /// Where is the peer of `qpn`? With the descriptors the asker does not have yet.
    /// `srqn`: of an XRC request, else 0.
    pub fn resolve(
        &mut self,
        owner: Owner,
        qpn: u32,
        dest_qpn: u32,
        gid: Gid,
        srqn: u32,
    ) -> Result<(PeerInfo, Fds)> {
        let absent = (PeerInfo { state: peer_state::ABSENT, ..PeerInfo::default() }, vec![]);
        let Some(peer) = self.find_peer(owner, qpn, dest_qpn, gid)? else { return Ok(absent) };
        let Some((mut info, them, wanted)) = self.describe(peer, srqn) else { return Ok(absent) };
        let asker = self.client_mut(owner.client)?;
        asker.met.insert(them.client);
        let mut fds = vec![];
        for (bit, given, fd) in wanted {
            if asker.given.insert(given) {
                info.fds |= bit;
                fds.push(fd);
            }
        }
        self.remember_resolved(owner, qpn, peer);
        Ok((info, fds))
    }

    pub(super) fn remember_resolved(&mut self, owner: Owner, qpn: u32, peer: u32) {
        if let Some(target) = self.qps.get_mut(peer) {
            target.resolvers.insert(qpn);
            target.claimants.insert(owner.client);
        }
        if let Some(asker) = self.qps.get_mut(qpn) {
            asker.resolved.insert(peer);
        }
    }

    /// A queue pair as a peer sees it, and all descriptors that go with it, in the protocol's order.
    fn describe(&self, qpn: u32, srqn: u32) -> Option<(PeerInfo, Owner, Wanted)> {
        let (owner, qp) = self.qps.get(qpn)?;
        let srq = match (qp.kind, qp.srq) {
            (QpType::XrcRecv, _) => Some(self.srq_of_domain(owner, qp, srqn)?),
            // An XRC initiator, which answers nobody's requests.
            (QpType::XrcSend, _) => return None,
            (_, 0) => None,
            (_, number) => Some((number, self.srqs.get(number)?.1)),
        };
        // XRC's target receives for the shared queue's owner: its PD, its CQ.
        let (pd, recv_cq, cq_bit) = match (qp.kind, srq) {
            (QpType::XrcRecv, Some((_, srq))) => (srq.pd, srq.cq, srq.cq_bit),
            _ => (qp.pd, qp.recv_cq, qp.cq_bit),
        };
        let cq = self.cqs.get(recv_cq)?.1;
        let (number, place) = srq.map_or((0, None), |(number, srq)| (number, Some(srq)));
        let info = PeerInfo {
            state: peer_state::READY,
            fds: 0,
            client: owner.client,
            pd,
            slab: qp.slab,
            qp_off: qp.qp_off,
            rq_off: qp.rq_off,
            rq_depth: qp.rq_depth,
            rq_sge: qp.rq_sge,
            cq_slab: cq.slab,
            cq_off: cq.off,
            channel: cq.channel,
            cq_bit,
            srq: number,
            srq_pd: place.map_or(0, |srq| srq.pd),
            srq_slab: place.map_or(0, |srq| srq.slab),
            srq_off: place.map_or(0, |srq| srq.off),
            srq_slots: place.map_or(0, |srq| srq.slots),
            srq_depth: place.map_or(0, |srq| srq.depth),
            kind: qp.kind as u32,
        };
        let slab = |id| Some((Given::Slab(id), self.slabs.get(id)?.1.fd.clone()));
        let table = self.clients.get(&owner.client)?.mr_table.as_ref()?.read_only.clone();
        let mut wanted = vec![];
        let mut want = |bit, (given, fd)| wanted.push((bit, given, fd));
        want(peer_fds::SLAB, slab(qp.slab)?);
        want(peer_fds::CQ_SLAB, slab(cq.slab)?);
        want(peer_fds::MR_TABLE, (Given::MrTable(owner.client), table));
        let memory = |pd| Some((Given::Pd(pd), self.pds.get(pd)?.1.fd.clone()));
        want(peer_fds::PD, memory(pd)?);
        if cq.channel != 0 {
            let bell = self.channels.get(cq.channel)?.1.bell.clone();
            want(peer_fds::BELL, (Given::Channel(cq.channel), bell));
        }
        if let Some(srq) = place {
            want(peer_fds::SRQ_SLAB, slab(srq.slab)?);
            want(peer_fds::SRQ_PD, memory(srq.pd)?);
        }
        Some((info, owner, wanted))
    }

    /// The queue pair left RTR/RTS by its program's will.
    pub fn disconnect(&mut self, owner: Owner, qpn: u32) -> Result<()> {
        self.qps.owned(qpn, owner)?;
        self.unlink(qpn, |qpn| Notice::PeerLeft { qpn });
        Ok(())
    }

    /// Ends the link of a queue pair; tells its connected peer by `notice`, others who were told where it is by PeerLeft.
    pub(super) fn unlink(&mut self, qpn: u32, notice: impl Fn(u32) -> Notice) {
        let peer = self.connected_peer(qpn).filter(|peer| *peer != qpn);
        self.awaiting.remove(&qpn);
        let Some(qp) = self.qps.get_mut(qpn) else { return };
        qp.far = false;
        if std::mem::replace(&mut qp.link, Link::None) != Link::None {
            self.outbox.unlinked.push((qpn, matches!(notice(qpn), Notice::PeerGone { .. })));
        }
        let mut resolvers = std::mem::take(&mut qp.resolvers);
        resolvers.extend(peer);
        resolvers.remove(&qpn);
        for resolver in resolvers {
            self.qps.get_mut(resolver).into_iter().for_each(|q| _ = q.resolved.remove(&qpn));
            let Some((them, other)) = self.qps.get(resolver) else { continue };
            let connected = other.kind != QpType::Ud;
            let what = if connected { notice(resolver) } else { Notice::PeerLeft { qpn: resolver } };
            self.tell(them.client, what);
        }
    }

    /// Tells the process behind the peer of `qpn` something; nothing when there is no such peer any more.
    pub fn notify_peer(
        &mut self,
        owner: Owner,
        (qpn, dest_qpn, gid): (u32, u32, Gid),
        notice: impl Fn(u32) -> Notice,
    ) -> Result<()> {
        let peer = self.find_peer(owner, qpn, dest_qpn, gid)?.ok_or(Refusal::NoPeer)?;
        if let Some((them, _)) = self.qps.get(peer) {
            self.tell(them.client, notice(peer));
        }
        Ok(())
    }

    /// The bell of the channel of the receive CQ of the peer of `qpn`.
    pub fn peer_bell(
        &mut self,
        owner: Owner,
        qpn: u32,
        dest_qpn: u32,
        gid: Gid,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let peer = self.find_peer(owner, qpn, dest_qpn, gid)?.ok_or(Refusal::NoPeer)?;
        Ok(self.bell_of(peer))
    }

    pub(super) fn bell_of(&self, qpn: u32) -> Option<Arc<OwnedFd>> {
        let cq = self.cqs.get(self.qps.get(qpn)?.1.recv_cq)?.1;
        Some(self.channels.get(cq.channel)?.1.bell.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    struct Pair {
        w: World,
        a: Owner,
        b: Owner,
        qa: u32,
        qb: u32,
        ga: Gid,
        gb: Gid,
    }

    fn pair(kind: QpType, tenants: [&str; 2]) -> Pair {
        let mut w = World::new();
        let ca = w.container("a", [10, 0, 0, 1], tenants[0]);
        let cb = w.container("b", [10, 0, 0, 2], tenants[1]);
        let (a, b) = (w.owner_of_new_client(ca), w.owner_of_new_client(cb));
        let (qa, qb) = (w.qp(a, kind), w.qp(b, kind));
        let (ga, gb) = (Gid::of([10, 0, 0, 1].into()), Gid::of([10, 0, 0, 2].into()));
        Pair { w, a, b, qa, qb, ga, gb }
    }

    #[test]
    fn a_connection_needs_both() {
        let Pair { mut w, a, b, qa, qb, ga, gb } = pair(QpType::Rc, ["red", "red"]);
        assert!(matches!(w.state.resolve(a, qa, qb, gb, 0), Err(Refusal::Invalid(_))), "not connected");
        w.state.connect(a, qa, qb, gb).expect("connect");
        assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        assert_eq!(w.notices(), []);
        w.state.connect(b, qb, qa, ga).expect("connect");
        assert_eq!(w.notices(), [(a.client, Notice::PeerReady { qpn: qa })]);
        let (info, fds) = w.state.resolve(a, qa, qb, gb, 0).expect("resolve");
        assert_eq!((info.state, info.client), (peer_state::READY, b.client));
        assert_eq!(fds.len(), info.fds.count_ones() as usize);
        let all = peer_fds::SLAB | peer_fds::MR_TABLE | peer_fds::PD | peer_fds::BELL;
        assert_eq!(info.fds & all, all);
        let (again, fds) = w.state.resolve(a, qa, qb, gb, 0).expect("resolve");
        assert_eq!((again.fds, fds.len()), (0, 0), "each descriptor once");
        assert!(matches!(w.state.connect(a, qa, qb, gb), Err(Refusal::Invalid(_))));
        assert!(matches!(w.state.resolve(b, qa, qb, gb, 0), Err(Refusal::NoSuch { .. })));
    }

    #[test]
    fn a_peer_that_is_connected_elsewhere_is_absent() {
        let Pair { mut w, a, b, qa, qb, ga, gb } = pair(QpType::Rc, ["red", "red"]);
        w.state.connect(a, qa, qb, gb).expect("connect");
        w.state.connect(b, qb, qa ^ 1, ga).expect("connect");
        assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        w.state.disconnect(b, qb).expect("mine");
        w.state.connect(b, qb, qa, gb).expect("connect, but to its own address");
        assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        assert_eq!(w.notices(), []);
    }

    #[test]
    fn tenants_do_not_meet() {
        for kind in [QpType::Rc, QpType::Ud] {
            let Pair { mut w, a, b, qa, qb, ga, gb } = pair(kind, ["red", "blue"]);
            w.state.connect(a, qa, qb, gb).expect("connect");
            w.state.connect(b, qb, qa, ga).expect("connect");
            assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
            assert_eq!(w.notices(), []);
            w.state.resolve(a, qa, qb, gb, 0).expect("resolve");
            let lines = std::mem::take(&mut w.state.outbox.lines);
            assert!(lines.iter().all(|line| line.contains("tenant")), "{lines:?}");
            assert_eq!(lines.len(), if kind == QpType::Ud { 1 } else { 2 }, "once per container and address");
        }
    }

    #[test]
    fn ud_reaches_who_receives() {
        let Pair { mut w, a, b, qa, qb, gb, .. } = pair(QpType::Ud, ["red", "red"]);
        assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        w.state.connect(b, qb, 0, Gid::default()).expect("connect");
        assert_eq!(w.state.resolve(a, qa, qb, gb, 0).expect("resolve").0.state, peer_state::READY);
        assert_eq!(w.state.resolve(a, qa, qb ^ 1, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        let rc = w.qp(b, QpType::Rc);
        assert_eq!(w.state.resolve(a, qa, rc, gb, 0).expect("resolve").0.state, peer_state::ABSENT);
        w.state.disconnect(b, qb).expect("mine");
        assert_eq!(w.notices(), [(a.client, Notice::PeerLeft { qpn: qa })]);
        w.state.disconnect(b, qb).expect("twice is once");
        assert_eq!(w.notices(), []);
    }

    #[test]
    fn a_queue_pair_may_be_its_own_peer() {
        let Pair { mut w, a, qa, ga, .. } = pair(QpType::Rc, ["red", "red"]);
        w.state.connect(a, qa, qa, ga).expect("connect");
        assert_eq!(w.state.resolve(a, qa, qa, ga, 0).expect("resolve").0.state, peer_state::READY);
        w.state.destroy_qp(a, qa).expect("mine");
        assert_eq!(w.notices(), []);
    }

    #[test]
    fn reconnecting_is_announced() {
        let Pair { mut w, a, b, qa, qb, ga, gb } = pair(QpType::Rc, ["red", "red"]);
        for _ in 0..2 {
            w.state.connect(a, qa, qb, gb).expect("connect");
            w.state.connect(b, qb, qa, ga).expect("connect");
            assert_eq!(w.notices(), [(a.client, Notice::PeerReady { qpn: qa })]);
            w.state.disconnect(a, qa).expect("mine");
            assert_eq!(w.notices(), [(b.client, Notice::PeerLeft { qpn: qb })]);
            w.state.disconnect(b, qb).expect("mine");
            assert_eq!(w.notices(), []);
        }
    }

    #[test]
    fn only_a_connected_peer_can_be_told_things() {
        let Pair { mut w, a, b, qa, qb, ga, gb } = pair(QpType::Rc, ["red", "red"]);
        let fault = |qpn| Notice::PeerFault { qpn };
        w.state.connect(a, qa, qb, gb).expect("connect");
        assert_eq!(w.state.notify_peer(a, (qa, qb, gb), fault), Err(Refusal::NoPeer));
        w.state.connect(b, qb, qa, ga).expect("connect");
        w.notices();
        w.state.notify_peer(a, (qa, qb, gb), fault).expect("connected");
        assert_eq!(w.notices(), [(b.client, Notice::PeerFault { qpn: qb })]);
        assert!(w.state.peer_bell(a, qa, qb, gb).expect("connected").is_some());
    }
}
