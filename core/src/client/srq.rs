//! Shared receive queues, and XRC domains: what the receives of many QPs are taken from.
//!
//! Posting is here; completions come by the tickets of each QP ([`super::tickets`]). Lock order: a CQ's lock or an XRC
//! domain's, then the posting lock.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::io::Errno;

use crate::ctl::{CreateSrq, DestroySrq};
use crate::error::{Error, Result};
use crate::exec::LocalTable;
use crate::ring::{RecvSlot, RqShared, SrqRing, SrqShared};
use crate::shm::{Array, Lender, Purpose, View, prefetch_for_write};
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::verbs::{QpCaps, QpType, Sge, Wc, limits};

use super::cq::Cq;
use super::events::{AsyncEvent, AsyncKind};
use super::lanes::{Lanes, PrivateRecv};
use super::lock::Lock;
use super::pd::Pd;
use super::qp::{Qp, QpInit, receive_slots};
use super::slab::{Block, BlockKind};
use super::tickets::Source;

/// What a shared receive queue is made of; ibv_create_srq_ex(3).
#[derive(Debug, Clone)]
pub struct SrqInit {
    pub max_wr: u32,
    pub max_sge: u32,
    pub limit: u32,
    /// Comes back with asynchronous events.
    pub cookie: u64,
    /// XRC: the domain, and where receives complete.
    pub xrc: Option<(Arc<Xrcd>, Arc<Cq>)>,
}

/// A shared receive queue.
#[derive(Debug)]
pub struct Srq {
    pd: Arc<Pd>,
    number: u32,
    max_wr: u32,
    max_sge: u32,
    cookie: u64,
    block: Block,
    shared: View<SrqShared>,
    slots: View<RecvSlot>,
    /// What its owner remembers of the receive in each slot; `busy` from post until its completion is polled.
    private: Array<PrivateRecv>,
    busy: Array<AtomicBool>,
    /// Receives posted, written under the posting lock, and those of them that were polled.
    posted: AtomicU32,
    freed: AtomicU32,
    /// Number of the next receive.
    posting: Lock<u32>,
    /// The program waits for IBV_EVENT_SRQ_LIMIT_REACHED.
    armed: AtomicBool,
    users: Mutex<Vec<Weak<Qp>>>,
    xrc: Option<(Arc<Xrcd>, Arc<Cq>)>,
}

impl Pd {
    /// ibv_create_srq(3), ibv_create_srq_ex(3).
    pub fn create_srq(self: &Arc<Self>, init: SrqInit) -> Result<Arc<Srq>> {
        self.create_srq_in(init, None)
    }

    /// The same, with its private memory from `lender`.
    pub fn create_srq_in(
        self: &Arc<Self>,
        init: SrqInit,
        lender: Option<&Arc<dyn Lender>>,
    ) -> Result<Arc<Srq>> {
        let context = self.context();
        let limit = context.limits().max_qp_wr;
        if init.max_wr == 0 || init.max_wr > limit || init.max_sge > limits::SGE || init.limit > init.max_wr {
            return Err(Error::Invalid("an attribute is beyond the device's limit (ibv_query_device)"));
        }
        let depth = receive_slots(init.max_wr, limit);
        let header = size_of::<SrqShared>().next_multiple_of(align_of::<RecvSlot>()) as u64;
        let len = header + u64::from(depth) * size_of::<RecvSlot>() as u64;
        let block = context.slabs.allocate(&context.conn, BlockKind::Srq, len)?;
        let made = self.build_srq(&init, &block, depth, header, lender);
        if made.is_err() {
            context.slabs.free(block);
        }
        made
    }

