//! Queue pairs: creation, numbers, counters, destruction.

use std::collections::HashSet;

use freeflow_core::ring::{MAX_SGE, QpShared, RecvSlot, RqShared};
use freeflow_core::sync::Ordering;
use freeflow_core::verbs::{Gid, MULTICAST_QPN, QpState, QpType};

use super::{Counters, Owner, State};
use crate::quota::Resource;
use crate::refusal::{Refusal, Result};

/// Queue pair numbers have 24 bits; 0, 1 and the last are special.
const QPNS: std::ops::Range<u32> = 2..MULTICAST_QPN;

/// What a queue pair said about its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Not connected (RESET, INIT, ERR).
    None,
    /// UD: can receive.
    Receiving,
    /// RC, UC: belongs to this peer, which need not exist.
    To { qpn: u32, gid: Gid },
}

#[derive(Debug)]
pub struct Qp {
    pub kind: QpType,
    pub pd: u32,
    pub send_cq: u32,
    pub recv_cq: u32,
    pub slab: u32,
    pub qp_off: u32,
    pub rq_off: u32,
    pub rq_depth: u32,
    pub rq_sge: u32,
    pub cq_bit: u32,
    /// 0: it has receives of its own.
    pub srq: u32,
    /// XRC's domain; 0 for other types.
    pub xrcd: u32,
    pub link: Link,
    /// Its peer is on another host.
    pub far: bool,
    /// As its address handle says.
    pub traffic_class: u8,
    /// Queue pairs that were told where this one is.
    pub resolvers: HashSet<u32>,
    /// Queue pairs this one was told of.
    pub resolved: HashSet<u32>,
    /// Clients that may have claimed receives of this one.
    pub claimants: HashSet<u32>,
    /// It had its number, and maybe its peer, under an earlier router.
    pub adopted: bool,
}

/// Arguments of [`State::create_qp`], unchecked.
#[derive(Debug, Clone, Copy, Default)]
pub struct NewQp {
    pub pd: u32,
    pub send_cq: u32,
    pub recv_cq: u32,
    pub kind: u32,
    pub slab: u32,
    pub qp_off: u32,
    pub rq_off: u32,
    pub rq_depth: u32,
    pub rq_sge: u32,
    pub cq_bit: u32,
    pub srq: u32,
    pub xrcd: u32,
}

impl State {
    pub fn create_qp(&mut self, owner: Owner, new: NewQp) -> Result<u32> {
        let kind = self.check_qp(owner, &new)?;
        let claimed = self.claimed(owner.client, super::resume::QP);
        let qpn = match claimed {
            Some(qpn) => self.old_qpn(qpn)?,
            None => self.new_qpn()?,
        };
        self.take(owner.container, &[(Resource::Qps, 1)])?;
        self.count_users(&new, |users| *users += 1);
        let NewQp { pd, send_cq, recv_cq, slab, qp_off, rq_off, rq_depth, .. } = new;
        let NewQp { rq_sge, cq_bit, srq, xrcd, .. } = new;
        let (resolvers, resolved, claimants) = Default::default();
        let link = Link::None;
        self.qps.insert(
            qpn,
            owner,
            Qp {
                kind,
                pd,
                send_cq,
                recv_cq,
                slab,
                qp_off,
                rq_off,
                rq_depth,
                rq_sge,
                cq_bit,
                srq,
                xrcd,
                link,
                far: false,
                traffic_class: 0,
                resolvers,
                resolved,
                claimants,
                adopted: claimed.is_some(),
            },
        );
        Ok(qpn)
    }

