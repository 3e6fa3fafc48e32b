//! Completion queues.
//!
//! With few lanes, poll looks at each; with more than [`SCAN_LIMIT`] it asks peers to mark a dirty map and looks only
//! where something happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ctl::{CreateCq, DestroyCq};
use crate::error::{Error, Result};
use crate::exec::LocalTable;
use crate::ring::cq::DIRTY_BITS;
use crate::ring::{CqShared, Ring};
use crate::shm::View;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::verbs::Wc;

use super::channel::Channel;
use super::context::Context;
use super::lanes::Lanes;
use super::lock::Lock;
use super::moderation::Moderation;
use super::qp::Qp;
use super::slab::{Block, BlockKind};
use super::srq::XrcQueue;

/// Lanes up to which polling all of them is cheaper than asking peers to mark.
const SCAN_LIMIT: usize = 8;
/// Looks at queues that are known to be busy, after which marks are taken all the same: others may have something too.
const LOOKS: u32 = 64;
/// Empty polls in a row, some 20 us, after which the processor is offered to others: with more pollers than processors
/// the one that is waited for would otherwise not run before a time slice has passed.
const PATIENCE: u32 = 1024;

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    pub(super) context: Arc<Context>,
    pub(super) id: u32,
    pub(super) shared: View<CqShared>,
    channel: Option<Arc<Channel>>,
    block: Block,
    cookie: u64,
    cqe: AtomicU32,
    /// Sends mark the dirty map too.
    mapped: AtomicBool,
    moderation: Mutex<Moderation>,
    inner: Lock<Inner>,
}

/// What is polled.
#[derive(Debug, Clone)]
enum Polled {
    Qp(Arc<Lanes>),
    /// The receives of an XRC shared receive queue.
    Queue(Arc<XrcQueue>),
}

/// A QP attached here, once or as both of its lanes.
#[derive(Debug, Clone)]
struct Feed {
    polled: Polled,
    pd: u32,
    send: bool,
    recv: bool,
    /// On the ready list.
    listed: bool,
    /// Sends alone filled the last poll: now the receives have the first turn.
    receive_first: bool,
}

impl Feed {
    /// Sends that ended and were not polled.
    fn unpolled(&self) -> u32 {
        match &self.polled {
            Polled::Qp(lanes) if self.send => lanes.send.unpolled(),
            _ => 0,
        }
    }

    /// Are there sends on the way, which will complete without another mark? What a router carries out it also marks.
    fn sends(&self) -> bool {
        matches!(&self.polled, Polled::Qp(lanes) if self.send && lanes.send.outstanding() && !lanes.is_link())
    }

