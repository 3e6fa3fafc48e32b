//! Requests whose peers are on other hosts: handed to the router, which carries them out.
//!
//! A context has one doorbell and, once it sends datagrams to other hosts, one ring for all of those. A connected QP has a
//! ring of its own. The memory is the router's; the process writes requests, and reads in one word how far they got.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ctl::{AttachLink, DATAGRAMS, OpenDoorbell};
use crate::error::{Error, Result};
use crate::exec::{LocalTable, Outcome, Request, Target, UdDest};
use crate::ring::link::slot_words;
use crate::ring::{CqShared, LinkDone, LinkHeader, LinkWord, Ring, Submissions, Wqe};
use crate::shm::{Bell, LocalBytes, SharedBytes, View, copy_in};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use crate::verbs::{Access, SendFlags, WcStatus, limits};

use super::context::Context;
use super::qp::Patience;
use super::slab::{Block, BlockKind};

/// Payloads up to this length travel in the ring: the router need not look for them in this process's memory.
const PAYLOAD: usize = 256;
/// Datagrams that may wait for the router.
const DATAGRAM_DEPTH: u32 = 256;

/// What wakes the router.
#[derive(Debug)]
struct Doorbell {
    shared: View<CqShared>,
    bell: Bell,
}

impl Doorbell {
    fn open(context: &Context) -> Result<Arc<Self>> {
        let block = context.slabs.allocate(&context.conn, BlockKind::Cq, size_of::<CqShared>() as u64)?;
        let shared = View::<CqShared>::new(Arc::clone(&block.map), block.offset, 1);
        let shared = shared.ok_or(Error::NoRoom("queue memory"))?;
        shared[0].reset(true);
        shared[0].map();
        let request = OpenDoorbell { slab: block.slab, off: block.offset as u32 };
        let fds = match context.conn.call(&request, &[]) {
            Ok((_, fds)) => fds,
            Err(error) => {
                context.slabs.free(block);
                return Err(error);
            }
        };
        let given =
            fds.first().ok_or_else(|| Error::Disconnected("no bell came with OpenDoorbell".into()))?;
        let bell = Bell::open(given).map_err(Error::system("open of the router's bell"))?;
        Ok(Arc::new(Doorbell { shared, bell }))
    }

    /// The ring with mark `bit` has something new.
    fn ring(&self, bit: u32) {
        if self.shared[0].completed(Some(bit), false) == Ring::Bell {
            self.bell.ring();
        }
    }
}

/// A submission ring.
#[derive(Debug)]
struct RingMemory {
    block: Block,
    header: View<LinkHeader>,
    words: View<LinkWord>,
    stride: usize,
    depth: u32,
}

impl RingMemory {
    fn new(context: &Context, depth: u32, stride: usize) -> Result<Self> {
        let head = size_of::<LinkHeader>() as u64;
        let count = depth as usize * stride;
        let len = head + (count * size_of::<LinkWord>()) as u64;
        let block = context.slabs.allocate(&context.conn, BlockKind::Link, len)?;
        let header = View::new(Arc::clone(&block.map), block.offset, 1);
        let words = View::new(Arc::clone(&block.map), block.offset + head, count);
        let no_room = || Error::NoRoom("queue memory");
        Ok(RingMemory {
            header: header.ok_or_else(no_room)?,
            words: words.ok_or_else(no_room)?,
            block,
            stride,
            depth,
        })
    }

    fn ring(&self) -> Option<Submissions<'_>> {
        Submissions::new(&self.header[0], &self.words, self.stride)
    }

    fn attach(&self, context: &Context, qpn: u32, bit: u32, send_bit: u32) -> Result<()> {
        let request = AttachLink {
            qpn,
            slab: self.block.slab,
            off: self.block.offset as u32,
            depth: self.depth,
            stride: self.stride as u32,
            bit,
            send_bit,
        };
        context.conn.ask(&request).map(|_| ())
    }
}

/// The link of a context: nothing, until something goes to another host.
#[derive(Debug, Default)]
pub struct Links(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    doorbell: Option<Arc<Doorbell>>,
    datagrams: Option<Datagrams>,
    bits: u32,
}

#[derive(Debug)]
struct Datagrams {
    memory: RingMemory,
    bit: u32,
    sent: u32,
}

impl State {
    fn doorbell(&mut self, context: &Context) -> Result<Arc<Doorbell>> {
        if let Some(open) = &self.doorbell {
            return Ok(Arc::clone(open));
        }
        let opened = Doorbell::open(context)?;
        self.doorbell = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn next_bit(&mut self) -> u32 {
        self.bits = self.bits.wrapping_add(1);
        self.bits % crate::ring::marks::DIRTY_BITS
    }
}

impl Links {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The router was restarted: what comes next is said to the new one.
    pub fn forget(&self) {
        let mut state = self.lock();
        (state.doorbell, state.datagrams) = (None, None);
    }

