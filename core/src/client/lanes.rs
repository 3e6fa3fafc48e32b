//! The two work queues of a QP as its CQs see them: what was posted, what is done, what was polled.
//!
//! A CQ holds no entries of its own. Polling walks the lanes of the QPs attached to it and builds completions from
//! private memory (wr_id, lists) and, for receives, the few words a peer wrote. Order is kept per lane.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use arrayvec::ArrayVec;

use crate::error::Result;
use crate::exec::LocalTable;
use crate::ring::{Completion, INLINE_BYTES, QpShared, RecvSlot, RqShared, SlotPayload, Taken};
use crate::shm::{Array, Lender, LocalBytes, Purpose, SharedBytes, View, copy_out, prefetch_for_write};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::verbs::{Access, QpState, QpType, SendOp, Sge, Wc, WcOpcode, WcStatus, limits, wc_flags, wc_sl};

use super::link::LinkLane;
use super::qp::Qp;
use super::tickets::{Source, Tickets};

const MAX_SGE: usize = limits::SGE as usize;

/// A finished send, until polled.
#[derive(Debug, Default)]
struct SendResult {
    wr_id: AtomicU64,
    /// byte_len | status << 32 | opcode << 40 | wanted << 48
    meta: AtomicU64,
}

/// The send queue's results.
#[derive(Debug)]
pub struct SendLane {
    results: Array<SendResult>,
    /// Requests begun; written under the send queue's lock.
    begun: AtomicU32,
    /// Requests finished; written under the send queue's lock.
    done: AtomicU32,
    /// Results taken; written under the CQ's lock.
    polled: AtomicU32,
}

/// A posted receive as its owner remembers it.
#[derive(Debug, Default)]
pub struct PrivateRecv {
    wr_id: AtomicU64,
    count: AtomicU32,
    sges: [[AtomicU64; 2]; MAX_SGE],
}

/// The receive queue.
#[derive(Debug)]
pub struct RecvLane {
    slots: View<RecvSlot>,
    private: Array<PrivateRecv>,
    /// Receives posted; written under the receive queue's lock.
    posted: AtomicU32,
    /// Receives taken; written under the CQ's lock.
    polled: AtomicU32,
}

/// Both lanes, shared by the QP and its CQs.
#[derive(Debug)]
pub struct Lanes {
    /// 0 until the router has named it.
    qpn: AtomicU32,
    pub kind: QpType,
    pub shared: View<QpShared>,
    pub send: SendLane,
    pub recv: RecvLane,
    /// With a shared receive queue: `recv` holds tickets for its receives.
    pub tickets: Option<Tickets>,
    /// A `QpState`: the private truth; the shared header only tells peers.
    state: AtomicU32,
    /// Held while the state changes: the program, a poller and the helper may each have a reason at once.
    changing: Mutex<()>,
    /// No peer fills a receive any more: it is dead, or this QP is in ERR and the last copy has ended.
    pub deserted: AtomicBool,
    /// A message arrived in RTR and the program was told.
    established: AtomicBool,
    /// Set once the peer turned out to be on another host.
    pub link: OnceLock<Arc<LinkLane>>,
    pub qp: Weak<Qp>,
}

impl SendLane {
    pub fn new(depth: u32, lender: Option<&Arc<dyn Lender>>) -> Result<Self> {
        let results = Array::new(depth as usize, lender, Purpose::SendQueue)?;
        let (begun, done, polled) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        Ok(SendLane { results, begun, done, polled })
    }

    fn slot(&self, seq: u32) -> &SendResult {
        &self.results[seq as usize & (self.results.len() - 1)]
    }

    /// Poster: how many of `posted` requests still hold a slot.
    pub fn used(&self, posted: u32) -> u32 {
        // Acquire: a slot seen as polled was read before. Partner: poll()'s release store.
        posted.wrapping_sub(self.polled.load(Ordering::Acquire))
    }

    /// Poster: so many requests were posted, with the one that begins.
    #[inline]
    pub fn begin(&self, posted: u32) {
        // Its partner is the mark that follows, or the lock of whoever lists all queues.
        self.begun.store(posted, Ordering::Release);
    }

    /// CQ: are there requests that were not polled?
    pub fn outstanding(&self) -> bool {
        self.begun.load(Ordering::Acquire) != self.polled.load(Ordering::Relaxed)
    }

