//! A queue pair of this host whose peer is on another: its two halves, its ring, and what it means to carry a request out.
//!
//! Owns the way from a process's ring to the requester and from the requester's results back, and runs the executor for what
//! the peer asks. It must never know connections or hosts.

use std::cell::Cell;
use std::collections::HashMap;
use std::time::Instant;

use freeflow_core::exec::{
    Env, LocalTable, Outcome, Peer, Progress, Request, Retired, Target, UdDest, abandon, execute,
};
use freeflow_core::ring::{INLINE_BYTES, LinkDone, MAX_SGE, Ring, RqShared, Submissions, Wqe};
use freeflow_core::sync::Ordering;
use freeflow_core::verbs::{Access, Flush, Gid, QpState, QpType, SendFlags, SendOp, Sge, WcStatus, limits};

use super::memory::{Inbound, Input, Span};
use super::requester::{Requester, Source, Wr};
use super::responder::{PendingRead, Responder};
use super::wire::Header;
use crate::state::{FarDomain, FarQp, FarRing, FarSrq};

/// Where the executor is told that payloads are which are not in this process: it hands these addresses on, and touches
/// only payloads of at most [`INLINE_BYTES`], which are.
const NOWHERE: u64 = 1 << 62;
/// From this size on bytes are sent by reference to their pages.
pub const BY_REFERENCE: u32 = 8192;

#[derive(Debug)]
struct Forwarded {
    ring: FarRing,
    next: u32,
    /// Requests that had ended before the ring was attached.
    before: u32,
    send_bit: u32,
    told: LinkDone,
}

/// How carrying out a piece of a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The piece is in place.
    Partly,
    Done,
    /// With an atomic's result.
    Result(u64),
    NotReady {
        timer: u32,
    },
    /// There are receives, but what completed before was not polled for so long that no more can complete.
    Busy,
    Absent,
    Failed {
        status: WcStatus,
        /// The process is to hear of it.
        fault: bool,
    },
}

#[derive(Debug)]
pub struct Endpoint {
    pub qp: FarQp,
    /// Random per connection of the queue pair.
    pub incarnation: u64,
    pub requester: Requester,
    pub responder: Responder,
    forwarded: Option<Forwarded>,
    /// XRC's target: what requests reach, by the shared receive queue that they name.
    queues: HashMap<u32, FarDomain>,
    /// The shared receive queue that has fallen below its limit; its owner is to be told. 0: none.
    limited: Cell<u32>,
    /// The last request that was carried out woke somebody.
    woke: Cell<bool>,
    /// What the peer has invalidated of this end's.
    pub retired: Retired,
}

impl Endpoint {
    pub fn new(qp: FarQp, incarnation: u64) -> Self {
        let requester = Requester::new(incarnation as u32, qp.kind != QpType::Uc);
        Endpoint {
            qp,
            incarnation,
            requester,
            responder: Responder::new(),
            forwarded: None,
            queues: HashMap::new(),
            limited: Cell::new(0),
            woke: Cell::new(false),
            retired: Retired::default(),
        }
    }

    /// The number of the shared receive queue that has just fallen below its limit.
    pub fn take_limited(&self) -> Option<u32> {
        Some(self.limited.take()).filter(|number| *number != 0)
    }

    /// Did the last request that was carried out wake somebody?
    pub fn has_woken(&self) -> bool {
        self.woke.get()
    }

    /// Does a request for `srqn` need a domain that is not known yet?
    pub fn lacks(&self, srqn: u32) -> bool {
        self.qp.kind == QpType::XrcRecv && !self.queues.contains_key(&srqn)
    }

    pub fn learn_queue(&mut self, srqn: u32, domain: FarDomain) {
        self.queues.insert(srqn, domain);
    }

    pub fn forget_queue(&mut self, srqn: u32) {
        if self.responder.srqn == srqn && self.queues.contains_key(&srqn) {
            self.give_up();
        }
        self.queues.remove(&srqn);
    }

    /// What a request reaches.
    fn domain(&self, srqn: u32) -> Option<&FarDomain> {
        match self.qp.kind {
            QpType::XrcRecv => self.queues.get(&srqn),
            QpType::XrcSend => None,
            _ => Some(&self.qp.domain),
        }
    }

    /// The process hands over requests in `ring` from now on. True: it goes on after a failure, so the peer must be opened to.
    pub fn attach(&mut self, ring: FarRing, send_bit: u32) -> bool {
        let again = self.requester.failure().is_some();
        if again {
            self.requester.restart();
        }
        let before = self.requester.done();
        let told = LinkDone { count: 0, status: 0 };
        self.forwarded = Some(Forwarded { ring, next: 0, before, send_bit, told });
        again
    }

