//! What does not end within its call: requests in a queue pair's hands, and long copies.
//!
//! Each counts at its endpoint from start to end, which flushes wait for. Cancelling closes the queue pair, so that nothing is
//! written to anybody's memory afterwards.

use std::ffi::c_void;
use std::sync::Arc;

use freeflow_core::client::{Mr, SendWr};
use freeflow_core::exec::{Request, Target};
use freeflow_core::shm::Mapping;
use freeflow_core::verbs::{Access, SendFlags, SendOp, Sge, Wc, WcStatus};

use super::atomic::Loop;
use super::owner::Awaited;
use super::{Ep, Mode, SEND_DEPTH};
use crate::iface::{Event, Iface};
use crate::uct::types::{Completion, Status, UnpackCallback};
use crate::wire::{BYE, SEND_HEADER};

/// Bytes of a long copy done at a time.
pub const PORTION: usize = 1 << 20;

/// What to do with a request's result.
pub enum Then {
    Nothing,
    /// Hand the bytes that were read to UCX's function.
    Unpack {
        callback: UnpackCallback,
        arg: *mut c_void,
        len: usize,
    },
    /// Put them there.
    Copy {
        to: *mut u8,
        len: usize,
    },
    /// Store an atomic's result, or try once more.
    Atomic(Loop),
    /// Not the queue pair ends it, but the answer of the memory's owner.
    Answer(Awaited),
}

/// A request in a queue pair's hands.
pub struct Op {
    ep: usize,
    serial: u64,
    pub then: Then,
    /// Null: nobody waits.
    pub comp: *mut Completion,
    pub bounce: Option<Buffer>,
    /// Registered for it alone.
    _keep: Option<Arc<Mr>>,
}

impl Op {
    pub fn new(ep: &Ep, then: Then, comp: *mut Completion, bounce: Option<Buffer>) -> Self {
        Op { ep: ep.number, serial: ep.serial, then, comp, bounce, _keep: None }
    }

    /// Its endpoint, if that is still there.
    pub fn ep<'a>(&self, iface: &'a Iface) -> Option<&'a Ep> {
        iface.ep(self.ep).filter(|ep| ep.serial == self.serial)
    }
}

/// Buffers of our own, in which data waits for a queue pair, and into which peers write answers.
#[derive(Default)]
pub struct Bounce {
    memory: Option<Arc<Mr>>,
    room: usize,
    free: Vec<usize>,
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    index: usize,
    pub at: *mut u8,
    pub lkey: u32,
}

impl Bounce {
    /// For any one call: an atomic may take one for its message, and one for the answer.
    pub fn has_room(&self) -> bool {
        self.memory.is_none() || self.free.len() >= 2
    }

    fn take(&mut self, iface: &Iface) -> Option<Buffer> {
        if self.memory.is_none() {
            let count = SEND_DEPTH as usize;
            self.room = (SEND_HEADER + iface.config.seg_size).next_multiple_of(64);
            let len = (count * self.room) as u64;
            self.memory = Some(iface.md().pd.allocate(len, Access::LOCAL_WRITE | Access::REMOTE_WRITE).ok()?);
            self.free = (0..count).collect();
        }
        let memory = self.memory.as_ref()?;
        let index = self.free.pop()?;
        let at = (memory.addr() as *mut u8).wrapping_add(index * self.room);
        Some(Buffer { index, at, lkey: memory.key() })
    }
}

impl Iface {
    /// A buffer for a segment.
    pub fn buffer(&self) -> Option<Buffer> {
        self.bounce.borrow_mut().take(self)
    }

    pub fn give_back(&self, buffer: Buffer) {
        self.bounce.borrow_mut().free.push(buffer.index);
    }
}

/// A request to be.
pub struct Start<'a> {
    pub op: SendOp,
    pub target: Target,
    pub sges: &'a [Sge],
    pub then: Then,
    pub comp: *mut Completion,
    pub bounce: Option<Buffer>,
    pub keep: Option<Arc<Mr>>,
}

