//! Queue pairs: creation, state, errors. Sending and receiving are in `send` and `recv`, transitions in `modify`.
//!
//! Lock order: a QP's attributes, then a CQ's lock, then a QP's send lock. The list of stalled queues is never taken with either held.

mod link;
mod modify;
mod queue;
mod recv;
mod route;
mod send;

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

pub(super) use send::Patience;
pub use send::SendWr;

use crate::ctl::{CreateQp, DestroyQp};
use crate::error::{Error, Result};
use crate::exec::Target;
use crate::ring::{QpShared, RecvSlot};
use crate::shm::{Lender, View};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use crate::verbs::{Gid, QpAttr, QpCaps, QpState, QpType, limits};

use super::context::Context;
use super::cq::Cq;
use super::events::{AsyncEvent, AsyncKind};
use super::lanes::{Lanes, RecvLane, SendLane};
use super::lock::Lock;
use super::pd::Pd;
use super::peers::PeerQp;
use super::slab::{Block, BlockKind};
use super::tickets::{Source, Tickets};
use queue::Queue;
use send::SendSide;

/// What a QP is made of; ibv_create_qp(3).
#[derive(Debug, Clone)]
pub struct QpInit {
    pub kind: QpType,
    pub send_cq: Arc<Cq>,
    pub recv_cq: Arc<Cq>,
    pub caps: QpCaps,
    pub sq_sig_all: bool,
    /// Its receives come from there: a shared receive queue, or of XRC's target its domain.
    pub receives: Option<Source>,
    /// Comes back with asynchronous events.
    pub cookie: u64,
}

/// How often one who waits for a copy looks before it sleeps between looks, and how long it sleeps.
const YIELDS: u32 = 1000;
const NAP: Duration = Duration::from_micros(100);

/// A queue pair.
#[derive(Debug)]
pub struct Qp {
    pd: Arc<Pd>,
    lanes: Arc<Lanes>,
    send_cq: Arc<Cq>,
    recv_cq: Arc<Cq>,
    send_bit: u32,
    recv_bit: u32,
    caps: QpCaps,
    sq_sig_all: bool,
    cookie: AtomicU64,
    block: Block,
    attr: Mutex<QpAttr>,
    send: Lock<SendSide>,
    recv: Lock<()>,
    /// A send failed and took the QP to ERR: the program has a completion, but no event.
    send_failed: AtomicBool,
    /// The peer's copy was given up on; counted in the PD.
    late_copy: AtomicBool,
    /// The router may know more about the peer than it did.
    ask_again: AtomicBool,
    closed: AtomicBool,
}

fn check_caps(init: &QpInit, context: &Context) -> Result<()> {
    let limit = context.limits();
    let caps = &init.caps;
    let within = caps.max_send_wr <= limit.max_qp_wr
        && caps.max_recv_wr <= limit.max_qp_wr
        && caps.max_send_sge <= limits::SGE
        && caps.max_recv_sge <= limits::SGE
        && caps.max_inline_data <= limits::INLINE;
    let same = Arc::ptr_eq(&init.send_cq.context, &init.recv_cq.context)
        && std::ptr::eq(&*init.send_cq.context, context);
    match (within, same, init.kind) {
        (false, ..) => Err(Error::Invalid("a capability is beyond the device's limit (ibv_query_device)")),
        (_, false, _) => Err(Error::Invalid("PD and CQs belong to different contexts")),
        (.., kind) => check_source(kind, init.receives.as_ref()),
    }
}

/// XRC's target has a domain, its initiator nothing, all others may have a shared receive queue.
fn check_source(kind: QpType, source: Option<&Source>) -> Result<()> {
    match (kind, source) {
        (QpType::XrcRecv, Some(Source::Domain(_))) | (QpType::XrcSend, None) => Ok(()),
        (QpType::Rc | QpType::Uc | QpType::Ud, None | Some(Source::Queue(_))) => Ok(()),
        _ => Err(Error::Invalid("this type of queue pair receives from elsewhere (ibv_create_qp_ex)")),
    }
}

/// How many slots a receive queue gets: twice what the program asked for if that costs little, so that a receive is posted
/// into a slot whose cache line can be fetched before it is needed, and not into the one its sender has just let go.
pub(super) fn receive_slots(max_recv_wr: u32, limit: u32) -> u32 {
    const CHEAP: u32 = 512 * 1024 / size_of::<RecvSlot>() as u32;
    let least = if max_recv_wr == 0 { 0 } else { max_recv_wr.next_power_of_two() };
    if least * 2 <= CHEAP.min(limit.next_power_of_two()) { least * 2 } else { least }
}