    fn state(&self) -> Option<QpState> {
        QpState::try_from(self.qp.shared[0].state.load(Ordering::Acquire)).ok()
    }

    /// Are requests of this queue pair still wanted?
    pub fn sends(&self) -> bool {
        matches!(self.state(), Some(QpState::Rts | QpState::Sqd))
    }

    // ---- from the ring, and back

    /// Takes what the process has submitted, as far as there is room. True: there is something new to send.
    pub fn take_submissions(&mut self, now: Instant) -> bool {
        let Endpoint { requester, forwarded: Some(forwarded), .. } = self else { return false };
        let FarRing { header, words, stride } = &forwarded.ring;
        let Some(ring) = Submissions::new(&header[0], words, *stride) else { return false };
        let (mut sges, mut payload) = ([Sge::default(); MAX_SGE], Vec::new());
        let mut any = false;
        while requester.room() > 0 {
            match ring.waiting(forwarded.next) {
                Some(0) => break,
                Some(_) => {}
                None => {
                    requester.fail(WcStatus::LocQpOpErr);
                    break;
                }
            }
            let taken = ring.take(forwarded.next, &mut sges, &mut payload);
            let Some(wr) = taken.and_then(|(wqe, count)| request(&wqe, &sges[..count], &payload)) else {
                requester.fail(WcStatus::LocQpOpErr);
                break;
            };
            forwarded.next = forwarded.next.wrapping_add(1);
            requester.push(wr, now);
            any = true;
        }
        any
    }

    /// Tells the process how far its requests got. True: it must be told of a failure too, in case it does not look.
    pub fn report(&mut self) -> bool {
        let loud = self.requester.take_loud();
        let Some(forwarded) = &mut self.forwarded else { return false };
        let status = self.requester.failure().map_or(0, |status| status as u32);
        let now = LinkDone { count: self.requester.done().wrapping_sub(forwarded.before), status };
        if now == forwarded.told {
            return false;
        }
        let failed = now.status != forwarded.told.status;
        forwarded.told = now;
        forwarded.ring.header[0].finish(now);
        if loud {
            let cq = &self.qp.send_cq;
            if cq.shared[0].completed(Some(forwarded.send_bit), failed) == Ring::Bell {
                cq.bell.iter().for_each(|bell| bell.ring());
            }
        }
        failed
    }

    // ---- what goes out

    /// Puts an answer into the lists of the request it is for.
    pub fn place_answer(
        &self,
        wr: &Wr,
        offset: u32,
        len: u32,
        input: &mut Input<'_>,
    ) -> Result<(), WcStatus> {
        // Announced before the look at state and keys, like a peer's copy: whoever changes them waits.
        let _in_flight = self.qp.shared[0].enter();
        if !self.sends() {
            return Err(WcStatus::WrFlushErr);
        }
        match &wr.source {
            Source::List(sges) => self.qp.domain.memory.scatter(sges, offset, len, input),
            Source::Payload(_) => Err(WcStatus::LocQpOpErr),
        }
    }

    // ---- what comes in

    fn peer<'a>(&'a self, domain: &'a FarDomain) -> Peer<'a> {
        let FarDomain { memory, cq, bit, srq } = domain;
        Peer {
            qp: &self.qp.shared[0],
            rq: RqShared::new(&self.qp.slots),
            srq: srq.as_ref().map(FarSrq::ring),
            recv_pd: srq.as_ref().map_or(memory.pd, |srq| srq.memory.pd),
            cq: &cq.shared[0],
            cq_bit: *bit,
            mrs: &memory.mrs,
            pd: memory.pd,
            qpn: self.qp.qpn,
        }
    }

    fn run(
        &self,
        domain: &FarDomain,
        request: &Request<'_>,
        progress: &mut Progress,
        memory: &mut Inbound<'_, '_>,
        from: (u32, Gid),
        budget: u64,
    ) -> Outcome {
        let local = LocalTable::new(&[], 0);
        let peer = Some(self.peer(domain));
        let (qpn, gid) = from;
        let outcome = execute(request, progress, Env { local, peer, memory, qpn, client: 0, gid, budget });
        if let Some(srq) = domain.srq.as_ref().filter(|_| memory.limits > 0) {
            self.limited.set(srq.number);
        }
        self.woke.set(memory.rings > 0);
        if memory.rings > 0 {
            domain.cq.bell.iter().for_each(|bell| bell.ring());
        }
        outcome
    }

    fn inbound<'a, 'i>(
        &'a self,
        domain: &'a FarDomain,
        input: Option<&'a mut Input<'i>>,
        at: u64,
    ) -> Inbound<'a, 'i> {
        Inbound::new(domain, &self.qp, &self.retired, input, at)
    }