impl Ep {
    /// Hands a request to the queue pair. NO_RESOURCE: nothing happened, and its buffer is free again.
    pub fn start(&self, start: Start<'_>) -> Status {
        let Start { op, target, sges, then, comp, bounce, keep } = start;
        let iface = self.iface();
        let made = Op { _keep: keep, ..Op::new(self, then, comp, bounce) };
        let number = iface.ops.borrow_mut().insert(made);
        if self.post(op, target, sges, number) {
            self.started.set(self.started.get() + 1);
            iface.queued.set(true);
            return Status::INPROGRESS;
        }
        iface.ops.borrow_mut().remove(number);
        if let Some(buffer) = bounce {
            iface.give_back(buffer);
        }
        self.obstacle()
    }

    fn post(&self, op: SendOp, target: Target, sges: &[Sge], number: usize) -> bool {
        let wr_id = Event::Op(number).pack();
        let request = Request { op, flags: SendFlags::SIGNALED, imm: 0, target, srqn: 0, sges };
        self.qp.post_send(&SendWr { wr_id, request }).is_ok()
    }

    /// A request without data or completion, to wake the peer.
    pub fn wake_peer(&self) {
        self.send_unsignaled(&[]);
    }

    /// An inline SEND that nobody waits for. Its place in the queue is free once it is polled, which may be long after it woke
    /// the peer. If there is no room even then, so many are still on their way, and each wakes the peer.
    fn send_unsignaled(&self, sges: &[Sge]) {
        while self.qp.send_room() == 0 && self.iface().take_completions() {}
        let flags = SendFlags::SOLICITED | SendFlags::INLINE;
        let request = Request { op: SendOp::Send, flags, imm: 0, target: Target::Receive, srqn: 0, sges };
        let _ = self.qp.post_send(&SendWr { wr_id: Event::None.pack(), request });
    }

    /// Tells the peer that it may forget us. A peer that does not hear it learns when our process ends.
    pub fn say_bye(&self) {
        match self.mode.get() {
            Mode::Direct => {
                let Some(out) = &mut *self.fifo.borrow_mut() else { return };
                let fifo = out.fifo();
                if out.sender.slot(fifo).is_some() && out.sender.publish(fifo, 0, BYE, None) {
                    self.wake_peer();
                }
            }
            Mode::Queued => {
                let bytes = u64::from(BYE).to_ne_bytes();
                self.send_unsignaled(&[Sge {
                    addr: bytes.as_ptr() as u64,
                    length: bytes.len() as u32,
                    lkey: 0,
                }]);
            }
            _ => {}
        }
    }
}

fn status_of(wc: &Wc) -> Status {
    match WcStatus::try_from(wc.status) {
        Ok(WcStatus::Success) => Status::OK,
        Ok(WcStatus::WrFlushErr) => Status::CANCELED,
        Ok(WcStatus::RetryExcErr | WcStatus::RnrRetryExcErr) => Status::ENDPOINT_TIMEOUT,
        _ => Status::CONNECTION_RESET,
    }
}

/// The queue pair has ended a request.
pub fn completed(iface: &Iface, number: usize, wc: &Wc) {
    let Some(mut op) = iface.ops.borrow_mut().try_remove(number) else { return };
    let ep = op.ep(iface);
    let status = status_of(wc);
    if status == Status::OK {
        if let (Then::Atomic(again), Some(ep), Some(buffer)) = (&mut op.then, ep, op.bounce)
            && let Some((send, target)) = again.next(buffer.at)
        {
            return repeat(ep, op, send, target);
        }
        finish(&op);
    }
    if let Some(buffer) = op.bounce {
        iface.give_back(buffer);
    }
    end(ep, op.comp, status);
    if let Some(ep) = ep.filter(|_| status.is_error() && status != Status::CANCELED) {
        ep.fail(status);
    }
}

/// Puts an atomic's next try into the place of the one before.
fn repeat(ep: &Ep, op: Op, send: SendOp, target: Target) {
    let Some(buffer) = op.bounce else { return };
    let sge = Sge { addr: buffer.at as u64, length: 8, lkey: buffer.lkey };
    let number = ep.iface().ops.borrow_mut().insert(op);
    if !ep.post(send, target, &[sge], number) {
        // Its slot was just polled: the queue has room unless it has failed, and then it flushes.
        ep.fail(Status::CONNECTION_RESET);
    }
}