    fn check_qp(&self, owner: Owner, new: &NewQp) -> Result<QpType> {
        let kind = QpType::try_from(new.kind).map_err(|_| Refusal::Unsupported("type of queue pair"))?;
        self.pds.owned(new.pd, owner)?;
        self.cqs.owned(new.send_cq, owner)?;
        self.cqs.owned(new.recv_cq, owner)?;
        if new.srq != 0 && self.srqs.owned(new.srq, owner)?.xrcd != 0 {
            return Err(Refusal::Invalid("a queue pair cannot be made for an XRC shared receive queue"));
        }
        let slab = self.slabs.owned(new.slab, owner)?;
        let limit = self.settings.max_qp_wr.next_power_of_two().into();
        if u64::from(new.rq_depth) > limit {
            return Err(Refusal::Range { what: "receives per queue", got: new.rq_depth.into(), limit });
        }
        if new.rq_depth != 0 && !new.rq_depth.is_power_of_two() {
            return Err(Refusal::Invalid("a receive queue's depth must be a power of two"));
        }
        if new.rq_sge as usize > MAX_SGE {
            let (got, limit) = (new.rq_sge.into(), MAX_SGE as u64);
            return Err(Refusal::Range { what: "scatter entries per receive", got, limit });
        }
        let header = slab.map.get::<QpShared>(new.qp_off.into());
        header.ok_or(Refusal::Invalid("a QP's header must be aligned and inside its slab"))?;
        let slots = slab.map.slice::<RecvSlot>(new.rq_off.into(), new.rq_depth as usize);
        slots.ok_or(Refusal::Invalid("receive slots must be aligned and inside their slab"))?;
        Ok(kind)
    }

    fn count_users(&mut self, qp: &NewQp, change: impl Fn(&mut u32)) {
        self.pds.get_mut(qp.pd).into_iter().for_each(|pd| change(&mut pd.users));
        for cq in [qp.send_cq, qp.recv_cq] {
            self.cqs.get_mut(cq).into_iter().for_each(|cq| change(&mut cq.users));
        }
        self.srqs.get_mut(qp.srq).into_iter().for_each(|srq| change(&mut srq.users));
    }

    fn old_qpn(&self, qpn: u32) -> Result<u32> {
        match self.qps.contains(qpn) {
            _ if !QPNS.contains(&qpn) => Err(Refusal::Invalid("a queue pair number that no router gives")),
            true => Err(Refusal::Busy { what: "queue pair number", id: qpn, by: "new queue pair" }),
            false => Ok(qpn),
        }
    }

    fn new_qpn(&mut self) -> Result<u32> {
        self.new_number(|state, number| state.qps.contains(number))
    }

    /// A random number of 24 bits that is not `used`.
    pub(super) fn new_number(&mut self, used: impl Fn(&State, u32) -> bool) -> Result<u32> {
        for _ in 0..1000 {
            let number = self.random()? & (QPNS.end - 1);
            if QPNS.contains(&number) && !used(self, number) {
                return Ok(number);
            }
        }
        Err(Refusal::Exhausted("numbers of queues"))
    }

    pub fn destroy_qp(&mut self, owner: Owner, qpn: u32) -> Result<()> {
        self.disconnect(owner, qpn)?;
        self.remove_qp(owner, qpn);
        Ok(())
    }

    /// Takes a disconnected queue pair out of all tables.
    pub(super) fn remove_qp(&mut self, owner: Owner, qpn: u32) {
        let ended = self.qp_counters(qpn);
        self.leave_groups(owner, qpn);
        let Some(qp) = self.qps.remove(qpn) else { return };
        for target in &qp.resolved {
            self.qps.get_mut(*target).into_iter().for_each(|t| _ = t.resolvers.remove(&qpn));
        }
        let users =
            NewQp { pd: qp.pd, send_cq: qp.send_cq, recv_cq: qp.recv_cq, srq: qp.srq, ..NewQp::default() };
        self.count_users(&users, |users| *users -= 1);
        self.give_back(owner.container, &[(Resource::Qps, 1)]);
        if let Some(container) = self.containers.get_mut(&owner.container) {
            container.ended = container.ended.plus(ended);
        }
    }

    fn header(&self, qp: &Qp) -> Option<&QpShared> {
        self.slabs.get(qp.slab)?.1.map.get(qp.qp_off.into())
    }

