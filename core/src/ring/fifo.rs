//! A FIFO of messages from one process to one other, in memory of the receiver's that both have mapped.
//!
//! A slot's word carries its message's number, so that nothing has to be cleared: message `seq` is there exactly when
//! slot `seq % depth` says so. Short messages lie in the slot; longer ones in the FIFO's pool, a ring of bytes that the
//! sender alone hands out (a message is one piece of it) and gets back in order, as the receiver consumes slots.
//!
//! The only line that changes hands once a message is the slot's. The receiver's count of what it consumed is looked at
//! when the FIFO seems full; its bell word stays shared while it is awake.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence, store_fenced};

/// Payload bytes in a slot: with the two words, two cache lines.
pub const SLOT_BYTES: usize = if cfg!(loom) { 8 } else { 112 };
/// Longest message: what a slot's word can say.
pub const MAX_MESSAGE: usize = u16::MAX as usize;
/// Messages between two releases while more wait: each costs a store to a line that the sender may have.
const RELEASE_EVERY: u32 = if cfg!(loom) { 1 } else { 8 };
/// Pool addresses are multiples of this.
const GRAIN: u32 = 64;

/// The receiver's words.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct FifoShared {
    /// Messages consumed, modulo 2^32.
    consumed: AtomicU32,
    _pad0: [u32; 15],
    /// 1: the receiver sleeps, the next message must wake it.
    armed: AtomicU32,
    _pad1: [u32; 15],
}

/// A message's place.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct FifoSlot {
    /// [`Message`] packed, written last.
    word: AtomicU64,
    /// Where in the pool, if it is there.
    place: AtomicU64,
    payload: [AtomicU64; SLOT_BYTES / 8],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<FifoSlot>() == 128 && size_of::<FifoShared>() == 128);

impl FifoSlot {
    /// The payload's bytes.
    #[cfg(not(loom))]
    pub fn payload(&self) -> *mut u8 {
        self.payload.as_ptr().cast_mut().cast()
    }

    #[cfg(loom)]
    pub fn payload_word(&self) -> &AtomicU64 {
        &self.payload[0]
    }
}

/// What a slot's word says beside the number. The length is the sender's claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub len: u16,
    /// The doors' own.
    pub id: u8,
    /// In the pool, not in the slot.
    pub pooled: bool,
}

fn pack(seq: u32, message: Message) -> u64 {
    let Message { len, id, pooled } = message;
    // Never 0 in the low half: a slot that was never used holds no message, whatever its number.
    u64::from(seq) << 32 | u64::from(len) << 16 | u64::from(id) << 8 | u64::from(pooled) << 1 | 1
}

fn unpack(word: u64, seq: u32) -> Option<Message> {
    let there = (word >> 32) as u32 == seq && word & 1 == 1;
    there.then_some(Message { len: (word >> 16) as u16, id: (word >> 8) as u8, pooled: word & 2 != 0 })
}

/// The FIFO as one side sees it.
#[derive(Debug, Clone, Copy)]
pub struct Fifo<'a> {
    pub shared: &'a FifoShared,
    /// A power of two, so that numbers may wrap.
    pub slots: &'a [FifoSlot],
}

impl<'a> Fifo<'a> {
    fn slot(&self, seq: u32) -> &'a FifoSlot {
        &self.slots[seq as usize & (self.slots.len() - 1)]
    }
}

/// The sender's private half.
#[derive(Debug)]
pub struct FifoSender {
    next: u32,
    consumed: u32,
    pool: u32,
    /// Next byte of the pool to hand out.
    head: u32,
    /// Where the pool's used part begins.
    tail: u32,
    /// Per slot: where the pool's used part begins once its message is consumed.
    ends: Box<[u32]>,
}

impl FifoSender {
    /// For a new FIFO of `depth` slots (a power of two) and `pool` bytes (a multiple of 64).
    pub fn new(depth: usize, pool: u32) -> Self {
        assert!(depth.is_power_of_two() && pool.is_multiple_of(GRAIN));
        FifoSender { next: 0, consumed: 0, pool, head: 0, tail: 0, ends: vec![0; depth].into() }
    }

    fn has_slot(&self) -> bool {
        self.next.wrapping_sub(self.consumed) < self.ends.len() as u32
    }

    /// Looks at what the receiver has consumed. It may say anything: more than was sent counts as nothing.
    #[cold]
    fn refresh(&mut self, fifo: Fifo<'_>) {
        // Acquire: the receiver has read what it consumed. Partner: the release store in FifoReceiver::release.
        let consumed = fifo.shared.consumed.load(Ordering::Acquire);
        let step = consumed.wrapping_sub(self.consumed);
        if step == 0 || step > self.next.wrapping_sub(self.consumed) {
            return;
        }
        self.consumed = consumed;
        self.tail = self.ends[consumed.wrapping_sub(1) as usize & (self.ends.len() - 1)];
    }