    /// Room for the datagrams of this process, if there is none yet.
    pub fn open_datagrams(&self, context: &Context) -> Result<()> {
        let mut state = self.lock();
        if state.datagrams.is_some() {
            return Ok(());
        }
        state.doorbell(context)?;
        let memory = RingMemory::new(context, DATAGRAM_DEPTH, slot_words(0, limits::MTU as usize))?;
        let bit = state.next_bit();
        memory.header[0].reset();
        memory.attach(context, DATAGRAMS, bit, 0)?;
        state.datagrams = Some(Datagrams { memory, bit, sent: 0 });
        Ok(())
    }

    /// Sends a datagram to another host: it ends when the router has it, like one that is on the wire.
    pub fn datagram(
        &self,
        context: &Context,
        qpn: u32,
        pd: u32,
        dest: &UdDest,
        request: &Request<'_>,
    ) -> Outcome {
        let failed = |status| Outcome::Done { status, byte_len: 0 };
        let mut bytes = Vec::new();
        match gather(&LocalTable::new(&context.mrs, pd), request, limits::MTU as usize, &mut bytes) {
            Gathered::All => {}
            Gathered::Forbidden => return failed(WcStatus::LocProtErr),
            Gathered::TooLong => return failed(WcStatus::LocLenErr),
        }
        // The router may have been restarted since the destination was found.
        if self.open_datagrams(context).is_err() {
            return Outcome::Absent;
        }
        let mut state = self.lock();
        let State { doorbell: Some(doorbell), datagrams: Some(datagrams), .. } = &mut *state else {
            return Outcome::Absent;
        };
        let Some(ring) = datagrams.memory.ring() else { return Outcome::Absent };
        let taken = ring.header().poll(LinkDone { count: 0, status: 0 }).map_or(0, |done| done.count);
        if datagrams.sent.wrapping_sub(taken) >= ring.depth() {
            return Outcome::Again;
        }
        let wqe = Wqe {
            op: request.op as u8,
            flags: request.flags.bits() as u8,
            imm: request.imm,
            total: bytes.len() as u32,
            source: qpn,
            ..wqe_to(&Target::Datagram(*dest))
        };
        ring.write(datagrams.sent, &wqe, &[]);
        ring.write_payload(datagrams.sent, &bytes);
        datagrams.sent = datagrams.sent.wrapping_add(1);
        ring.publish(datagrams.sent);
        doorbell.ring(datagrams.bit);
        Outcome::Done { status: WcStatus::Success, byte_len: bytes.len() as u32 }
    }
}

/// A request's remote side.
fn wqe_to(target: &Target) -> Wqe {
    match *target {
        Target::Receive | Target::Bind { .. } | Target::Invalidate { .. } => Wqe::default(),
        Target::Memory { addr, rkey } => Wqe { addr, rkey, ..Wqe::default() },
        Target::Atomic { addr, rkey, compare_add, swap } => {
            Wqe { addr, rkey, compare_add, swap, ..Wqe::default() }
        }
        Target::Flush { addr, rkey, len, what } => {
            Wqe { addr, rkey, compare_add: len, swap: what.bits().into(), ..Wqe::default() }
        }
        Target::Datagram(UdDest { dgid, qpn, qkey, traffic_class, hop_limit }) => {
            Wqe { dgid: dgid.0, dest_qpn: qpn, qkey, traffic_class, hop_limit, ..Wqe::default() }
        }
    }
}

enum Gathered {
    All,
    Forbidden,
    TooLong,
}

/// Copies a request's payload out of this process's memory.
fn gather(table: &LocalTable<'_>, request: &Request<'_>, limit: usize, bytes: &mut Vec<u8>) -> Gathered {
    let inline = request.flags.contains(SendFlags::INLINE);
    let total: u64 = request.sges.iter().map(|sge| u64::from(sge.length)).sum();
    if total > limit as u64 {
        return Gathered::TooLong;
    }
    bytes.resize(total as usize, 0);
    let mut at = 0;
    for sge in request.sges.iter().filter(|sge| sge.length > 0) {
        let va = if inline { Some(sge.addr) } else { table.check(sge, Access::empty()) };
        let Some(addr) = va else { return Gathered::Forbidden };
        let len = sge.length as usize;
        // SAFETY: `bytes` lives through the copy and has room for `len` more.
        let to = unsafe { SharedBytes::new(bytes[at..].as_mut_ptr(), len) };
        // SAFETY: registered memory of this process, or inline data that the caller holds.
        unsafe { copy_in(to, LocalBytes { addr, len }) };
        at += len;
    }
    Gathered::All
}

/// What a CQ looks at of a QP whose requests the router carries out.
#[derive(Debug)]
pub struct LinkLane {
    header: View<LinkHeader>,
    /// [`LinkDone`] as taken; written under the send queue's lock.
    seen: AtomicU64,
    active: AtomicBool,
}

impl LinkLane {
    fn seen(&self) -> LinkDone {
        let word = self.seen.load(Ordering::Relaxed);
        LinkDone { count: word as u32, status: (word >> 32) as u32 }
    }

    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Has the router got further?
    #[inline]
    pub fn is_news(&self) -> bool {
        self.header[0].poll(self.seen()).is_some()
    }
}

/// The forwarding half of a send queue.
#[derive(Debug)]
pub struct LinkQueue {
    memory: RingMemory,
    doorbell: Arc<Doorbell>,
    bit: u32,
    pub lane: Arc<LinkLane>,
    /// Requests handed over, finished ones included, and those passed over.
    pub submitted: u32,
    /// Requests that the router never heard of.
    passed_over: u32,
    scratch: Vec<u8>,
}

impl LinkQueue {
    pub fn new(context: &Context, depth: u32, sges: usize, inline: usize) -> Result<Self> {
        let memory = RingMemory::new(context, depth, slot_words(sges, inline.max(PAYLOAD)))?;
        let mut state = context.links.lock();
        let (doorbell, bit) = (state.doorbell(context)?, state.next_bit());
        let (seen, active) = (AtomicU64::new(0), AtomicBool::new(false));
        let lane = Arc::new(LinkLane { header: memory.header.clone(), seen, active });
        Ok(LinkQueue { memory, doorbell, bit, lane, submitted: 0, passed_over: 0, scratch: Vec::new() })
    }

