//! Completion queues.
//!
//! With few lanes, poll looks at each; with more than [`SCAN_LIMIT`] it asks peers to mark a dirty map and looks only
//! where something happened lately.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ctl::{CreateCq, DestroyCq};
use crate::error::{Error, Result};
use crate::exec::LocalTable;
use crate::ring::marks::{DIRTY_BITS, Known};
use crate::ring::{CqShared, Ring};
use crate::shm::View;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::verbs::Wc;

use super::channel::Channel;
use super::context::Context;
use super::lanes::Lanes;
use super::lock::Lock;
use super::moderation::Moderation;
use super::offer::offer_processor;
use super::qp::Qp;
use super::slab::{Block, BlockKind};
use super::srq::XrcQueue;

/// Lanes up to which polling all of them is cheaper than asking peers to mark.
const SCAN_LIMIT: usize = 8;
/// Looks at a queue that brought nothing, after which its mark is taken away. A look costs some nanoseconds; a mark that a peer has
/// to make anew moves its cache line there and back, which costs as much as so many looks.
const LOOKS: u32 = 32;
/// Queues with marks that stand beyond which a silent one is not looked at again: a poll would take too long.
const MANY: usize = 512;
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
    /// A queue pair's peer is, or was, on another host.
    far: AtomicBool,
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
    /// Sends alone filled the last poll: now the receives have the first turn.
    receive_first: bool,
    /// Looks at it that may bring nothing.
    patience: u32,
}

impl Feed {
    fn new(polled: Polled, pd: u32, send: bool, recv: bool) -> Self {
        Feed { polled, pd, send, recv, receive_first: false, patience: 0 }
    }

    /// Is it to be looked at again, though it brought nothing?
    fn is_awaited(&mut self, many: bool) -> bool {
        let patient = self.patience > 0 && !many;
        self.patience = self.patience.saturating_sub(1);
        patient || self.sends()
    }

    fn poll_sends(&self, out: &mut [Wc]) -> usize {
        match &self.polled {
            Polled::Qp(lanes) if self.send => lanes.poll_send(out),
            _ => 0,
        }
    }

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
    /// The marks that are known.
    ready: VecDeque<u32>,
    known: Known,
    /// Polls since the last completion.
    idle: u32,
    /// Where the next scan starts, so that a busy lane does not starve the others.
    start: usize,
}

impl Inner {
    /// Those that have mark `bit`: one, unless there are more than marks.
    fn marked(&mut self, bit: u32) -> impl Iterator<Item = &mut Feed> {
        self.feeds.iter_mut().skip(bit as usize).step_by(DIRTY_BITS as usize).flatten()
    }
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
        let (mapped, far) = (AtomicBool::new(false), AtomicBool::new(false));
        let (moderation, inner) = (Mutex::default(), Lock::default());
        let cq = Cq { context, id, shared, channel, block, cookie, cqe, mapped, far, moderation, inner };
        let cq = Arc::new(cq);
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
            if self.far.load(Ordering::Relaxed) { offer_processor() } else { std::thread::yield_now() }
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

    /// Looks at each queue whose mark stands: fewer than there is room for means that there are no more, and programs rely on that
    /// before they sleep.
    fn poll_dirty(&self, inner: &mut Inner, out: &mut [Wc]) -> usize {
        let Inner { ready, known, .. } = inner;
        self.shared[0].marks.news(known, |bit| ready.push_back(bit));
        let mut filled = 0;
        for _ in 0..inner.ready.len() {
            if filled == out.len() {
                break;
            }
            let Some(bit) = inner.ready.pop_front() else { break };
            filled += self.look(inner, bit, &mut out[filled..]);
        }
        filled
    }

