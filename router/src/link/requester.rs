//! The sending half of a queue pair: which requests are out, which come next, which are done.
//!
//! A state machine: time and messages come in, the next piece to send comes out. Requests are numbered; they are kept
//! until the other host has carried them out, so that after a lost connection, or a receiver that was not ready, they go out
//! again from there, under a new *epoch* that tells the pieces of one attempt from those of another. Their bytes stay where
//! they are. It must never know memory, sockets or other queue pairs.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use freeflow_core::exec::Target;
use freeflow_core::verbs::{SendFlags, SendOp, Sge, WcStatus, ack_timeout_us, rnr_timer_us};

/// Requests kept per queue pair; more wait in its ring.
pub const WINDOW: usize = 128;
/// READs and atomics under way per queue pair, at most.
pub const MAX_READS: usize = 16;
/// A silence shorter than this is not held against another host, whatever a queue pair's timeout is.
pub const LEAST_SILENCE: Duration = Duration::from_millis(200);
/// So long a message of an unreliable connection waits for another host to be reached before it is lost.
const FIRST_CONTACT: Duration = Duration::from_secs(1);
/// rnr_retry value that means for ever.
const RNR_FOREVER: u8 = 7;

/// Where a request's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the process's memory.
    List(Vec<Sge>),
    /// They came along.
    Payload(Box<[u8]>),
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wr {
    pub op: SendOp,
    pub flags: SendFlags,
    pub imm: u32,
    pub target: Target,
    pub source: Source,
    /// XRC: the shared receive queue that it is for.
    pub srqn: u32,
    pub total: u32,
    /// Its success wakes nobody.
    pub quiet: bool,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    /// It cannot be carried out, whatever the other side says.
    pub bad: Option<WcStatus>,
}

#[derive(Debug)]
struct Out {
    wr: Wr,
    /// READ, atomic: bytes of the answer that came, and whether that is all.
    answered: u32,
    complete: bool,
}

impl Out {
    fn is_answered(&self) -> bool {
        self.complete || !self.wr.op.writes_locally()
    }
}

/// May requests go out?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Not before the other host has answered an Open.
    Shut,
    /// The other host has no such queue pair (yet).
    Absent,
    Open,
}

/// A piece to send.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub wr: &'a Wr,
    pub seq: u32,
    pub epoch: u32,
    pub offset: u32,
    pub len: u32,
}

/// The other host said something that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonsense;

/// See the module.
#[derive(Debug)]
pub struct Requester {
    /// Of RC. A message of UC that cannot be delivered is lost, and ends as if it had been.
    reliable: bool,
    /// Not done, oldest first: `first`, `first + 1`, ...
    queue: VecDeque<Out>,
    first: u32,
    /// The request to send next, and how much of it went out.
    next: u32,
    offset: u32,
    /// No piece of this request or one after it ever went out.
    reach: u32,
    /// READs and atomics before `next` that are not answered.
    reads: usize,
    /// The other host carried out everything before.
    executed: u32,
    /// The oldest epoch of this connection, and the present one.
    birth: u32,
    epoch: u32,
    door: Door,
    /// No receive was ready: not before then.
    not_before: Option<Instant>,
    /// The request that met no receive, and how often it may still.
    rnr: Option<(u32, u8)>,
    /// How a request ended, that is told when all before it are done.
    nak: Option<(u32, WcStatus)>,
    /// Since when the oldest request waits.
    waits_since: Option<Instant>,
    failed: Option<WcStatus>,
    /// Something ended that somebody may sleep for.
    loud: bool,
}

fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

impl Requester {
    /// `epoch` is random: nothing of an earlier connection of the same numbers fits.
    pub fn new(epoch: u32, reliable: bool) -> Self {
        Requester {
            reliable,
            queue: VecDeque::new(),
            first: 0,
            next: 0,
            offset: 0,
            reach: 0,
            reads: 0,
            executed: 0,
            birth: epoch,
            epoch,
            door: Door::Shut,
            not_before: None,
            rnr: None,
            nak: None,
            waits_since: None,
            failed: None,
            loud: false,
        }
    }

