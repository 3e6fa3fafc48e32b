//! Receive slots.
//!
//! A slot's `state` word says who may fill it: `seq << 32 | owner << 8 | phase`. Sequence numbers count posted
//! receives (modulo 2^32); slot `seq % depth` holds receive `seq`. One phase has one writer:
//!
//! | phase   | written by            | meaning                                             |
//! |---------|-----------------------|-----------------------------------------------------|
//! | FREE    | owner                 | nothing posted                                      |
//! | POSTED  | owner                 | a receive waits; `owner` field = number of sges     |
//! | CLAIMED | the sender that won   | being filled; `owner` field = the sender's client id|
//! | FLUSHED | owner                 | taken back unused                                   |
//!
//! Every transition out of POSTED is a compare-and-swap, so that several senders (UD), and the owner flushing, agree.
//!
//! The sender says that it is done in a word of its own, `done`, with the same sequence number: the owner polls that
//! word's cache line, which so changes hands once a message, and neither claiming nor posting touches it.

use crate::sync::{AtomicU32, AtomicU64, Ordering, asym, store_fenced};
use crate::verbs::Sge;

/// Scatter entries per slot.
pub const MAX_SGE: usize = 16;
/// Payload bytes that fit into the completion's own cache line.
pub const INLINE_BYTES: usize = 40;

/// Whose turn a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Free = 0,
    Posted = 1,
    Claimed = 2,
    /// Of `done` only.
    Done = 3,
    Flushed = 4,
}

/// A slot's state word, unpacked. A word no one of us would write reads as `Free`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotState {
    pub seq: u32,
    /// 24 bits: number of sges while POSTED, client id while CLAIMED.
    pub owner: u32,
    pub phase: Phase,
}

impl SlotState {
    pub(super) fn pack(self) -> u64 {
        u64::from(self.seq) << 32 | u64::from(self.owner & 0xff_ffff) << 8 | self.phase as u64
    }

    pub(super) fn unpack(word: u64) -> Self {
        let phase = match word as u8 {
            1 => Phase::Posted,
            2 => Phase::Claimed,
            3 => Phase::Done,
            4 => Phase::Flushed,
            _ => Phase::Free,
        };
        SlotState { seq: (word >> 32) as u32, owner: (word >> 8) as u32 & 0xff_ffff, phase }
    }
}

/// One scatter entry in shared memory.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SharedSge {
    addr: AtomicU64,
    len_lkey: AtomicU64,
}

/// One receive, 512 bytes: the receive as posted, then a cache line that senders write. Processors fetch neighbours of a
/// line they load: those of the line that is polled are nobody's.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct RecvSlot {
    state: AtomicU64,
    sges: [SharedSge; MAX_SGE],
    _pad0: [u64; 15],
    /// [`SlotState`] of the receive that was filled last.
    done: AtomicU64,
    /// byte_len | imm << 32
    len_imm: AtomicU64,
    /// src_qp | status << 24 | opcode << 32 | flags << 40 | slot << 48
    meta: AtomicU64,
    inline: [AtomicU64; INLINE_BYTES / 8],
    _pad1: [u64; 8],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<RecvSlot>() == 512 && std::mem::offset_of!(RecvSlot, done) == 384);

/// What a sender says about a receive it filled. Hostile until judged: `byte_len` may be anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Completion {
    /// A `verbs::WcStatus` value.
    pub status: u8,
    /// A `verbs::WcOpcode` value as the receiver sees it, low 8 bits.
    pub opcode: u8,
    /// `verbs::wc_flags`, and [`Completion::INLINE`], [`Completion::SOLICITED`], [`Completion::IPV4`].
    pub flags: u8,
    pub byte_len: u32,
    /// As on the wire (big endian), untouched.
    pub imm: u32,
    /// 24 bits.
    pub src_qp: u32,
    /// Of a ticket ([`super::srq`]): the slot of the shared queue.
    pub slot: u16,
}

