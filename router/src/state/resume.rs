//! Processes that were clients of an earlier router: they come back with the numbers they had.
//!
//! Their peers on the direct path never noticed. What must be the same is what those peers know: client ids, queue pair
//! numbers, PDs and keys. What is no longer there must be told, because nobody told it when it happened.

use freeflow_core::ctl::claim;

use super::{Link, Notice, Owner, State};
use crate::refusal::{Refusal, Result};

/// How far a client is with saying again what it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resuming {
    /// It has never had another router, or it is done.
    #[default]
    No,
    /// Its next object gets this number, of this kind.
    Open { claimed: Option<(u32, u32)> },
}

impl State {
    /// The next object gets `number`, which is `(kind, number)`.
    pub fn claim(&mut self, owner: Owner, number: (u32, u32), proven: bool) -> Result<()> {
        let client = self.client_mut(owner.client)?;
        let Resuming::Open { claimed } = &mut client.resuming else {
            return Err(Refusal::Invalid("numbers are claimed after Resume and before Resumed"));
        };
        if !proven {
            return Err(Refusal::Access("the number was not given to this process"));
        }
        *claimed = Some(number);
        Ok(())
    }

    /// The number that was claimed for the object that is made now.
    pub(super) fn claimed(&mut self, client: u32, kind: u32) -> Option<u32> {
        let Resuming::Open { claimed } = &mut self.clients.get_mut(&client)?.resuming else { return None };
        claimed.take_if(|(of, _)| *of == kind).map(|(_, number)| number)
    }

    pub(super) fn is_resuming(&self, client: u32) -> bool {
        self.clients.get(&client).is_some_and(|client| client.resuming != Resuming::No)
    }

    /// A queue pair that was connected before is so again, as far as it can tell.
    pub(super) fn reunite(&mut self, owner: Owner, qpn: u32) {
        let adopted = |state: &State, qpn| state.qps.get(qpn).is_some_and(|(_, qp)| qp.adopted);
        match self.connected_peer(qpn) {
            Some(peer) => {
                self.awaiting.remove(&peer);
                self.awaiting.remove(&qpn);
                if adopted(self, qpn) || adopted(self, peer) {
                    self.acquaint(qpn, peer);
                    self.acquaint(peer, qpn);
                }
            }
            None => {
                if self.is_resuming(owner.client) && adopted(self, qpn) {
                    self.awaiting.insert(qpn);
                }
            }
        }
    }

    /// `qpn` had been told where `peer` is, and may be in the middle of a copy to it.
    fn acquaint(&mut self, qpn: u32, peer: u32) {
        let (Some((us, _)), Some((them, _))) = (self.qps.get(qpn), self.qps.get(peer)) else { return };
        self.clients.get_mut(&us.client).into_iter().for_each(|client| _ = client.met.insert(them.client));
        self.remember_resolved(us, qpn, peer);
    }

    /// The client has said everything. Queue pairs whose peer cannot come back, because it was on another host, fail now;
    /// the others when `late`, or when [`State::give_up_missing`] is called.
    pub fn resumed(&mut self, owner: Owner, late: bool) -> Result<()> {
        self.client_mut(owner.client)?.resuming = Resuming::No;
        self.announce_return(owner.client);
        let hopeless = |state: &State, qpn: u32| {
            let Some((of, qp)) = state.qps.get(qpn) else { return true };
            let Link::To { gid, .. } = qp.link else { return true };
            of.client == owner.client && (late || state.container_at(of.container, gid).is_none())
        };
        let lost: Vec<u32> = self.awaiting.iter().copied().filter(|qpn| hopeless(self, *qpn)).collect();
        self.desert(lost);
        Ok(())
    }

    /// Copies from and to its memory can be made again: who waited for one is told.
    fn announce_return(&mut self, client: u32) {
        let peers = self.qps.ids_of(client).into_iter().filter_map(|qpn| self.connected_peer(qpn));
        for peer in peers.collect::<Vec<_>>() {
            if let Some((them, _)) = self.qps.get(peer) {
                self.tell(them.client, Notice::PeerReady { qpn: peer });
            }
        }
    }

    /// Whoever has not come back by now died while no router was there.
    pub fn give_up_missing(&mut self) {
        let lost = self.awaiting.iter().copied().collect();
        self.desert(lost);
    }

    fn desert(&mut self, qpns: Vec<u32>) {
        for qpn in qpns {
            self.awaiting.remove(&qpn);
            if let Some((owner, _)) = self.qps.get(qpn).filter(|(_, qp)| matches!(qp.link, Link::To { .. })) {
                self.tell(owner.client, Notice::PeerGone { qpn });
            }
        }
    }
}

