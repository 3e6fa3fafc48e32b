//! Shared receive queues: slots that the senders to many QPs take from.
//!
//! The slots and their states are those of [`super::rq`], with three differences. A slot is taken for a QP: the `owner` field
//! of CLAIMED is who took it (the receiving QP's number; for datagrams the sender's client id), so that what a dead sender
//! had taken can be told from the rest. It is not completed in place, but by a *ticket*, a slot of the QP's own ring, which
//! names it by its index: so each QP's completions keep their order whatever the others do, and its CQ looks where it always
//! looks. And slots come back in any order: a receive may be posted past one that is still in use, and takers pass it over.
//!
//! Takers take strictly in order and never put back. What is taken in vain comes back by a ticket that says so
//! ([`Completion::RETURNED`]), and its owner posts it anew.

use super::qp::QpShared;
use super::rq::{Claim, Completion, Phase, RecvSlot, RqShared, SlotState};
use crate::sync::{AtomicU32, Ordering, fence};

/// Shared header of a shared receive queue.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct SrqShared {
    /// Line 0, senders: every receive before this number is taken. Only moves forward.
    head: AtomicU32,
    /// Owner, seldom: tell when fewer receives wait. Whoever tells clears it.
    limit: AtomicU32,
    _pad0: [u32; 14],
    /// Line 1, owner: number of the next receive to post.
    tail: AtomicU32,
    _pad1: [u32; 15],
    /// Line 2, sender, seldom: some QP's sender waits for a receive.
    waiting: AtomicU32,
    _pad2: [u32; 15],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<SrqShared>() == 192);

/// A shared receive queue, wherever it is mapped.
#[derive(Debug, Clone, Copy)]
pub struct SrqRing<'a> {
    pub header: &'a SrqShared,
    pub slots: RqShared<'a>,
}

/// A receive that was taken.
#[derive(Debug, Clone, Copy)]
struct Take<'a> {
    slot: &'a RecvSlot,
    seq: u32,
    sges: u32,
}

/// What became of a wish for a receive.
#[derive(Debug)]
pub enum Ready<'a> {
    Claim(Claim<'a>),
    /// No receive is posted.
    NotReady,
    /// The QP's owner has not polled for so long that its ring is full.
    Full,
}

impl<'a> From<Option<Claim<'a>>> for Ready<'a> {
    #[inline]
    fn from(claim: Option<Claim<'a>>) -> Self {
        claim.map_or(Ready::NotReady, Ready::Claim)
    }
}

impl SrqShared {
    /// Owner: makes the memory of an earlier queue this one's.
    pub fn reset(&self) {
        for word in [&self.head, &self.limit, &self.tail, &self.waiting] {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Owner: tell once when fewer than `limit` receives wait; 0 is never.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
        // Partner: the fence in advance(). Either the taker sees the limit or the owner, which asks below() next, the head.
        fence(Ordering::SeqCst);
    }

    /// The number of the receive that is taken next, or of one before it.
    #[inline]
    pub fn next(&self) -> u32 {
        self.head.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Has the number of waiting receives fallen below the limit? True for one of those who see it.
    #[inline]
    pub fn below(&self) -> bool {
        self.limit.load(Ordering::Relaxed) != 0 && self.is_low() && self.limit.swap(0, Ordering::AcqRel) != 0
    }

    #[cold]
    fn is_low(&self) -> bool {
        let waiting = self.tail.load(Ordering::Acquire).wrapping_sub(self.head.load(Ordering::Acquire));
        waiting < self.limit.load(Ordering::Relaxed)
    }

    /// Sender: a send found no receive; it looks once more afterwards.
    pub fn wait_for_receive(&self) {
        self.waiting.store(1, Ordering::Relaxed);
        // Partner: the fence behind post()'s store.
        fence(Ordering::SeqCst);
    }

    /// Owner, after posting: must waiting senders be told?
    pub fn receive_posted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0 && self.waiting.swap(0, Ordering::AcqRel) != 0
    }

    /// A taker has taken `seq`: no other need look there.
    fn advance(&self, seq: u32) {
        let next = seq.wrapping_add(1);
        let mut head = self.head.load(Ordering::Relaxed);
        while next.wrapping_sub(head).cast_signed() > 0 {
            match self.head.compare_exchange_weak(head, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => {
                    // Partner: the fence in set_limit(); the caller looks at the limit next. The exchange is one itself here.
                    if cfg!(any(not(target_arch = "x86_64"), loom)) {
                        fence(Ordering::SeqCst);
                    }
                    return;
                }
                Err(now) => head = now,
            }
        }
    }
}

fn look(slot: &RecvSlot) -> (u64, SlotState) {
    let word = slot.state_word().load(Ordering::Relaxed);
    (word, SlotState::unpack(word))
}

/// Is it from before receive `seq` was posted?
fn is_older(state: SlotState, seq: u32) -> bool {
    match state.seq.wrapping_sub(seq).cast_signed() {
        0 => !matches!(state.phase, Phase::Posted | Phase::Claimed),
        difference => difference < 0,
    }
}

impl<'a> SrqRing<'a> {
    /// Owner: posts a receive as number `seq`, whose slot is free.
    pub fn post(&self, seq: u32, sges: &[crate::verbs::Sge]) {
        self.slots.post(seq, sges);
        // Release: partner is the acquire load in find(). Who sees this number sees every receive in front of it.
        self.header.tail.store(seq.wrapping_add(1), Ordering::Release);
    }