    /// CQ: how many requests have ended and were not polled.
    pub fn unpolled(&self) -> u32 {
        self.done.load(Ordering::Acquire).wrapping_sub(self.polled.load(Ordering::Relaxed))
    }

    /// Executor: request `done` (the next one) ended. `wanted`: it gets a completion.
    #[inline]
    pub fn finish(&self, wr_id: u64, op: SendOp, status: WcStatus, byte_len: u32, wanted: bool) {
        let seq = self.done.load(Ordering::Relaxed);
        let slot = self.slot(seq);
        slot.wr_id.store(wr_id, Ordering::Relaxed);
        let meta = u64::from(byte_len)
            | (status as u64) << 32
            | (op.completion() as u64) << 40
            | u64::from(wanted) << 48;
        slot.meta.store(meta, Ordering::Relaxed);
        // Release: partner is poll()'s acquire load.
        self.done.store(seq.wrapping_add(1), Ordering::Release);
    }

    /// CQ: takes completions, as many as there is room for, passing over requests that want none. Returns how many.
    fn poll(&self, qpn: u32, out: &mut [Wc]) -> usize {
        let before = self.polled.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Acquire);
        let (mut seq, mut filled) = (before, 0);
        while seq != done && filled < out.len() {
            let slot = self.slot(seq);
            let meta = slot.meta.load(Ordering::Relaxed);
            if meta >> 48 != 0 {
                out[filled] = Wc {
                    wr_id: slot.wr_id.load(Ordering::Relaxed),
                    status: (meta >> 32) as u8 as u32,
                    opcode: (meta >> 40) as u8 as u32,
                    byte_len: meta as u32,
                    qp_num: qpn,
                    ..Wc::default()
                };
                filled += 1;
            }
            seq = seq.wrapping_add(1);
        }
        if seq != before {
            self.polled.store(seq, Ordering::Release);
        }
        filled
    }

    /// Owner, nobody polling: forgets everything.
    pub fn reset(&self) {
        self.begun.store(0, Ordering::Release);
        self.done.store(0, Ordering::Release);
        self.polled.store(0, Ordering::Release);
    }
}

impl RecvLane {
    pub fn new(slots: View<RecvSlot>, lender: Option<&Arc<dyn Lender>>) -> Result<Self> {
        let private = Array::new(slots.len(), lender, Purpose::ReceiveQueue)?;
        Ok(RecvLane { slots, private, posted: AtomicU32::new(0), polled: AtomicU32::new(0) })
    }

    pub fn ring(&self) -> RqShared<'_> {
        RqShared::new(&self.slots)
    }

    /// The tickets of a QP whose receives are elsewhere.
    pub fn tickets(slots: View<RecvSlot>) -> Self {
        RecvLane { slots, private: Array::default(), posted: AtomicU32::new(0), polled: AtomicU32::new(0) }
    }

    fn slot(&self, seq: u32) -> &PrivateRecv {
        &self.private[seq as usize & (self.private.len() - 1)]
    }

    /// Owner, under the receive queue's lock: posts a receive unless the queue is full.
    pub fn post(&self, wr_id: u64, sges: &[Sge], limit: u32) -> bool {
        let seq = self.posted.load(Ordering::Relaxed);
        let waiting = seq.wrapping_sub(self.polled.load(Ordering::Acquire));
        if waiting >= limit {
            return false;
        }
        let slot = self.slot(seq);
        slot.set(wr_id, sges);
        self.ring().post(seq, sges);
        let next = seq.wrapping_add(1);
        // Release: partner is poll()'s acquire load; the private half is written.
        self.posted.store(next, Ordering::Release);
        if waiting + 1 < self.ring().depth() {
            // The next one's slot is free, and in the cache of whoever filled it last.
            self.ring().state_word(next).inspect(|word| prefetch_for_write(*word));
        }
        true
    }

    /// Owner, nobody polling or posting: forgets everything.
    pub fn reset(&self, shared: &QpShared) {
        self.ring().clear();
        shared.head.store(0, Ordering::Release);
        self.posted.store(0, Ordering::Release);
        self.polled.store(0, Ordering::Release);
    }
}

