//! The end of a client: what it held goes back, what it left half done at others is repaired, its peers are told.

use freeflow_core::ring::{CqShared, Ring};

use super::{Given, Notice, State};
use crate::quota::Resource;

impl State {
    /// Buries a client whose connection or process ended.
    pub fn bury(&mut self, client: u32) {
        if !self.clients.contains_key(&client) {
            return;
        }
        self.repair_claims(client);
        self.drop_queue_pairs(client);
        self.tell_acquaintances(client);
        self.drop_objects(client);
        self.clients.remove(&client);
    }

    /// Who has descriptors of the dead drops them; should an id be used anew, it goes with a new descriptor.
    fn tell_acquaintances(&mut self, dead: u32) {
        let (slabs, pds, channels) = (&self.slabs, &self.pds, &self.channels);
        let is_dead = |owner: Option<u32>| owner == Some(dead);
        let mut told = vec![];
        for client in self.clients.values_mut().filter(|c| c.id != dead) {
            if client.met.remove(&dead) {
                told.push(client.id);
                client.given.retain(|given| match *given {
                    Given::Slab(id) => !is_dead(slabs.get(id).map(|(o, _)| o.client)),
                    Given::Pd(id) => !is_dead(pds.get(id).map(|(o, _)| o.client)),
                    Given::Channel(id) => !is_dead(channels.get(id).map(|(o, _)| o.client)),
                    Given::MrTable(client) => client != dead,
                });
            }
        }
        for peer in told {
            self.tell(peer, Notice::ClientGone { client: dead });
        }
    }

    /// Receives of others that the dead was filling are completed with an error, and who waits for them is woken.
    fn repair_claims(&mut self, dead: u32) {
        let claimed: Vec<u32> = self
            .qps
            .iter()
            .filter(|(_, _, qp)| qp.claimants.contains(&dead))
            .map(|(qpn, _, _)| qpn)
            .collect();
        for qpn in claimed {
            if self.repair(qpn, dead) {
                let bell = self.bell_of(qpn);
                self.outbox.bells.extend(bell);
            }
            self.qps.get_mut(qpn).into_iter().for_each(|qp| _ = qp.claimants.remove(&dead));
        }
    }

    /// Repairs one receive queue; true when a sleeper must be woken.
    fn repair(&self, qpn: u32, dead: u32) -> bool {
        let Some((owner, qp)) = self.qps.get(qpn) else { return false };
        let repaired = self.receives(qp).map_or(0, |receives| receives.repair(dead));
        if owner.client == dead || repaired == 0 {
            return false;
        }
        let Some((_, cq)) = self.cqs.get(qp.recv_cq) else { return false };
        let header = self.slabs.get(cq.slab).and_then(|(_, slab)| slab.map.get::<CqShared>(cq.off.into()));
        header.is_some_and(|header| header.completed(Some(qp.cq_bit), true) == Ring::Bell)
    }

    fn drop_queue_pairs(&mut self, client: u32) {
        let Ok(owner) = self.owner(client) else { return };
        for qpn in self.qps.ids_of(client) {
            self.unlink(qpn, |qpn| Notice::PeerGone { qpn });
            self.remove_qp(owner, qpn);
        }
        self.outbox.notices.retain(|(to, _)| *to != client);
    }