impl Pd {
    /// ibv_create_qp(3).
    pub fn create_qp(self: &Arc<Self>, init: QpInit) -> Result<Arc<Qp>> {
        self.create_qp_in(init, None)
    }

    /// The same, with its private memory from `lender`.
    pub fn create_qp_in(self: &Arc<Self>, init: QpInit, lender: Option<&Arc<dyn Lender>>) -> Result<Arc<Qp>> {
        let context = &self.context;
        check_caps(&init, context)?;
        let depth = match &init.receives {
            Some(source) => Tickets::depth(source),
            None => receive_slots(init.caps.max_recv_wr, context.limits().max_qp_wr),
        };
        let header = size_of::<QpShared>() as u64;
        let len = header + u64::from(depth) * size_of::<RecvSlot>() as u64;
        let block = context.slabs.allocate(&context.conn, BlockKind::Qp, len)?;
        let made = self.build(&init, &block, depth, header, lender);
        if made.is_err() {
            context.slabs.free(block);
        }
        made
    }

    fn build(
        self: &Arc<Self>,
        init: &QpInit,
        block: &Block,
        depth: u32,
        header: u64,
        lender: Option<&Arc<dyn Lender>>,
    ) -> Result<Arc<Qp>> {
        let context = &self.context;
        let no_room = || Error::NoRoom("queue memory");
        let shared = View::<QpShared>::new(Arc::clone(&block.map), block.offset, 1).ok_or_else(no_room)?;
        let slots = View::<RecvSlot>::new(Arc::clone(&block.map), block.offset + header, depth as usize);
        let slots = slots.ok_or_else(no_room)?;
        let tickets = init.receives.clone().map(Tickets::new);
        let recv = match &tickets {
            Some(_) => RecvLane::tickets(slots),
            None => RecvLane::new(slots, lender)?,
        };
        recv.reset(&shared[0]);
        shared[0].reset();
        let send = SendLane::new(init.caps.max_send_wr.max(1).next_power_of_two(), lender)?;
        let queue = Queue::new(&init.caps, lender)?;
        let one_cq = Arc::ptr_eq(&init.send_cq, &init.recv_cq);
        let mut refused = None;
        let qp = Arc::new_cyclic(|weak: &Weak<Qp>| {
            let lanes = Lanes::new(init.kind, shared, send, recv, tickets, Weak::clone(weak));
            lanes.tickets.as_ref().inspect(|tickets| tickets.reset(&lanes));
            let recv_bit = init.recv_cq.attach(&lanes, self.id, one_cq, true);
            let send_bit = if one_cq { recv_bit } else { init.send_cq.attach(&lanes, self.id, true, false) };
            let request = CreateQp {
                pd: self.id,
                send_cq: init.send_cq.id,
                recv_cq: init.recv_cq.id,
                kind: init.kind as u32,
                slab: block.slab,
                qp_off: block.offset as u32,
                rq_off: (block.offset + header) as u32,
                rq_depth: depth,
                rq_sge: init.caps.max_recv_sge,
                cq_bit: recv_bit,
                srq: srq_of(init),
                xrcd: domain_of(init),
            };
            match context.conn.ask(&request) {
                Ok(reply) => lanes.name(reply.id),
                Err(error) => refused = Some(error),
            }
            Qp {
                pd: Arc::clone(self),
                send: Lock::new(SendSide::new(queue)),
                lanes,
                send_cq: Arc::clone(&init.send_cq),
                recv_cq: Arc::clone(&init.recv_cq),
                send_bit,
                recv_bit,
                caps: init.caps,
                sq_sig_all: init.sq_sig_all,
                cookie: AtomicU64::new(init.cookie),
                block: block.clone(),
                attr: Mutex::default(),
                recv: Lock::default(),
                send_failed: AtomicBool::new(false),
                late_copy: AtomicBool::new(false),
                ask_again: AtomicBool::new(true),
                closed: AtomicBool::new(false),
            }
        });
        match refused {
            Some(error) => Err(error), // dropping the QP detaches it; it has no number to destroy
            None => {
                let mut qps = context.qps.lock().unwrap_or_else(PoisonError::into_inner);
                qps.insert(qp.qpn(), Arc::downgrade(&qp));
                match &init.receives {
                    Some(Source::Queue(srq)) => srq.add_user(&qp),
                    Some(Source::Domain(domain)) => domain.add_target(&qp.lanes),
                    None => {}
                }
                Ok(Arc::clone(&qp))
            }
        }
    }
}

