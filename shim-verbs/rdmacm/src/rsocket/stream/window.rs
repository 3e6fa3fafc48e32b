//! How much may be sent, and how much was received and not yet said so: the books of one direction each.
//!
//! A receiver has a ring of bytes that its peer writes into, and a fixed number of posted receives, one of which every
//! message consumes. The sender counts both against totals that only grow, and the receiver raises the totals when it
//! has consumed half of either. Pure arithmetic: it must never know memory, queue pairs or time.
//!
//! The last message that a sender may send is kept for a credit: two sides that wait for each other would else both be
//! out of messages. A credit that is sent raises a total, so whoever gets one can go on. The end of a stream has a
//! receive of its own, since it comes once.

/// What a message is, told by its immediate data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// That many bytes were written behind those that came before.
    Data(u32),
    /// The totals in the receiver's control block were raised.
    Credit,
    /// There will be no more data.
    Fin,
    /// That entry of the receiver's table of mapped buffers was changed.
    Mapping(u32),
}

/// Bits of an immediate that are not its kind.
const VALUE: u32 = (1 << 29) - 1;

/// Most bytes in one message.
pub const MAX_DATA: u32 = VALUE;

impl Word {
    pub fn encode(self) -> u32 {
        let (kind, value) = match self {
            Word::Data(len) => (0, len),
            Word::Credit => (1, 0),
            Word::Fin => (2, 0),
            Word::Mapping(index) => (3, index),
        };
        kind << 29 | value & VALUE
    }

    /// The word that `imm` is, if it is one.
    pub fn decode(imm: u32) -> Option<Word> {
        let value = imm & VALUE;
        match (imm >> 29, value) {
            (0, 1..) => Some(Word::Data(value)),
            (1, 0) => Some(Word::Credit),
            (2, 0) => Some(Word::Fin),
            (3, _) => Some(Word::Mapping(value)),
            _ => None,
        }
    }
}

/// The totals up to which a sender may send, as the receiver last said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes: u64,
    pub messages: u64,
}

/// The peer said what cannot be: the connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonsense;

/// The sending direction.
#[derive(Debug, Clone, Copy)]
pub struct Outbox {
    ring: u64,
    window: u64,
    sent: Limits,
    limits: Limits,
}

impl Outbox {
    /// Towards a ring of `ring` bytes with `window` receives.
    pub fn new(ring: u32, window: u16) -> Self {
        let (ring, window) = (u64::from(ring), u64::from(window));
        let limits = Limits { bytes: ring, messages: window };
        Outbox { ring, window, sent: Limits::default(), limits }
    }

    /// Bytes that may be sent now.
    pub fn room(&self) -> usize {
        match self.limits.messages - self.sent.messages {
            0 | 1 => 0,
            _ => (self.limits.bytes - self.sent.bytes) as usize,
        }
    }

    /// Where in the ring the next byte goes, and how many fit before its end.
    pub fn place(&self) -> (u64, usize) {
        let place = self.sent.bytes % self.ring;
        (place, (self.ring - place) as usize)
    }

    /// A message with `len` bytes goes out.
    pub fn send(&mut self, len: usize) {
        debug_assert!(len <= self.room());
        self.sent.bytes += len as u64;
        self.sent.messages += 1;
    }

    /// Whether a credit may go out.
    pub fn has_message(&self) -> bool {
        self.limits.messages > self.sent.messages
    }

    /// A message without bytes goes out.
    pub fn send_control(&mut self) {
        debug_assert!(self.has_message());
        self.sent.messages += 1;
    }

    /// The peer raised the totals.
    pub fn raise(&mut self, to: Limits) -> Result<(), Nonsense> {
        let grows = to.bytes >= self.limits.bytes && to.messages >= self.limits.messages;
        let fits = to.bytes <= self.sent.bytes + self.ring && to.messages <= self.sent.messages + self.window;
        match grows && fits {
            true => self.limits = to,
            false => return Err(Nonsense),
        }
        Ok(())
    }
}

/// The receiving direction.
#[derive(Debug, Clone, Copy)]
pub struct Inbox {
    ring: u64,
    window: u64,
    received: u64,
    /// Bytes consumed, and messages whose receive is posted again.
    done: Limits,
    /// What of that the peer was told.
    told: Limits,
}

impl Inbox {
    pub fn new(ring: u32, window: u16) -> Self {
        Inbox {
            ring: u64::from(ring),
            window: u64::from(window),
            received: 0,
            done: Limits::default(),
            told: Limits::default(),
        }
    }

    /// A message came; its receive is posted again. The end of the stream does not count.
    pub fn arrived(&mut self, word: Word) -> Result<(), Nonsense> {
        if word == Word::Fin {
            return Ok(());
        }
        if let Word::Data(len) = word {
            self.received += u64::from(len);
        }
        self.done.messages += 1;
        match self.received - self.done.bytes <= self.ring {
            true => Ok(()),
            false => Err(Nonsense),
        }
    }

    /// Bytes that wait to be read.
    pub fn unread(&self) -> usize {
        (self.received - self.done.bytes) as usize
    }

    /// Where in the ring the first of them is, and how many lie before its end.
    pub fn place(&self) -> (u64, usize) {
        let place = self.done.bytes % self.ring;
        (place, (self.ring - place) as usize)
    }

    /// They were read.
    pub fn consume(&mut self, len: usize) {
        debug_assert!(len <= self.unread());
        self.done.bytes += len as u64;
    }