/// The kinds of numbers, as [`claim`] has them.
pub(super) const OBJECT: u32 = claim::OBJECT;
pub(super) const QP: u32 = claim::QP;
pub(super) const KEY: u32 = claim::KEY;
pub(super) const SRQ: u32 = claim::SRQ;

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use freeflow_core::verbs::{Gid, QpType};

    fn resume(w: &mut World, client: u32) {
        w.state.client_mut(client).expect("client").resuming = Resuming::Open { claimed: None };
    }

    #[test]
    fn a_number_is_claimed_once_and_by_who_had_it() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let (me, other) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        assert!(matches!(w.state.claim(me, (OBJECT, 77_777), true), Err(Refusal::Invalid(_))));
        resume(&mut w, me.client);
        assert!(matches!(w.state.claim(me, (OBJECT, 77_777), false), Err(Refusal::Access(_))));
        w.state.claim(me, (OBJECT, 77_777), true).expect("mine");
        assert_eq!(w.state.alloc_pd(me, eventfd()), Ok(77_777));
        assert_ne!(w.state.alloc_pd(me, eventfd()), Ok(77_777));
        w.state.claim(me, (OBJECT, 77_777), true).expect("mine");
        assert!(matches!(w.state.alloc_pd(me, eventfd()), Err(Refusal::Busy { .. })));
        w.state.claim(me, (KEY, 0x1200_0534), true).expect("mine");
        assert_eq!(w.state.reg_mr(me, 77_777, 0, 10), Ok(0x1200_0534));
        let fresh = w.state.reg_mr(me, 77_777, 0, 10).expect("a new one");
        assert_ne!(freeflow_core::ring::mr::slot_of(fresh), 5);
        w.state.claim(me, (KEY, 0x4300_0521), true).expect("mine");
        assert!(matches!(w.state.reg_mr(me, 77_777, 0, 10), Err(Refusal::Busy { .. })));
        w.state.resumed(me, false).expect("done");
        assert!(matches!(w.state.claim(me, (OBJECT, 1), true), Err(Refusal::Invalid(_))));
        assert!(w.state.pds.owned(77_777, other).is_err());
    }

    #[test]
    fn who_does_not_come_back_is_told_of_in_the_end() {
        let mut w = World::new();
        let (ca, cb) = (w.container("a", [10, 0, 0, 1], "red"), w.container("b", [10, 0, 0, 2], "red"));
        let (a, b) = (w.owner_of_new_client(ca), w.owner_of_new_client(cb));
        let (ga, gb) = (Gid::of([10, 0, 0, 1].into()), Gid::of([10, 0, 0, 2].into()));
        let elsewhere = Gid::of([10, 9, 9, 9].into());
        resume(&mut w, a.client);
        let adopt = |w: &mut World, qpn| {
            w.state.claim(a, (QP, qpn), true).expect("mine");
            assert_eq!(w.qp(a, QpType::Rc), qpn);
        };
        (100..104).for_each(|qpn| adopt(&mut w, qpn));
        w.state.connect(a, 100, 200, gb).expect("a peer that comes back");
        w.state.connect(a, 101, 201, gb).expect("a peer that does not");
        w.state.connect(a, 102, 202, elsewhere).expect("a peer on another host");
        let fresh = w.qp(a, QpType::Rc);
        w.state.connect(a, fresh, 203, gb).expect("a new one, whose peer is not there yet");
        w.state.resumed(a, false).expect("all");
        assert_eq!(w.notices(), [(a.client, Notice::PeerGone { qpn: 102 })]);
        resume(&mut w, b.client);
        w.state.claim(b, (QP, 200), true).expect("mine");
        assert_eq!(w.qp(b, QpType::Rc), 200);
        w.state.connect(b, 200, 100, ga).expect("connect");
        assert_eq!(w.notices(), [(a.client, Notice::PeerReady { qpn: 100 })]);
        w.state.resumed(b, true).expect("all");
        assert_eq!(
            w.notices(),
            [(a.client, Notice::PeerReady { qpn: 100 })],
            "its memory can be reached again"
        );
        w.state.give_up_missing();
        assert_eq!(w.notices(), [(a.client, Notice::PeerGone { qpn: 101 })]);
        w.state.give_up_missing();
        assert_eq!(w.notices(), []);
        // Neither asked where the other is, but both still know.
        w.state.bury(b.client);
        let told = w.notices();
        assert!(told.contains(&(a.client, Notice::PeerGone { qpn: 100 })), "{told:?}");
        assert!(told.contains(&(a.client, Notice::ClientGone { client: b.client })), "{told:?}");
    }
}