    /// Carries out a piece of a WRITE or SEND, or an atomic, that `responder` found good. `input` has its bytes.
    pub fn serve(&mut self, header: &Header, op: SendOp, input: &mut Input<'_>) -> Served {
        let Some(domain) = self.domain(header.srqn) else { return Served::Absent };
        let mut old = [0u8; 8];
        let mut progress = self.responder.progress;
        let outcome = {
            let (base, length) = match &*input {
                _ if op.is_atomic() => (old.as_mut_ptr() as u64, 8),
                // The executor reads small payloads itself: they are whole, and here.
                Input::Bytes(bytes) if header.total as usize <= INLINE_BYTES => {
                    if bytes.len() != header.total as usize {
                        return Served::Failed { status: WcStatus::RemInvReqErr, fault: false };
                    }
                    (bytes.as_ptr() as u64, header.total)
                }
                _ => (NOWHERE, header.total),
            };
            let solicited = header.flags & super::wire::flags::SOLICITED != 0;
            let flags = SendFlags::INLINE | if solicited { SendFlags::SOLICITED } else { SendFlags::empty() };
            let sges = [Sge { addr: base, length, lkey: 0 }];
            let target = target_of(op, (header.addr, header.rkey), (header.a, header.b));
            let request = Request { op, flags, imm: header.imm, target, sges: &sges, srqn: header.srqn };
            let mut memory = self.inbound(domain, Some(input), base + u64::from(header.offset));
            memory.word = op.is_word();
            let (from, budget) = ((header.from, self.qp.dest), u64::from(header.len).max(1));
            let outcome = self.run(domain, &request, &mut progress, &mut memory, from, budget);
            (outcome, memory.faults > 0)
        };
        self.responder.progress = progress;
        self.responder.srqn = header.srqn;
        match outcome {
            (Outcome::Done { status: WcStatus::Success, .. }, _) if op.is_atomic() => {
                Served::Result(u64::from_ne_bytes(old))
            }
            (Outcome::Done { status: WcStatus::Success, .. }, _) => Served::Done,
            (Outcome::Done { status, .. }, fault) => Served::Failed { status, fault },
            (Outcome::Again, _) => Served::Partly,
            (Outcome::Rnr, _) => {
                Served::NotReady { timer: self.qp.shared[0].rnr_timer.load(Ordering::Relaxed) }
            }
            // Later is of copies that a router makes for others.
            (Outcome::Absent | Outcome::Later, _) => Served::Absent,
            // All tickets of a shared queue are out; its owner takes them as it polls.
            (Outcome::Full, _) => Served::Busy,
        }
    }

    /// The next bytes of a READ's answer.
    pub fn serve_read(&self, read: &PendingRead, most: u32) -> Result<Vec<Span>, Served> {
        let domain = self.domain(read.srqn).ok_or(Served::Absent)?;
        let len = (read.total - read.sent).min(most);
        let sges = [Sge { addr: NOWHERE, length: read.total, lkey: 0 }];
        let target = Target::Memory { addr: read.addr, rkey: read.rkey };
        let request =
            Request { op: SendOp::Read, flags: SendFlags::INLINE, imm: 0, target, sges: &sges, srqn: 0 };
        let mut progress = Progress { moved: read.sent.into(), claim: None };
        let mut memory = self.inbound(domain, None, NOWHERE);
        memory.by_reference = len >= BY_REFERENCE;
        let from = (self.qp.dest_qpn, self.qp.dest);
        match self.run(domain, &request, &mut progress, &mut memory, from, len.into()) {
            Outcome::Done { status: WcStatus::Success, .. } | Outcome::Again => Ok(memory.output),
            Outcome::Done { status, .. } => Err(Served::Failed { status, fault: memory.faults > 0 }),
            Outcome::Rnr | Outcome::Full | Outcome::Absent | Outcome::Later => Err(Served::Absent),
        }
    }

    /// Gives back the receive that a request had begun to fill.
    pub fn give_up(&mut self) {
        let mut progress = std::mem::take(&mut self.responder.progress);
        let Some(domain) = self.domain(self.responder.srqn) else { return };
        let mut memory = self.inbound(domain, None, NOWHERE);
        abandon(&mut progress, self.peer(domain), &mut memory, self.qp.dest_qpn, 0);
        if memory.rings > 0 {
            domain.cq.bell.iter().for_each(|bell| bell.ring());
        }
    }

    /// Is a receive posted?
    pub fn has_receive(&self) -> bool {
        match &self.qp.domain.srq {
            None => RqShared::new(&self.qp.slots).ready(&self.qp.shared[0].head),
            Some(srq) => srq.ring().ready(),
        }
    }

