//! Shared receive queues: where they live, who may be told, and which of them an XRC request may name.

use freeflow_core::ring::{RecvSlot, SrqShared};
use freeflow_core::verbs::{Gid, QpType};

use super::{Notice, Owner, Qp, State};
use crate::quota::Resource;
use crate::refusal::{Refusal, Result};

#[derive(Debug, Clone, Copy, Default)]
pub struct Srq {
    pub pd: u32,
    pub slab: u32,
    /// Of its header and its slots.
    pub off: u32,
    pub slots: u32,
    pub depth: u32,
    /// Of XRC: the CQ its receives complete on, its bit there, and its domain, a number of its client's own.
    pub cq: u32,
    pub cq_bit: u32,
    pub xrcd: u32,
    /// Queue pairs made for it.
    pub users: u32,
}

impl State {
    pub fn create_srq(&mut self, owner: Owner, new: Srq) -> Result<u32> {
        self.check_srq(owner, &new)?;
        let number = match self.claimed(owner.client, super::resume::SRQ) {
            Some(old) if self.srqs.contains(old) => {
                return Err(Refusal::Busy { what: "shared receive queue", id: old, by: "another process" });
            }
            Some(old) => old,
            None => self.new_number(|state, number| state.srqs.contains(number))?,
        };
        self.take(owner.container, &[(Resource::Srqs, 1)])?;
        self.count_srq(&new, |users| *users += 1);
        self.srqs.insert(number, owner, Srq { users: 0, ..new });
        Ok(number)
    }

    fn check_srq(&self, owner: Owner, new: &Srq) -> Result<()> {
        self.pds.owned(new.pd, owner)?;
        if new.xrcd != 0 {
            self.cqs.owned(new.cq, owner)?;
        }
        let slab = self.slabs.owned(new.slab, owner)?;
        let limit = u64::from(self.settings.max_qp_wr).next_power_of_two();
        if u64::from(new.depth) > limit || !new.depth.is_power_of_two() {
            return Err(Refusal::Range { what: "slots of a shared queue", got: new.depth.into(), limit });
        }
        let header = slab.map.get::<SrqShared>(new.off.into());
        header.ok_or(Refusal::Invalid("a shared queue's header must be aligned and inside its slab"))?;
        let slots = slab.map.slice::<RecvSlot>(new.slots.into(), new.depth as usize);
        slots.ok_or(Refusal::Invalid("a shared queue's slots must be aligned and inside their slab"))?;
        Ok(())
    }

    fn count_srq(&mut self, srq: &Srq, change: impl Fn(&mut u32)) {
        self.pds.get_mut(srq.pd).into_iter().for_each(|pd| change(&mut pd.users));
        let cq = if srq.xrcd != 0 { srq.cq } else { 0 };
        self.cqs.get_mut(cq).into_iter().for_each(|cq| change(&mut cq.users));
    }

    pub fn destroy_srq(&mut self, owner: Owner, number: u32) -> Result<()> {
        let srq = *self.srqs.owned(number, owner)?;
        if srq.users != 0 {
            return Err(Refusal::Busy { what: "shared receive queue", id: number, by: "queue pair" });
        }
        self.srqs.remove(number);
        self.count_srq(&srq, |users| *users -= 1);
        self.give_back(owner.container, &[(Resource::Srqs, 1)]);
        Ok(())
    }

    /// The shared receive queue `srqn`, if XRC's target `qp` of `owner` may receive for it.
    pub(super) fn srq_of_domain(&self, owner: Owner, qp: &Qp, srqn: u32) -> Option<(u32, &Srq)> {
        let (them, srq) = self.srqs.get(srqn)?;
        let same = them.client == owner.client && srq.xrcd == qp.xrcd && srq.xrcd != 0;
        same.then_some((srqn, srq))
    }

    /// The protection domains whose keys requests to `qp` may name.
    pub(super) fn domains_of(&self, owner: Owner, qp: &Qp) -> Vec<u32> {
        if qp.kind != QpType::XrcRecv {
            let shared = self.srqs.get(qp.srq).map(|(_, srq)| srq.pd);
            return std::iter::once(qp.pd).chain(shared).collect();
        }
        let fits = |them: Owner, srq: &Srq| them.client == owner.client && srq.xrcd == qp.xrcd;
        self.srqs.iter().filter(|(_, them, srq)| fits(*them, srq)).map(|(_, _, srq)| srq.pd).collect()
    }