    /// The QP was connected (anew), or goes on after a failure: from now on the router takes its requests, from `first` on.
    pub fn attach(&mut self, context: &Context, qpn: u32, send_bit: u32, first: u32) -> Result<()> {
        self.begin(first);
        self.doorbell = context.links.lock().doorbell(context)?;
        self.memory.attach(context, qpn, self.bit, send_bit)?;
        self.lane.active.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The router takes none any more.
    pub fn reset(&mut self) {
        self.begin(0);
    }

    fn begin(&mut self, first: u32) {
        self.lane.active.store(false, Ordering::Relaxed);
        (self.submitted, self.passed_over) = (first, first);
        self.memory.header[0].reset();
        self.lane.seen.store(0, Ordering::Relaxed);
    }

    /// The next request's number in the ring.
    fn seq(&self) -> u32 {
        self.submitted.wrapping_sub(self.passed_over)
    }

    /// The next request is over and not for the router, which has none of this queue's at this time.
    pub fn pass_over(&mut self) {
        self.submitted = self.submitted.wrapping_add(1);
        self.passed_over = self.passed_over.wrapping_add(1);
    }

    /// How many of the queue's requests have ended, when the router says `done`.
    pub fn count(&self, done: LinkDone) -> u32 {
        done.count.wrapping_add(self.passed_over)
    }

    /// Writes the next request; the router does not know it before [`LinkQueue::publish`].
    pub fn write(&mut self, table: &LocalTable<'_>, request: &Request<'_>, patience: Patience, quiet: bool) {
        let Some(ring) = self.memory.ring() else { return };
        let total: u64 = request.sges.iter().map(|sge| u64::from(sge.length)).sum();
        let carried = !request.op.writes_locally()
            && matches!(gather(table, request, ring.room(), &mut self.scratch), Gathered::All);
        let wqe = Wqe {
            op: request.op as u8,
            flags: request.flags.bits() as u8 & !Wqe::QUIET | if quiet { Wqe::QUIET } else { 0 },
            sges: if carried { 0 } else { request.sges.len() as u8 },
            timeout: patience.timeout,
            retry_cnt: patience.retry_cnt,
            rnr_retry: patience.rnr_retry,
            imm: request.imm,
            total: u32::try_from(total).unwrap_or(u32::MAX),
            dest_qpn: request.srqn,
            ..wqe_to(&request.target)
        };
        ring.write(self.seq(), &wqe, if carried { &[] } else { request.sges });
        if carried {
            ring.write_payload(self.seq(), &self.scratch);
        }
        self.submitted = self.submitted.wrapping_add(1);
    }

    pub fn publish(&self) {
        if let Some(ring) = self.memory.ring() {
            ring.publish(self.seq());
            self.doorbell.ring(self.bit);
        }
    }

    /// How far the router got, if that is news.
    pub fn take(&self) -> Option<LinkDone> {
        let now = self.memory.header[0].poll(self.lane.seen())?;
        self.lane.seen.store(u64::from(now.count) | u64::from(now.status) << 32, Ordering::Relaxed);
        Some(now)
    }

    pub fn free(self, context: &Context) {
        context.slabs.free(self.memory.block);
    }
}