    /// The oldest receive that waits, and its slot's state word.
    fn find(&self) -> Option<(&'a RecvSlot, u64, SlotState)> {
        let mut seq = self.header.head.load(Ordering::Acquire);
        // Takers that are slow to advance the head, and slots still in use, are passed over: two rounds hold them all.
        for _ in 0..=self.slots.depth().saturating_mul(2) {
            let slot = self.slots.slot(seq)?;
            let (mut word, mut state) = look(slot);
            if is_older(state, seq) {
                // Not posted yet, or still in use and passed over: then something is posted behind it. Acquire: partner is
                // post()'s release store; looked at again, a slot that was posted meanwhile shows it.
                let behind = self.header.tail.load(Ordering::Acquire).wrapping_sub(seq).cast_signed() > 0;
                (word, state) = look(slot);
                if is_older(state, seq) && !behind {
                    return None;
                }
            }
            if state.seq == seq && state.phase == Phase::Posted {
                return Some((slot, word, state));
            }
            seq = seq.wrapping_add(1); // taken by another
        }
        None
    }

    /// Sender: takes the oldest receive.
    fn take(&self, taker: u32, mut intend: impl FnMut(u32)) -> Option<Take<'a>> {
        // A slot that another was faster to take is not found again.
        loop {
            let (slot, word, state) = self.find()?;
            intend(state.seq);
            let claimed = SlotState { seq: state.seq, owner: taker, phase: Phase::Claimed }.pack();
            // Acquire: partner is post()'s release store.
            let won = slot.state_word().compare_exchange(word, claimed, Ordering::AcqRel, Ordering::Relaxed);
            if won.is_ok() {
                self.header.advance(state.seq);
                return Some(Take { slot, seq: state.seq, sges: state.owner });
            }
        }
    }

    fn index(&self, seq: u32) -> u16 {
        (seq & self.slots.depth().wrapping_sub(1)) as u16
    }