    /// The sender of `qpn` saw the shared receive queue of its peer fall below its limit. Who armed none is told in vain.
    pub fn srq_limit(&mut self, owner: Owner, (qpn, dest_qpn, gid): (u32, u32, Gid)) -> Result<()> {
        let peer = self.find_peer(owner, qpn, dest_qpn, gid)?.ok_or(Refusal::NoPeer)?;
        let Some((them, qp)) = self.qps.get(peer) else { return Ok(()) };
        let told: Vec<u32> = if qp.kind == QpType::XrcRecv {
            let of = self.srqs.iter().filter(|(_, o, srq)| o.client == them.client && srq.xrcd == qp.xrcd);
            of.map(|(number, _, _)| number).collect()
        } else {
            vec![qp.srq].into_iter().filter(|srq| *srq != 0).collect()
        };
        if told.is_empty() {
            return Err(Refusal::Invalid("the peer has no shared receive queue"));
        }
        told.into_iter().for_each(|srq| self.tell(them.client, Notice::SrqLimit { srq }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::*;
    use super::*;
    use freeflow_core::ctl::peer_state;

    const A: [u8; 4] = [10, 0, 0, 1];

    fn srq(w: &mut World, owner: Owner) -> Srq {
        let (pd, slab) = (w.pd(owner), w.slab(owner));
        Srq { pd, slab, off: 0, slots: 1024, depth: 4, ..Srq::default() }
    }

    #[test]
    fn arguments_are_checked_before_any_effect() {
        let mut w = World::new();
        let c = w.container("a", A, "red");
        let (me, sibling) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let good = srq(&mut w, me);
        let theirs = srq(&mut w, sibling);
        for bad in [
            Srq { pd: theirs.pd, ..good },
            Srq { slab: theirs.slab, ..good },
            Srq { off: 8, ..good },
            Srq { slots: 8, ..good },
            Srq { slots: SLAB as u32 - 1024, ..good },
            Srq { depth: 0, ..good },
            Srq { depth: 3, ..good },
            Srq { depth: 1 << 30, ..good },
            Srq { xrcd: 1, cq: 77, ..good },
        ] {
            w.state.create_srq(me, bad).expect_err(&format!("{bad:?}"));
        }
        assert_eq!(w.state.containers[&c].quota.used(Resource::Srqs), 0);
        let number = w.state.create_srq(me, good).expect("good");
        assert!(matches!(w.state.dealloc_pd(me, good.pd), Err(Refusal::Busy { .. })));
        assert!(matches!(w.state.destroy_srq(sibling, number), Err(Refusal::NotYours { .. })));
        let qp = NewQp { srq: number, ..w.new_qp(me, QpType::Rc) };
        let qpn = w.state.create_qp(me, qp).expect("qp");
        assert!(matches!(w.state.destroy_srq(me, number), Err(Refusal::Busy { .. })));
        w.state.destroy_qp(me, qpn).expect("mine");
        w.state.destroy_srq(me, number).expect("idle");
        w.state.dealloc_pd(me, good.pd).expect("idle");
    }

    /// An initiator and a target with a shared receive queue of their own domain, and one of another.
    #[test]
    fn an_xrc_request_reaches_the_queues_of_its_targets_domain_only() {
        let mut w = World::new();
        let (c, gid) = (w.container("a", A, "red"), Gid::of(A.into()));
        let (a, b) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let plain = srq(&mut w, b);
        let cq = w.state.create_cq(b, 0, plain.slab, 8192).expect("cq");
        let inside = w.state.create_srq(b, Srq { cq, xrcd: 5, cq_bit: 9, ..plain }).expect("srq");
        let outside = w.state.create_srq(b, Srq { cq, xrcd: 6, ..plain }).expect("srq");
        let ini = w.qp(a, QpType::XrcSend);
        let tgt = NewQp { xrcd: 5, ..w.new_qp(b, QpType::XrcRecv) };
        let tgt = w.state.create_qp(b, tgt).expect("target");
        w.state.connect(a, ini, tgt, gid).expect("connect");
        w.state.connect(b, tgt, ini, gid).expect("connect");
        let (info, fds) = w.state.resolve(a, ini, tgt, gid, inside).expect("resolve");
        assert_eq!((info.state, info.srq, info.pd, info.cq_bit), (peer_state::READY, inside, plain.pd, 9));
        assert_eq!(fds.len(), info.fds.count_ones() as usize);
        for no in [outside, 0, inside ^ 1] {
            assert_eq!(w.state.resolve(a, ini, tgt, gid, no).expect("resolve").0.state, peer_state::ABSENT);
        }
        w.notices();
        w.state.srq_limit(a, (ini, tgt, gid)).expect("connected");
        assert_eq!(w.notices(), [(b.client, Notice::SrqLimit { srq: inside })]);
        let two = w.qp(a, QpType::XrcSend);
        w.state.connect(b, two, ini, gid).expect_err("not its own");
    }
}