fn srq_of(init: &QpInit) -> u32 {
    if let Some(Source::Queue(srq)) = &init.receives { srq.number() } else { 0 }
}

fn domain_of(init: &QpInit) -> u32 {
    if let Some(Source::Domain(domain)) = &init.receives { domain.id() } else { 0 }
}

impl Qp {
    pub fn qpn(&self) -> u32 {
        self.lanes.qpn()
    }

    pub fn kind(&self) -> QpType {
        self.lanes.kind
    }

    pub fn caps(&self) -> QpCaps {
        self.caps
    }

    pub fn state(&self) -> QpState {
        self.lanes.state()
    }

    /// ibv_query_qp(3).
    pub fn query(&self) -> QpAttr {
        let state = self.state();
        let attr = self.attr.lock().unwrap_or_else(PoisonError::into_inner);
        QpAttr { qp_state: state, cur_qp_state: state, ..*attr }
    }

    /// May a peer have this QP's requests or receives touch memory of PD `pd`?
    pub(super) fn touches(&self, pd: u32) -> bool {
        let received = match self.lanes.tickets.as_ref().map(|tickets| &tickets.source) {
            None => false,
            Some(Source::Queue(srq)) => srq.pd_id() == pd,
            Some(Source::Domain(_)) => true,
        };
        self.pd.id == pd || received
    }

    /// The peer it is connected to.
    pub(super) fn destination(&self) -> Option<(Gid, u32)> {
        self.send.lock().route.dest
    }

    pub(super) fn pd_id(&self) -> u32 {
        self.pd.id
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    pub(super) fn shared_header(&self) -> &QpShared {
        &self.lanes.shared[0]
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.pd.context
    }

    /// Runs `look` on the peer of a connected QP, if it is there and on this host.
    pub(super) fn with_peer<R>(&self, look: impl FnOnce(&PeerQp) -> R) -> Option<R> {
        let mut side = self.send.lock();
        if side.is_link() {
            return None;
        }
        if !side.route.knows(&Target::Receive) {
            self.look_for_peer(&mut side.route, &Target::Receive);
        }
        side.route.find(&Target::Receive).map(|path| look(&path.peer))
    }

    /// Waits until no request is being run.
    pub(super) fn settle(&self) {
        drop(self.send.lock());
    }

    /// Moves to ERR: everything queued is flushed, sleepers are woken. False: it was there, or is reset.
    pub(super) fn enter_error(self: &Arc<Self>) -> bool {
        let lives = |now| !matches!(now, QpState::Err | QpState::Reset);
        if !self.lanes.change_state(QpState::Err, lives) {
            return false;
        }
        self.progress(false);
        let dest = self.send.lock().route.dest;
        self.stop_receiving(dest);
        true
    }

    /// In ERR: when the copy that may be running has ended nobody fills a receive any more, and all of them flush.
    fn stop_receiving(&self, dest: Option<(Gid, u32)>) {
        if self.kind() != QpType::Ud {
            // A peer that does not end its copy in time gets no more of it than at deregistration.
            self.quiesce_briefly();
            self.lanes.deserted.store(true, Ordering::Release);
        }
        self.recv_cq.completed(self.recv_bit, true);
        if self.lanes.shared[0].receive_posted() {
            self.tell_sender(dest); // it waits for a receive that does not come
        }
        if self.lanes.tickets.is_some() && self.kind() != QpType::Ud {
            self.push(AsyncKind::QpLastWqe);
        }
    }

    /// Moves to ERR for a reason the program hears of by an asynchronous event.
    pub(super) fn fail(self: &Arc<Self>, kind: AsyncKind) {
        if !self.state().receives() || !self.enter_error() {
            return;
        }
        self.push(kind);
        if self.closed.load(Ordering::Acquire) {
            self.context().events.withdraw(self.cookie()); // destroyed meanwhile: the cookie may be another QP's soon
        }
    }

    fn cookie(&self) -> u64 {
        self.cookie.load(Ordering::Relaxed)
    }

    fn push(&self, kind: AsyncKind) {
        self.context().events.push(AsyncEvent { kind, cookie: self.cookie() });
    }

    /// Asynchronous events come with this cookie from now on; those that wait with the former one are gone, as its owner is.
    pub fn tell(&self, cookie: u64) {
        let before = self.cookie.swap(cookie, Ordering::Relaxed);
        if before != cookie {
            self.context().events.withdraw(before);
        }
    }

    /// The first message came before the program moved to RTS: IBV_EVENT_COMM_EST, told when it is polled.
    pub(super) fn established(&self) {
        self.push(AsyncKind::CommEst);
    }

    /// The peer's process died. A request that failed of it (the router found no memory to copy to) may have been faster
    /// than the news.
    pub(super) fn orphan(self: &Arc<Self>) {
        self.lanes.shared[0].end_copy();
        self.lanes.deserted.store(true, Ordering::Release);
        if self.late_copy.swap(false, Ordering::AcqRel) {
            self.pd.late_copy_ended();
        }
        self.forget_peer();
        self.fail(AsyncKind::QpFatal);
        self.recv_cq.ring_again();
        if self.send_failed.swap(false, Ordering::AcqRel) && !self.closed.load(Ordering::Acquire) {
            self.push(AsyncKind::QpFatal);
        }
    }

    /// The router says the peer can be found now.
    pub(super) fn peer_changed(self: &Arc<Self>) {
        self.ask_again.store(true, Ordering::Release);
        self.progress(true);
    }

    /// The peer was reset or destroyed: what is mapped of it means nothing any more.
    pub(super) fn forget_peer(&self) {
        self.send.lock().route.forget();
        self.ask_again.store(true, Ordering::Release);
    }

    /// Waits until no peer is copying under a key that was valid before the call. False: it did not end in time.
    pub(super) fn quiesce(&self, deadline: Instant) -> bool {
        let shared = &self.lanes.shared[0];
        let (mut since, mut yields) = (None, 0);
        loop {
            let quiet = match self.kind() {
                QpType::Ud => !self.lanes.recv.ring().any_claimed(),
                _ => match shared.quiesced(since) {
                    Ok(()) => true,
                    Err(word) => {
                        since = Some(word);
                        false
                    }
                },
            };
            if quiet || self.lanes.deserted.load(Ordering::Relaxed) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            // The copier is in the middle of a bounded memcpy and will not tell: there is no event to wait for. One that
            // is not through with it after so many looks does not run, and others need this processor.
            if yields < YIELDS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(NAP);
            }
            yields += 1;
        }
    }
}