    fn build_srq(
        self: &Arc<Self>,
        init: &SrqInit,
        block: &Block,
        depth: u32,
        header: u64,
        lender: Option<&Arc<dyn Lender>>,
    ) -> Result<Arc<Srq>> {
        let context = self.context();
        let no_room = || Error::NoRoom("queue memory");
        let shared = View::<SrqShared>::new(Arc::clone(&block.map), block.offset, 1).ok_or_else(no_room)?;
        let slots = View::<RecvSlot>::new(Arc::clone(&block.map), block.offset + header, depth as usize);
        let slots = slots.ok_or_else(no_room)?;
        let private = Array::new(depth as usize, lender, Purpose::SharedReceiveQueue)?;
        let busy = Array::new(depth as usize, lender, Purpose::SharedReceiveQueue)?;
        shared[0].reset();
        RqShared::new(&slots).clear();
        let mut request = CreateSrq {
            pd: self.id,
            slab: block.slab,
            off: block.offset as u32,
            slots: (block.offset + header) as u32,
            depth,
            ..CreateSrq::default()
        };
        let queue = init.xrc.as_ref().map(|(domain, _)| domain.queue());
        let xrc = init.xrc.as_ref().zip(queue.as_ref());
        if let Some(((domain, cq), queue)) = xrc {
            (request.xrcd, request.cq) = (domain.id, cq.id);
            request.cq_bit = cq.attach_queue(queue);
        }
        let number = match context.conn.ask(&request) {
            Ok(reply) => reply.id,
            Err(error) => {
                if let Some(((_, cq), queue)) = xrc {
                    cq.detach_queue(queue);
                }
                return Err(error);
            }
        };
        let srq = Arc::new(Srq {
            pd: Arc::clone(self),
            number,
            max_wr: init.max_wr,
            max_sge: init.max_sge,
            cookie: init.cookie,
            block: block.clone(),
            shared,
            slots,
            private,
            busy,
            posted: AtomicU32::new(0),
            freed: AtomicU32::new(0),
            posting: Lock::default(),
            armed: AtomicBool::new(false),
            users: Mutex::default(),
            xrc: init.xrc.clone(),
        });
        if let Some(((domain, _), queue)) = xrc {
            domain.lock().queues.insert(number, (Arc::downgrade(&srq), Arc::clone(queue)));
        }
        context.srqs.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::downgrade(&srq));
        srq.arm(init.limit)?;
        Ok(srq)
    }
}

impl Srq {
    /// ibv_get_srq_num(3).
    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn max_wr(&self) -> u32 {
        self.max_wr
    }

    pub fn max_sge(&self) -> u32 {
        self.max_sge
    }

    /// The limit that is armed; 0 once it was reached.
    pub fn limit(&self) -> u32 {
        self.shared[0].limit()
    }

    pub(super) fn depth(&self) -> u32 {
        self.private.len() as u32
    }

    pub(super) fn pd_id(&self) -> u32 {
        self.pd.id
    }