impl Completion {
    /// The payload is in the slot, not in the receive's buffers.
    pub const INLINE: u8 = 0x80;
    /// The header in front of a datagram is an IPv4 one.
    pub const IPV4: u8 = 0x04;
    /// The sender asked for a solicited event.
    pub const SOLICITED: u8 = 0x40;
    /// The sender died with the receive in hand: nothing was received.
    pub const LOST: u8 = 0x20;
}

/// The slots of one receive queue, wherever they are mapped.
#[derive(Debug, Clone, Copy)]
pub struct RqShared<'a> {
    slots: &'a [RecvSlot],
}

impl<'a> RqShared<'a> {
    /// `slots.len()` is the queue's depth: a power of two, so that sequence numbers may wrap.
    pub fn new(slots: &'a [RecvSlot]) -> Self {
        debug_assert!(slots.is_empty() || slots.len().is_power_of_two());
        RqShared { slots }
    }

    pub fn depth(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(super) fn slot(&self, seq: u32) -> Option<&'a RecvSlot> {
        self.slots.get(seq as usize & self.slots.len().wrapping_sub(1))
    }

    /// Owner: posts receive `seq`. The caller knows that the slot's previous receive was taken.
    pub fn post(&self, seq: u32, sges: &[Sge]) {
        let Some(slot) = self.slot(seq) else { return };
        for (shared, sge) in slot.sges.iter().zip(sges) {
            shared.addr.store(sge.addr, Ordering::Relaxed);
            shared.len_lkey.store(u64::from(sge.length) | u64::from(sge.lkey) << 32, Ordering::Relaxed);
        }
        let state = SlotState { seq, owner: sges.len() as u32, phase: Phase::Posted };
        // Release: partner is the acquire of claim()'s compare-and-swap, which then reads the sges. Fenced: partner is
        // QpShared::wait_for_receive(); the owner looks for a waiting sender next.
        store_fenced(&slot.state, state.pack());
    }

    /// Owner: posts receive `seq` again, which was said to be done but is [`Completion::LOST`].
    pub fn post_anew(&self, seq: u32, sges: &[Sge]) {
        let Some(slot) = self.slot(seq) else { return };
        slot.done.store(0, Ordering::Relaxed);
        self.post(seq, sges);
    }

    /// Who claimed receive `seq` last, its client id.
    pub fn claimant(&self, seq: u32) -> u32 {
        self.slot(seq).map_or(0, |slot| SlotState::unpack(slot.state.load(Ordering::Relaxed)).owner)
    }