impl Qp {
    /// Before the queues are of no use to peers: waits for copies that began before. Not for long: the helper may be the one
    /// that waits, and it is to hear of a copier's death within a second.
    fn quiesce_briefly(&self) {
        if !self.quiesce(Instant::now() + Duration::from_millis(100)) {
            self.expect_late_copy();
        }
    }

    /// The peer's copy was given up on.
    pub(super) fn expect_late_copy(&self) {
        if !self.late_copy.swap(true, Ordering::AcqRel) {
            self.pd.expect_late_copy();
        }
    }

    /// ibv_destroy_qp(3): when it returns, nothing of the QP's is used any more, whoever else still holds it (the
    /// helper thread does for moments).
    pub fn close(&self) {
        if self.context().conn.is_inherited() || self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let context = self.context();
        self.lanes.set_state(QpState::Reset);
        self.lanes.shared[0].qpn.store(0, Ordering::SeqCst);
        self.send_cq.detach(&self.lanes);
        self.recv_cq.detach(&self.lanes);
        if let Some(Source::Domain(domain)) = self.lanes.tickets.as_ref().map(|tickets| &tickets.source) {
            domain.remove_target(&self.lanes);
        }
        if self.qpn() == 0 {
            return; // the router refused it; Pd::create_qp frees the block
        }
        context.qps.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.qpn());
        let _ = context.conn.ask(&DestroyQp { qpn: self.qpn() });
        context.windows.forsake(context, self.qpn());
        // Late senders notice by the header, and the block is only reused for a QP: nothing else can be hit.
        self.quiesce_briefly();
        self.give_receives_back();
        // Whoever runs a request holds the lock; with it in hand none runs, and none will.
        let mut side = self.send.lock();
        self.give_up(&mut side);
        side.reset();
        let link = side.link.take();
        drop(side);
        if let Some(link) = link {
            link.free(context);
        }
        context.events.withdraw(self.cookie());
        context.slabs.free(self.block.clone());
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        self.close();
    }
}
