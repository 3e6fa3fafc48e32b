//! Other processes as this one has them mapped: slabs, MR tables, PD memory, bells. Kept until the router says the
//! process is gone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use crate::ctl::{PeerInfo, peer_fds};
use crate::error::{Error, Result};
use crate::ring::{CqShared, Extent, MR_SLOTS, MrEntry, QpShared, RecvSlot, RqShared, SrqRing, SrqShared};
use crate::shm::{Bell, Mapping, PAGE, View};
use crate::verbs::QpType;

/// Mappings of one PD kept at a time; beyond, all unused ones are dropped.
const MAX_WINDOWS: usize = 4096;
/// Address space that the mappings of one PD may take: extents are the peer's claim, and cost it nothing.
const MAX_MAPPED: u64 = 1 << 40;

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

/// The memfd of a peer's PD and what of it is mapped here.
#[derive(Debug)]
pub struct PdMemoryView {
    fd: OwnedFd,
    /// Bytes in the file, for good: touching a page behind them raises SIGBUS.
    size: u64,
    windows: Mutex<BTreeMap<u64, Arc<Mapping>>>,
}

impl PdMemoryView {
    /// The router has seen that the file's size is sealed.
    fn new(fd: OwnedFd) -> std::result::Result<Self, Errno> {
        let size = rustix::fs::fstat(&fd)?.st_size as u64;
        Ok(PdMemoryView { fd, size, windows: Mutex::default() })
    }

    /// Maps the pages an extent is in, or finds them mapped. The mapping begins at the start of the first page.
    pub fn window(&self, extent: &Extent) -> std::result::Result<Arc<Mapping>, Errno> {
        let (offset, len) = whole_pages(extent).ok_or(Errno::INVAL)?;
        if offset + len as u64 > self.size {
            return Err(Errno::INVAL);
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = windows.get(&offset).filter(|map| map.len() >= len) {
            return Ok(Arc::clone(found));
        }
        let mapped: u64 = windows.values().map(|map| map.len() as u64).sum();
        if windows.len() >= MAX_WINDOWS || mapped + len as u64 > MAX_MAPPED {
            windows.retain(|_, map| Arc::strong_count(map) > 1);
            let kept: u64 = windows.values().map(|map| map.len() as u64).sum();
            if windows.len() >= MAX_WINDOWS || kept.saturating_add(len as u64) > MAX_MAPPED {
                return Err(Errno::NOMEM);
            }
        }
        let map = Mapping::new(&self.fd, offset, len, true)?;
        map.dont_fork();
        let map = Arc::new(map);
        windows.insert(offset, Arc::clone(&map));
        Ok(map)
    }
}

/// File offset and length of the whole pages an extent is in; None if a peer wrote nonsense.
fn whole_pages(extent: &Extent) -> Option<(u64, usize)> {
    let lead = extent.offset % PAGE;
    let congruent = extent.va % PAGE == lead;
    let len = lead.checked_add(extent.len)?.checked_next_multiple_of(PAGE)?;
    let start = extent.offset - lead;
    start.checked_add(len).filter(|_| congruent && extent.len > 0)?;
    Some((start, usize::try_from(len).ok()?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_mapped_by_whole_pages() {
        let pages = |va, len, offset| whole_pages(&Extent { va, len, offset });
        assert_eq!(pages(0x5000, 0x1000, 0x3000), Some((0x3000, 0x1000)));
        assert_eq!(pages(0x5010, 64, 0x3010), Some((0x3000, 0x1000)), "an MR smaller than a page");
        assert_eq!(pages(0x5ff0, 32, 0x3ff0), Some((0x3000, 0x2000)), "across a page border");
        assert_eq!(pages(0x5010, 64, 0x3000), None, "addresses that no mapping can have");
        assert_eq!(pages(0x5000, 0, 0x3000), None);
        assert_eq!(pages(0x5000, u64::MAX, 0x3000), None);
        assert_eq!(pages(0xf000, 0x2000, u64::MAX - 0xfff), None);
    }

    #[test]
    fn nothing_is_mapped_beyond_the_file() {
        let fd = crate::shm::make_memfd("peer", 2 * PAGE).expect("memfd");
        let view = PdMemoryView::new(fd).expect("fstat");
        let window =
            |len, offset| view.window(&Extent { va: 0x5000, len, offset }).map(|map| map.len() as u64);
        assert_eq!(window(PAGE, PAGE), Ok(PAGE));
        assert_eq!(window(2 * PAGE, 0), Ok(2 * PAGE));
        assert_eq!(window(PAGE, 2 * PAGE), Err(Errno::INVAL));
        assert_eq!(window(2 * PAGE, PAGE), Err(Errno::INVAL));
    }

    #[test]
    fn a_peers_claims_do_not_take_all_address_space() {
        let extent = |len, offset| Extent { va: 0x7000_0000, len, offset };
        let vast = PdMemoryView::new(crate::shm::make_memfd("vast", 1 << 50).expect("memfd")).expect("view");
        let kept = vast.window(&extent(MAX_MAPPED / 2, 0)).expect("half of what is allowed");
        let quarter = MAX_MAPPED / 4;
        drop(vast.window(&extent(quarter, MAX_MAPPED)).expect("in use no longer"));
        let _kept = (kept, vast.window(&extent(MAX_MAPPED / 2, 2 * MAX_MAPPED)).expect("in its place"));
        assert_eq!(vast.window(&extent(0x1000, 0)).expect("mapped already").len() as u64, MAX_MAPPED / 2);
        assert_eq!(vast.window(&extent(0x1000, 4096)).expect_err("everything is in use"), Errno::NOMEM);
    }
}
