//! The two halves of a queue pair against each other, over a wire that breaks: every request is carried out once, in order.
//!
//! A seed that fails is in the message; `FF_LINK_SEED=N cargo test -p freeflow-router simulated` runs it alone.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use freeflow_core::exec::Target;
use freeflow_core::verbs::{SendFlags, SendOp, WcStatus};
use proptest::prelude::*;

use super::clock::Clock;
use super::requester::{Requester, Source, Wr};
use super::responder::{PendingRead, Responder, Verdict};
use super::wire::{Header, Kind};

const MOST: u32 = 100;
const OPS: [SendOp; 5] = [SendOp::Write, SendOp::Send, SendOp::Read, SendOp::FetchAdd, SendOp::WriteImm];

/// splitmix64
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

fn wr(op: SendOp, number: u32, total: u32) -> Wr {
    Wr {
        op,
        flags: SendFlags::empty(),
        imm: number,
        target: Target::Receive,
        source: Source::List(vec![]),
        srqn: 0,
        total: if op.is_atomic() { 8 } else { total },
        quiet: false,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        bad: None,
    }
}

struct World {
    dice: Dice,
    /// The system's clock; at times this router has no processor for long.
    system: Instant,
    clock: Clock,
    now: Instant,
    heard: Instant,
    requester: Requester,
    responder: Responder,
    incarnation: u64,
    up: bool,
    there: VecDeque<Header>,
    back: VecDeque<Header>,
    /// Numbers of the requests carried out, by kind of effect: READs may be answered again, nothing else may.
    carried_out: Vec<u32>,
    atomics: Vec<u32>,
    posted: u32,
    breaks: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let epoch = dice.roll(1 << 32) as u32;
        let now = Instant::now();
        World {
            requester: Requester::new(epoch, true),
            responder: Responder::new(),
            incarnation: dice.roll(u64::MAX),
            dice,
            system: now,
            clock: Clock::new(now),
            now,
            heard: now,
            up: false,
            there: VecDeque::new(),
            back: VecDeque::new(),
            carried_out: vec![],
            atomics: vec![],
            posted: 0,
            breaks: true,
        }
    }

    fn step(&mut self) {
        self.system += Duration::from_micros(self.dice.roll(200));
        if self.dice.roll(16) == 0 {
            self.system += Duration::from_secs(10);
        }
        self.now = self.clock.turn(self.system);
        let deadline = self.requester.deadline(self.heard);
        assert!(
            deadline.is_none_or(|deadline| self.now < deadline),
            "the other side is there: {:?}",
            self.requester
        );
        match self.dice.roll(12) {
            0 if self.up && self.breaks && self.dice.roll(8) == 0 => self.lose(),
            0 | 1 if !self.up => self.connect(),
            2 | 3 if self.posted < 60 && self.requester.room() > 0 => {
                let op = OPS[self.dice.roll(5) as usize];
                let total = self.dice.roll(350) as u32;
                self.requester.push(wr(op, self.posted, total), self.now);
                self.posted += 1;
            }
            4..=6 => self.send(),
            7..=9 => {
                if let Some(header) = self.there.pop_front() {
                    self.arrive(&header);
                }
            }
            _ => {
                if let Some(header) = self.back.pop_front() {
                    self.answer(&header);
                }
            }
        }
    }

    fn lose(&mut self) {
        self.up = false;
        self.there.clear();
        self.back.clear();
        self.requester.reopen();
    }

    fn connect(&mut self) {
        self.up = true;
        let (seq, epoch) = self.requester.reopen();
        self.there.push_back(Header { seq, epoch, a: self.incarnation, ..Header::new(Kind::Open, 1, 2) });
    }

    fn send(&mut self) {
        if !self.up {
            return;
        }
        if let Some(piece) = self.requester.piece(MOST, self.now) {
            let header = Header {
                op: piece.wr.op as u8,
                imm: piece.wr.imm,
                total: piece.wr.total,
                seq: piece.seq,
                epoch: piece.epoch,
                offset: piece.offset,
                len: piece.len,
                ..Header::new(Kind::Request, 1, 2)
            };
            self.there.push_back(header);
        }
    }

    fn say(&mut self, kind: Kind, header: Header) {
        self.back.push_back(Header { kind: kind as u8, ..header });
    }

    fn arrive(&mut self, header: &Header) {
        if header.kind == Kind::Open as u8 {
            let seq = self.responder.open(header);
            return self.say(Kind::Opened, Header { seq, epoch: header.epoch, ..Header::default() });
        }
        let op = SendOp::try_from(u32::from(header.op)).expect("ours");
        let epoch = header.epoch;
        match self.responder.judge(header, op) {
            Verdict::Nonsense => panic!("an honest piece was nonsense: {header:?}"),
            Verdict::Discard => {}
            Verdict::Again => match self.responder.remembered(header.seq) {
                Some(a) => {
                    self.say(Kind::AtomicResult, Header { seq: header.seq, epoch, a, ..Header::default() })
                }
                None if op == SendOp::Read => {
                    self.responder.read(header);
                    self.answer_reads();
                }
                None => {}
            },
            Verdict::Execute => self.execute(header, op),
        }
        let (seq, epoch) = (self.responder.expected(), self.responder.epoch());
        self.say(Kind::Ack, Header { seq, epoch, ..Header::default() });
    }

    fn execute(&mut self, header: &Header, op: SendOp) {
        if op.consumes_receive() && self.dice.roll(4) == 0 {
            self.responder.not_ready();
            return self.say(Kind::RnrNak, Header { imm: 1, ..*header });
        }
        self.responder.came += header.len;
        if !op.writes_locally() && self.responder.came < header.total {
            return;
        }
        if op == SendOp::Read {
            self.responder.read(header);
        }
        if op.is_atomic() {
            self.atomics.push(header.imm);
            self.responder.remember(header.seq, header.imm.into());
            self.say(Kind::AtomicResult, Header { a: header.imm.into(), ..*header });
        }
        self.carried_out.push(header.imm);
        self.responder.executed();
        self.answer_reads();
    }

    fn answer_reads(&mut self) {
        let epoch = self.responder.epoch();
        while let Some(PendingRead { seq, total, .. }) = self.responder.reads.pop_front() {
            let mut offset = 0;
            loop {
                let len = (total - offset).min(MOST);
                self.say(Kind::ReadData, Header { seq, epoch, offset, len, ..Header::default() });
                offset += len;
                if offset == total {
                    break;
                }
            }
        }
    }

    fn answer(&mut self, header: &Header) {
        let (seq, epoch, now) = (header.seq, header.epoch, self.now);
        self.heard = now;
        let requester = &mut self.requester;
        let sane = match header.kind {
            kind if kind == Kind::Opened as u8 => requester.on_opened(seq, epoch, now),
            kind if kind == Kind::Ack as u8 => requester.on_ack(seq, epoch, now),
            kind if kind == Kind::RnrNak as u8 => requester.on_rnr(seq, header.imm, true, epoch, now),
            kind if kind == Kind::ReadData as u8 => {
                if requester.reading(seq, header.offset, header.len, epoch).is_some() {
                    requester.on_answer(seq, header.len, now);
                }
                Ok(())
            }
            _ => {
                if let Some(wr) = requester.awaiting(seq, epoch) {
                    assert_eq!(u64::from(wr.imm), header.a, "the result is another atomic's");
                    requester.on_answer(seq, 8, now);
                }
                Ok(())
            }
        };
        sane.expect("an honest answer");
    }

    fn run(mut self, seed: u64) {
        for _ in 0..3000 {
            self.step();
        }
        self.breaks = false;
        for _ in 0..20_000 {
            if self.posted == 60 && self.requester.is_idle() {
                break;
            }
            self.step();
        }
        let all: Vec<u32> = (0..60).collect();
        assert_eq!(self.carried_out, all, "seed {seed}: each once, in order");
        assert_eq!(
            (self.requester.done(), self.requester.failure()),
            (60, None),
            "seed {seed}: {:?}",
            self.requester
        );
        assert!(self.atomics.is_sorted(), "seed {seed}");
    }
}

