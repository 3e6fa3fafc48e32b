//! The executor between two ends that are plain memory of one process.

mod datagrams;
mod flush;
mod model;
mod requests;
mod resumed;
mod windows;

use rustix::io::Errno;

use super::*;
use crate::ring::mr::slot_of;
use crate::ring::{Completion, CqShared, MrEntry, MrView, QpShared, RecvSlot, RqShared, Taken};
use crate::shm::{LocalBytes, SharedBytes, copy_in, copy_out};
use crate::sync::Ordering;
use crate::verbs::{Access, QpState, WcStatus};

/// Both ends' keys: slot 1 grants everything, 2 nothing remote and no LOCAL_WRITE, 3 is another PD's.
pub const KEY: u32 = 0x0700_0107;
pub const READ_ONLY: u32 = 0x0700_0207;
pub const FOREIGN: u32 = 0x0700_0307;
const PD: u32 = 5;
pub const QPN: u32 = 0x11;
pub const PEER_QPN: u32 = 0x22;
pub const CLIENT: u32 = 9;
pub const QKEY: u32 = 0x1234;
/// Where requests say the peer's memory is, and where its owner has it: neither is an address here.
pub const IOVA: u64 = 0x10_0000;
const PEER_VA: u64 = 0x7fff_0000_0000;
pub const LEN: usize = 8192;
const DEPTH: usize = 4;

/// Words, so that atomics find alignment.
fn memory() -> Box<[u64]> {
    vec![0; LEN / 8].into()
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Everything two ends share, and what the path does.
pub struct World {
    pub qp: QpShared,
    pub cq: CqShared,
    pub slots: Vec<RecvSlot>,
    mrs: Vec<MrEntry>,
    own_mrs: Vec<MrEntry>,
    own: Box<[u64]>,
    peer: Box<[u64]>,
    pub path: Path,
    /// Receives posted.
    pub posted: u32,
}

/// The mock path.
pub struct Path {
    peer: u64,
    /// Bytes that one look finds at most.
    pub window: u64,
    /// Nothing is mapped; an error is what the far copy ends in.
    pub far: Option<Result<(), Errno>>,
    pub retired: Retired,
    pub bells: u32,
    pub faults: u32,
}

fn table(addr: u64, iova: u64) -> Vec<MrEntry> {
    let table: Vec<_> = std::iter::repeat_with(MrEntry::default).take(4).collect();
    let all = Access::REMOTE | Access::LOCAL_WRITE;
    for (key, access, pd) in [(KEY, all, PD), (READ_ONLY, Access::empty(), PD), (FOREIGN, all, PD + 1)] {
        let view = MrView { key, access, pd, iova, addr, len: LEN as u64, ..MrView::default() };
        table[slot_of(key)].publish(&view);
    }
    table
}

impl World {
    pub fn new() -> Self {
        let (own, peer) = (memory(), memory());
        let (peer_at, retired) = (peer.as_ptr() as u64, Retired::default());
        let path = Path { peer: peer_at, window: u64::MAX, far: None, retired, bells: 0, faults: 0 };
        let own_mrs = table(own.as_ptr() as u64, own.as_ptr() as u64);
        let slots = std::iter::repeat_with(RecvSlot::default).take(DEPTH).collect();
        let (qp, cq, mrs) = (QpShared::default(), CqShared::default(), table(PEER_VA, IOVA));
        qp.state.store(QpState::Rts as u32, Ordering::Relaxed);
        qp.qpn.store(PEER_QPN, Ordering::Relaxed);
        qp.peer_qpn.store(QPN, Ordering::Relaxed);
        qp.qkey.store(QKEY, Ordering::Relaxed);
        qp.access.store(Access::REMOTE.bits(), Ordering::Relaxed);
        World { qp, cq, slots, mrs, own_mrs, own, peer, path, posted: 0 }
    }

    pub fn rq(&self) -> RqShared<'_> {
        RqShared::new(&self.slots)
    }

    /// An entry of the poster's memory.
    pub fn own(&self, offset: usize, length: u32) -> Sge {
        Sge { addr: self.own.as_ptr() as u64 + offset as u64, length, lkey: KEY }
    }

    /// An entry of the peer's memory.
    pub fn peers(&self, offset: usize, length: u32) -> Sge {
        Sge { addr: IOVA + offset as u64, length, lkey: KEY }
    }

    pub fn own_bytes(&self) -> Vec<u8> {
        bytes_of(&self.own)
    }

    pub fn peer_bytes(&self) -> Vec<u8> {
        bytes_of(&self.peer)
    }

    pub fn fill_own(&mut self, byte: impl Fn(usize) -> u8) {
        fill(&mut self.own, byte);
    }

    pub fn fill_peer(&mut self, byte: impl Fn(usize) -> u8) {
        fill(&mut self.peer, byte);
        self.path.peer = self.peer.as_ptr() as u64;
    }

    pub fn post(&mut self, sges: &[Sge]) {
        self.rq().post(self.posted, sges);
        self.posted += 1;
    }

    /// One step of `request`, of at most `budget` bytes.
    pub fn step(&mut self, request: &Request<'_>, progress: &mut Progress, budget: u64) -> Outcome {
        let World { qp, cq, slots, mrs, own_mrs, path, .. } = self;
        let rq = RqShared::new(slots);
        let peer = Some(Peer { qp, rq, srq: None, recv_pd: PD, cq, cq_bit: 0, mrs, pd: PD, qpn: PEER_QPN });
        let local = LocalTable::new(own_mrs, PD);
        let env = Env { local, peer, memory: path, qpn: QPN, client: CLIENT, gid: Gid::default(), budget };
        execute(request, progress, env)
    }

    /// `request` in one step.
    pub fn run(&mut self, request: &Request<'_>) -> Outcome {
        self.step(request, &mut Progress::default(), u64::MAX)
    }

    /// The completion of receive `seq`, if there is one; an inline payload is where it belongs afterwards.
    pub fn received(&mut self, seq: u32, sges: &[Sge]) -> Option<Completion> {
        let Some(Taken::Done(done, payload)) = RqShared::new(&self.slots).take(seq, false, false) else {
            return None;
        };
        if done.flags & Completion::INLINE != 0 {
            let mut peer = bytes_of(&self.peer);
            let places = sges.iter().flat_map(|sge| (sge.addr - IOVA..).take(sge.length as usize));
            for (at, byte) in places.zip(&payload.read()[..done.byte_len as usize]) {
                peer[at as usize] = *byte;
            }
            fill(&mut self.peer, |i| peer[i]);
        }
        Some(done)
    }
}