impl Lanes {
    pub fn new(
        kind: QpType,
        shared: View<QpShared>,
        send: SendLane,
        recv: RecvLane,
        tickets: Option<Tickets>,
        qp: Weak<Qp>,
    ) -> Arc<Self> {
        let state = AtomicU32::new(QpState::Reset as u32);
        let (deserted, established) = (AtomicBool::new(false), AtomicBool::new(false));
        let (qpn, changing) = (AtomicU32::new(0), Mutex::default());
        let link = OnceLock::new();
        Arc::new(Lanes {
            qpn,
            kind,
            shared,
            send,
            recv,
            tickets,
            state,
            changing,
            deserted,
            established,
            link,
            qp,
        })
    }

    pub fn qpn(&self) -> u32 {
        self.qpn.load(Ordering::Relaxed)
    }

    /// The router has given the QP its number.
    pub fn name(&self, qpn: u32) {
        self.qpn.store(qpn, Ordering::Relaxed);
    }

    pub fn state(&self) -> QpState {
        QpState::try_from(self.state.load(Ordering::Acquire)).unwrap_or(QpState::Err)
    }

    /// Sets the state here and for peers.
    pub fn set_state(&self, state: QpState) {
        self.change_state(state, |_| true);
    }

    /// The same, if the present state may still become that. False: somebody else was faster.
    pub fn change_state(&self, to: QpState, may: impl FnOnce(QpState) -> bool) -> bool {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if !may(self.state()) {
            return false;
        }
        if to == QpState::Reset {
            self.established.store(false, Ordering::Relaxed);
        }
        self.state.store(to as u32, Ordering::Release);
        self.shared[0].state.store(to as u32, Ordering::SeqCst);
        true
    }

    /// Does the router carry the sends out?
    pub fn is_link(&self) -> bool {
        self.link.get().is_some_and(|link| link.is_active())
    }

    /// CQ: takes send completions.
    pub fn poll_send(&self, out: &mut [Wc]) -> usize {
        let polled = self.send.poll(self.qpn(), out);
        // Also behind some that were there: the mark that tells of the news is taken, and no other comes.
        if polled < out.len() && self.link.get().is_some_and(|link| link.is_news()) {
            self.qp.upgrade().inspect(|qp| qp.poll_link());
            return polled + self.send.poll(self.qpn(), &mut out[polled..]);
        }
        polled
    }

    /// A sender died with receive `seq` in hand: the next one gets it.
    fn post_anew(&self, seq: u32) {
        let sges: ArrayVec<Sge, MAX_SGE> = self.recv.slot(seq).sges().collect();
        self.recv.ring().post_anew(seq, &sges);
        self.shared[0].head.store(seq, Ordering::Release);
    }

    /// CQ: takes the next receive completion.
    pub fn poll_recv(&self, table: &LocalTable<'_>) -> Option<Wc> {
        if let Some(tickets) = &self.tickets {
            return match &tickets.source {
                Source::Queue(srq) => self.poll_tickets(tickets, |_| Some(&**srq)).map(|(_, wc)| wc),
                Source::Domain(_) => None, // polled by the queues they are of
            };
        }
        let lane = &self.recv;
        let seq = lane.polled.load(Ordering::Relaxed);
        if seq == lane.posted.load(Ordering::Acquire) {
            return None;
        }
        let flush = self.state() == QpState::Err;
        let deserted = flush && self.deserted.load(Ordering::Acquire);
        let mine = lane.slot(seq);
        let mut wc = Wc { wr_id: mine.wr_id.load(Ordering::Relaxed), qp_num: self.qpn(), ..Wc::default() };
        let Some(mut taken) = lane.ring().take(seq, flush, deserted) else {
            if self.kind == QpType::Ud {
                lane.ring().look_back(seq, &self.shared[0].head);
            }
            return None;
        };
        if matches!(&taken, Taken::Done(said, _) if said.flags & Completion::LOST != 0) {
            self.post_anew(seq);
            taken = if flush { lane.ring().take(seq, true, true)? } else { return None };
        }
        match taken {
            Taken::Flushed => {
                wc.status = WcStatus::WrFlushErr as u32;
                wc.opcode = WcOpcode::Recv as u32;
            }
            Taken::Done(said, payload) => {
                mine.receive(&said, &payload, table, &mut wc);
            }
        }
        lane.polled.store(seq.wrapping_add(1), Ordering::Release);
        self.arrived(&mut wc);
        Some(wc)
    }