    /// Did something end, since the last call, that somebody may sleep for?
    pub fn take_loud(&mut self) -> bool {
        std::mem::take(&mut self.loud)
    }

    pub fn room(&self) -> usize {
        if self.failed.is_some() { 0 } else { WINDOW.saturating_sub(self.queue.len()) }
    }

    /// Requests that ended well.
    pub fn done(&self) -> u32 {
        self.first
    }

    /// How the request after those ended, once all is over.
    pub fn failure(&self) -> Option<WcStatus> {
        self.failed
    }

    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Nothing of it is on its way: the next request may take another way.
    pub fn is_quiet(&self) -> bool {
        self.first == self.next && self.offset == 0
    }

    pub fn is_absent(&self) -> bool {
        self.door == Door::Absent
    }

    pub fn is_open(&self) -> bool {
        self.door == Door::Open
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    pub fn push(&mut self, wr: Wr, now: Instant) {
        if self.queue.is_empty() {
            self.waits_since = Some(now);
        }
        self.queue.push_back(Out { wr, answered: 0, complete: false });
        if self.door == Door::Absent && !self.reliable {
            self.lose();
        }
    }

    fn at(&self, seq: u32) -> Option<&Out> {
        self.queue.get(seq.wrapping_sub(self.first) as usize)
    }

    /// The request whose turn it is, unless it must wait.
    pub fn upcoming(&self, now: Instant) -> Option<&Wr> {
        let barred = self.door != Door::Open || self.failed.is_some() || self.nak.is_some();
        if barred || self.not_before.is_some_and(|then| now < then) {
            return None;
        }
        let wr = &self.at(self.next)?.wr;
        let fenced = wr.flags.contains(SendFlags::FENCE) && self.reads > 0;
        let crowded = wr.op.writes_locally() && self.reads >= MAX_READS;
        (!fenced && !crowded).then_some(wr)
    }

    /// The next piece, of at most `most` bytes; it counts as sent.
    pub fn piece(&mut self, most: u32, now: Instant) -> Option<Piece<'_>> {
        self.upcoming(now)?;
        self.not_before = None;
        let (seq, epoch, offset) = (self.next, self.epoch, self.offset);
        let index = seq.wrapping_sub(self.first) as usize;
        let wr = &self.queue.get(index)?.wr;
        let reads = wr.op.writes_locally();
        let len = if reads { 0 } else { (wr.total - offset).min(most) };
        if before(self.reach, seq.wrapping_add(1)) {
            self.reach = seq.wrapping_add(1);
        }
        if reads || offset + len == wr.total {
            self.next = seq.wrapping_add(1);
            self.offset = 0;
            self.reads += usize::from(reads);
        } else {
            self.offset = offset + len;
        }
        Some(Piece { wr, seq, epoch, offset, len })
    }

    /// The next request cannot be sent, for a reason of its own.
    pub fn fail_locally(&mut self, seq: u32, status: WcStatus) {
        self.nak = Some((seq, status));
        self.settle();
    }

    /// Is an answer with this epoch one to this connection?
    fn ours(&self, epoch: u32) -> bool {
        epoch.wrapping_sub(self.birth) <= self.epoch.wrapping_sub(self.birth)
    }

    fn acknowledge(&mut self, count: u32, now: Instant) -> Result<(), Nonsense> {
        if before(self.reach, count) {
            return Err(Nonsense);
        }
        if before(self.executed, count) {
            self.executed = count;
            self.rnr = None;
            self.waits_since = Some(now);
        }
        Ok(())
    }

    /// All requests before `count` were carried out.
    pub fn on_ack(&mut self, count: u32, epoch: u32, now: Instant) -> Result<(), Nonsense> {
        if !self.ours(epoch) {
            return Ok(());
        }
        self.acknowledge(count, now)?;
        self.settle();
        Ok(())
    }

    pub fn on_nak(&mut self, seq: u32, status: WcStatus, epoch: u32, now: Instant) -> Result<(), Nonsense> {
        if !self.ours(epoch) {
            return Ok(());
        }
        self.acknowledge(seq, now)?;
        self.nak.get_or_insert((seq, status));
        self.settle();
        Ok(())
    }