    fn claim(&self, take: Take<'a>, ticket: &'a RecvSlot, number: u32, taker: u32) -> Claim<'a> {
        Claim::shared(take.slot, take.seq, taker, take.sges, ticket, number, self.index(take.seq))
    }

    /// Sender to the connected QP `qpn`, alone there: takes a receive and the QP's next ticket.
    pub fn claim_connected(&self, tickets: RqShared<'a>, qp: &QpShared, qpn: u32) -> Ready<'a> {
        let number = qp.head.load(Ordering::Relaxed);
        // Acquire: partner is the release store of QpShared::polled().
        if number.wrapping_sub(qp.taken.load(Ordering::Acquire)) >= tickets.depth() {
            return Ready::Full;
        }
        let Some(ticket) = tickets.slot(number) else { return Ready::Full };
        let Some(take) = self.take(qpn, |_| {}) else { return Ready::NotReady };
        qp.head.store(number.wrapping_add(1), Ordering::Relaxed);
        Ready::Claim(self.claim(take, ticket, number, qpn))
    }

    /// Takes up the claim of an earlier call.
    pub fn resume_connected(
        &self,
        tickets: RqShared<'a>,
        qp: &QpShared,
        (seq, sges): (u32, u32),
        qpn: u32,
    ) -> Option<Claim<'a>> {
        let number = qp.head.load(Ordering::Relaxed).wrapping_sub(1);
        let take = Take { slot: self.slots.slot(seq)?, seq, sges };
        let claimed = SlotState { seq, owner: qpn, phase: Phase::Claimed }.pack();
        let mine = take.slot.state_word().load(Ordering::Relaxed) == claimed;
        let ticket = tickets.slot(number).filter(|ticket| mine && !ticket.is_done(number))?;
        Some(self.claim(take, ticket, number, qpn))
    }

    /// Sender of a datagram, one of many: a ticket first, which says what is about to be taken, so that the owner knows
    /// what to look for should this process die.
    pub fn claim_datagram(&self, tickets: RqShared<'a>, head: &AtomicU32, client: u32) -> Option<Claim<'a>> {
        let ticket = tickets.claim(head, client)?;
        match self.take(client, |seq| ticket.intend(seq)) {
            Some(take) => Some(self.claim(take, ticket.slot(), ticket.seq(), client)),
            None => {
                ticket.release(head);
                None
            }
        }
    }

    /// Sender, after [`SrqShared::wait_for_receive`]: is there one after all?
    pub fn ready(&self) -> bool {
        self.find().is_some()
    }

    /// Owner: who took the receive in slot `index`? None: it waits, or is free.
    pub fn taker(&self, index: u32) -> Option<SlotState> {
        let state = SlotState::unpack(self.slots.slot(index)?.state_word().load(Ordering::Acquire));
        (state.phase == Phase::Claimed).then_some(state)
    }
}

impl Completion {
    /// Of a ticket: the receive it names was taken in vain.
    pub const RETURNED: u8 = 0x10;
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::ring::Taken;

    struct World {
        header: SrqShared,
        slots: Vec<RecvSlot>,
        tickets: [Vec<RecvSlot>; 2],
        qps: [QpShared; 2],
    }

    fn slots(n: usize) -> Vec<RecvSlot> {
        std::iter::repeat_with(RecvSlot::default).take(n).collect()
    }

    impl World {
        fn new(depth: usize, tickets: usize) -> Self {
            World {
                header: SrqShared::default(),
                slots: slots(depth),
                tickets: [slots(tickets), slots(tickets)],
                qps: Default::default(),
            }
        }

        fn ring(&self) -> SrqRing<'_> {
            SrqRing { header: &self.header, slots: RqShared::new(&self.slots) }
        }