    /// What a receive completion means for the QP.
    pub(super) fn arrived(&self, wc: &mut Wc) {
        if wc.wc_flags & wc_flags::GRH != 0 && wc.status == 0 {
            // A datagram. Of its many senders none may write the counter, which has one writer.
            let payload = u64::from(wc.byte_len).saturating_sub(limits::GRH.into());
            QpShared::count(&self.shared[0].rx_bytes, payload);
        }
        if wc.wc_flags & wc_flags::WITH_INV != 0 {
            self.invalidate(wc);
        }
        if self.state() == QpState::Rtr && !self.established.swap(true, Ordering::Relaxed) {
            self.qp.upgrade().inspect(|qp| qp.established());
        }
        if wc.status != 0 && wc.status != WcStatus::WrFlushErr as u32 {
            let _ = self.qp.upgrade().is_some_and(|qp| qp.enter_error());
        }
    }

    /// The message ends one of our keys: here, before the program hears of it.
    #[cold]
    fn invalidate(&self, wc: &mut Wc) {
        let done = || self.qp.upgrade().is_some_and(|qp| qp.context().windows.invalidated(&qp, wc.imm_data));
        if wc.status == 0 && !done() {
            wc.status = WcStatus::BadRespErr as u32;
        }
    }
}

impl PrivateRecv {
    pub(super) fn set(&self, wr_id: u64, sges: &[Sge]) {
        self.wr_id.store(wr_id, Ordering::Relaxed);
        self.count.store(sges.len() as u32, Ordering::Relaxed);
        for (words, sge) in self.sges.iter().zip(sges) {
            words[0].store(sge.addr, Ordering::Relaxed);
            words[1].store(u64::from(sge.length) | u64::from(sge.lkey) << 32, Ordering::Relaxed);
        }
    }

    pub(super) fn get(&self) -> (u64, ArrayVec<Sge, MAX_SGE>) {
        (self.wr_id.load(Ordering::Relaxed), self.sges().collect())
    }

    /// Makes the completion of a receive that a peer says it filled; what is inline is copied to its place.
    pub(super) fn receive(
        &self,
        said: &Completion,
        payload: &SlotPayload<'_>,
        table: &LocalTable<'_>,
        wc: &mut Wc,
    ) {
        wc.wr_id = self.wr_id.load(Ordering::Relaxed);
        self.judge(said, wc);
        if wc.status == 0 && said.flags & Completion::INLINE != 0 {
            self.scatter(&payload.read()[..wc.byte_len as usize], table, wc);
        }
    }