    /// Request `seq` met no receive, which `counts` as a retry unless the receiver is only slow; `timer` is the receiver's,
    /// encoded.
    pub fn on_rnr(
        &mut self,
        seq: u32,
        timer: u32,
        counts: bool,
        epoch: u32,
        now: Instant,
    ) -> Result<(), Nonsense> {
        if epoch != self.epoch {
            return Ok(());
        }
        self.acknowledge(seq, now)?;
        let retries = self.at(seq).ok_or(Nonsense)?.wr.rnr_retry;
        if counts && !self.may_retry(seq, retries) {
            self.nak = Some((seq, WcStatus::RnrRetryExcErr));
            self.settle();
            return Ok(());
        }
        self.not_before = Some(now + Duration::from_micros(rnr_timer_us(timer)));
        self.go_back(seq);
        self.settle();
        Ok(())
    }

    /// Counts a retry of request `seq`, of which there may be so many.
    fn may_retry(&mut self, seq: u32, retries: u8) -> bool {
        let left = match self.rnr {
            Some((again, left)) if again == seq => left,
            _ => retries,
        };
        self.rnr = Some((seq, left.saturating_sub(1)));
        retries == RNR_FOREVER || left > 0
    }

    /// The READ that an answer of `len` bytes at `offset` belongs to. The bytes must follow those that came before.
    pub fn reading(&self, seq: u32, offset: u32, len: u32, epoch: u32) -> Option<&Wr> {
        let sent = self.ours(epoch) && before(seq, self.next);
        let out = self.at(seq).filter(|_| sent && !before(seq, self.first))?;
        let fits = out.answered == offset && len <= out.wr.total - offset;
        (out.wr.op == SendOp::Read && fits).then_some(&out.wr)
    }

    /// The atomic that an answer belongs to.
    pub fn awaiting(&self, seq: u32, epoch: u32) -> Option<&Wr> {
        let sent = self.ours(epoch) && before(seq, self.next) && !before(seq, self.first);
        let out = self.at(seq).filter(|_| sent)?;
        (out.wr.op.is_atomic() && out.answered == 0).then_some(&out.wr)
    }

    /// `len` bytes of the answer to `seq` are in place.
    pub fn on_answer(&mut self, seq: u32, len: u32, now: Instant) {
        let index = seq.wrapping_sub(self.first) as usize;
        let Some(out) = self.queue.get_mut(index) else { return };
        out.answered = out.answered.saturating_add(len).min(out.wr.total);
        self.waits_since = Some(now);
        if out.answered == out.wr.total && !std::mem::replace(&mut out.complete, true) {
            self.reads = self.reads.saturating_sub(1);
            self.settle();
        }
    }

    /// The answer to `seq` could not be put where it belongs.
    pub fn on_bad_answer(&mut self, seq: u32, status: WcStatus) {
        self.nak = Some((seq, status));
        self.settle();
    }

    /// Sends again from `seq` on.
    fn go_back(&mut self, seq: u32) {
        self.epoch = self.epoch.wrapping_add(1);
        self.rewind(seq);
    }

    fn rewind(&mut self, seq: u32) {
        self.next = seq;
        self.offset = 0;
        let sent = seq.wrapping_sub(self.first) as usize;
        let open = |out: &&Out| out.wr.op.writes_locally() && !out.is_answered();
        self.reads = self.queue.iter().take(sent).filter(open).count();
    }

    /// Takes what is done off the queue.
    fn settle(&mut self) {
        while let Some(out) = self.queue.front() {
            if self.nak.is_some_and(|(seq, _)| seq == self.first) {
                break;
            }
            if !before(self.first, self.executed) || !out.is_answered() {
                break;
            }
            self.loud |= !out.wr.quiet;
            self.queue.pop_front();
            self.first = self.first.wrapping_add(1);
        }
        if before(self.next, self.first) {
            self.next = self.first;
            self.offset = 0;
        }
        if self.queue.is_empty() {
            self.waits_since = None;
        }
        if let Some((_, status)) = self.nak.filter(|(seq, _)| *seq == self.first) {
            self.fail(status);
        }
    }