    /// The slot of the next message, if there is one free.
    #[inline]
    pub fn slot<'a>(&mut self, fifo: Fifo<'a>) -> Option<&'a FifoSlot> {
        if !self.has_slot() {
            self.refresh(fifo);
        }
        self.has_slot().then(|| fifo.slot(self.next))
    }

    /// The same, with `len` bytes of the pool in one piece: their place in it.
    pub fn slot_and_place<'a>(&mut self, fifo: Fifo<'a>, len: u32) -> Option<(&'a FifoSlot, u32)> {
        let slot = self.slot(fifo)?;
        let place = self.place(len).or_else(|| {
            self.refresh(fifo);
            self.place(len)
        });
        place.map(|place| (slot, place))
    }

    fn place(&mut self, len: u32) -> Option<u32> {
        let len = len.max(1).next_multiple_of(GRAIN);
        // The used part is [tail, head), wrapped round the end if head < tail; it never fills the pool to the brim.
        if self.next == self.consumed {
            (self.head, self.tail) = (0, 0);
            return (len <= self.pool).then_some(0);
        }
        if self.head >= self.tail {
            if self.pool - self.head >= len && (self.head + len < self.pool || self.tail > 0) {
                return Some(self.head);
            }
            return (len < self.tail).then_some(0);
        }
        (len < self.tail - self.head).then_some(self.head)
    }

    /// Hands the message over. `place` is where it is in the pool. True: the receiver sleeps, wake it.
    #[inline]
    pub fn publish(&mut self, fifo: Fifo<'_>, len: u16, id: u8, place: Option<u32>) -> bool {
        let slot = fifo.slot(self.next);
        if let Some(place) = place {
            slot.place.store(u64::from(place), Ordering::Relaxed);
            let end = place + u32::from(len).max(1).next_multiple_of(GRAIN);
            self.head = if end == self.pool { 0 } else { end };
        }
        self.ends[self.next as usize & (self.ends.len() - 1)] = self.head;
        // Release: partner is the acquire load in FifoReceiver::peek. Fenced: partner is FifoReceiver::arm, either it
        // finds the message or we find the bell.
        store_fenced(&slot.word, pack(self.next, Message { len, id, pooled: place.is_some() }));
        self.next = self.next.wrapping_add(1);
        fifo.shared.armed.load(Ordering::Relaxed) != 0 && fifo.shared.armed.swap(0, Ordering::AcqRel) != 0
    }

    /// Has the receiver consumed everything?
    pub fn is_drained(&mut self, fifo: Fifo<'_>) -> bool {
        if self.consumed != self.next {
            self.refresh(fifo);
        }
        self.consumed == self.next
    }
}

/// The receiver's private half.
#[derive(Debug, Default, Clone, Copy)]
pub struct FifoReceiver {
    next: u32,
    released: u32,
}