    /// The word that says who may fill receive `seq`: worth having near before it is needed.
    pub fn state_word(&self, seq: u32) -> Option<&'a AtomicU64> {
        self.slot(seq).map(|slot| &slot.state)
    }

    /// The oldest receive that waits, and its slot's state word. `head` is the hint in the QP's header: several senders (UD)
    /// store it without each other, and the owner may ([`RqShared::look_back`]), so it may be old by any number of rounds.
    #[inline]
    fn find(&self, head: &AtomicU32) -> Option<(&'a RecvSlot, u64, SlotState)> {
        let mut seq = head.load(Ordering::Relaxed);
        // Once round the queue, and once more for an old hint.
        for _ in 0..=self.depth() {
            let slot = self.slot(seq)?;
            let word = slot.state.load(Ordering::Relaxed);
            let state = SlotState::unpack(word);
            match state.seq.wrapping_sub(seq).cast_signed() {
                0 => {}
                // Posted anew since: everything up to a round before it was taken.
                1.. => {
                    seq = state.seq.wrapping_sub(self.depth()).wrapping_add(1);
                    continue;
                }
                // Given back when others had passed it, a round ago.
                _ if state.phase == Phase::Posted => {}
                _ => return None,
            }
            match state.phase {
                Phase::Posted => return Some((slot, word, state)),
                Phase::Free | Phase::Flushed => return None,
                _ => seq = seq.wrapping_add(1), // claimed or done by another sender: the hint was old
            }
        }
        None
    }

    /// Sender: claims the oldest waiting receive. `None` means receiver not ready.
    #[inline]
    pub fn claim(&self, head: &AtomicU32, client: u32) -> Option<Claim<'a>> {
        // A slot that another sender or the owner was faster to take is not found again.
        loop {
            let (slot, word, SlotState { seq, owner, .. }) = self.find(head)?;
            let claimed = SlotState { seq, owner: client, phase: Phase::Claimed }.pack();
            // Acquire: partner is post()'s release store.
            let won = slot.state.compare_exchange(word, claimed, Ordering::Acquire, Ordering::Relaxed);
            if won.is_ok() {
                head.store(seq.wrapping_add(1), Ordering::Relaxed);
                return Some(Claim::own(slot, seq, client, owner));
            }
        }
    }

    /// Sender: does a receive wait? The re-check of the RNR handshake ([`super::qp`]).
    pub fn ready(&self, head: &AtomicU32) -> bool {
        self.find(head).is_some()
    }

    /// Owner of a queue with several senders: if they passed receive `seq`, the oldest, because one gave it back too
    /// late, the hint leads them to it again.
    pub fn look_back(&self, seq: u32, head: &AtomicU32) {
        let state = |seq| self.slot(seq).map(|slot| SlotState::unpack(slot.state.load(Ordering::Relaxed)));
        let waits = state(seq).is_some_and(|slot| slot.phase == Phase::Posted);
        let next = seq.wrapping_add(1);
        let passed = |slot: SlotState| slot.seq == next && slot.phase == Phase::Claimed;
        if waits && state(next).is_some_and(passed) {
            head.store(seq, Ordering::Relaxed);
        }
    }

    /// Owner: takes receive `seq` if it is complete. With `flush`, a receive that still waits is taken back, and with
    /// `deserted` (nobody fills any more) one that a sender had claimed as well.
    pub fn take(&self, seq: u32, flush: bool, deserted: bool) -> Option<Taken<'a>> {
        let slot = self.slot(seq)?;
        // Partner is the release store of Claim::complete.
        if slot.is_done(seq) {
            return Some(Taken::Done(slot.completion(), SlotPayload(slot)));
        }
        if !flush {
            return None;
        }
        let word = slot.state.load(Ordering::Acquire);
        // Anything but POSTED and CLAIMED is scribbling: the receive is lost, not the queue.
        if SlotState::unpack(word).phase == Phase::Claimed && !deserted {
            return None;
        }
        let flushed = SlotState { seq, owner: 0, phase: Phase::Flushed }.pack();
        let won = slot.state.compare_exchange(word, flushed, Ordering::AcqRel, Ordering::Relaxed);
        won.is_ok().then_some(Taken::Flushed)
    }

    /// Owner: frees the slot of a receive it has taken, so that a reset queue starts clean.
    pub fn clear(&self) {
        for slot in self.slots {
            slot.done.store(0, Ordering::Relaxed);
            slot.state.store(0, Ordering::Release);
        }
    }

    /// Owner: is any receive being filled at this moment? Deregistration waits for them.
    pub fn any_claimed(&self) -> bool {
        self.slots.iter().any(|slot| {
            let state = SlotState::unpack(slot.state.load(Ordering::SeqCst));
            state.phase == Phase::Claimed && !slot.is_done(state.seq)
        })
    }

    /// Router: marks what a dead client had claimed as [`Completion::LOST`], for the owner to post anew: only it knows the
    /// list's length. Returns how many slots.
    pub fn repair(&self, client: u32) -> usize {
        let mut repaired = 0;
        for slot in self.slots {
            let state = SlotState::unpack(slot.state.load(Ordering::Relaxed));
            if state.phase != Phase::Claimed || state.owner != client || slot.is_done(state.seq) {
                continue;
            }
            // The rest of the completion stays: it may be what Claim::intend() said.
            slot.meta.store(u64::from(Completion::LOST) << 40, Ordering::Relaxed);
            slot.done.store(done(state.seq), Ordering::Release);
            repaired += 1;
        }
        repaired
    }
}