#[test]
fn simulated_requests_are_carried_out_once_and_in_order() {
    let only = std::env::var("FF_LINK_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in only.map_or(0..500, |seed: u64| seed..seed + 1) {
        World::new(seed).run(seed);
    }
}

#[test]
fn a_host_that_is_silent_fails_requests_after_their_own_time() {
    let start = Instant::now();
    let mut requester = Requester::new(7, true);
    assert_eq!(requester.deadline(start), None);
    requester.push(Wr { timeout: 17, retry_cnt: 1, ..wr(SendOp::Write, 0, 10) }, start);
    // 4.096 us * 2^17 * 2 = 1.07 s
    let deadline = requester.deadline(start).expect("it waits");
    assert_eq!((deadline - start).as_millis(), 1073);
    let heard = start + Duration::from_secs(3);
    assert_eq!((requester.deadline(heard).expect("it waits") - heard).as_millis(), 1073, "heard meanwhile");
    let mut patient = Requester::new(7, true);
    patient.push(Wr { timeout: 0, ..wr(SendOp::Write, 0, 10) }, start);
    assert_eq!(patient.deadline(start), None, "timeout 0 is for ever");
    requester.fail(WcStatus::RetryExcErr);
    assert_eq!((requester.done(), requester.failure()), (0, Some(WcStatus::RetryExcErr)));
}