    fn drop_objects(&mut self, client: u32) {
        let Some(dead) = self.clients.get(&client) else { return };
        let container = dead.container;
        let mut freed = vec![
            (Resource::Mrs, dead.mrs.len() as u64),
            (Resource::MrBytes, dead.mrs.iter().map(|mr| mr.len).sum()),
        ];
        for id in self.cqs.ids_of(client) {
            self.cqs.remove(id);
            freed.push((Resource::Cqs, 1));
        }
        for id in self.srqs.ids_of(client) {
            self.srqs.remove(id);
            freed.push((Resource::Srqs, 1));
        }
        for id in self.channels.ids_of(client) {
            self.channels.remove(id);
            freed.push((Resource::Channels, 1));
        }
        for id in self.pds.ids_of(client) {
            self.pds.remove(id);
            freed.push((Resource::Pds, 1));
        }
        for id in self.slabs.ids_of(client) {
            let bytes = self.slabs.remove(id).map_or(0, |slab| slab.map.len() as u64);
            freed.extend([(Resource::Slabs, 1), (Resource::SlabBytes, bytes)]);
        }
        self.give_back(container, &freed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::*;
    use freeflow_core::ring::{Completion, RqShared, Taken};
    use freeflow_core::sync::AtomicU32;
    use freeflow_core::verbs::QpType;

    #[test]
    fn everything_goes_back_and_peers_are_told() {
        let mut w = World::new();
        let (ca, cb) = (w.container("a", [10, 0, 0, 1], "red"), w.container("b", [10, 0, 0, 2], "red"));
        let (a, b, idle) = (w.owner_of_new_client(ca), w.owner_of_new_client(cb), w.owner_of_new_client(cb));
        let (qa, qb) = (w.qp(a, QpType::Rc), w.qp(b, QpType::Rc));
        let (ua, ub) = (w.qp(a, QpType::Ud), w.qp(b, QpType::Ud));
        let (ga, gb) = (Gid::of([10, 0, 0, 1].into()), Gid::of([10, 0, 0, 2].into()));
        w.state.connect(a, qa, qb, gb).expect("connect");
        w.state.connect(b, qb, qa, ga).expect("connect");
        w.state.connect(a, ua, 0, ga).expect("connect");
        w.state.resolve(b, qb, qa, ga, 0).expect("resolve");
        w.state.resolve(b, ub, ua, ga, 0).expect("resolve");
        let pd = w.pd(a);
        w.state.reg_mr(a, pd, 0, 1000).expect("mr");
        w.notices();

        w.state.bury(a.client);
        let mut told = w.notices();
        told.sort_by_key(|(_, notice)| format!("{notice:?}"));
        let expected = [
            Notice::ClientGone { client: a.client },
            Notice::PeerGone { qpn: qb },
            Notice::PeerLeft { qpn: ub },
        ];
        assert_eq!(told, expected.map(|n| (b.client, n)));
        assert!(w.state.clients[&b.client].given.is_empty(), "descriptors of the dead are forgotten");
        let quota = &w.state.containers[&ca].quota;
        use Resource::*;
        for resource in [Qps, Cqs, Channels, Mrs, Pds, Slabs, MrBytes, SlabBytes] {
            assert_eq!(quota.used(resource), 0, "{resource:?}");
        }
        assert_eq!(w.state.qps.ids_of(b.client).len(), 2);
        w.state.bury(a.client);
        w.state.bury(idle.client);
        assert_eq!(w.notices(), []);
    }

    #[test]
    fn receives_the_dead_had_claimed_are_repaired_and_the_sleeper_woken() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let gid = Gid::of([10, 0, 0, 1].into());
        let (a, b) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let (qa, qb) = (w.qp(a, QpType::Ud), w.qp(b, QpType::Ud));
        w.state.connect(b, qb, 0, gid).expect("connect");
        let (info, _) = w.state.resolve(a, qa, qb, gid, 0).expect("resolve");
        let slab = &w.state.slabs.get(info.slab).expect("slab").1.map;
        let rq = RqShared::new(slab.slice(info.rq_off.into(), info.rq_depth as usize).expect("slots"));
        let cq: &freeflow_core::ring::CqShared = slab.get(info.cq_off.into()).expect("header");
        rq.post(0, &[]);
        let _claim = rq.claim(&AtomicU32::new(0), a.client).expect("posted").suspend();
        cq.arm(false);

        w.state.bury(a.client);
        assert_eq!(w.state.outbox.bells.len(), 1);
        let slab = &w.state.slabs.get(info.slab).expect("slab").1.map;
        let rq = RqShared::new(slab.slice(info.rq_off.into(), info.rq_depth as usize).expect("slots"));
        assert!(matches!(rq.take(0, false, false), Some(Taken::Done(c, _)) if c.flags == Completion::LOST));
    }
}