impl FifoReceiver {
    /// The oldest message, if there is one: what it says, its slot, and its place in the pool (the sender's claim).
    #[inline]
    pub fn peek<'a>(&self, fifo: Fifo<'a>) -> Option<(Message, &'a FifoSlot, u64)> {
        let slot = fifo.slot(self.next);
        // Acquire: partner is publish()'s store.
        let message = unpack(slot.word.load(Ordering::Acquire), self.next)?;
        Some((message, slot, slot.place.load(Ordering::Relaxed)))
    }

    /// The message that was peeked has been read.
    #[inline]
    pub fn consume(&mut self, fifo: Fifo<'_>) {
        self.next = self.next.wrapping_add(1);
        if self.next.wrapping_sub(self.released) >= RELEASE_EVERY {
            self.release(fifo);
        }
    }

    fn release(&mut self, fifo: Fifo<'_>) {
        self.released = self.next;
        // Release: partner is the acquire load in FifoSender::refresh.
        fifo.shared.consumed.store(self.next, Ordering::Release);
    }

    /// Before sleeping: the next message rings. False: there is one already.
    pub fn arm(&mut self, fifo: Fifo<'_>) -> bool {
        if self.released != self.next {
            self.release(fifo);
        }
        fifo.shared.armed.store(1, Ordering::Relaxed);
        // Partner: the fence in publish().
        fence(Ordering::SeqCst);
        self.peek(fifo).is_none()
    }

    /// Nothing more is there: gives everything back, for a sender that waits.
    pub fn idle(&mut self, fifo: Fifo<'_>) {
        if self.released != self.next {
            self.release(fifo);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slots(n: usize) -> Vec<FifoSlot> {
        std::iter::repeat_with(FifoSlot::default).take(n).collect()
    }

    #[test]
    fn a_full_fifo_waits_for_its_receiver() {
        let (shared, slots) = (FifoShared::default(), slots(16));
        let fifo = Fifo { shared: &shared, slots: &slots };
        let (mut sender, mut receiver) = (FifoSender::new(16, 64), FifoReceiver::default());
        assert!(receiver.peek(fifo).is_none(), "an untouched slot is no message");
        for round in 0..50u32 {
            for i in 0..16 {
                assert!(sender.slot(fifo).is_some());
                assert!(!sender.publish(fifo, (round * 16 + i) as u16, 3, None));
            }
            assert!(sender.slot(fifo).is_none());
            for i in 0..16 {
                let (message, ..) = receiver.peek(fifo).expect("sent");
                assert_eq!(message, Message { len: (round * 16 + i) as u16, id: 3, pooled: false });
                receiver.consume(fifo);
            }
            assert!(receiver.peek(fifo).is_none());
        }
        assert!(sender.is_drained(fifo));
    }

    /// As a ping-pong does: small messages that reserve much, each read at once.
    #[test]
    fn a_pool_serves_for_ever() {
        let (shared, slots) = (FifoShared::default(), slots(128));
        let fifo = Fifo { shared: &shared, slots: &slots };
        let (mut sender, mut receiver) = (FifoSender::new(128, 256 << 10), FifoReceiver::default());
        for round in 0..20_000u32 {
            let (_, place) = sender.slot_and_place(fifo, 8256).expect("room");
            assert!(!sender.publish(fifo, 64, 1, Some(place)), "{round}");
            let (_, _, at) = receiver.peek(fifo).unwrap_or_else(|| panic!("message {round} is not there"));
            assert_eq!(at, u64::from(place));
            receiver.consume(fifo);
        }
    }

    #[test]
    fn whoever_armed_is_rung_once() {
        let (shared, slots) = (FifoShared::default(), slots(4));
        let fifo = Fifo { shared: &shared, slots: &slots };
        let (mut sender, mut receiver) = (FifoSender::new(4, 64), FifoReceiver::default());
        assert!(receiver.arm(fifo));
        assert!(sender.publish(fifo, 1, 0, None));
        assert!(!sender.publish(fifo, 1, 0, None));
        assert!(!receiver.arm(fifo), "two wait");
    }

    proptest! {
        /// Pieces of the pool that are in use never overlap, whatever the lengths and the pace.
        #[test]
        fn pieces_do_not_overlap(steps in proptest::collection::vec((0u16..400, 0u8..4), 1..400)) {
            let (shared, slots) = (FifoShared::default(), slots(32));
            let fifo = Fifo { shared: &shared, slots: &slots };
            let (mut sender, mut receiver) = (FifoSender::new(32, 1024), FifoReceiver::default());
            let mut used = std::collections::VecDeque::new();
            for (len, takes) in steps {
                if let Some((_, place)) = sender.slot_and_place(fifo, 400) {
                    let end = place + 400;
                    prop_assert!(end <= 1024);
                    prop_assert!(used.iter().all(|&(from, to)| end <= from || to <= place), "{place} in {used:?}");
                    used.push_back((place, place + u32::from(len)));
                    let _ = sender.publish(fifo, len, 0, Some(place));
                }
                for _ in 0..takes {
                    if let Some((message, _, place)) = receiver.peek(fifo) {
                        let (from, to) = used.pop_front().expect("one of ours");
                        prop_assert_eq!((u64::from(from), to - from), (place, u32::from(message.len)));
                        receiver.consume(fifo);
                    }
                }
            }
            while receiver.peek(fifo).is_some() { receiver.consume(fifo); }
            receiver.idle(fifo);
            prop_assert!(sender.is_drained(fifo));
            prop_assert!(sender.slot_and_place(fifo, 1024).is_some(), "an empty pool is whole again");
        }

        /// A receiver that counts nonsense harms nobody but itself.
        #[test]
        fn nonsense_in_the_count_is_ignored(says in any::<u32>(), sent in 0u32..5) {
            let (shared, slots) = (FifoShared::default(), slots(4));
            let fifo = Fifo { shared: &shared, slots: &slots };
            let mut sender = FifoSender::new(4, 64);
            for _ in 0..sent { let _ = sender.slot(fifo).map(|_| sender.publish(fifo, 0, 0, None)); }
            shared.consumed.store(says, Ordering::Relaxed);
            let _ = sender.slot_and_place(fifo, 64);
            prop_assert!(sender.next.wrapping_sub(sender.consumed) <= 4);
        }
    }
}