fn fill(words: &mut [u64], byte: impl Fn(usize) -> u8) {
    for (i, word) in words.iter_mut().enumerate() {
        *word = u64::from_ne_bytes(std::array::from_fn(|k| byte(i * 8 + k)));
    }
}

impl Path {
    fn here(&self, offset: u64, len: u64) -> SharedBytes {
        assert!(offset + len <= LEN as u64, "the executor asked beyond the MR");
        // SAFETY: inside the peer's memory, which lives as long as the world.
        unsafe { SharedBytes::new((self.peer + offset) as *mut u8, len as usize) }
    }
}

impl PeerMemory for Path {
    fn retired(&self) -> &Retired {
        &self.retired
    }

    fn reach(&mut self, _: &MrEntry, _: u32, va: u64, len: u64) -> Reach {
        assert!(len > 0);
        let len = len.min(self.window);
        if self.far.is_some() { Reach::Far(len) } else { Reach::Here(self.here(va - PEER_VA, len)) }
    }

    fn far(&mut self, copy: FarCopy) -> Result<(), Errno> {
        self.far.unwrap_or(Ok(()))?;
        let there = self.here(copy.remote - IOVA, copy.len);
        let here = LocalBytes { addr: copy.local, len: copy.len as usize };
        if copy.kind == crate::ctl::copy_kind::READ {
            // SAFETY: the executor checked the poster's range, `here` the peer's.
            unsafe { copy_out(here, there) };
        } else {
            // SAFETY: as above.
            unsafe { copy_in(there, here) };
        }
        Ok(())
    }

    fn limit(&mut self) {}

    fn is_reliable(&self) -> bool {
        true
    }

    fn bell(&mut self) {
        self.bells += 1;
    }

    fn fault(&mut self) {
        self.faults += 1;
    }
}

pub fn request<'a>(op: SendOp, sges: &'a [Sge]) -> Request<'a> {
    let target = match op {
        SendOp::Send | SendOp::SendImm | SendOp::SendInv => Target::Receive,
        SendOp::CompareSwap | SendOp::FetchAdd => {
            Target::Atomic { addr: IOVA, rkey: KEY, compare_add: 0, swap: 7 }
        }
        _ => Target::Memory { addr: IOVA, rkey: KEY },
    };
    Request { op, flags: SendFlags::empty(), imm: 0x0102_0304, target, srqn: 0, sges }
}

pub fn done(status: WcStatus, byte_len: u32) -> Outcome {
    Outcome::Done { status, byte_len }
}