#[test]
fn a_receiver_that_is_never_ready_fails_a_send_after_its_retries() {
    let mut now = Instant::now();
    let mut requester = Requester::new(1, true);
    let (_, epoch) = requester.reopen();
    requester.on_opened(0, epoch, now).expect("honest");
    requester.push(Wr { rnr_retry: 2, ..wr(SendOp::Send, 0, 10) }, now);
    let mut tries = 0;
    while requester.failure().is_none() {
        now += Duration::from_secs(1);
        let Some(piece) = requester.piece(MOST, now) else { panic!("it must be tried again") };
        let epoch = piece.epoch;
        tries += 1;
        requester.on_rnr(0, 1, true, epoch, now).expect("honest");
    }
    assert_eq!((tries, requester.failure()), (3, Some(WcStatus::RnrRetryExcErr)));
}

#[test]
fn a_receiver_that_is_only_slow_uses_up_no_retries() {
    let mut now = Instant::now();
    let mut requester = Requester::new(1, true);
    let (_, epoch) = requester.reopen();
    requester.on_opened(0, epoch, now).expect("honest");
    requester.push(Wr { rnr_retry: 0, ..wr(SendOp::Send, 0, 10) }, now);
    let mut responder = Responder::new();
    let waits: Vec<u32> = (0..14).map(|_| responder.busy()).collect();
    assert_eq!((waits[0], waits[13]), (1, 12), "less and less often");
    for wait in waits {
        now += Duration::from_millis(1);
        let piece = requester.piece(MOST, now).expect("it is tried again");
        let epoch = piece.epoch;
        requester.on_rnr(0, wait, false, epoch, now).expect("honest");
    }
    assert_eq!((requester.failure(), requester.is_idle()), (None, false));
}

#[test]
fn messages_of_uc_are_lost_and_count_as_sent() {
    let now = Instant::now();
    let mut requester = Requester::new(1, false);
    let (_, epoch) = requester.reopen();
    requester.push(wr(SendOp::Send, 0, 10), now);
    assert!(requester.deadline(now).is_some_and(|late| late <= now + Duration::from_secs(1)));
    requester.on_absent(epoch, now);
    requester.push(wr(SendOp::Send, 1, 10), now);
    assert_eq!((requester.done(), requester.failure(), requester.is_idle()), (2, None, true));
    // The peer is there now, and expects the first; half of the third goes out before the host falls silent.
    let (seq, epoch) = requester.reopen();
    let mut responder = Responder::new();
    responder.open(&Header { a: 5, ..Header::default() });
    assert_eq!(responder.open(&Header { a: 5, seq, ..Header::default() }), 2);
    requester.on_opened(2, epoch, now).expect("honest");
    requester.push(wr(SendOp::Write, 2, 150), now);
    assert_eq!(requester.piece(MOST, now).map(|piece| (piece.seq, piece.len)), Some((2, 100)));
    requester.give_up();
    assert_eq!((requester.done(), requester.failure()), (3, None));
    assert_eq!(requester.reopen().0, 3, "nothing more of it comes");
}