    /// Delivers a datagram, or drops it.
    pub fn datagram(&self, header: &Header, from: Gid, dest: UdDest, payload: &[u8]) {
        let Ok(op) = SendOp::try_from(u32::from(header.op)) else { return };
        if !matches!(op, SendOp::Send | SendOp::SendImm) || payload.len() > limits::MTU as usize {
            return;
        }
        let sges = [Sge { addr: payload.as_ptr() as u64, length: payload.len() as u32, lkey: 0 }];
        let solicited = header.flags & super::wire::flags::SOLICITED != 0;
        let flags = SendFlags::INLINE | if solicited { SendFlags::SOLICITED } else { SendFlags::empty() };
        let request =
            Request { op, flags, imm: header.imm, target: Target::Datagram(dest), sges: &sges, srqn: 0 };
        let domain = &self.qp.domain;
        let (mut memory, mut progress) = (self.inbound(domain, None, 0), Progress::default());
        self.run(domain, &request, &mut progress, &mut memory, (header.from, from), u64::MAX);
    }
}

/// The bytes of a piece of a request.
pub fn spans(qp: &FarQp, wr: &Wr, offset: u32, len: u32) -> Result<Vec<Span>, WcStatus> {
    if let Some(status) = wr.bad {
        return Err(status);
    }
    match &wr.source {
        Source::Payload(bytes) => {
            let part = bytes.get(offset as usize..(offset + len) as usize);
            Ok(vec![Span::Bytes(part.ok_or(WcStatus::LocQpOpErr)?.to_vec())])
        }
        Source::List(sges) => {
            if offset == 0 {
                let writes = wr.op.writes_locally();
                let need = if writes { Access::LOCAL_WRITE } else { Access::empty() };
                qp.domain.memory.judge(sges, need)?;
            }
            qp.domain.memory.gather(sges, offset, len, len >= BY_REFERENCE)
        }
    }
}

/// The remote side of a request: its address and key, and the two words that some operations have.
fn target_of(op: SendOp, (addr, rkey): (u64, u32), (a, b): (u64, u64)) -> Target {
    match op {
        SendOp::Send | SendOp::SendImm | SendOp::SendInv => Target::Receive,
        SendOp::LocalInv | SendOp::BindMw => Target::Invalidate { rkey: 0 },
        SendOp::Write | SendOp::WriteImm | SendOp::Read | SendOp::AtomicWrite => {
            Target::Memory { addr, rkey }
        }
        SendOp::CompareSwap | SendOp::FetchAdd => Target::Atomic { addr, rkey, compare_add: a, swap: b },
        SendOp::Flush => Target::Flush { addr, rkey, len: a, what: Flush::from_bits_truncate(b as u8) },
    }
}

/// What a process submitted, judged. None: it is nonsense.
fn request(wqe: &Wqe, sges: &[Sge], payload: &[u8]) -> Option<Wr> {
    let asked = SendOp::try_from(u32::from(wqe.op)).ok()?;
    // The process has done it; here it is a WRITE of nothing, which ends in its turn, and as the process says.
    let own = matches!(asked, SendOp::BindMw | SendOp::LocalInv);
    let op = if own { SendOp::Write } else { asked };
    let failed = WcStatus::try_from(wqe.imm).ok().filter(|status| own && *status != WcStatus::Success);
    let listed: u64 = sges.iter().map(|sge| u64::from(sge.length)).sum();
    let total = if sges.is_empty() { payload.len() as u64 } else { listed };
    let source = match sges {
        [] if !op.writes_locally() => Source::Payload(payload.into()),
        list => Source::List(list.to_vec()),
    };
    let target = target_of(op, (wqe.addr, wqe.rkey), (wqe.compare_add, wqe.swap));
    // A FLUSH may have a list, and moves nothing of it.
    let moved = if op == SendOp::Flush { 0 } else { total };
    let long = total > limits::MESSAGE || (op.is_word() && total != 8) || (own && total > 0);
    Some(Wr {
        op,
        flags: SendFlags::from_bits_truncate(u32::from(wqe.flags & !Wqe::QUIET)),
        imm: wqe.imm,
        target,
        source,
        srqn: wqe.dest_qpn,
        total: if long { 0 } else { moved as u32 },
        quiet: wqe.flags & Wqe::QUIET != 0,
        timeout: wqe.timeout,
        retry_cnt: wqe.retry_cnt,
        rnr_retry: wqe.rnr_retry,
        bad: failed.or(long.then_some(WcStatus::LocLenErr)),
    })
}