    /// Whether the peer should hear how far this side is.
    pub fn owes(&self) -> bool {
        self.done.bytes - self.told.bytes >= self.ring / 2
            || self.done.messages - self.told.messages >= self.window / 2
    }

    /// What to tell it now.
    pub fn tell(&mut self) -> Limits {
        self.told = self.done;
        Limits { bytes: self.done.bytes + self.ring, messages: self.done.messages + self.window }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn words_survive_and_nonsense_is_none() {
        for word in [Word::Data(1), Word::Data(MAX_DATA), Word::Credit, Word::Fin, Word::Mapping(7)] {
            assert_eq!(Word::decode(word.encode()), Some(word));
        }
        for imm in [0, 1 << 29 | 1, 2 << 29 | 9, 4 << 29, u32::MAX] {
            assert_eq!(Word::decode(imm), None, "{imm:#x}");
        }
    }

    #[test]
    fn limits_that_shrink_or_lie_are_nonsense() {
        let mut out = Outbox::new(4096, 8);
        out.send(100);
        assert_eq!(out.raise(Limits { bytes: 4095, messages: 8 }), Err(Nonsense));
        assert_eq!(out.raise(Limits { bytes: 4197, messages: 8 }), Err(Nonsense));
        assert_eq!(out.raise(Limits { bytes: 4196, messages: 10 }), Err(Nonsense));
        assert_eq!(out.raise(Limits { bytes: 4196, messages: 9 }), Ok(()));
        let mut inbox = Inbox::new(4096, 8);
        assert_eq!(inbox.arrived(Word::Data(4000)), Ok(()));
        assert_eq!(inbox.arrived(Word::Data(97)), Err(Nonsense));
    }

    /// One end of a simulated stream: numbered bytes, the wire to it, what its program has read.
    struct End {
        out: Outbox,
        inbox: Inbox,
        wire: VecDeque<(Word, Limits)>,
        ring: Vec<u8>,
        written: u64,
        read: u64,
        receives: u64,
    }

    const RING: u32 = 4096;
    const WINDOW: u16 = 4;

    impl End {
        fn new() -> Self {
            let (out, inbox) = (Outbox::new(RING, WINDOW), Inbox::new(RING, WINDOW));
            let receives = u64::from(WINDOW);
            End {
                out,
                inbox,
                wire: VecDeque::new(),
                ring: vec![0; RING as usize],
                written: 0,
                read: 0,
                receives,
            }
        }

        fn send(&mut self, to: &mut End, most: usize) -> usize {
            let len = self.out.room().min(most).min(self.out.place().1);
            if len > 0 {
                let place = self.out.place().0 as usize;
                for byte in &mut to.ring[place..place + len] {
                    *byte = self.written as u8;
                    self.written += 1;
                }
                self.out.send(len);
                to.wire.push_back((Word::Data(len as u32), Limits::default()));
            }
            len
        }

        fn process(&mut self, to: &mut End) -> bool {
            let any = !self.wire.is_empty();
            assert!(self.wire.len() as u64 <= self.receives, "a message found no receive");
            while let Some((word, limits)) = self.wire.pop_front() {
                self.inbox.arrived(word).unwrap();
                if word == Word::Credit {
                    self.out.raise(limits).unwrap();
                }
            }
            self.credit(to) || any
        }

        fn credit(&mut self, to: &mut End) -> bool {
            let may = self.inbox.owes() && self.out.has_message();
            if may {
                self.out.send_control();
                to.wire.push_back((Word::Credit, self.inbox.tell()));
            }
            may
        }

        fn receive(&mut self, most: usize) -> usize {
            let (place, run) = self.inbox.place();
            let len = self.inbox.unread().min(most).min(run);
            for byte in &self.ring[place as usize..place as usize + len] {
                assert_eq!(*byte, self.read as u8);
                self.read += 1;
            }
            self.inbox.consume(len);
            len
        }
    }

    /// Two ends that send to each other at random: every byte arrives once and in order, no message finds the receive
    /// queue empty, and nobody ever waits for ever.
    #[test]
    fn streams_flow_both_ways_and_never_stand_still() {
        for seed in 1..200u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut random = move |below: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 33) as usize % below
            };
            let mut ends = [End::new(), End::new()];
            for _ in 0..3_000 {
                let [a, b] = &mut ends;
                let (me, other) = if random(2) == 0 { (a, b) } else { (b, a) };
                match random(4) {
                    0 | 1 => drop(me.send(other, 1 + random(3000))),
                    2 => drop(me.process(other)),
                    _ => {
                        me.receive(1 + random(5000));
                        me.credit(other);
                    }
                }
            }
            // Everybody reads, nobody sends: what was sent must arrive, and both must be able to send again.
            let mut moved = true;
            while moved {
                moved = false;
                for turn in 0..2 {
                    let [a, b] = &mut ends;
                    let (me, other) = if turn == 0 { (a, b) } else { (b, a) };
                    moved |= me.process(other);
                    while me.receive(usize::MAX) > 0 {
                        moved = true;
                    }
                    moved |= me.credit(other);
                }
            }
            let [a, b] = &ends;
            assert_eq!((a.written, b.written), (b.read, a.read), "seed {seed}");
            assert!(a.out.room() > 0 && b.out.room() > 0, "seed {seed}: {:?} {:?}", a.out, b.out);
        }
    }
}
