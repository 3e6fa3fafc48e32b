//! What a link needs of a queue pair whose peer is on another host.
//!
//! Everything in it is held by reference count: it stays whole while a link uses it, whatever becomes of the client.

use freeflow_core::ring::{
    CqShared, LinkHeader, LinkWord, MR_SLOTS, MrEntry, QpShared, RecvSlot, RqShared, SrqRing, SrqShared,
};
use freeflow_core::shm::{Bell, PdMemoryView, View};
use freeflow_core::verbs::{Gid, QpType};
use rustix::io::Errno;

use super::{Link, Notice, Owner, State};
use crate::directory::Tenant;
use crate::link::memory::Memory;
use crate::refusal::{Refusal, Result};

/// A completion queue and how to wake who sleeps on it.
#[derive(Debug)]
pub struct FarCq {
    pub shared: View<CqShared>,
    pub bell: Option<Bell>,
}

/// A shared receive queue, and the memory of its own PD.
#[derive(Debug)]
pub struct FarSrq {
    pub number: u32,
    pub header: View<SrqShared>,
    pub slots: View<RecvSlot>,
    pub memory: Memory,
}

impl FarSrq {
    pub fn ring(&self) -> SrqRing<'_> {
        SrqRing { header: &self.header[0], slots: RqShared::new(&self.slots) }
    }
}

/// What a peer's requests may reach: memory, receives, and what those complete on.
#[derive(Debug)]
pub struct FarDomain {
    pub memory: Memory,
    pub cq: FarCq,
    pub bit: u32,
    /// Where the receives are, if they are not the queue pair's own.
    pub srq: Option<FarSrq>,
}

/// A queue pair.
#[derive(Debug)]
pub struct FarQp {
    pub qpn: u32,
    pub kind: QpType,
    pub client: u32,
    pub tenant: Tenant,
    pub vip: Gid,
    /// Its peer; zero for UD.
    pub dest_qpn: u32,
    pub dest: Gid,
    pub shared: View<QpShared>,
    pub slots: View<RecvSlot>,
    pub send_cq: FarCq,
    /// Of its PD, its own requests' memory included. XRC's target has others: [`State::far_queue`].
    pub domain: FarDomain,
}

/// A submission ring, checked.
#[derive(Debug)]
pub struct FarRing {
    pub header: View<LinkHeader>,
    pub words: View<LinkWord>,
    pub stride: usize,
}

impl State {
    /// Everything of a queue pair; the caller knows that it exists and who owns it.
    pub fn far_qp(&self, qpn: u32) -> Result<FarQp> {
        let gone = || Refusal::NoSuch { what: "queue pair", id: qpn };
        let (owner, qp) = self.qps.get(qpn).ok_or_else(gone)?;
        let container = &self.containers[&owner.container];
        let slab = &self.slabs.get(qp.slab).ok_or_else(gone)?.1.map;
        let (dest_qpn, dest) = match qp.link {
            Link::To { qpn, gid } => (qpn, gid),
            _ => Default::default(),
        };
        Ok(FarQp {
            qpn,
            kind: qp.kind,
            client: owner.client,
            tenant: container.tenant.clone(),
            vip: Gid::of(container.vip),
            dest_qpn,
            dest,
            shared: View::new(slab.clone(), qp.qp_off.into(), 1).ok_or_else(gone)?,
            slots: View::new(slab.clone(), qp.rq_off.into(), qp.rq_depth as usize).ok_or_else(gone)?,
            send_cq: self.far_cq(qp.send_cq).ok_or_else(gone)?,
            domain: FarDomain {
                memory: self.far_memory(owner.client, qp.pd)?,
                cq: self.far_cq(qp.recv_cq).ok_or_else(gone)?,
                bit: qp.cq_bit,
                srq: if qp.srq == 0 { None } else { Some(self.far_srq(owner.client, qp.srq)?) },
            },
        })
    }

    /// What a request to XRC's target `qpn` reaches that names the shared receive queue `srqn`.
    pub fn far_queue(&self, qpn: u32, srqn: u32) -> Result<FarDomain> {
        let gone = || Refusal::NoSuch { what: "shared receive queue", id: srqn };
        let (owner, qp) = self.qps.get(qpn).ok_or_else(gone)?;
        let (_, srq) = self.srq_of_domain(owner, qp, srqn).ok_or_else(gone)?;
        Ok(FarDomain {
            memory: self.far_memory(owner.client, srq.pd)?,
            cq: self.far_cq(srq.cq).ok_or_else(gone)?,
            bit: srq.cq_bit,
            srq: Some(self.far_srq(owner.client, srqn)?),
        })
    }