/// What `done` says once receive `seq` is filled.
fn done(seq: u32) -> u64 {
    SlotState { seq, owner: 0, phase: Phase::Done }.pack()
}

impl RecvSlot {
    pub(super) fn state_word(&self) -> &AtomicU64 {
        &self.state
    }

    /// Acquire: what was written to the receive's buffers came before.
    pub(super) fn is_done(&self, seq: u32) -> bool {
        self.done.load(Ordering::Acquire) == done(seq)
    }

    fn completion(&self) -> Completion {
        let len_imm = self.len_imm.load(Ordering::Relaxed);
        let meta = self.meta.load(Ordering::Relaxed);
        Completion {
            byte_len: len_imm as u32,
            imm: (len_imm >> 32) as u32,
            src_qp: meta as u32 & 0xff_ffff,
            status: (meta >> 24) as u8,
            opcode: (meta >> 32) as u8,
            flags: (meta >> 40) as u8,
            slot: (meta >> 48) as u16,
        }
    }

    fn set_completion(&self, c: &Completion) {
        self.len_imm.store(u64::from(c.byte_len) | u64::from(c.imm) << 32, Ordering::Relaxed);
        let meta = u64::from(c.src_qp & 0xff_ffff)
            | u64::from(c.status) << 24
            | u64::from(c.opcode) << 32
            | u64::from(c.flags) << 40
            | u64::from(c.slot) << 48;
        self.meta.store(meta, Ordering::Relaxed);
    }
}

/// A receive taken by its owner.
#[derive(Debug)]
pub enum Taken<'a> {
    Done(Completion, SlotPayload<'a>),
    Flushed,
}

/// The inline payload of a completed slot.
#[derive(Debug)]
pub struct SlotPayload<'a>(&'a RecvSlot);

impl SlotPayload<'_> {
    /// Copies the payload out.
    pub fn read(&self) -> [u8; INLINE_BYTES] {
        let mut bytes = [0; INLINE_BYTES];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&self.0.inline) {
            chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes
    }
}

/// A receive this sender is filling. It must end in [`Claim::complete`] or [`Claim::release`].
#[derive(Debug)]
#[must_use = "a claim that is dropped stalls the receiver"]
pub struct Claim<'a> {
    slot: &'a RecvSlot,
    seq: u32,
    client: u32,
    sges: u32,
    /// Where to say that it is filled, and as what: the slot itself, or a ticket for it.
    done: &'a RecvSlot,
    done_seq: u32,
    index: u16,
}

impl<'a> Claim<'a> {
    fn own(slot: &'a RecvSlot, seq: u32, client: u32, sges: u32) -> Self {
        Claim { slot, seq, client, sges, done: slot, done_seq: seq, index: 0 }
    }

    /// Of a shared queue's slot `index`, with the ticket that completes it.
    pub(super) fn shared(
        slot: &'a RecvSlot,
        seq: u32,
        client: u32,
        sges: u32,
        done: &'a RecvSlot,
        done_seq: u32,
        index: u16,
    ) -> Self {
        Claim { slot, seq, client, sges, done, done_seq, index }
    }

