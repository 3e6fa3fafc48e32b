//! Other processes as this one has them mapped: slabs, MR tables, PD memory, bells. Kept until the router says the
//! process is gone.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ctl::{PeerInfo, peer_fds};
use crate::error::{Error, Result};
use crate::ring::{CqShared, MR_SLOTS, MrEntry, QpShared, RecvSlot, RqShared, SrqRing, SrqShared};
use crate::shm::{Bell, Mapping, PdMemoryView, View};
use crate::verbs::QpType;

/// A peer's QP, resolved.
#[derive(Debug)]
pub struct PeerQp {
    /// Its owner's connection.
    pub client: u32,
    pub qpn: u32,
    pub qp: View<QpShared>,
    pub slots: View<RecvSlot>,
    pub srq: Option<PeerSrq>,
    /// The PD of its receives' keys.
    pub recv_pd: u32,
    pub kind: QpType,
    pub cq: View<CqShared>,
    pub cq_bit: u32,
    pub mrs: View<MrEntry>,
    pub pd: u32,
    pub memory: Arc<PdMemoryView>,
    /// Of the channel of its receive CQ. None: there is none, or it cannot be opened here, and the router rings.
    pub bell: Option<Arc<Bell>>,
}

/// A peer's shared receive queue.
#[derive(Debug)]
pub struct PeerSrq {
    pub header: View<SrqShared>,
    pub slots: View<RecvSlot>,
    pub pd: u32,
    pub memory: Arc<PdMemoryView>,
}

impl PeerSrq {
    pub fn ring(&self) -> SrqRing<'_> {
        SrqRing { header: &self.header[0], slots: RqShared::new(&self.slots) }
    }
}

impl PeerQp {
    /// The memory of the PD that a region is in: the QP's, or that of its receives.
    pub fn memory_of(&self, pd: u32) -> &PdMemoryView {
        match &self.srq {
            Some(srq) if srq.pd == pd => &srq.memory,
            _ => &self.memory,
        }
    }
}

#[derive(Debug, Default)]
struct Process {
    slabs: HashMap<u32, Arc<Mapping>>,
    mrs: Option<Arc<Mapping>>,
    pds: HashMap<u32, Arc<PdMemoryView>>,
    bells: HashMap<u32, Arc<Bell>>,
}

/// All processes this one talks to.
#[derive(Debug, Default)]
pub struct Peers(Mutex<Known>);

/// Departed processes remembered.
const MAX_GONE: usize = 1024;

#[derive(Debug, Default)]
struct Known {
    processes: HashMap<u32, Process>,
    /// Newest last. The news of a death travels on its own socket and may overtake a Resolve reply.
    gone: VecDeque<u32>,
}

impl Peers {
    /// Takes the descriptors of a Resolve reply and returns the QP it describes.
    pub fn admit(&self, qpn: u32, info: &PeerInfo, fds: Vec<OwnedFd>) -> Result<PeerQp> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.gone.contains(&info.client) {
            return Err(Error::Disconnected("the peer's process is gone".into()));
        }
        let process = all.processes.entry(info.client).or_default();
        process.take(info, fds)?;
        process
            .view(qpn, info)
            .ok_or_else(|| Error::Disconnected("Resolve named objects that do not fit".into()))
    }

    /// The process is gone.
    pub fn forget(&self, client: u32) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.processes.remove(&client);
        if all.gone.len() == MAX_GONE {
            all.gone.pop_front();
        }
        all.gone.push_back(client);
    }
}

impl Process {
    fn take(&mut self, info: &PeerInfo, fds: Vec<OwnedFd>) -> Result<()> {
        let mut fds = fds.into_iter();
        let mut next = |bit: u32| if info.fds & bit != 0 { fds.next() } else { None };
        if let Some(fd) = next(peer_fds::SLAB) {
            self.slabs.insert(info.slab, map_whole(fd)?);
        }
        if let Some(fd) = next(peer_fds::CQ_SLAB) {
            self.slabs.insert(info.cq_slab, map_whole(fd)?);
        }
        if let Some(fd) = next(peer_fds::MR_TABLE) {
            let map = Mapping::new(fd, 0, MR_SLOTS * size_of::<MrEntry>(), false);
            let map = map.map_err(Error::system("mmap of a peer's MR table"))?;
            map.dont_fork();
            self.mrs = Some(Arc::new(map));
        }
        let memory = |fd| PdMemoryView::new(fd).map_err(Error::system("fstat of a peer's memory"));
        if let Some(fd) = next(peer_fds::PD) {
            self.pds.insert(info.pd, Arc::new(memory(fd)?));
        }
        if let Some(fd) = next(peer_fds::BELL) {
            Bell::open(&fd).ok().map(|bell| self.bells.insert(info.channel, Arc::new(bell)));
        }
        if let Some(fd) = next(peer_fds::SRQ_SLAB) {
            self.slabs.insert(info.srq_slab, map_whole(fd)?);
        }
        if let Some(fd) = next(peer_fds::SRQ_PD) {
            self.pds.insert(info.srq_pd, Arc::new(memory(fd)?));
        }
        Ok(())
    }

    fn view(&self, qpn: u32, info: &PeerInfo) -> Option<PeerQp> {
        let slab = self.slabs.get(&info.slab)?;
        let cq_slab = self.slabs.get(&info.cq_slab)?;
        let depth = info.rq_depth as usize;
        if depth != 0 && !depth.is_power_of_two() {
            return None;
        }
        let srq = if info.srq == 0 { None } else { Some(self.view_srq(info)?) };
        Some(PeerQp {
            client: info.client,
            qpn,
            qp: View::new(Arc::clone(slab), u64::from(info.qp_off), 1)?,
            slots: View::new(Arc::clone(slab), u64::from(info.rq_off), depth)?,
            recv_pd: srq.as_ref().map_or(info.pd, |srq| srq.pd),
            srq,
            kind: QpType::try_from(info.kind).ok()?,
            cq: View::new(Arc::clone(cq_slab), u64::from(info.cq_off), 1)?,
            cq_bit: info.cq_bit,
            mrs: View::new(Arc::clone(self.mrs.as_ref()?), 0, MR_SLOTS)?,
            pd: info.pd,
            memory: Arc::clone(self.pds.get(&info.pd)?),
            bell: self.bells.get(&info.channel).cloned(),
        })
    }

    fn view_srq(&self, info: &PeerInfo) -> Option<PeerSrq> {
        let slab = self.slabs.get(&info.srq_slab)?;
        let depth = Some(info.srq_depth as usize).filter(|depth| depth.is_power_of_two())?;
        Some(PeerSrq {
            header: View::new(Arc::clone(slab), u64::from(info.srq_off), 1)?,
            slots: View::new(Arc::clone(slab), u64::from(info.srq_slots), depth)?,
            pd: info.srq_pd,
            memory: Arc::clone(self.pds.get(&info.srq_pd)?),
        })
    }
}

fn map_whole(fd: OwnedFd) -> Result<Arc<Mapping>> {
    let size = rustix::fs::fstat(&fd).map_err(Error::system("fstat of a peer's slab"))?.st_size;
    let map = Mapping::new(&fd, 0, size as usize, true).map_err(Error::system("mmap of a peer's slab"))?;
    map.dont_fork();
    Ok(Arc::new(map))
}