    fn ring(&self) -> SrqRing<'_> {
        SrqRing { header: &self.shared[0], slots: RqShared::new(&self.slots) }
    }

    pub(super) fn table(&self) -> LocalTable<'_> {
        LocalTable::new(&self.pd.context().mrs, self.pd.id)
    }

    pub(super) fn add_user(&self, qp: &Arc<Qp>) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|user| user.strong_count() > 0);
        users.push(Arc::downgrade(qp));
    }

    /// ibv_modify_srq(3) with IBV_SRQ_LIMIT: tell once when fewer than `limit` receives wait.
    pub fn arm(&self, limit: u32) -> Result<()> {
        if limit > self.max_wr {
            return Err(Error::Invalid("srq_limit is beyond max_wr"));
        }
        self.armed.store(limit != 0, Ordering::Release);
        self.shared[0].set_limit(limit);
        if self.shared[0].below() {
            self.limit_reached();
        }
        Ok(())
    }

    /// A taker saw it, or the owner itself.
    pub(super) fn limit_reached(&self) {
        if self.limit() == 0 && self.armed.swap(false, Ordering::AcqRel) {
            let event = AsyncEvent { kind: AsyncKind::SrqLimit, cookie: self.cookie };
            self.pd.context().events.push(event);
        }
    }

    /// ibv_post_srq_recv(3), one request.
    pub fn post(&self, wr_id: u64, sges: &[Sge]) -> std::result::Result<(), Errno> {
        if sges.len() > self.max_sge as usize {
            return Err(Errno::INVAL);
        }
        let mut next = self.posting.lock();
        let posted = self.posted.load(Ordering::Relaxed);
        if posted.wrapping_sub(self.freed.load(Ordering::Acquire)) >= self.max_wr {
            return Err(Errno::NOMEM);
        }
        self.posted.store(posted.wrapping_add(1), Ordering::Relaxed);
        self.place(&mut next, wr_id, sges);
        drop(next);
        if self.shared[0].receive_posted() {
            self.tell_senders();
        }
        Ok(())
    }

    /// Puts a receive into the next free slot: there is one, as there are as many as receives may wait.
    fn place(&self, next: &mut u32, wr_id: u64, sges: &[Sge]) {
        let mask = self.depth() - 1;
        // Acquire: partner is free()'s release store; what was read of the slot came before.
        while self.busy[(*next & mask) as usize].load(Ordering::Acquire) {
            *next = next.wrapping_add(1);
        }
        let slot = (*next & mask) as usize;
        self.busy[slot].store(true, Ordering::Relaxed);
        self.private[slot].set(wr_id, sges);
        self.ring().post(*next, sges);
        *next = next.wrapping_add(1);
        // The next one's slot is free as a rule, and in the cache of whoever took it last.
        self.ring().slots.state_word(*next).inspect(|word| prefetch_for_write(*word));
    }

    /// Sends of peers wait, each in its own queue, and have left word at their QPs.
    #[cold]
    fn tell_senders(&self) {
        let users: Vec<Arc<Qp>> = {
            let users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            users.iter().filter_map(Weak::upgrade).collect()
        };
        users.iter().for_each(|qp| qp.tell_waiting_sender());
    }

    /// The receive in slot `index`, if `taker` (None: anybody) has it.
    pub(super) fn taken_by(&self, index: u16, taker: Option<u32>) -> Option<&PrivateRecv> {
        let private = self.private.get(usize::from(index))?;
        let mine = self.busy[usize::from(index)].load(Ordering::Acquire);
        let state = self.ring().taker(index.into()).filter(|_| mine)?;
        taker.is_none_or(|taker| taker == state.owner).then_some(private)
    }

    /// The completion of the receive in slot `index` was polled.
    pub(super) fn free(&self, index: u16) {
        // Release: partner is place()'s acquire load.
        self.busy[usize::from(index)].store(false, Ordering::Release);
        self.freed.fetch_add(1, Ordering::Release);
    }

    /// The receive in slot `index` was taken and not filled: posts it anew, at the end.
    pub(super) fn post_anew(&self, index: u16) {
        let private = &self.private[usize::from(index)];
        let (wr_id, sges) = private.get();
        let mut next = self.posting.lock();
        self.busy[usize::from(index)].store(false, Ordering::Relaxed);
        self.place(&mut next, wr_id, &sges);
        drop(next);
        if self.shared[0].receive_posted() {
            self.tell_senders();
        }
    }

    /// Nobody sends to QP `qpn` any more: what its dead or cut-off sender had taken is posted anew.
    pub(super) fn reclaim(&self, qpn: u32) {
        for index in 0..self.depth() {
            if self.taken_by(index as u16, Some(qpn)).is_some() {
                self.post_anew(index as u16);
            }
        }
    }

    /// A sender of datagrams, `client`, died about to take receive `seq`.
    pub(super) fn reclaim_one(&self, seq: u32, client: u32) {
        let index = (seq & (self.depth() - 1)) as u16;
        let taken = self.ring().taker(index.into()).is_some_and(|state| state.seq == seq);
        if taken && self.taken_by(index, Some(client)).is_some() {
            self.post_anew(index);
        }
    }
}

impl Drop for Srq {
    fn drop(&mut self) {
        let context = self.pd.context();
        if context.conn.is_inherited() {
            return;
        }
        context.srqs.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
        if let Some((domain, cq)) = &self.xrc {
            let queue = domain.lock().queues.remove(&self.number);
            queue.inspect(|(_, queue)| cq.detach_queue(queue));
        }
        let _ = context.conn.ask(&DestroySrq { srq: self.number });
        context.events.withdraw(self.cookie);
        context.slabs.free(self.block.clone());
    }
}