    fn sges(&self) -> impl Iterator<Item = Sge> + '_ {
        self.sges.iter().take(self.count.load(Ordering::Relaxed) as usize).map(|words| {
            let len_lkey = words[1].load(Ordering::Relaxed);
            Sge {
                addr: words[0].load(Ordering::Relaxed),
                length: len_lkey as u32,
                lkey: (len_lkey >> 32) as u32,
            }
        })
    }

    /// Turns what the peer said into a completion the program may rely on: no unknown number, no length beyond the
    /// buffers it was given.
    fn judge(&self, said: &Completion, wc: &mut Wc) {
        let write = said.opcode == WcOpcode::RecvRdmaWithImm as u8;
        let inline = said.flags & Completion::INLINE != 0;
        let room: u64 = self.sges().map(|sge| u64::from(sge.length)).sum();
        let fits = u64::from(said.byte_len) <= if inline { room.min(INLINE_BYTES as u64) } else { room };
        let status = WcStatus::try_from(u32::from(said.status)).unwrap_or(WcStatus::GeneralErr);
        // An inline payload is copied by that length, whatever the opcode.
        let sane = fits || (write && !inline) || status != WcStatus::Success;
        wc.status = if sane { status } else { WcStatus::BadRespErr } as u32;
        wc.opcode = if write { WcOpcode::RecvRdmaWithImm } else { WcOpcode::Recv } as u32;
        wc.byte_len = said.byte_len;
        wc.imm_data = said.imm;
        wc.src_qp = said.src_qp;
        wc.wc_flags = u32::from(said.flags) & (wc_flags::WITH_IMM | wc_flags::GRH | wc_flags::WITH_INV);
        wc.sl = match (wc.wc_flags & wc_flags::GRH != 0, said.flags & Completion::IPV4 != 0) {
            (false, _) => 0,
            (true, true) => wc_sl::IPV4,
            (true, false) => wc_sl::IPV6,
        };
    }

    /// Copies an inline payload into the receive's buffers, whose keys must still hold.
    fn scatter(&self, payload: &[u8], table: &LocalTable<'_>, wc: &mut Wc) {
        let mut rest = payload;
        for sge in self.sges() {
            if rest.is_empty() {
                return;
            }
            let Some(va) = table.check(&sge, Access::LOCAL_WRITE) else {
                wc.status = WcStatus::LocProtErr as u32;
                return;
            };
            let (now, later) = rest.split_at(rest.len().min(sge.length as usize));
            // SAFETY: `now` outlives the copy, which only reads it.
            let from = unsafe { SharedBytes::new(now.as_ptr().cast_mut(), now.len()) };
            // SAFETY: the lkey was just checked for LOCAL_WRITE over the whole entry, which is at least as long.
            unsafe { copy_out(LocalBytes { addr: va, len: now.len() }, from) };
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::{Mapping, make_memfd};

    const DEPTH: usize = 4;

    fn lanes() -> Arc<Lanes> {
        let fd = make_memfd("lanes", 8192).expect("memfd");
        let map = Arc::new(Mapping::new(fd, 0, 8192, true).expect("mapping"));
        let shared = View::new(Arc::clone(&map), 0, 1).expect("header");
        let recv = RecvLane::new(View::new(map, 4096, DEPTH).expect("slots"), None).expect("receives");
        let send = SendLane::new(4, None).expect("results");
        let lanes = Lanes::new(QpType::Rc, shared, send, recv, None, Weak::new());
        lanes.set_state(QpState::Rts);
        lanes
    }

    fn poll(lanes: &Lanes) -> Option<Wc> {
        lanes.poll_recv(&LocalTable::new(&[], 0))
    }

    #[test]
    fn nonsense_in_a_completion_is_an_error_at_most() {
        let lanes = lanes();
        let head = &lanes.shared[0].head;
        let words = [0u8, 1, 5, 0x7f, 0x80, 0x81, 0xc1, 0xff];
        for i in 0..words.len().pow(3) {
            let (opcode, flags, status) = (words[i / 64], words[i / 8 % 8], words[i % 8]);
            let buffer = Sge { addr: 0, length: 64, lkey: 1 };
            assert!(lanes.recv.post(i as u64, &[buffer], DEPTH as u32));
            let claim = lanes.recv.ring().claim(head, 1).expect("posted");
            let byte_len = u32::MAX - i as u32;
            claim.complete(&Completion { status, opcode, flags, byte_len, ..Completion::default() }, true);
            let wc = loop {
                if let Some(wc) = poll(&lanes) {
                    break wc;
                }
                // said to be lost: posted anew
                let claim = lanes.recv.ring().claim(head, 1).expect("posted anew");
                claim.complete(&Completion { status: 1, ..Completion::default() }, true);
            };
            assert_eq!(wc.wr_id, i as u64);
            assert!(wc.status != 0 || wc.opcode == WcOpcode::RecvRdmaWithImm as u32, "{wc:?}");
        }
    }

    #[test]
    fn the_bytes_of_a_datagram_count_when_it_is_polled() {
        let lanes = lanes();
        for flags in [wc_flags::GRH as u8, 0] {
            assert!(lanes.recv.post(1, &[Sge { addr: 0, length: 64, lkey: 1 }], DEPTH as u32));
            let claim = lanes.recv.ring().claim(&lanes.shared[0].head, 1).expect("posted");
            claim.complete(&Completion { flags, byte_len: 60, ..Completion::default() }, true);
            assert_eq!(poll(&lanes).map(|wc| (wc.status, wc.byte_len)), Some((0, 60)));
        }
        assert_eq!(
            lanes.shared[0].rx_bytes.load(Ordering::Relaxed),
            20,
            "without its header; others' senders count"
        );
    }

    #[test]
    fn a_failed_queue_is_not_brought_back() {
        let lanes = lanes();
        lanes.set_state(QpState::Err);
        assert!(!lanes.change_state(QpState::Rts, |now| now == QpState::Rtr));
        assert_eq!(lanes.state(), QpState::Err);
        assert_eq!(lanes.shared[0].state.load(Ordering::Relaxed), QpState::Err as u32);
    }
}
