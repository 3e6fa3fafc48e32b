//! The send queue: post, run, stall, finish.
//!
//! post_send runs the request at once in the caller's thread if nothing is ahead of it; otherwise, and where it cannot
//! finish, it waits in the queue for whoever makes progress next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::exec::{Env, LocalTable, Outcome, Progress, Request, Target, UdDest, abandon, execute};
use crate::ring::QpShared;
use crate::shm::{LocalBytes, SharedBytes, copy_in};
use crate::sync::Ordering;
use crate::verbs::{
    Access, MULTICAST_QPN, QpAttr, QpState, QpType, SendFlags, SendOp, Sge, WcStatus, ack_timeout_us, limits,
    rnr_timer_us,
};

use super::super::events::AsyncKind;
use super::super::link::LinkQueue;
use super::super::lock::Guard;
use super::super::stall::Stall;
use super::Qp;
use super::queue::Queue;
use super::route::Route;

/// Bytes one call may copy before it returns to the program.
const BUDGET: u64 = 256 * 1024;
/// rnr_retry value that means for ever.
const RNR_FOREVER: u8 = 7;

/// A send request as posted. With `SendFlags::INLINE` its list names the bytes to take now, lkeys ignored.
#[derive(Debug, Clone, Copy)]
pub struct SendWr<'a> {
    pub wr_id: u64,
    pub request: Request<'a>,
}

/// The send queue, under its lock.
#[derive(Debug)]
pub struct SendSide {
    pub queue: Queue,
    pub route: Route,
    progress: Progress,
    pub(super) stall: Stall,
    /// On the context's list of stalled queues.
    listed: bool,
    pub(super) patience: Patience,
    /// The program waits for IBV_EVENT_SQ_DRAINED.
    pub tell_drained: bool,
    /// Where requests go whose peer is on another host.
    pub link: Option<Box<LinkQueue>>,
}

/// How long a request may wait: attributes of the QP, here because modify holds theirs while it takes the send lock.
#[derive(Debug, Clone, Copy, Default)]
pub struct Patience {
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
}

impl SendSide {
    pub fn new(queue: Queue) -> Self {
        SendSide {
            queue,
            route: Route::default(),
            progress: Progress::default(),
            stall: Stall::None,
            listed: false,
            patience: Patience::default(),
            tell_drained: false,
            link: None,
        }
    }

    /// Do requests go to the router?
    #[inline]
    pub fn is_link(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.lane.is_active())
    }

    pub fn set_patience(&mut self, attr: &QpAttr) {
        let QpAttr { timeout, retry_cnt, rnr_retry, .. } = *attr;
        self.patience = Patience { timeout, retry_cnt, rnr_retry };
    }

    pub fn reset(&mut self) {
        self.queue.reset();
        self.route = Route::default();
        self.progress = Progress::default();
        self.stall = Stall::None;
        self.tell_drained = false;
        self.link.iter_mut().for_each(|link| link.reset());
    }
}

/// Copies inline data into `buffer`, as far as it goes; returns how many bytes.
pub fn gather_inline(sges: &[Sge], buffer: &mut [u8]) -> u32 {
    let mut at = 0;
    for sge in sges {
        let len = (sge.length as usize).min(buffer.len() - at);
        // SAFETY: a live slice of at least `len` bytes.
        let to = unsafe { SharedBytes::new(buffer[at..].as_mut_ptr(), len) };
        // SAFETY: ibv_post_send(3): with IBV_SEND_INLINE the caller's list names readable memory.
        unsafe { copy_in(to, LocalBytes { addr: sge.addr, len }) };
        at += len;
    }
    at as u32
}

impl Qp {
    /// ibv_post_send(3), one request.
    pub fn post_send(self: &Arc<Self>, wr: &SendWr<'_>) -> Result<(), Errno> {
        let mut side = self.send.lock();
        let posted = self.post(&mut side, wr);
        self.unlock_and_list(side);
        posted
    }