/// An XRC domain; ibv_open_xrcd(3). It is this process's alone.
#[derive(Debug)]
pub struct Xrcd {
    id: u32,
    /// Verbs asks for neither PD nor CQ for a target; they are where nothing ever completes.
    pd: Arc<Pd>,
    cq: Arc<Cq>,
    inner: Mutex<Domain>,
}

/// The targets and queues of an XRC domain.
#[derive(Debug, Default)]
struct Domain {
    targets: Vec<Arc<Lanes>>,
    queues: HashMap<u32, (Weak<Srq>, Arc<XrcQueue>)>,
}

/// What an XRC shared receive queue's CQ polls: completions come by any of the domain's targets.
#[derive(Debug)]
pub struct XrcQueue {
    domain: Weak<Xrcd>,
    arrived: Mutex<VecDeque<Wc>>,
}

impl super::context::Context {
    /// ibv_open_xrcd(3).
    pub fn open_xrcd(self: &Arc<Self>) -> Result<Arc<Xrcd>> {
        static OPENED: AtomicU32 = AtomicU32::new(1);
        let (pd, cq) = (self.alloc_pd()?, self.create_cq(1, 0, None)?);
        let id = OPENED.fetch_add(1, Ordering::Relaxed).max(1);
        Ok(Arc::new(Xrcd { id, pd, cq, inner: Mutex::default() }))
    }
}

impl Xrcd {
    /// ibv_create_qp_ex(3) of a target: it receives for the shared receive queues of the domain.
    pub fn create_target(self: &Arc<Self>, cookie: u64) -> Result<Arc<Qp>> {
        self.pd.create_qp(QpInit {
            kind: QpType::XrcRecv,
            send_cq: Arc::clone(&self.cq),
            recv_cq: Arc::clone(&self.cq),
            caps: QpCaps::default(),
            sq_sig_all: false,
            receives: Some(Source::Domain(Arc::clone(self))),
            cookie,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Domain> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(self: &Arc<Self>) -> Arc<XrcQueue> {
        Arc::new(XrcQueue { domain: Arc::downgrade(self), arrived: Mutex::default() })
    }

    pub(super) fn add_target(&self, lanes: &Arc<Lanes>) {
        self.lock().targets.push(Arc::clone(lanes));
    }

    pub(super) fn remove_target(&self, lanes: &Arc<Lanes>) {
        self.lock().targets.retain(|target| !Arc::ptr_eq(target, lanes));
    }

    /// Runs `change` while nobody polls the domain's targets.
    pub(super) fn paused<T>(&self, change: impl FnOnce(&[Arc<Srq>]) -> T) -> T {
        let inner = self.lock();
        let queues: Vec<Arc<Srq>> = inner.queues.values().filter_map(|(srq, _)| srq.upgrade()).collect();
        let changed = change(&queues);
        drop(inner);
        drop(queues); // outside of the lock: the last reference takes it
        changed
    }
}

impl XrcQueue {
    /// The next completion of this queue; those of others that come before it go to them.
    pub fn poll(&self) -> Option<Wc> {
        let waits = || self.arrived.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        if let Some(wc) = waits() {
            return Some(wc);
        }
        let domain = self.domain.upgrade()?;
        let inner = domain.lock();
        let queues: Vec<Arc<Srq>> = inner.queues.values().filter_map(|(srq, _)| srq.upgrade()).collect();
        let find = |number: u32| queues.iter().find(|srq| srq.number == number).map(|srq| &**srq);
        for lanes in &inner.targets {
            let Some(tickets) = &lanes.tickets else { continue };
            while let Some((number, wc)) = lanes.poll_tickets(tickets, find) {
                let queue = inner.queues.get(&number).map(|(_, queue)| queue);
                queue.inspect(|queue| {
                    queue.arrived.lock().unwrap_or_else(PoisonError::into_inner).push_back(wc);
                });
            }
        }
        drop(inner);
        drop(queues); // outside of the lock: the last reference takes it
        waits()
    }
}