    /// One look at what has mark `bit`. What has had nothing for a while, nor has sends under way, waits for its next mark.
    fn look(&self, inner: &mut Inner, bit: u32, out: &mut [Wc]) -> usize {
        let found = self.drain_marked(inner, bit, out);
        let many = inner.ready.len() >= MANY;
        if found > 0 || inner.marked(bit).fold(false, |any, feed| feed.is_awaited(many) | any) {
            inner.ready.push_back(bit);
            return found;
        }
        self.shared[0].marks.unmark(&mut inner.known, bit);
        let found = self.drain_marked(inner, bit, out);
        if found > 0 || inner.marked(bit).any(|feed| feed.sends()) {
            self.shared[0].marks.mark(bit); // the next poll lists it
        }
        found
    }

    fn drain_marked(&self, inner: &mut Inner, bit: u32, out: &mut [Wc]) -> usize {
        let (first, step) = (bit as usize, DIRTY_BITS as usize);
        let count = inner.feeds.len().saturating_sub(first).div_ceil(step);
        // A division for those that share a mark only.
        let start = if count > 1 { inner.start % count } else { 0 };
        inner.start = inner.start.wrapping_add(1);
        let mut filled = 0;
        for turn in (start..count).chain(0..start) {
            if filled == out.len() {
                break;
            }
            if let Some(feed) = &mut inner.feeds[first + turn * step] {
                filled += self.drain(feed, &mut out[filled..]);
            }
        }
        filled
    }

    fn drain(&self, feed: &mut Feed, out: &mut [Wc]) -> usize {
        if feed.receive_first {
            let received = self.receive(feed, out);
            feed.receive_first = false;
            return received + feed.poll_sends(&mut out[received..]);
        }
        let sent = feed.poll_sends(out);
        feed.receive_first = sent == out.len();
        sent + self.receive(feed, &mut out[sent..])
    }

    fn receive(&self, feed: &mut Feed, out: &mut [Wc]) -> usize {
        let received = match &feed.polled {
            Polled::Qp(lanes) if feed.recv => {
                let table = LocalTable::new(&self.context.mrs, feed.pd);
                fill(out, || lanes.poll_recv(&table))
            }
            Polled::Qp(_) => 0,
            Polled::Queue(queue) => fill(out, || queue.poll()),
        };
        if received > 0 {
            feed.patience = LOOKS;
        }
        received
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
            self.shared[0].marks.mark(bit);
        }
    }

    /// What is waited for here may come from another host.
    pub(super) fn reaches_far(&self) {
        self.far.store(true, Ordering::Relaxed);
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
        self.add(Feed::new(polled, pd, send, recv))
    }

    /// The same for the receives of an XRC shared receive queue.
    pub(super) fn attach_queue(&self, queue: &Arc<XrcQueue>) -> u32 {
        let polled = Polled::Queue(Arc::clone(queue));
        self.add(Feed::new(polled, 0, false, true))
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

    /// May a poll find something? One look at one word, for [`Cq::have_marked`].
    #[inline]
    pub fn is_marked(&self) -> bool {
        self.shared[0].marks.any()
    }

    /// Returns queue pairs that are to be dropped after the lock.
    fn map(&self, inner: &mut Inner) -> Vec<Arc<Qp>> {
        inner.mapped = true;
        self.shared[0].map();
        self.mapped.store(true, Ordering::Relaxed);
        // A send that begins after this marks; one that began before is seen by whoever gets this CQ's lock next.
        let settled: Vec<_> = inner.feeds.iter().flatten().filter_map(Feed::qp).collect();
        settled.iter().for_each(|qp| qp.settle());
        (0..inner.feeds.len()).for_each(|index| self.shared[0].marks.mark(index as u32));
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
        let Inner { feeds, ready, known, count, .. } = &mut *inner;
        for (index, feed) in feeds.iter_mut().enumerate() {
            if feed.as_ref().is_some_and(|feed| which(&feed.polled)) {
                *feed = None;
                // If its mark stands, that is news again for whoever shares or inherits it.
                let bit = index as u32 % DIRTY_BITS;
                ready.retain(|listed| *listed != bit);
                known.forget(bit);
            }
        }
        *count = feeds.iter().flatten().count();
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