        fn tickets(&self, qp: usize) -> RqShared<'_> {
            RqShared::new(&self.tickets[qp])
        }

        fn claim(&self, qp: usize) -> Ready<'_> {
            self.ring().claim_connected(self.tickets(qp), &self.qps[qp], 100 + qp as u32)
        }

        fn send(&self, qp: usize) -> bool {
            let Ready::Claim(claim) = self.claim(qp) else { return false };
            claim.complete(&Completion::default(), true);
            true
        }

        fn polled(&self, qp: usize, number: u32) -> Option<u16> {
            match self.tickets(qp).take(number, false, false)? {
                Taken::Done(said, _) => Some(said.slot),
                Taken::Flushed => None,
            }
        }
    }

    #[test]
    fn two_queue_pairs_take_turns_and_each_keeps_its_order() {
        let w = World::new(4, 4);
        (0..4).for_each(|seq| w.ring().post(seq, &[]));
        for qp in [0, 1, 1, 0] {
            assert!(w.send(qp));
        }
        assert!(matches!(w.claim(0), Ready::NotReady));
        let of = |qp: usize| (0..2).map(|number| w.polled(qp, number)).collect::<Vec<_>>();
        assert_eq!((of(0), of(1)), (vec![Some(0), Some(3)], vec![Some(1), Some(2)]));
        assert_eq!(w.ring().taker(2).map(|s| s.owner), Some(101));
    }

    #[test]
    fn a_receive_may_be_posted_past_one_that_is_in_use() {
        let w = World::new(2, 8);
        (0..2).for_each(|seq| w.ring().post(seq, &[]));
        let Ready::Claim(slow) = w.claim(0) else { panic!("posted") };
        assert!(w.send(1));
        // Number 2 would be the slot in use; 3 is free again.
        w.ring().post(3, &[]);
        assert!(w.send(1), "the slot in use is passed over");
        assert!(!w.send(1));
        w.ring().post(5, &[]);
        assert!(w.send(1));
        slow.complete(&Completion::default(), true);
        w.ring().post(6, &[]);
        assert!(w.send(0));
        assert_eq!((w.polled(0, 0), w.polled(0, 1)), (Some(0), Some(0)));
        assert_eq!(w.polled(1, 2), Some(1));
    }

    #[test]
    fn a_ring_of_tickets_that_nobody_polls_is_full() {
        let w = World::new(4, 2);
        (0..4).for_each(|seq| w.ring().post(seq, &[]));
        assert!(w.send(0) && w.send(0));
        assert!(matches!(w.claim(0), Ready::Full));
        assert!(w.send(1), "another QP is not held up");
        w.qps[0].polled(1);
        assert!(w.send(0));
    }

    #[test]
    fn the_limit_is_told_once() {
        let w = World::new(4, 4);
        (0..3).for_each(|seq| w.ring().post(seq, &[]));
        w.header.set_limit(2);
        assert!(w.send(0) && !w.header.below());
        assert!(w.send(0) && w.header.below());
        assert!(w.send(0) && !w.header.below());
    }

    #[test]
    fn a_datagram_without_a_receive_gives_its_ticket_back() {
        let w = World::new(2, 2);
        (0..2).for_each(|number| w.tickets(0).post(number, &[]));
        let claim = |w: &World| {
            w.ring()
                .claim_datagram(w.tickets(0), &w.qps[0].head, 7)
                .map(|c| c.complete(&Completion::default(), true))
        };
        assert!(claim(&w).is_none());
        w.ring().post(0, &[]);
        assert!(claim(&w).is_some());
        assert_eq!(w.polled(0, 0), Some(0));
    }

    #[test]
    fn a_dead_sender_of_datagrams_left_word_of_what_it_took() {
        let w = World::new(2, 2);
        (0..2).for_each(|number| w.tickets(0).post(number, &[]));
        (0..2).for_each(|seq| w.ring().post(seq, &[]));
        let _dies = w.ring().claim_datagram(w.tickets(0), &w.qps[0].head, 7).map(Claim::suspend);
        assert_eq!(w.tickets(0).repair(7), 1);
        let Some(Taken::Done(said, _)) = w.tickets(0).take(0, false, false) else { panic!("repaired") };
        assert_eq!((said.flags, said.byte_len), (Completion::LOST, 0));
        assert_eq!(w.ring().taker(said.byte_len).map(|s| (s.seq, s.owner)), Some((0, 7)));
    }

    #[test]
    fn numbers_wrap() {
        let w = World::new(4, 4);
        w.header.head.store(u32::MAX - 1, Ordering::Relaxed);
        for seq in (0..8).map(|i| (u32::MAX - 1).wrapping_add(i)) {
            w.ring().post(seq, &[]);
            assert!(w.send(0));
            w.qps[0].polled(w.qps[0].head.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn nonsense_in_the_header_finds_nothing() {
        let w = World::new(4, 4);
        for (head, tail) in [(9, 3), (u32::MAX, 5), (0, u32::MAX), (1 << 31, 0)] {
            w.header.head.store(head, Ordering::Relaxed);
            w.header.tail.store(tail, Ordering::Relaxed);
            assert!(!w.ring().ready());
        }
        assert!(!SrqRing { header: &w.header, slots: RqShared::new(&[]) }.ready());
    }
}