    pub(super) fn slot(&self) -> &'a RecvSlot {
        self.slot
    }

    pub(super) fn seq(&self) -> u32 {
        self.seq
    }

    /// Of a ticket: leaves word of the receive that is taken next.
    pub(super) fn intend(&self, seq: u32) {
        self.done.len_imm.store(u64::from(seq), Ordering::Relaxed);
    }

    /// The scatter list, each entry copied out once.
    pub fn sges(&self) -> impl Iterator<Item = Sge> + '_ {
        self.slot.sges.iter().take(self.sges as usize).map(|shared| {
            let len_lkey = shared.len_lkey.load(Ordering::Relaxed);
            Sge {
                addr: shared.addr.load(Ordering::Relaxed),
                length: len_lkey as u32,
                lkey: (len_lkey >> 32) as u32,
            }
        })
    }

    /// Puts a payload of at most [`INLINE_BYTES`] into the slot.
    pub fn write_inline(&self, bytes: &[u8]) {
        let mut padded = [0u8; INLINE_BYTES];
        padded[..bytes.len()].copy_from_slice(bytes);
        for (word, chunk) in self.done.inline.iter().zip(padded.chunks_exact(8)).take(bytes.len().div_ceil(8))
        {
            let mut value = [0u8; 8];
            value.copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
    }

    fn claimed(&self) -> u64 {
        SlotState { seq: self.seq, owner: self.client, phase: Phase::Claimed }.pack()
    }

    /// Hands the filled receive to its owner. `fenced`: [`CqShared::needs_fence`](super::CqShared::needs_fence).
    #[inline]
    pub fn complete(self, completion: &Completion, fenced: bool) {
        self.done.set_completion(&Completion { slot: self.index, ..*completion });
        // Release: partner is the acquire load of take(). A plain store: nobody else writes here unless this process is
        // dead or the owner gave up on it, and then the value no longer matters. The fence's partner is CqShared::arm() and
        // map(); the caller looks at the flags next.
        if fenced {
            store_fenced(&self.done.done, done(self.done_seq));
        } else {
            self.done.done.store(done(self.done_seq), Ordering::Release);
            asym::light();
        }
    }

    /// Gives the receive back untouched.
    pub fn release(self, head: &AtomicU32) {
        if !std::ptr::eq(self.slot, self.done) {
            return self.complete(&Completion { flags: Completion::RETURNED, ..Completion::default() }, true);
        }
        let posted = SlotState { seq: self.seq, owner: self.sges, phase: Phase::Posted }.pack();
        head.store(self.seq, Ordering::Relaxed);
        let _ =
            self.slot.state.compare_exchange(self.claimed(), posted, Ordering::Release, Ordering::Relaxed);
    }

    /// Splits a claim that outlives this call (a large copy) into plain numbers.
    pub fn suspend(self) -> (u32, u32) {
        (self.seq, self.sges)
    }

    /// Takes up a claim suspended by this client.
    pub fn resume(rq: RqShared<'a>, suspended: (u32, u32), client: u32) -> Option<Self> {
        let (seq, sges) = suspended;
        let claim = Claim::own(rq.slot(seq)?, seq, client, sges);
        let mine = claim.slot.state.load(Ordering::Relaxed) == claim.claimed() && !claim.slot.is_done(seq);
        mine.then_some(claim)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn slots(n: usize) -> Vec<RecvSlot> {
        std::iter::repeat_with(RecvSlot::default).take(n).collect()
    }

    #[test]
    fn a_receive_goes_round() {
        let slots = slots(4);
        let rq = RqShared::new(&slots);
        let head = AtomicU32::new(0);
        assert!(rq.claim(&head, 7).is_none(), "nothing posted");
        for seq in 0..100u32 {
            let sge = Sge { addr: 0x1000 + u64::from(seq), length: 64, lkey: 9 };
            rq.post(seq, &[sge]);
            let claim = rq.claim(&head, 7).expect("posted");
            assert_eq!(claim.sges().collect::<Vec<_>>(), [sge]);
            assert!(rq.take(seq, false, false).is_none(), "not complete yet");
            claim.write_inline(b"hello, world");
            let sent = Completion {
                byte_len: 12,
                imm: seq,
                src_qp: 0xabcdef,
                flags: 0xc1,
                opcode: 128,
                status: 3,
                slot: 0,
            };
            claim.complete(&sent, true);
            let Some(Taken::Done(c, payload)) = rq.take(seq, false, false) else { panic!("not done") };
            assert_eq!(c, sent);
            assert_eq!(&payload.read()[..12], b"hello, world");
        }
    }

    #[test]
    fn flush_takes_back_what_waits_but_not_what_is_being_filled() {
        let slots = slots(2);
        let rq = RqShared::new(&slots);
        let head = AtomicU32::new(0);
        rq.post(0, &[]);
        rq.post(1, &[]);
        let claim = rq.claim(&head, 1).expect("posted");
        assert!(rq.take(0, true, false).is_none());
        assert!(rq.any_claimed());
        assert!(matches!(rq.take(1, true, false), Some(Taken::Flushed)));
        claim.release(&head);
        assert!(matches!(rq.take(0, true, false), Some(Taken::Flushed)));
        assert!(rq.claim(&head, 1).is_none());
    }

    #[test]
    fn a_dead_senders_claim_is_repaired() {
        let slots = slots(2);
        let rq = RqShared::new(&slots);
        let head = AtomicU32::new(0);
        rq.post(0, &[]);
        let suspended = rq.claim(&head, 5).expect("posted").suspend();
        assert!(Claim::resume(rq, suspended, 5).is_some());
        assert_eq!((rq.repair(4), rq.repair(5)), (0, 1));
        assert!(matches!(rq.take(0, false, false), Some(Taken::Done(c, _)) if c.flags == Completion::LOST));
        assert!(Claim::resume(rq, suspended, 5).is_none());
    }

    /// Senders of a UD queue store the hint without each other: any value may be left behind.
    #[test]
    fn any_hint_leads_to_the_oldest_receive_that_waits() {
        for depth in [1, 2, 4] {
            let slots = slots(depth);
            let rq = RqShared::new(&slots);
            let head = AtomicU32::new(0);
            let start = u32::MAX - 9; // over the end of the sequence numbers
            for seq in start..=start.wrapping_add(depth as u32 - 1) {
                rq.post(seq, &[]);
            }
            head.store(start, Ordering::Relaxed);
            for seq in (0..40).map(|i| start.wrapping_add(i)) {
                for lag in [0, 1, depth as u32, 3 * depth as u32 + 1] {
                    head.store(seq.wrapping_sub(lag), Ordering::Relaxed);
                    assert!(rq.ready(&head), "depth {depth}, hint {lag} behind");
                    let claim = rq.claim(&head, 1).expect("a receive waits");
                    assert_eq!(claim.suspend().0, seq, "depth {depth}, hint {lag} behind");
                    assert!(Claim::resume(rq, (seq, 0), 1).is_some_and(|c| {
                        c.release(&head);
                        true
                    }));
                }
                rq.claim(&head, 1).expect("posted").complete(&Completion::default(), true);
                assert!(rq.take(seq, false, false).is_some());
                rq.post(seq.wrapping_add(depth as u32), &[]);
            }
        }
    }

    #[test]
    fn a_receive_that_was_passed_over_is_found_again() {
        let slots = slots(4);
        let rq = RqShared::new(&slots);
        let head = AtomicU32::new(0);
        (0..4).for_each(|seq| rq.post(seq, &[]));
        let slow = rq.claim(&head, 1).expect("posted");
        let fast = rq.claim(&head, 2).expect("posted");
        slow.release(&head);
        fast.complete(&Completion::default(), true);
        head.store(2, Ordering::Relaxed); // the fast one's store of the hint came last
        assert!(rq.take(0, false, false).is_none());
        rq.look_back(0, &head);
        assert_eq!(rq.claim(&head, 1).expect("posted").suspend().0, 0);
        // What was given back may be claimed by now, and the hint still leads back: behind it others wait.
        head.store(0, Ordering::Relaxed);
        assert!(rq.ready(&head));
        assert_eq!(rq.claim(&head, 1).expect("posted").suspend().0, 2);
    }

    #[test]
    fn nothing_is_claimed_where_nothing_waits() {
        let slots = slots(2);
        let rq = RqShared::new(&slots);
        for hint in [0, 1, 2, 77, u32::MAX] {
            let head = AtomicU32::new(hint);
            assert!(!rq.ready(&head) && rq.claim(&head, 1).is_none());
        }
        assert!(RqShared::new(&[]).claim(&AtomicU32::new(0), 1).is_none());
    }
}