    /// What the QP's owner and peer wrote into its counters; hostile, each word is read once.
    pub fn qp_counters(&self, qpn: u32) -> Counters {
        let header = self.qps.get(qpn).and_then(|(_, qp)| self.header(qp));
        header.map_or(Counters::default(), |h| Counters {
            tx_bytes: h.tx_bytes.load(Ordering::Relaxed),
            rx_bytes: h.rx_bytes.load(Ordering::Relaxed),
            errors: h.errors.load(Ordering::Relaxed),
        })
    }

    /// The state its owner wrote, `None` where that is nonsense.
    pub fn qp_state(&self, qp: &Qp) -> Option<QpState> {
        QpState::try_from(self.header(qp)?.state.load(Ordering::Relaxed)).ok()
    }

    /// The receive slots of a queue pair.
    pub(super) fn receives(&self, qp: &Qp) -> Option<RqShared<'_>> {
        let slab = self.slabs.get(qp.slab)?.1;
        Some(RqShared::new(slab.map.slice(qp.rq_off.into(), qp.rq_depth as usize)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::config::Settings;

    #[test]
    fn arguments_are_checked_before_any_effect() {
        let mut w = World::with(Settings { max_qp_wr: 64, ..Settings::default() });
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let (me, sibling) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let good = w.new_qp(me, QpType::Rc);
        let theirs = w.new_qp(sibling, QpType::Rc);
        let slots_end = SLAB as u32 - 64 * size_of::<RecvSlot>() as u32;
        let invalid = [
            NewQp { kind: 8, ..good },
            NewQp { rq_depth: 3, ..good },
            NewQp { rq_depth: 128, ..good },
            NewQp { rq_sge: 17, ..good },
            NewQp { qp_off: 8, ..good },
            NewQp { qp_off: SLAB as u32 - 64, ..good },
            NewQp { qp_off: u32::MAX - 63, ..good },
            NewQp { rq_off: 8, ..good },
            NewQp { rq_depth: 64, rq_off: slots_end + 64, ..good },
            NewQp { rq_off: u32::MAX - 63, ..good },
            NewQp { pd: 9999, ..good },
            NewQp { pd: theirs.pd, ..good },
            NewQp { send_cq: theirs.send_cq, ..good },
            NewQp { recv_cq: theirs.recv_cq, ..good },
            NewQp { slab: theirs.slab, ..good },
            NewQp { pd: good.send_cq, ..good },
        ];
        for bad in invalid {
            w.state.create_qp(me, bad).expect_err(&format!("{bad:?}"));
        }
        assert_eq!(w.state.qps.iter().count(), 0);
        assert_eq!(w.state.containers[&c].quota.used(Resource::Qps), 0);
        let at_the_end = NewQp { rq_depth: 64, rq_off: slots_end, ..good };
        let qpn = w.state.create_qp(me, at_the_end).expect("fits exactly");
        assert!(QPNS.contains(&qpn));
        assert!(matches!(w.state.destroy_cq(me, good.send_cq), Err(Refusal::Busy { .. })));
        assert!(matches!(w.state.dealloc_pd(me, good.pd), Err(Refusal::Busy { .. })));
        assert!(matches!(w.state.destroy_qp(sibling, qpn), Err(Refusal::NotYours { .. })));
        w.state.destroy_qp(me, qpn).expect("mine");
        w.state.destroy_cq(me, good.recv_cq).expect("free");
    }

    #[test]
    fn ended_queue_pairs_stay_in_the_totals() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        for errors in [2, 3] {
            let qpn = w.qp(me, QpType::Rc);
            let (_, qp) = w.state.qps.get(qpn).expect("qp");
            let header = w.state.header(qp).expect("header");
            header.tx_bytes.store(u64::MAX - 1, Ordering::Relaxed);
            header.errors.store(errors, Ordering::Relaxed);
            w.state.destroy_qp(me, qpn).expect("mine");
        }
        let ended = w.state.containers[&c].ended;
        assert_eq!(
            ended,
            Counters { tx_bytes: u64::MAX, rx_bytes: 0, errors: 5 },
            "hostile counters saturate"
        );
    }
}