    /// The oldest request ends in `status`, and nothing after it is carried out.
    pub fn fail(&mut self, status: WcStatus) {
        if self.failed.is_none() {
            self.failed = Some(status);
            self.loud = true;
            self.queue.clear();
            self.waits_since = None;
        }
    }

    /// The other side is silent, or gone.
    pub fn give_up(&mut self) {
        if self.reliable { self.fail(WcStatus::RetryExcErr) } else { self.lose() }
    }

    /// All requests count as sent.
    fn lose(&mut self) {
        self.loud |= self.queue.iter().any(|out| !out.wr.quiet);
        self.first = self.first.wrapping_add(self.queue.len() as u32);
        self.queue.clear();
        (self.next, self.executed, self.reach, self.offset) = (self.first, self.first, self.first, 0);
        (self.waits_since, self.not_before, self.rnr) = (None, None, None);
    }

    /// The queue goes on after a failure, with new requests. The other side must be opened to.
    pub fn restart(&mut self) {
        let lost = self.next.wrapping_add(1);
        (self.failed, self.nak) = (None, None);
        (self.first, self.next, self.executed, self.reach, self.offset) = (lost, lost, lost, lost, 0);
        self.door = Door::Shut;
    }

    // ---- the door

    /// The connection is lost, or a new one is there: an Open must be answered first. What it says: the oldest request
    /// that may come, and the epoch.
    pub fn reopen(&mut self) -> (u32, u32) {
        self.door = Door::Shut;
        self.epoch = self.epoch.wrapping_add(1);
        (self.first, self.epoch)
    }

    /// The other host knows the queue pair, and has carried out everything before `expected`.
    pub fn on_opened(&mut self, expected: u32, epoch: u32, now: Instant) -> Result<(), Nonsense> {
        if epoch != self.epoch || self.door == Door::Open {
            return Ok(());
        }
        // It may have carried out what it could not acknowledge.
        if before(expected, self.executed) || before(self.reach, expected) {
            return Err(Nonsense);
        }
        self.executed = expected;
        self.door = Door::Open;
        self.not_before = None;
        self.waits_since = (!self.queue.is_empty()).then_some(now);
        self.settle();
        // READs and atomics whose answers were lost are asked again.
        let unanswered = self.queue.iter().position(|out| !out.is_answered());
        let resume = unanswered.map_or(expected, |at| self.first.wrapping_add(at as u32));
        let resume = if before(resume, expected) { resume } else { expected };
        self.queue.iter_mut().filter(|out| !out.is_answered()).for_each(|out| out.answered = 0);
        self.rewind(resume);
        Ok(())
    }

    /// There is no such queue pair, says an answer to what went out under `epoch`.
    pub fn on_absent(&mut self, epoch: u32, now: Instant) {
        if epoch == self.epoch && self.door != Door::Absent {
            self.door = Door::Absent;
            self.waits_since = (!self.queue.is_empty()).then_some(now);
            if !self.reliable {
                self.lose();
            }
        }
    }

    // ---- time

    /// When the oldest request fails, if the other side was last heard at `heard`. None: it does not.
    pub fn deadline(&self, heard: Instant) -> Option<Instant> {
        let wr = &self.queue.front()?.wr;
        let waits = self.waits_since?;
        if !self.reliable {
            let patience = if self.door == Door::Open { LEAST_SILENCE } else { FIRST_CONTACT };
            return Some(waits.max(heard) + patience);
        }
        let each = Duration::from_micros(ack_timeout_us(u32::from(wr.timeout))?);
        let all = each * (u32::from(wr.retry_cnt) + 1);
        match self.door {
            // It is the queue pair that is silent.
            Door::Absent => Some(waits + all),
            // While the host is heard, its queue pair takes its time.
            Door::Open | Door::Shut => Some(waits.max(heard) + all.max(LEAST_SILENCE)),
        }
    }

    /// When something can be sent again.
    pub fn wakes(&self) -> Option<Instant> {
        self.not_before.filter(|_| self.door == Door::Open && self.failed.is_none())
    }
}