    fn far_memory(&self, client: u32, pd: u32) -> Result<Memory> {
        let gone = || Refusal::NoSuch { what: "protection domain", id: pd };
        let owner = self.client(client)?;
        let table = owner.mr_table.as_ref().ok_or_else(gone)?;
        let file = &self.pds.get(pd).ok_or_else(gone)?.1.fd;
        let system = |errno: Errno| Refusal::System { what: "memory of a protection domain", errno };
        let again = file.try_clone().map_err(|_| system(Errno::MFILE))?;
        Ok(Memory {
            mrs: View::<MrEntry>::new(table.map.clone(), 0, MR_SLOTS).ok_or_else(gone)?,
            pd,
            file: file.clone(),
            windows: PdMemoryView::new(again).map_err(system)?,
            process: owner.memory.as_ref().ok().cloned(),
        })
    }

    fn far_srq(&self, client: u32, number: u32) -> Result<FarSrq> {
        let gone = || Refusal::NoSuch { what: "shared receive queue", id: number };
        let (_, srq) = self.srqs.get(number).ok_or_else(gone)?;
        let map = &self.slabs.get(srq.slab).ok_or_else(gone)?.1.map;
        Ok(FarSrq {
            number,
            header: View::new(map.clone(), srq.off.into(), 1).ok_or_else(gone)?,
            slots: View::new(map.clone(), srq.slots.into(), srq.depth as usize).ok_or_else(gone)?,
            memory: self.far_memory(client, srq.pd)?,
        })
    }

    fn far_cq(&self, id: u32) -> Option<FarCq> {
        let cq = self.cqs.get(id)?.1;
        let slab = &self.slabs.get(cq.slab)?.1.map;
        let bell = self.channels.get(cq.channel).and_then(|(_, channel)| Bell::open(&channel.bell).ok());
        Some(FarCq { shared: View::new(slab.clone(), cq.off.into(), 1)?, bell })
    }

    /// A datagram from another host may go to this queue pair of `tenant` at `to`.
    pub fn far_datagram(&self, tenant: &Tenant, to: Gid, qpn: u32) -> Result<FarQp> {
        let container = self.directory.find(tenant, to.ip()).ok_or(Refusal::NoPeer)?;
        let receives = |(them, qp): (Owner, &super::Qp)| {
            them.container == container && qp.kind == QpType::Ud && qp.link == Link::Receiving
        };
        if !self.qps.get(qpn).is_some_and(receives) {
            return Err(Refusal::NoPeer);
        }
        self.far_qp(qpn)
    }

    pub fn far_ring(&self, owner: Owner, slab: u32, off: u32, depth: u32, stride: u32) -> Result<FarRing> {
        let bad = || Refusal::Invalid("a submission ring must be aligned and inside its slab");
        let map = &self.slabs.owned(slab, owner)?.map;
        let words = u64::from(depth) * u64::from(stride);
        let words = usize::try_from(words).ok().filter(|_| depth.is_power_of_two()).ok_or_else(bad)?;
        let header = View::<LinkHeader>::new(map.clone(), off.into(), 1).ok_or_else(bad)?;
        let first = u64::from(off) + size_of::<LinkHeader>() as u64;
        let words = View::<LinkWord>::new(map.clone(), first, words).ok_or_else(bad)?;
        Ok(FarRing { header, words, stride: stride as usize })
    }

    pub fn far_doorbell(&self, owner: Owner, slab: u32, off: u32) -> Result<View<CqShared>> {
        let map = &self.slabs.owned(slab, owner)?.map;
        View::new(map.clone(), off.into(), 1)
            .ok_or(Refusal::Invalid("a doorbell must be aligned and inside its slab"))
    }

    /// The link has something to say to the owner of a queue pair.
    pub fn tell_owner(&mut self, qpn: u32, notice: Notice) {
        if let Some((owner, _)) = self.qps.get(qpn) {
            self.tell(owner.client, notice);
        }
    }

    /// Tells the owners of queue pairs whose peer was nowhere when they were connected, and is known now.
    pub fn tell_found(&mut self, is_known: impl Fn(&Tenant, std::net::IpAddr) -> bool) {
        let found = |(qpn, owner, qp): (u32, Owner, &super::qp::Qp)| {
            let Link::To { gid, .. } = qp.link else { return None };
            let (tenant, ip) = self.elsewhere(owner, gid).filter(|_| !qp.far)?;
            is_known(&tenant, ip).then_some((owner.client, qpn))
        };
        let found: Vec<_> = self.qps.iter().filter_map(found).collect();
        found.into_iter().for_each(|(client, qpn)| self.tell(client, Notice::PeerReady { qpn }));
    }

    /// Tenant and address of a queue pair's owner.
    pub fn home_of(&self, owner: Owner) -> Result<(Tenant, Gid)> {
        let gone = Refusal::NoSuch { what: "container", id: owner.container };
        let home = self.containers.get(&owner.container).ok_or(gone)?;
        Ok((home.tenant.clone(), Gid::of(home.vip)))
    }

    /// The address of `gid` as `owner` sees it, if no container here has it.
    pub fn elsewhere(&self, owner: Owner, gid: Gid) -> Option<(Tenant, std::net::IpAddr)> {
        let home = self.containers.get(&owner.container)?;
        let here = self.container_at(owner.container, gid).is_some();
        (!here).then(|| (home.tenant.clone(), gid.ip()))
    }
}
