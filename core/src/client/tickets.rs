//! The receive side of a QP that takes its receives from a shared queue: tickets, in the order in which messages came, each
//! naming the slot that its message is in.

use std::sync::Arc;

use crate::ring::{Completion, Taken};
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::verbs::{QpState, QpType, Wc};

use super::lanes::Lanes;
use super::qp::Qp;
use super::srq::{Srq, Xrcd};

/// Messages that may arrive between two polls of a QP, at most.
pub const TICKETS: u32 = 128;

/// Where a QP's receives come from.
#[derive(Debug, Clone)]
pub enum Source {
    Queue(Arc<Srq>),
    /// XRC's target: from whichever queue of its domain a request names.
    Domain(Arc<Xrcd>),
}

/// What the owner knows of its tickets; changed under the lock of whoever polls them.
#[derive(Debug)]
pub struct Tickets {
    pub source: Source,
    polled: AtomicU32,
    /// Of the QP in ERR: what was taken in vain is back.
    reclaimed: AtomicBool,
}

impl Tickets {
    pub fn new(source: Source) -> Self {
        Tickets { source, polled: AtomicU32::new(0), reclaimed: AtomicBool::new(false) }
    }

    /// How many tickets a QP gets.
    pub fn depth(source: &Source) -> u32 {
        match source {
            Source::Queue(srq) => srq.depth().min(TICKETS),
            Source::Domain(_) => TICKETS,
        }
    }

    /// Owner, nobody polling: forgets everything.
    pub fn reset(&self, lanes: &Lanes) {
        self.polled.store(0, Ordering::Relaxed);
        self.reclaimed.store(false, Ordering::Relaxed);
        lanes.shared[0].taken.store(0, Ordering::Release);
        if lanes.kind == QpType::Ud {
            // Several senders: they compete for tickets as for receives.
            (0..lanes.recv.ring().depth()).for_each(|number| lanes.recv.ring().post(number, &[]));
        }
    }

    /// The next ticket's number is `next`: senders may use the ones before again.
    fn polled(&self, lanes: &Lanes, next: u32) {
        self.polled.store(next, Ordering::Relaxed);
        let ring = lanes.recv.ring();
        if lanes.kind == QpType::Ud {
            return ring.post(next.wrapping_sub(1).wrapping_add(ring.depth()), &[]);
        }
        // A few at a time: the line is the sender's to read.
        if next.is_multiple_of((ring.depth() / 4).max(1)) {
            lanes.shared[0].polled(next);
            lanes.qp.upgrade().inspect(|qp| qp.tell_waiting_sender());
        }
    }

    /// The queue's CQ takes the QP's completions no more: those that wait are gone, and their receives free.
    pub fn discard(&self, lanes: &Lanes, queues: &[Arc<Srq>]) {
        let of = |number: u32| match &self.source {
            Source::Queue(srq) => Some(Arc::clone(srq)),
            Source::Domain(_) => queues.iter().find(|srq| srq.number() == number).cloned(),
        };
        let ring = lanes.recv.ring();
        let mut number = self.polled.load(Ordering::Relaxed);
        while let Some(Taken::Done(said, _)) = ring.take(number, false, false) {
            if said.flags & Completion::LOST == 0
                && let Some(srq) = of(said.src_qp)
                && srq.taken_by(said.slot, lanes.taker()).is_some()
            {
                srq.free(said.slot);
            }
            number = number.wrapping_add(1);
        }
        match &self.source {
            Source::Queue(srq) => srq.reclaim(lanes.qpn()),
            Source::Domain(_) => queues.iter().for_each(|srq| srq.reclaim(lanes.qpn())),
        }
    }
}

impl Lanes {
    /// Who takes receives for this QP: it, or for datagrams any client.
    fn taker(&self) -> Option<u32> {
        (self.kind != QpType::Ud).then(|| self.qpn())
    }

    /// CQ: takes the next receive completion of a QP with tickets; and the number of the queue it is of. `find` knows the
    /// queues there are.
    pub fn poll_tickets<'s>(
        &self,
        tickets: &Tickets,
        find: impl Fn(u32) -> Option<&'s Srq>,
    ) -> Option<(u32, Wc)> {
        loop {
            let number = tickets.polled.load(Ordering::Relaxed);
            let ring = self.recv.ring();
            let Some(Taken::Done(said, payload)) = ring.take(number, false, false) else {
                self.reclaim_after_error(tickets);
                return None;
            };
            let srq = find(said.src_qp);
            if said.flags & Completion::LOST != 0 {
                let died = ring.claimant(number);
                tickets.polled(self, number.wrapping_add(1));
                srq.inspect(|srq| srq.reclaim_one(said.byte_len, died));
                continue;
            }
            let taken = srq.and_then(|srq| Some((srq, srq.taken_by(said.slot, self.taker())?)));
            let Some((srq, private)) = taken else {
                // A ticket for nothing: this connection is at fault.
                tickets.polled(self, number.wrapping_add(1));
                self.qp.upgrade().inspect(|qp| _ = qp.enter_error());
                continue;
            };
            if said.flags & Completion::RETURNED != 0 {
                tickets.polled(self, number.wrapping_add(1));
                srq.post_anew(said.slot);
                continue;
            }
            let mut wc = Wc { qp_num: self.qpn(), ..Wc::default() };
            private.receive(&said, &payload, &srq.table(), &mut wc);
            tickets.polled(self, number.wrapping_add(1));
            srq.free(said.slot);
            self.arrived(&mut wc);
            return Some((srq.number(), wc));
        }
    }

    /// In ERR, when nobody sends any more and all that came was polled: what was taken and never filled goes back.
    fn reclaim_after_error(&self, tickets: &Tickets) {
        let over = self.state() == QpState::Err && self.deserted.load(Ordering::Acquire);
        if !over || tickets.reclaimed.swap(true, Ordering::Relaxed) {
            return;
        }
        // XRC: which queue its sender had at hand nobody knows; resetting or destroying the QP asks them all.
        if let Source::Queue(srq) = &tickets.source {
            srq.reclaim(self.qpn());
        }
    }
}

impl Qp {
    /// A receive or ticket is there: tells the peer's sender if it sleeps for want of one.
    pub(super) fn tell_waiting_sender(&self) {
        if self.shared_header().receive_posted() {
            let dest = self.destination();
            self.tell_sender(dest);
        }
    }

    /// Nobody polls the QP's tickets any more, or is kept from it by the caller: its receives go back to where they came from.
    pub(super) fn give_receives_back(&self) {
        let Some(tickets) = &self.lanes().tickets else { return };
        match &tickets.source {
            Source::Queue(_) => tickets.discard(self.lanes(), &[]),
            Source::Domain(domain) => domain.paused(|queues| tickets.discard(self.lanes(), queues)),
        }
    }
}