    fn qp(&self) -> Option<Arc<Qp>> {
        match &self.polled {
            Polled::Qp(lanes) => lanes.qp.upgrade(),
            Polled::Queue(_) => None,
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// Indexed by dirty bit while there are no more feeds than bits; holes are reused.
    feeds: Vec<Option<Feed>>,
    count: usize,
    mapped: bool,
    /// Those that are marked, had something when last looked at, or have sends under way.
    ready: VecDeque<usize>,
    /// Looks at queues since marks were taken.
    looks: u32,
    /// Polls since the last completion.
    idle: u32,
    /// Where the next scan starts, so that a busy lane does not starve the others.
    start: usize,
}

impl Context {
    /// ibv_create_cq(3). `cookie` comes back with events.
    pub fn create_cq(
        self: &Arc<Self>,
        cqe: u32,
        cookie: u64,
        channel: Option<Arc<Channel>>,
    ) -> Result<Arc<Cq>> {
        if cqe == 0 || cqe > self.limits().max_cqe {
            return Err(Error::Invalid("cqe must be between 1 and max_cqe"));
        }
        let block = self.slabs.allocate(&self.conn, BlockKind::Cq, size_of::<CqShared>() as u64)?;
        let shared = View::<CqShared>::new(Arc::clone(&block.map), block.offset, 1);
        let shared = shared.ok_or(Error::NoRoom("queue memory"))?;
        shared[0].reset(channel.is_some());
        let id = channel.as_ref().map_or(0, |c| c.id);
        let request = CreateCq { channel: id, slab: block.slab, off: block.offset as u32, _pad: 0 };
        let id = match self.conn.ask(&request) {
            Ok(reply) => reply.id,
            Err(error) => {
                self.slabs.free(block);
                return Err(error);
            }
        };
        let context = Arc::clone(self);
        let cqe = AtomicU32::new(cqe);
        let (mapped, moderation, inner) = (AtomicBool::new(false), Mutex::default(), Lock::default());
        let cq = Arc::new(Cq { context, id, shared, channel, block, cookie, cqe, mapped, moderation, inner });
        if let Some(channel) = &cq.channel {
            channel.attach(Arc::downgrade(&cq));
        }
        Ok(cq)
    }
}

impl Cq {
    /// Capacity promised.
    pub fn cqe(&self) -> u32 {
        self.cqe.load(Ordering::Relaxed)
    }

    /// ibv_resize_cq(3). A CQ holds nothing itself, so this only changes what is promised; fewer entries than sends that wait to
    /// be polled it cannot promise.
    pub fn resize(&self, cqe: u32) -> Result<()> {
        if cqe == 0 || cqe > self.context.limits().max_cqe {
            return Err(Error::Invalid("cqe must be between 1 and max_cqe"));
        }
        let inner = self.inner.lock();
        let waiting: u32 = inner.feeds.iter().flatten().map(Feed::unpolled).sum();
        if waiting > cqe {
            return Err(Error::Invalid("more completions wait than the new size has room for"));
        }
        self.cqe.store(cqe, Ordering::Relaxed);
        Ok(())
    }

    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// ibv_poll_cq(3): fills `out` from the front, returns how many.
    pub fn poll(&self, out: &mut [Wc]) -> usize {
        if self.context.stalled.any() {
            self.context.stalled.poll();
        }
        let mut inner = self.inner.lock();
        let filled = if inner.mapped { self.poll_dirty(&mut inner, out) } else { self.scan(&mut inner, out) };
        inner.idle = if filled == 0 { inner.idle.wrapping_add(1) } else { 0 };
        if inner.idle % PATIENCE == PATIENCE - 1 {
            drop(inner);
            std::thread::yield_now();
        }
        filled
    }

    fn scan(&self, inner: &mut Inner, out: &mut [Wc]) -> usize {
        let feeds = inner.feeds.len();
        let mut filled = 0;
        let mut next = inner.start;
        for _ in 0..feeds {
            let index = if next < feeds { next } else { 0 };
            next = index + 1;
            if let Some(feed) = &mut inner.feeds[index] {
                filled += self.drain(feed, &mut out[filled..]);
            }
            if filled == out.len() {
                inner.start = next;
                break;
            }
        }
        filled
    }

    /// Queues that had something lately have more, as a rule: they are looked at again before marks are taken. Taking one means
    /// that its cache line changes hands twice, which costs more than the message itself; a mark that is there already costs
    /// its maker little.
    fn poll_dirty(&self, inner: &mut Inner, out: &mut [Wc]) -> usize {
        let (mut filled, mut looked_at) = (0, 0);
        if inner.looks < LOOKS {
            filled = self.turn(inner, inner.ready.len(), out);
            if filled == out.len() {
                return filled;
            }
            looked_at = inner.ready.len();
        }
        // Fewer than there is room for means that there are no more: programs rely on that before they sleep.
        self.take_marks(inner);
        inner.ready.rotate_left(looked_at);
        filled + self.turn(inner, inner.ready.len() - looked_at, &mut out[filled..])
    }

    fn take_marks(&self, inner: &mut Inner) {
        let Inner { feeds, ready, looks, .. } = inner;
        *looks = 0;
        self.shared[0].drain_dirty(|bit| {
            for index in (bit as usize..feeds.len()).step_by(DIRTY_BITS as usize) {
                if let Some(feed) = feeds[index].as_mut().filter(|feed| !feed.listed) {
                    feed.listed = true;
                    ready.push_back(index);
                }
            }
        });
    }

    /// One look at each of the first listed queues. One with nothing, and nothing under way, waits for its next mark.
    fn turn(&self, inner: &mut Inner, count: usize, out: &mut [Wc]) -> usize {
        let Inner { feeds, ready, looks, .. } = inner;
        let mut filled = 0;
        for _ in 0..count {
            if filled == out.len() {
                break;
            }
            let Some(index) = ready.pop_front() else { break };
            let Some(feed) = feeds[index].as_mut() else { continue };
            let found = self.drain(feed, &mut out[filled..]);
            *looks += 1;
            filled += found;
            feed.listed = found > 0 || feed.sends();
            if feed.listed {
                ready.push_back(index);
            }
        }
        filled
    }

    fn drain(&self, feed: &mut Feed, out: &mut [Wc]) -> usize {
        let lanes = match &feed.polled {
            Polled::Qp(lanes) => lanes,
            Polled::Queue(queue) => return fill(out, || queue.poll()),
        };
        let table = LocalTable::new(&self.context.mrs, feed.pd);
        let send = |out: &mut [Wc]| if feed.send { lanes.poll_send(out) } else { 0 };
        let receive = |out: &mut [Wc]| if feed.recv { fill(out, || lanes.poll_recv(&table)) } else { 0 };
        if feed.receive_first {
            let received = receive(out);
            feed.receive_first = false;
            return received + send(&mut out[received..]);
        }
        let sent = send(out);
        feed.receive_first = sent == out.len();
        sent + receive(&mut out[sent..])
    }

    /// ibv_req_notify_cq(3).
    pub fn arm(&self, solicited_only: bool) {
        self.shared[0].arm(solicited_only);
    }

    /// ibv_modify_cq(3): `count` completions make an event, or fewer when `period` has passed since the first of them. A count
    /// of 0 and a period of zero are none; without both, and with a count of 1, each completion makes one.
    pub fn moderate(&self, count: u16, period: Duration) -> Result<()> {
        let moderated = count > 1 || (count == 0 && !period.is_zero());
        if let Some(channel) = self.channel.as_ref().filter(|_| moderated) {
            channel.moderate()?;
        }
        *self.moderation() = Moderation { period, until: None };
        self.shared[0].moderate(moderated.then_some(count.into()));
        // What was held back by another rule makes its event now.
        if let (Ring::Bell, Some(channel)) = (self.shared[0].release(), &self.channel) {
            channel.ring();
        }
        Ok(())
    }

    fn moderation(&self) -> std::sync::MutexGuard<'_, Moderation> {
        self.moderation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Helper: ends the wait for more completions if it is time; else returns when it will be.
    pub(super) fn release_held(&self, now: Instant) -> Option<Instant> {
        let mut moderation = self.moderation();
        if !self.shared[0].is_held() {
            moderation.until = None;
            return None;
        }
        let until = moderation.hold(now)?;
        if until > now {
            return Some(until);
        }
        moderation.until = None;
        let _ = self.shared[0].release(); // the caller looks who rang
        None
    }

    pub(super) fn take_rung(&self) -> bool {
        self.shared[0].take_rung()
    }

    pub(super) fn is_rung(&self) -> bool {
        self.shared[0].is_rung()
    }

    /// A completion of this process's own making is visible on the lane with dirty bit `bit`.
    pub(super) fn completed(&self, bit: u32, solicited: bool) {
        let ring = self.shared[0].completed(Some(bit), solicited);
        if let (Ring::Bell, Some(channel)) = (ring, &self.channel) {
            channel.ring();
        }
    }

    /// A peer died: maybe after it had taken the arm word for a ring, and before it rang.
    pub(super) fn ring_again(&self) {
        if let Some(channel) = self.channel.as_ref().filter(|_| self.is_rung() || self.shared[0].is_held()) {
            channel.ring();
        }
    }

    /// A send of the QP with dirty bit `bit` begins, and has been counted; the caller holds its queue's lock, which is all
    /// that orders this with a change of `mapped`. Whoever takes the mark looks at the queue until the send is polled: so
    /// nothing locked comes between its copy and the next one's.
    #[inline]
    pub(super) fn sending(&self, bit: u32) {
        if self.mapped.load(Ordering::Relaxed) {
            self.shared[0].mark(bit);
        }
    }

    /// A send ended. Without a channel nobody sleeps, and the shared header stays untouched.
    #[inline]
    pub(super) fn sent(&self, solicited: bool) {
        if let Some(channel) = &self.channel
            && self.shared[0].completed_here(solicited) == Ring::Bell
        {
            channel.ring();
        }
    }

    /// Attaches a QP's lanes. A QP that has this CQ for both lanes is attached once.
    pub(super) fn attach(&self, lanes: &Arc<Lanes>, pd: u32, send: bool, recv: bool) -> u32 {
        let polled = Polled::Qp(Arc::clone(lanes));
        self.add(Feed { polled, pd, send, recv, listed: false, receive_first: false })
    }

    /// The same for the receives of an XRC shared receive queue.
    pub(super) fn attach_queue(&self, queue: &Arc<XrcQueue>) -> u32 {
        let polled = Polled::Queue(Arc::clone(queue));
        self.add(Feed { polled, pd: 0, send: false, recv: true, listed: false, receive_first: false })
    }

    fn add(&self, feed: Feed) -> u32 {
        let _settled; // dropped after the lock: the last reference to a QP detaches it
        let mut inner = self.inner.lock();
        let index = inner.feeds.iter().position(Option::is_none).unwrap_or_else(|| {
            inner.feeds.push(None);
            inner.feeds.len() - 1
        });
        let bit = index as u32 % DIRTY_BITS;
        inner.feeds[index] = Some(feed);
        inner.count += 1;
        if inner.count > SCAN_LIMIT && !inner.mapped {
            _settled = self.map(&mut inner);
        }
        bit
    }

    /// From now on whoever completes something marks it, however few queues there are: [`Cq::is_marked`] is worth asking.
    pub fn have_marked(&self) {
        let _settled; // dropped after the lock, as above
        let mut inner = self.inner.lock();
        if !inner.mapped {
            _settled = self.map(&mut inner);
        }
    }

    /// Did anybody complete something since the last poll? One look at one word, for [`Cq::have_marked`]. Sends of this process
    /// that a poll found unfinished are not marked again.
    #[inline]
    pub fn is_marked(&self) -> bool {
        self.shared[0].is_dirty()
    }

    /// Returns queue pairs that are to be dropped after the lock.
    fn map(&self, inner: &mut Inner) -> Vec<Arc<Qp>> {
        inner.mapped = true;
        self.shared[0].map();
        self.mapped.store(true, Ordering::Relaxed);
        // A send that begins after this marks; one that began before is seen by whoever gets this CQ's lock next.
        let settled: Vec<_> = inner.feeds.iter().flatten().filter_map(Feed::qp).collect();
        settled.iter().for_each(|qp| qp.settle());
        let Inner { feeds, ready, .. } = inner;
        for (index, feed) in feeds.iter_mut().enumerate() {
            if let Some(feed) = feed {
                feed.listed = true;
                ready.push_back(index);
            }
        }
        settled
    }

    /// Detaches a QP; its completions that were not polled are gone, as ibv_destroy_qp(3) says.
    pub(super) fn detach(&self, lanes: &Arc<Lanes>) {
        self.remove(|polled| matches!(polled, Polled::Qp(there) if Arc::ptr_eq(there, lanes)));
    }

    pub(super) fn detach_queue(&self, queue: &Arc<XrcQueue>) {
        self.remove(|polled| matches!(polled, Polled::Queue(there) if Arc::ptr_eq(there, queue)));
    }

    fn remove(&self, which: impl Fn(&Polled) -> bool) {
        let mut inner = self.inner.lock();
        for feed in &mut inner.feeds {
            if feed.as_ref().is_some_and(|feed| which(&feed.polled)) {
                *feed = None;
            }
        }
        inner.count = inner.feeds.iter().flatten().count();
    }

    /// Runs `change` while nobody polls this CQ.
    pub(super) fn paused<T>(&self, change: impl FnOnce() -> T) -> T {
        let _inner = self.inner.lock();
        change()
    }
}

/// Puts what `next` has into `out`, from the front; returns how many.
fn fill(out: &mut [Wc], mut next: impl FnMut() -> Option<Wc>) -> usize {
    let mut filled = 0;
    while let Some(slot) = out.get_mut(filled) {
        let Some(wc) = next() else { break };
        *slot = wc;
        filled += 1;
    }
    filled
}

impl Drop for Cq {
    fn drop(&mut self) {
        if self.context.conn.is_inherited() {
            return; // its bell and its header are the parent's
        }
        if let Some(channel) = &self.channel {
            channel.detach(self);
        }
        let _ = self.context.conn.ask(&DestroyCq { cq: self.id });
        self.context.slabs.free(self.block.clone());
    }
}
