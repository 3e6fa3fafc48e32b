//! The receiving half of a queue pair: which piece may be carried out, which is an old one, what is owed in answer.
//!
//! A state machine, as its other half. Each request is carried out once: after a lost connection pieces of requests that
//! were carried out come again, and are only answered. It must never know memory or sockets.

use std::collections::VecDeque;

use freeflow_core::exec::Progress;
use freeflow_core::verbs::SendOp;

use super::requester::MAX_READS;
use super::wire::Header;

/// 0.64 ms, as RNR timers are encoded.
const RARELY: u32 = 12;

/// What to do with a piece of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Execute,
    /// It was carried out; its answer is due again.
    Again,
    /// Of an attempt that is over.
    Discard,
    /// No honest host sends this.
    Nonsense,
}

/// A READ to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingRead {
    pub seq: u32,
    pub addr: u64,
    pub rkey: u32,
    pub srqn: u32,
    pub total: u32,
    pub sent: u32,
}

impl PendingRead {
    pub fn of(header: &Header) -> Self {
        let Header { seq, addr, rkey, srqn, total, .. } = *header;
        PendingRead { seq, addr, rkey, srqn, total, sent: 0 }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Responder {
    /// The request that comes next, or is coming.
    expected: u32,
    epoch: u32,
    /// Random per connection of the other end.
    incarnation: Option<u64>,
    /// Bytes of the present request that came, and what the executor knows of it.
    pub came: u32,
    pub progress: Progress,
    /// XRC: the shared receive queue that it is for.
    pub srqn: u32,
    /// What comes of the present message is for nobody (UC).
    pub lost: bool,
    /// No receive was ready: nothing more of this epoch is carried out.
    halted: bool,
    /// How often in a row the receiver's completions had no room.
    busy: u32,
    /// A request failed: nothing more is carried out.
    pub failed: bool,
    atomics: VecDeque<(u32, u64)>,
    pub reads: VecDeque<PendingRead>,
    /// An acknowledgement is due.
    pub ack_due: bool,
}

fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

impl Responder {
    pub fn new() -> Self {
        Responder {
            expected: 0,
            epoch: 0,
            incarnation: None,
            came: 0,
            progress: Progress::default(),
            srqn: 0,
            lost: false,
            halted: false,
            busy: 0,
            failed: false,
            atomics: VecDeque::new(),
            reads: VecDeque::new(),
            ack_due: false,
        }
    }

    pub fn is_open(&self) -> bool {
        self.incarnation.is_some()
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// The other end opens; `header` is its Open. What it had half sent comes again from the start: the caller has given
    /// back what `progress` holds. Requests that it has given up do not come. Returns the request expected next.
    pub fn open(&mut self, header: &Header) -> u32 {
        if self.incarnation != Some(header.a) {
            *self = Responder { expected: header.seq, incarnation: Some(header.a), ..Responder::new() };
        }
        if before(self.expected, header.seq) {
            self.expected = header.seq;
        }
        self.epoch = header.epoch;
        self.halted = false;
        self.came = 0;
        self.lost = false;
        self.progress = Progress::default();
        self.reads.clear();
        self.ack_due = false;
        self.expected
    }

    /// The other end is gone, or the way to it.
    pub fn close(&mut self) {
        self.incarnation = None;
    }

    pub fn judge(&mut self, header: &Header, op: SendOp) -> Verdict {
        if self.incarnation.is_none() || self.failed {
            return Verdict::Discard;
        }
        if header.epoch != self.epoch {
            if !self.halted || header.epoch != self.epoch.wrapping_add(1) {
                return Verdict::Discard;
            }
            self.epoch = header.epoch;
            self.halted = false;
        }
        if self.halted {
            return Verdict::Discard;
        }
        if before(header.seq, self.expected) {
            return Verdict::Again;
        }
        let whole = op.writes_locally();
        let sane = header.seq == self.expected
            && header.offset == self.came
            && header.len <= header.total.saturating_sub(header.offset)
            && (whole || header.len > 0 || header.total == 0)
            && (!whole || (header.len == 0 && header.offset == 0));
        if !sane || (whole && self.reads.len() >= MAX_READS) {
            return Verdict::Nonsense;
        }
        Verdict::Execute
    }

    /// The present request was carried out.
    pub fn executed(&mut self) {
        self.expected = self.expected.wrapping_add(1);
        self.came = 0;
        self.lost = false;
        self.busy = 0;
        self.progress = Progress::default();
        self.ack_due = true;
    }

    /// It met no receive.
    pub fn not_ready(&mut self) {
        self.halted = true;
        self.came = 0;
        self.progress = Progress::default();
    }

    /// Nobody has polled the receiver's completions: when to try again, as RNR timers are encoded. From 10 us on, then less
    /// and less often.
    pub fn busy(&mut self) -> u32 {
        self.busy = (self.busy + 1).min(RARELY);
        self.busy
    }

    /// An atomic was carried out: its result may be asked for again.
    pub fn remember(&mut self, seq: u32, result: u64) {
        if self.atomics.len() == MAX_READS {
            self.atomics.pop_front();
        }
        self.atomics.push_back((seq, result));
    }

    pub fn remembered(&self, seq: u32) -> Option<u64> {
        self.atomics.iter().find(|(known, _)| *known == seq).map(|(_, result)| *result)
    }

    pub fn read(&mut self, header: &Header) {
        if self.reads.len() < MAX_READS * 2 {
            self.reads.push_back(PendingRead::of(header));
        }
    }
}