#[test]
fn a_queue_that_failed_goes_on_behind_the_failure() {
    let now = Instant::now();
    let mut requester = Requester::new(1, false);
    let (_, epoch) = requester.reopen();
    requester.on_opened(0, epoch, now).expect("honest");
    (0..2).for_each(|number| requester.push(wr(SendOp::Send, number, 10), now));
    let seq = requester.piece(MOST, now).map(|piece| piece.seq).expect("open");
    requester.fail_locally(seq, WcStatus::LocProtErr);
    assert_eq!(requester.failure(), Some(WcStatus::LocProtErr));
    requester.restart();
    let (first, epoch) = requester.reopen();
    requester.on_opened(first, epoch, now).expect("honest");
    requester.push(wr(SendOp::Send, 9, 10), now);
    assert_eq!(requester.piece(MOST, now).map(|piece| (piece.seq, piece.wr.imm)), Some((first, 9)));
}

#[test]
fn a_fence_waits_for_reads() {
    let now = Instant::now();
    let mut requester = Requester::new(1, true);
    let (_, epoch) = requester.reopen();
    requester.on_opened(0, epoch, now).expect("honest");
    requester.push(wr(SendOp::Read, 0, 10), now);
    requester.push(Wr { flags: SendFlags::FENCE, ..wr(SendOp::Send, 1, 10) }, now);
    assert_eq!(requester.piece(MOST, now).map(|piece| piece.seq), Some(0));
    assert_eq!(requester.piece(MOST, now), None);
    requester.on_answer(0, 10, now);
    assert_eq!(requester.piece(MOST, now).map(|piece| piece.seq), Some(1));
}

proptest! {
    /// Whatever another host answers, nothing is done that was not, and nothing panics.
    #[test]
    fn any_answers_leave_the_requester_whole(
        answers in proptest::collection::vec((0u8..8, 0u32..40, 0u32..40, 0u32..40), 0..60)
    ) {
        let now = Instant::now();
        let mut requester = Requester::new(0, true);
        let (_, epoch) = requester.reopen();
        requester.on_opened(0, epoch, now).expect("honest");
        for number in 0..30 {
            requester.push(wr(OPS[number as usize % 5], number, number * 10), now);
            if number % 3 > 0 {
                let _ = requester.piece(MOST, now);
            }
        }
        for (kind, seq, x, y) in answers {
            let epoch = x % 4;
            let _ = match kind {
                0 => requester.on_ack(seq, epoch, now),
                1 => requester.on_nak(seq, WcStatus::RemAccessErr, epoch, now),
                2 => requester.on_rnr(seq, y, x % 2 == 0, epoch, now),
                3 => requester.on_opened(seq, epoch, now),
                4 => { requester.on_absent(epoch, now); Ok(()) }
                5 => {
                    if requester.reading(seq, x, y, 1).is_some() {
                        requester.on_answer(seq, y, now);
                    }
                    Ok(())
                }
                6 => {
                    if requester.awaiting(seq, 1).is_some() {
                        requester.on_answer(seq, 8, now);
                    }
                    Ok(())
                }
                _ => { requester.reopen(); Ok(()) }
            };
            let _ = requester.piece(MOST, now);
            prop_assert!(requester.done() <= 30);
        }
    }

    /// No piece of any kind is carried out twice, or before its turn.
    #[test]
    fn any_pieces_are_carried_out_in_order_at_most(
        pieces in proptest::collection::vec((0u32..6, 0u32..4, 0u32..300, 0u32..120, 0u32..300, 0usize..5), 0..80)
    ) {
        let mut responder = Responder::new();
        responder.open(&Header { a: 5, ..Header::default() });
        let mut next = 0;
        for (seq, epoch, offset, len, total, op) in pieces {
            let header = Header { seq, epoch, offset, len, total, ..Header::default() };
            if responder.judge(&header, OPS[op]) != Verdict::Execute {
                continue;
            }
            prop_assert_eq!(seq, next);
            prop_assert!(offset + len <= total || OPS[op].writes_locally());
            responder.came += len;
            if OPS[op].writes_locally() || responder.came == total {
                responder.executed();
                next += 1;
            } else if len % 3 == 0 {
                responder.not_ready();
            }
        }
    }
}