    /// Several, in order; the error names the first that was not posted. The queue's lock is taken once: between two
    /// requests it would wait until the cache lines of the first have come.
    pub fn post_sends(self: &Arc<Self>, wrs: &[SendWr<'_>]) -> Result<(), (usize, Errno)> {
        let mut side = self.send.lock();
        let mut posted = Ok(());
        for (index, wr) in wrs.iter().enumerate() {
            posted = self.post(&mut side, wr).map_err(|errno| (index, errno));
            if posted.is_err() {
                break;
            }
        }
        self.unlock_and_list(side);
        posted
    }

    #[inline(always)]
    fn post(self: &Arc<Self>, side: &mut SendSide, wr: &SendWr<'_>) -> Result<(), Errno> {
        self.check(&wr.request)?;
        match &wr.request.target {
            Target::Datagram(dest) => {
                let request = Request { target: self.own_qkey(*dest), ..wr.request };
                self.queue(side, &SendWr { request, ..*wr })
            }
            _ => self.queue(side, wr),
        }
    }

    #[inline(always)]
    fn queue(self: &Arc<Self>, side: &mut SendSide, wr: &SendWr<'_>) -> Result<(), Errno> {
        // Asked under the lock: a request behind one that failed is flushed, whichever thread posts it.
        let state = self.state();
        if matches!(state, QpState::Reset | QpState::Init | QpState::Rtr) {
            return Err(Errno::INVAL);
        }
        if self.lanes.send.used(side.queue.posted) >= self.caps.max_send_wr {
            return Err(Errno::NOMEM);
        }
        self.lanes.send.begin(side.queue.posted.wrapping_add(1));
        self.send_cq.sending(self.send_bit);
        if side.queue.is_idle() && state == QpState::Rts && !side.is_link() {
            self.post_idle(side, wr);
        } else {
            side.queue.push(wr);
            self.run_queue(side, false);
        }
        Ok(())
    }

    /// How many more requests fit now; only polling makes it more, only posting less.
    pub fn send_room(&self) -> usize {
        let side = self.send.lock();
        self.caps.max_send_wr.saturating_sub(self.lanes.send.used(side.queue.posted)) as usize
    }

    /// A Q_Key with the high bit set stands for the QP's own (IB spec vol. 1, 10.2.5).
    fn own_qkey(&self, dest: UdDest) -> Target {
        let own = dest.qkey & 1 << 31 != 0;
        let qkey = if own { self.lanes.shared[0].qkey.load(Ordering::Relaxed) } else { dest.qkey };
        Target::Datagram(UdDest { qkey, ..dest })
    }

    #[inline(always)]
    fn check(&self, wr: &Request<'_>) -> Result<(), Errno> {
        let datagram = matches!(wr.target, Target::Datagram(_));
        let op_fits = match self.kind() {
            QpType::Ud => datagram && matches!(wr.op, SendOp::Send | SendOp::SendImm),
            QpType::Uc => !datagram && !wr.op.needs_answer(),
            QpType::XrcRecv => false, // a target sends nothing
            _ => !datagram,
        };
        let list_fits = wr.sges.len() <= self.caps.max_send_sge as usize;
        let mut inline_fits = true;
        if wr.flags.contains(SendFlags::INLINE) {
            let len: u64 = wr.sges.iter().map(|sge| u64::from(sge.length)).sum();
            let room = if wr.op == SendOp::AtomicWrite { 8 } else { self.caps.max_inline_data };
            inline_fits = len <= u64::from(room) && !wr.op.writes_locally();
        }
        if op_fits && list_fits && inline_fits { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Nothing is ahead: runs the request from the caller's own lists and only remembers it if it cannot finish.
    #[inline(always)]
    fn post_idle(self: &Arc<Self>, side: &mut SendSide, wr: &SendWr<'_>) {
        let SendSide { route, progress, .. } = side;
        match self.run(route, progress, &wr.request) {
            Outcome::Done { status, byte_len } => {
                side.queue.posted = side.queue.posted.wrapping_add(1);
                self.finish(side, wr.wr_id, wr.request.op, wr.request.flags, status, byte_len);
                if status != WcStatus::Success {
                    self.run_queue(side, false);
                }
            }
            waits => {
                side.queue.push(wr);
                self.stalled(side, waits, false);
            }
        }
    }

    /// Runs one request as far as it gets.
    #[inline(always)]
    fn run(&self, route: &mut Route, progress: &mut Progress, request: &Request<'_>) -> Outcome {
        if request.srqn != 0 {
            route.aim(request.srqn);
        }
        if !route.knows(&request.target) {
            self.look_for_peer(route, &request.target);
        }
        let Some(path) = route.find(&request.target) else {
            return self.run_elsewhere(route, request, progress);
        };
        let context = self.context();
        let local = LocalTable::new(&context.mrs, self.pd.id);
        let (qpn, client, gid) = (self.qpn(), context.id(), context.gid());
        let (peer, mut memory) = path.bind(&context.conn, qpn);
        let env = Env { local, peer: Some(peer), memory: &mut memory, qpn, client, gid, budget: BUDGET };
        match execute(request, progress, env) {
            done @ Outcome::Done { status: WcStatus::Success, .. } => done,
            other => self.told(other, request),
        }
    }

    /// What the sender is told. Of an unreliable connection: whatever befell the message on its way, it was sent. A request
    /// about our own keys is none of the executor's, and is carried out here.
    #[cold]
    fn told(&self, outcome: Outcome, request: &Request<'_>) -> Outcome {
        if let Some(status) = self.run_own(request) {
            return Outcome::Done { status, byte_len: 0 };
        }
        use WcStatus::{LocLenErr, LocProtErr, LocQpOpErr};
        match outcome {
            Outcome::Again | Outcome::Done { status: LocProtErr | LocLenErr | LocQpOpErr, .. } => outcome,
            _ if self.kind() != QpType::Uc => outcome,
            _ => {
                let byte_len = request.sges.iter().map(|sge| sge.length).sum();
                Outcome::Done { status: WcStatus::Success, byte_len }
            }
        }
    }

    #[cold]
    pub(super) fn look_for_peer(&self, route: &mut Route, target: &Target) {
        // A peer that was not there and will be announced is not asked for each time.
        if !route.is_announced(target) || self.ask_again.swap(false, Ordering::AcqRel) {
            route.resolve(self.context(), self.qpn(), target);
        }
    }

    /// A request about this process's own keys: carried out at once, whoever takes the others.
    #[cold]
    pub(super) fn run_own(&self, request: &Request<'_>) -> Option<WcStatus> {
        let access = Access::from_bits_truncate(request.imm);
        let own = request.target.is_own();
        own.then(|| self.context().windows.run(self, &request.target, access))
    }

    /// The same while the peer is not there, or for a datagram to another host or a group.
    #[cold]
    fn run_elsewhere(&self, route: &mut Route, request: &Request<'_>, progress: &mut Progress) -> Outcome {
        let context = self.context();
        if let Target::Datagram(dest) = &request.target
            && route.is_far(dest)
        {
            return context.links.datagram(context, self.qpn(), self.pd.id, dest, request);
        }
        let local = LocalTable::new(&context.mrs, self.pd.id);
        let (qpn, client, gid) = (self.qpn(), context.id(), context.gid());
        let env = Env { local, peer: None, memory: &mut Nowhere::default(), qpn, client, gid, budget: 0 };
        let outcome = self.told(execute(request, progress, env), request);
        if let Target::Datagram(dest) = request.target
            && dest.dgid.is_multicast()
            && matches!(outcome, Outcome::Done { status: WcStatus::Success, .. })
        {
            return self.send_to_group(route, request, dest, outcome);
        }
        outcome
    }

    /// Delivers a datagram to every member of its group, as if it had been sent to each. Returns `sent`, unless the router has no
    /// room for what goes to other hosts.
    fn send_to_group(
        &self,
        route: &mut Route,
        request: &Request<'_>,
        group: UdDest,
        sent: Outcome,
    ) -> Outcome {
        let context = self.context();
        let (own, client, gid) = (self.qpn(), context.id(), context.gid());
        let members = context.groups.members(context, group.dgid);
        // First: it may have to be tried again, and must not come twice.
        if members.last().is_some_and(|(_, last)| *last == MULTICAST_QPN)
            && context.links.datagram(context, own, self.pd.id, &group, request) == Outcome::Again
        {
            return Outcome::Again;
        }
        for (dgid, qpn) in members.iter().copied().filter(|(_, qpn)| *qpn != MULTICAST_QPN) {
            let member = Target::Datagram(UdDest { dgid, qpn, ..group });
            if !route.knows(&member) {
                route.resolve(context, own, &member);
            }
            let Some(path) = route.find(&member) else { continue };
            let (peer, mut memory) = path.bind(&context.conn, own);
            let local = LocalTable::new(&context.mrs, self.pd.id);
            let env =
                Env { local, peer: Some(peer), memory: &mut memory, qpn: own, client, gid, budget: BUDGET };
            let request = Request { target: Target::Datagram(UdDest { qpn, ..group }), ..*request };
            // Delivered or lost: a sender of datagrams is not told.
            let _ = execute(&request, &mut Progress::default(), env);
        }
        sent
    }

    /// Moves the queue on. Returns what its head waits for.
    pub(crate) fn progress(self: &Arc<Self>, sleeping: bool) -> Stall {
        let mut side = self.send.lock();
        self.run_queue(&mut side, sleeping);
        let stall = side.stall;
        self.unlock_and_list(side);
        stall
    }

    /// The same, unless another thread is at it.
    pub(crate) fn try_progress(self: &Arc<Self>) -> Stall {
        let Some(mut side) = self.send.try_lock() else { return Stall::More };
        self.run_queue(&mut side, false);
        let stall = side.stall;
        self.unlock_and_list(side);
        stall
    }

    fn run_queue(self: &Arc<Self>, side: &mut SendSide, sleeping: bool) {
        if std::mem::take(&mut side.route.far_peer) && !side.is_link() {
            // Refused: the router is gone, and the request waits as for a peer that is not there.
            let _ = self.attach_link(side);
        }
        if side.is_link() {
            return self.run_link(side);
        }
        loop {
            let SendSide { queue, route, progress, .. } = side;
            let Some(SendWr { wr_id, request }) = queue.head() else { break };
            let (op, flags) = (request.op, request.flags);
            let begun = *progress != Progress::default();
            match self.state() {
                QpState::Sqd if !begun => break,
                QpState::Rts | QpState::Sqd => match self.run(route, progress, &request) {
                    Outcome::Done { status, byte_len } => {
                        self.finish(side, wr_id, op, flags, status, byte_len)
                    }
                    waits => match self.stalled(side, waits, sleeping) {
                        Some(status) => self.finish(side, wr_id, op, flags, status, 0),
                        None => return,
                    },
                },
                QpState::Err | QpState::Sqe => self.finish(side, wr_id, op, flags, WcStatus::WrFlushErr, 0),
                _ => break,
            }
        }
        side.stall = Stall::None;
        if std::mem::take(&mut side.tell_drained) && self.state() == QpState::Sqd {
            self.push(AsyncKind::SqDrained);
        }
    }

    /// The head waits: until when? Some: it has waited long enough and ends with that status.
    fn stalled(&self, side: &mut SendSide, waits: Outcome, sleeping: bool) -> Option<WcStatus> {
        let before = std::mem::replace(&mut side.stall, Stall::More);
        match waits {
            Outcome::Done { .. } | Outcome::Again => None,
            Outcome::Later => {
                side.stall = Stall::Later;
                None
            }
            Outcome::Rnr => {
                let deadline = match before {
                    Stall::Rnr { deadline } => deadline,
                    _ => self.rnr_deadline(side),
                };
                side.stall = Stall::Rnr { deadline };
                if expired(deadline) {
                    return Some(WcStatus::RnrRetryExcErr);
                }
                if sleeping && self.ask_to_be_told(side) {
                    side.stall = Stall::More; // one was posted meanwhile
                }
                None
            }
            Outcome::Full => {
                side.stall = Stall::Rnr { deadline: None };
                if sleeping && self.ask_to_be_told(side) {
                    side.stall = Stall::More;
                }
                None
            }
            Outcome::Absent => {
                let deadline = match before {
                    Stall::Absent { deadline } => deadline,
                    _ => side.patience.retry_deadline(),
                };
                side.stall = Stall::Absent { deadline };
                expired(deadline).then_some(WcStatus::RetryExcErr)
            }
        }
    }

    /// Leaves word with the peer that a send waits. True: there is a receive after all.
    fn ask_to_be_told(&self, side: &mut SendSide) -> bool {
        let Some(path) = side.route.find(&Target::Receive) else { return false };
        path.bind(&self.context().conn, self.qpn()).0.wait_for_receive()
    }

    fn rnr_deadline(&self, side: &mut SendSide) -> Option<Instant> {
        let rnr_retry = side.patience.rnr_retry;
        if rnr_retry == RNR_FOREVER {
            return None;
        }
        let timer = side
            .route
            .find(&Target::Receive)
            .map_or(0, |path| path.peer.qp[0].rnr_timer.load(Ordering::Relaxed));
        let wait = Duration::from_micros(rnr_timer_us(timer)) * u32::from(rnr_retry);
        Some(Instant::now() + wait)
    }

    /// The head of the queue ends early: the receive it was filling is the peer's again.
    #[cold]
    pub(super) fn give_up(&self, side: &mut SendSide) {
        let SendSide { route, progress, .. } = side;
        let (context, qpn) = (self.context(), self.qpn());
        if let Some(path) = route.find(&Target::Receive) {
            let (peer, mut memory) = path.bind(&context.conn, qpn);
            abandon(progress, peer, &mut memory, qpn, context.id());
        }
    }

    /// The head of the queue ended.
    #[inline(always)]
    pub(super) fn finish(
        &self,
        side: &mut SendSide,
        wr_id: u64,
        op: SendOp,
        flags: SendFlags,
        status: WcStatus,
        byte_len: u32,
    ) {
        if side.progress.claim.is_some() {
            self.give_up(side);
        }
        side.queue.next = side.queue.next.wrapping_add(1);
        side.progress = Progress::default();
        side.stall = Stall::None;
        let ok = status == WcStatus::Success;
        let wanted = self.sq_sig_all || flags.contains(SendFlags::SIGNALED) || !ok;
        // Before the completion is there: who polls it finds the queue pair in that state.
        let failed = !ok && status != WcStatus::WrFlushErr && self.send_failed();
        self.lanes.send.finish(wr_id, op, status, byte_len, wanted);
        if ok {
            QpShared::count(&self.lanes.shared[0].tx_bytes, u64::from(byte_len));
        }
        if failed {
            self.stop_receiving(side.route.dest);
        }
        // Who sleeps was woken by the router for what it carried out.
        if wanted && !(ok && side.is_link()) {
            self.send_cq.sent(!ok);
        }
    }

    /// A send ends in error: a reliable QP goes to ERR, the send queue of another to SQE. True: the former, just now.
    #[cold]
    fn send_failed(&self) -> bool {
        QpShared::count(&self.lanes.shared[0].errors, 1);
        let lives = |now| !matches!(now, QpState::Err | QpState::Reset);
        if matches!(self.kind(), QpType::Ud | QpType::Uc) {
            self.lanes.change_state(QpState::Sqe, |now| now == QpState::Rts);
            return false;
        }
        // Set first: whoever hears of the peer's death from now on tells the program.
        self.send_failed.store(true, Ordering::Release);
        let failed = self.lanes.change_state(QpState::Err, lives);
        if !failed {
            self.send_failed.store(false, Ordering::Release); // it failed before, for a reason of its own
        }
        failed
    }

    /// Releases the lock, then puts a queue that has come to wait on the list.
    #[inline(always)]
    fn unlock_and_list(self: &Arc<Self>, mut side: Guard<'_, SendSide>) {
        let list = side.stall != Stall::None && !std::mem::replace(&mut side.listed, true);
        drop(side);
        if list {
            self.list();
        }
    }

    #[cold]
    fn list(self: &Arc<Self>) {
        self.context().stalled.add(self);
        self.context().helper.watch();
    }

    /// The list's question: may the queue be taken off?
    pub(crate) fn unlist_if_idle(&self) -> bool {
        let mut side = self.send.lock();
        if side.stall == Stall::None {
            side.listed = false;
        }
        !side.listed
    }
}

impl Patience {
    fn retry_deadline(self) -> Option<Instant> {
        let timeout = ack_timeout_us(u32::from(self.timeout))?;
        Some(Instant::now() + Duration::from_micros(timeout) * (u32::from(self.retry_cnt) + 1))
    }
}

fn expired(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|at| Instant::now() >= at)
}

/// The memory of a peer that is not there.
#[derive(Default)]
struct Nowhere(crate::exec::Retired);

impl crate::exec::PeerMemory for Nowhere {
    fn retired(&self) -> &crate::exec::Retired {
        &self.0
    }

    fn reach(&mut self, _: &crate::ring::MrEntry, _: u32, _: u64, len: u64) -> crate::exec::Reach {
        crate::exec::Reach::Far(len)
    }

    fn far(&mut self, _: crate::exec::FarCopy) -> Result<(), Errno> {
        Err(Errno::HOSTUNREACH)
    }

    fn bell(&mut self) {}

    fn limit(&mut self) {}

    fn is_reliable(&self) -> bool {
        true
    }

    fn fault(&mut self) {}
}

const _: () = assert!(limits::INLINE as u64 <= BUDGET && limits::MTU as u64 <= BUDGET);