fn finish(op: &Op) {
    let from = op.bounce.map_or(std::ptr::null_mut(), |buffer| buffer.at);
    match &op.then {
        Then::Nothing | Then::Answer(_) => {}
        // SAFETY: UCX's function and argument; the buffer holds so many bytes.
        Then::Unpack { callback, arg, len } => unsafe { callback(*arg, from.cast(), *len) },
        // SAFETY: UCX keeps the destination until the completion; the buffer holds so many bytes.
        Then::Copy { to, len } => unsafe { to.copy_from_nonoverlapping(from, *len) },
        Then::Atomic(again) => again.store(from),
    }
}

pub fn end(ep: Option<&Ep>, comp: *mut Completion, status: Status) {
    if let Some(ep) = ep {
        ep.ended();
    }
    // SAFETY: UCX's completion, given for this operation, or null.
    unsafe { Completion::done(comp, status) };
}

/// A copy too long for one call.
pub struct Job {
    ep: usize,
    serial: u64,
    from: *const u8,
    to: *mut u8,
    left: usize,
    comp: *mut Completion,
    /// The peer's side of it.
    _keep: Arc<Mapping>,
}

/// Oldest first.
pub type Jobs = std::collections::VecDeque<Job>;

impl Ep {
    /// Copies the rest of a long transfer in portions.
    pub fn copy_later(
        &self,
        from: *const u8,
        to: *mut u8,
        left: usize,
        comp: *mut Completion,
        keep: Arc<Mapping>,
    ) {
        let job = Job { ep: self.number, serial: self.serial, from, to, left, comp, _keep: keep };
        self.iface().jobs.borrow_mut().push_back(job);
        self.iface().work.set(true);
        self.started.set(self.started.get() + 1);
    }
}

/// A portion of the oldest copy. Returns how many ended.
pub fn run_jobs(iface: &Iface) -> u32 {
    let Some(mut job) = iface.jobs.borrow_mut().pop_front() else { return 0 };
    let now = job.left.min(PORTION);
    // SAFETY: UCX keeps its side until the completion, `_keep` the peer's.
    unsafe { std::ptr::copy_nonoverlapping(job.from, job.to, now) };
    job.left -= now;
    (job.from, job.to) = (job.from.wrapping_add(now), job.to.wrapping_add(now));
    if job.left > 0 {
        iface.jobs.borrow_mut().push_front(job);
        return 0;
    }
    let ep = iface.ep(job.ep).filter(|ep| ep.serial == job.serial);
    end(ep, job.comp, Status::OK);
    1
}

/// Ends everything of the endpoint's with `status`; nothing is written to its users' memory afterwards.
pub fn cancel(ep: &Ep, status: Status) {
    ep.qp().close();
    if !matches!(ep.mode.get(), Mode::Failed(_)) {
        if ep.mode.get() == Mode::Asking {
            ep.iface().connecting.set(ep.iface().connecting.get() - 1);
        }
        ep.mode.set(Mode::Failed(status));
    }
    let iface = ep.iface();
    let mut comps = Vec::new();
    // The queue pair is closed: it has let go of all buffers, and its completions go too.
    iface.polled.borrow_mut().retain(|wc| wc.qp_num != ep.qp().qpn());
    iface.ops.borrow_mut().retain(|_, op| {
        let ours = op.ep == ep.number && op.serial == ep.serial;
        if ours {
            comps.push(op.comp);
            iface.bounce.borrow_mut().free.extend(op.bounce.map(|buffer| buffer.index));
        }
        !ours
    });
    iface.jobs.borrow_mut().retain(|job| {
        let ours = job.ep == ep.number && job.serial == ep.serial;
        if ours {
            comps.push(job.comp);
        }
        !ours
    });
    ep.ended.set(ep.started.get());
    let flushes = std::mem::take(&mut *ep.flushes.borrow_mut());
    comps.extend(flushes.into_iter().map(|(_, comp)| comp));
    for comp in comps {
        // SAFETY: UCX's completions, given for these operations, or null.
        unsafe { Completion::done(comp, status) };
    }
}
